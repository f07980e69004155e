"""checkpoint: VMs' present state kept, all at one moment."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from hypervisors.api import Checkpoint, Disk, Disks, FarmDisks, Machine, Power
from inventory.errors import (
    Call,
    Conflict,
    FarmhandError,
    Interrupted,
    Unsupported,
    UsageError,
    WrongState,
    some,
)
from provision.engine.journal import Entry
from provision.engine.operation import Operation, Recovery
from provision.engine.parallel import side_by_side
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.record import Record
from provision.engine.report import Action
from provision.engine.run import Run
from provision.member import Member, each, is_on
from provision.missing_disk import require
from provision.operations.group_change import GroupActivity, GroupFacts
from provision.power import check_memory, power_on
from provision.site import Site

GRACE = 180.0
"""Seconds a guest gets to shut down before a checkpoint: its disk should be a clean one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts(GroupFacts):
    """``name``: the new checkpoint's. ``warm``: with the VM's memory."""

    name: str
    warm: bool = False


class _CheckpointActivity(GroupActivity[CheckpointFacts]):
    """A warm checkpoint is there or not; there is nothing to finish."""

    name = "checkpoint"
    facts = CheckpointFacts

    def grace(self) -> float:
        return GRACE

    def change(self, facts: CheckpointFacts, store: Disks, machines: Sequence[str]) -> None:
        """Make it of those that lack it: a killed call may have made some."""
        lacking = [machine for machine in machines if not _has(store.find(machine), facts.name)]
        if isinstance(store, FarmDisks) and lacking:
            store.checkpoint_all(lacking, facts.name)
        else:
            for machine in lacking:
                store.checkpoint(machine, facts.name)

    def done(self, _members: Sequence[Member], entry: Entry[CheckpointFacts]) -> None:
        entry.note(replace(entry.facts, changed=True))

    def words(self, facts: CheckpointFacts) -> str:
        return f"keep as {facts.name}"

    def then_on(self, facts: CheckpointFacts, vms: Sequence[str]) -> Sequence[str]:
        return [vm for vm in vms if vm in facts.was_on]

    def recover(self, site: Site, record: Record, facts: CheckpointFacts) -> Recovery[CheckpointFacts]:
        if facts.warm:
            return Recovery("it is there or not, and complete; noted")
        return super().recover(site, record, facts)


CHECKPOINT = _CheckpointActivity()


@dataclass(frozen=True, slots=True)
class CheckpointResult:
    """``checkpoint``: the new one's name."""

    checkpoint: str


