"""A file of a service, or a marked block in an admin's file: what it should hold, and whose it is.

The mark is in the file itself, so that nothing else has to be remembered: who it belongs to, and a
digest of what we wrote, which shows whether somebody edited it since.

    # farmhand xivo 3f2a...: made from the farm file, edit that        a whole file's first line
    # BEGIN farmhand xivo 3f2a...: made from the farm file, edit that  a block
    # END farmhand xivo
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from inventory.errors import WrongState

_ABOUT = "made from the farm file, edit that"


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
    OTHERS = "others"  # a file without our mark; for a block: a file that has none of ours yet


@dataclass(frozen=True, slots=True)
class LiveFile:
    """A live file as it was found. ``text``: all of it; ``body``: our part, without the mark."""

    whose: Ownership
    text: str = ""
    body: str = ""


def digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def whole(document: Document, farm: str) -> str:
    """The file's whole text, for a document that is a file."""
    begin, end = document.comment
    return f"{begin}farmhand {farm} {digest(document.text)}: {_ABOUT}{end}\n{document.text}"


def read(document: Document, farm: str, text: str | None) -> LiveFile:
    """What the live file is to us; text None: there is no file. WrongState if its marks are in
    disorder."""
    if text is None or (document.own == "file" and not text.strip()):
        return LiveFile(Ownership.ABSENT)  # an empty one was put there to be filled, as for an include
    if document.own == "file":
        first, _, rest = text.partition("\n")
        match = _mark(document, farm, "").fullmatch(first)
        if not match:
            return LiveFile(Ownership.OTHERS, text)
        return LiveFile(Ownership.OURS if match[1] == digest(rest) else Ownership.EDITED, text, rest)
    found = _find(document, farm, text)
    if found is None:
        return LiveFile(Ownership.OTHERS, text)
    start, stop, written = found
    body = text[text.index("\n", start) + 1 : text.rindex("\n", start, stop - 1) + 1]
    return LiveFile(Ownership.OURS if written == digest(body) else Ownership.EDITED, text, body)


def embed(document: Document, farm: str, text: str) -> str:
    """The admin's file with our block in it: at its old place, else at the end; an empty block is left
    out."""
    begin, end = document.comment
    block = ""
    if document.text:
        block = (
            f"{begin}BEGIN farmhand {farm} {digest(document.text)}: {_ABOUT}{end}\n"
            f"{document.text}{begin}END farmhand {farm}{end}\n"
        )
    found = _find(document, farm, text)
    if found is not None:
        return text[: found[0]] + block + text[found[1] :]
    if not block:
        return text
    return text + ("" if not text or text.endswith("\n") else "\n") + block


def _mark(document: Document, farm: str, word: str) -> re.Pattern[str]:
    begin, end = map(re.escape, document.comment)
    return re.compile(rf"{begin}{word}farmhand {re.escape(farm)} ([0-9a-f]{{16}}): .*{end}\r?")


def _find(document: Document, farm: str, text: str) -> tuple[int, int, str] | None:
    """Where our block begins and ends in the text, and the digest in its mark."""
    begin, end = map(re.escape, document.comment)
    name = re.escape(farm)
    begins = list(re.finditer(rf"^{begin}BEGIN farmhand {name} (.*)$", text, re.MULTILINE))
    ends = list(re.finditer(rf"^{begin}END farmhand {name}{end}\r?$\n?", text, re.MULTILINE))
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or begins[0].start() > ends[0].start():
        raise WrongState(
            f"{document.path}: the marks of farmhand's block are in disorder: {len(begins)} BEGIN, "
            f"{len(ends)} END",
            remedy=f"make it one pair, or remove all of them with what is between; then again ({farm})",
        )
    match = re.match(r"([0-9a-f]{16}): ", begins[0][1])
    return begins[0].start(), ends[0].end(), match[1] if match else ""
