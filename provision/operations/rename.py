"""rename: a made VM goes on under the name that the farm file has for it by now.

The farm file is the truth, so it was changed first: it names the VM as it is to be called, and no longer
as it was. Then:

1. The VM is shut down.
2. What it was given (MAC, address, port), its host key, its kept memory, its disk with all checkpoints
   and its machine get the new name, one after the other.
3. The network services are told, and the VM is started again, if it ran.

Each part of step 2 can be done again, and the other way round. So after a kill, or an error amid it,
recovery takes all of it to the name that the farm file has then: on to the new one, or, where somebody
has put the old one back, to that. Until then neither name can be used. An error before the first change
of machine or disk leaves all as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from hypervisors.api import Disk, Machine, Owner, Power, WarmDisks, WarmMachines, not_ours
from inventory.errors import (
    Call,
    Conflict,
    FarmhandError,
    Interrupted,
    NotFound,
    Text,
    UnknownName,
    Unsupported,
    UsageError,
    WrongState,
    did_you_mean,
    some,
)
from provision import untold
from provision.clean_state import rename_tools
from provision.engine.facts import Facts
from provision.engine.journal import Entry, current_step
from provision.engine.operation import Operation, Recovery
from provision.engine.plan import Job, Plan, alone
from provision.engine.record import Record
from provision.engine.report import Action
from provision.engine.run import Run
from provision.guest import identity
from provision.leftovers import of_drivers, survey
from provision.member import Member, is_on, with_memories
from provision.operations import checkpoint
from provision.power import power_on, then_what, write_identity
from provision.site import Site
from provision.vm_activity import VmActivity


@dataclass(frozen=True, slots=True)
class RenameFacts(Facts):
    """``old``, ``new``: the names. ``host``: where it is. ``was_on``: whether it ran."""

    old: str
    new: str
    host: str
    was_on: bool


class _RenameActivity(VmActivity[RenameFacts]):
    name = "rename"
    facts = RenameFacts
    starts = True
    without_disk = "it is being renamed, and that is half done"

    def half_done(self, _facts: RenameFacts) -> bool:
        return True

    def recover(self, site: Site, record: Record, facts: RenameFacts) -> Recovery[RenameFacts]:
        del record
        names = (facts.old, facts.new)
        if facts.host not in site.farm.hosts or not any(_parts(site, facts.host, names)):
            return Recovery("nothing of it is there any more; noted")
        declared = [vm for vm in names if vm in site.farm.vms]
        if len(declared) != 1:
            which = "neither" if not declared else "both"
            raise WrongState(
                f"{site.name} names {which} of {facts.old} and {facts.new}, and the one is half renamed "
                "to the other",
                remedy=("have it name the one that is to be, then ", Call("recover")),
            )
        (vm,) = declared
        member, old = Member(site, vm), next(name for name in names if name != vm)
        if member.host != facts.host:
            raise WrongState(
                f"{site.name}: {vm} is to be on host {member.host}, and is half renamed on {facts.host}",
                remedy=(f"give it 'host: {facts.host}', then ", Call("recover")),
            )
        how = f"go on, it is {vm} from now on" if vm == facts.new else f"take it back, it is {vm} again"
        again = "; start it again" if facts.was_on else ""
        return Recovery(f"{how}{again}", lambda _: _finish(member, old, was_on=facts.was_on))

    def after(self, site: Site, record: Record) -> None:
        """Of the name that is no more, too: such as a seed that was attached to it. Never a disk."""
        super().after(site, record)
        gone = [vm for vm in record.vms if vm not in site.farm.vms]
        for item in of_drivers(site) if gone else ():
            owner = item.what.owner
            if owner is not None and owner.vm in gone and item.what.kind not in ("domain", "disk"):
                item.discard()


RENAME = _RenameActivity()


@dataclass(frozen=True, slots=True)
class RenameResult:
    """``diff``: how the network services' files and records differ from what they were."""

    diff: str = ""


