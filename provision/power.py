"""Starting and stopping, and what a start takes: definition, port, memory, patience."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from host.files import make_directory
from host.ports import listener
from host.progress import Progress
from hypervisors.api import (
    ON,
    Disk,
    GrowableDisks,
    Machine,
    MachineSpec,
    Power,
    WarmMachines,
    spec_hash,
)
from inventory.errors import (
    Call,
    Conflict,
    DriverFailed,
    FarmhandError,
    Interrupted,
    NoSpace,
    Remedy,
    TimedOut,
    Unsupported,
    WrongState,
)
from inventory.sizes import format_duration, format_size
from provision import untold
from provision.allocate import port_free
from provision.engine.facts import Facts, NoFacts
from provision.engine.journal import current_entry, current_step
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.report import Action, NoResult
from provision.engine.run import Run
from provision.guest import identity
from provision.member import Member, each, is_on, members_of
from provision.site import Site
from provision.vm_activity import OneVmActivity

if TYPE_CHECKING:
    from provision.guest.remote import Ready

GRACE = 60.0
"""Seconds without a sign that a guest shuts down by itself, before its power is cut."""
LIFELESS = 90.0
"""Seconds that a guest has for its first sign of life under KVM that none was seen to work under yet. It
takes a few, and up to 50 in a host that is emulated itself."""

GREETING = 10.0
"""Seconds for the greeting of an ssh server that somebody wants to log in to: milliseconds, but for an
emulated guest on a busy host."""

_TAIL = 15  # lines of the console
_PANIC, _TRACE = "Kernel panic", 100
"""Linux's word for it, and the lines within which it is looked for."""


@dataclass(frozen=True, slots=True)
class StopFacts(Facts):
    force: bool


class _StartActivity(OneVmActivity[NoFacts]):
    name = "start"
    facts = NoFacts
    leaves_as_it_was = True
    starts = True


class _StopActivity(OneVmActivity[StopFacts]):
    name = "stop"
    facts = StopFacts
    leaves_as_it_was = True


class _WaitActivity(OneVmActivity[NoFacts]):
    name = "wait"
    facts = NoFacts
    leaves_as_it_was = True


START = _StartActivity()
WAIT = _WaitActivity()
STOP = _StopActivity()


@dataclass(frozen=True, slots=True)
class Start(Operation[NoResult]):
    """Start VMs; with ``wait`` until their ssh answers, also that of those that run already. Else a
    running VM is left alone. A suspended one runs on; with ``cold`` it boots.

    Errors: NotFound, NoSpace (memory), Conflict (its port is taken), WrongState (its kept memory can't
    be used), TimedOut, Busy."""

    name = "start"
    vms: tuple[str, ...] = ()
    wait: bool = True
    cold: bool = False

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def plan(self, run: Run) -> Plan[NoResult]:
        members = members_of(run.site, run.vms)
        machines = each(members, Member.present)
        for member in members:
            if machines[member.vm].power is Power.PANICKED:
                raise panicked(member)
        off = [member for member in members if not is_on(machines[member.vm])]
        jobs: dict[str, list[Job]] = {}
        for member in members:
            vm = member.vm
            if member in off and member.can_power:
                asleep = machines[vm].power is Power.SUSPENDED and not self.cold
                how = "run on from where it was suspended" if asleep else "start"
                if asleep and (why := memory_trouble(member, member.disk())):
                    how = f"start it, for {why}"
                text = f"{how}{then_what(member, wait=self.wait)}"
                do = partial(start_one, member, wait=self.wait, cold=self.cold)
                jobs[vm] = [job("start", vm, text, do)]
            elif member in off:
                jobs[vm] = [job("note", vm, f"{no_power(member)} on from here")]
            elif self.wait and must_wait(member):
                jobs[vm] = [await_one(member)]
            else:
                jobs[vm] = [job("keep", vm, "runs already")]
        first = foretold(*check_memory(off, wait=self.wait))
        return Plan([alone(first), jobs], NoResult)


