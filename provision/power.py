"""Starting and stopping; and what a start takes: definition, port, memory, patience."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from host.files import make_directory
from host.progress import Progress
from hypervisors.api import Machine, MachineSpec, Power, spec_hash
from inventory.errors import (
    Conflict,
    FarmhandError,
    Interrupted,
    TimedOut,
    Unsupported,
    UsageError,
    WrongState,
)
from inventory.sizes import format_duration, format_size
from provision.allocate import port_free
from provision.engine.journal import current_operation, current_step
from provision.engine.report import Action, Outcome
from provision.engine.work import ON, Job, begin, disk_of, is_on, look, present
from provision.guest import identity
from provision.lost import require
from provision.memory_budget import PATIENCE, forecast, room_for
from provision.site import Site

if TYPE_CHECKING:
    from provision.guest.remote import Ready

GRACE = 60.0
"""Seconds without a sign that a guest shuts down by itself, before its power is cut."""
LIFELESS = 90.0
"""Seconds that a guest has for its first sign of life under KVM that none was seen to work under yet. It
takes a few, and up to 50 in a host that is emulated itself."""

_TAIL = 15  # lines of the console


def start(site: Site, vms: Sequence[str] = (), *, wait: bool = True) -> Outcome:
    """Start VMs; with ``wait`` until their ssh answers. A running one is left alone.

    Errors: NotFound, NoSpace (memory), Conflict (its port is taken), TimedOut, Busy."""
    names = site.vms(vms)
    with begin(site, "start", names) as run:
        machines = {vm: present(site, vm) for vm in names}
        cold = [vm for vm in names if not is_on(machines[vm])]
        asleep = [vm for vm in cold if machines[vm].power is Power.SUSPENDED]
        run.add(*check_memory(site, cold, wait=wait))
        jobs: dict[str, list[Job]] = {}
        for vm in names:
            if vm in cold and can_power(site, vm):
                how = "run on from where it was suspended" if vm in asleep else "start"
                action = Action("start", vm, f"{how}{then_what(site, vm, wait=wait)}")
                jobs[vm] = [Job(action, partial(start_one, site, vm, wait=wait))]
            elif vm in cold:
                jobs[vm] = [Job(Action("note", vm, f"{no_power(site, vm)} on from here"))]
            else:
                jobs[vm] = [Job(Action("keep", vm, "runs already"))]
        run.carry_out(jobs)
        return run.outcome()


def stop(site: Site, vms: Sequence[str] = (), *, force: bool = False) -> Outcome:
    """Shut VMs down, or with ``force`` cut their power. A stopped one is left alone."""
    names = site.vms(vms)
    with begin(site, "stop", names) as run:
        jobs: dict[str, list[Job]] = {}
        for vm in names:
            machine = look(site, vm)
            if not can_power(site, vm):
                jobs[vm] = [Job(Action("note", vm, f"{no_power(site, vm)} off from here"))]
            elif machine is None or machine.power not in (*ON, Power.SUSPENDED):
                jobs[vm] = [Job(Action("keep", vm, "is stopped" if machine else "is not made"))]
            else:
                text = f"shut down (power cut after {GRACE:g}s without a sign that it does)"
                if force:
                    text = "cut its power"
                if machine.power is Power.SUSPENDED:
                    text = "give up the memory it was suspended with"
                action = Action("stop", vm, text)
                jobs[vm] = [Job(action, partial(_stop_one, site, vm, force=force))]
        run.carry_out(jobs)
        return run.outcome()


def start_one(site: Site, vm: str, *, wait: bool) -> None:
    """A journaled start of a stopped machine."""
    with site.journal.operation("start", vm=vm):
        began = time.monotonic()
        power_on(site, vm, wait=wait)
    if not wait:
        site.reporter.say(f"started in {format_duration(time.monotonic() - began)}", vm=vm)


def power_on(site: Site, vm: str, *, wait: bool) -> None:
    """Within an operation under way: bring its definition up to date, start it when there is room in
    the host's memory, wait, balloon down. NoSpace.

    A suspended one runs on as it was defined then, and up for as long as it was then: of it, any answer
    with its host key counts as ready. It had no power before, so that none is from before."""
    machine = present(site, vm)
    require(site, vm, machine, disk_of(site, vm))
    asleep = machine.power is Power.SUSPENDED
    high, low = _sizes(site, vm, wait=wait)
    try:
        since = _switch_on(site, vm, asleep=asleep, falls=low < high)
        if wait:
            wait_until_ready(site, vm, since=float("-inf") if asleep else since)
            deflate(site, vm)
    finally:
        site.turns.fell(vm)


def _switch_on(site: Site, vm: str, *, asleep: bool = False, falls: bool = False) -> float:
    """time.monotonic() just before its start. ``falls``: see ``room_for``."""
    if not asleep:
        bring_up_to_date(site, vm)
        _secure_port(site, vm)
    with room_for(site, vm, site.farm.vms[vm].memory, f"starting {vm}", falls=falls):
        current_step(f"start {vm}")
        since = time.monotonic()
        site.hypervisor_of(vm).start(site.machine(vm))
    return since


def bring_up_to_date(site: Site, vm: str) -> bool:
    """A stopped machine's seed and definition, as the farm file and its host want them now. Whether it
    was redefined. Unsupported where it is to run under KVM, and that doesn't work."""
    check_accelerator(site, [vm])
    machine = present(site, vm)
    allocation = site.allocator.allocate(vm)
    write_identity(site, vm)
    spec = site.spec(vm, allocation)
    reason = why_redefine(site, vm, machine, spec)
    if not reason:
        return False
    disk = disk_of(site, vm)
    current_step("change its definition")
    site.hypervisor_of(vm).redefine(replace(spec, disk_size=disk.size if disk else spec.disk_size))
    site.reporter.say(f"its definition was changed {reason}", vm=vm)
    return True


