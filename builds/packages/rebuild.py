"""rebuild: a package build done again from its record alone, to see whether it comes out the same. What
it makes goes beside the record, and is never published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builds.packages.record import PackageRecord, PackageRecords
from builds.repositories import give_back, holder_of
from builds.source import Git
from inventory.errors import Call, FarmhandError, NotFound, WrongState
from inventory.packages import PackageBuilds, PackageSource
from provision.engine import plan as engine
from provision.engine.facts import Facts
from provision.engine.journal import Entry
from provision.engine.operation import Activity, Operation, Recovery
from provision.engine.record import Record
from provision.engine.report import Action
from provision.engine.run import Run
from provision.member import is_on
from provision.power import deflate
from provision.site import Site

if TYPE_CHECKING:
    from builds.packages.source import SourceState
    from repositories.generation import Generation
    from repositories.repository import Repository

_FOR_DEB = "DEB_BUILD_OPTIONS"


@dataclass(frozen=True, slots=True)
class RebuildResult:
    """``build``: the record's id. ``rebuild``: its number, of ``directory``; 0: it is only planned.
    ``compared``: whether its outputs were held against the record's; then ``differences``, a line each,
    none where all is the same. ``notes``: what was otherwise than recorded."""

    build: str
    rebuild: int = 0
    directory: str = ""
    compared: bool = False
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    files: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildPlan:
    """``source``: at the very commit, or files, that were built. ``generation``: what has all that was
    installed from the repository."""

    record: PackageRecord
    settings: PackageBuilds
    state: SourceState
    vm: str
    repository: Repository
    generation: Generation | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rebuild(Operation[RebuildResult]):
    """Build a package again as its record says: the same source, in a VM of the same template generation
    that was just reset to the same checkpoint, with exactly the packages installed that were then, the
    same environment and directory. ``build``: the record, such as ``hello/7``. ``verify``: compare what
    it makes with what the record has; that they differ is a result, not an error.

    Errors before anything is touched: NotFound (no such record), WrongState (it did not pass; its
    source, template or packages are gone, which is named). Afterwards: BuildFailed, Interrupted."""

    name = "rebuild"

    build: str
    verify: bool = False
    stream: Callable[[str, bytes], None] | None = field(default=None, compare=False, repr=False)
    """Told what is printed; no part of what is asked."""

    def affected(self, site: Site) -> tuple[str, ...]:
        from builds.packages.plan import settings_of

        settings = settings_of(site)
        record = PackageRecords(site.paths).find(self.build)
        return site.vms([_builder(site, settings, record)])

    def plan(self, run: Run) -> engine.Plan[RebuildResult]:
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
        facts = RebuildFacts(under_way.id, plan.repository.name)
        with site.journal.begin(REBUILD, run.vms, facts) as entry:
            _keep(plan, under_way.id)
            with asyncio.Runner() as runner:
                runner.run(under_way.run())
            give_back(site, plan.repository.name, under_way.id)
            entry.verdict, entry.why = under_way.verdict()
        return under_way.conclude(verify=self.verify)


def rebuild_plan(site: Site, build: str, vm: str, *, verify: bool) -> RebuildPlan:
    """All that a rebuild needs, found by real reads. NotFound, WrongState."""
    from builds.packages.plan import recipe_of, settings_of

    record, settings = PackageRecords(site.paths).find(build), settings_of(site)
    if record.result != "passed":
        raise WrongState(
            f"build {record.id} {'runs' if record.result == 'running' else record.result}: a build that "
            "passed can be done again",
            remedy=("to try the package again: ", Call("build", package=record.package)),
        )
    if verify:
        gone = [file.name for file in record.outputs if not (record.directory / file.path).is_file()]
        if gone:
            raise WrongState(
                f"build {record.id}: {gone[0]} is gone, so there is nothing to compare with",
                remedy="without --verify it is built again all the same",
            )
    state = _source(site, record)
    # what the record says of how it was built, whatever the farm file says now
    settings = replace(
        settings, user=record.builder.user or settings.user,
        to=record.builder.checkpoint or settings.to,
    )  # fmt: skip
    notes = []
    if recipe_of(state, settings) != record.inputs.recipe:
        notes.append("what is done in the builder is no longer just what was done then")
    repository, generation = _generation(site, record)
    return RebuildPlan(
        record=record, settings=settings, state=state, vm=vm, repository=repository,
        generation=generation, notes=tuple(notes),
    )  # fmt: skip


def _lines(plan: RebuildPlan) -> Iterator[Action]:
    record = plan.record
    for note in plan.notes:
        yield Action("note", "", note)
    of = f"commit {record.source.commit[:10]}" if record.source.commit else record.source.place
    count = len(record.inputs.installed)
    installed = f"{count} package{'s' * (count != 1)} installed"
    text = f"build {record.id} again: {record.name} {record.version} of {of}, with {installed}"
    yield Action("rebuild", plan.vm, text)


def _builder(site: Site, settings: PackageBuilds, record: PackageRecord) -> str:
    """A builder whose disk is what it was then. WrongState."""
    from builds.packages.plan import template_of

    to = record.builder.checkpoint or settings.to
    had: dict[str, str] = {}
    for vm in sorted(settings.all_builders, key=lambda name: name != record.builder.vm):
        try:
            had[vm] = template_of(site, vm, to)
        except FarmhandError as error:
            had[vm] = f"nothing that can be looked at ({error.message})"
        if had[vm] == record.inputs.template:
            return vm
    have = "; ".join(f"{vm} has {what}" for vm, what in had.items())
    raise WrongState(
        f"build {record.id} was made on {record.inputs.template}, which no builder has now: {have}",
        remedy="give a builder that generation of its template, if it is still there: template-list",
    )


def _source(site: Site, record: PackageRecord) -> SourceState:
    """Just what was built. WrongState, naming what is gone."""
    from builds.packages.sources import read_source
    from builds.packages.versions import changes

    origin = record.source
    what = f"commit {origin.commit[:12]} of {origin.place}" if origin.commit else origin.place
    try:
        state = read_source(site, record.package, _declared(site, record))
        if state.repository is not None and state.repository.exists():  # a plan has no mirror of a URL
            # what is known of a commit is kept, also where the commit is not
            Git(site.runner, state.repository)("cat-file", "-e", f"{state.tree}^{{tree}}")
    except FarmhandError as error:
        raise WrongState(
            f"build {record.id}: its source, {what}, is gone: {error.message}", remedy=error.remedy
        ) from error
    if state.tree != origin.tree:
        raise WrongState(
            f"build {record.id}: {what} is no longer what was built: it is {state.tree[:12]}, and was "
            f"{origin.tree[:12]}",
            remedy="put back what was built",
        )
    return changes(replace(state, asked=origin.asked, when=origin.when), record.version)


def _declared(site: Site, record: PackageRecord) -> PackageSource:
    """As the record has it. From the farm file comes what is no part of a record: a login in a URL,
    where downloads are from, limits."""
    known = site.farm.packages.get(record.package)
    origin, inputs = record.source, record.inputs
    options = inputs.options
    if inputs.format == "deb" and _FOR_DEB in record.builder.environment:
        options = tuple(record.builder.environment[_FOR_DEB].split())  # parallel=N among them
    downloads = known.downloads if known else ()
    offered = {one.name: one.sha256 for one in downloads}
    for name, sum_ in inputs.downloads.items():
        if offered.get(name) != sum_:
            raise WrongState(
                f"the farm file no longer says where {name} {sum_[:12]} is from",
                remedy=f"give packages.{record.package} that download again",
            )
    if origin.commit:
        git = known.git if known is not None and known.git is not None else origin.place
        declared = PackageSource(git=git, path=origin.path or None, revision=origin.commit)
    elif inputs.format == "deb":
        declared = PackageSource(dsc=Path(origin.place))
    else:
        declared = PackageSource(srpm=Path(origin.place))
    declared = replace(
        declared,
        options=options,
        downloads=tuple(one for one in downloads if one.name in inputs.downloads),
    )
    if known is None:
        return declared
    return replace(declared, timeout=known.timeout, memory=known.memory, disk=known.disk)


def _generation(site: Site, record: PackageRecord) -> tuple[Repository, Generation | None]:
    """What has all that was installed from the repository: the very generation, or the channel's present
    one. WrongState: neither does."""
    from builds.packages.plan import settings_of
    from provision.package_repositories import opened

    settings = settings_of(site)
    repository = opened(site.farm, record.repository or settings.repository)
    if not record.generation:
        return repository, None
    try:
        return repository, repository.documents.read(record.generation)
    except NotFound:
        head = repository.head(settings.channel)
    has = {package.sha256 for package in repository.packages(head)} if head else set()
    gone = [one for one in record.inputs.installed if one.sha256 and one.sha256 not in has]
    if not gone:
        return repository, head
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    raise WrongState(
        f"build {record.id}: generation {record.generation} of {repository.name} is gone, and "
        f"{settings.channel} has no {gone[0].name} {gone[0].version} of those bytes{more}",
        remedy=("what is kept of a repository is its 'keep'; what there is: ",
                Call("repo-log", repo=repository.name)),
    )  # fmt: skip


def _keep(plan: RebuildPlan, holder: str) -> None:
    """Have the generation kept until the rebuild has ended."""
    from repositories.change import changing
    from repositories.leases import take

    if plan.generation is not None:
        with changing(plan.repository):
            take(plan.repository.layout, plan.generation.sequence, holder_of(holder))


@dataclass(frozen=True, slots=True)
class RebuildFacts(Facts):
    """``rebuild``: what its lease of the repository is called by."""

    rebuild: str
    repository: str


class _RebuildActivity(Activity[RebuildFacts]):
    """Recovery takes the builder's memory down again, and gives back what was held of the repository.
    What it made so far stays beside the record, and says nothing."""

    name = "rebuild"
    facts = RebuildFacts

    def recover(self, site: Site, record: Record, facts: RebuildFacts) -> Recovery[RebuildFacts]:
        members = [site.member(vm) for vm in record.vms if vm in site.farm.vms]

        def calm(_: Entry[RebuildFacts]) -> None:
            for member in members:
                if member.can_power and member.idles and is_on(member.look()):
                    deflate(member)
            if facts.repository in site.farm.repositories:
                give_back(site, facts.repository, facts.rebuild)

        return Recovery("what it made so far stays beside the record", calm)


REBUILD = _RebuildActivity()
