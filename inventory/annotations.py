"""The model as pydantic sees it: its annotations, evaluated, and what pydantic makes of them.

What a farm file is validated by is made from them once, by ``inventory.schema``; to validate one,
``inventory.validation`` needs neither them nor pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, get_type_hints

from pydantic import Discriminator, Tag, TypeAdapter

from inventory import fields, kinds, model, services
from inventory.base import Model
from inventory.values import step_kind


@cache
def _names() -> Mapping[str, Any]:
    """What the annotations speak of."""
    sections: list[Any] = [
        Annotated[kinds.step(name), Tag(name)] for name in kinds.steps
    ]  # fmt: skip
    step: Any = Annotated[reduce(or_, sections), Discriminator(step_kind)]
    return {**vars(fields), **vars(services), **vars(model), "Steps": tuple[step, ...]}


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Of a section."""
    found: TypeAdapter[Any] = TypeAdapter(kind)  # it knows none of the names yet
    found.rebuild(force=True, _types_namespace=_names())
    return found


def hints(kind: type[Model]) -> Mapping[str, Any]:
    """What its fields are, by their names."""
    return get_type_hints(kind, localns=dict(_names()))
