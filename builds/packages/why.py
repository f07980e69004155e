"""Why a package is built, or is not: what has changed since its last build, followed down to the first
cause; what it waits for, or what keeps it from being built. Everything is read, nothing changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from builds.packages.inputs import BuildInputs, differences
from builds.packages.lookup import sums_of
from builds.packages.plan import PackagePlan, wanted_of
from builds.packages.problems import Forbidden, GraphProblem, Lacking, MadeTwice, PackageLoop
from builds.packages.record import PackageRecord
from builds.packages.schedule import PackageState
from builds.packages.source import SourceState
from inventory.errors import Call, FarmhandError, UnknownName, WrongState, did_you_mean, some

ReasonKind = Literal["never", "failed", "asked", "installed", "same", "above", "needs", "outputs"]
HindranceKind = Literal["problem", "running", "failed", "waits"]
_TOLD = 20
"""Packages that one needs, of which more is told than their number."""
_DEEPEST = 60
"""Steps down to a first cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagesNow:
    """The farm's packages as `build` would take them now, before any VM is touched. ``plan``: of all
    that could be read. ``unread``: by the farm's names, why others can't be. ``unknown``: likewise, rpm
    packages of which no builder has read yet what they need. ``running``: by builds' names, who builds
    it. ``unproven``: why the builders' template can't be told, and so nothing of what has changed."""

    plan: PackagePlan
    unread: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, SourceState] = field(default_factory=dict)
    running: Mapping[str, str] = field(default_factory=dict)
    unproven: FarmhandError | None = None

    def package(self, build: str) -> str:
        """The farm's name of it, which its records have."""
        return self.plan.state(self.plan.graph.builds[build]).name

    def builds(self, package: str) -> tuple[str, ...]:
        """Names of a package's builds: by the farm's name of it, or its own, or a build's.
        UnknownName."""
        found = [
            name
            for name, build in self.plan.graph.builds.items()
            if package in (name, build.package.name, self.package(name))
        ]
        if not found:
            if why := self.unread.get(package):
                raise WrongState(f"{package} can't be read: {why}")
            if package in self.unknown:
                raise WrongState(
                    f"what {package} needs is not known before a builder has read its spec file",
                    remedy=Call("build", package=(package,)),
                )
            names = map(self.package, self.plan.graph.builds)
            known = {*self.plan.graph.builds, *names, *self.unread, *self.unknown}
            raise UnknownName(
                f"no package is called {package!r}",
                remedy=did_you_mean(package, sorted(known), f"there is {some(sorted(known)) or 'none'}"),
            )
        return tuple(found)

    def wanted(self, packages: Sequence[str], *, dependants: bool) -> tuple[str, ...]:
        """As `build` would take them: these, what they need, and what needs them. UnknownName."""
        for package in packages:
            self.builds(package)
        plan = self.plan
        return wanted_of(plan.graph, plan.states, packages, dependants=dependants)


