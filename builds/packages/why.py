"""Why a package is built, or is not: what has changed since its last build, followed down to the first
cause; what it waits for, or what keeps it from being built. Everything is read, nothing changed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from builds.packages.graph import Graph
from builds.packages.inputs import BuildInputs, InstalledPackage, differences
from builds.packages.lookup import EarlierBuilds, sums_of
from builds.packages.problems import Forbidden, GraphProblem, Lacking, MadeTwice, PackageLoop
from builds.packages.record import PackageRecord, PackageRecords
from builds.packages.schedule import PackageState
from builds.packages.source import SourceState
from repositories.package import Package

ReasonKind = Literal["never", "failed", "asked", "installed", "same", "above", "needs", "outputs"]
HindranceKind = Literal["problem", "running", "failed", "waits", "source"]
_WAITED_FOR = 20
"""Packages that one waits for, that are told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagesNow:
    """The farm's packages as `build` would take them now, before any VM is touched. ``states``: by the
    source packages' own names. ``inputs``: by builds' names, what each is asked for. ``offered``: what
    the repository has for them, by name. ``unread``: by source packages' own names, why their sources
    can't be read. ``unknown``: rpm packages whose spec files no builder has read yet. ``running``: by
    builds' names, who builds it."""

    graph: Graph
    states: Mapping[str, SourceState]
    inputs: Mapping[str, BuildInputs]
    offered: Mapping[str, Package]
    unread: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    running: Mapping[str, str] = field(default_factory=dict)

    def package(self, build: str) -> str:
        """The farm's name of it, which its records have."""
        source = self.graph.builds[build].package.name
        return self.states[source].name if source in self.states else source


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that a package is built for, in one line, and what that comes from in its turn."""

    kind: ReasonKind
    text: str
    because: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageWhy:
    """``build``: its name; ``last``: the build that is the same as one now would be, or else the newest
    that passed; "": none did. ``reasons``: none: nothing is to be built."""

    build: str
    package: str
    last: str = ""
    reasons: tuple[Reason, ...] = ()

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


Since = Callable[[PackageRecord, PackageRecord | None, SourceState | None], Sequence[str]]
"""Told the build that failed, and the newest that passed: what to look at first, a line each."""


class Asking:
    """Answers about one farm at one time. ``since``: asked for builds that fail."""

    def __init__(self, now: PackagesNow, records: PackageRecords, since: Since = lambda *_: ()) -> None:
        self._now = now
        self._records = records
        self._earlier = EarlierBuilds(records)
        self._since = since
        self._sums = {name: package.sha256 for name, package in now.offered.items()}
        self._own: dict[str, PackageWhy] = {}
        self._newest: dict[str, PackageRecord | None] = {}
        self._makers = {
            binary.name: now.package(name)
            for name, build in now.graph.builds.items()
            for binary in build.package.control.binaries
        }

    # -- why ------------------------------------------------------------------------------------------

    def why(self, build: str) -> PackageWhy:
        """NotFound: there is no such build."""
        needed = self._needed(build)
        own = self._own_reasons(build)
        first = [one for one in needed if self._own_reasons(one).reasons]
        reasons = [
            *own.reasons,
            *(
                Reason("needs", f"{one}, which it needs, is built first", self._own_reasons(one).reasons)
                for one in first
            ),
        ]
        return PackageWhy(build=build, package=own.package, last=own.last, reasons=tuple(reasons))

    def _own_reasons(self, build: str) -> PackageWhy:
        """As if all that it needs were built already."""
        if build not in self._own:
            self._own[build] = self._judged(build)
        return self._own[build]

    def _judged(self, build: str) -> PackageWhy:
        package, inputs = self._now.package(build), self._now.inputs.get(build)
        fits = inputs and self._earlier.fitting(package, build, inputs.asked, self._sums)
        if fits:
            return PackageWhy(build=build, package=package, last=f"{package}/{fits.key.number}")
        reasons: list[Reason] = []
        newest = self._newest_of(build)
        if newest is not None and newest.result in ("failed", "interrupted"):
            reasons.append(Reason("failed", _failed(newest)))
        last = self._earlier.last(package, build)
        if last is None:
            reasons = reasons or [Reason("never", "it was never built")]
            return PackageWhy(build=build, package=package, reasons=tuple(reasons))
        record = self._records.read(package, last.key.number)
        if last.why_not:
            reasons.append(Reason("outputs", f"of {record.id} {last.why_not}"))
        if inputs is not None:
            reasons += (Reason("asked", text) for text in self._differences(record, build, inputs))
        told: set[tuple[str, str]] = set()
        for one in record.inputs.installed:
            offered = self._now.offered.get(one.name)
            if one.sha256 and self._sums.get(one.name) != one.sha256:
                reasons.append(self._installed(one, offered, told))
        return PackageWhy(build=build, package=package, last=record.id, reasons=tuple(reasons))

    def _differences(self, record: PackageRecord, build: str, now: BuildInputs) -> Iterator[str]:
        state = self._now.states.get(self._now.graph.builds[build].package.name)
        for text in differences(record.inputs, now):
            commit = state is not None and state.commit and record.inputs.tree != now.tree
            if commit and state is not None and now.tree[:12] in text:
                yield f"{text} ({state.commit[:10]} {state.subject})"
            else:
                yield text

    def _installed(
        self, had: InstalledPackage, now: Package | None, told: set[tuple[str, str]]
    ) -> Reason:
        """A package that was installed from the repository, and is another one there now."""
        if now is None:
            return Reason("installed", f"{had.name} {had.version}: the repository has it no more")
        return self._changed(had.name, had.version, had.sha256, now.version, now.sha256, told)

    def _changed(
        self, name: str, version: str, sum_: str, version2: str, sum2: str, told: set[tuple[str, str]]
    ) -> Reason:
        same = f"{name}: {version}, with another content" if version == version2 else ""
        text = same or f"{name}: {version} -> {version2}"
        made, before = self._maker(name, sum2), self._maker(name, sum_)
        if made is None:
            return Reason("installed", text)
        return Reason("installed", f"{text}, built as {made.id}", self._between(before, made, told))

    def _between(
        self, before: PackageRecord | None, after: PackageRecord, told: set[tuple[str, str]]
    ) -> tuple[Reason, ...]:
        """Why a build made something else than an earlier one, down to the first cause."""
        if before is None or before.number > after.number:
            return tuple(Reason("asked", line) for line in after.why)
        if (before.id, after.id) in told:
            return (Reason("above", "as above"),)
        told.add((before.id, after.id))
        about = f" ({after.source.commit[:10]} {after.source.subject})" if after.source.commit else ""
        reasons = [
            Reason("asked", f"{text}{about if after.inputs.tree[:12] in text else ''}")
            for text in differences(before.inputs, after.inputs)
        ]
        had = {one.name: one for one in before.inputs.installed if one.sha256}
        for one in after.inputs.installed:
            old = had.get(one.name)
            if one.sha256 and old is not None and old.sha256 != one.sha256:
                reasons.append(
                    self._changed(one.name, old.version, old.sha256, one.version, one.sha256, told)
                )
            elif one.sha256 and old is None:
                reasons.append(Reason("installed", f"{one.name}: {one.version}, which it had not"))
        other = {(p.name, p.version) for p in before.inputs.installed if not p.sha256}
        come = [p for p in after.inputs.installed if not p.sha256 and (p.name, p.version) not in other]
        if come and not reasons:
            named = ", ".join(f"{p.name} {p.version}" for p in come[:3])
            reasons.append(Reason("installed", f"from elsewhere: {named}{', ...' * (len(come) > 3)}"))
        if not reasons:
            reasons.append(Reason("same", f"nothing known: {before.id} was made from the same"))
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
        """NotFound: there is no such build."""
        needed = self._needed(build)
        own = self._own_reasons(build)
        waits = [one for one in needed if self._own_reasons(one).reasons]
        found = [*self._problems({build, *needed})]
        if own.reasons or waits:
            found += self._state_of(build, itself=True)
            for one in waits[:_WAITED_FOR]:
                found += self._state_of(one, itself=False)
            if more := len(waits) - _WAITED_FOR:
                found += [Hindrance(kind="waits", text=f"and for {more} more")] if more > 0 else []
        built = "" if own.reasons or waits else own.last
        return PackageWhyNot(build=build, package=own.package, built=built, hindrances=tuple(found))

    def _problems(self, concerned: set[str]) -> Iterator[Hindrance]:
        builds = self._now.graph.builds
        for name in sorted(concerned):
            if why := self._now.unread.get(builds[name].package.name):
                yield Hindrance(kind="source", text=why, build=name)
        controls = [builds[name].package.control for name in concerned]
        names = concerned | {one.name for one in controls}
        names |= {binary.name for one in controls for binary in one.binaries}
        others = 0
        for problem in self._now.graph.problems:
            if names & _about(problem):
                yield Hindrance(kind="problem", text=str(problem), more=(f"{problem.REMEDY}",))
            else:
                others += 1
        if others:
            what = "problem" if others == 1 else "problems"
            text = f"{others} {what} of other packages; the graph names them"
            yield Hindrance(kind="problem", text=text)

    def _state_of(self, build: str, *, itself: bool) -> Iterator[Hindrance]:
        """What is the matter with it."""
        newest = self._newest_of(build)
        who = "it" if itself else build
        if build in self._now.running:
            text = f"{who} is being built: {self._now.running[build]}"
            yield Hindrance(kind="running", text=text, build=build)
        elif newest is not None and newest.result in ("failed", "interrupted"):
            state = self._now.states.get(self._now.graph.builds[build].package.name)
            passed = next(self._records.passed(newest.package, build), None)
            more = tuple(self._since(newest, passed, state))
            text = _failed(newest) if itself else f"waits for {build}: {_failed(newest)}"
            yield Hindrance(kind="failed", text=text, build=build, more=more)
        elif not itself:
            first = self._own_reasons(build).reasons[0]
            text = f"waits for {build}, which is to be built: {first.text}"
            yield Hindrance(kind="waits", text=text, build=build)

    # -- states ---------------------------------------------------------------------------------------

    def states(self) -> Mapping[str, PackageState]:
        """Of all builds, in their order: passed is what is as it would be built now; failed, what did
        when it was last built."""
        found: dict[str, PackageState] = {}
        for build in self._now.graph.builds:  # what a build needs comes before it, but in loops
            needs = {found.get(need.needs, "waiting") for need in self._now.graph.needs(build)}
            newest = self._newest_of(build)
            if build in self._now.running:
                found[build] = "running"
            elif self._own_reasons(build).reasons and newest is not None and newest.result == "failed":
                found[build] = "failed"
            elif needs & {"failed", "skipped"}:
                found[build] = "skipped"
            elif not self._own_reasons(build).reasons and not needs - {"passed"}:
                found[build] = "passed"
            else:
                found[build] = "waiting"
        return found

    def last(self, build: str) -> PackageRecord | None:
        """Its newest build, however it ended. One that says it is running, though nobody builds it, was
        interrupted."""
        return self._newest_of(build)

    def _newest_of(self, build: str) -> PackageRecord | None:
        if build not in self._newest:
            records = self._records.of(self._now.package(build))
            found = next((record for record in records if record.name == build), None)
            if found is not None and found.result == "running" and build not in self._now.running:
                found = replace(found, result="interrupted")
            self._newest[build] = found
        return self._newest[build]

    def _needed(self, build: str) -> tuple[str, ...]:
        """All that comes before it, the nearest first."""
        graph = self._now.graph
        seen, wanted = {build: None}, deque([build])
        while wanted:
            for need in graph.needs(wanted.popleft()):
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
            return {*problem.by, problem.what.rpartition(" ")[2]}
        case Forbidden():
            return {problem.build}
