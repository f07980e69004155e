"""What to do about what a tool said. A hint follows from the tool's own words. For words that are not
known there is no hint: a wrong one costs an admin more than silence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hint:
    """``line``: the line of the output that tells. ``remedy``: what to do. Both are "" if there is no
    hint."""

    line: str = ""
    remedy: str = ""


def hint(said: str, known: Iterable[tuple[str, str]], **facts: object) -> Hint:
    """The hint of the first pair in ``known`` (a pattern and a remedy) whose pattern is in ``said``. So
    put what explains the rest first. A remedy may name the pattern's {groups}, and ``facts``."""
    for pattern, remedy in known:
        if match := re.search(pattern, said, re.MULTILINE):
            begin, end = said.rfind("\n", 0, match.start()) + 1, said.find("\n", match.start())
            line = " ".join(said[begin : end if end >= 0 else None].split())
            return Hint(line, remedy.format(**match.groupdict(), **facts))
    return Hint()


ROOM = (r"No space left on device|Disk quota exceeded", "make room on the file system of {directory}")
NAMESPACES = (  # of unshare(1), and of our own calls of unshare(2) and mount(2)
    (
        r"cannot change root filesystem propagation: Invalid argument|mount none on /: Invalid argument",
        "/ is no mount point here, as in a plain chroot: before it, mount --bind DIRECTORY DIRECTORY",
    ),
    (
        r"unshare( failed)?: Operation not permitted|^mount .*: (Operation not permitted|.*denied)",
        "this needs CAP_SYS_ADMIN, which root has not got here (a container: --privileged)",
    ),
)
