"""The model as pydantic sees it: its annotations, evaluated, and what pydantic makes of them.

What a farm file is validated by is made from them once, by ``inventory.schema``; to validate one,
``inventory.validation`` needs neither them nor pydantic.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import Discriminator, Tag, TypeAdapter

from inventory import fields, model, services
from inventory.base import Model
from inventory.model import ResetStep, RunStep, TransferStep
from inventory.values import step_kind

_STEP = Annotated[
    Annotated[ResetStep, Tag("reset")]
    | Annotated[RunStep, Tag("run")]
    | Annotated[TransferStep, Tag("transfer")],
    Discriminator(step_kind),
]
_NAMES = {**vars(fields), **vars(services), **vars(model), "Steps": tuple[_STEP, ...]}


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Of a section."""
    found: TypeAdapter[Any] = TypeAdapter(kind)  # it knows none of the names yet
    found.rebuild(force=True, _types_namespace=_NAMES)
    return found


def hints(kind: type[Model]) -> Mapping[str, Any]:
    """What its fields are, by their names."""
    return get_type_hints(kind, localns=_NAMES)
