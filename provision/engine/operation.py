"""What can be asked for, and what the journal holds of it while it is done.

An *operation* is what somebody asks for: a frozen dataclass whose fields are the request, such as
``Start(vms=("prod",), wait=False)``. ``runner.perform`` carries it out: recover, lock, plan, act.

An *activity* is what a kill can cut off: one kind of entry in the journal, with its facts and with how
it is recovered. An operation begins one or many (clone-farm: ``clone`` and ``start`` of each VM), and
several operations the same ones. Nothing gets into the journal but an activity, and an activity
without a way to recover it can't be made: ``recover`` is abstract.

Both are named in tables of a line each, see ``engine/registry.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from inventory.errors import Busy, some
from provision.engine.facts import Facts, from_json
from provision.engine.locks import lock_of

if TYPE_CHECKING:
    from provision.engine.journal import Entry, Record
    from provision.engine.plan import Plan
    from provision.engine.runner import Run
    from provision.site import Site

F = TypeVar("F", bound=Facts)


class Operation(ABC):
    """Something that changes something. Its fields are what was asked, valid by itself
    (``__post_init__`` raises UsageError); what depends on the farm is checked in ``plan``."""

    name: ClassVar[str]
    """As the command line has it."""
    at_any_time: ClassVar[bool] = False
    """Whether a half-done change of its VMs' disks is not in its way."""

    def affected(self, _site: Site) -> tuple[str, ...]:
        """The VMs that nobody else may use meanwhile; their locks are taken. NotFound."""
        return ()

    def locks(self, _site: Site) -> tuple[str, ...]:
        """Further locks that it takes."""
        return ()

    def doing(self, vms: Sequence[str]) -> str:
        """What others are told who want the same lock."""
        return f"{self.name} {some(vms)}".strip()

    def refused(self, _site: Site, error: Busy) -> Busy:
        """In its own words, where somebody else has one of its locks."""
        return error

    @abstractmethod
    def plan(self, run: Run) -> Plan:
        """All that is to be done, by real reads, with the locks held (``--plan``: without); an error
        means that nothing was changed."""


@dataclass(frozen=True, slots=True)
class Recovery(Generic[F]):
    """How an activity that was cut off is finished or undone: in words, and doing it. ``run`` None:
    there is nothing to do."""

    text: str
    run: Callable[[Entry[F]], object] | None = None


class Activity(ABC, Generic[F]):
    """One kind of entry in the journal."""

    name: ClassVar[str]
    facts: type[F]
    starts: ClassVar[bool] = False
    """Whether it starts VMs: they may be on with all their memory where it was cut off."""

    without_disk: ClassVar[str] = ""
    """What is the matter, where its VM may have no disk while it is half done."""

    @abstractmethod
    def recover(self, site: Site, record: Record, facts: F) -> Recovery[F]:
        """By real reads; called with the locks (``--plan``: without), and again where a recovery is
        cut off itself."""

    def after(self, site: Site, record: Record) -> None:
        """Clear away what may be left of it, once it is recovered."""

    def locks(self, _site: Site, record: Record, _facts: F) -> tuple[str, ...]:
        """What its recovery holds."""
        return tuple(map(lock_of, record.vms)) or ("recover",)

    def giving(self, site: Site, vm: str, _facts: F) -> int:
        """Bytes of memory that the VM may still be getting from one that was cut off."""
        return site.farm.vms[vm].memory if self.starts else 0

    def half_done(self, _facts: F) -> bool:
        """Whether its VMs' disks are not to be used before it is recovered."""
        return False

    def facts_of(self, record: Record) -> F:
        """WrongState for those that aren't in this farmhand's format."""
        return from_json(self.facts, record.facts, f"the journal's entry {record.id} ({self.name})")