@dataclass(frozen=True, slots=True)
class Rename(Operation[RenameResult]):
    """Make the made VM ``was``, which the farm file has no more, into its VM ``vm``, which isn't made:
    machine, disk, checkpoints, kept memory, host key, MAC, address and port. One that runs is shut down
    for it and started again.

    Errors: NotFound (one of the names, or its disk), WrongState (``was`` is in the farm file; host or
    template differ), Conflict (``vm`` is made already), Unsupported (not on its driver, or not with such
    checkpoints), NotOurs, TimedOut and others of a start, Busy."""

    name = "rename"
    vm: str
    was: str
    wait: bool = True

    def __post_init__(self) -> None:
        if self.vm == self.was:
            raise UsageError(f"{self.vm} has that name", remedy="it wants the new one, and what it was")

    def affected(self, site: Site) -> tuple[str, ...]:
        new, old = self.vm, self.was
        first = f"give {old} its new name there first, everywhere it is named; then the same again"
        if new not in site.farm.vms:
            raise UnknownName(f"{site.name}: there is no VM {new!r}", remedy=first)
        if old in site.farm.vms:
            raise WrongState(f"{site.name}: {old} is still in the farm file", remedy=first)
        return (old, new)

    def plan(self, run: Run) -> Plan[RenameResult]:
        site, member = run.site, Member(run.site, self.vm)
        if not member.can_power:
            raise Unsupported(
                f"{site.name}: {self.vm} is on {member.info.called}: nothing of it has a name but in "
                "the farm file"
            )
        if already := self._already(member):
            return Plan([alone(Job((Action("keep", self.vm, already),)))], RenameResult)
        machine, disk = self._found(member)
        self._check(member, machine, disk)
        facts = RenameFacts(self.was, self.vm, member.host, is_on(machine))
        action = Action("rename", self.vm, self._text(member, facts))
        diffs: list[str] = []
        told = _in_step(member, self.was, diffs) if site.plan else ()
        do = partial(self._one, member, facts, action, diffs)
        jobs = [Job((action, *told), do)]
        jobs += [Job((Action("note", self.vm, text),)) for text in _notes(member, disk)]
        return Plan([alone(*jobs)], lambda: RenameResult("".join(diffs)))

    def _text(self, member: Member, facts: RenameFacts) -> str:
        text = f"{self.was} becomes {self.vm}: machine, disk, checkpoints, keys, what it was given"
        if not facts.was_on:
            return text
        return f"shut down, {text}; start{then_what(member, wait=self.wait)}"

    def _already(self, member: Member) -> str:
        """What to say where the same was asked for before, and came to its end, if by recovery; "": it
        didn't."""
        site, names = member.site, (self.was, self.vm)
        asked = site.journal.history(vm=self.vm, steps=False)
        before = next((one for one in asked if (one.verb, one.vms) == (RENAME.name, names)), None)
        if before is None:
            return ""
        if site.plan and not before.settled:
            return f"recovered, it is what {self.was} was"
        driver, old = member.driver, site.farm.machine_of(self.was)
        made = driver.find(old) is None and member.look() is not None
        return f"is what {self.was} was, already" if made else ""

    def _found(self, member: Member) -> tuple[Machine, Disk]:
        """Of the VM by its old name."""
        site, host, old = member.site, member.host, self.was
        name = site.farm.machine_of(old)
        machine = site.hypervisor(host, look=True).find(name)
        if machine is None:
            others = [one for one in site.farm.hosts if one != host and site.has_disks(one)]
            for other in others:
                if site.hypervisor(other, look=True).find(name) is not None:
                    raise WrongState(
                        f"{site.name}: {old} is on host {other}, and {self.vm} is to be on {host}",
                        remedy=f"give it 'host: {other}': renamed, it stays where it is",
                    )
            known = [vm for vm in survey(site).vms if vm not in site.farm.vms]
            missing = f"no VM that is made and not in the farm file is called {old!r}"
            has = f"there are {some(known)}" if known else "there is none"
            raise NotFound(f"{site.name}: {missing}", remedy=did_you_mean(old, known, has))
        if machine.owner != Owner(site.identity, old):
            what = f"{site.name}: machine {name} on host {host}"
            raise not_ours(what, machine.owner, site.identity)
        disk = member.store.find(name)
        if disk is None:
            raise NotFound(
                f"{site.name}: the disk of {old} is not in the store that the farm file has for host "
                f"{host}",
                remedy="name its store there; or, if the disk is gone, destroy what is left of it",
            )
        return machine, disk

    def _check(self, member: Member, machine: Machine, disk: Disk) -> None:
        site, store, driver = member.site, member.store, member.driver
        if member.look() is not None or member.disk() is not None:
            raise Conflict(
                f"{site.name}: {self.vm} is made already",
                remedy=("if that one is to go: ", Call("destroy", vm=self.vm), "; then the same again"),
            )
        is_of, wanted = disk.template.rpartition("@")[0], site.farm.template_of(self.vm)
        if is_of != wanted:
            raise WrongState(
                f"{site.name}: {self.was} is of template {is_of}, and {self.vm} is to be of {wanted}",
                remedy=f"give it 'template: {is_of}'",
            )
        if machine.power is Power.SUSPENDED and not isinstance(driver, WarmMachines):
            raise WrongState(
                f"{site.name}: {self.was} is suspended: its memory would be lost",
                remedy="let it run on, or shut it down, with its hypervisor's own tools",
            )
        bound: list[str] = []
        if isinstance(store, WarmDisks):  # its server gives back a machine's name with its memory
            bound = [kept.name for kept in disk.checkpoints if kept.warm]
        elif isinstance(driver, WarmMachines):
            memories = driver.memories(machine.name)
            bound = [name for name, kept in memories.items() if kept.how == "read"]
        if bound:
            raise Unsupported(
                f"{site.name}: {self.was} can't be renamed with warm checkpoints here ({some(bound)}): "
                "their memory is given back under its old name alone",
                remedy=(
                    f"put {self.was} back in the farm file, remove them: ",
                    Call("checkpoint-remove", vm=self.was, name=bound[0]),
                    "; then rename it",
                ),
            )

    def _one(
        self, member: Member, facts: RenameFacts, action: Action, diffs: list[str]
    ) -> Sequence[Action]:
        site = member.site
        with site.journal.begin(RENAME, [facts.old, facts.new], facts) as entry:
            told = _go_on(member, entry, diffs)
            site.reporter.say(f"is what {facts.old} was", vm=self.vm)
            if facts.was_on:
                power_on(member, wait=self.wait)
        return (action, *told)


