"""Locks of files by the kernel: they end with their holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from host.files import open_lock


class FileLock:
    """flock(2) on a file; it ends with its holder, however that ends. Many threads may use one object:
    each use opens the file anew."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def hold(self, *, shared: bool = False, remove: bool = False) -> Iterator[None]:
        """Wait for the lock, and hold it. ``remove``: remove the file when the lock is given back.
        WrongState: what has that name is no lock of ours."""
        handle = open_lock(self._path)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            if remove:
                self._path.unlink(missing_ok=True)
            os.close(handle)

    def held(self) -> bool:
        """Whether anybody holds the lock now."""
        try:
            handle = open_lock(self._path, make=False)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False
