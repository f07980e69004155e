"""Files and directories of ours with a looser mode than they were made with: who may change them, or
read a secret, is more than us."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SECRET_NAMES = (".lock", ".db", ".db-wal", ".db-shm", ".db-journal", ".iso")
_SECRET_PLACES = frozenset({"keys", "locks", "seeds", "consoles"})
"""Directories whose files hold keys, or what a guest said, or must not be lockable by others."""
_GOLDEN = "templates"


@dataclass(frozen=True, slots=True)
class LooseMode:
    """``mode`` is what the path has, ``wanted`` what it may have at most."""

    path: Path
    mode: int
    wanted: int

    def __str__(self) -> str:
        return f"{self.path} ({self.mode:04o}, not {self.wanted:04o})"

    def tighten(self) -> bool:
        """Set the mode, of the very file that is ours and has no other name; no link is followed.
        Returns whether it is as wanted now. OSError."""
        handle = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(handle)
            if not _ours(found):
                return False
            wanted = stat.S_IMODE(found.st_mode) & self.wanted
            os.chmod(f"/proc/self/fd/{handle}", wanted)  # noqa: PTH101 - of a descriptor
            return True
        finally:
            os.close(handle)


def loose_modes(top: Path) -> Iterator[LooseMode]:
    """What is below ``top``, and ``top`` itself: files and directories of this user alone. Sockets are
    left out: their directories guard them. What can't be read is passed by, and no link is followed but
    ``top`` itself, which an admin may have moved."""
    top = top.resolve()
    if not top.is_dir():
        return
    for directory, names, files, handle in os.fwalk(top, follow_symlinks=False):
        place = Path(directory)
        if place == top:
            yield from _judged(place, os.fstat(handle), secret=False)
        names.sort()
        for name in sorted({*names, *files}):
            try:
                found = os.stat(name, dir_fd=handle, follow_symlinks=False)
            except FileNotFoundError:  # it went meanwhile
                continue
            yield from _judged(place / name, found, secret=_secret(place, name, found))


def _secret(place: Path, name: str, found: os.stat_result) -> bool:
    """Whether others must not read it either."""
    if stat.S_ISDIR(found.st_mode):
        return name in ("keys", "locks")
    if name.endswith((".pub", ".known")):  # known_hosts: public keys, too
        return False
    if place.name == _GOLDEN and name.endswith(".qcow2"):
        return True
    return name.endswith(_SECRET_NAMES) or not _SECRET_PLACES.isdisjoint(place.parts[-2:])


def _judged(path: Path, found: os.stat_result, *, secret: bool) -> Iterator[LooseMode]:
    if not _ours(found):
        return
    mode = stat.S_IMODE(found.st_mode)
    wanted = mode & ~(0o077 if secret else 0o022)
    if mode != wanted:
        yield LooseMode(path, mode, wanted)


def _ours(found: os.stat_result) -> bool:
    """Ours, a file with one name or a directory."""
    if found.st_uid != os.geteuid():
        return False
    return stat.S_ISDIR(found.st_mode) or (stat.S_ISREG(found.st_mode) and found.st_nlink == 1)
