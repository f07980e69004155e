"""A file of a service, or a marked block in an admin's file: what it should hold, and whose it is.

The mark is in the file itself, so that nothing else has to be remembered: the farm that it belongs to
(``FarmIdentity.mark``), and a digest of what we wrote, which shows whether somebody edited it since.

    # farmhand xivo:5d41...:root@gallifrey:/root/xivo.yaml 3f2a...: made from the farm file, edit that
    # BEGIN farmhand xivo:5d41...:root@gallifrey:/root/xivo.yaml 3f2a...: made from the farm file, ...
    # END farmhand xivo

The first is a whole file's first line, the others are around a block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from hypervisors.ownership import FarmIdentity
from inventory.errors import WrongState

_ABOUT = "made from the farm file, edit that"
_ANY_MARK = re.compile(
    rf"^(.*\bfarmhand [a-z0-9-]+):[0-9a-f]{{32}}:[^\n]* [0-9a-f]{{16}}(?=: {_ABOUT})", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Document:
    """What a file, or a block in it, should hold. ``text``: without the mark. ``mode``: for a file that
    isn't there yet. ``comment``: how the format's comments begin and end. ``zone``: the zone whose file
    this is; ``serial``: its serial number. ``renumbered``: makes a zone file with another serial number.
    ``initial``: only written if there is no file; afterwards it is the server's own (a dynamic zone)."""

    service: str
    path: str
    text: str
    mode: int = 0o644
    own: Literal["file", "block"] = "file"
    comment: tuple[str, str] = ("# ", "")
    zone: str = ""
    serial: int = 0
    initial: bool = False
    renumbered: Callable[[int], Document] | None = field(default=None, compare=False, repr=False)


class Ownership(StrEnum):
    """What a live file is to us."""

    ABSENT = "absent"
    OURS = "ours"
    EDITED = "edited"  # ours, and somebody changed it since we wrote it
    FORMER = "former"  # of this very farm file, by a farm of its name with another identity
    FARMS = "farms"  # another farm's
    OTHERS = "others"  # a file without a mark; for a block: a file that has none of ours yet


@dataclass(frozen=True, slots=True)
class LiveFile:
    """A live file as it was found. ``text``: all of it; ``body``: our part, without the mark. ``farm``:
    whose mark is on it."""

    whose: Ownership
    text: str = ""
    body: str = ""
    farm: FarmIdentity | None = None


def digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def whole(document: Document, farm: FarmIdentity) -> str:
    """The file's whole text, for a document that is a file."""
    return f"{_mark(document, '', farm, document.text)}{document.text}"


def read(document: Document, farm: FarmIdentity, text: str | None) -> LiveFile:
    """What the live file is to us; text None: there is no file. One that is wholly another farm's is no
    place for a block of ours. WrongState if its marks are in disorder."""
    if text is None or (document.own == "file" and not text.strip()):
        return LiveFile(Ownership.ABSENT)  # an empty one was put there to be filled, as for an include
    first, _, rest = text.partition("\n")
    match = _marks(document, "").fullmatch(first)
    if document.own == "file":
        if not match:
            return LiveFile(Ownership.OTHERS, text)
        return _found(FarmIdentity.of(match["farm"]), farm, match["digest"], text, rest)
    found = _find(document, farm, text)
    if found is None:
        whose = FarmIdentity.of(match["farm"]) if match else farm
        if whose != farm:
            return LiveFile(Ownership.FARMS, text, farm=whose)
        return LiveFile(Ownership.OTHERS, text)
    body = text[text.index("\n", found.start) + 1 : text.rindex("\n", found.start, found.stop - 1) + 1]
    return _found(found.farm, farm, found.digest, text, body)


def _found(whose: FarmIdentity, farm: FarmIdentity, written: str, text: str, body: str) -> LiveFile:
    if whose == farm:
        kind = Ownership.OURS if written == digest(body) else Ownership.EDITED
    elif whose.name == farm.name and whose.file == farm.file:
        kind = Ownership.FORMER
    else:
        kind = Ownership.FARMS
    return LiveFile(kind, text, body, whose)


def embed(document: Document, farm: FarmIdentity, text: str) -> str:
    """The admin's file with our block in it: at its old place, else at the end; an empty block is left
    out."""
    begin, end = document.comment
    block = ""
    if document.text:
        head = _mark(document, "BEGIN ", farm, document.text)
        block = f"{head}{document.text}{begin}END farmhand {farm.name}{end}\n"
    found = _find(document, farm, text)
    if found is not None:
        return text[: found.start] + block + text[found.stop :]
    if not block:
        return text
    return text + ("" if not text or text.endswith("\n") else "\n") + block


def with_plain_marks(text: str) -> str:
    """As it is shown: marks without what makes out whose they are, and what is below them."""
    return _ANY_MARK.sub(r"\1", text)


def _mark(document: Document, word: str, farm: FarmIdentity, text: str) -> str:
    begin, end = document.comment
    whose = farm.mark.replace("--", "-%2D")  # two of them end a comment of XML
    return f"{begin}{word}farmhand {whose} {digest(text)}: {_ABOUT}{end}\n"


def _marks(document: Document, word: str) -> re.Pattern[str]:
    begin, end = map(re.escape, document.comment)
    return re.compile(
        rf"^{begin}{word}farmhand (?P<farm>[^\n]+) (?P<digest>[0-9a-f]{{16}}): [^\n]*{end}\r?$", re.M
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """A block in a text: where it begins and ends, whose it is, and the digest in its mark."""

    start: int
    stop: int
    farm: FarmIdentity
    digest: str


def _find(document: Document, farm: FarmIdentity, text: str) -> _Block | None:
    """Our block. One of this very farm file under another identity is taken for ours, where there is no
    other: it is put in its place."""
    blocks = list(_blocks(document, farm, text))
    ours = [block for block in blocks if block.farm == farm]
    former = [block for block in blocks if block.farm.file == farm.file and block.farm != farm]
    if len(ours) > 1 or len(former) > 1:
        raise _disorder(document, farm, len(blocks), len(blocks))
    return next(iter((*ours, *former)), None)


def _blocks(document: Document, farm: FarmIdentity, text: str) -> Iterator[_Block]:
    """Those of farms of our name."""
    begin, end = map(re.escape, document.comment)
    name = re.escape(farm.name)
    begins = list(re.finditer(rf"^{begin}BEGIN farmhand {name}[: ].*$", text, re.MULTILINE))
    ends = list(re.finditer(rf"^{begin}END farmhand {name}{end}\r?$\n?", text, re.MULTILINE))
    places = [place for pair in zip(begins, ends, strict=False) for place in pair]
    starts = [place.start() for place in places]
    if len(begins) != len(ends) or starts != sorted(starts):
        raise _disorder(document, farm, len(begins), len(ends))
    for first, last in zip(begins, ends, strict=True):
        match = _marks(document, "BEGIN ").fullmatch(first[0])
        whose, written = (match["farm"], match["digest"]) if match else (farm.mark, "")
        yield _Block(first.start(), last.end(), FarmIdentity.of(whose), written)


def _disorder(document: Document, farm: FarmIdentity, begins: int, ends: int) -> WrongState:
    return WrongState(
        f"{document.path}: the marks of farmhand's block are in disorder: {begins} BEGIN, {ends} END",
        remedy=f"make it one pair, or remove all of them with what is between; then again ({farm.name})",
    )
