"""The kinds of sections that stand with what they are about, above: open tables of where each is.

A place is "module:Class"; it is imported when it is first needed, so that a farm without a
service never imports what is known of it. ``cli.composition`` fills the tables.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from inventory.base import Model

M = TypeVar("M", bound=Model)
_TOP = Path(__file__).parent.parent
hosts: dict[str, str] = {}
"""Places of hosts' sections, by their drivers."""
subscribers: dict[str, str] = {}
"""Places of events' subscribers, by the key that only that kind has."""
parts: dict[str, str] = {}
"""Places of sections within those, by their classes' names."""
services: dict[str, str] = {}
"""Places of network services by their names, in the order they are applied."""
steps: dict[str, str] = {}
"""Places of a cycle's steps, by the key that each kind is known by."""

ALL_SERVICES = "NetworkServices"
"""The class of the section that has those of services: ``inventory.services`` makes it."""


def load(place: str, kind: type[M]) -> type[M]:
    """Import the class at that place. ``kind``: the base that it has, which is checked."""
    found = _imported(place)
    assert issubclass(found, kind), place
    return found


def section(name: str) -> type[Model] | None:
    """The class of a section of any kind, by its name. None: no table has it."""
    place = places().get(name)
    return _imported(place) if place else None


def places() -> dict[str, str]:
    """The places in all tables, by their classes' names."""
    return {place.rpartition(":")[2]: place for place in _all()}


def _all() -> tuple[str, ...]:
    return (*hosts.values(), *parts.values(), *services.values(), *steps.values(), *subscribers.values())


def rooms() -> list[Path]:
    """The directories that the tables' modules are in. What they hold decides how a farm file is
    read."""
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
