"""debian/control of a source package: what it is called, what its build wants, and the binary packages
that it makes. deb-src-control(5), Debian Policy 5.2.

It is a stranger's text: bounded, and refused where dpkg refuses it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from builds.packages.architectures import matches
from builds.packages.relations import (
    BuildTarget,
    Clause,
    Formula,
    applying,
    clauses_of,
    formula_of,
    holds,
)
from host.printable import one_line
from inventory.errors import Unfit
from inventory.sizes import format_size
from repositories.deb.control import fields_of, text_of
from repositories.packed import Damaged

_MOST = 4 * 2**20
"""Bytes; the kernel's, with hundreds of packages, has a tenth of it."""
_MOST_PACKAGES = 5000
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]{1,199}")
_ARCHITECTURES = re.compile(r"[a-z0-9][a-z0-9-]*(?:\s+[a-z0-9][a-z0-9-]*)*")
_KINDS = ("", "-Arch", "-Indep")
_INSTALLED_WITH = ("Pre-Depends", "Depends")


@dataclass(frozen=True, slots=True, eq=False)
class BinaryControl:
    """A binary package, as its source declares it. ``depends``: fields, each with what installing it
    needs besides, as far as that is known before the build. ``provides``: names of others that it
    stands for, a version after some of them."""

    name: str
    architectures: tuple[str, ...]
    multi_arch: str
    formula: Formula
    depends: Mapping[str, tuple[Clause, ...]]
    provides: tuple[Clause, ...]

    def made_for(self, target: BuildTarget) -> bool:
        """Whether a build for ``target`` makes it."""
        if not holds(self.formula, target.profiles):
            return False
        if "all" in self.architectures and target.indep:
            return True
        return target.arch and any(
            name != "all" and matches(target.architecture, name) for name in self.architectures
        )


@dataclass(frozen=True, slots=True)
class SourceControl:
    """``depends``, ``conflicts``: by their fields: Build-Depends, Build-Depends-Arch and so on."""

    name: str
    depends: Mapping[str, tuple[Clause, ...]]
    conflicts: Mapping[str, tuple[Clause, ...]]
    binaries: tuple[BinaryControl, ...]

    def wants(self, target: BuildTarget) -> Iterator[tuple[str, Clause]]:
        """What a build for ``target`` needs, each with its field."""
        yield from _for(self.depends, target)

    def forbids(self, target: BuildTarget) -> Iterator[tuple[str, Clause]]:
        """What must not be there."""
        yield from _for(self.conflicts, target)


def _for(fields: Mapping[str, tuple[Clause, ...]], target: BuildTarget) -> Iterator[tuple[str, Clause]]:
    for name, clauses in fields.items():
        if (target.arch or not name.endswith("-Arch")) and (target.indep or not name.endswith("-Indep")):
            for clause in applying(clauses, target):
                yield name, clause


def control_of_source(data: bytes, where: str) -> SourceControl:
    """``where``: whose it is, for messages. Unfit: dpkg would not take it."""
    try:
        return _parsed(data)
    except Damaged as error:
        raise Unfit(f"{where}: {error}") from None


def _parsed(data: bytes) -> SourceControl:
    if len(data) > _MOST:
        raise Damaged(f"its control file is larger than {format_size(_MOST)}")
    first, *others = _stanzas(text_of(data.replace(b"\r\n", b"\n"))) or [{}]
    name = _required(first, "Source", _NAME)
    binaries = tuple(map(_binary, others))
    if not binaries:
        raise Damaged("its control file has no binary package")
    seen: set[str] = set()
    for each in binaries:
        if each.name in seen:
            raise Damaged(f"its control file has two packages {each.name}")
        seen.add(each.name)
    return SourceControl(name, _build(first, "Depends"), _build(first, "Conflicts"), binaries)


def _stanzas(text: str) -> list[Mapping[str, str]]:
    """Fields by their names in lower case. Lines that begin with # are comments, wherever they stand;
    lines of blanks alone end a stanza, as dpkg has it."""
    found: list[Mapping[str, str]] = []
    lines: list[tuple[int, str]] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.startswith("#"):
            continue
        if line.strip():
            lines.append((number, line))
        elif lines:
            if len(found) > _MOST_PACKAGES:
                raise Damaged(f"its control file has more than {_MOST_PACKAGES} packages")
            found.append({name.lower(): value for name, value in fields_of(lines)})
            lines = []
    return found


def _binary(fields: Mapping[str, str]) -> BinaryControl:
    name = _required(fields, "Package", _NAME)
    formula = fields.get("build-profiles", "").strip()
    return BinaryControl(
        name,
        tuple(_required(fields, "Architecture", _ARCHITECTURES).split()),
        fields.get("multi-arch", "").strip(),
        formula_of(formula, f"Build-Profiles of {name}") if formula else (),
        {
            each: clauses_of(fields[each.lower()], f"{each} of {name}", binary=True)
            for each in _INSTALLED_WITH
            if each.lower() in fields
        },
        clauses_of(fields.get("provides", ""), f"Provides of {name}", binary=True),
    )


def _build(fields: Mapping[str, str], what: str) -> Mapping[str, tuple[Clause, ...]]:
    names = (f"Build-{what}{kind}" for kind in _KINDS)
    return {name: clauses_of(fields[name.lower()], name) for name in names if fields.get(name.lower())}


def _required(fields: Mapping[str, str], name: str, pattern: re.Pattern[str]) -> str:
    value = fields.get(name.lower(), "").strip()
    if not value:
        kind = "first" if name == "Source" else "package's"
        raise Damaged(f"its control file's {kind} stanza has no field {name}")
    if not pattern.fullmatch(value):
        raise Damaged(f"its {name} has {one_line(value, 60)!r}, which Debian's policy doesn't allow")
    return value