@dataclass(frozen=True, slots=True)
class Stop(Operation[NoResult]):
    """Shut VMs down; with ``force`` cut their power. A stopped VM is left alone."""

    name = "stop"
    at_any_time = True
    vms: tuple[str, ...] = ()
    force: bool = False

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms(self.vms)

    def plan(self, run: Run) -> Plan[NoResult]:
        jobs = {member.vm: [self._job(member)] for member in members_of(run.site, run.vms)}
        return Plan([jobs], NoResult)

    def _job(self, member: Member) -> Job:
        vm, machine = member.vm, member.look()
        if not member.can_power:
            return job("note", vm, f"{no_power(member)} off from here")
        if machine is None or machine.power not in (*ON, Power.SUSPENDED):
            return job("keep", vm, "is stopped" if machine else "is not made")
        text = f"shut down (power cut after {GRACE:g}s without a sign that it does)"
        if self.force or machine.power is Power.PANICKED:
            text = "cut its power"
        if machine.power is Power.SUSPENDED:
            if member.memories():  # kept beside a checkpoint, to which it stays
                return job("keep", vm, "is stopped; its next start runs on from its warm checkpoint")
            text = "give up the memory it was suspended with"
        return job("stop", vm, text, partial(_stop_one, member, force=self.force))


def start_one(member: Member, *, wait: bool, cold: bool = False) -> None:
    """Start a stopped machine, with an entry in the journal. ``cold``: see ``power_on``."""
    site = member.site
    with site.journal.begin(START, [member.vm], NoFacts()):
        began = time.monotonic()
        power_on(member, wait=wait, cold=cold)
    if not wait:
        site.reporter.say(f"started in {format_duration(time.monotonic() - began)}", vm=member.vm)


def must_wait(member: Member) -> bool:
    """Whether one that runs isn't ready, or not in the present yet."""
    return untold.is_untold(member) or not answers(member)


def await_one(member: Member) -> Job:
    """The job for one that ``must_wait``."""
    text = "runs, but its ssh doesn't answer: wait for it"
    if untold.is_untold(member):
        text = "runs on from an earlier moment, and was not told so yet: tell it"
    return job("wait", member.vm, text, partial(_await, member))


def _await(member: Member) -> None:
    with member.site.journal.begin(WAIT, [member.vm], NoFacts()):
        # Since when it runs isn't known for sure: any boot of this machine is the one meant.
        wait_until_ready(member, since=float("-inf"))
        machine, idle = member.look(), member.declared.idle_memory
        if machine is not None and idle is not None and machine.current > idle:
            deflate(member)


class _NotResumedError(Exception):
    """A suspended VM can't run on, and may boot instead."""

    def __init__(self, cause: FarmhandError) -> None:
        self.cause = cause


def power_on(member: Member, *, wait: bool, cold: bool = False) -> bool:
    """Bring its definition up to date, start it when there is room in the host's memory, wait, balloon
    it down; within an operation under way. ``cold``: it boots, whatever memory is kept for it. NoSpace.

    A suspended VM runs on as it was defined, and counts as up for as long as it was then. So any answer
    with its host key counts: while suspended it could not answer, so no answer can be an old one. Before
    it counts as ready it is brought to the present. Where its memory can't be used it boots, if the farm
    file says ``boot_instead``. Returns whether it runs on."""
    from provision.missing_disk import require

    machine, disk = member.present(), member.disk()
    require(member, machine, disk)
    asleep = machine.power is Power.SUSPENDED and not cold
    if asleep and (why := memory_trouble(member, disk)):
        member.site.reporter.warn(f"boots instead of running on: {why}", vm=member.vm)
        asleep, cold = False, True
    high, low = _sizes(member, wait=wait)
    try:
        try:
            since = _switch_on(member, machine, disk, falls=low < high, cold=cold)
        except _NotResumedError as error:  # seen by its start alone
            text = f"boots instead of running on: {error.cause.message}"
            member.site.reporter.warn(text, vm=member.vm)
            asleep = False
            since = _switch_on(member, member.present(), disk, falls=low < high, cold=True)
        if wait:
            wait_until_ready(member, since=since, asleep=asleep)
            deflate(member)
    finally:
        member.site.mutex.fell(member.vm)
    return asleep


def memory_trouble(member: Member, disk: Disk | None) -> str:
    """Why a suspended VM can't run on, where it then is to boot instead; "": it can. WrongState where
    the farm file doesn't let it."""
    kept = member.memories().get(disk.base) if disk else None
    if kept is None or not kept.trouble:
        return ""
    why = f"the memory of its checkpoint {kept.checkpoint} can't be used: {kept.trouble}"
    if not member.declared.boot_instead:
        raise WrongState(
            f"{member.site.name}: {member.vm} can't run on: {why}",
            remedy=("boot it: ", Call("start", vm=member.vm, cold=True)),
        )
    return why


