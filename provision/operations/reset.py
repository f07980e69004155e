"""reset: VMs' disks put back to a state they had, provably, all of them or none."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from hypervisors.api import Checkpoint, Disks, FarmDisks
from inventory.errors import Call, DriverFailed, FarmhandError, NotFound, Unsupported, some
from inventory.sizes import format_duration
from provision.engine.facts import Facts
from provision.engine.journal import Entry, current_step
from provision.engine.operation import Operation
from provision.engine.parallel import side_by_side
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.report import Action
from provision.engine.run import Run
from provision.member import Member, each, is_on
from provision.missing_disk import grows_from, require
from provision.operations.group_change import GroupActivity, GroupFacts, is_half_back
from provision.power import (
    check_memory,
    power_on,
    then_what,
    wait_until_ready,
    write_identity,
)
from provision.site import Site


@dataclass(frozen=True, slots=True)
class Proof(Facts):
    """The proof that a VM's disk is a checkpoint. ``pristine`` True: its store has proven it; None:
    nobody looked, and ``by`` says whose word it is."""

    checkpoint: str
    pristine: bool | None
    template: str = ""
    disk: str = ""
    by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetFacts(GroupFacts):
    """``start``: the VMs that are started afterwards. ``warm``: the checkpoint has their memory, too.
    ``proofs``: by VM, known once ``changed``."""

    to: str
    start: bool = False
    warm: bool = False
    proofs: Mapping[str, Proof] | None = None


class _ResetActivity(GroupActivity[ResetFacts]):
    """It also repeats a way back to a warm checkpoint whose first start was cut off."""

    name = "reset"
    facts = ResetFacts

    def change(self, facts: ResetFacts, store: Disks, machines: Sequence[str]) -> None:
        if isinstance(store, FarmDisks) and len(machines) > 1:
            store.restore_all(machines, facts.to)
        else:
            for machine in machines:
                store.restore(machine, facts.to)

    def done(self, members: Sequence[Member], entry: Entry[ResetFacts]) -> None:
        """Note the proofs before any VM runs again. After that the disks need not be put back once
        more."""
        facts = entry.facts
        if facts.warm:
            by = "its hypervisor: disk and memory are of one moment"
            proofs: Mapping[str, Proof] = {one.vm: Proof(facts.to, None, by=by) for one in members}
        else:
            proofs = prove(members, facts.to)
        entry.note(replace(facts, proofs=proofs, changed=True))

    def words(self, facts: ResetFacts) -> str:
        return f"put back to {facts.to}"

    def then_on(self, facts: ResetFacts, vms: Sequence[str]) -> Sequence[str]:
        return vms if facts.start else ()


RESET = _ResetActivity()


@dataclass(frozen=True, slots=True, kw_only=True)
class VmReset:
    """``reset_seconds``: until the disks of all were back; None for a reset by command. ``seconds``:
    until the VM was on, or answered."""

    proof: Proof
    reset_seconds: float | None = None
    seconds: float


@dataclass(frozen=True, slots=True)
class ResetResult:
    """By VM."""

    vms: Mapping[str, VmReset] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reset(Operation[ResetResult]):
    """Put VMs back to a checkpoint. With ``start`` start them then; with ``wait`` wait until they
    answer. All of them get there or none, also if it is killed or refused midway: see group_change.py. A
    machine of an ssh host is reset by its own command; those run last, each for itself.

    Before the first start the stores prove that each disk equals the checkpoint. The proof is in the
    result and in the journal. If one disk doesn't, no VM is started: DriverFailed.

    A warm checkpoint takes one VM at a time. Its disk and its memory go back; with ``start`` it runs on
    from there, else it is suspended. Its disk is never proven, for the guest goes on writing.

    Errors: NotFound (VM, checkpoint), Unsupported (an ssh host without a reset command; a warm
    checkpoint for several VMs), NoSpace, TimedOut, Several, Busy, WrongState (one store of several
    failed midway, or the way to a warm checkpoint did; recovery goes on with it)."""

    name = "reset"
    vms: tuple[str, ...] = ()
    to: str = "clean"
    start: bool = True
    wait: bool = True

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def doing(self, vms: Sequence[str]) -> str:
        return f"reset {some(vms)} to {self.to}"

    def plan(self, run: Run) -> Plan[ResetResult]:
        site, members = run.site, run.site.members(run.vms)
        done: dict[str, VmReset] = {}
        on = {vm for vm, machine in each(members, Member.present).items() if is_on(machine)}
        checked = each(members, lambda member: check_checkpoint(member, self.to))
        warm = [vm for vm, is_warm in checked.items() if is_warm]
        if warm and len(members) > 1:
            raise Unsupported(
                f"{site.name}: {warm[0]}'s checkpoint {self.to} is warm: that is for one VM at a time",
                remedy=("one by one: ", Call("reset", vm=warm[0], to=self.to)),
            )
        first = check_memory(members, wait=self.wait) if self.start else ()
        ours = [member for member in members if member.can_power]
        facts = ResetFacts(
            was_on=tuple(one.vm for one in ours if one.vm in on), to=self.to, start=self.start,
            warm=bool(warm),
        )  # fmt: skip
        actions = tuple(Action("reset", one.vm, self._text(one, warm=bool(warm))) for one in ours)
        disks = Job(actions, partial(self._disks, site, ours, facts, done))
        theirs = {
            one.vm: [job("reset", one.vm, self._text(one), partial(self._by_command, one, done))]
            for one in members
            if not one.can_power
        }
        stages = [alone(foretold(*first)), alone(disks) if ours else {}, theirs]
        return Plan(stages, lambda: ResetResult(done))

    def _text(self, member: Member, *, warm: bool = False) -> str:
        text = f"put back to {self.to}"
        if warm:
            text += ", disk and memory"
        if self.start:
            text += f", {'run on' if warm else 'start'}{then_what(member, wait=self.wait)}"
        return text

    def _disks(
        self, site: Site, members: Sequence[Member], facts: ResetFacts, done: dict[str, VmReset]
    ) -> None:
        began = time.monotonic()
        with site.journal.begin(RESET, [member.vm for member in members], facts) as entry:
            current_step("refresh identities")
            side_by_side(site, {one.vm: partial(write_identity, one) for one in members})
            RESET.carry_out(members, entry)
            swapped = time.monotonic() - began
            what = "disk and memory are" if facts.warm else "disk is"
            how = "" if facts.warm else ", proven"
            for member in members:
                text = f"{what} {self.to} again{how}, in {format_duration(swapped)}"
                site.reporter.say(text, vm=member.vm)
            proofs = entry.facts.proofs
            assert proofs is not None, "noted once the disks are changed"

            def finish(member: Member) -> None:
                if self.start:
                    try:
                        power_on(member, wait=self.wait)
                    except FarmhandError:
                        if is_half_back(member.store, member.machine):
                            entry.must_finish = True  # its memory has been used, perhaps
                        raise
                done[member.vm] = VmReset(
                    proof=proofs[member.vm], reset_seconds=round(swapped, 3),
                    seconds=round(time.monotonic() - began, 3),
                )  # fmt: skip

            side_by_side(site, {member.vm: partial(finish, member) for member in members})

    def _by_command(self, member: Member, done: dict[str, VmReset]) -> None:
        began = time.monotonic()
        with member.site.journal.begin(RESET, [member.vm], ResetFacts(was_on=(), to=self.to)):
            member.driver.reset(member.machine, self.to)
            if self.start and self.wait:  # the command may have booted it or not: any boot counts
                wait_until_ready(member, since=float("-inf"))
        proof = Proof(self.to, None, by="the reset command of the farm file")
        done[member.vm] = VmReset(proof=proof, seconds=round(time.monotonic() - began, 3))


def prove(members: Sequence[Member], to: str) -> Mapping[str, Proof]:
    """Prove that each VM's disk is that checkpoint; the machines are stopped. Returns the proofs by VM.
    DriverFailed if one is not."""
    proofs: dict[str, Proof] = {}

    def one(member: Member) -> None:
        disk = member.disk()
        pristine = member.store.pristine(member.machine, to)
        if disk is None or not pristine:
            raise DriverFailed(
                f"{member.site.name}: {member.vm}'s disk was reset, but isn't provably checkpoint {to}: "
                "not started",
                remedy=(
                    "reset it again; if that fails too, ",
                    Call("destroy", vm=member.vm),
                    " and clone it again",
                ),
            )
        proofs[member.vm] = Proof(to, True, template=disk.template, disk=str(disk.path))

    if members:
        side_by_side(members[0].site, {member.vm: partial(one, member) for member in members})
    return {member.vm: proofs[member.vm] for member in members}


def check_checkpoint(member: Member, to: str) -> bool:
    """Check that the VM can be put back to it. Returns whether it is a warm one. Errors: NotFound,
    Unsupported."""
    site, vm = member.site, member.vm
    if not member.can_power:
        if not member.declared.reset:
            raise Unsupported(
                f"{site.name}: {vm} is on an ssh host and has no reset command",
                remedy=f"give vms.{vm} a 'reset' command in the farm file",
            )
        return False
    disk = member.disk()
    kept = disk.checkpoints if disk is not None else _left(member)
    known = [one.name for one in kept]
    if to not in known:
        raise NotFound(
            f"{site.name}: {vm} has no checkpoint {to!r}", remedy=f"it has {', '.join(known) or 'none'}"
        )
    return any(one.warm for one in kept if one.name == to)


def _left(member: Member) -> tuple[Checkpoint, ...]:
    """The checkpoints that a VM whose disk is gone can be put back to. NotFound if there is none."""
    known = grows_from(member.store, member.machine)
    if not known:
        require(member, member.present(), None)
    return known
