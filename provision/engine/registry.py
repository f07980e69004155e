"""What operations and activities there are: by name, where each is; imported only when it is wanted.

The rooms keep their own tables (``provision/operations/__init__.py``, ``builds/__init__.py``), and what
is at the top puts them in here (``cli/composition.py``). So the engine recovers a build cycle and knows
nothing of builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from inventory.errors import WrongState

if TYPE_CHECKING:
    from provision.engine.operation import Activity, Operation

_operations: dict[str, str] = {}
_activities: dict[str, str] = {}


def register(operations: Mapping[str, str], activities: Mapping[str, str]) -> None:
    """By name "module:attribute": of an operation its class, of an activity the one object."""
    _operations.update(operations)
    _activities.update(activities)


def operations() -> tuple[str, ...]:
    return tuple(_operations)


def activities() -> tuple[str, ...]:
    return tuple(_activities)


def operation(name: str) -> type[Operation]:
    found: type[Operation] = _load(_operations[name])
    assert found.name == name, found
    return found


def activity(name: str) -> Activity[Any]:
    """WrongState for one that this farmhand doesn't know."""
    if name not in _activities:
        raise WrongState(
            f"the journal has an unfinished {name}, which this farmhand knows nothing of",
            remedy="finish it with the farmhand that began it",
        )
    found: Activity[Any] = _load(_activities[name])
    assert found.name == name, found
    return found


def _load(place: str) -> Any:
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
