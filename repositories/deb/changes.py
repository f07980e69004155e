"""A Debian upload's .changes file (deb-changes(5)), read strictly: what is there twice, missing or
unclear is no upload, for whoever reads it next may take it for another one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from host.printable import one_line
from inventory.errors import Unfit
from inventory.sizes import about

MOST = 2**20
"""Bytes of a .changes file: far more than the largest source packages need."""

_FILES = 2000
_FIELD = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*):(.*)")
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+~^:%@-]{0,199}")
_SIZE = re.compile(r"0|[1-9][0-9]{0,14}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.~:-]{0,199}")
_NEEDED = ("Format", "Date", "Source", "Architecture", "Version", "Distribution", "Files",
           "Checksums-Sha256")  # fmt: skip


@dataclass(frozen=True, slots=True)
class ListedFile:
    """``name``: one path component. ``size`` in bytes."""

    name: str
    size: int
    md5: str
    sha256: str


@dataclass(frozen=True, slots=True)
class DebChanges:
    """``fields``: by their names in lower case, lines joined by newlines."""

    source: str
    version: str
    distribution: str
    files: tuple[ListedFile, ...]
    fields: Mapping[str, str]


def is_name(name: str) -> bool:
    """Whether a file may be called so: one path component that nothing has to quote."""
    return _NAME.fullmatch(name) is not None


def changes_of(data: bytes) -> DebChanges:
    """The text of a .changes file, its signature taken off. Unfit."""
    fields = stanza_of(data)
    for name in _NEEDED:
        if not fields.get(name.lower(), "").strip():
            raise Unfit(f"it has no field {name}")
    source, version, distribution = (
        word_of(fields, name) for name in ("source", "version", "distribution")
    )
    sums = {name: (size, sha256) for sha256, size, name in listed_in(fields, "checksums-sha256", 3, 64)}
    files = []
    for md5, size, _section, _priority, name in listed_in(fields, "files", 5, 32):
        if name not in sums or sums[name][0] != size:
            raise Unfit(f"its Files and Checksums-Sha256 differ about {name}")
        files.append(ListedFile(name, int(size), md5, sums[name][1]))
    if len(files) != len(sums):
        raise Unfit("its Files and Checksums-Sha256 don't list the same files")
    return DebChanges(source, version, distribution, tuple(files), fields)


def check_source(data: bytes, changes: DebChanges) -> None:
    """Unfit if a .dsc file (dsc(5)), its signature taken off, lists other files under names of the
    upload's."""
    sums = {file.name: (str(file.size), file.sha256) for file in changes.files}
    fields = stanza_of(data)
    if "checksums-sha256" not in fields:
        raise Unfit("its .dsc has no field Checksums-Sha256")
    for sha256, size, name in listed_in(fields, "checksums-sha256", 3, 64):
        if sums.get(name, (size, sha256)) != (size, sha256):
            raise Unfit(f"its .dsc means another {name}")


def stanza_of(data: bytes) -> dict[str, str]:
    """The one stanza of a file, strictly. Unfit."""
    if len(data) > MOST:
        raise Unfit(f"it has more than {about(MOST)}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Unfit(f"byte {error.start} is not UTF-8") from None
    if match := _UNFIT.search(text):
        raise Unfit(f"it has a control character: {match[0]!a}")
    fields: dict[str, str] = {}
    name = ""
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        if line[:1] in (" ", "\t") and name:
            fields[name] += f"\n{line}"
            continue
        match = _FIELD.fullmatch(line)
        if match is None:
            raise Unfit(f"line {number} is no field: {one_line(line, 60) or 'it is empty'}")
        name = match[1].lower()
        if name in fields:
            raise Unfit(f"it has two fields {match[1]}")
        fields[name] = match[2]
    return fields


def word_of(fields: Mapping[str, str], name: str) -> str:
    """What a field says that is one word. Unfit."""
    value = fields[name].strip()
    word = value.partition(" (")[0] if name == "source" and value.endswith(")") else value
    if not _WORD.fullmatch(word):
        raise Unfit(f"its {name.title()} is {one_line(value, 60)!r}")
    return word


def listed_in(fields: Mapping[str, str], field: str, words: int, digits: int) -> list[list[str]]:
    """The lines of a list of files: a sum first, the size second, the name last. Unfit."""
    first, *lines = fields[field].split("\n")
    found = [line.split() for line in lines]
    if first.strip() or not found:
        raise Unfit(f"its {field.title()} is no list of files")
    if len(found) > _FILES:
        raise Unfit(f"its {field.title()} has more than {_FILES} files")
    seen = set()
    for line in found:
        name = line[-1] if line else ""
        if len(line) != words:
            raise Unfit(f"a line of its {field.title()} has {len(line)} words, not {words}")
        if not is_name(name) or name.endswith(".changes"):
            raise Unfit(
                f"its {field.title()} names {one_line(name, 60)!r}: no file here may be called so"
            )
        if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", line[0]) or not _SIZE.fullmatch(line[1]):
            raise Unfit(f"its {field.title()} has no sum or size of {name}")
        if name in seen:
            raise Unfit(f"its {field.title()} has {name} twice")
        seen.add(name)
    return found
