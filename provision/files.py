"""Files that are either the old or the new, never between."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from pathlib import Path

from hypervisors.files import file_error, make_directory

__all__ = ["file_error", "make_directory", "remove", "sweep", "sync_directory", "write_atomic"]

_TEMPORARY = re.compile(r"\.(.+?)\.([1-9]\d*)\.(?:\d+|iso)")
"""Ours, and the seed images'."""


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
