"""Checkpoints: listed, and removed where nothing grows from them any more."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from hypervisors.api import ChainedDisks, Checkpoint, Machine, WarmMachines, check_removable
from inventory.errors import NotFound, WrongState
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
    """A checkpoint as it is listed. ``current``: the VM's disk grows from it."""

    vm: str
    checkpoint: Checkpoint
    current: bool
    template: str  # the generation that its disk is on

    def as_dict(self) -> dict[str, object]:
        return {
            "vm": self.vm,
            "checkpoint": self.checkpoint.name,
            "made": self.checkpoint.created.isoformat(),
            "warm": self.checkpoint.warm,
            "current": self.current,
            "template": self.template,
        }


def kept_states(site: Site, vms: Sequence[str] = ()) -> Sequence[KeptState]:
    """The checkpoints of these VMs, or of all; those of each, oldest first. VMs without a disk of ours
    have none."""
    disks = each(members_of(site, site.vms(vms)), Member.disk)
    return [
        KeptState(vm, kept, kept.name == disk.base, disk.template)
        for vm, disk in disks.items()
        if disk
        for kept in disk.checkpoints
    ]


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
            disk = replace(disk_with_checkpoints(member, machines[member.vm]), machine=member.vm)
            check_removable(disk, self.label)
            if isinstance(store := member.store, ChainedDisks):
                check_removable(disk, self.label, store.grown_from(member.machine, self.label))
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
