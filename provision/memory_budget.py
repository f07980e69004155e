"""Room in a host's memory: looked for, made, and kept until it is used. So VMs of this farm never have
more together than the host's ``memory``, however many commands run at once.

A process that starts a VM, or gives one more memory, holds the host's mutex (engine/mutex.py) from the
look until the hypervisor has done it; from then on the hypervisor itself shows it. If there is too
little room, VMs that idle are ballooned down first (``provision.memory`` says which), each under its own
lock.

A command that is killed while it holds the mutex leaves an unfinished activity. What that may still be
doing, in the guest or in libvirt's daemon, counts in full until it is recovered."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from host.memory import memory_available
from hypervisors.api import Machine, Power
from inventory.errors import (
    Call,
    FarmhandError,
    Interrupted,
    NoSpace,
    TimedOut,
    Unsupported,
    UsageError,
    WrongState,
)
from inventory.sizes import brief, format_size
from provision.engine.facts import Facts
from provision.engine.journal import Entry, current_step
from provision.engine.locks import leased, lock_of
from provision.engine.operation import Recovery
from provision.engine.recovery import giving
from provision.engine.report import Action
from provision.member import Member, is_on, members_of
from provision.memory import Guest, HostMemory, at_once, shared, squeeze
from provision.site import Site
from provision.vm_activity import OneVmActivity

PATIENCE = 30.0
"""Seconds a guest gets to give some more memory, or to take it."""

_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class BalloonFacts(Facts):
    """Sizes are bytes. ``needy``: the VM that room is made for; "": nobody, it was asked for."""

    target: int
    needy: str = ""
    reached: int | None = None


class _BalloonActivity(OneVmActivity[BalloonFacts]):
    """Recovery finishes it: there was room at its beginning, and that has been kept since."""

    name = "balloon"
    facts = BalloonFacts
    leaves_as_it_was = True

    def giving(self, _site: Site, _vm: str, facts: BalloonFacts) -> int:
        return facts.target

    def go_on(self, member: Member, machine: Machine, facts: BalloonFacts) -> Recovery[BalloonFacts]:
        if not is_on(machine):
            return Recovery("noted")

        def finish(entry: Entry[BalloonFacts]) -> None:
            try:
                entry.step(f"set its memory to {facts.target}")
                member.driver.balloon(member.machine, facts.target, timeout=PATIENCE)
            except (TimedOut, Unsupported, UsageError, WrongState) as error:  # it keeps what it has
                text = f"its memory was not set: {error.message}"
                member.site.reporter.warn(text, vm=member.vm)

        return Recovery(f"set its memory to {format_size(facts.target)}", finish)


BALLOON = _BalloonActivity()


def host_memory(
    site: Site, host: str, *, but: Collection[str] = (), taken: int = 0, needs: bool = False
) -> HostMemory:
    """The host's memory now, as if the VMs ``but`` had none. ``taken``: bytes of what the machine has
    free that are for others. ``needs``: whether to ask each guest what it needs."""
    declared = site.farm.hosts[host]
    members = [one for one in members_of(site) if one.host == host and one.vm not in but]
    driver = site.hypervisor(host, look=True)
    machines = {machine.name: machine for machine in driver.list()}
    gone = [machines.pop(site.farm.machine_of(vm), None) for vm in but]
    reserved = _reserved(site)
    found = [(one, machines.pop(one.machine, None), reserved.get(one.vm, 0)) for one in members]
    guests = [_guest(*one) for one in found]
    if needs:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            guests = list(pool.map(_asked, members, guests))
    guests += [  # ours still, but no longer in the farm file
        Guest(vm=m.owner.vm if m.owner else name, on=True, now=m.current, maximum=m.memory,
              fixed="no longer in the farm file")
        for name, m in sorted(machines.items()) if is_on(m)
    ]  # fmt: skip
    free = None
    if declared.INFO.shares_memory:  # other servers know better, and refuse by themselves
        soon = sum(max(0, size - _current(machine)) for _, machine, size in found)
        free = _memory_available(site, host) - taken - soon + sum(map(_current, gone))
    return HostMemory(host=host, limit=declared.memory, free=free, guests=tuple(guests))


@contextlib.contextmanager
def room_for(member: Member, size: int, doing: str, *, falls: bool = False) -> Iterator[None]:
    """Within it the VM may have ``size`` bytes in all, and nobody else takes them. ``falls``: the VM is
    started and falls to its idle memory later (the caller says when, by ``NamedMutex.fell``); whoever
    needs room waits for those of this command. NoSpace says who has how much."""
    site, vm, host = member.site, member.vm, member.host
    name = turn_of(host)

    def waiting(text: str) -> None:
        site.reporter.working(f"waits for its turn: {text}", vm=vm)

    with leased(), contextlib.ExitStack() as stack:
        while True:
            with site.mutex.take(name, doing=doing, waiting=waiting):
                since = _make_room(member, size, doing)
                if since is None:
                    # Threads of this process may look again, for they see what is reserved; others
                    # wait until the hypervisor shows it.
                    stack.enter_context(site.locks.hold(name, doing=doing))
                    stack.enter_context(site.mutex.reserved(vm, size))
                    if falls:
                        site.mutex.falls(vm, host)
                    break
            site.reporter.working("waits until others have fallen to their idle memory", vm=vm)
            site.mutex.wait_for_fall(since)
        yield


def turn_of(host: str) -> str:
    return f"memory-{host}"


def forecast(sizes: Mapping[Member, tuple[int, int]], doing: str) -> tuple[Action, ...]:
    """Check, before anything is begun, that these VMs fit, each given with what it starts with and what
    it falls to. Returns what will be taken from others, as far as that can be told now. NoSpace."""
    actions: list[Action] = []
    taken = 0
    if not sizes:
        return ()
    site = next(iter(sizes)).site
    for host, declared in site.farm.hosts.items():
        here = {one.vm: both for one, both in sizes.items() if one.host == host}
        if not here:
            continue
        wanted = at_once(here.values())
        here_too = declared.INFO.shares_memory  # several of them share this machine
        if _plainly_there(site, host, wanted + taken):
            taken += wanted if here_too else 0
            continue
        now = host_memory(site, host, but=here, taken=taken)
        if now.short_of(wanted):
            now = host_memory(site, host, but=here, taken=taken, needs=True)
            targets = squeeze(now, now.short_of(wanted))
            if targets is None:
                raise no_room(site, now, doing, wanted)
            had = {guest.vm: guest.now for guest in now.guests}
            actions += [
                Action("balloon", vm, f"memory {format_size(had[vm])} -> {brief(to)}, to make room")
                for vm, to in targets.items()
            ]
        taken += wanted if here_too else 0
    return tuple(actions)


def no_room(site: Site, host: HostMemory, doing: str, wanted: int) -> NoSpace:
    """The error, in one line: what was wanted, what there is, who has it."""
    if host.limit is not None and wanted > host.limit - host.in_use:
        return NoSpace(
            f"{site.name}: {doing} takes {format_size(wanted)}, with {format_size(host.in_use)} in use "
            f"by others on host {host.host}, which may use {format_size(host.limit)}: {shared(host)}",
            remedy=(
                "stop or balloon down others (",
                Call("balloon", plan_host=True),
                " shows who can give), or raise the host's 'memory'",
            ),
        )
    return NoSpace(
        f"{site.name}: {doing} takes {format_size(wanted)}, this machine has {brief(host.free or 0)} "
        f"free: {shared(host)}",
        remedy="stop other VMs, balloon them down, or start fewer at once",
    )


def _make_room(member: Member, size: int, doing: str) -> int | None:
    """Make room; the caller holds the mutex. None: the room is there; else what to wait for."""
    site, vm, host = member.site, member.vm, member.host
    if _plainly_there(site, host, size):
        return None
    name = turn_of(host)
    if _machine_has(site, host, size) and site.mutex.spend(name, size):
        return None
    asked: set[str] = set()
    while True:
        now = host_memory(site, host, but=[vm], needs=bool(asked))
        if not now.short_of(size):
            site.mutex.saw(name, None if now.limit is None else now.limit - now.in_use - size)
            return None
        since = site.mutex.falling(host)
        if since is not None:
            return since
        now = host_memory(site, host, but=[vm], needs=True)
        targets = squeeze(now, now.short_of(size), but=asked)
        if targets is None:
            raise no_room(site, now, doing, size)
        had = {guest.vm: guest.now for guest in now.guests}
        for other, target in targets.items():
            asked.add(other)
            _take_from(Member(site, other), had[other], target, vm)


def _plainly_there(site: Site, host: str, size: int) -> bool:
    """Whether there is room for certain, without a look at the host's machines: it has no limit."""
    declared = site.farm.hosts[host]
    if declared.memory is not None or not declared.INFO.shares_memory:
        return declared.memory is None
    return _machine_has(site, host, size)


