"""checkpoint: VMs' present state kept, all at one moment."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from hypervisors.api import (
    Checkpoint,
    Disk,
    Disks,
    FarmDisks,
    KeptMemory,
    Machine,
    Power,
    WarmMachines,
)
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
from inventory.sizes import brief
from provision.clean_state import is_reserved
from provision.engine.journal import Entry
from provision.engine.operation import Operation, Recovery
from provision.engine.parallel import side_by_side
from provision.engine.plan import Job, Plan, alone, foretold
from provision.engine.record import Record
from provision.engine.report import Action
from provision.engine.run import Run
from provision.member import Member, each, is_on, members_of, settle
from provision.missing_disk import require
from provision.operations.group_change import GroupActivity, GroupFacts, stop_all
from provision.power import check_memory, power_on
from provision.site import Site

GRACE = 180.0
"""Seconds a guest gets to shut down before a checkpoint: its disk should be a clean one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFacts(GroupFacts):
    """``name``: the new checkpoint's. ``warm``: with the VM's memory. ``then_off``: they are shut down
    after it, by what began it; recovery sees to that, too."""

    name: str
    warm: bool = False
    then_off: bool = False


class _CheckpointActivity(GroupActivity[CheckpointFacts]):
    """Of a warm checkpoint the driver knows how far it came."""

    name = "checkpoint"
    facts = CheckpointFacts
    leaves_as_it_was = True

    def grace(self) -> float:
        return GRACE

    def change(self, facts: CheckpointFacts, store: Disks, members: Sequence[Member]) -> None:
        """Make it of those that lack it: a killed call may have made some."""
        machines = [member.machine for member in members]
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

    def needs_names(self, facts: CheckpointFacts) -> bool:
        """Of a warm one a VM may stand still, or be off and its memory only there."""
        return facts.warm or self.half_done(facts)

    def recover(self, site: Site, record: Record, facts: CheckpointFacts) -> Recovery[CheckpointFacts]:
        if not facts.warm:
            return super().recover(site, record, facts)
        self.check_names(site, record, facts)
        members = [Member(site, vm) for vm in record.vms if vm in site.farm.vms]
        members = [one for one in members if one.can_power and _keeps_memory(one) and one.look()]
        if not members:
            return Recovery("it is there or not, and complete; noted")
        runs = "is not left standing still" if facts.then_off else "run on"
        text = f"see that {some(record.vms)} {runs}, and finish or undo what of {facts.name} was made"
        return Recovery(text, lambda _: _settle(members, facts.name, then_off=facts.then_off))


CHECKPOINT = _CheckpointActivity()


@dataclass(frozen=True, slots=True)
class CheckpointResult:
    """``checkpoint``: the new one's name. ``memory``: of a warm one, by VM, where the driver tells."""

    checkpoint: str
    memory: Mapping[str, KeptMemory] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TakeCheckpoint(Operation[CheckpointResult]):
    """Keep the VMs' present state as a checkpoint of the name ``label``, all at one moment. All are
    stopped, all are kept (or none, see group_change.py), and those that ran are started again; with
    ``wait`` it waits until they answer. Running VMs shut down by themselves first: what programs hold in
    memory is not kept.

    ``warm`` is for running VMs of one host: their memory is kept, too, and they run on. A server that
    keeps both as one (``WarmDisks``) takes one VM at a time.

    Errors: UsageError (the name; ``warm`` for VMs of several hosts, or several VMs of such a server),
    Conflict (the checkpoint exists), NotFound, Unsupported (also for a host that can't keep memory),
    NoSpace, Busy, WrongState (one store of several failed midway; ``warm``: one doesn't run)."""

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
        if is_reserved(self.label):
            raise UsageError(
                f"{self.label!r} is a name that only the task clean gives", remedy="choose another name"
            )

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def doing(self, vms: Sequence[str]) -> str:
        return f"checkpoint {some(vms)} as {self.label}"

    def plan(self, run: Run) -> Plan[CheckpointResult]:
        members, label = members_of(run.site, run.vms), self.label
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
            memory: dict[str, KeptMemory] = {}
            _check_warm(members, machines)
            lines = tuple(_warm_line(one, machines[one.vm], label) for one in members)
            keep = Job(lines, partial(keep_warm, members, label, memory))
            return Plan([alone(keep)], lambda: CheckpointResult(label, memory))
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


def keep_warm(
    members: Sequence[Member], label: str, memory: dict[str, KeptMemory], *, then_off: bool = False
) -> None:
    """Keep running VMs of one host, disk and memory, and put what was kept into ``memory``.
    ``then_off``: see ``CheckpointFacts``."""
    site, vms = members[0].site, [member.vm for member in members]
    machines, driver = [member.machine for member in members], members[0].driver
    facts = CheckpointFacts(was_on=tuple(vms), name=label, warm=True, then_off=then_off)
    with site.journal.begin(CHECKPOINT, vms, facts) as entry:
        try:
            if isinstance(driver, WarmMachines):
                driver.checkpoint_all(machines, label)
            else:
                driver.checkpoint(machines[0], label, warm=True)
        except Interrupted:
            raise
        except Exception:
            _settle_now(members, label, entry)
            raise
        if isinstance(driver, WarmMachines):
            kept = {one.vm: driver.memories(one.machine).get(label) for one in members}
            memory |= {vm: one for vm, one in kept.items() if one}
        for vm in vms:
            how = _stood(memory[vm]) if vm in memory else "runs on"
            site.reporter.say(f"kept as {label}, disk and memory; it {how}", vm=vm)


