"""The dependency graph of a set of source packages: who is built before whom, and why.

A build comes after all that makes what is installed for it: its build dependencies, and what these
depend on at run time in their turn. Rules:

- Of alternatives the first one that can be had counts, as apt and sbuild choose. A name that the set
  makes is the set's, whatever the archive has, if its version fits; else it is the archive's.
- A real package comes before virtual ones. Of several that provide a name all are waited for: which one
  apt takes must not hang on which was ready first.
- What a package needs of itself, an earlier version, is the archive's; if that has none, it is a loop.
- Packages that need each other at run time alone are no loop: they are installed together.
- ``bootstrap``: profiles by packages that are built first with them, then again without. It is done
  where a loop needs it, as a build of its own, "foo (stage1)"; those in the loop get what it makes, all
  others what the last build does.

Not looked at: what the archive's own packages need of the set's, and build-essential."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from builds.packages.archive import Everything, Outside
from builds.packages.components import components
from builds.packages.control import BinaryControl, SourceControl
from builds.packages.problems import (
    Dependence,
    Forbidden,
    GraphProblem,
    Lacking,
    MadeTwice,
    PackageLoop,
)
from builds.packages.relations import BuildTarget, Clause, Relation, applying, shown
from builds.packages.schedule import Schedule
from inventory.errors import NotFound, UnknownName, WrongState, did_you_mean, some


@dataclass(frozen=True, slots=True)
class SourcePackage:
    """``version``: by its changelog, or by the farm's policy; "": not known yet, and any will do.
    ``versions``: of binary packages that have their own, by name."""

    control: SourceControl
    version: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.control.name


@dataclass(frozen=True, slots=True, eq=False)
class PackageBuild:
    """A node: a source package that is built for a target. ``name``: the package's, with its profiles in
    brackets where it is a bootstrap: ``foo (stage1)``. ``bootstrap``: those profiles."""

    name: str
    package: SourcePackage
    target: BuildTarget
    bootstrap: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackageNeed:
    """An edge: ``build`` comes after ``needs``. ``steps``: the dependencies that make it so; the first
    is the build's own, others are those of packages that are installed for it."""

    build: str
    needs: str
    steps: tuple[Dependence, ...]

    @property
    def direct(self) -> bool:
        return len(self.steps) == 1


class _Made(NamedTuple):
    """A binary package, by the build that makes it."""

    build: PackageBuild
    binary: BinaryControl
    version: str

    def answers(self, relation: Relation) -> bool:
        """By its own name."""
        target, all_ = self.build.target, "all" in self.binary.architectures
        match relation.qualifier:
            case "":
                fits = True
            case "any":
                fits = self.binary.multi_arch == "allowed"
            case "native":
                fits = self.binary.multi_arch != "foreign"
            case other:
                fits = other == target.architecture and not all_
        return fits and relation.admits(self.version)


class _Installed(NamedTuple):
    """A vertex: a binary package that some build has installed. ``loop``: within which bootstrapped
    loop; None: outside of them."""

    made: _Made
    loop: int | None

    @property
    def name(self) -> str:
        return self.made.binary.name

    @property
    def build(self) -> PackageBuild:
        return self.made.build


_Vertex: TypeAlias = PackageBuild | _Installed
_Why: TypeAlias = tuple[str, Relation] | None
"""The field and what it says of an edge to a binary package; None for one from there to who makes it."""


