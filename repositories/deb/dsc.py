"""A Debian source package: its .dsc file (dsc(5)), and what its packaging says of it, read out of its
archives without unpacking them, bounded. deb-src-*(5) formats 3.0 (quilt), 3.0 (native) and 1.0."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from host.printable import one_line
from inventory.errors import Unfit
from repositories.deb.changes import listed_in, stanza_of, word_of
from repositories.deb.control import is_version
from repositories.deb.file import tar_members
from repositories.packed import DECOMPRESSORS, Damaged, ExactReader, pieces, unpacked

_FORMATS = ("1.0", "3.0 (native)", "3.0 (quilt)")
_MOST = 4 * 2**20
"""Bytes of a control file or changelog."""
_LEAST, _RATIO = 2**30, 200
"""An archive may grow to 1 GiB, or to so many times its packed size."""
_ENDS = "|".join(map(re.escape, DECOMPRESSORS))
_DEBIAN = re.compile(rf".*\.debian\.tar({_ENDS})")
_DIFF = re.compile(rf".*\.diff({_ENDS})")
_ORIGINAL = re.compile(rf".*\.orig\.tar({_ENDS})")
_NATIVE = re.compile(rf".*\.tar({_ENDS})")
_HUNK = re.compile(rb"@@ -(\d{1,9})(?:,(\d{1,9}))? \+\d{1,9}(?:,(\d{1,9}))? @@.*")
_WANTED = ("debian/control", "debian/changelog")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a .dsc lists. ``name``: one path component. ``size`` in bytes."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class DebSource:
    source: str
    version: str
    format: str
    files: tuple[SourceFile, ...]


def source_of(data: bytes) -> DebSource:
    """The text of a .dsc file, its signature taken off. Unfit."""
    fields = stanza_of(data)
    for name in ("Format", "Source", "Version", "Checksums-Sha256"):
        if not fields.get(name.lower(), "").strip():
            raise Unfit(f"it has no field {name}")
    format_ = fields["format"].strip()
    if format_ not in _FORMATS:
        raise Unfit(f"its format is {one_line(format_, 60)!r}, and {', '.join(_FORMATS)} are read")
    source, version = word_of(fields, "source"), word_of(fields, "version")
    if not is_version(version):
        raise Unfit(f"its Version is {one_line(version, 60)!r}, which Debian's policy doesn't allow")
    files = tuple(
        SourceFile(name, int(size), sha256)
        for sha256, size, name in listed_in(fields, "checksums-sha256", 3, 64)
    )
    return DebSource(source, version, format_, files)


def open_source_file(path: Path, most: int) -> BufferedReader:
    """A regular file for reading; nobody is waited for. Unfit; OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(handle, "rb")
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise Unfit(f"{path.name} is no regular file")
    if found.st_size > most:
        file.close()
        raise Unfit(f"{path.name} has {found.st_size} bytes, and should have {most} at most")
    return file


def check_files(directory: Path, source: DebSource) -> None:
    """Unfit unless each file lies there with its size and sum. OSError."""
    for listed in source.files:
        try:
            with open_source_file(directory / listed.name, listed.size) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            raise Unfit(f"{listed.name} isn't beside it") from None
        if sha256 != listed.sha256:
            raise Unfit(f"{listed.name} is damaged: its sha256 is {sha256}, not {listed.sha256}")


def packaging(directory: Path, source: DebSource) -> Mapping[str, bytes]:
    """debian/control and debian/changelog of a package whose files were checked, by these names. Unfit,
    OSError."""
    try:
        found = _packaging(directory, source)
    except Damaged as error:
        raise Unfit(str(error)) from None
    if "debian/control" not in found:
        raise Unfit("none of its archives has debian/control")
    return found


def _packaging(directory: Path, source: DebSource) -> Mapping[str, bytes]:
    if source.format == "3.0 (quilt)":
        return _in_tar(directory, *_the(source, _DEBIAN, ".debian.tar"), depth=0)
    if source.format == "3.0 (native)" or not any(_DIFF.fullmatch(file.name) for file in source.files):
        return _in_tar(directory, *_the(source, _NATIVE, ".tar"), depth=1)
    added, changed = _in_diff(directory, *_the(source, _DIFF, ".diff.gz"))
    if missing := [name for name in _WANTED if name not in added]:
        if changed:
            raise Unfit(
                f"its diff changes upstream's own {changed[0]}, which isn't read",
                remedy="make it a source package of format 3.0 (quilt); or give it as 'git'",
            )
        upstream = _in_tar(directory, *_the(source, _ORIGINAL, ".orig.tar"), depth=1)
        return {**{name: upstream[name] for name in missing if name in upstream}, **added}
    return added


def _the(source: DebSource, pattern: re.Pattern[str], what: str) -> tuple[SourceFile, str]:
    """The file meant, and how it is packed."""
    found = [(file, match[1]) for file in source.files if (match := pattern.fullmatch(file.name))]
    if len(found) != 1:
        raise Damaged(f"it has {len(found) or 'no'} files *{what}, where there should be one")
    return found[0]


def _unpacked(directory: Path, listed: SourceFile, end: str) -> Iterator[bytes]:
    with open_source_file(directory / listed.name, listed.size) as file:
        most = max(_LEAST, _RATIO * listed.size)
        try:
            yield from unpacked(pieces(file, listed.size), end, most)
        except Damaged as error:
            raise Damaged(f"{listed.name}: {error}") from None


def _in_tar(directory: Path, listed: SourceFile, end: str, *, depth: int) -> Mapping[str, bytes]:
    """``depth``: how many directories are around it. Of files that are there twice the last counts, as
    for tar."""
    found = {}
    for member in tar_members(ExactReader(_unpacked(directory, listed, end)), pax=True):
        parts = member.name.split("/")
        name = "/".join(parts[depth:])
        if name in _WANTED and len(parts) == depth + 2:
            if not member.header.isreg():
                raise Damaged(f"{name} in {listed.name} is no file")
            found[name] = member.read(_MOST)
    return found


def _in_diff(
    directory: Path, listed: SourceFile, end: str
) -> tuple[Mapping[str, bytes], tuple[str, ...]]:
    """The files that the diff makes, and those wanted that it changes."""
    found: dict[str, list[bytes]] = {}
    changed = []
    name, left, room = "", 0, _MOST
    for line in _lines(_unpacked(directory, listed, end)):
        if left and line.startswith(b"+"):
            found[name].append(line[1:] + b"\n")
            left, room = left - 1, room - len(line)
            if room < 0:
                raise Damaged(f"{name} in {listed.name} is larger than {_MOST >> 20} MiB")
        elif line.startswith(b"\\") and name in found and found[name] and not left:
            found[name][-1] = found[name][-1].removesuffix(b"\n")
        elif line.startswith(b"+++ "):
            path = line[4:].split(b"\t")[0].decode(errors="replace").partition("/")[2]
            name, left = path if path in _WANTED else "", 0
        elif name and (hunk := _HUNK.fullmatch(line)):
            if int(hunk[1]) or int(hunk[2] or 1):
                changed.append(name)
                name = ""
                continue
            found[name], left = [], int(hunk[3] or 1)
    return {name: b"".join(lines) for name, lines in found.items()}, tuple(changed)


def _lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        yield from lines
        if len(rest) > _MOST:
            raise Damaged("its diff has a line without an end")
    if rest:
        yield rest
