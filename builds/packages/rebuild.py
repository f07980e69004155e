"""rebuild: a package build done again from its record alone, to see whether it comes out the same. What
it makes goes beside the record, and is never published."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from builds.packages.record import PackageRecords
from builds.packages.verified import REBUILDS, RebuildResult
from builds.repositories import give_back, holder_of
from host.files import matching
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
    from builds.packages.rebuild_plan import RebuildPlan


@dataclass(frozen=True, kw_only=True)
class Rebuild(Operation[RebuildResult]):
    """Build a package again as its record says: the same source, in a VM of the same template generation
    that was just reset to the same checkpoint, with exactly the packages installed that were then, the
    same environment and directory. ``build``: the record, such as ``hello/7``. ``verify``: compare what
    it makes with what the record has; that they differ is a result, not an error.

    Errors before anything is touched: NotFound (no such record), WrongState (it did not pass; its
    source, template or packages are gone, which is named). Afterwards: BuildFailed, Interrupted."""

    name = "rebuild"
    is_build = True

    build: str
    verify: bool = False
    stream: Callable[[str, bytes], None] | None = field(default=None, compare=False, repr=False)
    """Told what is printed; no part of what is asked."""

    def affected(self, site: Site) -> tuple[str, ...]:
        from builds.packages.plan import settings_of
        from builds.packages.rebuild_plan import builder_of

        settings = settings_of(site)
        record = PackageRecords(site.paths).find(self.build)
        return site.vms([builder_of(site, settings, record)])

    def plan(self, run: Run) -> engine.Plan[RebuildResult]:
        from builds.packages.rebuild_plan import rebuild_plan

        plan = rebuild_plan(run.site, self.build, run.vms[0], verify=self.verify)
        done: list[RebuildResult] = []
        job = engine.Job(tuple(_lines(plan)), lambda: done.append(self._carry_out(run, plan)))
        planned = RebuildResult(plan.record.id, notes=plan.notes)
        return engine.Plan([engine.alone(job)], lambda: done[-1] if done else planned)

    def _carry_out(self, run: Run, plan: RebuildPlan) -> RebuildResult:
        import asyncio

        from builds.packages.rebuilding import Rebuilding

        site = run.site
        under_way = Rebuilding(site, plan, stream=self.stream)
        facts = RebuildFacts(plan.record.id, under_way.number, plan.repository.name)
        with site.journal.begin(REBUILD, run.vms, facts) as entry:
            _keep(plan, facts.holder)
            with asyncio.Runner() as runner:
                runner.run(under_way.run())
            give_back(site, plan.repository.name, facts.holder)
            entry.verdict, entry.why, entry.told = under_way.verdict()
        return under_way.conclude(verify=self.verify)


def _lines(plan: RebuildPlan) -> Iterator[Action]:
    record = plan.record
    for note in plan.notes:
        yield Action("note", "", note)
    of = f"commit {record.source.commit[:10]}" if record.source.commit else record.source.place
    count = len(record.inputs.installed)
    installed = f"{count} package{'s' * (count != 1)} installed"
    text = f"build {record.id} again: {record.name} {record.version} of {of}, with {installed}"
    yield Action("rebuild", plan.vm, text)


def _keep(plan: RebuildPlan, holder: str) -> None:
    """Have the generation kept until the rebuild has ended."""
    from repositories.change import changing
    from repositories.leases import take

    if plan.generation is not None:
        with changing(plan.repository):
            take(plan.repository.layout, plan.generation.sequence, holder_of(holder))


@dataclass(frozen=True, slots=True)
class RebuildFacts(Facts):
    """``build``: the record's id; ``number``: of the rebuild."""

    build: str
    number: int
    repository: str

    @property
    def id(self) -> str:
        """The rebuild's own, such as ``hello/7/rebuilds/2``: where it lies among the records."""
        return f"{self.build}/{REBUILDS}/{self.number}"

    @property
    def holder(self) -> str:
        """Of its lease of the repository's generation."""
        return f"rebuild {self.build} {self.number}"


class _RebuildActivity(Activity[RebuildFacts]):
    """Recovery takes the builder's memory down again, and gives back what was held of the repository.
    What it made so far stays beside the record, and says nothing; its copy of the source goes."""

    name = "rebuild"
    facts = RebuildFacts

    def build_of(self, facts: RebuildFacts) -> str:
        return facts.id

    def recover(self, site: Site, record: Record, facts: RebuildFacts) -> Recovery[RebuildFacts]:
        members = [Member(site, vm) for vm in record.vms if vm in site.farm.vms]

        def calm(_: Entry[RebuildFacts]) -> None:
            for member in members:
                if member.can_power and member.idles and is_on(member.look()):
                    deflate(member)
            if facts.repository in site.farm.repositories:
                give_back(site, facts.repository, facts.holder)
            tidy(PackageRecords(site.paths).top / facts.id)

        return Recovery("what it made so far stays beside the record", calm)


def tidy(directory: Path) -> None:
    """Remove what is only there while a rebuild runs."""
    for path in matching(directory, ".*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


REBUILD = _RebuildActivity()
