"""reset: VMs' disks put back to a state they had, provably, all of them or none."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from hypervisors.api import Checkpoint, Disks, FarmDisks
from inventory.errors import DriverFailed, FarmhandError, NotFound, Unsupported, some
from inventory.sizes import format_duration
from provision.engine.group_change import change_disks, is_half_back
from provision.engine.journal import Operation, current_step
from provision.engine.report import Action, Outcome
from provision.engine.work import Run, begin, is_on, side_by_side
from provision.lost import grows_from, require
from provision.member import Member
from provision.power import (
    check_memory,
    power_on,
    then_what,
    wait_until_ready,
    write_identity,
)
from provision.site import Site

Proofs = dict[str, dict[str, object]]
"""By VM, JSON values."""


def reset(
    site: Site,
    vms: Sequence[str] = (),
    *,
    to: str = "clean",
    start: bool = True,
    wait: bool = True,
) -> Outcome:
    """Put VMs back to a checkpoint; then, with ``start``, started and (``wait``) answering. All of them
    get there or none, also when killed or refused midway: see engine/group_change.py. What an ssh
    host's machine does is its own command's doing; those run last, each for itself.

    Before the first start the stores prove that each disk equals the checkpoint; the proof is in the
    outcome's facts and in the journal. If one doesn't, none is started: DriverFailed.

    Back to a warm checkpoint goes one VM at a time: its disk and its memory; with ``start`` it runs on
    from there, else it is suspended. There is no proof of such a disk, for its guest goes on writing.

    Errors: NotFound (VM, checkpoint), Unsupported (ssh host without a reset command, a warm checkpoint
    of several), NoSpace, TimedOut, Several, Busy, WrongState (one store of several failed midway, or a
    warm checkpoint's; recovery goes on with it)."""
    names = site.vms(vms)
    doing = f"reset {some(names)} to {to}"
    with begin(site, "reset", names, doing=doing) as run:
        warm = []
        for vm in names:
            site.member(vm).present()
            if check_checkpoint(site, vm, to):
                warm.append(vm)
        if warm and len(names) > 1:
            raise Unsupported(
                f"{site.name}: {warm[0]}'s checkpoint {to} is warm: that is for one VM at a time",
                remedy=f"one by one: ./invoke reset --vm {warm[0]} --to {to}",
            )
        if start:
            run.add(*check_memory(site.members(names), wait=wait))
        for vm in names:
            text = f"put back to {to}"
            if warm:
                text += ", disk and memory"
            if start:
                text += f", {'run on' if warm else 'start'}{then_what(site.member(vm), wait=wait)}"
            run.add(Action("reset", vm, text))
        if not site.plan:
            ours = [vm for vm in names if site.member(vm).can_power]
            if ours:
                _reset_disks(site, run, ours, to=to, start=start, wait=wait, warm=bool(warm))
            theirs = {vm: partial(_reset_by_command, site, run, vm, to=to, wait=start and wait)
                      for vm in names if vm not in ours}  # fmt: skip
            side_by_side(site, theirs)
        return run.outcome()


def restore(to: str, store: Disks, machines: Sequence[str]) -> None:
    """Of one store, several only where it does them as one: see ``together.Change``."""
    if isinstance(store, FarmDisks) and len(machines) > 1:
        store.restore_all(machines, to)
    else:
        for machine in machines:
            store.restore(machine, to)


def prove(site: Site, vms: Sequence[str], to: str) -> Proofs:
    """That each disk is that checkpoint, or DriverFailed; the machines are stopped."""
    proofs: Proofs = {}

    def one(vm: str) -> None:
        member = site.member(vm)
        disk = member.disk()
        pristine = member.store.pristine(member.machine, to)
        if disk is None or not pristine:
            raise DriverFailed(
                f"{site.name}: {vm}'s disk was reset, but isn't provably checkpoint {to}: not started",
                remedy=f"reset it again; if that fails too, ./invoke destroy --vm {vm} "
                "and clone it again",
            )
        proofs[vm] = {
            "checkpoint": to, "pristine": True, "template": disk.template, "disk": str(disk.path),
        }  # fmt: skip

    side_by_side(site, {vm: partial(one, vm) for vm in vms})
    return {vm: proofs[vm] for vm in vms}


def _reset_disks(
    site: Site, run: Run, vms: Sequence[str], *, to: str, start: bool, wait: bool, warm: bool
) -> None:
    began = time.monotonic()
    was_on = [vm for vm in vms if is_on(site.member(vm).present())]
    alone = vms[0] if len(vms) == 1 else ""
    with site.journal.operation(
        "reset", vm=alone, vms=list(vms), to=to, start=start, was_on=was_on, warm=warm
    ) as operation:
        current_step("refresh identities")
        side_by_side(site, {vm: partial(write_identity, site.member(vm)) for vm in vms})
        change_disks(site, operation, vms, partial(restore, to), grace=0)
        proofs = proven(site, operation, vms, to)
        swapped = time.monotonic() - began
        what = "disk and memory are" if warm else "disk is"
        how = "" if warm else ", proven"
        for vm in vms:
            site.reporter.say(f"{what} {to} again{how}, in {format_duration(swapped)}", vm=vm)

        def finish(vm: str) -> None:
            if start:
                try:
                    power_on(site.member(vm), wait=wait)
                except FarmhandError:
                    if is_half_back(site.member(vm).store, site.member(vm).machine):
                        operation.must_finish = True  # its memory has been used, perhaps
                    raise
            run.vm_fact(
                vm, proof=proofs[vm], reset_seconds=round(swapped, 3),
                seconds=round(time.monotonic() - began, 3),
            )  # fmt: skip

        side_by_side(site, {vm: partial(finish, vm) for vm in vms})


def proven(site: Site, operation: Operation, vms: Sequence[str], to: str) -> Proofs:
    """The proofs, noted before any of the VMs runs again: the disks need not be put back once more."""
    if operation.facts.get("warm"):
        by = "its hypervisor: disk and memory are of one moment"
        proofs: Proofs = {vm: {"checkpoint": to, "pristine": None, "by": by} for vm in vms}
    else:
        proofs = prove(site, vms, to)
    operation.note(proof=proofs, changed=True)
    return proofs


def _reset_by_command(site: Site, run: Run, vm: str, *, to: str, wait: bool) -> None:
    began = time.monotonic()
    with site.journal.operation("reset", vm=vm, to=to):
        member = site.member(vm)
        member.driver.reset(member.machine, to)
        if wait:  # the command may have booted it or not: any boot counts
            wait_until_ready(member, since=float("-inf"))
    proof = {"checkpoint": to, "pristine": None, "by": "the reset command of the farm file"}
    run.vm_fact(vm, proof=proof, seconds=round(time.monotonic() - began, 3))


def check_checkpoint(site: Site, vm: str, to: str) -> bool:
    """That the VM can be put back to it. Whether it is a warm one. NotFound, Unsupported."""
    member = site.member(vm)
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
    """What a VM whose disk is gone can be put back to. NotFound."""
    known = grows_from(member.store, member.machine)
    if not known:
        require(member, member.present(), None)
    return known
