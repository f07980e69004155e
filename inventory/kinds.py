"""The kinds of sections that stand with what they are about, above: open tables of where each is.

A place is "module:Class"; it is imported when it is first needed. ``cli.composition`` fills the tables.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from inventory.base import Model
    from inventory.model import Step

steps: dict[str, str] = {}
"""Of a cycle's steps, by the key that each kind is known by."""


def step(kind: str) -> type[Step]:
    """KeyError: there is no such kind."""
    return cast("type[Step]", _imported(steps[kind]))


def section(name: str) -> type[Model] | None:
    """By its class's name; None: no table has it."""
    place = places().get(name)
    return _imported(place) if place else None


def places() -> dict[str, str]:
    """Of all tables, by their classes' names."""
    return {place.rpartition(":")[2]: place for place in steps.values()}


@cache
def _imported(place: str) -> type[Model]:
    module, _, name = place.partition(":")
    found: type[Model] = getattr(import_module(module), name)
    return found
