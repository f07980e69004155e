"""build: the farm's packages, built in their order; its locks, its plan, and what a kill of it
leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from builds.packages.runs import PACKAGES_LOCK
from inventory.errors import NotFound, UsageError, some
from provision.engine import plan as engine
from provision.engine.facts import Facts
from provision.engine.journal import Entry
from provision.engine.operation import Activity, Operation, Recovery
from provision.engine.record import Record
from provision.engine.report import Action
from provision.engine.run import Run
from provision.member import Member, is_on
from provision.power import deflate
from provision.site import Site

if TYPE_CHECKING:
    from builds.meter import Meter
    from builds.packages.plan import PackagePlan

_SHOWN = 40
"""Lines of a plan for packages; of more the rest is counted."""


@dataclass(frozen=True, slots=True)
class BuildPackagesResult:
    """``run``: the record's id; "" where nothing was to be done, or it is only planned."""

    run: str = ""
    built: tuple[str, ...] = ()
    taken: int = 0
    generation: int = 0


@dataclass(frozen=True, kw_only=True)
class BuildPackages(Operation[BuildPackagesResult]):
    """Build the farm's packages: those whose inputs have changed, and those that need what came out
    otherwise than before.

    Each is built in a VM that was just reset and proven, with what it needs from a generation of the
    repository's. One that fails skips those that need it; the others go on. When all passed, the channel
    gets them. Interrupted or killed, the same again goes on: what was built is taken from its record.

    ``packages``: these and what they need; none: all. ``with_dependants``: and what needs them.
    ``revision``: GIT_REVISION, in place of the farm file's. Another name than in the last run clears the
    graph: all is built; not with ``only_changed``.

    Errors before anything is touched: Busy, NotFound, and one error with all that is in the way.
    Afterwards, with the records written: BuildFailed, Interrupted."""

    name = "build"
    is_build = True

    packages: tuple[str, ...] = ()
    with_dependants: bool = False
    revision: str | None = None
    only_changed: bool = False
    stream: Callable[[str, bytes], None] | None = field(default=None, compare=False, repr=False)
    """Told what is printed; no part of what is asked."""

    def __post_init__(self) -> None:
        if self.with_dependants and not self.packages:
            raise UsageError("dependants of which package?", remedy="name one")

    def affected(self, site: Site) -> tuple[str, ...]:
        from builds.packages.plan import settings_of

        return site.vms(settings_of(site).all_builders)

    def locks(self, _site: Site) -> tuple[str, ...]:
        return (PACKAGES_LOCK,)

    def doing(self, _vms: Sequence[str]) -> str:
        return self.name + (f" --revision {self.revision}" if self.revision else "")

    def plan(self, run: Run) -> engine.Plan[BuildPackagesResult]:
        from builds.meter import Meter

        meter = Meter()
        plan = self._planned(run.site)
        lines = tuple(plan_lines(plan))
        if plan.idle:
            taken = len(plan.wanted)
            job = engine.Job(lines, partial(self._know_revision, run.site, plan))
            return engine.Plan([engine.alone(job)], lambda: BuildPackagesResult(taken=taken))
        done: list[BuildPackagesResult] = []
        job = engine.Job(lines, lambda: done.append(self._carry_out(run, plan, meter)))
        return engine.Plan([engine.alone(job)], lambda: done[-1] if done else BuildPackagesResult())

    def _planned(self, site: Site) -> PackagePlan:
        from builds.packages.planning import plan_packages

        return plan_packages(
            site, self.packages, with_dependants=self.with_dependants, revision=self.revision,
            only_changed=self.only_changed,
        )  # fmt: skip

    def _with_specs(self, site: Site, plan: PackagePlan) -> PackagePlan:
        """Once rpm has read in a builder what they want, as it is known then."""
        from builds.packages.spec_reading import SpecReader

        SpecReader(site, plan.template).read(plan.unread, plan.settings, self.stream)
        plan = self._planned(site)
        for line in plan_lines(plan):
            site.reporter.say(line.text)
        return plan

    def _carry_out(self, run: Run, plan: PackagePlan, meter: Meter) -> BuildPackagesResult:
        import asyncio

        from builds.cycle_lock import cycle_locked
        from builds.packages.drawing import picture_of
        from builds.packages.planning import end_old_flows
        from builds.packages.run import PackageRun
        from builds.packages.runs import RunRecords
        from builds.pages.write import package_ended, run_ended

        site = run.site
        with cycle_locked(site) as lock:
            if plan.unread:
                plan = self._with_specs(site, plan)
            end_old_flows(site, plan)
            self._know_revision(site, plan)
            ended = partial(package_ended, site)
            under_way = PackageRun(site, plan, meter, stream=self.stream, lock=lock, ended=ended)
            facts = PackageRunFacts(under_way.id)
            with site.journal.begin(BUILD_PACKAGES, run.vms, facts) as entry:
                with asyncio.Runner() as runner:
                    runner.run(under_way.run())
                entry.verdict, entry.why, entry.told = under_way.verdict()
        run_ended(site, RunRecords(site.paths).find(under_way.id), picture_of(plan.graph))
        record = under_way.conclude()
        built = tuple(entry.name for entry in record.packages if entry.state == "passed")
        return BuildPackagesResult(record.id, built, record.count("taken"), record.generation)

    def _know_revision(self, site: Site, plan: PackagePlan) -> None:
        from builds.packages.runs import RunRecords

        RunRecords(site.paths).know_revision(plan.revision, only_changed=self.only_changed)


