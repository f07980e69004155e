"""What keeps the farm's packages from being built, as far as it can be known before the first builder is
reset: all of it at once, each with what to do. Nothing is changed."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import count
from pathlib import Path

from builds.packages.archive import KnownPackages, Outside
from builds.packages.downloads import shown, unready
from builds.packages.graph import Graph
from builds.packages.problems import Lacking
from builds.packages.record import PackageRecords, RecordKey
from builds.packages.relations import Relation, clauses_of
from builds.packages.source import SourceState
from builds.packages.sources import PackageSources, SourceProblem, directory_key
from builds.packages.versions import contradicted, foreign_versions, other_version, source_name
from builds.plan import unprivileged
from builds.root import no_root
from host.files import SPARE
from inventory.errors import Call, FarmhandError, Remedy, Unsupported, WrongState, joined, some
from inventory.loader import places
from inventory.packages import PackageBuilds
from inventory.places import Path as Place
from inventory.sizes import about
from provision.member import Member
from provision.operations.reset import way_back
from provision.package_repositories import opened, signing
from provision.site import Site
from repositories.package import Package
from repositories.packed import Damaged
from repositories.repository import Repository
from repositories.staging import kept_reading

_PROVIDES = re.compile(r"^Provides:[ \t]*(.*(?:\n[ \t].*)*)", re.MULTILINE | re.IGNORECASE)
_UNKNOWN = 2**20
"""Bytes that a package is taken to make of which nothing is known."""
_LISTED, _CLONED = ("build", "builders"), ("build", "cloned")
_Problems = Iterator[tuple[str, str, Place, Remedy]]
"""Of each problem the package's name ("": no single one's), what it is, where, and what to do."""


class PackagesNotReady(WrongState):
    """Packages can't be built: all that is in the way."""

    def __init__(self, farm: str, problems: Sequence[SourceProblem]) -> None:
        self.problems = tuple(problems)
        first, *more = map(str, self.problems)
        remedies = dict.fromkeys(problem.remedy for problem in self.problems if problem.remedy)
        if more:
            head = f"{farm}: {len(self.problems)} problems keep the packages from being built"
            first = "\n".join((head, first, *more))
        super().__init__(first, remedy=joined(remedies, "\n"))

    def as_dict(self) -> Mapping[str, object]:
        return {
            **super().as_dict(),
            "problems": [
                {"package": one.package, "what": one.what, "where": one.where, "remedy": one.remedy}
                for one in self.problems
            ],
        }


class _Builds:
    """The keys of a package's good builds, the newest first, each read once and when it is asked for."""

    def __init__(self, unread: Iterator[RecordKey]) -> None:
        self._unread = unread
        self._read: list[RecordKey] = []

    def __iter__(self) -> Iterator[RecordKey]:
        for at in count():
            if at == len(self._read):
                key = next(self._unread, None)
                if key is None:
                    return
                self._read.append(key)
            yield self._read[at]


def check_all(site: Site, sources: PackageSources, graph: Graph) -> None:
    """PackagesNotReady, with all that keeps these packages from being built."""
    if problems := problems_of(site, sources, graph):
        raise PackagesNotReady(site.name, problems)


def problems_of(site: Site, sources: PackageSources, graph: Graph) -> tuple[SourceProblem, ...]:
    """All that keeps them from being built, in the order in which an admin would put it right."""
    settings = site.farm.build
    assert settings is not None
    packages = PackageRecords(site.paths)
    builds = {name: _Builds(packages.passed_keys(name)) for name in sources.states}
    found = [
        *_graph(settings, graph),
        *_formats(site, settings, sources),
        *_builders(site, settings),
        *_repository(site, settings, sources, builds),
        *_versions(site, packages, sources, builds),
        *_downloads(site, sources),
        *_room(site, settings, sources, builds),
    ]
    spots = places(site.farm, [where for _, _, where, _ in found]) if found else ()
    return (
        *sources.problems,
        *(
            SourceProblem(package, what, where, remedy)
            for (package, what, _, remedy), where in zip(found, spots, strict=True)
        ),
    )


