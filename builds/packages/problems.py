"""What keeps a set of packages from being built; ``str`` of each is one line."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, TypeAlias

from builds.packages.relations import Relation
from inventory.errors import some

_SHOWN = 12
"""Steps of a loop."""


@dataclass(frozen=True, slots=True)
class Dependence:
    """One step from a build to what it waits for. ``who`` has the ``field`` that wants ``relation``: a
    build, or a binary package of the build ``of``. ``binary``, made by ``maker``, is what it gets."""

    who: str
    of: str
    field: str
    relation: Relation
    binary: str
    maker: str

    def __str__(self) -> str:
        called = "" if self.binary == self.relation.name else f"{self.binary} of "
        when = f" {self.relation.condition}" if self.relation.formula else ""
        return f"{self.field} of {self.who}: {self.relation}{when}, from {called}{self.maker}"


@dataclass(frozen=True, slots=True)
class MadeTwice:
    """``name``: the package's. ``by``: the source packages that make it; empty: it is one, and there
    twice."""

    REMEDY: ClassVar[str] = "have one of them make it"
    name: str
    by: tuple[str, ...]

    def __str__(self) -> str:
        if not self.by:
            return f"source package {self.name} is there twice"
        return f"{self.name} is made by {' and '.join(self.by)}"


@dataclass(frozen=True, slots=True)
class Lacking:
    """Nobody makes it, and the archive hasn't got it. ``wanted_by``: names of packages, each with the
    field that wants it. ``near``: what there is instead."""

    REMEDY: ClassVar[str] = "add the package that makes it, or a repository that has it"
    what: str
    wanted_by: tuple[tuple[str, str], ...]
    near: str

    def __str__(self) -> str:
        who = some([f"{name} ({field})" for name, field in self.wanted_by])
        return f"{self.what} is missing, for {who}" + (f"; {self.near}" if self.near else "")


@dataclass(frozen=True, slots=True)
class PackageLoop:
    """Builds of which each waits for the next, and the last for the first. ``steps``: the dependencies,
    in that order, with those of packages that are installed on the way. ``others``: builds that are in
    further loops with them."""

    REMEDY: ClassVar[str] = (
        "build one package of each loop first with a profile that leaves the dependency out"
    )
    builds: tuple[str, ...]
    steps: tuple[Dependence, ...]
    others: tuple[str, ...]

    def __str__(self) -> str:
        by = [self.builds[0], *(step.maker for step in self.steps)]
        steps = list(map(str, self.steps))
        way = [one for one, other in pairwise(by) if one != other] or by[:1]
        more = f"; in loops with them: {some(self.others)}" if self.others else ""
        whole = f"{some(way, _SHOWN, by=' -> ')} -> {way[0]}"
        return f"{whole} is a loop ({some(steps, _SHOWN, by='; ')}){more}"


@dataclass(frozen=True, slots=True)
class Forbidden:
    """A build that needs what its own Build-Conflicts forbid."""

    REMEDY: ClassVar[str] = "take one of the two out of its debian/control"
    build: str
    field: str
    what: str
    binary: str
    steps: tuple[Dependence, ...]

    def __str__(self) -> str:
        why = "; ".join(map(str, self.steps))
        return f"{self.field} of {self.build} forbids {self.what}, and it needs {self.binary} ({why})"


GraphProblem: TypeAlias = MadeTwice | Lacking | PackageLoop | Forbidden
