"""A farm as JSON text and back, exactly: for keeping one that was validated.

A section is an object with its class's name and what isn't as the class has it by default; an address,
subnet or path one with its type's name and text. Nothing but the model's own classes can come back.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from pathlib import Path
from typing import Any

from inventory import model
from inventory.base import Model
from inventory.model import Farm
from inventory.services import section_named

_KIND, _TEXT = "!", "="  # no key of a farm file and no name in one is like these
_VALUES: Mapping[str, Callable[[str], object]] = {
    "Path": Path,
    "IPv4Address": ipaddress.IPv4Address,
    "IPv4Network": ipaddress.IPv4Network,
    "IPv6Address": ipaddress.IPv6Address,
    "IPv6Network": ipaddress.IPv6Network,
}


def dumps(farm: Farm) -> bytes:
    """A farm as JSON text, without its path."""
    return json.dumps(farm, default=_encoded, ensure_ascii=False, separators=(",", ":")).encode()


def loads(text: bytes) -> Farm:
    """The farm in a text that ``dumps`` of this very program made. ValueError if it is no such text, as
    far as can be told without validating."""
    try:
        farm = json.loads(text, object_hook=_decoded)
    except (TypeError, KeyError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(farm, Farm):
        raise ValueError("not a farm")
    return farm


def _encoded(value: object) -> Mapping[str, object]:
    if isinstance(value, Model):
        kind = type(value).__name__
        usual = _defaults(kind)
        given = ((field, getattr(value, field)) for field in usual)
        return {_KIND: kind, **{field: own for field, own in given if repr(own) != usual[field]}}
    kind = "Path" if isinstance(value, Path) else type(value).__name__
    if kind not in _VALUES:
        raise TypeError(f"no {kind} belongs into a farm")
    return {_KIND: kind, _TEXT: str(value)}


@cache
def _defaults(section: str) -> Mapping[str, str]:
    """The default of each field of a section, as text: 300 and 300.0 are equal, but not the same."""

    def default(field: Field[Any]) -> object:
        return field.default if field.default_factory is MISSING else field.default_factory()

    return {field.name: repr(default(field)) for field in fields(_section(section))}


def _decoded(found: dict[str, Any]) -> object:
    for key, value in found.items():
        if isinstance(value, list):  # the model has tuples only, and none of tuples
            found[key] = tuple(value)
    kind = found.pop(_KIND, None)
    if kind is None:
        return found
    if kind in _VALUES:
        return _VALUES[kind](found[_TEXT])
    return _section(kind)(**found)


def _section(name: str) -> type[Model]:
    found = getattr(model, name, None) or section_named(name)
    if not (isinstance(found, type) and issubclass(found, Model)):
        raise ValueError(f"no section {name}")
    return found
