"""What packages want of one another, as debian/control says it: Debian Policy 7.1 and 7.7,
deb-src-control(5). ``libfoo-dev:any (>= 1:2.0~) [linux-any] <!nocheck> <cross> | libbar-dev``.

Read as dpkg reads it, and judged as dpkg judges it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

from builds.packages.architectures import concerned
from host.printable import one_line
from repositories.deb.control import compare
from repositories.packed import Damaged

_SUBSTVAR = r"\$\{[-:0-9A-Za-z]+\}"
# Each part ends where the next one can't begin: nothing is tried twice, whatever the text.
_ONE = re.compile(
    rf"""(?P<name>[A-Za-z0-9][A-Za-z0-9+.-]*)(?::(?P<qualifier>[A-Za-z0-9][A-Za-z0-9-]*))?\s*
    (?:\(\s*(?P<operator><<|<=|<|=|>>|>=|>)\s*
        (?P<version>(?:[0-9]{{1,9}}:)?(?:[0-9A-Za-z.+~-]|{_SUBSTVAR}){{1,200}})\s*\)\s*)?
    (?:\[(?P<architectures>[^\[\]<>()]+)\]\s*)?
    (?P<formula>(?:<[^<>]+>\s*)*)""",
    re.ASCII | re.VERBOSE,
)
_BEGINS = re.compile(r"([A-Za-z0-9][A-Za-z0-9+.-]*)(?![A-Za-z0-9+.$-])", re.ASCII)
_ARCHITECTURE = re.compile(r"!?[A-Za-z0-9][A-Za-z0-9-]*", re.ASCII)
_PROFILE = re.compile(r"!?[A-Za-z0-9][A-Za-z0-9+._-]*", re.ASCII)
_TERMS = re.compile(r"<([^<>]+)>")
_FORMULA = re.compile(r"\s*(?:<[^<>]+>\s*)+")
_MOST = 10_000
"""Packages in one field; what wants thousands is no source package."""
_OLD = {"<": "<=", ">": ">="}
"""Operators of long ago, with what dpkg takes them for."""

Formula: TypeAlias = tuple[tuple[str, ...], ...]
"""``<!nocheck> <cross stage1>``: any of them, each with all its profiles."""


@dataclass(frozen=True, slots=True)
class BuildTarget:
    """What is built for. ``architecture``: by its Debian name. ``profiles``: the build profiles that are
    on. ``arch``, ``indep``: whether packages of one architecture are made, and those of all."""

    architecture: str
    profiles: frozenset[str] = field(default_factory=frozenset)
    arch: bool = True
    indep: bool = True


@dataclass(frozen=True, slots=True)
class Relation:
    """One package that is wanted, or not wanted. ``operator``: of <<, <=, =, >=, >>; "": any version."""

    name: str
    qualifier: str = ""
    operator: str = ""
    version: str = ""
    architectures: tuple[str, ...] = ()
    formula: Formula = ()

    def applies(self, target: BuildTarget) -> bool:
        """Whether its [architectures] and <profiles> are the target's."""
        if self.architectures and not concerned(target.architecture, self.architectures):
            return False
        return holds(self.formula, target.profiles)

    def admits(self, version: str | None) -> bool:
        """``version``: of what there is; "": not known, which does; None: it has none, as virtual
        packages often have."""
        if not self.operator or version == "" or "$" in self.version:
            return True
        if version is None:
            return False
        order = _compared(version, self.version)
        return (order < 0 and "<" in self.operator) or (order > 0 and ">" in self.operator) or (
            order == 0 and "=" in self.operator
        )  # fmt: skip

    @property
    def condition(self) -> str:
        """``<!nocheck> <cross>``; "": always."""
        return " ".join(f"<{' '.join(terms)}>" for terms in self.formula)

    def __str__(self) -> str:
        """What is wanted, without when."""
        return (
            self.name
            + (f":{self.qualifier}" if self.qualifier else "")
            + (f" ({self.operator} {self.version})" if self.operator else "")
        )


@lru_cache(maxsize=2**14)
def _compared(one: str, other: str) -> int:
    """Many want the same."""
    return compare(one, other)


Clause: TypeAlias = tuple[Relation, ...]
"""Alternatives, in the order in which they stand."""


def shown(clause: Clause) -> str:
    return " | ".join(map(str, clause))


def applying(clauses: Sequence[Clause], target: BuildTarget) -> Iterator[Clause]:
    """What is left of them for a target."""
    for clause in clauses:
        if left := tuple(relation for relation in clause if relation.applies(target)):
            yield left


def holds(formula: Formula, profiles: Collection[str]) -> bool:
    """Whether a formula is true with these profiles on; an empty one is."""
    return not formula or any(
        all((term.removeprefix("!") in profiles) is not term.startswith("!") for term in terms)
        for terms in formula
    )


def formula_of(text: str, name: str) -> Formula:
    """``<!nocheck> <cross>``. ``name``: the field's. Damaged."""
    found = tuple(tuple(terms.split()) for terms in _TERMS.findall(text))
    whole = _FORMULA.fullmatch(text) and all(found)
    if not whole or not all(_PROFILE.fullmatch(term) for terms in found for term in terms):
        raise Damaged(_unreadable(name, text))
    return found


def clauses_of(text: str, name: str, *, binary: bool = False) -> tuple[Clause, ...]:
    """A field's value. ``name``: the field's. ``binary``: it is a binary package's, and what only the
    build fills in (``${shlibs:Depends}``) is left out. Damaged: dpkg would not take it."""
    if text.count(",") + text.count("|") > _MOST:
        raise Damaged(f"its {name} has more than {_MOST} packages")
    found = []
    for part in text.split(","):
        if not part.strip():
            continue  # a comma at the end, as dpkg has it
        read = (_relation(one.strip(), name, binary) for one in part.split("|"))
        if clause := tuple(relation for relation in read if relation):
            found.append(clause)
    return tuple(found)


def _relation(text: str, name: str, binary: bool) -> Relation | None:
    match = _ONE.fullmatch(text)
    if match is None or (not binary and "$" in text):
        if binary and "${" in text:
            begun = _BEGINS.match(text)
            return Relation(begun[1]) if begun else None
        raise Damaged(_unreadable(name, text))
    operator = match["operator"] or ""
    architectures = tuple((match["architectures"] or "").split())
    bracketed = match["architectures"] is not None
    if bracketed and not (architectures and all(map(_ARCHITECTURE.fullmatch, architectures))):
        raise Damaged(_unreadable(name, text))
    return Relation(
        match["name"],
        match["qualifier"] or "",
        _OLD.get(operator, operator),
        match["version"] or "",
        architectures,
        formula_of(match["formula"], name) if match["formula"] else (),
    )


def _unreadable(name: str, text: str) -> str:
    return f"its {name} has {one_line(text, 80)!r}, which dpkg can't read"
