"""renew: VMs moved to the newest generation of their template: a ``confirmed_change``.

A fresh disk of the new generation is swapped in (``Disks.move``, one atomic step). Once the VM answers
from it, the checkpoint of the state before is removed. If it goes back, to its old generation, the
checkpoint stays, for the disk grows from it; the next renew that succeeds removes it, too."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial

from hypervisors.api import CLEAN, Disk, Template, too_small
from inventory.errors import Call, NotFound, WrongState
from provision.clean_state import clean_state
from provision.engine.journal import current_step
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.report import NoResult
from provision.engine.run import Run
from provision.guest import identity
from provision.member import Member, each, is_on, members_of
from provision.operations.checkpoint import disk_with_checkpoints
from provision.operations.checkpoint_remove import remove_kept
from provision.operations.confirmed_change import ConfirmedActivity, ConfirmedFacts
from provision.operations.templates import newest_template
from provision.power import check_memory, then_what, write_identity
from provision.site import Site
from provision.template_recipe import left_alone

_BACK = 1000
"""Activities of a VM that are looked back at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewFacts(ConfirmedFacts):
    """``old``, ``new``: labels of the generations. ``own_key``: it kept its image's host key before.
    ``earlier``: checkpoints of tries that failed, the newest first."""

    old: str
    new: str
    own_key: bool
    earlier: tuple[str, ...] = ()


class _RenewActivity(ConfirmedActivity[RenewFacts]):
    name = "renew"
    facts = RenewFacts

    def finish(self, member: Member, facts: RenewFacts) -> None:
        """Of an earlier try one that something else grows from by now stays."""
        remove_kept(member, facts.kept)
        for name in facts.earlier:
            try:
                remove_kept(member, name)
            except WrongState as error:
                member.site.reporter.warn(f"of an earlier try: {error.message}", vm=member.vm)

    def roll_back(self, member: Member, facts: RenewFacts) -> None:
        """Its disk also goes back where its old generation is another farm's, or is gone from the
        store: then only clean is the new one."""
        site, disk = member.site, member.disk()
        if disk is not None and disk.template != facts.old:
            old = next((one for one in site.templates(member.host) if one.label == facts.old), None)
            if old is not None:
                _move(member, old, own_key=facts.own_key)
            else:
                why = f"{facts.old} is not this farm's, or is gone: its clean stays {disk.template}"
                again = Call("reset", vm=member.vm, to=CLEAN)
                site.reporter.warn((why, ", which it gets with: ", again), vm=member.vm)
        if disk is not None:  # also where nothing but that was changed
            _expect_key(member, own=facts.own_key)
        current_step(f"put it back to {facts.kept}")
        member.store.restore(member.machine, facts.kept)

    def rolled_back(self, facts: RenewFacts) -> str:
        return (
            f"is as it was on {facts.old}; checkpoint {facts.kept} stays, for its disk grows "
            "from it: the next renew that succeeds removes it"
        )

    def finish_words(self, facts: RenewFacts) -> str:
        return f"it is on {facts.new}; remove checkpoint {', '.join((facts.kept, *facts.earlier))}"

    def roll_back_words(self, facts: RenewFacts) -> str:
        return f"go back to {facts.old}, as it was before"

    def failure(self, facts: RenewFacts) -> str:
        return f"{facts.new} failed"


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
                old=disk.template, new=template.label, own_key=member.keeps_own_key,
                kept=_free_name(disk, template),
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
    found: dict[str, None] = {}
    for one in records:
        if one.verb != RENEW.name or not one.ended:
            continue
        with contextlib.suppress(WrongState):  # written by another farmhand
            facts = RENEW.facts_of(one)
            if not facts.changed and facts.kept in made and made[facts.kept] <= one.ended:
                found[facts.kept] = None
    return tuple(found)


def _one(member: Member, facts: RenewFacts, template: Template, *, wait: bool) -> None:
    def change(facts: RenewFacts) -> RenewFacts:
        _move(member, template, own_key=left_alone(member.site, template.name, template))
        member.site.reporter.say(f"its disk is of {template.label} now", vm=member.vm)
        return facts

    with member.site.journal.begin(RENEW, [member.vm], facts) as entry:
        RENEW.carry_out(member, entry, change, wait=wait)
    member.site.reporter.say(f"moved from {facts.old} to {facts.new}", vm=member.vm)


def _move(member: Member, template: Template, *, own_key: bool) -> None:
    """Swap in a fresh disk of that generation, and have the machine's definition name it."""
    current_step(f"swap in a fresh disk of {template.label}")
    _expect_key(member, own=own_key)
    disk = member.store.move(member.machine, template)
    spec = member.spec(member.allocate())
    member.was_seen(member.driver.redefine(replace(spec, disk_size=disk.size)))


def _expect_key(member: Member, *, own: bool) -> None:
    """``own``: as ``identity.expect_own_key``."""
    identity.expect_own_key(member.site.paths, member.vm, own=own)
    write_identity(member)
