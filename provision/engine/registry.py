"""The table of operations and activities: by name, where each is. It is imported when it is first
wanted.

The rooms keep their own tables (``provision/operations/__init__.py``, ``builds/__init__.py``), and
``cli/composition.py``, at the top, puts them in here. The tasks ask for operations by their names
(``cli.run.TaskRun.perform``), recovery asks for the journal's activities by theirs. So the engine can
recover a build cycle without knowing of builds."""

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
    """Add names, each with its "module:attribute": an operation's class, an activity's one object."""
    _operations.update(operations)
    _activities.update(activities)


def operations() -> tuple[str, ...]:
    return tuple(_operations)


def activities() -> tuple[str, ...]:
    return tuple(_activities)


def operation(name: str) -> type[Operation[Any]]:
    """Its class, whose fields are the request. KeyError: there is no such operation."""
    found: type[Operation[Any]] = _load(_operations[name])
    assert found.name == name, found
    return found


def activity(name: str) -> Activity[Any]:
    """The activity of that name. WrongState if this farmhand has none."""
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
