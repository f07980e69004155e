"""What a Debian package says of itself: the fields of its control file (deb-control(5), Debian Policy,
chapter 5), and its version (deb-version(7)).

One stanza that apt can't parse ends "apt-get update" for every client of the repository. So what dpkg
refuses is refused here; neither reads it leniently."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from host.printable import one_line
from repositories.packed import Damaged

_FIELD = re.compile(r"([!-\"$-,.-9;-~][!-9;-~]*):[ \t]*(.*)")
_CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]{1,199}")
_ARCHITECTURE = re.compile(r"(?!any\b|source$)(?!.*-any$)[a-z0-9][a-z0-9-]{0,63}")
_VERSION = re.compile(
    r"(?=.{1,200}$)(?:[0-9]{1,9}:)?[0-9](?:[0-9A-Za-z.+~-]*-[0-9A-Za-z.+~]+|[0-9A-Za-z.+~]*)"
)
_SOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]{0,199}(?: *\([^()\s]+\))?")
_RELATION = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9+._-]*(?::[a-z0-9][a-z0-9-]*)?"
    # apt fails on a line's end in (=1), not in (= 1), and on a new line after (
    r"(?:\s*\([ \t]*(?:(?:<<|<=|>=|>>)\s*|[=<>](?:\s+|(?=[^)]{2})))"
    r"(?:[0-9]{1,9}:)?[0-9A-Za-z.+~-]*[0-9A-Za-z.+~]\s*\))?",
    re.ASCII,
)
_ALTERNATIVES = ("pre-depends", "depends", "recommends", "suggests", "enhances")
_RELATIONS = (*_ALTERNATIVES, "conflicts", "breaks", "replaces", "provides")
_WORDS: Mapping[str, tuple[str, ...]] = {
    "multi-arch": ("no", "same", "foreign", "allowed"),
    "essential": ("yes", "no"),
    "protected": ("yes", "no"),
}
_BLANKS = " \t\n"
_OF_THE_INDEX = frozenset(("filename", "size", "md5sum", "sha1", "sha256", "sha512"))
"""Fields that are the archive's to say; a package's own are left out."""
_OF_THE_CLIENT = ("Status", "Config-Version", "Conffiles", "Triggers-Pending", "Triggers-Awaited")
"""Fields that only what is installed has; dpkg refuses packages with them."""


@dataclass(frozen=True, slots=True)
class Control:
    """``text``: the stanza as an index has it, without what the archive adds; whole lines.
    ``fields``: by their names in lower case, with their lines as they stand."""

    text: str
    fields: Mapping[str, str]

    @property
    def name(self) -> str:
        return self.fields["package"]

    @property
    def version(self) -> str:
        return self.fields["version"]

    @property
    def architecture(self) -> str:
        return self.fields["architecture"]

    @property
    def source(self) -> str:
        return (self.fields.get("source") or self.name).partition(" ")[0].partition("(")[0]


def control_of(data: bytes) -> Control:
    """A package's control file. Damaged: dpkg or apt would not take it."""
    text = text_of(data).lstrip("\n")
    if not text.endswith("\n"):
        raise Damaged("its control file ends in the middle of a line")
    fields: dict[str, str] = {}
    kept = []
    for name, lines in fields_of(enumerate(text.rstrip("\n").split("\n"), 1)):
        low = name.lower()
        fields[low] = lines
        if low not in _OF_THE_INDEX:
            kept.append(f"{name}: {lines}\n" if lines[:1] not in ("", "\n") else f"{name}:{lines}\n")
    _check(fields)
    return Control("".join(kept), fields)


