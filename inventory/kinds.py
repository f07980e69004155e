"""The kinds of sections that stand with what they are about, above: open tables of where each is.

A place is "module:Class"; it is imported when it is first needed, so that a farm without a driver never
imports it. ``cli.composition`` fills the tables.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from inventory.base import Model
    from inventory.hosts import Host

_TOP = Path(__file__).parent.parent
hosts: dict[str, str] = {}
"""Of hosts, by their drivers."""
parts: dict[str, str] = {}
"""Of sections within those, by their classes' names."""


def host(driver: str) -> type[Host]:
    """KeyError: there is no such driver."""
    return cast("type[Host]", _imported(hosts[driver]))


def section(name: str) -> type[Model] | None:
    """By its class's name; None: no table has it."""
    place = places().get(name)
    return _imported(place) if place else None


def places() -> dict[str, str]:
    """Of all tables, by their classes' names."""
    return {place.rpartition(":")[2]: place for place in (*hosts.values(), *parts.values())}


def rooms() -> list[Path]:
    """The directories of all tables' modules: what decides about their sections is in there."""
    modules = dict.fromkeys(place.partition(":")[0] for place in places().values())
    return sorted({_file(module).parent for module in modules})


def _file(module: str) -> Path:
    own = _TOP / f"{module.replace('.', '/')}.py"
    if own.exists():  # found so without importing what it is in
        return own
    spec = find_spec(module)
    assert spec and spec.origin, module
    return Path(spec.origin)


@cache
def _imported(place: str) -> type[Model]:
    module, _, name = place.partition(":")
    found: type[Model] = getattr(import_module(module), name)
    return found
