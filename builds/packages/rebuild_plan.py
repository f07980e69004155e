"""What a rebuild needs, found by real reads of a record, or named where it is gone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builds.packages.plan import recipe_of, settings_of, template_of
from builds.packages.record import PackageRecord, PackageRecords
from builds.packages.sources import read_source
from builds.packages.versions import changes
from builds.source import Git
from inventory.errors import Call, FarmhandError, NotFound, WrongState
from inventory.packages import PackageBuilds, PackageSource
from provision.package_repositories import opened
from provision.site import Site

if TYPE_CHECKING:
    from builds.packages.source import SourceState
    from repositories.generation import Generation
    from repositories.repository import Repository

_FOR_DEB = "DEB_BUILD_OPTIONS"


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


def rebuild_plan(site: Site, build: str, vm: str, *, verify: bool) -> RebuildPlan:
    """All that a rebuild needs, found by real reads: of how it was built what the record says, whatever
    the farm file says now. NotFound, WrongState."""
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
                remedy=(
                    "built again all the same, and not compared: ",
                    Call("rebuild", build=record.id),
                ),
            )
    state = _source(site, record)
    settings = replace(
        settings, user=record.builder.user or settings.user,
        to=record.builder.checkpoint or settings.to,
    )  # fmt: skip
    known = [replace(settings, tool=tool) for tool in ("dpkg-buildpackage", "sbuild")]
    notes = []
    for each in known:
        if recipe_of(state, each) == record.inputs.recipe:
            settings = each
            break
    else:
        notes.append("what is done in the builder is no longer just what was done then")
    repository, generation = _generation(site, record)
    return RebuildPlan(
        record=record, settings=settings, state=state, vm=vm, repository=repository,
        generation=generation, notes=tuple(notes),
    )  # fmt: skip


def builder_of(site: Site, settings: PackageBuilds, record: PackageRecord) -> str:
    """A builder whose disk is what it was then. WrongState."""
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
        remedy=(
            "give a builder that generation of its template, if it is still there: ",
            Call("template-list"),
        ),
    )


def _source(site: Site, record: PackageRecord) -> SourceState:
    """Just what was built. WrongState, naming what is gone."""
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
