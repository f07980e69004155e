"""pydantic's engine, by itself.

Importing ``pydantic_core`` is more than the engine: it makes some hundred classes, which tell type
checkers what a core schema looks like, in four times the time that the engine takes. So its package is
left out, until somebody imports it: then it finds the engine that is here already.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING

_PACKAGE = "pydantic_core"

if TYPE_CHECKING:
    from pydantic_core import SchemaValidator, ValidationError

__all__ = ["SchemaValidator", "ValidationError"]


def _engine() -> ModuleType:
    spec = None if _PACKAGE in sys.modules else find_spec(_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        return import_module(_PACKAGE)
    bare = ModuleType(_PACKAGE)
    bare.__path__ = spec.submodule_search_locations
    sys.modules[_PACKAGE] = bare
    try:
        return import_module(f"{_PACKAGE}._pydantic_core")
    finally:
        del sys.modules[_PACKAGE]


if not TYPE_CHECKING:
    _found = _engine()
    SchemaValidator, ValidationError = _found.SchemaValidator, _found.ValidationError
