"""Values that are JSON elsewhere: what the journal holds of an activity, and what an operation hands
back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from inventory.errors import WrongState

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the journal holds of one activity: a frozen dataclass. Its fields are JSON values, times and
    further dataclasses of such."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = {"extra": "forbid"}


@dataclass(frozen=True, slots=True)
class NoFacts(Facts):
    """For an activity that needs no more than its name and its VMs."""


def to_json(value: Any) -> str:
    return json.dumps(
        {field.name: getattr(value, field.name) for field in fields(value)}, default=_plain
    )


def from_json(kind: type[T], found: Mapping[str, object], where: str) -> T:
    """``found`` as a value of the dataclass ``kind``. WrongState unless each field is there and of its
    type. ``where``: names the place in that error."""
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    trouble = [f"no {name!r}" for name in sorted(known - found.keys())]
    trouble += [f"an unknown {name!r}" for name in sorted(found.keys() - known)]
    if not trouble:
        from pydantic import TypeAdapter, ValidationError  # takes a while, and is hardly ever needed

        try:
            return TypeAdapter(kind).validate_json(json.dumps(found), strict=True)
        except ValidationError as error:
            trouble = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    raise WrongState(
        f"{where} is not in this farmhand's format: {'; '.join(trouble)}",
        remedy="use the farmhand that wrote it",
    )


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}  # type: ignore[arg-type]


def shown(value: object) -> Any:
    """As ``--json`` shows it. Of a dataclass not those fields that have their defaults: there is nothing
    to say of them."""
    if is_dataclass(value):
        found = {field: getattr(value, field.name) for field in fields(value)}
        return {field.name: shown(of) for field, of in found.items() if of != _default(field)}
    if isinstance(value, Mapping):
        return {key: shown(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return [shown(one) for one in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


def _default(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()