def _machine_has(site: Site, host: str, size: int) -> bool:
    """Whether that much is free besides all that this process is about to give. Other servers check that
    themselves."""
    if not site.farm.hosts[host].INFO.shares_memory:
        return True
    return size + sum(site.mutex.reservations().values()) <= _memory_available(site, host)


def _take_from(member: Member, had: int, target: int, needy: str) -> None:
    """Balloon them down. One that doesn't give, or is in use meanwhile, is skipped."""
    site, vm = member.site, member.vm
    try:
        with (
            site.locks.hold(lock_of(vm), doing=f"balloon {vm} down, to make room for {needy}"),
            site.journal.begin(BALLOON, [vm], BalloonFacts(target, needy)),
        ):
            current_step(f"set its memory to {target}, to make room for {needy}")
            reached = member.driver.balloon(member.machine, target, timeout=PATIENCE)
    except Interrupted:
        raise
    except FarmhandError as error:
        site.reporter.warn(f"gave nothing to make room for {needy}: {error.message}", vm=vm)
        return
    site.reporter.say(f"memory {format_size(had)} -> {brief(reached)}, to make room for {needy}", vm=vm)


def _guest(member: Member, machine: Machine | None, reserved: int) -> Guest:
    declared = member.declared
    on = machine is not None and is_on(machine)
    fixed = ""
    if machine is not None and machine.power in (Power.PAUSED, Power.PANICKED):
        fixed = machine.power
    elif not member.can_power:
        fixed = f"on {member.info.called}"
    return Guest(
        vm=member.vm,
        on=on,
        now=max(_current(machine), reserved),
        maximum=min(declared.memory, machine.memory) if machine is not None and on else declared.memory,
        idle=declared.idle_memory,
        user=_user(member),
        fixed=fixed,
    )