def _go_on(member: Member, entry: Entry[RenameFacts], diffs: list[str]) -> Sequence[Action]:
    """All but the start. What fails amid it is left to recovery."""
    old, before = entry.facts.old, _seen(member, entry.facts.old)
    entry.must_finish = True
    try:
        # It isn't made. What it was given, for the network services, would else be in the way back.
        member.site.allocator.release(member.vm)
        if entry.facts.was_on:
            entry.step("shut it down")
            member.driver.stop(member.site.farm.machine_of(old), grace=checkpoint.GRACE)
        _take_over(member, old)
        told = _in_step(member, old, diffs)
    except Interrupted:
        raise
    except FarmhandError as error:
        if _unchanged(member, old, before):
            _give_back(member, entry.facts)
            entry.must_finish = False
            raise
        first = (error.remedy, "; then ") if error.remedy else ""
        then = f" goes on; or, with {old} back in the farm file, takes it back"
        raise WrongState(
            f"{error.message}; {old} is half renamed to {member.vm}, and stays stopped",
            remedy=(first, Call("recover"), then),
            detail=error.detail,
        ) from error
    entry.must_finish = False
    return told


def _seen(member: Member, old: str) -> object:
    """What there is by both names, to be compared."""
    driver, store, name = member.driver, member.store, member.site.farm.machine_of(old)
    machine, disk = driver.find(name), store.find(name)
    memories = driver.memories(name) if machine and isinstance(driver, WarmMachines) else {}
    new = (driver.find(member.machine), store.find(member.machine))
    return machine and machine.owner, disk and disk.checkpoints, frozenset(memories), *new