def _switch_on(
    member: Member, machine: Machine, disk: Disk | None, *, falls: bool = False, cold: bool = False
) -> float:
    """Start it. Returns time.monotonic() of just before. ``machine``, ``disk``: as they are now.
    ``falls``: see ``room_for``; ``cold``: see ``power_on``. _NotResumedError."""
    from provision.memory_budget import room_for

    if cold or machine.power is not Power.SUSPENDED:
        machine = bring_up_to_date(member, machine, disk)
        _secure_port(member, machine, disk)
    elif isinstance(member.driver, WarmMachines):  # the port is the host's end only
        _secure_port(member, machine, disk)
    asleep = machine.power is Power.SUSPENDED and not cold and member.info.guests
    with room_for(member, member.declared.memory, f"starting {member.vm}", falls=falls):
        if _kept_off(member):
            current_step("keep guests off this machine's loopback")
            member.site.opened(member.host).close_loopback()
        current_step(f"start {member.vm}")
        if asleep:
            untold.note(member)
        else:
            untold.forget(member)
        since = time.monotonic()
        try:
            member.driver.start(member.machine, cold=cold)
        except FarmhandError as error:
            if machine.power is not Power.SUSPENDED or cold:
                raise
            if _may_be_on(member):
                if entry := current_entry():
                    entry.must_finish = True  # recovery settles what it is
                raise
            warm = isinstance(member.driver, WarmMachines) and member.declared.boot_instead
            if warm and isinstance(error, WrongState | NoSpace | DriverFailed):
                raise _NotResumedError(error) from error
            raise
    return since


def _may_be_on(member: Member) -> bool:
    """True as well if nobody can tell now."""
    try:
        return is_on(member.look())
    except FarmhandError:
        return True


def bring_up_to_date(member: Member, machine: Machine, disk: Disk | None) -> Machine:
    """Bring a stopped machine's seed and definition to what the farm file and its host ask for. Returns
    the machine as it then is. Unsupported if it is to run under KVM and KVM doesn't work."""
    check_accelerator([member])
    allocation = member.allocate()
    write_identity(member)
    disk = _enlarge(member, disk)
    spec = member.spec(allocation)
    reason = why_redefine(member, machine, spec)
    if not reason:
        return machine
    current_step("change its definition")
    machine = member.driver.redefine(replace(spec, disk_size=disk.size if disk else spec.disk_size))
    member.was_seen(machine)
    member.site.reporter.say(f"its definition was changed {reason}", vm=member.vm)
    return machine


def _enlarge(member: Member, disk: Disk | None) -> Disk | None:
    """Make its disk as large as the farm file has it. What can't grow stays as it is. Returns the disk
    as it then is."""
    wanted, store = member.declared.disk, member.store if disk else None
    if disk is None or wanted is None or disk.size >= wanted or why_not_larger(member, disk):
        return disk
    assert isinstance(store, GrowableDisks)
    current_step("make its disk larger")
    try:
        larger = store.enlarge(member.machine, wanted)
    except Unsupported as error:
        size = format_size(disk.size)
        member.site.reporter.warn(f"its disk stays {size}: {error.message}", vm=member.vm)
        return disk
    source = member.site.farm.templates.get(member.site.farm.template_of(member.vm) or "")
    grows = {"farmhand": "its root file system (ext4) grows as it boots",
             "cloud-init": "its image's cloud-init grows the file system, if it is set to"}  # fmt: skip
    then = grows.get(source.first_boot if source else "", "its file system has to be grown in the guest")
    text = f"its disk was {format_size(disk.size)}, and is {format_size(larger.size)} now; {then}"
    member.site.reporter.say(text, vm=member.vm)
    return larger


def why_not_larger(member: Member, disk: Disk) -> str:
    """Why the disk can't become as large as the farm file has it; "" if it can."""
    again = "takes effect when it is destroyed and cloned again"
    if member.declared.disk is not None and member.declared.disk < disk.size:
        return f"a disk never becomes smaller; {again}"
    if not isinstance(member.store, GrowableDisks):
        return f"in this store it can't grow in place; {again}"
    driver = member.driver
    warm = [kept.name for kept in disk.checkpoints if kept.warm]
    warm += driver.memories(member.machine) if isinstance(driver, WarmMachines) else ()
    if warm:
        return f"it can't grow while it has warm checkpoints ({', '.join(dict.fromkeys(warm))})"
    return ""


