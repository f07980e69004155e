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
from typing import Any

from inventory import model, values
from inventory.engine import SchemaValidator
from inventory.model import Farm

CORE_FILE = Path(__file__).with_name("farm.core.json")
# The only key of an object that stands for what JSON has no word for: a class or a function by its name,
# a default, or what makes it, by its section and field; or for another section's schema.
CLASS, FUNCTION, DEFAULT, SECTION = "!class", "!function", "!default", "!section"
_STAND_INS = {CLASS, FUNCTION, DEFAULT, SECTION}


def validated(content: Mapping[str, Any]) -> Farm:
    """The farm that this is. ValidationError."""
    farm: Farm = _validator("services" in content).validate_python(content)
    return farm


@cache
def _validator(with_services: bool) -> SchemaValidator:
    """Few farms have services: for others their classes aren't imported."""
    sections = json.loads(CORE_FILE.read_bytes())
    if not with_services:
        sections["Services"] = {"type": "none"}  # asked for nothing
    return SchemaValidator(_named(sections["Farm"], sections))


def _named(value: Any, sections: Mapping[str, Any]) -> Any:
    """With the things themselves for what stands for them."""
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
    """None: there is no such class or function."""
    if key == FUNCTION:
        return getattr(values, name, None)
    if key == CLASS:
        return _class(name)
    section, field = name
    found = _class(section).__dataclass_fields__[field]
    return found.default_factory if found.default is MISSING else found.default


def _class(name: str) -> Any:
    found = getattr(model, name, None) or getattr(values, name, None)
    if found is None:
        from inventory import services

        found = getattr(services, name, None)
    return found
