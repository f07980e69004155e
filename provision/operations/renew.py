"""renew: VMs moved to the newest generation of their template.

1. The VM is shut down, and its present state kept as a checkpoint.
2. A fresh disk of the new generation is swapped in (``Disks.move``, one atomic step).
3. The VM is started. Once its ssh answers, the checkpoint of step 1 is removed.

If it doesn't answer, or the command is killed before it did, the VM goes back to its old generation and
the state of step 1: old or new, never between. The checkpoint stays then, for the disk grows from it;
the next renew that succeeds removes it, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from hypervisors.api import Disk, Machine, Template, too_small
from inventory.errors import Call, FarmhandError, Interrupted, NotFound, WrongState
from provision.clean_state import clean_state
from provision.engine.journal import Entry, current_step
from provision.engine.operation import Operation, Recovery
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.report import NoResult
from provision.engine.run import Run
from provision.guest import identity
from provision.member import Member, each, is_on, members_of
from provision.operations import checkpoint
from provision.operations.checkpoint import disk_with_checkpoints
from provision.operations.checkpoint_remove import remove_kept
from provision.operations.group_change import (
    GroupFacts,
    as_before,
    on_or_off_as_before,
    run_again,
    then_on_or_off,
)
from provision.operations.templates import newest_template
from provision.power import check_memory, power_on, then_what, write_identity
from provision.site import Site
from provision.vm_activity import OneVmActivity

_BACK = 1000
"""Activities of a VM that are looked back at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewFacts(GroupFacts):
    """``old``, ``new``: labels of the generations. ``kept``: the checkpoint of the state before;
    ``earlier``: those of tries that failed, the newest first. ``decided``: from here on its disk may be
    another one. ``changed``: the new one answered."""

    old: str
    new: str
    kept: str
    earlier: tuple[str, ...] = ()


class _RenewActivity(OneVmActivity[RenewFacts]):
    name = "renew"
    facts = RenewFacts
    starts = True

    def go_on(self, member: Member, machine: Machine, facts: RenewFacts) -> Recovery[RenewFacts]:
        if facts.changed:
            text = f"it is on {facts.new}; remove checkpoint {', '.join((facts.kept, *facts.earlier))}"
            text += then_on_or_off(machine, facts.was_on)
            return Recovery(text, lambda _: _finish_later(member, facts))
        runs = " and start it again" if facts.was_on else ""
        if facts.decided:
            text = f"go back to {facts.old}, as it was before{runs}"
            return Recovery(text, lambda entry: _go_back(member, entry))
        if not facts.was_on:
            return Recovery("its disk is as it was")
        text = "its disk is as it was; see that it runs as before"
        return Recovery(text, lambda _: run_again(member, facts, cold=False))

    def half_done(self, facts: RenewFacts) -> bool:
        return facts.decided and not facts.changed


RENEW = _RenewActivity()


@dataclass(frozen=True, slots=True)
class Renew(Operation[NoResult]):
    """Move VMs to the newest generation of their template, each for itself. What was written to their
    disks goes; their checkpoints stay, but ``clean``, which is the new generation from then on. Until
    its ssh answers, the state before is kept; if it doesn't, the VM goes back to it. A VM that was
    stopped is started for that, and shut down again.

    Errors: NotFound (no generation), UsageError (the template is larger than the disk), Unsupported (its
    host keeps no disks), NoSpace, TimedOut and others of a start, Busy.

    Without ``wait`` the start is taken for the answer."""

    name = "renew"
    vms: tuple[str, ...] = ()
    wait: bool = True

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def plan(self, run: Run) -> Plan[NoResult]:
        members = members_of(run.site, run.vms)
        machines = each(members, Member.present)
        disks = {one.vm: disk_with_checkpoints(one, machines[one.vm]) for one in members}
        wanted = {one.vm: _newest(one) for one in members}
        moving = [one for one in members if disks[one.vm].template != wanted[one.vm].label]
        jobs: dict[str, list[Job]] = {}
        for member in members:
            vm, disk, template = member.vm, disks[member.vm], wanted[member.vm]
            if member not in moving:
                jobs[vm] = [job("keep", vm, f"is on {template.label}, the newest")]
                continue
            if disk.size < template.size:
                raise too_small(vm, disk.size, template)
            facts = RenewFacts(
                old=disk.template, new=template.label, kept=_free_name(disk, template),
                earlier=_of_earlier_tries(member, disk),
                was_on=(vm,) if is_on(machines[vm]) else (),
            )  # fmt: skip
            move = partial(_one, member, facts, template, wait=self.wait)
            jobs[vm] = [job("renew", vm, _text(member, facts, wait=self.wait), move)]
            clean = clean_state(run.site.paths, vm, disk)
            if clean.added:
                text = f"its clean ({clean.words}) stays behind; the same on {template.label}: "
                jobs[vm].append(job("note", vm, (text, clean.again(vm))))
        first = check_memory(moving, wait=self.wait)
        return Plan([alone(foretold(*first)), jobs], NoResult)