def text_of(data: bytes) -> str:
    """Damaged: it is no UTF-8, or has a control character."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise Damaged(f"its control file is no UTF-8 at byte {error.start}") from None
    if found := _CONTROL_CHARACTER.search(text):
        line = text.count("\n", 0, found.start()) + 1
        raise Damaged(f"its control file has a control character: {found[0]!a} in line {line}")
    return text


def fields_of(stanza: Iterable[tuple[int, str]]) -> Iterator[tuple[str, str]]:
    """The fields of a stanza's numbered lines: each one's name, and its lines as they stand. Damaged: a
    line is none of a field's, or a field is there twice."""
    name = ""
    lines: list[str] = []
    seen: set[str] = set()
    for number, line in stanza:
        if line[:1] in (" ", "\t") and name:
            if not line.strip(_BLANKS):
                raise Damaged(f"line {number} of its control file is blank")
            lines.append(line)
            continue
        match = _FIELD.fullmatch(line)
        if not match:
            why = f"no field: {one_line(line, 60)}" if line else "blank"
            raise Damaged(f"line {number} of its control file is {why}")
        if name:
            yield name, "\n".join(lines)
        name, lines = match[1], [match[2].rstrip(_BLANKS)]
        if name.lower() in seen:
            raise Damaged(f"its control file has two fields {name} (line {number})")
        seen.add(name.lower())
    if name:
        yield name, "\n".join(lines)


def _check(fields: Mapping[str, str]) -> None:
    for name, pattern in (("Package", _NAME), ("Version", _VERSION), ("Architecture", _ARCHITECTURE)):
        value = fields.get(name.lower())
        if value is None:
            raise Damaged(f"its control file has no field {name}")
        if not pattern.fullmatch(value):
            raise Damaged(f"{_said(name, value)}, which Debian's policy doesn't allow")
    if fields.get("source") and not _SOURCE.fullmatch(fields["source"]):
        raise Damaged(f"{_said('Source', fields['source'])}, which Debian's policy doesn't allow")
    for name, words in _WORDS.items():
        if fields.get(name, "") not in ("", *words):
            raise Damaged(f"{_said(name.title(), fields[name])}, which is none of {', '.join(words)}")
    for name in _OF_THE_CLIENT:
        if name.lower() in fields:
            raise Damaged(f"its control file has the field {name}, which only an installed package has")
    if fields["architecture"] == "all" and fields.get("multi-arch") == "same":
        raise Damaged("its Multi-Arch is same, which one for all architectures can't be")
    for name in _RELATIONS:
        if fields.get(name, "").strip():
            _check_relations(name, fields[name])


def _check_relations(name: str, value: str) -> None:
    for group in value.split(","):
        parts = group.split("|") if name in _ALTERNATIVES else [group]
        for part in parts:
            if not _RELATION.fullmatch(part.strip(_BLANKS)):
                raise Damaged(f"{_said(name.title(), part.strip(_BLANKS))}, which apt can't read")


def _said(name: str, value: str) -> str:
    return f"its {name} has {one_line(value, 60)!r}"


def is_version(text: str) -> bool:
    """Whether Debian's policy allows it, 5.6.12."""
    return _VERSION.fullmatch(text) is not None


def compare(one: str, other: str) -> int:
    """Two versions, as dpkg orders them: negative, 0, positive."""
    if one == other:
        return 0
    for a, b in zip(_parts(one), _parts(other), strict=True):
        for x, y in zip_longest(_keys(a), _keys(b), fillvalue=_END):
            if x != y:
                return -1 if x < y else 1
    return 0


_PartOrder = tuple[tuple[int, ...], int, str]
_END: _PartOrder = ((0,), 0, "")
_RUNS = re.compile(r"([^0-9]*)([0-9]*)")


def _parts(version: str) -> tuple[str, str, str]:
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "", version
    upstream, dash, revision = rest.rpartition("-")
    return (epoch, upstream, revision) if dash else (epoch, rest, "")


def _keys(part: str) -> Iterator[_PartOrder]:
    """Runs of what is no digit, each with the number after it: ~ comes before the end, the end before
    letters, letters before all else; numbers of any length count without their leading zeros."""
    for text, digits in _RUNS.findall(part):
        number = digits.lstrip("0")
        yield (*map(_order, text), 0), len(number), number


def _order(character: str) -> int:
    if character == "~":
        return -1
    code = ord(character)
    return code if character.isascii() and character.isalpha() else code + 256
