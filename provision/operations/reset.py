"""reset: VMs' disks put back to a state they had, provably, all of them or none."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from hypervisors.api import CLEAN, WARM, Checkpoint, Disks, FarmDisks, Power, WarmDisks
from inventory.errors import (
    Call,
    ConnectionLost,
    DriverFailed,
    FarmhandError,
    Interrupted,
    NotFound,
    Remedy,
    Several,
    Unsupported,
    WrongState,
    some,
)
from inventory.sizes import format_duration
from provision.clean_state import clean_of
from provision.engine.facts import Facts
from provision.engine.journal import Entry, current_step
from provision.engine.operation import Operation, Recovery
from provision.engine.parallel import side_by_side
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.record import Record
from provision.engine.report import Action
from provision.engine.run import Run
from provision.guest import identity
from provision.member import Member, each, is_on, members_of
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

BEYOND = (
    "its processes run on from the checkpoint; what they hold in memory is what they held then, and "
    "nobody inspected that"
)
"""What the proof of disk and memory leaves open."""


@dataclass(frozen=True, slots=True)
class Proof(Facts):
    """The proof that a VM is at a checkpoint. ``pristine``, of its disk: True: its store has proven it;
    None: nobody looked, and ``by`` says whose word it is. ``memory``: the seal (sha256) of the memory
    that it runs on from; "": it boots. ``beyond``: what all that does not prove."""

    checkpoint: str
    pristine: bool | None
    template: str = ""
    disk: str = ""
    by: str = ""
    memory: str = ""
    beyond: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetFacts(GroupFacts):
    """``to``: the checkpoints, by VM. ``start``: the VMs are started afterwards. ``warm``: those that
    get their memory back, too; the others boot, whatever is kept. ``proofs``: by VM, known once
    ``changed``. ``denied``: a store denies that a disk is that."""

    to: Mapping[str, str]
    start: bool = False
    warm: tuple[str, ...] = ()
    proofs: Mapping[str, Proof] | None = None
    denied: bool = False


class _ResetActivity(GroupActivity[ResetFacts]):
    """It also repeats a way back to a warm checkpoint whose first start was cut off."""

    name = "reset"
    facts = ResetFacts

    def made_anew(self, facts: ResetFacts, vm: str, clean: str) -> bool:
        return facts.changed and facts.to.get(vm) == clean

    def change(self, facts: ResetFacts, store: Disks, members: Sequence[Member]) -> None:
        to = facts.to[members[0].vm]
        if isinstance(store, FarmDisks) and len(members) > 1:
            store.restore_all([member.machine for member in members], to)
        else:
            for member in members:
                store.restore(member.machine, to)

    def alike(self, facts: ResetFacts, vm: str) -> str:
        return facts.to[vm]

    def boots(self, facts: ResetFacts, vm: str) -> bool:
        return vm not in facts.warm

    def done(self, members: Sequence[Member], entry: Entry[ResetFacts]) -> None:
        """Note the proofs before any VM runs again. After that the disks need not be put back once
        more."""
        facts = entry.facts
        try:
            proofs = prove(members, facts.to, warm=facts.warm)
        except Interrupted:
            raise
        except FarmhandError as error:
            # What a store denies it will deny again: that is told, and another reset is in nobody's way.
            errors = error.errors.values() if isinstance(error, Several) else (error,)
            entry.must_finish = any(isinstance(one, ConnectionLost) for one in errors)
            if not entry.must_finish:
                entry.note(replace(facts, denied=True))
            raise
        entry.note(replace(facts, proofs=proofs, changed=True))

    def recover(self, site: Site, record: Record, facts: ResetFacts) -> Recovery[ResetFacts]:
        if facts.denied:
            return Recovery(
                "its disk is not proven to be the checkpoint, and it stays off: reset it again"
            )
        return super().recover(site, record, facts)

    def half_done(self, facts: ResetFacts) -> bool:
        return super().half_done(facts) and not facts.denied

    def words(self, facts: ResetFacts) -> str:
        return f"put back to {in_words(facts.to)}"

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
    """Put VMs back to a checkpoint: ``to``; absent: each to the one that the farm file names for it, or
    ``clean``. With ``start`` start them then; with ``wait`` wait until they answer. All of them get
    there or none, also if it is killed or refused midway: see group_change.py. A machine of an ssh host
    is reset by its own command; those run last, each for itself.

    Before the first start the stores prove that each disk equals the checkpoint. The proof is in the
    result and in the journal. If one disk doesn't, no VM is started: DriverFailed.

    From a warm checkpoint a VM gets its memory back, too: with ``start`` it runs on from there, else it
    is suspended. With ``cold`` it boots from that checkpoint's disk. A memory that can't be used is
    refused before anything is stopped, unless the farm file says ``boot_instead``: then it boots, also
    where that shows at its start alone, and its proof is of the disk alone. A server that keeps
    both as one (``WarmDisks``) takes one VM at a time, and never proves its disk: the guest goes on
    writing.

    Errors: NotFound (VM, checkpoint), Unsupported (an ssh host without a reset command; several VMs, or
    ``cold``, of such a server), NoSpace, TimedOut, Several, Busy, WrongState (a memory that can't be
    used; one store of several failed midway, or the way to a warm checkpoint did; recovery goes on with
    it)."""

    name = "reset"
    vms: tuple[str, ...] = ()
    to: str = ""
    start: bool = True
    wait: bool = True
    cold: bool = False

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def doing(self, vms: Sequence[str]) -> str:
        return f"reset {some(vms)}" + (f" to {self.to}" if self.to else "")

    def plan(self, run: Run) -> Plan[ResetResult]:
        site, members = run.site, members_of(run.site, run.vms)
        done: dict[str, VmReset] = {}
        on = {vm for vm, machine in each(members, Member.present).items() if is_on(machine)}
        ways = each(members, self._way)
        served = [vm for vm, way in ways.items() if way.warm and not way.proven]
        if served and len(members) > 1:
            raise Unsupported(
                f"{site.name}: {served[0]}'s checkpoint {ways[served[0]].to} is warm: that is for one "
                f"VM at a time on {Member(site, served[0]).info.called}",
                remedy=("one by one: ", Call("reset", vm=served[0], to=ways[served[0]].to)),
            )
        first = check_memory(members, wait=self.wait) if self.start else ()
        ours = [member for member in members if member.can_power]
        facts = ResetFacts(
            was_on=tuple(one.vm for one in ours if one.vm in on),
            to={one.vm: ways[one.vm].to for one in ours},
            start=self.start,
            warm=tuple(one.vm for one in ours if ways[one.vm].warm),
        )
        actions = tuple(Action("reset", one.vm, self._text(one, ways[one.vm])) for one in ours)
        disks = Job(actions, partial(self._disks, site, ours, facts, ways, done))
        theirs = {
            one.vm: [
                job("reset", one.vm, self._text(one, ways[one.vm]), partial(self._by_command, one, done))
            ]
            for one in members
            if not one.can_power
        }
        stages = [alone(foretold(*first)), alone(disks) if ours else {}, theirs]
        return Plan(stages, lambda: ResetResult(done))

    def _way(self, member: Member) -> WayBack:
        return way_back(member, self.to, cold=self.cold)

    def _text(self, member: Member, way: WayBack) -> str:
        text = f"put back to {way.to}"
        if way.warm:
            text += ", disk and memory"
        elif way.boots:
            text += f", its disk only{f' ({way.why})' if way.why else ''}"
        if self.start:
            text += f", {'run on' if way.warm else 'start'}{then_what(member, wait=self.wait)}"
        return text

    def _disks(
        self,
        site: Site,
        members: Sequence[Member],
        facts: ResetFacts,
        ways: Mapping[str, WayBack],
        done: dict[str, VmReset],
    ) -> None:
        began = time.monotonic()
        for member in members:
            if why := ways[member.vm].why:
                text = f"boots from the disk of {facts.to[member.vm]}: {why}"
                site.reporter.warn(text, vm=member.vm)
        with site.journal.begin(RESET, [member.vm for member in members], facts) as entry:
            current_step("refresh identities")
            side_by_side(site, {one.vm: partial(write_identity, one) for one in members})
            RESET.carry_out(members, entry)
            swapped = time.monotonic() - began
            proofs = entry.facts.proofs
            assert proofs is not None, "noted once the disks are changed"
            for member in members:
                proof = proofs[member.vm]
                both = member.vm in facts.warm and (proof.memory or proof.by)
                what = "disk and memory are" if both else "disk is"
                how = ", proven" if proof.pristine else ""
                text = f"{what} {facts.to[member.vm]} again{how}, in {format_duration(swapped)}"
                site.reporter.say(text, vm=member.vm)

            def finish(member: Member) -> None:
                proof = proofs[member.vm]
                if self.start:
                    try:
                        if not power_on(member, wait=self.wait, cold=member.vm not in facts.warm):
                            proof = replace(proof, memory="", beyond="")
                    except FarmhandError:
                        if is_half_back(member.store, member.machine):
                            entry.must_finish = True  # its memory has been used, perhaps
                        raise
                done[member.vm] = VmReset(
                    proof=proof, reset_seconds=round(swapped, 3),
                    seconds=round(time.monotonic() - began, 3),
                )  # fmt: skip

            side_by_side(site, {member.vm: partial(finish, member) for member in members})
            shown = {member.vm: done[member.vm].proof for member in members}
            if shown != proofs:  # one that was to run on has booted
                entry.note(replace(entry.facts, proofs=shown))

    def _by_command(self, member: Member, done: dict[str, VmReset]) -> None:
        began, vm = time.monotonic(), member.vm
        to = member.site.farm.goes_back_to(vm, self.to)
        with member.site.journal.begin(RESET, [vm], ResetFacts(was_on=(), to={vm: to})):
            member.driver.reset(member.machine, to)
            if self.start and self.wait:  # the command may have booted it or not: any boot counts
                wait_until_ready(member, since=float("-inf"))
        proof = Proof(to, None, by="the reset command of the farm file")
        done[vm] = VmReset(proof=proof, seconds=round(time.monotonic() - began, 3))


def in_words(to: Mapping[str, str]) -> str:
    """The checkpoints that VMs go back to, such as "clean" or "clean (prod), warm (dev2)"."""
    names = list(dict.fromkeys(to.values()))
    if len(names) == 1:
        return names[0]
    return ", ".join(f"{name} ({some([vm for vm in to if to[vm] == name])})" for name in names)


def prove(
    members: Sequence[Member], to: Mapping[str, str], *, warm: Collection[str] = ()
) -> Mapping[str, Proof]:
    """Prove that each VM's disk is that checkpoint, and that those of ``warm`` will run on from its
    memory; the machines are stopped. Returns the proofs by VM. DriverFailed if one is not."""
    proofs: dict[str, Proof] = {}

    def one(member: Member) -> None:
        vm, name = member.vm, to[member.vm]
        if vm in warm and isinstance(member.store, WarmDisks):
            proofs[vm] = Proof(name, None, by="its hypervisor: disk and memory are of one moment")
            return
        disk = member.disk()
        pristine = member.store.pristine(member.machine, name)
        if disk is None or not pristine:
            raise _unproven(member, f"disk was reset, but isn't provably checkpoint {name}")
        proof = Proof(name, True, template=disk.template, disk=str(disk.path))
        if vm in warm:
            kept = member.memories().get(name)
            if kept is None or kept.trouble or member.present().power is not Power.SUSPENDED:
                why = f": {kept.trouble}" if kept and kept.trouble else ""
                if not member.declared.boot_instead:
                    what = f"disk is checkpoint {name}, but its memory can't be used{why}"
                    raise _unproven(member, what)
                if not why:  # else whoever starts it tells that
                    text = "it isn't suspended, though its disk is the checkpoint's: it boots"
                    member.site.reporter.warn(text, vm=vm)
            else:
                proof = replace(proof, memory=kept.seal, beyond=BEYOND)
        proofs[vm] = proof

    if members:
        side_by_side(members[0].site, {member.vm: partial(one, member) for member in members})
    return {member.vm: proofs[member.vm] for member in members}


def _unproven(member: Member, what: str) -> DriverFailed:
    return DriverFailed(
        f"{member.site.name}: {member.vm}'s {what}: not started",
        remedy=(
            "reset it again; if that fails too, ",
            Call("destroy", vm=member.vm),
            " and clone it again",
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WayBack:
    """How a VM gets back to a checkpoint. ``warm``: it runs on from its memory; ``proven``: so that disk
    and memory are proven. ``boots``: it boots, though there is a memory; ``why``: because that can't be
    used."""

    to: str
    warm: bool = False
    proven: bool = True
    boots: bool = False
    why: str = ""


def way_back(member: Member, to: str = "", *, cold: bool = False) -> WayBack:
    """How the VM would get back to the checkpoint; "": to its own. What ``clean`` means is told by
    ``provision.clean_state``. Errors: NotFound, Unsupported, WrongState (its memory can't be used)."""
    site, vm = member.site, member.vm
    to = site.farm.goes_back_to(vm, to)
    if not member.can_power:
        if not member.declared.reset:
            raise Unsupported(
                f"{vm} is on an ssh host and has no reset command",
                of=site.name,
                remedy=f"give vms.{vm} a 'reset' command in the farm file",
            )
        return WayBack(to=to, proven=False)
    disk = member.disk()
    kept = disk.checkpoints if disk is not None else _left(member)
    known = {one.name: one for one in kept}
    if to == CLEAN:
        to = clean_of(kept, disk.template if disk is not None else member.present().template)
    if to not in known:
        raise NotFound(
            f"{vm} has no checkpoint {to!r}",
            of=site.name,
            remedy=_where_from(member, to, known),
        )
    if isinstance(member.store, WarmDisks):
        if known[to].warm and cold:
            raise Unsupported(
                f"{vm}'s checkpoint {to} is warm: its memory can't be left out on {member.info.called}",
                of=site.name,
                remedy=("with its memory: ", Call("reset", vm=vm, to=to)),
            )
        return WayBack(to=to, warm=known[to].warm, proven=not known[to].warm)
    memory = member.memories().get(to) if known[to].warm else None
    why = memory.trouble if memory else ""
    if to == WARM == member.declared.reset_to and memory is None:
        why = "it is gone"
    elif memory is not None and _lost_its_key(member):
        why = "its host key was lost, and another one can't get into a memory"
    elif memory is not None and not why and not cold:
        why = member.why_unusable(to)
    if not why or cold:
        return WayBack(to=to, warm=memory is not None and not cold, boots=cold and memory is not None)
    why = f"its memory can't be used: {why}"
    if member.declared.boot_instead:
        return WayBack(to=to, boots=True, why=why)
    raise WrongState(
        f"{vm} can't run on from checkpoint {to}: {why}",
        of=site.name,
        remedy=(
            "boot it from that checkpoint's disk: ",
            Call("reset", vm=vm, to=to, cold=True),
            f", or each time, by 'boot_instead: yes' of vms.{vm} in the farm file",
        ),
    )


def _lost_its_key(member: Member) -> bool:
    own = member.keeps_own_key or not member.info.guests
    return not own and not identity.host_key(member.site.paths, member.vm)


def _where_from(member: Member, to: str, known: Collection[str]) -> Remedy:
    """What to do where the VM has no such checkpoint."""
    has = f"it has {', '.join(known) or 'none'}"
    if to == WARM == member.declared.reset_to:
        return (f"{has}; once it has answered, it is made by ", Call("clone-farm", vm=member.vm))
    return has


def _left(member: Member) -> tuple[Checkpoint, ...]:
    """The checkpoints that a VM whose disk is gone can be put back to. NotFound if there is none."""
    known = grows_from(member.store, member.machine)
    if not known:
        require(member, member.present(), None)
    return known