def _text(member: Member, facts: RenewFacts, *, wait: bool) -> str:
    down = "shut down, " if facts.was_on else ""
    after = "" if facts.was_on else ", shut down again"
    return (
        f"{down}move from {facts.old} to {facts.new}, start{then_what(member, wait=wait)}{after}; "
        f"until it answers its state is kept as {facts.kept}"
        + (f"; then {', '.join(facts.earlier)}, of an earlier try, goes too" if facts.earlier else "")
    )


def _newest(member: Member) -> Template:
    name = member.site.farm.template_of(member.vm) or ""
    found = newest_template(member.site, name, member.host)
    if found is None:
        raise NotFound(
            f"{member.site.name}: there is no generation of template {name} on host {member.host}",
            remedy=("make one: ", Call("template-build", name=name)),
        )
    return found


def _free_name(disk: Disk, template: Template) -> str:
    """Of an earlier try one may be there still: its disk grows from it."""
    name, taken = f"before-{template.name}-{template.generation}", {one.name for one in disk.checkpoints}
    more = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return next(one for one in (name, *more) if one not in taken)


def _of_earlier_tries(member: Member, disk: Disk) -> tuple[str, ...]:
    """The checkpoints that renews which failed have left, the newest first. A later one of that name is
    somebody's own."""
    made = {one.name: one.created for one in disk.checkpoints}
    records = member.site.journal.history(_BACK, vm=member.vm, steps=False)
    tries = [(RENEW.facts_of(one), one) for one in records if one.verb == RENEW.name]
    found = [
        facts.kept
        for facts, one in tries
        if one.ended and not facts.changed and facts.kept in made and made[facts.kept] <= one.ended
    ]
    return tuple(dict.fromkeys(found))


def _remove_kept(member: Member, facts: RenewFacts) -> None:
    """Of an earlier try one that something else grows from by now stays."""
    remove_kept(member, facts.kept)
    for name in facts.earlier:
        try:
            remove_kept(member, name)
        except WrongState as error:
            member.site.reporter.warn(f"of an earlier try: {error.message}", vm=member.vm)


def _finish_later(member: Member, facts: RenewFacts) -> None:
    """It answered; by recovery."""
    _remove_kept(member, facts)
    on_or_off_as_before(member, facts.was_on, grace=checkpoint.GRACE)


def _one(member: Member, facts: RenewFacts, template: Template, *, wait: bool) -> None:
    site, vm = member.site, member.vm
    with site.journal.begin(RENEW, [vm], facts) as entry:
        if facts.was_on:
            entry.note(replace(facts, asked=datetime.now(UTC), grace=checkpoint.GRACE))
        try:
            entry.step("shut it down")
            member.driver.stop(member.machine, grace=checkpoint.GRACE)
            entry.step(f"keep its state as {facts.kept}")
            member.store.checkpoint(member.machine, facts.kept)
        except Interrupted:
            raise
        except FarmhandError:
            as_before([member], facts.was_on)
            raise
        entry.note(replace(entry.facts, decided=True))
        try:
            _move(member, template)
            site.reporter.say(f"its disk is of {template.label} now", vm=vm)
            power_on(member, wait=wait)
        except Interrupted:
            raise
        except FarmhandError as error:
            site.reporter.warn(f"{template.label} failed: {error.message}; it goes back", vm=vm)
            entry.must_finish = True
            _go_back(member, entry)
            entry.must_finish = False
            raise
        entry.note(replace(entry.facts, changed=True))
        entry.must_finish = True
        _remove_kept(member, facts)
        if not facts.was_on:
            entry.step("shut it down again")
            member.driver.stop(member.machine, grace=checkpoint.GRACE)
        entry.must_finish = False
    site.reporter.say(f"moved from {facts.old} to {facts.new}", vm=vm)


def _move(member: Member, template: Template) -> None:
    """Swap in a fresh disk of that generation, and have the machine's definition name it."""
    site = member.site
    current_step(f"swap in a fresh disk of {template.label}")
    source = site.farm.templates.get(template.name)
    own = ((source and source.firstboot) or template.firstboot) == "none"
    identity.expect_own_key(site.paths, member.vm, own=own)
    write_identity(member)
    disk = member.store.move(member.machine, template)
    spec = member.spec(member.allocate())
    member.was_seen(member.driver.redefine(replace(spec, disk_size=disk.size)))


def _go_back(member: Member, entry: Entry[RenewFacts]) -> None:
    """To the old generation and the state before; it runs again if it ran. Safe to do again."""
    site, facts = member.site, entry.facts
    member.driver.stop(member.machine, grace=0)
    disk = member.disk()
    if disk is not None and disk.template != facts.old:
        old = next((one for one in site.templates(member.host) if one.label == facts.old), None)
        if old is None:
            raise NotFound(
                f"{site.name}: {facts.old}, which {member.vm} was on, is gone",
                remedy=("its state is kept: ", Call("reset", vm=member.vm, to=facts.kept)),
            )
        _move(member, old)
    current_step(f"put it back to {facts.kept}")
    member.store.restore(member.machine, facts.kept)
    as_before([member], facts.was_on)
    text = (
        f"is on {facts.old} again, as it was; checkpoint {facts.kept} stays, for its disk grows "
        "from it: the next renew that succeeds removes it"
    )
    site.reporter.say(text, vm=member.vm)
