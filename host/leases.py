"""Leases of names that lie beside what they guard, on the machine that has it: whatever state
directory or user's controller asks, they are the same ones.

Each is flock(2) on a file, so it ends with its holder; the file holds a note of who that is. It is there
only while it is held."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from host.files import is_at, make_directory, open_lock, own_directory
from host.printable import one_line
from inventory.errors import Busy

_PATIENCE = 0.3  # seconds: somebody may just be letting go
_LOOK = 0.01  # seconds
_NOTE = 2048  # bytes


@dataclass(frozen=True, slots=True)
class FileLeases:
    """Of one directory, which is ours alone; it is there while it is needed."""

    directory: Path

    @contextlib.contextmanager
    def hold(self, names: Sequence[str], note: str) -> Iterator[None]:
        """Hold all of them, or none. ``note``: who does, in a line. Busy, with the other one's note;
        WrongState where the directory, or a file of that name, is not ours."""
        with contextlib.ExitStack() as stack:
            for name in sorted(set(names)):  # one order for everybody: no two wait for each other
                path = self.directory / f"{quote(name, safe='')}.lock"  # one file's name
                handle = self._take(path, name)
                stack.callback(_give_back, path, handle)
                with contextlib.suppress(OSError):  # a full disk takes away the note, not the lease
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, note.encode()[:_NOTE], 0)
            yield

    def _take(self, path: Path, name: str) -> int:
        end = time.monotonic() + _PATIENCE
        make_directory(self.directory.parent, mode=0o700 if os.geteuid() else 0o711)
        while True:
            own_directory(self.directory, mode=0o700)
            try:
                handle = open_lock(path)
            except FileNotFoundError:  # gone between two looks
                handle = -1
            try:
                if handle >= 0:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if is_at(handle, path):
                        return handle
            except BlockingIOError:
                pass
            except BaseException:
                os.close(handle)
                raise
            late = time.monotonic() > end
            said = os.pread(handle, _NOTE, 0).decode(errors="replace") if late and handle >= 0 else ""
            if handle >= 0:
                os.close(handle)
            if late:
                raise busy(name, said)
            time.sleep(_LOOK)


def busy(name: str, note: str) -> Busy:
    """The error for a lease that another has; ``note``: that one's, which may be anybody's text."""
    said = one_line(note.strip(), _NOTE)
    return Busy(
        f"{name} is held by {said or 'somebody who could not note who'}",
        remedy="wait until that ends and try again",
    )


def _give_back(path: Path, handle: int) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
    os.close(handle)
    with contextlib.suppress(OSError):  # others are held, or are just being taken
        path.parent.rmdir()