class PublishedPackages:
    """What a repository's channel has, for a graph, and what is ``installed`` in the builders."""

    def __init__(self, repository: Repository, channel: str, installed: KnownPackages) -> None:
        self._installed = installed
        self._repository = repository
        self._packages = tuple(_published(repository, channel))

    def has(self, relation: Relation) -> bool:
        """By real names first: what packages provide is in their own fields."""
        return (
            self._installed.has(relation) or self._named.has(relation) or self._providing.has(relation)
        )

    @cached_property
    def _named(self) -> KnownPackages:
        versions: dict[str, tuple[str, ...]] = defaultdict(tuple)
        for package in self._packages:
            versions[package.name] += (package.version,)
        return KnownPackages(versions)

    @cached_property
    def _providing(self) -> KnownPackages:
        found: dict[str, tuple[str | None, ...]] = defaultdict(tuple)
        for package in self._packages:
            layout = self._repository.layout
            kept = kept_reading(layout, package.sha256, package.file, package.component)
            text = kept.texts.get("Packages", "") if kept else ""
            for match in _PROVIDES.finditer(text):
                with suppress(Damaged):
                    for relation, *_ in clauses_of(match[1], "Provides", binary=True):
                        found[relation.name] += (relation.version or None,)
        return KnownPackages({}, found)


def outside_of(site: Site) -> Outside | None:
    """What builds may get from elsewhere than the packages themselves, for their graph; None: whatever
    they want, as long as nobody knows what is installed in the builders, which a build tells; or for
    rpm: what provides what rpm itself tells, in the builder. FarmhandError: the repository can't be
    read."""
    settings = site.farm.build
    if settings is None or settings.outside:
        return None
    if site.farm.repositories[settings.repository].format != "deb":
        return None
    there = _installed(PackageRecords(site.paths))
    if there is None:
        return None
    return PublishedPackages(opened(site.farm, settings.repository), settings.channel, there)


def _installed(records: PackageRecords) -> KnownPackages | None:
    """What a builder was seen to have of its own. Virtual packages of these are not known."""
    for name in records.names():
        record = next((one for one in records.of(name) if one.result == "passed"), None)
        if record is not None:
            own = (one for one in record.inputs.installed if not one.sha256)
            return KnownPackages({one.name: (one.version,) for one in own})
    return None


def _published(repository: Repository, channel: str) -> Iterable[Package]:
    head = repository.head(channel) if repository.exists else None
    return repository.packages(head) if head else ()


def _of(site: Site, state: SourceState) -> Place:
    """Where the farm file has a package, or the directory that it was found in."""
    if state.name not in site.farm.packages:
        return directory_key(site.farm)
    key = "git" if state.declared.git else "dsc" if state.declared.dsc else "srpm"
    return ("packages", state.name, key)


def _graph(settings: PackageBuilds, graph: Graph) -> _Problems:
    for problem in graph.problems:
        remedy = problem.REMEDY
        if isinstance(problem, Lacking) and not settings.outside:
            remedy += "; or give 'outside: yes' where the builders have it"
        yield "", str(problem), ("packages",), remedy


def _formats(site: Site, settings: PackageBuilds, sources: PackageSources) -> _Problems:
    takes = site.farm.repositories[settings.repository].format
    others = [name for name, state in sources.states.items() if state.format != takes]
    if others:
        yield (
            "",
            f"repository {settings.repository} takes {takes}, and {some(others)} "
            f"{'is' if len(others) == 1 else 'are'} {sources.states[others[0]].format}",
            ("build", "repository"),
            "give them a farm of their own, or 'repository' one of their format",
        )


def _builders(site: Site, settings: PackageBuilds) -> _Problems:
    """As ``builds.plan.check`` looks at the VMs of a cycle: there, to be driven, to be reset."""
    unmade = []
    for vm in settings.all_builders:
        listed = vm in settings.builders
        where: Place = ("build", "builders", settings.builders.index(vm)) if listed else _CLONED
        try:
            if not _check_builder(site, settings, vm):
                unmade.append(vm)
        except FarmhandError as error:
            yield "", error.bare, where, error.remedy
    if unmade:
        key = _CLONED if settings.cloned and set(unmade) & set(settings.cloned.names) else _LISTED
        are = "are" if len(unmade) > 1 else "is"
        remedy = ("make what is missing: ", Call("clone-farm"))
        yield "", f"{some(unmade)} {are} not made yet", key, remedy


