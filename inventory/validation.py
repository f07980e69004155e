"""Content of a farm file in, values of ``inventory.model`` out: by pydantic's engine alone.

What the engine goes by, its core schema, is what pydantic makes of the model's annotations. Making it
takes as long as half of a short command, and comes out the same every time: so ``farm.core.json`` has it
as text (made by ``inventory.schema``), with names for the model's classes and for the functions of
``inventory.values``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING
from functools import cache
from pathlib import Path
from typing import Any, cast

from inventory import hosts, kinds, model, values
from inventory import subscribers as subscriber_sections
from inventory.engine import SchemaValidator
from inventory.hosts import driver_of
from inventory.model import Farm
from inventory.services import section_named
from inventory.subscribers import subscriber_kind

CORE_FILE = Path(__file__).with_name("farm.core.json")
# The only key of an object that stands for what JSON has no word for: a class or a function by its name,
# a default, or what makes it, by its section and field; or for another section's schema.
CLASS, FUNCTION, DEFAULT, SECTION = "!class", "!function", "!default", "!section"
_STAND_INS = {CLASS, FUNCTION, DEFAULT, SECTION}
_NOT_THERE = {"type": "none"}  # for a section that isn't asked for


def validated(content: Mapping[str, Any]) -> Farm:
    """The farm that a file's content is. pydantic's ValidationError if it isn't one."""
    known = tuple(kinds.places())
    declared = content.get("hosts")
    drivers = frozenset(map(driver_of, declared.values() if isinstance(declared, dict) else ()))
    told = content.get("events")
    of_events = frozenset(map(subscriber_kind, told.values() if isinstance(told, dict) else ()))
    validator = _validator(known, _services(content), drivers, of_events, _steps(content))
    farm: Farm = validator.validate_python(content)
    return farm


def _services(content: Mapping[str, Any]) -> frozenset[str] | None:
    """The services that a file names; None if it has no ``services``."""
    if "services" not in content:
        return None
    found = content["services"]
    return frozenset(found) if isinstance(found, dict) else frozenset()


def _steps(content: Mapping[str, Any]) -> frozenset[str | None]:
    """The kinds of those of its cycle."""
    cycle = content.get("cycle")
    steps = cycle.get("steps") if isinstance(cycle, dict) else ()
    return frozenset(map(values.step_kind, steps if isinstance(steps, list | tuple) else ()))


@cache
def _validator(
    known: tuple[str, ...],
    services: frozenset[str] | None,
    drivers: frozenset[str | None],
    subscribers: frozenset[str | None],
    steps: frozenset[str | None],
) -> SchemaValidator:
    """The validator for files that use these kinds only: others' classes aren't imported. It is made
    from pydantic's annotations if there are kinds that aren't farmhand's own."""
    sections = json.loads(CORE_FILE.read_bytes())
    if not sections.keys() >= {*known}:
        from inventory.annotations import adapter

        return cast(SchemaValidator, adapter(Farm).validator)
    if services is None:
        sections[kinds.ALL_SERVICES] = _NOT_THERE
    for table, used in (
        (kinds.hosts, drivers), (kinds.subscribers, subscribers), (kinds.services, services or ()),
        (kinds.steps, steps),
    ):  # fmt: skip
        for kind, place in table.items():
            if kind not in used:
                sections[place.rpartition(":")[2]] = _NOT_THERE
    return SchemaValidator(_named(sections["Farm"], sections))


def _named(value: Any, sections: Mapping[str, Any]) -> Any:
    """A schema with the things themselves in the place of what stands for them."""
    if isinstance(value, list):
        return [_named(item, sections) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(key, name)] = value.items()
        if key == SECTION:
            return _named(sections[name], sections)
        if key in _STAND_INS:
            return stands_for(key, name)
    return {key: _named(inner, sections) for key, inner in value.items()}


def stands_for(key: str, name: Any) -> Any:
    """What an object with that one key stands for; None if there is no such class or function."""
    if key == FUNCTION:
        homes = (values, hosts, subscriber_sections)
        return next((getattr(home, name) for home in homes if hasattr(home, name)), None)
    if key == CLASS:
        return _class(name)
    section, field = name
    found = _class(section).__dataclass_fields__[field]
    return found.default_factory if found.default is MISSING else found.default


def _class(name: str) -> Any:
    return getattr(model, name, None) or getattr(values, name, None) or section_named(name)
