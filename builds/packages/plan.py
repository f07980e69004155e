"""What a run of `build` will do, by real reads: which packages are built, which are taken from the
record of an earlier build, and why."""

from __future__ import annotations

import hashlib
import platform
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, cmp_to_key
from typing import TYPE_CHECKING

from builds.packages.formats import build_format
from builds.packages.graph import Graph, PackageBuild
from builds.packages.inputs import BuildInputs, differences
from builds.packages.lookup import EarlierBuild, EarlierBuilds, changed, sums_of
from builds.packages.record import PackageRecords
from builds.packages.relations import BuildTarget
from builds.packages.source import SourceState
from builds.packages.versions import changes
from hypervisors.api import CLEAN
from inventory.errors import NotFound
from provision.clean_state import clean_of, is_reserved
from provision.member import Member

if TYPE_CHECKING:
    from inventory.packages import PackageBuilds
    from provision.site import Site
    from repositories.generation import Generation
    from repositories.package import Package
    from repositories.repository import Repository

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "armhf", "i686": "i386"}
"""By machine (uname(2)): Debian's name, where it has another."""


def architecture() -> str:
    """What is built for, by Debian's name: what this machine is, and so its builder VMs."""
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def settings_of(site: Site) -> PackageBuilds:
    """The farm's section `build`. NotFound."""
    if site.farm.build is None:
        raise NotFound(
            f"{site.name}: nothing says how packages are built",
            remedy="give the farm file 'packages' and 'build': see docs/packages.md",
        )
    return site.farm.build


def template_of(site: Site, vm: str, to: str) -> str:
    """What the builder's disk is when it was reset: the template's generation with its sha256, and the
    checkpoint. A checkpoint that was made anew under its name is taken for the same, but not a ``clean``
    with tools."""
    member = Member(site, vm)
    disk = member.disk()
    if disk is None:
        return f"as its reset command leaves it, {to}"
    found = [one for one in member.store.templates() if one.label == disk.template]
    own = max(found, key=lambda one: one.farm == site.identity, default=None)
    to = clean_of(disk.checkpoints, disk.template) if to == CLEAN else to
    which = [f" {kept.id}" for kept in disk.checkpoints if kept.name == to and is_reserved(to)]
    return f"{disk.template} {own.sha256[:16] if own else 'gone'}, {to}{''.join(which)}"


class Channel:
    """What the repository's channel has when the run begins."""

    def __init__(self, repository: Repository, channel: str) -> None:
        self.repository = repository
        self.name = channel
        self.head: Generation | None = repository.head(channel) if repository.exists else None

    @cached_property
    def newest(self) -> Mapping[str, Package]:
        """The newest of each of its packages, by name."""
        newest: dict[str, Package] = {}
        compare = cmp_to_key(self.repository.format.compare)
        for package in self.repository.packages(self.head) if self.head else ():
            known = newest.get(package.name)
            if known is None or compare(package.version) >= compare(known.version):
                newest[package.name] = package
        return newest

    @cached_property
    def sums(self) -> Mapping[str, str]:
        """Their sha256."""
        return {name: package.sha256 for name, package in self.newest.items()}

    @cached_property
    def files(self) -> frozenset[str]:
        """sha256 of all that it has."""
        found = self.repository.packages(self.head) if self.head else ()
        return frozenset(package.sha256 for package in found)


class _Lazily(Mapping[str, str]):
    """What a channel has, looked up when somebody asks for what the farm's packages don't make."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __getitem__(self, name: str) -> str:
        return self._channel.sums[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._channel.sums)

    def __len__(self) -> int:
        return len(self._channel.sums)


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What becomes of a build, as far as it is known: ``taken``, or None; ``certain``: whether it is
    built for sure, or only if what it needs comes out otherwise than before. ``why``: a line each."""

    taken: EarlierBuild | None = None
    certain: bool = True
    why: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagePlan:
    """``states``: by the source package's own name. ``wanted``: names of builds. ``template``: what the
    builders' disks are. ``inputs``: what each is asked for, by name. ``unread``: rpm packages of which
    no builder has read yet what they need; the rest is as if they weren't. ``cleared``: whether
    GIT_REVISION is another than in the last run."""

    settings: PackageBuilds
    revision: str
    only_changed: bool
    cleared: bool
    states: Mapping[str, SourceState]
    graph: Graph
    wanted: tuple[str, ...]
    asked: tuple[str, ...]
    inputs: Mapping[str, BuildInputs]
    builders: tuple[str, ...]
    channel: Channel
    earlier: EarlierBuilds
    records: PackageRecords
    template: str = ""
    notes: tuple[str, ...] = ()
    unread: tuple[SourceState, ...] = ()
    foreseen: Mapping[str, Foreseen] = field(default_factory=dict)

    def state(self, build: PackageBuild) -> SourceState:
        return state_of(build, self.states[build.package.name])

    @property
    def idle(self) -> bool:
        """Whether all is as it was built, and where it belongs."""
        built = (one.taken and self.there(one.taken) for one in self.foreseen.values())
        return not self.unread and all(built)

    def there(self, build: EarlierBuild) -> bool:
        """Whether the channel has what it made."""
        return all(file.sha256 in self.channel.files for file in build.packages)