@dataclass(frozen=True, slots=True)
class TakeCheckpoint(Operation[CheckpointResult]):
    """Keep the VMs' present state as a checkpoint of the name ``label``, all at one moment. All are
    stopped, all are kept (or none, see group_change.py), and those that ran are started again; with
    ``wait`` it waits until they answer. Running VMs shut down by themselves first: what programs hold in
    memory is not kept.

    ``warm`` is for one running VM: its memory is kept, too, and it runs on.

    Errors: UsageError (the name; ``warm`` for several), Conflict (the checkpoint exists), NotFound,
    Unsupported (also for a host that can't keep memory), NoSpace, Busy, WrongState (one store of several
    failed midway; ``warm``: it doesn't run)."""

    name = "checkpoint"
    label: str
    vms: tuple[str, ...] = ()
    warm: bool = False
    wait: bool = True

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.label):
            raise UsageError(
                f"{self.label!r} is not a checkpoint name",
                remedy="letters, digits, '.', '_' and '-', at most 64, such as before-upgrade",
            )

    def affected(self, site: Site) -> tuple[str, ...]:
        names = site.vms(self.vms)
        if self.warm and len(names) > 1:
            raise UsageError(
                "a warm checkpoint is of one VM: several can't be kept at one moment while they run",
                remedy="--vm NAME --warm for each; or a cold one of all, without --warm",
            )
        return names

    def doing(self, vms: Sequence[str]) -> str:
        return f"checkpoint {some(vms)} as {self.label}"

    def plan(self, run: Run) -> Plan[CheckpointResult]:
        members, label = run.site.members(run.vms), self.label
        machines = each(members, Member.present)
        for member in members:
            disk = disk_with_checkpoints(member, machines[member.vm])
            if any(kept.name == label for kept in disk.checkpoints):
                raise Conflict(
                    f"{run.site.name}: {member.vm} has a checkpoint {label!r} already",
                    remedy="choose another name; checkpoints never change",
                )
        result = partial(CheckpointResult, label)
        was_on = tuple(vm for vm, machine in machines.items() if is_on(machine))
        if self.warm:
            (member,) = members
            _check_warm(member, machines[member.vm])
            text = f"keep as {label}, disk and memory; it runs on"
            keep = job("checkpoint", member.vm, text, partial(self._keep_warm, member))
            return Plan([alone(keep)], result)
        first = check_memory([one for one in members if one.vm in was_on], wait=self.wait)
        actions = tuple(
            Action("checkpoint", vm, f"shut down, keep as {label}, start again" if vm in was_on
                   else f"keep as {label}")
            for vm in run.vms
        )  # fmt: skip
        keep = Job(actions, partial(self._keep, members, was_on))
        return Plan([alone(foretold(*first), keep)], result)

    def _keep(self, members: Sequence[Member], was_on: tuple[str, ...]) -> None:
        site = members[0].site
        facts = CheckpointFacts(was_on=was_on, name=self.label)
        with site.journal.begin(CHECKPOINT, [member.vm for member in members], facts) as entry:
            CHECKPOINT.carry_out(members, entry)
            for member in members:
                site.reporter.say(f"kept as {self.label}", vm=member.vm)
            again = [member for member in members if member.vm in was_on]
            side_by_side(site, {one.vm: partial(power_on, one, wait=self.wait) for one in again})

    def _keep_warm(self, member: Member) -> None:
        site, vm = member.site, member.vm
        facts = CheckpointFacts(was_on=(vm,), name=self.label, warm=True)
        with site.journal.begin(CHECKPOINT, [vm], facts):
            try:
                member.driver.checkpoint(member.machine, self.label, warm=True)
            except Interrupted:
                raise
            except FarmhandError:
                if not is_on(member.look()):
                    site.reporter.warn(("it doesn't run any more: ", Call("start")), vm=vm)
                raise
            site.reporter.say(f"kept as {self.label}, disk and memory; it runs on", vm=vm)


def disk_with_checkpoints(member: Member, machine: Machine) -> Disk:
    """The VM's disk. NotFound if it is gone, Unsupported if its host keeps none."""
    disk = member.disk()
    require(member, machine, disk)
    if disk is None:
        raise Unsupported(
            f"{member.site.name}: {member.vm}'s host {member.host} keeps no checkpoints",
            remedy="checkpoints are kept by disk stores; this machine has its reset command",
        )
    return disk


def _check_warm(member: Member, machine: Machine) -> None:
    """Before anything is changed."""
    site, vm = member.site, member.vm
    can = site.hypervisor(member.host, look=True).capabilities()
    if not can.warm_checkpoints:
        why = "; ".join(note for note in can.notes if "warm" in note) or f"driver {can.driver} can't"
        raise Unsupported(
            f"{site.name}: {vm}'s host {member.host} keeps no running machine's memory: {why}",
            remedy="without --warm: a cold checkpoint, for which it is shut down",
        )
    if machine.power is not Power.RUNNING:
        raise WrongState(
            f"{site.name}: {vm} is {machine.power}: a warm checkpoint is of a running VM",
            remedy=(Call("start", vm=vm), "; or a cold one, without --warm"),
        )


def _has(disk: Disk | None, name: str) -> bool:
    kept: Sequence[Checkpoint] = disk.checkpoints if disk else ()
    return any(one.name == name for one in kept)
