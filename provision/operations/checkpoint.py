"""checkpoint: VMs' present state kept, all at one moment; and a disk merged back into its checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from hypervisors.api import Checkpoint, Disk, Disks, FarmDisks, Machine, MergingDisks, Power
from inventory.errors import (
    Conflict,
    FarmhandError,
    Interrupted,
    Unsupported,
    UsageError,
    WrongState,
    some,
)
from provision.engine.group_change import as_before, change_disks, ran_before, stop_all
from provision.engine.journal import Operation, current_step
from provision.engine.report import Action, Outcome
from provision.engine.work import Job, begin, is_on, side_by_side
from provision.lost import require
from provision.power import check_memory, power_on
from provision.site import Site

GRACE = 180.0
"""Seconds a guest gets to shut down before a checkpoint: its disk should be a clean one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checkpoint(
    site: Site, vms: Sequence[str], name: str, *, warm: bool = False, wait: bool = True
) -> Outcome:
    """Keep the VMs' present state as a checkpoint, all at one moment: all are stopped, all are kept (or
    none, see engine/group_change.py), those that ran are started again (``wait``: until they answer).
    What programs hold in memory is not part of it: running VMs are shut down by themselves first.
    ``warm``: of one VM that runs, and runs on; its memory is part of it.

    Errors: UsageError (the name; several, ``warm``), Conflict (the checkpoint exists), NotFound,
    Unsupported (also of a host that can't keep memory), NoSpace, Busy, WrongState (one store of several
    failed midway; ``warm``: it doesn't run)."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a checkpoint name",
            remedy="letters, digits, '.', '_' and '-', at most 64, such as before-upgrade",
        )
    names = site.vms(vms)
    if warm and len(names) > 1:
        raise UsageError(
            "a warm checkpoint is of one VM: several can't be kept at one moment while they run",
            remedy="--vm NAME --warm for each; or a cold one of all, without --warm",
        )
    with begin(site, "checkpoint", names, doing=f"checkpoint {some(names)} as {name}") as run:
        machines = {vm: site.member(vm).present() for vm in names}
        for vm in names:
            if any(kept.name == name for kept in _disk(site, vm).checkpoints):
                raise Conflict(
                    f"{site.name}: {vm} has a checkpoint {name!r} already",
                    remedy="choose another name; checkpoints never change",
                )
        was_on = [vm for vm in names if is_on(machines[vm])]
        run.fact(checkpoint=name)
        if warm:
            _check_warm(site, names[0], machines[names[0]])
            run.add(Action("checkpoint", names[0], f"keep as {name}, disk and memory; it runs on"))
            if not site.plan:
                _keep_warm(site, names[0], name)
            return run.outcome()
        run.add(*check_memory([site.member(vm) for vm in was_on], wait=wait))
        for vm in names:
            text = f"shut down, keep as {name}, start again" if vm in was_on else f"keep as {name}"
            run.add(Action("checkpoint", vm, text))
        if not site.plan:
            alone = names[0] if len(names) == 1 else ""
            with site.journal.operation(
                "checkpoint", vm=alone, vms=list(names), name=name, was_on=was_on
            ) as operation:
                change_disks(site, operation, names, partial(keep, name), grace=GRACE)
                kept_all(site, operation, names, name, wait=wait)
        return run.outcome()


def _check_warm(site: Site, vm: str, machine: Machine) -> None:
    """Before anything is changed."""
    can = site.hypervisor(site.farm.host_of(vm), look=True).capabilities()
    if not can.warm_checkpoints:
        why = "; ".join(note for note in can.notes if "warm" in note) or f"driver {can.driver} can't"
        raise Unsupported(
            f"{site.name}: {vm}'s host {site.farm.host_of(vm)} keeps no running machine's memory: {why}",
            remedy="without --warm: a cold checkpoint, for which it is shut down",
        )
    if machine.power is not Power.RUNNING:
        raise WrongState(
            f"{site.name}: {vm} is {machine.power}: a warm checkpoint is of a running VM",
            remedy=f"./invoke start --vm {vm}; or a cold one, without --warm",
        )


def _keep_warm(site: Site, vm: str, name: str) -> None:
    """Killed, it is there or not, and the VM runs on; nothing is to be finished."""
    with site.journal.operation("checkpoint", vm=vm, vms=[vm], name=name, was_on=[vm], warm=True):
        try:
            site.member(vm).driver.checkpoint(site.member(vm).machine, name, warm=True)
        except Interrupted:
            raise
        except FarmhandError:
            if not is_on(site.member(vm).look()):
                site.reporter.warn("it doesn't run any more: ./invoke start", vm=vm)
            raise
        site.reporter.say(f"kept as {name}, disk and memory; it runs on", vm=vm)


def keep(name: str, store: Disks, machines: Sequence[str]) -> None:
    """Of one store, several only where it does them as one: see ``together.Change``. Those that a
    killed call left with the checkpoint have it."""
    lacking = [machine for machine in machines if not _has(store.find(machine), name)]
    if isinstance(store, FarmDisks) and lacking:
        store.checkpoint_all(lacking, name)
    else:
        for machine in lacking:
            store.checkpoint(machine, name)


def kept_all(site: Site, operation: Operation, vms: Sequence[str], name: str, *, wait: bool) -> None:
    """What comes after: noted, and those that ran are started again."""
    operation.note(changed=True)
    for vm in vms:
        site.reporter.say(f"kept as {name}", vm=vm)
    again = [vm for vm in ran_before(site, operation.facts) if vm in vms]
    side_by_side(site, {vm: partial(power_on, site.member(vm), wait=wait) for vm in again})


def merge(site: Site, vms: Sequence[str], *, wait: bool = True) -> Outcome:
    """Write what changed on the VMs' disks since their checkpoints back into these, each for itself: the
    checkpoint then is what the disk is now. Never into ``clean``, the template's. Running VMs are shut
    down for it, and started again. Killed, it is gone on with by recovery.

    Errors: Unsupported (a store that can't, a disk grown from clean), NotFound, NoSpace, Busy."""
    names = site.vms(vms)
    with begin(site, "merge", names) as run:
        jobs: dict[str, list[Job]] = {}
        on = {vm: is_on(site.member(vm).present()) for vm in names}
        run.add(*check_memory([site.member(vm) for vm in names if on[vm]], wait=wait))
        for vm in names:
            was_on = on[vm]
            disk, store = _disk(site, vm), site.disks(site.farm.host_of(vm))
            if not isinstance(store, MergingDisks):
                raise Unsupported(
                    f"{site.name}: {vm}'s disk store can't merge a disk back into its checkpoint",
                    remedy="make a new checkpoint instead: here it costs next to nothing; only the "
                    "linked copies of store lvm can merge",
                )
            if disk.base == "clean":
                raise Unsupported(
                    f"{site.name}: {vm}'s disk grew from clean, its template, which never changes",
                    remedy="make a checkpoint: what comes after it can be merged into it",
                )
            text = f"merge what changed since {disk.base} into it"
            if was_on:
                text = f"shut down, {text}, start again"
            run_one = partial(_merge_one, site, vm, disk.base, was_on=was_on, wait=wait)
            jobs[vm] = [Job(Action("merge", vm, text), run_one)]
        run.carry_out(jobs)
        return run.outcome()


def merge_on(site: Site, vm: str) -> None:
    """Within an operation under way: also goes on with a merge that was killed."""
    store = site.disks(site.farm.host_of(vm))
    if isinstance(store, MergingDisks):
        stop_all(site, [vm], grace=GRACE)
        store.merge(site.farm.machine_of(vm))


def _merge_one(site: Site, vm: str, base: str, *, was_on: bool, wait: bool) -> None:
    ran = [vm] if was_on else []
    with site.journal.operation("merge", vm=vm, into=base, was_on=ran) as operation:
        try:
            if was_on:
                current_step("shut it down")
            merge_on(site, vm)
        except Interrupted:
            raise
        except FarmhandError:
            if site.member(vm).disk() is not None:  # else cut off within: the store knows how to go on
                as_before(site, operation.facts)
            else:
                operation.must_finish = True
            raise
        site.reporter.say(f"merged into {base}", vm=vm)
        if was_on:
            power_on(site.member(vm), wait=wait)


def _disk(site: Site, vm: str) -> Disk:
    member = site.member(vm)
    disk = member.disk()
    require(member, member.present(), disk)
    if disk is None:
        raise Unsupported(
            f"{site.name}: {vm}'s host {site.farm.host_of(vm)} keeps no checkpoints",
            remedy="checkpoints are kept by disk stores; this machine has its reset command",
        )
    return disk


def _has(disk: Disk | None, name: str) -> bool:
    kept: Sequence[Checkpoint] = disk.checkpoints if disk else ()
    return any(one.name == name for one in kept)