def _check_builder(site: Site, settings: PackageBuilds, vm: str) -> bool:
    """Whether it is there. FarmhandError: it can't build."""
    member = Member(site, vm)
    if not member.info.guests:
        raise Unsupported(
            f"{vm} is on {member.info.called}, where nothing can be run",
            remedy="a VM of driver kvm, xen or ssh builds packages",
        )
    if unprivileged(site, vm):
        raise no_root(site, vm, "step build")
    if member.look() is None:
        return False
    way = way_back(member, settings.to)
    if way.warm and not way.proven:
        raise Unsupported(
            f"{vm}'s checkpoint {settings.to} is warm, and a build begins on a proven disk",
            remedy="name a cold checkpoint with 'to'",
        )
    return True


def _repository(
    site: Site,
    settings: PackageBuilds,
    sources: PackageSources,
    builds: Mapping[str, _Builds],
) -> _Problems:
    """That it can be read and signed, and which versions it has from elsewhere."""
    name, where = settings.repository, ("build", "repository")
    try:
        with signing(site, name):
            pass
        published: dict[str, list[Package]] = defaultdict(list)
        for package in _published(opened(site.farm, name), settings.channel):
            published[package.source].append(package)
    except FarmhandError as error:
        yield "", f"repository {name}: {error.message}", where, error.remedy
        return
    for state in sources.states.values():
        has = published.get(source_name(state), ())
        if others := foreign_versions(state, has, builds[state.name]):
            yield (
                state.name,
                f"version {state.given} is in {name}'s {settings.channel} already, and no build of this "
                f"source made it: {some([str(one) for one in others], 3)}",
                _of(site, state),
                other_version(state),
            )


def _versions(
    site: Site, records: PackageRecords, sources: PackageSources, builds: Mapping[str, _Builds]
) -> _Problems:
    """One version means one source: within the farm, and in all that was ever built."""
    for state in sources.states.values():
        build = contradicted(state, builds[state.name])
        if build is not None:
            yield (
                state.name,
                f"version {state.given} is that of build {build.package}/{build.number}, from other "
                f"contents: {_origin(records, build)}",
                _of(site, state),
                other_version(state),
            )


def _origin(records: PackageRecords, build: RecordKey) -> str:
    try:
        source = records.read(build.package, build.number).source
    except FarmhandError:
        return f"tree {build.tree[:10]}"
    if not source.commit:
        return source.place
    return f"commit {source.commit[:10]}" + (f" ({source.subject})" if source.subject else "")


def _downloads(site: Site, sources: PackageSources) -> _Problems:
    wanted = {
        (name, number): download
        for name, state in sources.states.items()
        for number, download in enumerate(state.declared.downloads)
    }
    why = {shown(one): error for one, error in unready(site.runner, wanted.values())}
    for (name, number), download in wanted.items():
        if error := why.get(shown(download)):
            yield name, error.message, ("packages", name, "downloads", number, "url"), error.remedy


def _room(
    site: Site,
    settings: PackageBuilds,
    sources: PackageSources,
    builds: Mapping[str, _Builds],
) -> _Problems:
    """For the records and the repository, of those packages that are not as they were when they were
    last built, by what they made then."""
    wanted = 0
    for name, state in sources.states.items():
        last = next(iter(builds[name]), None)
        if last is None or last.tree != state.tree:
            wanted += sum(file.size for file in last.packages) if last else _UNKNOWN
    if not wanted:
        return
    needs: dict[int, tuple[Path, int]] = {}
    for place in (site.paths.root, opened(site.farm, settings.repository).settings.top):
        directory = next(path for path in (place, *place.parents) if path.is_dir())
        device = directory.stat().st_dev
        first, before = needs.get(device, (directory, 0))
        needs[device] = first, before + wanted
    for directory, most in needs.values():
        free = shutil.disk_usage(directory).free
        if free < most + SPARE:
            yield (
                "",
                f"no room for about {about(most)} of packages in {directory}: {about(free)} are free, "
                f"of which {about(SPARE)} are left for farmhand's own records",
                ("build",),
                (
                    f"make room on the file system of {directory}; ",
                    Call("gc"),
                    " takes away what nothing refers to",
                ),
            )
