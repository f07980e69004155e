"""The model as pydantic sees it: content of a farm file in, values of ``inventory.model`` out.

The model's annotations are names of this module: here they are evaluated, when somebody validates.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, Union, cast, get_type_hints

from pydantic import Discriminator, Tag, TypeAdapter

from inventory import fields, kinds, model, services
from inventory.base import Model
from inventory.hosts import DEFAULT_DRIVER, Host
from inventory.model import ResetStep, RunStep, Step, TransferStep

T = TypeVar("T")
STEP_KINDS = ("reset", "run", "transfer")


def step_kind(value: object) -> str | None:
    """A step is known by the one key of STEP_KINDS that it has."""
    if isinstance(value, Step):
        return type(value).__name__.removesuffix("Step").lower()
    if not isinstance(value, dict):
        return None
    kinds = [kind for kind in STEP_KINDS if kind in value]
    return kinds[0] if len(kinds) == 1 else None


_STEP = Annotated[
    Annotated[ResetStep, Tag("reset")]
    | Annotated[RunStep, Tag("run")]
    | Annotated[TransferStep, Tag("transfer")],
    Discriminator(step_kind),
]


def host_driver(value: object) -> str | None:
    """A host is known by its driver."""
    if isinstance(value, Host):
        return value.driver
    if not isinstance(value, dict):
        return DEFAULT_DRIVER  # which refuses it
    driver = value.get("driver", DEFAULT_DRIVER)
    return driver if isinstance(driver, str) else None


def _host() -> Any:
    """Any of the drivers' sections."""
    tagged = [Annotated[kinds.host_section(name), Tag(name)] for name in kinds.hosts]
    return Annotated[Union[tuple(tagged)], Discriminator(host_driver)]


@cache
def _names() -> Mapping[str, Any]:
    from hypervisors.disks.section import DiskStore

    return {**vars(fields), **vars(services), **vars(model), "Steps": tuple[_STEP, ...], "Host": _host(), "DiskStore": DiskStore}


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Of a section."""
    found: TypeAdapter[Any] = TypeAdapter(kind)  # it knows none of the names yet
    found.rebuild(force=True, _types_namespace=dict(_names()))
    return found


def validated(kind: type[T], content: object) -> T:
    """The section that this is. ValidationError."""
    section: T = adapter(cast(Any, kind)).validate_python(content)
    return section


def hints(kind: type[Model]) -> Mapping[str, Any]:
    """What its fields are, by their names."""
    return get_type_hints(kind, localns=dict(_names()))