def state_of(build: PackageBuild, state: SourceState) -> SourceState:
    """The source as that build has it. A bootstrap has a version of its own, which the last build's
    comes after: two contents never have one."""
    if not build.bootstrap:
        return state
    return changes(state, f"{state.given}~{'.'.join(build.bootstrap)}")


def recipe_of(state: SourceState, settings: PackageBuilds) -> str:
    """sha256 of what is done in the builder."""
    return hashlib.sha256(build_format(state.format).recipe(settings).encode()).hexdigest()


def inputs_of(
    build: PackageBuild, state: SourceState, settings: PackageBuilds, template: str, cleared: int
) -> BuildInputs:
    """All that the build is asked for. ``cleared``: how often GIT_REVISION has cleared the graph."""
    state = state_of(build, state)
    return BuildInputs(
        format=state.format,
        tree=state.tree,
        version=state.given,
        recipe=recipe_of(state, settings),
        template=template,
        architecture=build.target.architecture,
        revision=str(cleared or ""),
        bootstrap=build.bootstrap,
        profiles=tuple(sorted(build.target.profiles)),
        options=state.declared.options,
        downloads={one.name: one.sha256 for one in state.declared.downloads},
    )


def target() -> BuildTarget:
    return BuildTarget(architecture())


def wanted_of(
    graph: Graph, states: Mapping[str, SourceState], packages: Sequence[str], *, dependants: bool
) -> tuple[str, ...]:
    """Names of builds: these packages, all that they need, and with ``dependants`` all that needs them.
    ``packages``: by the farm's names, or their own; none: all. NotFound."""
    if not packages:
        return tuple(graph.builds)
    own = {state.name: name for name, state in states.items()}
    found: set[str] = set()
    wanted = []
    for package in packages:
        source = own.get(package, package)
        builds = [name for name, build in graph.builds.items() if build.package.name == source]
        if not builds:
            graph.needs(package)  # NotFound, which names the nearest
        wanted += builds
        if dependants:
            wanted += [one for name in builds for one in graph.dependants(name)]
    while wanted:
        name = wanted.pop()
        if name not in found:
            found.add(name)
            wanted += [need.needs for need in graph.needs(name)]
    return tuple(name for name in graph.builds if name in found)


def foresee(plan: PackagePlan) -> Mapping[str, Foreseen]:
    """By build, in their order, what becomes of it."""
    known: dict[str, Foreseen] = {}
    sums: ChainMap[str, str] = ChainMap({}, _Lazily(plan.channel))  # type: ignore[arg-type]
    for name in plan.wanted:
        build, asked = plan.graph.builds[name], plan.inputs[name].asked
        package = plan.state(build).name
        needs = [need.needs for need in plan.graph.needs(name)]
        open_ = [need for need in needs if need in known and known[need].taken is None]
        if not open_:
            if taken := plan.earlier.fitting(package, name, asked, sums):
                known[name] = Foreseen(taken=taken)
                sums.maps[0].update(sums_of(taken.packages))
                continue
            known[name] = Foreseen(why=tuple(reasons(plan, name, sums)))
        elif plan.earlier.may_fit(package, name, asked):
            text = f"if {', '.join(open_[:3])}{' and others' * (len(open_) > 3)} change"
            known[name] = Foreseen(certain=False, why=(text,))
        else:
            known[name] = Foreseen(why=tuple(reasons(plan, name, None)))
    return known


def reasons(plan: PackagePlan, name: str, sums: Mapping[str, str] | None) -> Iterable[str]:
    """Why it is built, a line each. ``sums``: what there is to be installed now; None: not known yet."""
    package = plan.state(plan.graph.builds[name]).name
    last = plan.earlier.last(package, name)
    if last is None:
        yield "it was never built"
        return
    if last.why_not:
        yield f"of build {package}/{last.key.number} {last.why_not}"
    found = False
    record = plan.records.read(package, last.key.number)
    for text in differences(record.inputs, plan.inputs[name]):
        found = True
        yield text
    for other in changed(last.key, sums) if sums is not None else ():
        found = True
        yield f"{other} is another one than build {package}/{last.key.number} had"
    if not found and not last.why_not:
        yield "an earlier build is not known to be the same"
