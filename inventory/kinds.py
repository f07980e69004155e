"""Open tables (provisional, until the shared one is there)."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

hosts: dict[str, str] = {}


@cache
def resolve(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def host_section(driver: str) -> Any:
    """KeyError: there is no such driver."""
    return resolve(hosts[driver])