def why_redefine(member: Member, machine: Machine, spec: MachineSpec) -> str:
    """Why its definition must change, for people; "" if it is what the farm file and its host ask
    for."""
    if machine.spec_hash != spec_hash(spec):
        return "as the farm file has been"
    if machine.accelerated is None:
        return ""
    able = member.driver.capabilities()
    if machine.accelerated == able.accelerated:
        return ""
    what = "KVM" if able.accelerated else "QEMU's emulation"
    return f"to run under {what}: {able.why_accelerated}"


def write_identity(member: Member) -> None:
    """Make or refresh its keys and seed. Writes nothing if all is right."""
    site, machine = member.site, member.machine
    allocation = member.allocate()
    identity.make_controller_key(site.farm, site.paths)
    make_directory(site.paths.consoles, mode=0o711)
    if member.keeps_own_key:
        return
    known = identity.seed_file(site.paths, machine).exists()
    if identity.make_host_key(site.paths, member.vm, machine) and known:
        site.reporter.warn("its host key was lost: it gets another one at its start", vm=member.vm)
    identity.refresh_seed(
        site.farm,
        site.paths,
        site.runner,
        allocation,
        reader_uid=site.opened(member.host).reader_uid(),
    )
    if far := site.far(member.host):
        far.bring_seed(machine, identity.seed_file(site.paths, machine))


def bring_to_present(member: Member) -> None:
    """Before anything is run in a VM that runs on from an earlier moment: tell it so, unless somebody
    has. Errors: as ``until_ready``."""
    if untold.is_untold(member):
        wait_until_ready(member, since=float("-inf"))


def wait_until_ready(member: Member, *, since: float, asleep: bool = False) -> None:
    """As ``until_ready``, and says how long it took. Returns at once where machines have no guests."""
    if not member.info.guests:
        return
    import asyncio

    began = time.monotonic()
    asyncio.run(until_ready(member, since=since, asleep=asleep))
    took = format_duration(time.monotonic() - began)
    member.site.reporter.say(f"answers on ssh after {took}", vm=member.vm)


async def until_ready(member: Member, *, since: float, asleep: bool = False) -> Ready:
    """Wait until its ssh answers as this very VM since this very start, for as long as it is seen to go
    on. ``since``: time.monotonic() of just before the start; minus infinity: any boot will do.
    ``asleep``: it was suspended, and is brought to the present: its clock, its random numbers, its lease
    (see ``provision.guest.resume``); so is one whose start nobody waited for, see ``untold``.

    A VM that was started under KVM and shows no sign of life is started once more under emulation,
    unless a guest has answered under KVM since this machine booted.

    Errors: Conflict (somebody else answers), WrongState (it stopped), TimedOut with the console's last
    lines."""
    from provision.guest.ssh_connection import in_thread

    asleep = asleep or untold.is_untold(member)
    try:
        on_trial = since > 0 and not asleep and _on_trial(member)
        return await _until_ready(member, since=since, on_trial=on_trial, asleep=asleep)
    except _LifelessError:
        since = await in_thread(lambda: _start_emulated(member))
        return await _until_ready(member, since=since, on_trial=False)


class _LifelessError(Exception):
    """A VM on trial shows no sign of life."""


async def _until_ready(member: Member, *, since: float, on_trial: bool, asleep: bool = False) -> Ready:
    from provision.guest.network_clue import network_clue
    from provision.guest.ssh_connection import in_thread, wait_ready

    site, driver, machine = member.site, member.driver, member.machine
    progress = Progress(lambda: driver.pulse(machine), site.farm.ssh.ready_timeout)

    def running() -> bool:
        if site.journal.interrupted.is_set():
            raise Interrupted("interrupted while waiting", remedy=Call("recover"))
        if on_trial and progress.lifeless(LIFELESS):
            raise _LifelessError
        found = driver.find(machine)
        if found is not None and found.power is Power.PANICKED:
            raise panicked(member)
        return found is not None and found.power not in (Power.STOPPED, Power.SUSPENDED)

    endpoint = member.endpoint()
    with network_clue(member, endpoint.host) as clue:
        ready = await wait_ready(
            endpoint,
            since=since,
            progress=progress,
            running=running,
            tail=lambda: console_tail(member),
            working=lambda text: site.reporter.working(text, vm=member.vm),
            clue=clue,
            earlier=not member.info.virtual,  # else the hypervisor had it off
            asleep=asleep,
            leased=site.farm.network.mode != "user",
        )
    if asleep:
        untold.forget(member)
    for trouble in ready.resumed.troubles if ready.resumed else ():
        site.reporter.warn(f"it runs again, but {trouble}", vm=member.vm)
    for trouble in ready.troubles:
        site.reporter.warn(f"cloud-init failed there: {trouble}", vm=member.vm)
    await in_thread(lambda: _trust(member))
    return ready