def plan_lines(plan: PackagePlan) -> list[Action]:
    """What is built, and why; what is taken from the records is counted."""
    found: list[Action] = []
    for name, one in plan.foreseen.items():
        if one.taken is None:
            verb, perhaps = ("build", "") if one.certain else ("perhaps", "perhaps ")
            version = plan.inputs[name].version
            found.append(Action(verb, "", f"{perhaps}build {name} {version}: {'; '.join(one.why)}"))
    if len(found) > _SHOWN:
        rest = len(found) - _SHOWN
        found = [*found[:_SHOWN], Action("build", "", f"build {rest} more")]
    first = [Action("note", "", note) for note in plan.notes]
    if plan.cleared and not plan.only_changed:
        text = f"GIT_REVISION is {plan.revision} now, so everything is built anew"
        first.append(Action("note", "", text))
    if plan.unread:
        names = some([state.name for state in plan.unread])
        text = (
            f"{names}: rpm reads the specs; what is built then, and in which order, is known afterwards"
        )
        first.append(Action("read", plan.settings.all_builders[0], text))
    taken = sum(one.taken is not None for one in plan.foreseen.values())
    if taken:
        are = "package is" if taken == 1 else "packages are"
        first.append(Action("keep", "", f"{taken} {are} as built before"))
    if found and plan.settings.publish:
        where = f"{plan.channel.repository.name}'s {plan.channel.name}"
        found.append(Action("publish", "", f"publish it all to {where}, when all have passed"))
    elif not plan.idle and not found:
        found.append(Action("publish", "", f"publish what was built before to {plan.channel.name}"))
    return [*first, *found]


@dataclass(frozen=True, slots=True)
class PackageRunFacts(Facts):
    """``run``: the record's id."""

    run: str


class _PackageRunActivity(Activity[PackageRunFacts]):
    """Recovery takes the builders' memory down again, and has the records say what was cut off. What was
    built is in its records, which the next run takes it from; its flow is ended by that one."""

    name = "build"
    facts = PackageRunFacts

    def build_of(self, facts: PackageRunFacts) -> str:
        return facts.run

    def recover(self, site: Site, record: Record, facts: PackageRunFacts) -> Recovery[PackageRunFacts]:
        from builds.packages.record import PackageRecords
        from builds.packages.runs import RunRecords

        members = [Member(site, vm) for vm in record.vms if vm in site.farm.vms]
        high = [one for one in members if one.can_power and one.idles and is_on(one.look())]

        def mend(_: Entry[PackageRunFacts]) -> None:
            for member in high:
                deflate(member)
            records, runs = PackageRecords(site.paths), RunRecords(site.paths)
            try:
                run = runs.find(facts.run)
            except NotFound:  # killed before its record was begun, and so before anything was built
                return
            for package in {entry.package for entry in run.packages}:
                found = next(records.of(package), None)
                if found is not None and found.result == "running":
                    note = "its run was killed: nothing was written after this"
                    replace(found, result="interrupted", notes=(*found.notes, note)).save()
            replace(run, result="interrupted").save(durable=True)

        return Recovery("what was built is kept; build goes on from there", mend)


BUILD_PACKAGES = _PackageRunActivity()
