"""merge: a disk's changes written back into the checkpoint that it grew from.

1. The VM is shut down. Killed or refused here, it runs again if it ran, and that is all.
2. It is noted that the merge was begun: from here on its disk may be in two parts, and only finishing
   makes it one. So until its disk was seen whole again, the activity is half done: nothing else uses the
   VM (``runner.refuse_half_done``), gc leaves all that is its, and recovery goes on with it.
3. It is noted that the merge is done. The VM runs again if it ran."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

from hypervisors.api import CLEAN, Machine, MergingDisks
from inventory.errors import Call, FarmhandError, Interrupted, NotFound, Unsupported, WrongState
from provision.clean_state import is_reserved
from provision.engine.journal import Entry
from provision.engine.operation import Operation, Recovery
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.report import NoResult
from provision.engine.run import Run
from provision.member import Member, each, is_on, members_of
from provision.operations import checkpoint
from provision.operations.checkpoint import disk_with_checkpoints
from provision.operations.group_change import GroupFacts, run_again
from provision.power import check_memory, power_on
from provision.site import Site
from provision.vm_activity import OneVmActivity


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeFacts(GroupFacts):
    """``into``: name of the checkpoint. ``decided``: step 2 was begun. ``changed``: it is merged."""

    into: str


class _MergeActivity(OneVmActivity[MergeFacts]):
    name = "merge"
    facts = MergeFacts
    starts = True
    without_disk = "its disk is being merged, and that is half done"

    def half_done(self, facts: MergeFacts) -> bool:
        return facts.decided and not facts.changed

    def go_on(self, member: Member, machine: Machine, facts: MergeFacts) -> Recovery[MergeFacts]:
        def finish(entry: Entry[MergeFacts]) -> None:
            member.driver.stop(member.machine, grace=checkpoint.GRACE)
            _merge(member, entry)
            _run_again(member, entry.facts)

        if self.half_done(facts):
            return Recovery("merge it to the end", finish)
        text = f"it is merged into {facts.into}" if facts.changed else "it had not begun"
        if not facts.was_on or (facts.changed and is_on(machine)):
            return Recovery(text)
        return Recovery(f"{text}; see that it runs as before", lambda _: _run_again(member, facts))

    def unmade(self, member: Member, facts: MergeFacts) -> Recovery[MergeFacts]:
        """Its disk is made whole all the same."""
        if not self.half_done(facts):
            return super().unmade(member, facts)

        def finish(entry: Entry[MergeFacts]) -> None:
            try:
                _merge(member, entry)
            except NotFound:  # it has gone since
                entry.must_finish = False

        return Recovery("its machine is gone; merge its disk to the end, if that is there", finish)


MERGE = _MergeActivity()


@dataclass(frozen=True, slots=True)
class Merge(Operation[NoResult]):
    """Write what changed on the VMs' disks since their checkpoints back into these, each VM for itself.
    The checkpoint then equals the disk. Never into ``clean``, which is the template's. Running VMs are
    shut down for it, and started again. After a kill, recovery goes on with it.

    Errors: Unsupported (a store that can't, a disk grown from clean), NotFound, NoSpace, Busy."""

    name = "merge"
    vms: tuple[str, ...] = ()
    wait: bool = True

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def plan(self, run: Run) -> Plan[NoResult]:
        members = members_of(run.site, run.vms)
        machines = each(members, Member.present)
        on = [member for member in members if is_on(machines[member.vm])]
        first = check_memory(on, wait=self.wait)
        jobs = {one.vm: [self._job(one, machines[one.vm])] for one in members}
        return Plan([alone(foretold(*first)), jobs], NoResult)

    def _job(self, member: Member, machine: Machine) -> Job:
        site, vm = member.site, member.vm
        disk = disk_with_checkpoints(member, machine)
        if not isinstance(member.store, MergingDisks):
            raise Unsupported(
                f"{site.name}: {vm}'s disk store can't merge a disk back into its checkpoint",
                remedy="make a new checkpoint instead: here it costs next to nothing; only the "
                "linked copies of store lvm can merge",
            )
        if disk.base == CLEAN or is_reserved(disk.base):
            what = "clean, its template" if disk.base == CLEAN else f"{disk.base}, its clean"
            raise Unsupported(
                f"{site.name}: {vm}'s disk grew from {what}, which never changes",
                remedy="make a checkpoint: what comes after it can be merged into it",
            )
        if any(kept.warm for kept in disk.checkpoints if kept.name == disk.base):
            raise Unsupported(
                f"{site.name}: {vm}'s disk grew from {disk.base}, a warm checkpoint, whose memory "
                "belongs to its disk as that is",
                remedy="make another checkpoint: what comes after that can be merged into it",
            )
        facts = MergeFacts(into=disk.base, was_on=(vm,) if is_on(machine) else ())
        text = f"merge what changed since {disk.base} into it"
        if facts.was_on:
            text = f"shut down, {text}, start again"
        return job("merge", vm, text, partial(self._one, member, facts))

    def _one(self, member: Member, facts: MergeFacts) -> None:
        site, vm = member.site, member.vm
        with site.journal.begin(MERGE, [vm], facts) as entry:
            if facts.was_on:
                entry.note(replace(facts, asked=datetime.now(UTC), grace=checkpoint.GRACE))
            try:
                if facts.was_on:
                    entry.step("shut it down")
                member.driver.stop(member.machine, grace=checkpoint.GRACE)
                _merge(member, entry)
            except Interrupted:
                raise
            except FarmhandError:
                if not entry.must_finish:
                    entry.must_finish = not _run_again(member, entry.facts)
                raise
            site.reporter.say(f"merged into {facts.into}", vm=vm)
            if facts.was_on:
                power_on(member, wait=self.wait)


def _merge(member: Member, entry: Entry[MergeFacts]) -> None:
    """Merge a stopped VM's disk; or go on with a merge that was cut off. After an error the entry
    must be finished, unless the disk was seen whole: then nothing of it is half done."""
    store, facts = member.store, replace(entry.facts, decided=True)
    if not isinstance(store, MergingDisks):
        raise WrongState(
            f"{member.site.name}: the store of host {member.host} can't go on with the merge of "
            f"{member.vm}'s disk",
            remedy=("put back the store that it was begun in, then ", Call("recover")),
        )
    entry.note(facts)
    entry.must_finish = True
    try:
        store.merge(member.machine)
    except Interrupted:
        raise
    except FarmhandError:
        if store.find(member.machine) is not None:
            entry.note(replace(facts, decided=False))
            entry.must_finish = False
        raise
    entry.note(replace(facts, changed=True))
    entry.must_finish = False


def _run_again(member: Member, facts: MergeFacts) -> bool:
    """If it ran. One that can't be started is a warning, for what led here comes first; then it is
    False."""
    try:
        if facts.was_on:
            run_again(member, facts, cold=False)
    except Interrupted:
        raise
    except FarmhandError as error:
        text = f"could not be started again: {error.message}"
        member.site.reporter.warn(text, vm=member.vm)
        return False
    return True
