"""What two builds of a package made, compared byte by byte; where it differs, in which members.

What a build tells of itself (.buildinfo, .changes) isn't compared: it has the time of the build."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from builds.record import FileRecord
from host.files import file_error, write_atomic
from host.printable import one_line, plain
from host.run import which
from inventory.errors import CommandFailed, TimedOut, Unfit
from repositories.contents import MemberDifference
from repositories.formats import package_format

if TYPE_CHECKING:
    from host.run import Runner

_FORMATS = {".deb": "deb", ".udeb": "deb", ".rpm": "rpm"}
_TELLING = (".buildinfo", ".changes")
_MEMBERS = 200
"""Of one package, that are told."""
_TOOL = "diffoscope"
_EXPLAINED = 2**20
"""Bytes of the text that diffoscope makes of two packages."""
_PATIENCE = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDifference:
    """Of one file that either build made. ``what``: all that there is to say where no members are: it is
    only in one of the two, or packed differently. ``more``: members beside those. ``paths``: where the
    two are, where members are told. ``explained``: the file with diffoscope's text; None: there is
    none."""

    file: str
    what: str = ""
    members: tuple[MemberDifference, ...] = ()
    more: int = 0
    paths: tuple[Path, Path] | None = None
    explained: Path | None = None

    def __str__(self) -> str:
        """In one line, the first of its members."""
        first, *others = self.lines("the first", "the second")
        more = len(others) + max(self.more - 1, 0)
        return f"{first} and {more} more" if more else first

    def lines(self, first: str, second: str) -> Iterator[str]:
        """``first``, ``second``: what the builds are called."""
        if self.what:
            yield f"{self.file}: {_named(self.what, first, second)}"
        for name, about in groupby(self.members, key=lambda one: one.name):
            said = ", ".join(_named(one.said(), first, second) for one in about)
            yield f"{self.file}: {name}: {said}"
        if self.more:
            yield f"{self.file}: {self.more} more differences"


def compared(
    files: Sequence[FileRecord], directory: Path, files2: Sequence[FileRecord], directory2: Path
) -> tuple[OutputDifference, ...]:
    """What two builds made; empty: all is the same, byte for byte. ``directory``, ``directory2``: which
    the files' paths begin in. WrongState: one can't be read."""
    first, second = _to_compare(files, directory), _to_compare(files2, directory2)
    found = []
    for name in sorted(first.keys() | second.keys()):
        shown = one_line(name, 200)
        if name not in first or name not in second:
            side = "only in the first" if name in first else "only in the second"
            found.append(OutputDifference(file=shown, what=side))
        elif _sum(first[name]) != _sum(second[name]):
            found.append(_difference(shown, first[name], second[name]))
    return tuple(found)


def _to_compare(files: Sequence[FileRecord], directory: Path) -> Mapping[str, Path]:
    return {file.name: directory / file.path for file in files if not file.name.endswith(_TELLING)}


def explained(
    runner: Runner, differences: Sequence[OutputDifference], directory: Path
) -> tuple[tuple[OutputDifference, ...], str]:
    """With diffoscope's text on each package that differs, in ``directory``; and why there is none of
    some, "" if there is of all. It is a help for people, and never needed."""
    if not which(_TOOL):
        return tuple(differences), f"{_TOOL} is not installed"
    found, why = [], ""
    for each in differences:
        if each.paths:
            to = directory / f"{each.file}.{_TOOL}.txt"
            failed = _explain(runner, each.paths, to)
            found.append(replace(each, explained=None if failed else to))
            why = why or failed
        else:
            found.append(each)
    return tuple(found), why


def _explain(runner: Runner, paths: tuple[Path, Path], to: Path) -> str:
    """Why it couldn't; "": it has written at most a MiB of text."""
    argv = (_TOOL, "--no-progress", "--max-text-report-size", str(_EXPLAINED), "--text", to, *paths)
    try:
        runner.change(*argv, timeout=_PATIENCE, ok=(0, 1))
        with to.open("rb") as file:
            text = file.read(_EXPLAINED).decode(errors="replace")
        write_atomic(to, plain(text).encode())
    except OSError as error:
        return f"{_TOOL} left nothing that can be read: {error.strerror}"
    except (CommandFailed, TimedOut) as error:
        to.unlink(missing_ok=True)
        return error.message
    return ""


def _difference(name: str, one: Path, other: Path) -> OutputDifference:
    kind = _FORMATS.get(Path(name).suffix)
    if kind is None:
        return OutputDifference(file=name, what="content")
    try:
        members = package_format(kind).compared(one, other)
    except Unfit as error:
        return OutputDifference(file=name, what=f"content; {error.message}")
    if not members:
        return OutputDifference(file=name, what="the same contents, packed or signed in another way")
    more = max(len(members) - _MEMBERS, 0)
    return OutputDifference(file=name, members=members[:_MEMBERS], more=more, paths=(one, other))


def _sum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise file_error(error, path, "read") from error


def _named(text: str, first: str, second: str) -> str:
    """The two by what they are called."""
    match text:
        case "only in the first":
            return f"only in {first}"
        case "only in the second":
            return f"only in {second}"
        case _:
            return text