def panicked(member: Member) -> WrongState:
    """The error where its guest's kernel gave up, with what it said then, which is before its trace."""
    vm, told = member.vm, console_tail(member, lines=_TRACE).splitlines()
    at = max((n for n, line in enumerate(told) if _PANIC in line), default=-_TAIL)
    return WrongState(
        "its guest panicked; it stands still as it was then",
        vm=vm,
        remedy=(
            "look at its last words: ", Call("console", vm=vm, log=True),
            "; then put it back: ", Call("reset", vm=vm),
            "; or end it as it is: ", Call("stop", vm=vm),
        ),
        detail="\n".join(told[at:][:_TAIL]),
    )  # fmt: skip


def require_answer(member: Member) -> None:
    """Wait for its ssh server's greeting, ``GREETING`` seconds at most. WrongState where its machine
    isn't one that could answer, TimedOut where it could. It says what to do."""
    machine, vm = None, member.vm
    try:
        machine = member.look()
    except Interrupted:
        raise
    except FarmhandError:  # it may be reached though its host doesn't answer
        pass
    down = (Power.STOPPED, Power.SUSPENDED, Power.PANICKED)
    if (machine is None or machine.power not in down) and answers(member, timeout=GREETING):
        return
    machine = member.present()
    if machine.power is Power.PANICKED:
        raise panicked(member)
    if machine.power in down:
        raise WrongState(f"it is {machine.power}", vm=vm, remedy=Call("start", vm=vm))
    host, port = member.address()
    back: Remedy = ("; or put it back: ", Call("reset", vm=vm)) if member.can_power else ""
    raise TimedOut(
        f"its ssh at {host}:{port} gives no answer (within {GREETING:g} s)",
        vm=vm,
        remedy=(
            "if it still boots, wait for it: ", Call("start", vm=vm),
            "; else look at it: ", Call("console", vm=vm), back,
        ),
    )  # fmt: skip


def console_tail(member: Member, *, lines: int = _TAIL) -> str:
    """The last lines of its console; "" if there are none."""
    from provision.guest.remote import tail_of

    try:
        log = member.driver.console(member.machine).log
    except FarmhandError:
        return ""
    return tail_of(log, lines=lines)


def _on_trial(member: Member) -> bool:
    """Whether it runs under KVM, doesn't have to, and no guest has answered under KVM here yet."""
    opened = member.site.opened(member.host)
    return bool(member.present().accelerated) and opened.on_trial()


def _trust(member: Member) -> None:
    """It answered: note that KVM works. What can't be looked at or noted now is left for another
    time."""
    with contextlib.suppress(FarmhandError):
        if member.present().accelerated:
            member.site.opened(member.host).prove()


def _start_emulated(member: Member) -> float:
    """Cut its power and start it without KVM, as every machine of that host is from now on."""
    site, vm, host = member.site, member.vm, member.host
    with contextlib.nullcontext() if current_entry() else site.journal.begin(START, [vm], NoFacts()):
        member.driver.stop(member.machine, grace=0)
        site.distrust_kvm(host, f"it ran {vm} for {LIFELESS:g} s without a sign of life")
        since = _switch_on(member, member.present(), member.disk(), cold=True)
    where = f"host {host}" if site.far(host) else "this machine"
    site.reporter.warn(
        f"nothing on its console in {LIFELESS:g} s under KVM: started again under QEMU's emulation; "
        f"farmhand won't use KVM on {where} until it boots anew",
        vm=vm,
    )
    return since


