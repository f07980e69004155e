"""The model as pydantic sees it: its annotations, evaluated, and what pydantic makes of them.

What a farm file is validated by is made from them once, by ``inventory.schema``; to validate one,
``inventory.validation`` needs neither them nor pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Discriminator, Tag, TypeAdapter

from inventory import fields, kinds, model, packages, repositories
from inventory.base import Model
from inventory.hosts import driver_of, host_section
from inventory.model import step_section
from inventory.services import declared, section_named, serving
from inventory.subscribers import subscriber_kind, subscriber_section
from inventory.values import step_kind


def adapter(kind: Any) -> TypeAdapter[Any]:
    """pydantic's adapter of a section, with the kinds that there are at the moment."""
    return _adapter(kind, tuple(kinds.places().items()))


@cache
def _adapter(kind: Any, _: object) -> TypeAdapter[Any]:
    """The same, made once for each set of kinds."""
    found: TypeAdapter[Any] = TypeAdapter(kind)  # it knows none of the names yet
    found.rebuild(force=True, _types_namespace=_names())
    return found


def _names() -> dict[str, Any]:
    """The names that the model's annotations use, with what they stand for."""
    drivers = [Annotated[host_section(driver), Tag(driver)] for driver in kinds.hosts]
    subscribers = [Annotated[subscriber_section(kind), Tag(kind)] for kind in kinds.subscribers]
    steps = [Annotated[step_section(kind), Tag(kind)] for kind in kinds.steps]
    step: Any = Annotated[reduce(or_, steps), Discriminator(step_kind)]
    return {
        **vars(packages), **vars(repositories), **vars(fields), **vars(model),
        **{name: section_named(name) for name in kinds.places()},
        "Steps": tuple[step, ...],
        "ServedBy": Literal["none", *serving()],
        kinds.ALL_SERVICES: declared(),
        "Host": Annotated[reduce(or_, drivers), Discriminator(driver_of)],
        "EventSubscriber": Annotated[reduce(or_, subscribers), Discriminator(subscriber_kind)],
    }  # fmt: skip


def hints(kind: type[Model]) -> Mapping[str, Any]:
    """The evaluated annotations of a section's fields, by the fields' names."""
    return get_type_hints(kind, localns=_names())
