"""What can be asked for, and what the journal holds of it while it is done.

An *operation* is what somebody asks for: a frozen dataclass whose fields are the request, such as
``Start(vms=("prod",), wait=False)``. ``runner.perform`` carries it out: recover, lock, plan, act.

An *activity* is what a kill can cut off: one kind of entry in the journal, with its facts and its
recovery. An operation begins one or several (clone-farm: ``clone`` and ``start`` of each VM), and
several operations may begin the same ones. Only activities get into the journal. One without a recovery
can't be made: ``recover`` is abstract.

Both are named in tables of a line each, see ``engine/registry.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from inventory.errors import Busy, some
from provision.engine.facts import Facts, from_json
from provision.engine.locks import lock_of
from provision.engine.report import R_co

if TYPE_CHECKING:
    from provision.engine.journal import Entry
    from provision.engine.plan import Plan
    from provision.engine.record import Record
    from provision.engine.run import Run
    from provision.site import Site

F = TypeVar("F", bound=Facts)


class Operation(ABC, Generic[R_co]):
    """Something that changes something. Its fields are the request. ``__post_init__`` raises UsageError
    for a request that is never valid; what depends on the farm is checked in ``plan``. What it hands
    back is a frozen dataclass: NoResult if its actions say it all."""

    name: ClassVar[str]
    """Its key in the registry: the task's name, where a task has one operation only."""
    at_any_time: ClassVar[bool] = False
    """Whether a half-done change of its VMs' disks is not in its way."""
    recovers_first: ClassVar[bool] = True
    """Whether what killed commands left is recovered before it is planned."""
    is_build: ClassVar[bool] = False
    """Whether it builds on its VMs: they keep their memory meanwhile, and their disks change."""

    def affected(self, _site: Site) -> tuple[str, ...]:
        """The VMs that nobody else may use meanwhile; the engine takes their locks. NotFound for one
        that does not exist."""
        return ()

    def locks(self, _site: Site) -> tuple[str, ...]:
        """Names of further locks that the engine takes."""
        return ()

    def doing(self, vms: Sequence[str]) -> str:
        """What the operation does, in words, for others who want one of its locks."""
        return f"{self.name} {some(vms)}".strip()

    def refused(self, _site: Site, error: Busy) -> Busy:
        """The error to raise when another operation holds one of its locks; ``error`` says which."""
        return error

    @abstractmethod
    def plan(self, run: Run) -> Plan[R_co]:
        """All that is to be done, found by real reads. The locks are held; under ``--plan`` they are
        not. An error means that nothing was changed."""


@dataclass(frozen=True, slots=True)
class Recovery(Generic[F]):
    """How an activity that was cut off is finished or undone. ``text`` says it in words, ``run`` does
    it; None: there is nothing to do."""

    text: str
    run: Callable[[Entry[F]], object] | None = None


class Activity(ABC, Generic[F]):
    """One kind of entry in the journal."""

    name: ClassVar[str]
    facts: type[F]
    starts: ClassVar[bool] = False
    """Whether it starts VMs: they may be on with all their memory where it was cut off."""

    leaves_as_it_was: ClassVar[bool] = False
    """Whether a VM that was as it is when it is cloned still is so afterwards, but that it boots, or may
    have booted."""

    without_disk: ClassVar[str] = ""
    """What is the matter, where its VM may have no disk while it is half done."""

    @abstractmethod
    def recover(self, site: Site, record: Record, facts: F) -> Recovery[F]:
        """How to recover it, found by real reads. Called with its locks held; under ``--plan`` without.
        Called again when the recovery itself was cut off."""

    def after(self, site: Site, record: Record) -> None:
        """Clear away what may be left over, after the recovery."""

    def locks(self, _site: Site, record: Record, _facts: F) -> tuple[str, ...]:
        """Names of the locks that its recovery holds."""
        return tuple(map(lock_of, record.vms)) or ("recover",)

    def giving(self, site: Site, vm: str, _facts: F) -> int:
        """Bytes of memory that the VM may still be getting from an activity that was cut off."""
        return site.farm.vms[vm].memory if self.starts else 0

    def build_of(self, _facts: F) -> str:
        """The id of the build that it is; "": it is none. Subscribers of events are told of it as of a
        build then."""
        return ""

    def concerns(self, _site: Site, record: Record, _facts: F) -> tuple[str, ...]:
        """The VMs that it changes."""
        return record.vms

    def half_done(self, _facts: F) -> bool:
        """Whether its VMs' disks must not be used until it is recovered."""
        return False

    def made_anew(self, _facts: F, _vm: str, _clean: str) -> bool:
        """Whether the VM was then as it is when it is cloned. ``clean``: the name of its clean in the
        store."""
        return False

    def facts_of(self, record: Record) -> F:
        """The record's facts. WrongState where they are not in this farmhand's format."""
        return from_json(self.facts, record.facts, f"the journal's entry {record.id} ({self.name})")