def why_redefine(site: Site, vm: str, machine: Machine, spec: MachineSpec) -> str:
    """For people; empty where its definition is what the farm file and its host ask for now."""
    if machine.spec_hash != spec_hash(spec):
        return "as the farm file has been"
    if machine.accelerated is None:
        return ""
    able = site.hypervisor_of(vm).capabilities()
    if machine.accelerated == able.accelerated:
        return ""
    what = "KVM" if able.accelerated else "QEMU's emulation"
    return f"to run under {what}: {'; '.join(able.notes)}"


def write_identity(site: Site, vm: str) -> None:
    """Keys and seed, made or refreshed; nothing is written where all is right."""
    allocation = site.allocator.allocate(vm)
    machine = site.machine(vm)
    identity.make_controller_key(site.farm, site.paths)
    identity.make_host_key(site.paths, vm, machine)
    identity.refresh_seed(
        site.farm,
        site.paths,
        site.runner,
        allocation,
        reader_uid=site.opened(site.farm.host_of(vm)).reader_uid(),
    )
    make_directory(site.paths.consoles, mode=0o711)
    if far := site.far(site.farm.host_of(vm)):
        far.bring_seed(machine, identity.seed_file(site.paths, machine))


def wait_until_ready(site: Site, vm: str, *, since: float) -> None:
    """As ``until_ready``, and says how long it took. Where machines have no guests there is nothing to
    wait for."""
    if not site.driver_of(vm).guests:
        return
    import asyncio

    began = time.monotonic()
    asyncio.run(until_ready(site, vm, since=since))
    site.reporter.say(f"answers on ssh after {format_duration(time.monotonic() - began)}", vm=vm)


async def until_ready(site: Site, vm: str, *, since: float) -> Ready:
    """Until its ssh answers as this very VM since this very start, for as long as it is seen to go on.
    ``since``: time.monotonic() just before the start; minus infinity: any boot is the one meant.

    One that was started under KVM, and shows no sign of life, is started once more under emulation,
    unless a guest has answered under KVM since this machine booted.

    Errors: Conflict (somebody else answers), WrongState (it stopped), TimedOut with the console's last
    lines."""
    from provision.guest.ssh_connection import in_thread

    try:
        return await _until_ready(site, vm, since=since, on_trial=since > 0 and _on_trial(site, vm))
    except _LifelessError:
        since = await in_thread(lambda: _start_emulated(site, vm))
        return await _until_ready(site, vm, since=since, on_trial=False)


class _LifelessError(Exception):
    """On trial, and it shows no sign of life."""


async def _until_ready(site: Site, vm: str, *, since: float, on_trial: bool) -> Ready:
    from provision.guest.ssh_connection import in_thread, wait_ready

    driver, machine = site.hypervisor_of(vm), site.machine(vm)
    progress = Progress(lambda: driver.pulse(machine), site.farm.ssh.ready_timeout)

    def running() -> bool:
        if site.journal.interrupted.is_set():
            raise Interrupted("interrupted while waiting", remedy="./invoke recover")
        if on_trial and progress.lifeless(LIFELESS):
            raise _LifelessError
        found = driver.find(machine)
        return found is not None and found.power not in (Power.STOPPED, Power.SUSPENDED)

    ready = await wait_ready(
        site.endpoint(vm),
        since=since,
        progress=progress,
        running=running,
        tail=lambda: console_tail(site, vm),
        working=lambda text: site.reporter.working(text, vm=vm),
    )
    await in_thread(lambda: _trust(site, vm))
    return ready


def console_tail(site: Site, vm: str, *, lines: int = _TAIL) -> str:
    """The console's last lines, or ""."""
    from provision.guest.remote import tail_of

    try:
        log = site.hypervisor_of(vm).console(site.machine(vm)).log
    except FarmhandError:
        return ""
    return tail_of(log, lines=lines)


def _on_trial(site: Site, vm: str) -> bool:
    """Whether it runs under KVM that no guest has answered under yet, and need not."""
    opened = site.opened(site.farm.host_of(vm))
    return bool(present(site, vm).accelerated) and opened.on_trial()


