"""Starting, stopping, ballooning; and what a start takes: definition, port, memory, patience."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hypervisors.api import Power, spec_hash
from inventory.errors import (
    Conflict,
    Interrupted,
    NoSpace,
    TimedOut,
    Unsupported,
    UsageError,
    WrongState,
)
from inventory.sizes import about, format_duration, format_size
from provision import identity
from provision.allocate import port_free
from provision.files import make_directory
from provision.journal import current_step
from provision.report import Action, Outcome
from provision.site import Site
from provision.work import Job, begin, disk_of, is_on, look, present

GRACE = 60.0
"""Seconds a guest gets to shut down by itself before its power is cut."""

_BALLOON_PATIENCE = 30.0
_TAIL = 15  # lines of the console


def start(site: Site, vms: Sequence[str] = (), *, wait: bool = True) -> Outcome:
    """Start VMs; with ``wait`` until their ssh answers. A running one is left alone.

    Errors: NotFound, NoSpace (memory), Conflict (its port is taken), TimedOut, Busy."""
    names = site.vms(vms)
    with begin(site, "start", names) as run:
        machines = {vm: present(site, vm) for vm in names}
        cold = [vm for vm in names if not is_on(machines[vm])]
        check_memory(site, cold)
        jobs: dict[str, list[Job]] = {}
        for vm in names:
            if vm in cold and can_power(site, vm):
                action = Action("start", vm, f"start{then_what(site, vm, wait=wait)}")
                jobs[vm] = [Job(action, partial(start_one, site, vm, wait=wait))]
            elif vm in cold:
                jobs[vm] = [Job(Action("note", vm, "on an ssh host: nobody can switch it on from here"))]
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
                jobs[vm] = [
                    Job(Action("note", vm, "on an ssh host: nobody can switch it off from here"))
                ]
            elif not is_on(machine):
                jobs[vm] = [Job(Action("keep", vm, "is stopped" if machine else "is not made"))]
            else:
                text = "cut its power" if force else f"shut down (power cut after {GRACE:g}s)"
                action = Action("stop", vm, text)
                jobs[vm] = [Job(action, partial(_stop_one, site, vm, force=force))]
        run.carry_out(jobs)
        return run.outcome()


def balloon(site: Site, vm: str, target: int) -> Outcome:
    """Give a running VM ``target`` bytes of memory; facts say what the guest reached.

    Errors: NotFound, WrongState (stopped), UsageError (above its maximum, below its need),
    Unsupported (no balloon driver), TimedOut (with what it reached)."""
    (vm,) = site.vms([vm])
    with begin(site, "balloon", [vm], doing=f"balloon {vm} to {format_size(target)}") as run:
        machine = present(site, vm)
        if not site.hypervisor_of(vm).capabilities().live_balloon:
            raise Unsupported(
                f"{site.name}: {vm}'s host {site.farm.host_of(vm)} can't change a running VM's memory",
                remedy="set 'memory' in the farm file instead",
            )
        if not is_on(machine):
            raise WrongState(
                f"{site.name}: {vm} is stopped: memory is given to running VMs",
                remedy=f"./invoke start --vm {vm}",
            )
        if target > machine.memory:
            raise UsageError(
                f"{vm} has at most {format_size(machine.memory)}, {format_size(target)} was asked for",
                remedy="raise 'memory' in the farm file; it takes effect at the next stop or reset",
            )
        run.vm_fact(vm, before=machine.current, asked=target)
        if machine.current == target:
            run.vm_fact(vm, reached=target)
            run.carry_out({vm: [Job(Action("keep", vm, f"has {format_size(target)}"))]})
            return run.outcome()

        def inflate() -> None:
            with site.journal.operation("balloon", vm=vm, target=target) as operation:
                operation.step(f"set its memory to {target}")
                driver = site.hypervisor_of(vm)
                reached = driver.balloon(machine.name, target, timeout=_BALLOON_PATIENCE)
                operation.note(reached=reached)
            run.vm_fact(vm, reached=reached)
            site.reporter.say(
                f"memory {format_size(machine.current)} -> {format_size(reached)}, as the guest says",
                vm=vm,
            )

        text = f"memory {format_size(machine.current)} -> {format_size(target)}"
        run.carry_out({vm: [Job(Action("balloon", vm, text), inflate)]})
        return run.outcome()


def start_one(site: Site, vm: str, *, wait: bool) -> None:
    """A journaled start of a stopped machine."""
    with site.journal.operation("start", vm=vm):
        began = time.monotonic()
        power_on(site, vm, wait=wait)
    if not wait:
        site.reporter.say(f"started in {format_duration(time.monotonic() - began)}", vm=vm)


def power_on(site: Site, vm: str, *, wait: bool) -> None:
    """Within an operation under way: bring its definition up to date, start, wait, balloon down."""
    bring_up_to_date(site, vm)
    _secure_port(site, vm)
    current_step(f"start {vm}")
    since = time.monotonic()
    site.hypervisor_of(vm).start(site.machine(vm))
    if wait:
        wait_until_ready(site, vm, since=since)
        deflate(site, vm)


def bring_up_to_date(site: Site, vm: str) -> bool:
    """A stopped machine's seed and definition, as the farm file wants them now. Whether it was
    redefined."""
    machine = present(site, vm)
    allocation = site.allocator.allocate(vm)
    write_identity(site, vm)
    spec = site.spec(vm, allocation)
    if machine.spec_hash == spec_hash(spec):
        return False
    disk = disk_of(site, vm)
    current_step("change its definition")
    site.hypervisor_of(vm).redefine(replace(spec, disk_size=disk.size if disk else spec.disk_size))
    site.reporter.say("its definition was changed as the farm file has been", vm=vm)
    return True


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
        reader_uid=site.reader_uid(site.farm.host_of(vm)),
    )
    make_directory(site.paths.consoles, mode=0o711)


def wait_until_ready(site: Site, vm: str, *, since: float) -> None:
    """Until its ssh answers as this very VM since this very start. ``since``: time.monotonic() just
    before the start. TimedOut shows the console's last lines."""
    host = site.host(vm)
    if host.driver == "fake":
        return
    from provision.remote import tail_of, wait_ready

    driver, machine = site.hypervisor_of(vm), site.machine(vm)
    look_again = 0.0
    runs = True

    def running() -> bool:
        nonlocal look_again, runs
        if site.journal.interrupted.is_set():
            raise Interrupted("interrupted while waiting", remedy="./invoke recover")
        if time.monotonic() >= look_again:  # the daemon is asked once a second, whoever waits
            found = driver.find(machine)
            runs = found is not None and found.power is not Power.STOPPED
            look_again = time.monotonic() + 1
        return runs

    def tail() -> str:
        return tail_of(driver.console(machine).log, lines=_TAIL)

    began = time.monotonic()
    wait_ready(
        site.endpoint(vm),
        since=since,
        timeout=site.farm.ssh.ready_timeout,
        running=running,
        tail=tail,
        working=lambda text: site.reporter.working(text, vm=vm),
    )
    site.reporter.say(f"answers on ssh after {format_duration(time.monotonic() - began)}", vm=vm)


