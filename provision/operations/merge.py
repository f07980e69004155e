"""merge: a disk's changes written back into the checkpoint that it grew from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hypervisors.api import CLEAN, Machine, MergingDisks
from inventory.errors import FarmhandError, Interrupted, Unsupported
from provision.clean_state import is_reserved
from provision.engine.facts import Facts
from provision.engine.journal import Entry, current_step
from provision.engine.operation import Operation, Recovery
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.report import NoResult
from provision.engine.run import Run
from provision.member import Member, each, is_on, members_of
from provision.operations import checkpoint
from provision.operations.checkpoint import disk_with_checkpoints
from provision.operations.group_change import as_before, stop_all
from provision.power import check_memory, power_on
from provision.site import Site
from provision.vm_activity import OneVmActivity


@dataclass(frozen=True, slots=True)
class MergeFacts(Facts):
    """``into``: name of the checkpoint. ``was_on``: whether the VM ran at the beginning."""

    into: str
    was_on: bool


class _MergeActivity(OneVmActivity[MergeFacts]):
    name = "merge"
    facts = MergeFacts
    starts = True
    without_disk = "its disk is being merged, and that is half done"

    def needs_names(self, _facts: MergeFacts) -> bool:
        """Its disk may be in two parts."""
        return True

    def go_on(self, member: Member, _machine: Machine, facts: MergeFacts) -> Recovery[MergeFacts]:
        def finish(_: Entry[MergeFacts]) -> None:
            _merge(member)
            as_before([member], [member.vm] if facts.was_on else [])

        return Recovery("merge it to the end", finish)


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
        facts = MergeFacts(disk.base, is_on(machine))
        text = f"merge what changed since {disk.base} into it"
        if facts.was_on:
            text = f"shut down, {text}, start again"
        return job("merge", vm, text, partial(self._one, member, facts))

    def _one(self, member: Member, facts: MergeFacts) -> None:
        site, vm = member.site, member.vm
        with site.journal.begin(MERGE, [vm], facts) as entry:
            try:
                if facts.was_on:
                    current_step("shut it down")
                _merge(member)
            except Interrupted:
                raise
            except FarmhandError:
                if member.disk() is not None:  # else cut off within: the store knows how to go on
                    as_before([member], [vm] if facts.was_on else [])
                else:
                    entry.must_finish = True
                raise
            site.reporter.say(f"merged into {facts.into}", vm=vm)
            if facts.was_on:
                power_on(member, wait=self.wait)


def _merge(member: Member) -> None:
    """Merge one VM, within an activity under way. Also continues a merge that was killed."""
    store = member.store
    if isinstance(store, MergingDisks):
        stop_all([member], grace=checkpoint.GRACE)
        store.merge(member.machine)
