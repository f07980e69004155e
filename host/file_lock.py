"""Locks of files by the kernel: they end with their holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from host.files import file_error, open_lock
from host.processes import credentials, described, lockers
from inventory.errors import Busy

_LOOK = 0.01  # seconds


class FileLock:
    """flock(2) on a file; it ends with its holder, however that ends. Many threads may use one object:
    each use opens the file anew."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def hold(
        self, *, shared: bool = False, remove: bool = False, waits: Callable[[], object] = lambda: None
    ) -> Iterator[None]:
        """Wait for the lock, and hold it. ``remove``: remove the file when the lock is given back.
        ``waits``: called before it waits for whoever has it; what it raises is raised here.
        WrongState: what has that name is no lock of ours."""
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        handle = open_lock(self._path)
        try:
            try:
                fcntl.flock(handle, how | fcntl.LOCK_NB)
            except BlockingIOError:
                waits()
                fcntl.flock(handle, how)
            try:
                yield
            finally:
                if remove:  # not where the wait was interrupted: then it is another's
                    self._path.unlink(missing_ok=True)
        finally:
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


@contextlib.contextmanager
def directory_lock(path: Path, patience: float = 10) -> Iterator[None]:
    """flock(2) on a directory of the admin's, for what must leave no file there. Anybody who may list it
    can lock it: those who may not write in it don't count, for they are none of us. Busy after
    ``patience`` seconds, with its holder; where only unseen processes hold it, it is gone on without."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise file_error(error, path, "open") from error
    try:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holders = lockers(path)
            found = os.fstat(handle)
            may = {pid: _may_write(pid, found) for pid in holders}
            late = time.monotonic() > end
            if late and (writers := [pid for pid in holders if may[pid]]):
                who, kill = described(writers[0]), f"kill {writers[0]}"
                raise Busy(
                    f"{path} stays locked by {who}", remedy=f"wait until that ends, or end it ({kill})"
                )
            if late or (may and set(may.values()) == {False}):
                break
            time.sleep(_LOOK)
        yield
    finally:
        os.close(handle)


def _may_write(pid: int, directory: os.stat_result) -> bool | None:
    """None: it is gone, or not ours to see."""
    try:
        user, groups = credentials(pid)
    except OSError:
        return None
    if user in (0, os.geteuid(), directory.st_uid) or directory.st_mode & stat.S_IWOTH:
        return True
    return bool(directory.st_mode & stat.S_IWGRP) and directory.st_gid in groups
