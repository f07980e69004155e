"""reset and checkpoint: a VM's disk put back to a state it had, provably."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from inventory.errors import (
    Conflict,
    DriverFailed,
    FarmhandError,
    Interrupted,
    NotFound,
    Unsupported,
    UsageError,
)
from inventory.sizes import format_duration
from provision.journal import current_step
from provision.power import (
    can_power,
    check_memory,
    power_on,
    then_what,
    wait_until_ready,
    write_identity,
)
from provision.report import Action, Outcome
from provision.site import Site
from provision.work import Job, begin, disk_of, is_on, present

CHECKPOINT_GRACE = 180.0
"""Seconds a guest gets to shut down before a checkpoint: its disk should be a clean one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def reset(
    site: Site,
    vms: Sequence[str] = (),
    *,
    to: str = "clean",
    start: bool = True,
    wait: bool = True,
) -> Outcome:
    """Put VMs back to a checkpoint, side by side; then, with ``start``, started and (``wait``)
    answering. Killed at any point, the disk is the old one or the new one.

    Before the start the store proves that the disk equals the checkpoint; the proof is in the
    outcome's facts and in the journal. A disk that isn't is never started: DriverFailed.

    Errors: NotFound (VM, checkpoint), Unsupported (ssh host without a reset command), NoSpace,
    TimedOut, Several, Busy."""
    names = site.vms(vms)
    doing = f"reset {' '.join(names)} to {to}"
    with begin(site, "reset", names, doing=doing) as run:
        machines = {vm: present(site, vm) for vm in names}
        for vm in names:
            _check_checkpoint(site, vm, to)
        if start:
            check_memory(site, [vm for vm in names if not is_on(machines[vm])])
        jobs: dict[str, list[Job]] = {}
        for vm in names:
            text = f"put back to {to}"
            if start:
                text += f", start{then_what(site, vm, wait=wait)}"

            def one(vm: str = vm) -> None:
                run.vm_fact(vm, **_reset_one(site, vm, to, start=start, wait=wait))

            jobs[vm] = [Job(Action("reset", vm, text), one)]
        run.carry_out(jobs)
        return run.outcome()


def checkpoint(site: Site, vms: Sequence[str], name: str, *, wait: bool = True) -> Outcome:
    """Keep the VMs' present state as a checkpoint. A running VM is shut down by itself first, and
    started again afterwards (``wait``: until it answers): what its programs hold in memory is not part
    of it.

    Errors: UsageError (the name), Conflict (the checkpoint exists), NotFound, Unsupported, Busy."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a checkpoint name",
            remedy="letters, digits, '.', '_' and '-', at most 64, such as before-upgrade",
        )
    names = site.vms(vms)
    with begin(site, "checkpoint", names, doing=f"checkpoint {' '.join(names)} as {name}") as run:
        jobs: dict[str, list[Job]] = {}
        for vm in names:
            machine = present(site, vm)
            disk = disk_of(site, vm)
            if disk is None:
                raise Unsupported(
                    f"{site.name}: {vm}'s host {site.farm.host_of(vm)} keeps no checkpoints",
                    remedy="checkpoints are kept by disk stores; this machine has its reset command",
                )
            if any(kept.name == name for kept in disk.checkpoints):
                raise Conflict(
                    f"{site.name}: {vm} has a checkpoint {name!r} already",
                    remedy="choose another name; checkpoints never change",
                )
            was_on = is_on(machine)
            text = f"shut down, keep as {name}, start again" if was_on else f"keep as {name}"

            def one(vm: str = vm, was_on: bool = was_on) -> None:
                _checkpoint_one(site, vm, name, was_on=was_on, wait=wait)

            jobs[vm] = [Job(Action("checkpoint", vm, text), one)]
        run.carry_out(jobs)
        run.fact(checkpoint=name)
        return run.outcome()


def put_back(site: Site, vm: str, to: str) -> dict[str, object]:
    """Within an operation under way: the disk swapped and proven; the machine is stopped. The facts
    of the proof, JSON values."""
    machine = site.machine(vm)
    site.hypervisor_of(vm).reset(machine, to)
    disk = disk_of(site, vm)
    if disk is None:
        return {"checkpoint": to, "pristine": None, "by": "the reset command of the farm file"}
    if not site.disks(site.farm.host_of(vm)).pristine(machine, to):
        raise DriverFailed(
            f"{site.name}: {vm}'s disk was reset, but isn't provably checkpoint {to}: not started",
            remedy=f"reset it again; if that fails too, ./invoke destroy --vm {vm} and clone it again",
        )
    return {"checkpoint": to, "pristine": True, "template": disk.template, "disk": str(disk.path)}


def _reset_one(site: Site, vm: str, to: str, *, start: bool, wait: bool) -> dict[str, object]:
    began = time.monotonic()
    was_on = is_on(present(site, vm))
    with site.journal.operation("reset", vm=vm, to=to, start=start, was_on=was_on) as operation:
        if not can_power(site, vm):
            return _reset_by_command(site, vm, to, wait=start and wait)
        operation.step("refresh its identity")
        write_identity(site, vm)
        proof = put_back(site, vm, to)
        operation.note(proof=proof, swapped=True)
        swapped = time.monotonic() - began
        site.reporter.say(f"disk is {to} again, proven, in {format_duration(swapped)}", vm=vm)
        if start:
            power_on(site, vm, wait=wait)
    return {
        "proof": proof,
        "reset_seconds": round(swapped, 3),
        "seconds": round(time.monotonic() - began, 3),
    }


def _reset_by_command(site: Site, vm: str, to: str, *, wait: bool) -> dict[str, object]:
    began = time.monotonic()
    proof = put_back(site, vm, to)
    if wait:  # the command may have booted it or not: any boot counts
        wait_until_ready(site, vm, since=float("-inf"))
    return {"proof": proof, "seconds": round(time.monotonic() - began, 3)}


def _check_checkpoint(site: Site, vm: str, to: str) -> None:
    if not can_power(site, vm):
        if not site.farm.vms[vm].reset:
            raise Unsupported(
                f"{site.name}: {vm} is on an ssh host and has no reset command",
                remedy=f"give vms.{vm} a 'reset' command in the farm file",
            )
        return
    disk = disk_of(site, vm)
    if disk is None:
        raise NotFound(
            f"{site.name}: {vm}'s machine has no disk of ours to put back",
            remedy=f"./invoke destroy --vm {vm}, then clone it again",
        )
    known = [kept.name for kept in disk.checkpoints]
    if to not in known:
        raise NotFound(
            f"{site.name}: {vm} has no checkpoint {to!r}", remedy=f"it has {', '.join(known) or 'none'}"
        )


def _checkpoint_one(site: Site, vm: str, name: str, *, was_on: bool, wait: bool) -> None:
    driver, machine = site.hypervisor_of(vm), site.machine(vm)
    with site.journal.operation("checkpoint", vm=vm, name=name, was_on=was_on):
        if was_on:
            current_step("shut it down")
            driver.stop(machine, grace=CHECKPOINT_GRACE)
        try:
            driver.checkpoint(machine, name)
        except Interrupted:
            raise
        except FarmhandError:
            if was_on:
                power_on(site, vm, wait=False)
            raise
        site.reporter.say(f"kept as {name}", vm=vm)
        if was_on:
            power_on(site, vm, wait=wait)