@dataclass(frozen=True, slots=True)
class BuildReason:
    """One thing that a package is built for, in one line, and what that comes from in its turn."""

    kind: ReasonKind
    text: str
    because: tuple[BuildReason, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageWhy:
    """``build``: its name; ``last``: the build that is the same as one now would be, or else the newest
    that passed; "": none did. ``reasons``: none: nothing is to be built."""

    build: str
    package: str
    last: str = ""
    reasons: tuple[BuildReason, ...] = ()

    @property
    def certain(self) -> bool:
        """Whether it is built for sure, not only if what it needs comes out otherwise than before."""
        return any(reason.kind != "needs" for reason in self.reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hindrance:
    """What keeps a package from being built now. ``build``: whose it is; ``more``: lines that say
    more, such as the commits since it last passed."""

    kind: HindranceKind
    text: str
    build: str = ""
    more: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageWhyNot:
    """``built``: the build that is as one now would be; "": there is none. Without hindrances it only
    has to be asked for."""

    build: str
    package: str
    built: str = ""
    hindrances: tuple[Hindrance, ...] = ()


Since = Callable[[PackageRecord, PackageRecord | None, SourceState], Sequence[str]]
"""Told the build that failed, and the newest that passed: what to look at first, a line each."""


class Asking:
    """Answers about one farm at one time. ``since``: asked for builds that failed."""

    def __init__(self, now: PackagesNow, since: Since = lambda *_: ()) -> None:
        self._now = now
        self._plan = now.plan
        self._graph = now.plan.graph
        self._records = now.plan.records
        self._since = since
        self._own: dict[str, tuple[BuildReason, ...]] = {}
        self._newest: dict[str, PackageRecord | None] = {}

    @cached_property
    def _offered(self) -> Mapping[str, tuple[str, str]]:
        """What there is to be installed, by name, its version and sum: what the channel has, and what
        was built since."""
        newest = self._plan.channel.newest
        found = {name: (package.version, package.sha256) for name, package in newest.items()}
        for one in self._plan.foreseen.values():
            if one.taken is not None:
                for name, sum_ in sums_of(one.taken.packages).items():
                    found[name] = one.taken.key.version, sum_
        return found

    @cached_property
    def _makers(self) -> Mapping[str, str]:
        """The farm's packages, by what they make."""
        return {
            binary.name: self._now.package(name)
            for name, build in self._graph.builds.items()
            for binary in build.package.control.binaries
        }

    # -- why ------------------------------------------------------------------------------------------

    def why(self, build: str) -> PackageWhy:
        """UnknownName: there is no such build."""
        needed = self._needed(build)
        reasons = list(self._reasons(build))
        first = [one for one in needed if self._reasons(one)]
        for one in first[:_TOLD]:
            text = f"{one}, which it needs, is built first"
            reasons.append(BuildReason("needs", text, self._reasons(one)))
        if (more := len(first) - _TOLD) > 0:
            reasons.append(BuildReason("needs", f"so are {more} more that it needs"))
        return PackageWhy(
            build=build, package=self._now.package(build), last=self._last(build), reasons=tuple(reasons)
        )

    def _last(self, build: str) -> str:
        """The id of the build that is taken, or else of the newest that passed; "": there is none."""
        package = self._now.package(build)
        found = self._plan.foreseen[build].taken or self._plan.earlier.last(package, build)
        return f"{package}/{found.key.number}" if found else ""

    def _reasons(self, build: str) -> tuple[BuildReason, ...]:
        """Its own, as if all that it needs were built already."""
        if build not in self._own:
            taken = self._plan.foreseen[build].taken
            self._own[build] = () if taken else tuple(self._judged(build))
        return self._own[build]

    def _judged(self, build: str) -> Iterator[BuildReason]:
        package, inputs = self._now.package(build), self._plan.inputs[build]
        newest = self.last(build)
        if newest is not None and newest.result in ("failed", "interrupted"):
            yield BuildReason("failed", _failed(newest))
        last = self._plan.earlier.last(package, build)
        if last is None:
            if newest is None or newest.result == "running":
                yield BuildReason("never", "it was never built")
            return
        record = self._records.read(package, last.key.number)
        if last.why_not:
            yield BuildReason("outputs", f"of {record.id} {last.why_not}")
        for text in self._differences(record, build, inputs):
            yield BuildReason("asked", text)
        told: set[tuple[str, str]] = set()
        for one in record.inputs.installed:
            version, sum_ = self._offered.get(one.name, ("", ""))
            if one.sha256 and not sum_:
                text = f"{one.name} {one.version}: the repository has it no more"
                yield BuildReason("installed", text)
            elif one.sha256 and one.sha256 != sum_:
                yield self._changed(one.name, one.version, one.sha256, version, sum_, told)

    def _differences(self, record: PackageRecord, build: str, now: BuildInputs) -> Iterator[str]:
        state = self._plan.state(self._graph.builds[build])
        about = f" ({state.commit[:10]} {state.subject})" if state.commit else ""
        for text in differences(record.inputs, now):
            yield f"{text}{about}" if now.tree[:12] in text else text

    def _changed(
        self, name: str, version: str, sum_: str, version2: str, sum2: str,
        told: set[tuple[str, str]], depth: int = 0,
    ) -> BuildReason:  # fmt: skip
        """``told``: builds between which the way down was told already."""
        same = f"{name}: {version}, with another content" if version == version2 else ""
        text = same or f"{name}: {version} -> {version2}"
        made, before = self._maker(name, sum2), self._maker(name, sum_)
        if made is None:
            return BuildReason("installed", text)
        why = self._between(before, made, told, depth + 1)
        return BuildReason("installed", f"{text}, built as {made.id}", why)

    def _between(
        self, before: PackageRecord | None, after: PackageRecord, told: set[tuple[str, str]], depth: int
    ) -> tuple[BuildReason, ...]:
        """Why a build made something else than an earlier one, down to the first cause."""
        if before is None or before.number > after.number:
            return tuple(BuildReason("asked", line) for line in after.why)
        if (before.id, after.id) in told:
            return (BuildReason("above", "as above"),)
        if depth > _DEEPEST:
            return (BuildReason("above", "and so on"),)
        told.add((before.id, after.id))
        about = f" ({after.source.commit[:10]} {after.source.subject})" if after.source.commit else ""
        reasons = [
            BuildReason("asked", f"{text}{about if after.inputs.tree[:12] in text else ''}")
            for text in differences(before.inputs, after.inputs)
        ]
        had = {one.name: one for one in before.inputs.installed if one.sha256}
        for one in after.inputs.installed:
            old = had.get(one.name)
            if one.sha256 and old is not None and old.sha256 != one.sha256:
                sums = one.name, old.version, old.sha256, one.version, one.sha256
                reasons.append(self._changed(*sums, told, depth))
            elif one.sha256 and old is None:
                reasons.append(BuildReason("installed", f"{one.name}: {one.version}, which it had not"))
        other = {(p.name, p.version) for p in before.inputs.installed if not p.sha256}
        come = [p for p in after.inputs.installed if not p.sha256 and (p.name, p.version) not in other]
        if come and not reasons:
            named = ", ".join(f"{p.name} {p.version}" for p in come[:3])
            reasons.append(
                BuildReason("installed", f"from elsewhere: {named}{', ...' * (len(come) > 3)}")
            )
        if not reasons:
            reasons.append(BuildReason("same", f"nothing known: {before.id} was made from the same"))
        return tuple(reasons)

    def _maker(self, name: str, sum_: str) -> PackageRecord | None:
        """The build that made a package: the oldest of those with these bytes."""
        package = self._makers.get(name)
        found = None
        for number in self._records.numbers(package) if package else ():
            key = self._records.key(package or "", number)
            if key is not None and sums_of(key.packages).get(name) == sum_:
                found = key
        return self._records.read(found.package, found.number) if found else None

    # -- why not --------------------------------------------------------------------------------------

    def why_not(self, build: str) -> PackageWhyNot:
        """UnknownName: there is no such build."""
        needed = self._needed(build)
        package, taken = self._now.package(build), self._plan.foreseen[build].taken
        found = [*self._problems({build, *needed})]
        if taken is None:
            found += self._state_of(build, itself=True)
            waits = [one for one in needed if self._plan.foreseen[one].taken is None]
            causes = [one for one in waits if one in self._now.running or self._reasons(one)]
            for one in causes[:_TOLD]:
                found += self._state_of(one, itself=False)
            if others := [one for one in waits if one not in causes[:_TOLD]]:
                text = f"waits for {some(others)}, too"
                found.append(Hindrance(kind="waits", text=text))
        built = f"{package}/{taken.key.number}" if taken else ""
        return PackageWhyNot(build=build, package=package, built=built, hindrances=tuple(found))

    def _problems(self, concerned: set[str]) -> Iterator[Hindrance]:
        controls = [self._graph.builds[name].package.control for name in concerned]
        names = concerned | {one.name for one in controls}
        names |= {binary.name for one in controls for binary in one.binaries}
        others = 0
        for problem in self._graph.problems:
            if names & _about(problem):
                yield Hindrance(kind="problem", text=str(problem), more=(problem.REMEDY,))
            else:
                others += 1
        if others := others + len(self._now.unread):
            keep = "1 problem of other packages keeps"
            keep = keep if others == 1 else f"{others} problems of other packages keep"
            yield Hindrance(kind="problem", text=f"{keep} all from being built: see the graph")

    def _state_of(self, build: str, *, itself: bool) -> Iterator[Hindrance]:
        """What is the matter with it."""
        newest, who = self.last(build), "it" if itself else build
        if build in self._now.running:
            text = f"{who} is being built: {self._now.running[build]}"
            yield Hindrance(kind="running", text=text, build=build)
        elif newest is not None and newest.result in ("failed", "interrupted"):
            passed = next(self._records.passed(newest.package, build), None)
            state = self._plan.state(self._graph.builds[build])
            more = tuple(self._since(newest, passed, state))
            if since := [*differences(newest.inputs, self._plan.inputs[build])]:
                more = (*more, *(f"other than when it failed: {text}" for text in since))
            text = _failed(newest) if itself else f"waits for {build}: {_failed(newest)}"
            yield Hindrance(kind="failed", text=text, build=build, more=more)
        elif not itself:
            text = f"waits for {build}, which is to be built: {self._reasons(build)[0].text}"
            yield Hindrance(kind="waits", text=text, build=build)

    # -- states ---------------------------------------------------------------------------------------

    def states(self) -> Mapping[str, PackageState]:
        """Of all builds, in their order: passed is what is as it would be built now; failed, what did,
        and would be tried again just so."""
        found: dict[str, PackageState] = {}
        for build, one in self._plan.foreseen.items():  # what a build needs comes before it
            needs = {found.get(need.needs, "waiting") for need in self._graph.needs(build)}
            if build in self._now.running:
                found[build] = "running"
            elif one.taken is not None:
                found[build] = "passed"
            elif self._would_fail(build):
                found[build] = "failed"
            elif needs & {"failed", "skipped"}:
                found[build] = "skipped"
            else:
                found[build] = "waiting"
        return found

    def _would_fail(self, build: str) -> bool:
        newest = self.last(build)
        if newest is None or newest.result != "failed":
            return False
        return newest.inputs.asked == self._plan.inputs[build].asked

    def last(self, build: str) -> PackageRecord | None:
        """Its newest build, however it ended. One that says it is running, though nobody builds it, was
        interrupted."""
        if build not in self._newest:
            records = self._records.of(self._now.package(build))
            found = next((record for record in records if record.name == build), None)
            if found is not None and found.result == "running" and build not in self._now.running:
                found = replace(found, result="interrupted")
            self._newest[build] = found
        return self._newest[build]

    def _needed(self, build: str) -> tuple[str, ...]:
        """All that comes before it, the nearest first."""
        seen, wanted = {build: None}, deque([build])
        while wanted:
            for need in self._graph.needs(wanted.popleft()):
                if need.needs not in seen:
                    seen[need.needs] = None
                    wanted.append(need.needs)
        return tuple(seen)[1:]


def _failed(record: PackageRecord) -> str:
    """One line."""
    if record.result == "interrupted":
        return f"{record.id} was interrupted"
    kind = f" ({record.failure})" if record.failure else ""
    first = record.message.partition("\n")[0]
    return f"{record.id} failed{kind}{': ' if first else ''}{first}"


def _about(problem: GraphProblem) -> set[str]:
    """Names of builds, and of packages, that it is about."""
    match problem:
        case Lacking():
            return {name for name, _ in problem.wanted_by}
        case PackageLoop():
            return {*problem.builds, *problem.others}
        case MadeTwice():
            return {*problem.by, problem.name}
        case Forbidden():
            return {problem.build}
