"""Files that are either the old or the new, never between."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
from pathlib import Path

from inventory.errors import FarmhandError, NoSpace, WrongState

_TEMPORARY = re.compile(r"\.(.+?)\.([1-9]\d*)\.(?:\d+|iso)")
"""Ours, and the seed images'."""


def file_error(error: OSError, path: Path, what: str) -> FarmhandError:
    """The error for an admin: ``what`` is the thing that was being done, such as "write"."""
    reason = error.strerror or str(error)
    message = f"cannot {what} {path}: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(message, remedy=f"make room on the file system of {path.parent}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return WrongState(
            message, remedy="let it have more files open at once: ulimit -n, limits.conf(5)"
        )
    return WrongState(message, remedy=f"check owner, permissions and mount of {path.parent}")


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` durably (rename(2) after fsync(2), then its directory's). The directory must
    exist. Errors: NoSpace, WrongState."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise file_error(error, path, "write") from error


def sweep(directory: Path, name: str = "") -> None:
    """Remove what processes that died while writing left in it: ``.NAME.PID...``, only for ``name`` if
    given. Living ones' stay."""
    for path in directory.glob(f".{name}*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not Path("/proc", match[2]).exists() and name in ("", match[1]):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in it durable."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_directory(path: Path, *, mode: int) -> None:
    """With its parents; those made here get 0711, so that a QEMU under another user may pass."""
    try:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):
                directory.mkdir()
                directory.chmod(mode if directory == path else 0o711)
    except OSError as error:
        raise file_error(error, path, "make the directory") from error


def remove(path: Path) -> bool:
    """Remove a file or a whole directory; whether there was one."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise file_error(error, path, "remove") from error
    return True
