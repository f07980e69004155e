"""balloon: running VMs' memory, one by one or the farm's as a whole, never more than their host may
use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from hypervisors.api import Machine
from inventory.errors import Call, FarmhandError, Unsupported, UsageError, WrongState
from inventory.sizes import brief, format_size
from provision.engine.locks import lock_of
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.run import Run
from provision.member import Member, is_on
from provision.memory import HostMemory, Prospect, plan
from provision.memory_budget import BALLOON, PATIENCE, BalloonFacts, forecast, host_memory, room_for
from provision.site import Site


@dataclass(frozen=True, slots=True)
class Ballooned:
    """Bytes of a VM's memory. ``reached``: as its guest says; None if it was not tried, or failed."""

    before: int
    asked: int
    reached: int | None = None


@dataclass(frozen=True, slots=True)
class BalloonResult:
    """By VM."""

    vms: Mapping[str, Ballooned] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Balloon(Operation[BalloonResult]):
    """Give a running VM ``target`` bytes of memory. The result has what the guest reached. If its host
    may not use so much more, VMs that idle are ballooned down first, as far as needed.

    Errors: NotFound, WrongState (stopped), UsageError (above its maximum, or below what it needs),
    Unsupported (no balloon driver), NoSpace, TimedOut (with what it reached)."""

    name = "balloon"
    vm: str
    target: int

    def affected(self, site: Site) -> tuple[str, ...]:
        return site.vms([self.vm])

    def doing(self, _vms: Sequence[str]) -> str:
        return f"balloon {self.vm} to {format_size(self.target)}"

    def plan(self, run: Run) -> Plan[BalloonResult]:
        vm, target, site = self.vm, self.target, run.site
        member = Member(site, vm)
        machine = member.present()
        if not member.driver.capabilities().live_balloon:
            raise Unsupported(
                f"{site.name}: {vm}'s host {member.host} can't change a running VM's memory",
                remedy="set 'memory' in the farm file instead",
            )
        if not is_on(machine):
            raise WrongState(
                f"{site.name}: {vm} is stopped: memory is given to running VMs",
                remedy=Call("start", vm=vm),
            )
        if target > machine.memory:
            raise UsageError(
                f"{vm} has at most {format_size(machine.memory)}, {format_size(target)} was asked for",
                remedy="raise 'memory' in the farm file; it takes effect at the next stop or reset",
            )
        if machine.current == target:
            kept = BalloonResult({vm: Ballooned(target, target, target)})
            return Plan([alone(job("keep", vm, f"has {format_size(target)}"))], lambda: kept)
        done = {vm: Ballooned(machine.current, target)}
        grows = target > machine.current
        first = forecast({member: (target, target)}, _doing(vm, target)) if grows else ()
        stages = [alone(foretold(*first), _job(member, machine, target, done))]
        return Plan(stages, lambda: BalloonResult(done))


@dataclass(frozen=True, slots=True)
class BalloonAll(Operation[BalloonResult]):
    """Bring each VM's memory to what its state asks for. Those that idle fall to their ``idle_memory``,
    or to what their guest needs. When they have, the others come up to what they are declared with, as
    far as their hosts may. A VM that another command uses is left as it is.

    Errors: Several, TimedOut (then nobody is given more), Busy."""

    name = "balloon-all"

    def plan(self, run: Run) -> Plan[BalloonResult]:
        down: dict[str, list[Job]] = {}
        up: dict[str, list[Job]] = {}
        done: dict[str, Ballooned] = {}
        for host in run.site.farm.hosts:
            for prospect in plan(host_memory(run.site, host, needs=True)):
                guest = prospect.guest
                if guest.vm not in run.site.farm.vms:
                    continue
                if prospect.target == guest.now or not guest.on:
                    text = f"has {brief(guest.now)}" if guest.on else ""
                    why = ", ".join(filter(None, (text, prospect.why)))
                    down[guest.vm] = [job("keep", guest.vm, why)]
                    continue
                member = Member(run.site, guest.vm)
                done[guest.vm] = Ballooned(guest.now, prospect.target)
                jobs = down if prospect.target < guest.now else up
                jobs[guest.vm] = [_job(member, member.present(), prospect.target, done)]
        return Plan([down, up], lambda: BalloonResult(done))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """By host. ``errors``: of hosts that could not be looked at."""

    farm: str
    hosts: Mapping[str, HostMemory]
    errors: Mapping[str, str]

    def prospects(self, host: str) -> tuple[Prospect, ...]:
        return plan(self.hosts[host])

    def as_dict(self) -> dict[str, object]:
        seen = [
            {
                "host": name,
                "limit": host.limit,
                "in_use": host.in_use,
                "free": host.free,
                "left": host.left,
                "vms": [_as_dict(prospect) for prospect in self.prospects(name)],
            }
            for name, host in self.hosts.items()
        ]
        failed = [{"host": name, "error": error} for name, error in self.errors.items()]
        return {"farm": self.farm, "hosts": [*seen, *failed]}


def memory_plan(site: Site) -> MemoryPlan:
    """Who has how much memory now, who may have how much, who could give some. Changes nothing."""
    hosts: dict[str, HostMemory] = {}
    errors: dict[str, str] = {}
    for host in site.farm.hosts:
        try:
            hosts[host] = host_memory(site, host, needs=True)
        except FarmhandError as error:
            errors[host] = error.message.splitlines()[0]
    return MemoryPlan(site.farm.farm, hosts, errors)


def _job(member: Member, machine: Machine, target: int, done: dict[str, Ballooned]) -> Job:
    text = f"memory {brief(machine.current)} -> {brief(target)}"
    return job("balloon", member.vm, text, partial(_set, member, machine, target, done))


def _set(member: Member, machine: Machine, target: int, done: dict[str, Ballooned]) -> None:
    with member.site.locks.hold(lock_of(member.vm), doing=_doing(member.vm, target)):
        if target <= machine.current:
            _set_now(member, machine, target, done)
            return
        with room_for(member, target, _doing(member.vm, target)):
            # journaled only now: it is finished after a kill, without another look
            _set_now(member, machine, target, done)


def _set_now(member: Member, machine: Machine, target: int, done: dict[str, Ballooned]) -> None:
    site, vm = member.site, member.vm
    with site.journal.begin(BALLOON, [vm], BalloonFacts(target)) as entry:
        entry.step(f"set its memory to {target}")
        reached = member.driver.balloon(machine.name, target, timeout=PATIENCE)
        entry.note(replace(entry.facts, reached=reached))
    done[vm] = replace(done[vm], reached=reached)
    text = f"memory {brief(machine.current)} -> {brief(reached)}, as the guest says"
    site.reporter.say(text, vm=vm)


def _doing(vm: str, target: int) -> str:
    return f"ballooning {vm} to {brief(target)}"


def _as_dict(prospect: Prospect) -> dict[str, object]:
    guest = prospect.guest
    return {
        "vm": guest.vm,
        "on": guest.on,
        "now": guest.now,
        "needs": guest.least,
        "idle": guest.idle,
        "maximum": guest.maximum,
        "may_have": prospect.grow_to,
        "gives": guest.gives,
        "target": prospect.target,
        "why": prospect.why,
    }