def _stood(kept: KeptMemory) -> str:
    still = f"stood still for {round(kept.pause * 1000)} ms"
    return f"{still}, its file systems for {kept.frozen:.1f} s" if kept.frozen else still


def _settle_now(members: Sequence[Member], label: str, entry: Entry[CheckpointFacts]) -> None:
    """After an error: what recovery would do, unless one is off. Where that can't be, or one doesn't run
    then, the entry stays unfinished, and the next command does it."""
    warm = entry.must_finish = isinstance(members[0].driver, WarmMachines)
    with contextlib.suppress(FarmhandError):
        if all(is_on(member.look()) for member in members):
            _settle(members, label)
            entry.must_finish = warm and not all(map(_runs_on, members))


def _runs_on(member: Member) -> bool:
    """Whether a VM is certain to run."""
    try:
        return member.present().power is Power.RUNNING
    except FarmhandError:
        return False


def _settle(members: Sequence[Member], label: str, *, then_off: bool = False) -> None:
    for member in members:
        settle(member)
    if then_off:
        stop_all([member for member in members if is_on(member.look())], grace=GRACE)
    _told(members, label, then_off=then_off)


def _told(members: Sequence[Member], label: str, *, then_off: bool = False) -> None:
    """Warn of what a warm checkpoint that did not come to its end left: VMs that are off, and those that
    have it all the same, whole or of their disk only."""
    warn = members[0].site.reporter.warn
    for member in members:
        machine = member.look()
        if machine and machine.power is Power.PAUSED:
            warn("it is paused: its hypervisor's own tools let it run on", vm=member.vm)
        elif not then_off and not is_on(machine):
            warn(("it doesn't run any more: ", Call("start")), vm=member.vm)
        if _has(disk := member.disk(), label):
            whole = _has(disk, label, warm=True)
            warn(f"it has the checkpoint {label}{'' if whole else ', of its disk only'}", vm=member.vm)


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


def check_keeps_memory(member: Member) -> None:
    """Unsupported if its host can't keep a running machine's memory."""
    can = member.site.hypervisor(member.host, look=True).capabilities()
    if not can.warm_checkpoints:
        why = can.why_not_warm or f"driver {can.driver} can't"
        raise Unsupported(
            f"{member.site.name}: {member.vm}'s host {member.host} keeps no running machine's memory: "
            f"{why}",
            remedy="make a cold checkpoint, for which it is shut down",
        )


def _keeps_memory(member: Member) -> bool:
    """Whether its hypervisor keeps memory itself."""
    return isinstance(member.site.hypervisor(member.host, look=True), WarmMachines)


def _keeps_together(member: Member) -> bool:
    """Whether it does so for several VMs at one moment."""
    driver = member.site.hypervisor(member.host, look=True)
    return isinstance(driver, WarmMachines) and driver.capabilities().warm_together


def _check_warm(members: Sequence[Member], machines: Mapping[str, Machine]) -> None:
    """Before anything is changed."""
    hosts = list(dict.fromkeys(member.host for member in members))
    if len(hosts) > 1:
        raise UsageError(
            f"warm checkpoints of one moment are of VMs of one host, and these are on {some(hosts)}",
            remedy="name those of one host; or make a cold one of all",
        )
    for member in members:
        vm, machine = member.vm, machines[member.vm]
        check_keeps_memory(member)
        if len(members) > 1 and not _keeps_together(member):
            raise UsageError(
                f"on {member.info.called} a warm checkpoint is of one VM: several can't be kept at one "
                "moment while they run",
                remedy="make one of each by itself; or a cold one of all",
            )
        if machine.power is not Power.RUNNING:
            raise WrongState(
                f"{member.site.name}: {vm} is {machine.power}: a warm checkpoint is of a running VM",
                remedy=(Call("start", vm=vm), "; or make a cold one"),
            )


def _warm_line(member: Member, machine: Machine, label: str) -> Action:
    room = f" (up to {brief(2 * machine.memory)} of room)" if _keeps_memory(member) else ""
    return Action("checkpoint", member.vm, f"keep as {label}, disk and memory{room}; it runs on")


def _has(disk: Disk | None, name: str, *, warm: bool = False) -> bool:
    """``warm``: and with its memory."""
    kept: Sequence[Checkpoint] = disk.checkpoints if disk else ()
    return any(one.name == name and (one.warm or not warm) for one in kept)