def answers(site: Site, vm: str, *, timeout: float = 2.0) -> bool:
    """Whether an ssh server greets at the VM's address. In user mode QEMU itself accepts the
    connection, so only the greeting (RFC 4253, 4.2) tells."""
    if site.host(vm).driver == "fake":
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
        reached = driver.balloon(machine, idle, timeout=_BALLOON_PATIENCE)
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
    return site.host(vm).driver != "ssh"


def check_memory(site: Site, vms: Sequence[str]) -> None:
    """Whether these stopped VMs may be started beside what runs: within each host's ``memory``, and
    within what this machine has free. NoSpace before anything was begun."""
    here = 0
    for host, declared in site.farm.hosts.items():
        new = [vm for vm in vms if site.farm.host_of(vm) == host and can_power(site, vm)]
        wanted = sum(site.farm.vms[vm].memory for vm in new)
        if not new:
            continue
        here += wanted if declared.driver == "kvm" else 0
        if declared.memory is None:
            continue
        used = {m.name: m.current for m in site.hypervisor(host, look=True).list() if is_on(m)}
        total = wanted + sum(used.values())
        if total > declared.memory:
            raise NoSpace(
                f"{site.name}: starting {', '.join(new)} takes {format_size(wanted)}, with "
                f"{format_size(sum(used.values()))} in use on host {host}, which may use "
                f"{format_size(declared.memory)}",
                remedy="stop or balloon down others, or raise the host's 'memory'",
            )
    free = _memory_available()
    if here > free:
        raise NoSpace(
            f"{site.name}: starting {', '.join(vms)} takes {format_size(here)}, "
            f"this machine has {about(free)} free",
            remedy="stop other VMs, balloon them down, or start fewer at once (--vm)",
        )


def _memory_available() -> int:
    """MemAvailable of proc(5), in bytes."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _secure_port(site: Site, vm: str) -> None:
    """Another program may listen where a stopped VM's ssh used to: move, unless it was declared."""
    if site.farm.network.mode != "user" or site.host(vm).driver != "kvm":
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