def _current(machine: Machine | None) -> int:
    return machine.current if machine is not None and is_on(machine) else 0


def _asked(member: Member, guest: Guest) -> Guest:
    """With what it says itself."""
    if not guest.on or guest.fixed:
        return guest
    try:
        use = member.driver.memory(member.machine)
    except FarmhandError as error:
        return replace(guest, fixed=error.message.splitlines()[0])
    return replace(
        guest,
        now=max(guest.now, use.actual),
        maximum=min(guest.maximum, use.maximum),
        least=use.least,
    )


def _user(member: Member) -> str:
    """Who uses the VM; "": nobody. This command itself doesn't count, unless it builds there."""
    site, vm = member.site, member.vm
    holder = site.locks.holder(lock_of(vm))
    if holder is None:
        return ""
    if holder.is_build:
        return "building"
    return "" if site.locks.mine(lock_of(vm)) else f"in use: {holder.doing}"


def _reserved(site: Site) -> dict[str, int]:
    """Bytes that this process is giving VMs, and that commands that were killed may still be giving
    them."""
    reserved = site.mutex.reservations()
    for record in site.journal.unfinished():
        for vm in (vm for vm in record.vms if vm in site.farm.vms):
            reserved[vm] = max(reserved.get(vm, 0), giving(site, record, vm))
    return reserved


def _memory_available(site: Site, host: str) -> int:
    """Bytes that the host's kernel could still give away."""
    far = site.far(host)
    return far.memory_available() if far else memory_available()