def answers(member: Member, *, timeout: float = 2.0) -> bool:
    """Whether an ssh server greets at the VM's address. In user mode QEMU itself accepts the connection,
    so only the greeting (RFC 4253, 4.2) tells."""
    if not member.info.guests:
        return True
    try:
        member.check_port(member.address()[1])
    except Conflict:  # who waits for it is told
        return False
    try:
        with socket.create_connection(member.address(), timeout) as connection:
            connection.settimeout(timeout)
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def deflate(member: Member) -> None:
    """Balloon an idle VM down to its ``idle_memory``, if it has one. A failure is a warning."""
    declared, say = member.declared, member.site.reporter
    idle = declared.idle_memory
    if idle is None or idle == declared.memory or not member.can_power:
        return
    from provision.memory_budget import PATIENCE

    try:
        current_step(f"balloon it down to {idle}")
        reached = member.driver.balloon(member.machine, idle, timeout=PATIENCE)
        say.say(f"idles at {format_size(reached)}", vm=member.vm)
    except Interrupted:
        raise
    except FarmhandError as error:
        text = f"stays at {format_size(declared.memory)} while idle: {error.message}"
        say.warn(text, vm=member.vm)


def then_what(member: Member, *, wait: bool) -> str:
    """What follows a start, for a plan's line."""
    if not wait:
        return ""
    declared = member.declared
    text = ", wait until its ssh answers"
    if declared.idle_memory and declared.idle_memory != declared.memory:
        text += f", balloon down to {format_size(declared.idle_memory)}"
    return text


def no_power(member: Member) -> str:
    """A plan's note that nobody can switch the VM on or off. The plan goes on."""
    return f"on {member.info.called}: nobody can switch it"


def check_memory(members: Sequence[Member], *, wait: bool) -> tuple[Action, ...]:
    """Check, before anything is begun, that these VMs may be started beside what runs: within each
    host's ``memory``, and within what this machine has free, with what others give. Errors: NoSpace;
    Unsupported if they are to run under KVM and KVM doesn't work; as ``Member.check_key``."""
    new = [member for member in members if member.can_power]
    if not new:
        return ()
    from provision.memory_budget import forecast

    check_accelerator(new)
    check_loopback(new)
    for member in new:
        member.check_key()
    doing = f"starting {', '.join(member.vm for member in new)}"
    return forecast({member: _sizes(member, wait=wait) for member in new}, doing)


def check_accelerator(members: Sequence[Member]) -> None:
    """Unsupported if these VMs are to run under KVM and KVM doesn't work."""
    for host, site in {member.host: member.site for member in members}.items():
        site.opened(host).demand_accelerator()


def check_loopback(members: Sequence[Member]) -> None:
    """Unsupported if these VMs can't be kept off this machine's loopback, though the farm file lets them
    out and doesn't say that they may reach it."""
    for host, site in {member.host: member.site for member in members if _kept_off(member)}.items():
        site.opened(host).check_loopback()


def _kept_off(member: Member) -> bool:
    network = member.site.farm.network
    return network.internet and network.host_loopback == "closed" and member.info.forwards


def _sizes(member: Member, *, wait: bool) -> tuple[int, int]:
    """What it starts with, and what it then falls to."""
    declared = member.declared
    return declared.memory, (declared.idle_memory if wait else None) or declared.memory


def _secure_port(member: Member, machine: Machine, disk: Disk | None) -> None:
    """Give it another ssh port if another program listens where the stopped VM's used to be. Conflict if
    it was declared."""
    site, vm = member.site, member.vm
    if site.farm.network.mode != "user" or not member.info.forwards:
        return
    port = member.allocate().ssh_port
    if port_free(port):
        return
    if member.declared.ssh_port:
        raise Conflict(
            f"{site.name}: port {port} for {vm}'s ssh is taken by {listener(port) or 'a program'}",
            remedy=f"end it (ss -ltnp sport = :{port}) or change 'ssh_port'",
        )
    moved = member.allocate(move_port=True)
    site.reporter.warn(
        f"port {port} is taken by {listener(port) or 'a program'}: its ssh moves to {moved.ssh_port}",
        vm=vm,
    )
    bring_up_to_date(member, machine, disk)


def _stop_one(member: Member, *, force: bool) -> None:
    site, vm = member.site, member.vm
    with site.journal.begin(STOP, [vm], StopFacts(force)) as entry:
        entry.step("shut it down")
        began = time.monotonic()
        member.driver.stop(member.machine, grace=0 if force else GRACE)
    site.reporter.say(f"stopped in {format_duration(time.monotonic() - began)}", vm=vm)
