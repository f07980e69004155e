"""What every section of a subscriber of events is; each kind's own stands beside it, above
(``provision.events`` lists them)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from inventory import kinds
from inventory.base import Model

if TYPE_CHECKING:
    from inventory.fields import EventTypes, Labels, Names


@dataclass(frozen=True, kw_only=True)
class EventSubscriber(Model):
    """Somebody who is told of operations and builds. One key says what kind it is, and where it is."""

    on: EventTypes = ()
    """What is told: `build` for all about builds, or `build.failed` and so on; absent: all events."""
    operations: Names = ()
    """Only those that `history` names so, such as `reset`; a task may be several there: `clone-farm` is
    `clone` and `start`. Absent: all."""
    vms: Labels = ()
    """Only those about one of these VMs; absent: about all, and about the farm."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """Environment variables that hold secrets for it."""
        return ()


def subscriber_kind(section: object) -> str | None:
    """The kind of a subscriber's section, or of what a file has in its place: the one key that names a
    kind. None: it has no such key, or several."""
    known = vars(section) if isinstance(section, EventSubscriber) else section
    if not isinstance(known, dict):
        return next(iter(kinds.subscribers), None)  # which refuses it
    found = [kind for kind in kinds.subscribers if kind in known]
    return found[0] if len(found) == 1 else None


def subscriber_section(kind: str) -> type[EventSubscriber]:
    """The class of that kind of subscribers. KeyError: there is no such kind."""
    return kinds.load(kinds.subscribers[kind], EventSubscriber)
