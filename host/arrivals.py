"""What arrives in a directory, told at once by the kernel: inotify(7)."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
from pathlib import Path
from types import TracebackType

from host.files import file_error
from inventory.errors import WrongState

_CLOSE_WRITE, _MOVED_TO, _CREATE = 0x8, 0x80, 0x100
_DELETE_SELF, _MOVE_SELF, _UNMOUNT, _OVERFLOW = 0x400, 0x800, 0x2000, 0x4000
_ONLYDIR = 0x1000000
_EVENT = struct.Struct("iIII")  # then the name, filled up with NUL
_BLOCK = 2**16


class DirectoryGone(WrongState):
    """What was watched is no longer there, or elsewhere: it can't be watched again under its name."""


class Arrivals:
    """Watches one directory. ``closed``: names of files there that were closed by who wrote them, or
    moved in, and not made anew since; all that is older than the watch, and all that the kernel had no
    room to tell, is not among them. A context manager. WrongState: it can't be watched."""

    def __init__(self, directory: Path) -> None:
        self.closed: set[str] = set()
        self._directory = directory
        libc = ctypes.CDLL(None, use_errno=True)
        self._handle: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = _CLOSE_WRITE | _MOVED_TO | _CREATE | _DELETE_SELF | _MOVE_SELF | _ONLYDIR
        if self._handle < 0 or libc.inotify_add_watch(self._handle, os.fsencode(directory), mask) < 0:
            code = ctypes.get_errno()
            self.close()
            raise file_error(OSError(code, os.strerror(code)), directory, "watch")

    def __enter__(self) -> Arrivals:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def fileno(self) -> int:
        """For poll(2): it can be read when something has arrived."""
        return self._handle

    def wait(self, timeout: float) -> bool:
        """Until something has arrived, at most so many seconds. Returns whether it has. DirectoryGone (a
        removed one is told when nobody has it open any more)."""
        end = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        while not (arrived := self._read()):
            left = end - time.monotonic()
            if left <= 0:
                break
            poll.poll(left * 1000)
        return arrived

    def _read(self) -> bool:
        arrived = False
        while True:
            try:
                data = os.read(self._handle, _BLOCK)
            except BlockingIOError:
                return arrived
            at = 0
            while at < len(data):
                _, mask, _, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size
                name = os.fsdecode(data[at : at + length].rstrip(b"\0"))
                at += length
                if mask & (_DELETE_SELF | _MOVE_SELF | _UNMOUNT):
                    raise DirectoryGone(
                        f"{self._directory} has gone while it was watched",
                        remedy="make it, and start again",
                    )
                if mask & (_CLOSE_WRITE | _MOVED_TO):
                    self.closed.add(name)
                elif mask & _CREATE:
                    self.closed.discard(name)
                arrived = arrived or bool(mask & (_CLOSE_WRITE | _MOVED_TO | _OVERFLOW))
