"""cycle: what is asked of it, its locks, its plan, and what a kill of it leaves to be done.

The lock ``cycle`` and those of the cycle's VMs are held all through, and, while it runs, the one that it
shares with others, if there is such a one (``builds.cycle_lock``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from builds.debugging import Debugger
from builds.record import CYCLE_LOCK
from builds.repositories import give_back
from builds.step_kind import steps_of
from inventory.errors import Busy, Call
from provision.engine import plan as engine
from provision.engine.facts import Facts
from provision.engine.journal import Entry
from provision.engine.operation import Activity, Operation, Recovery
from provision.engine.record import Record
from provision.engine.run import Run
from provision.member import Member, is_on, members_of
from provision.power import deflate
from provision.site import Site
from provision.template_recipe import notes_of

if TYPE_CHECKING:
    from builds.meter import Meter
    from builds.plan import BuildPlan

"""Told which VM, and what it printed, as it prints it."""


@dataclass(frozen=True, slots=True)
class CycleResult:
    """``build``: the record's id; "" of one that is only planned."""

    build: str = ""


@dataclass(frozen=True, kw_only=True)
class RunCycle(Operation[CycleResult]):
    """Run the farm's build cycle.

    A VM is built on only after it was reset and its disk was proven to be the checkpoint. A cycle that
    uses a VM before it resets it is refused, if its disk is ours.

    ``start_from`` skips the steps before it; VMs are then taken as they are, and the record says which.
    That is meant for going on after a failed or interrupted cycle. Such a partial run builds what the
    skipped steps were given, if the VMs tell (``builds.lineage``), and its record says what is not
    known. It is refused if they hold another commit than ``revision``. ``keep_going``: later steps are
    tried after a failed one, but not on a VM whose reset failed. ``revision``: any gitrevisions(7) of
    the source, in place of the farm file's. ``like``: a build, by its id: this one is given the very
    generations of package repositories that that one had, and its revision; it publishes nothing.

    Errors before anything is touched: Busy (another cycle, also one of others with whom it shares a
    lock, or somebody works on one of the VMs), NotFound, WrongState, Unsupported, UsageError.
    Afterwards, with the record written: BuildFailed, Interrupted."""

    name = "cycle"
    is_build = True

    start_from: str | None = None
    only: tuple[str, ...] = ()
    revision: str | None = None
    like: str = ""
    keep_going: bool = False
    stream: Callable[[str, bytes], None] | None = field(default=None, compare=False, repr=False)
    """Told what is printed; no part of what is asked."""
    debugger: Debugger | None = field(default=None, compare=False, repr=False)
    """Told where a step failed, before the failure is dealt with; no part of what is asked."""

    def affected(self, site: Site) -> tuple[str, ...]:
        from builds.plan import choose, cycle_of, vms_of

        cycle = cycle_of(site)
        chosen = choose(cycle, self.start_from, self.only)
        return site.vms(sorted(vms_of(step for step in steps_of(cycle) if step.name in chosen)))

    def locks(self, _site: Site) -> tuple[str, ...]:
        return (CYCLE_LOCK,)

    def doing(self, _vms: Sequence[str]) -> str:
        return self.name + (f" --revision {self.revision}" if self.revision else "")

    def refused(self, site: Site, error: Busy) -> Busy:
        holder = site.locks.holder(CYCLE_LOCK)
        if holder is None:
            return error
        end = "" if holder.pid in (0, os.getpid()) else f", or end it: kill {holder.pid}"
        return Busy(
            f"{site.name}: a cycle is running already: {holder}",
            remedy=("watch it: ", Call("log", follow=True), f"; or wait until it ends{end}"),
        )

    def plan(self, run: Run) -> engine.Plan[CycleResult]:
        from builds.meter import Meter
        from builds.plan import plan_build

        site, meter = run.site, Meter()
        with meter.hypervisor():
            plan = plan_build(
                site, self.start_from, self.only, self.revision, like=self.like,
                snapshot=not site.plan,
            )  # fmt: skip
        for note in notes_of(members_of(site, run.vms)):
            site.reporter.warn(note)
        done: list[str] = []
        job = engine.Job(plan.lines, lambda: done.append(self._carry_out(run, plan, meter)))
        return engine.Plan([engine.alone(job)], lambda: CycleResult(*done))

    def _carry_out(self, run: Run, plan: BuildPlan, meter: Meter) -> str:
        """The build's id."""
        import asyncio

        from builds.cycle import Build
        from builds.cycle_lock import cycle_locked
        from builds.resume import cycle_asked

        asked = cycle_asked(
            only=self.only, revision=self.revision, like=plan.like.id if plan.like else "",
            keep_going=self.keep_going,
        )  # fmt: skip
        with cycle_locked(run.site) as lock:
            build = Build(
                run.site, plan, meter, asked=asked, keep_going=self.keep_going, stream=self.stream,
                debugger=self.debugger, lock=lock,
            )  # fmt: skip
            # Journaled, so that after a kill the next command brings the VMs' memory down again.
            with run.site.journal.begin(CYCLE, run.vms, CycleFacts(build.id)) as entry:
                with asyncio.Runner() as runner:
                    runner.run(build.run())
                entry.verdict, entry.why, entry.told = build.verdict()
        build.conclude()
        return build.id


@dataclass(frozen=True, slots=True)
class CycleFacts(Facts):
    """``build``: the record's id."""

    build: str


class _CycleActivity(Activity[CycleFacts]):
    """Recovery takes the VMs' memory down again, and gives back what the build held of package
    repositories. How far the build came is in its record."""

    name = "cycle"
    facts = CycleFacts

    def build_of(self, facts: CycleFacts) -> str:
        return facts.build

    def recover(self, site: Site, record: Record, facts: CycleFacts) -> Recovery[CycleFacts]:
        members = [Member(site, vm) for vm in record.vms if vm in site.farm.vms]
        high = [member for member in members if member.can_power and _is_inflated(member)]

        def calm(_: Entry[CycleFacts]) -> None:
            for member in high:
                deflate(member)
            for repository in site.farm.repositories:
                give_back(site, repository, facts.build)
            if facts.build:
                from builds.pages.write import cycle_began_or_ended

                cycle_began_or_ended(site, killed=facts.build)

        text = f"balloon down {', '.join(member.vm for member in high)}" if high else "noted"
        return Recovery(f"{text}; log shows how far it came", calm)


CYCLE = _CycleActivity()


def _is_inflated(member: Member) -> bool:
    machine, idle = member.look(), member.declared.idle_memory
    return machine is not None and is_on(machine) and idle is not None and machine.current > idle
