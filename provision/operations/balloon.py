"""balloon: running VMs' memory, one by one or the farm's as a whole, never more than their host may use.

Under recovery (``finish_balloon``) nothing is looked at anew: there was room when it was begun, and it
has been kept since (``provision.memory_budget``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hypervisors.api import Machine
from inventory.errors import (
    FarmhandError,
    TimedOut,
    Unsupported,
    UsageError,
    WrongState,
)
from inventory.sizes import brief, format_size
from provision.engine.journal import current_step
from provision.engine.report import Action, Outcome
from provision.engine.work import Job, Run, begin, is_on, lock_of
from provision.member import Member
from provision.memory import HostMemory, Prospect, plan
from provision.memory_budget import PATIENCE, forecast, host_memory, room_for
from provision.site import Site


def balloon(site: Site, vm: str, target: int) -> Outcome:
    """Give a running VM ``target`` bytes of memory; facts say what the guest reached. Where its host may
    not use so much more, VMs that idle are ballooned down first, as far as needed.

    Errors: NotFound, WrongState (stopped), UsageError (above its maximum, below its need),
    Unsupported (no balloon driver), NoSpace, TimedOut (with what it reached)."""
    (member,) = site.members([vm])
    with begin(site, "balloon", [vm], doing=f"balloon {vm} to {format_size(target)}") as run:
        machine = member.present()
        if not member.driver.capabilities().live_balloon:
            raise Unsupported(
                f"{site.name}: {vm}'s host {member.host} can't change a running VM's memory",
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
        if target > machine.current:
            run.add(*forecast({member: (target, target)}, _doing(vm, target)))
        run.carry_out({vm: [_job(run, member, machine, target)]})
        return run.outcome()


def balloon_all(site: Site) -> Outcome:
    """What each VM has, brought to what its state asks for: those that idle fall to their
    ``idle_memory``, or to what their guest needs; when they are there, the others come up to what they
    are declared with, as far as their hosts may. One that a command uses is left as it is.

    Errors: Several, TimedOut (nobody is given more then), Busy."""
    with begin(site, "balloon", [], doing="balloon") as run:
        down: dict[str, list[Job]] = {}
        up: dict[str, list[Job]] = {}
        for host in site.farm.hosts:
            for prospect in plan(host_memory(site, host, needs=True)):
                guest = prospect.guest
                if guest.vm not in site.farm.vms:
                    continue
                if prospect.target == guest.now or not guest.on:
                    text = f"has {brief(guest.now)}" if guest.on else ""
                    why = ", ".join(filter(None, (text, prospect.why)))
                    down[guest.vm] = [Job(Action("keep", guest.vm, why))]
                    continue
                member = site.member(guest.vm)
                run.vm_fact(guest.vm, before=guest.now, asked=prospect.target)
                jobs = down if prospect.target < guest.now else up
                jobs[guest.vm] = [_job(run, member, member.present(), prospect.target)]
        run.carry_out(down)
        run.carry_out(up)
        return run.outcome()


def finish_balloon(site: Site, vm: str, target: int) -> None:
    """Within the operation that was killed. What can't be is a warning, and it keeps what it has."""
    try:
        current_step(f"set its memory to {target}")
        member = site.member(vm)
        member.driver.balloon(member.machine, target, timeout=PATIENCE)
    except (TimedOut, Unsupported, UsageError, WrongState) as error:
        site.reporter.warn(f"its memory was not set: {error.message}", vm=vm)


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
    """Who has how much now, who may have how much, who could give. Changes nothing."""
    hosts: dict[str, HostMemory] = {}
    errors: dict[str, str] = {}
    for host in site.farm.hosts:
        try:
            hosts[host] = host_memory(site, host, needs=True)
        except FarmhandError as error:
            errors[host] = error.message.splitlines()[0]
    return MemoryPlan(site.farm.farm, hosts, errors)


def _job(run: Run, member: Member, machine: Machine, target: int) -> Job:
    text = f"memory {brief(machine.current)} -> {brief(target)}"
    return Job(Action("balloon", member.vm, text), _setting(run, member, machine, target))


def _setting(run: Run, member: Member, machine: Machine, target: int) -> Callable[[], None]:
    site, vm = run.site, member.vm

    def set_it() -> None:
        with site.journal.operation("balloon", vm=vm, target=target) as operation:
            operation.step(f"set its memory to {target}")
            reached = member.driver.balloon(machine.name, target, timeout=PATIENCE)
            operation.note(reached=reached)
        run.vm_fact(vm, reached=reached)
        site.reporter.say(
            f"memory {brief(machine.current)} -> {brief(reached)}, as the guest says", vm=vm
        )

    def go() -> None:
        with site.locks.hold(lock_of(vm), doing=_doing(vm, target)):
            if target <= machine.current:
                set_it()
                return
            with room_for(member, target, _doing(vm, target)):
                set_it()  # journaled only now: it is finished after a kill, without another look

    return go


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
