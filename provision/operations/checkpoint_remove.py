"""Checkpoints: listed, and removed where nothing grows from them any more."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from hypervisors.api import (
    CLEAN,
    ChainedDisks,
    Checkpoint,
    Disk,
    Machine,
    WarmMachines,
    check_removable,
)
from inventory.errors import Call, NotFound, UsageError, WrongState
from provision.clean_state import CleanState, clean_of, clean_state
from provision.engine.facts import Facts
from provision.engine.journal import Entry
from provision.engine.operation import Operation, Recovery
from provision.engine.plan import Plan, job
from provision.engine.report import NoResult
from provision.engine.run import Run
from provision.member import Member, each, members_of
from provision.operations.checkpoint import disk_with_checkpoints
from provision.site import Site
from provision.vm_activity import OneVmActivity


@dataclass(frozen=True, slots=True)
class KeptState:
    """A checkpoint as it is listed. ``current``: the VM's disk grows from it. ``clean``: of what the
    VM's ``clean`` is, what that is."""

    vm: str
    checkpoint: Checkpoint
    current: bool
    template: str  # the generation that its disk is on
    clean: CleanState | None = None

    def as_dict(self) -> dict[str, object]:
        return {
            "vm": self.vm,
            "checkpoint": self.checkpoint.name,
            "made": self.checkpoint.created.isoformat(),
            "warm": self.checkpoint.warm,
            "current": self.current,
            "template": self.template,
            "is_clean": self.clean is not None,
            "tools": asdict(self.clean.tools) if self.clean and self.clean.tools else None,
        }


def kept_states(site: Site, vms: Sequence[str] = ()) -> Sequence[KeptState]:
    """The checkpoints of these VMs, or of all; those of each, oldest first. VMs without a disk of ours
    have none."""
    disks = each(members_of(site, site.vms(vms)), Member.disk)
    there = {vm: disk for vm, disk in disks.items() if disk}
    return [one for vm, disk in there.items() for one in _kept(site, vm, disk)]


def _kept(site: Site, vm: str, disk: Disk) -> Sequence[KeptState]:
    clean = clean_state(site.paths, vm, disk)
    return [
        KeptState(
            vm, kept, kept.name == disk.base, disk.template,
            clean if kept.name == clean.checkpoint else None,
        )
        for kept in disk.checkpoints
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class RemovalFacts(Facts):
    """``checkpoint``: the name of the one that goes."""

    checkpoint: str


class _RemovalActivity(OneVmActivity[RemovalFacts]):
    """What was begun is removed to the end: half of it may be gone."""

    name = "checkpoint-remove"
    facts = RemovalFacts

    def go_on(self, member: Member, _machine: Machine, facts: RemovalFacts) -> Recovery[RemovalFacts]:
        def finish(_: Entry[RemovalFacts]) -> None:
            with contextlib.suppress(WrongState):  # it had not begun, and would have been refused
                remove_kept(member, facts.checkpoint)

        return Recovery(f"remove checkpoint {facts.checkpoint} to the end", finish)


REMOVAL = _RemovalActivity()


@dataclass(frozen=True, slots=True)
class RemoveCheckpoint(Operation[NoResult]):
    """Remove the checkpoint ``label`` of each VM, running or not. The VMs' disks stay as they are.

    Errors: WrongState while a disk or another checkpoint grows from it (it names that), UsageError
    (``clean``), NotFound, Unsupported (its host keeps none), Busy."""

    name = "checkpoint-remove"
    label: str
    vms: tuple[str, ...] = ()

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def plan(self, run: Run) -> Plan[NoResult]:
        members = members_of(run.site, run.vms)
        machines = each(members, Member.present)
        for member in members:
            disk = disk_with_checkpoints(member, machines[member.vm])
            if self.label == clean_of(disk.checkpoints, disk.template) != CLEAN:
                raise UsageError(
                    f"{member.vm}'s checkpoint {self.label} is what its clean is",
                    remedy=(
                        "its template's own again: ",
                        Call("clean", vm=member.vm, from_template=True),
                    ),
                )
            named = replace(disk, machine=member.vm)
            check_removable(named, self.label)
            if isinstance(store := member.store, ChainedDisks):
                check_removable(named, self.label, store.grown_from(member.machine, self.label))
        text = f"remove checkpoint {self.label}"
        jobs = {
            one.vm: [job("checkpoint-remove", one.vm, text, partial(self._one, one))] for one in members
        }
        return Plan([jobs], NoResult)

    def _one(self, member: Member) -> None:
        with member.site.journal.begin(REMOVAL, [member.vm], RemovalFacts(self.label)) as entry:
            entry.step(f"remove checkpoint {self.label}")
            remove_kept(member, self.label)
        member.site.reporter.say(f"checkpoint {self.label} is removed", vm=member.vm)


def remove_kept(member: Member, name: str) -> None:
    """Remove a checkpoint, then the memory beside it, within an activity under way. One that is gone is
    no error; WrongState while something grows from it."""
    driver, machine = member.driver, member.machine
    disk = member.disk()
    if disk is not None and any(kept.name == name for kept in disk.checkpoints):
        with contextlib.suppress(NotFound):
            member.store.remove_checkpoint(machine, name)
    if isinstance(driver, WarmMachines):
        driver.forget(machine, name)