class Graph:
    """A set's builds, from ``graph_of``. Whatever it hands out stands in an order that depends on the
    packages alone. ``problems``: all that keeps it from being built."""

    def __init__(
        self,
        vertices: Sequence[_Vertex],
        edges: Sequence[Mapping[int, _Why]],
        problems: Sequence[GraphProblem],
    ) -> None:
        self._vertices = vertices
        self._edges = edges
        self._groups = components(edges)
        self._group = _positions(self._groups)
        self._layer = self._layers()
        found = [v for v in vertices if isinstance(v, PackageBuild)]
        self._number = {v.name: n for n, v in enumerate(vertices) if isinstance(v, PackageBuild)}
        found.sort(key=lambda build: (self.layer(build.name), build.name))
        self.builds: Mapping[str, PackageBuild] = {build.name: build for build in found}
        self.problems: tuple[GraphProblem, ...] = (*problems, *self._loops(), *self._forbidden())

    @property
    def layers(self) -> tuple[tuple[str, ...], ...]:
        """Names of builds. Each needs none of its own layer (but those of a loop), only earlier ones."""
        found: dict[int, list[str]] = defaultdict(list)
        for name in self.builds:
            found[self.layer(name)].append(name)
        return tuple(tuple(found[layer]) for layer in sorted(found))

    def layer(self, name: str) -> int:
        """From 0."""
        return self._layer[self._group[self._number[name]]]

    def needs(self, name: str) -> tuple[PackageNeed, ...]:
        """Of a build, each with the shortest way to it. What an installed package needs at run time is
        left out if the package's own build had it installed, too: that comes earlier still.
        UnknownName."""
        start = self._known(name)
        return tuple(
            PackageNeed(name, self._name(end), self._steps(path))
            for end, path in sorted(self._reached(start), key=lambda found: self._name(found[0]))
        )

    def dependants(self, name: str) -> tuple[str, ...]:
        """All that comes after a build, directly or not, in the order of building. UnknownName."""
        before = self._users()
        reached, wanted = {self._known(name)}, [self._known(name)]
        while wanted:
            for user in before[wanted.pop()]:
                if user not in reached:
                    reached.add(user)
                    wanted.append(user)
        return tuple(one for one in self.builds if one != name and self._number[one] in reached)

    def loops_with(self, name: str, other: str) -> bool:
        """Whether two builds are in one loop."""
        return self._group[self._number[name]] == self._group[self._number[other]]

    def schedule(self, wanted: Iterable[str] | None = None) -> Schedule:
        """``wanted``: the builds that are to be done, others are as good as done; None: all of them.
        WrongState: there are problems. UnknownName: there is no such build."""
        if self.problems:
            lines = list(map(str, self.problems))
            remedies = dict.fromkeys(problem.REMEDY for problem in self.problems)
            raise WrongState(
                f"the packages can't be built: {some(lines, by='; ')}",
                remedy="; ".join(remedies),
                detail="\n".join(lines) if len(lines) > 1 else "",
            )
        chosen = None if wanted is None else {self._known(name) for name in wanted}
        names = {self._group[number]: name for name, number in self._number.items()}
        needs: dict[int, set[int]] = {group: set() for group in range(len(self._groups))}
        for number, edges in enumerate(self._edges):
            group = self._group[number]
            needs[group].update(self._group[end] for end in edges if self._group[end] != group)
        done = frozenset[int]() if chosen is None else {*self._number.values()} - chosen
        return Schedule(names, needs, frozenset(self._group[number] for number in done))

    def _known(self, name: str) -> int:
        if name not in self._number:
            near = did_you_mean(name, [*self._number], "")
            raise UnknownName(f"no package {name!r} is built", remedy=near)
        return self._number[name]

    def _name(self, number: int) -> str:
        return self._vertices[number].name

    def _layers(self) -> list[int]:
        """By groups; those that a group needs stand before it. A binary package is in the layer that is
        begun when it is there."""
        found: list[int] = []
        after: list[int] = []
        for group in self._groups:
            ends = (self._group[end] for vertex in group for end in self._edges[vertex])
            layer = max((after[end] for end in ends if end < len(after)), default=0)
            found.append(layer)
            after.append(layer + any(isinstance(self._vertices[v], PackageBuild) for v in group))
        return found

    def _users(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in self._vertices]
        for number, edges in enumerate(self._edges):
            for end in edges:
                found[end].append(number)
        return found

    def _reached(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """The builds that one waits for, with the vertices on the way, by way of what is installed."""
        came = {start: start}
        wanted = deque([start])
        while wanted:
            number = wanted.popleft()
            vertex = self._vertices[number]
            earlier: Mapping[int, _Why] = {}
            if isinstance(vertex, _Installed):
                earlier = self._edges[self._number[vertex.build.name]]
            for end in self._edges[number]:
                if end in came or end in earlier:
                    continue
                came[end] = number
                if isinstance(self._vertices[end], PackageBuild):
                    yield end, _way(came, start, end)
                else:
                    wanted.append(end)

    def _steps(self, path: Sequence[int]) -> tuple[Dependence, ...]:
        found = []
        for one, other in pairwise(path):
            why, vertex = self._edges[one][other], self._vertices[other]
            if why and isinstance(vertex, _Installed):
                field_, relation = why
                who = self._vertices[one]
                of = who.build.name if isinstance(who, _Installed) else ""
                found.append(Dependence(who.name, of, field_, relation, vertex.name, vertex.build.name))
        return tuple(found)

    def _loops(self) -> Iterator[PackageLoop]:
        """Of each knot of builds the shortest one."""
        found = []
        for group in self._groups:
            builds = sorted(
                (n for n in group if isinstance(self._vertices[n], PackageBuild)), key=self._name
            )
            if not builds or len(group) == 1:
                continue
            inside, best = set(group), list[int]()
            for start in self._forks(builds, inside) or builds[:1]:
                best = self._back(start, inside, len(best)) or best
            first = best.index(next(n for n in builds if n in best))
            way = [*best[first:-1], *best[: first + 1]]
            on_it = [n for n in way[:-1] if isinstance(self._vertices[n], PackageBuild)]
            others = sorted({*builds} - {*on_it}, key=self._name)
            names = tuple(map(self._name, on_it))
            found.append(PackageLoop(names, self._steps(way), tuple(map(self._name, others))))
        yield from sorted(found, key=lambda loop: loop.builds)

    def _forks(self, builds: Iterable[int], inside: set[int]) -> list[int]:
        """Those of a knot's builds that have a choice before the next one is come to. A loop that goes
        by others alone goes by one of these, too, or it is the whole knot."""
        found = []
        for start in builds:
            number = start
            while len(ends := [end for end in self._edges[number] if end in inside]) == 1:
                number = ends[0]
                if isinstance(self._vertices[number], PackageBuild):
                    break
            else:
                found.append(start)
        return found

    def _back(self, start: int, inside: set[int], most: int) -> list[int]:
        """The shortest way from a vertex to itself, if it is of less than ``most`` vertices (0: any)."""
        came = {start: start}
        here, length = [start], 1
        while here and (not most or length + 1 < most):
            next_: list[int] = []
            for number in here:
                for end in self._edges[number]:
                    if end == start:
                        return [*_way(came, start, number), start]
                    if end in inside and end not in came:
                        came[end] = number
                        next_.append(end)
            here, length = next_, length + 1
        return []

    def _forbidden(self) -> Iterator[Forbidden]:
        """Builds that need what their Build-Conflicts forbid."""
        for name, build in sorted(self.builds.items()):
            forbidden = list(build.package.control.forbids(build.target))
            if not forbidden:
                continue
            start = self._number[name]
            came, wanted = {start: start}, deque([start])
            while wanted:
                number = wanted.popleft()
                vertex = self._vertices[number]
                if isinstance(vertex, _Installed):
                    for field_, clause in forbidden:
                        if any(_is(vertex.made, relation) for relation in clause):
                            steps = self._steps(_way(came, start, number))
                            yield Forbidden(name, field_, shown(clause), vertex.name, steps)
                for end in self._edges[number]:
                    if end not in came and isinstance(self._vertices[end], _Installed):
                        came[end] = number
                        wanted.append(end)


def graph_of(
    packages: Iterable[SourcePackage],
    target: BuildTarget,
    outside: Outside | None = None,
    bootstrap: Mapping[str, Sequence[str]] | None = None,
    profiles: Mapping[str, Sequence[str]] | None = None,
) -> Graph:
    """The graph of a set, whatever its order. ``outside``: what can be had without being built; None:
    whatever the set doesn't make. ``bootstrap``, ``profiles``: build profiles by the names of source
    packages: those that they are built first with, where a loop needs it, and those they always are.
    All that is wrong is in the graph's ``problems``. NotFound: the set has no such package to
    bootstrap."""
    set_: dict[str, SourcePackage] = {}
    twice = []
    for package in packages:
        if package.name in set_:
            twice.append(MadeTwice(package.name, ()))
        set_.setdefault(package.name, package)
    ordered = {name: set_[name] for name in sorted(set_)}
    stages = {}
    for name, first in (bootstrap or {}).items():
        if name not in ordered:
            near = did_you_mean(name, [*ordered], "")
            raise NotFound(f"there is no package {name!r} to be built first with a profile", remedy=near)
        stages[name] = tuple(first)
    targets = {
        name: replace(target, profiles=target.profiles | set((profiles or {}).get(name, ())))
        for name in ordered
    }
    maker = _GraphMaker(ordered, targets, outside or Everything(), stages)
    return maker.graph(twice)


class _GraphMaker:
    def __init__(
        self,
        packages: Mapping[str, SourcePackage],
        targets: Mapping[str, BuildTarget],
        outside: Outside,
        stages: Mapping[str, tuple[str, ...]],
    ) -> None:
        self._outside = outside
        self._builds = {name: PackageBuild(name, one, targets[name]) for name, one in packages.items()}
        self._stages = {
            name: PackageBuild(
                f"{name} ({' '.join(profiles)})",
                packages[name],
                replace(targets[name], profiles=targets[name].profiles | set(profiles)),
                profiles,
            )
            for name, profiles in stages.items()
        }
        self._real: dict[str, _Made] = {}
        self._provided: dict[str, list[tuple[_Made, str | None]]] = defaultdict(list)
        self._unmade: dict[str, str] = {}
        self._twice: dict[str, list[str]] = defaultdict(list)
        for build in self._builds.values():
            self._enter(build)

    def _enter(self, build: PackageBuild) -> None:
        """What it makes; what its bootstrap alone makes, too."""
        stage = self._stages.get(build.name)
        for binary in build.package.control.binaries:
            if not binary.made_for(build.target) and not (stage and binary.made_for(stage.target)):
                self._unmade.setdefault(binary.name, build.name)
                continue
            made = _made_by(build, binary)
            if binary.name in self._real:
                self._twice[binary.name] += [self._real[binary.name].build.name, build.name]
                continue
            self._real[binary.name] = made
            for relation, *_ in applying(binary.provides, build.target):
                self._provided[relation.name].append((made, _provided_version(relation, made)))

    def graph(self, twice: Sequence[GraphProblem]) -> Graph:
        loops: dict[str, int] = {}
        if self._stages:
            first = _GraphWalk(self, {})
            first.walk(self._builds.values())
            for number, group in enumerate(components(first.edges)):
                found = [first.vertices[n] for n in group]
                names = [one.name for one in found if isinstance(one, PackageBuild)]
                if len(group) > 1 and any(name in self._stages for name in names):
                    loops.update(dict.fromkeys(names, number))
        last = _GraphWalk(self, loops)
        last.walk(self._builds.values())
        problems = [
            *twice,
            *(MadeTwice(name, tuple(dict.fromkeys(by))) for name, by in sorted(self._twice.items())),
            *(
                Lacking(what, tuple(sorted(who)), self._near(relations))
                for what, (relations, who) in sorted(last.lacking.items())
            ),
        ]
        return Graph(last.vertices, last.edges, problems)

    def resolved(
        self, clause: Clause, build: PackageBuild | None, loop: int | None, loops: Mapping[str, int]
    ) -> tuple[Relation, list[_Made]] | None:
        """The alternative that counts, and who of the set makes it: nobody where it is from outside.
        None: it can't be had. ``build``: which wants it, and doesn't wait for itself if it needn't."""
        for relation in clause:
            makers = [self._within(made, loop, loops) for made in self._makers(relation)]
            others = [made for made in makers if made.build is not build]
            if others:
                return relation, others
            if self._outside.has(relation):
                return relation, []
            if makers:
                return relation, makers
        return None

    def _makers(self, relation: Relation) -> list[_Made]:
        made = self._real.get(relation.name)
        if made and made.answers(relation):
            return [made]
        provided = self._provided.get(relation.name, ())
        return [made for made, version in provided if relation.admits(version)]

    def _within(self, made: _Made, loop: int | None, loops: Mapping[str, int]) -> _Made:
        """As a loop has it: from the bootstrap, if that makes it."""
        name, binary = made.build.name, made.binary
        stage = self._stages.get(name)
        if stage and loop is not None and loops.get(name) == loop and binary.made_for(stage.target):
            return made._replace(build=stage)
        return made

    def _near(self, relations: Iterable[Relation]) -> str:
        """What there is instead."""
        for relation in relations:
            if made := self._real.get(relation.name):
                return f"{made.build.name} makes {relation.name} {made.version}".rstrip()
            if relation.name in self._unmade:
                return f"{self._unmade[relation.name]} doesn't make {relation.name} for this target"
        return ""


class _GraphWalk:
    """From the builds along all that is installed for them. ``loops``: those with bootstraps, by the
    builds in them."""

    def __init__(self, maker: _GraphMaker, loops: Mapping[str, int]) -> None:
        self._maker = maker
        self._loops = loops
        self._numbers: dict[_Vertex, int] = {}
        self.vertices: list[_Vertex] = []
        self.edges: list[dict[int, _Why]] = []
        self.lacking: dict[str, tuple[Clause, set[tuple[str, str]]]] = {}
        self._wanted: deque[_Vertex] = deque()

    def walk(self, builds: Iterable[PackageBuild]) -> None:
        for build in builds:
            self._vertex(build)
        while self._wanted:
            vertex = self._wanted.popleft()
            edges = self.edges[self._numbers[vertex]]
            if isinstance(vertex, PackageBuild):
                loop = self._loops.get(vertex.package.name)
                for field_, clause in vertex.package.control.wants(vertex.target):
                    self._want(edges, vertex.name, field_, clause, vertex, loop)
                continue
            edges[self._vertex(vertex.build)] = None
            for field_, clauses in vertex.made.binary.depends.items():
                for clause in applying(clauses, vertex.build.target):
                    self._want(edges, vertex.name, field_, clause, None, vertex.loop)

    def _want(
        self,
        edges: dict[int, _Why],
        who: str,
        field_: str,
        clause: Clause,
        build: PackageBuild | None,
        loop: int | None,
    ) -> None:
        found = self._maker.resolved(clause, build, loop, self._loops)
        if found is None:
            self.lacking.setdefault(shown(clause), (clause, set()))[1].add((who, field_))
            return
        relation, makers = found
        for made in makers:
            end = self._vertex(_Installed(made, loop))
            edges.setdefault(end, (field_, relation))

    def _vertex(self, vertex: _Vertex) -> int:
        number = self._numbers.get(vertex)
        if number is None:
            number = self._numbers[vertex] = len(self.vertices)
            self.vertices.append(vertex)
            self.edges.append({})
            self._wanted.append(vertex)
        return number


def _made_by(build: PackageBuild, binary: BinaryControl) -> _Made:
    package = build.package
    return _Made(build, binary, package.versions.get(binary.name, package.version))


def _provided_version(relation: Relation, made: _Made) -> str | None:
    if not relation.operator:
        return None
    if relation.version in ("${binary:Version}", "${source:Version}"):
        return made.version
    return "" if "$" in relation.version else relation.version


def _is(made: _Made, relation: Relation) -> bool:
    if made.binary.name == relation.name:
        return made.answers(relation)
    return any(
        one.name == relation.name and relation.admits(_provided_version(one, made))
        for one, *_ in applying(made.binary.provides, made.build.target)
    )


def _way(came: Mapping[int, int], start: int, end: int) -> list[int]:
    found = [end]
    while found[-1] != start:
        found.append(came[found[-1]])
    return found[::-1]


def _positions(groups: Sequence[Sequence[int]]) -> dict[int, int]:
    return {vertex: number for number, group in enumerate(groups) for vertex in group}