def _unchanged(member: Member, old: str, before: object) -> bool:
    try:
        return _seen(member, old) == before
    except FarmhandError:
        return False


def _take_over(member: Member, old: str) -> None:
    """Make all that VM's the member's. Safe to do again, and the other way round."""
    site, driver = member.site, member.driver
    name = site.farm.machine_of(old)
    member.was_seen(driver.find(name) or driver.find(member.machine))  # which tells where it is
    current_step(f"give {member.vm} what {old} was given")
    site.allocator.rename(old, member.vm)
    rename_tools(site.paths, old, member.vm)
    untold.forget_name(site.paths, old)  # whatever runs under the new name, boots
    current_step(f"give {member.vm} the keys of {old}")
    identity.rename_identity(site.paths, old, name, to=member.vm, to_machine=member.machine)
    write_identity(member)
    member.was_seen(driver.rename(name, member.spec(member.allocate())))
    identity.remove_identity(site.paths, old, name)


def _give_back(member: Member, facts: RenameFacts) -> None:
    """What was taken over, where the machine could not be."""
    site, name = member.site, member.site.farm.machine_of(facts.old)
    site.allocator.rename(member.vm, facts.old)
    rename_tools(site.paths, member.vm, facts.old)
    identity.rename_identity(site.paths, member.vm, member.machine, to=facts.old, to_machine=name)
    identity.remove_identity(site.paths, member.vm, member.machine)
    if not facts.was_on:
        return
    try:
        if not is_on(member.driver.find(name)):
            current_step("start it again")
            member.driver.start(name)
    except Interrupted:
        raise
    except FarmhandError as error:
        site.reporter.warn(f"could not be started again: {error.message}", vm=facts.old)


def _finish(member: Member, old: str, *, was_on: bool) -> None:
    """After a kill."""
    driver, site = member.driver, member.site
    for name in (site.farm.machine_of(old), member.machine):
        machine = driver.find(name)
        if not is_on(machine):
            continue
        if name == member.machine and driver.find(site.farm.machine_of(old)) is None:
            return  # the start comes last
        current_step("shut it down")
        driver.stop(name, grace=checkpoint.GRACE)
    _take_over(member, old)
    from provision.network.rollback import APPLY

    if any(record.verb == APPLY.name for record in site.journal.unfinished()):  # that is undone first
        later = ("the network services are told by the next: ", Call("network-apply"))
        site.reporter.warn(later, vm=member.vm)
    else:
        _in_step(member, old, [])
    if was_on:
        power_on(member, wait=False)


def _in_step(member: Member, old: str, diffs: list[str]) -> Sequence[Action]:
    """Tell the network services."""
    from provision.network.apply import has_services, keep_in_step

    site = member.site
    if not site.farm.services.used and not has_services(site):
        return ()
    recorded = site.allocator.recorded()
    given = recorded.get(old) or recorded.get(member.vm) or site.allocator.peek(member.vm)
    renamed = {member.vm: replace(given, vm=member.vm)}
    return keep_in_step(Run(site, "rename"), diffs, [], gone=[old], renamed=renamed)


def _parts(site: Site, host: str, vms: Sequence[str]) -> Iterator[object]:
    """Machines and disks of these names that are there."""
    for name in map(site.farm.machine_of, vms):
        yield site.hypervisor(host, look=True).find(name)
        yield site.disks(host).find(name)


def _notes(member: Member, disk: Disk) -> Iterator[Text]:
    """What of the VM still has its old name."""
    site, vm = member.site, member.vm
    template = site.farm.templates.get(site.farm.template_of(vm) or "")
    hostname = site.farm.hostname_of(vm)
    if template is not None and template.first_boot == "none":
        yield f"nobody tells its guest: its host name is as it was; give it {hostname} in the guest"
    else:
        yield f"its guest takes the host name {hostname}, and another machine-id, when it boots next"
    driver = member.driver
    memories = driver.memories(disk.machine) if isinstance(driver, WarmMachines) else {}
    if warm := [one.name for one in with_memories(disk, memories).checkpoints if one.warm]:
        yield f"a guest that runs on from {some(warm)} has its old host name, until it boots"