def _trust(site: Site, vm: str) -> None:
    """It answered. What can't be looked at, or noted, now will be another time."""
    with contextlib.suppress(FarmhandError):
        if present(site, vm).accelerated:
            site.opened(site.farm.host_of(vm)).prove()


def _start_emulated(site: Site, vm: str) -> float:
    """Cut its power, and start it without KVM, as every machine of that host is from now on."""
    host, under_way = site.farm.host_of(vm), current_operation()
    with contextlib.nullcontext() if under_way else site.journal.operation("start", vm=vm):
        site.hypervisor_of(vm).stop(site.machine(vm), grace=0)
        site.distrust_kvm(host, f"it ran {vm} for {LIFELESS:g} s without a sign of life")
        since = _switch_on(site, vm)
    where = f"host {host}" if site.far(host) else "this machine"
    site.reporter.warn(
        f"nothing on its console in {LIFELESS:g} s under KVM: started again under QEMU's emulation; "
        f"farmhand won't use KVM on {where} until it boots anew",
        vm=vm,
    )
    return since


def answers(site: Site, vm: str, *, timeout: float = 2.0) -> bool:
    """Whether an ssh server greets at the VM's address. In user mode QEMU itself accepts the
    connection, so only the greeting (RFC 4253, 4.2) tells."""
    if not site.driver_of(vm).guests:
        return True
    try:
        with socket.create_connection(site.address(vm), timeout) as connection:
            connection.settimeout(timeout)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def deflate(site: Site, vm: str) -> None:
    """Balloon an idle VM down to its ``idle_memory``, if it has one. Can't be: a warning."""
    declared = site.farm.vms[vm]
    idle = declared.idle_memory
    if idle is None or idle == declared.memory or not can_power(site, vm):
        return
    driver, machine = site.hypervisor_of(vm), site.machine(vm)
    try:
        current_step(f"balloon it down to {idle}")
        reached = driver.balloon(machine, idle, timeout=PATIENCE)
        site.reporter.say(f"idles at {format_size(reached)}", vm=vm)
    except (Unsupported, TimedOut, UsageError, WrongState) as error:
        site.reporter.warn(f"stays at {format_size(declared.memory)} while idle: {error.message}", vm=vm)


def then_what(site: Site, vm: str, *, wait: bool) -> str:
    """What follows a start, for a plan's line."""
    if not wait:
        return ""
    declared = site.farm.vms[vm]
    text = ", wait until its ssh answers"
    if declared.idle_memory and declared.idle_memory != declared.memory:
        text += f", balloon down to {format_size(declared.idle_memory)}"
    return text


def can_power(site: Site, vm: str) -> bool:
    return site.driver_of(vm).power


def no_power(site: Site, vm: str) -> str:
    """For a note in a plan: it goes on with what can't be done."""
    return f"on {site.driver_of(vm).called}: nobody can switch it"


def check_memory(site: Site, vms: Sequence[str], *, wait: bool) -> tuple[Action, ...]:
    """Whether these VMs may be started beside what runs, within each host's ``memory`` and within what
    this machine has free; what others give for it. NoSpace before anything was begun; Unsupported where
    they are to run under KVM, and it doesn't work."""
    new = [vm for vm in vms if can_power(site, vm)]
    if not new:
        return ()
    check_accelerator(site, new)
    return forecast(site, {vm: _sizes(site, vm, wait=wait) for vm in new}, f"starting {', '.join(new)}")


def check_accelerator(site: Site, vms: Sequence[str]) -> None:
    """Unsupported where these VMs are to run under KVM, and it doesn't work."""
    for host in dict.fromkeys(map(site.farm.host_of, vms)):
        site.opened(host).demand_accelerator()


def _sizes(site: Site, vm: str, *, wait: bool) -> tuple[int, int]:
    """What it starts with, and what it then falls to."""
    declared = site.farm.vms[vm]
    return declared.memory, (declared.idle_memory if wait else None) or declared.memory


def _secure_port(site: Site, vm: str) -> None:
    """Another program may listen where a stopped VM's ssh used to: move, unless it was declared."""
    if site.farm.network.mode != "user" or not site.driver_of(vm).forwards:
        return
    port = site.allocator.allocate(vm).ssh_port
    if port_free(port):
        return
    if site.farm.vms[vm].ssh_port:
        raise Conflict(
            f"{site.name}: port {port} for {vm}'s ssh is taken by another program",
            remedy=f"end it (ss -ltnp sport = :{port}) or change 'ssh_port'",
        )
    moved = site.allocator.allocate(vm, move_port=True)
    site.reporter.warn(
        f"port {port} is taken by another program: its ssh moves to {moved.ssh_port}", vm=vm
    )
    bring_up_to_date(site, vm)


def _stop_one(site: Site, vm: str, *, force: bool) -> None:
    with site.journal.operation("stop", vm=vm, force=force) as operation:
        operation.step("shut it down")
        began = time.monotonic()
        site.hypervisor_of(vm).stop(site.machine(vm), grace=0 if force else GRACE)
    site.reporter.say(f"stopped in {format_duration(time.monotonic() - began)}", vm=vm)
