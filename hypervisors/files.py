"""Files and directories of ours. Their modes are set, not asked for: whatever the umask is, what we made
is passed through, read and written by exactly those whom its mode names. What an admin made is left as
it is."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import BinaryIO

from inventory.errors import FarmhandError, NoSpace, WrongState

UMASK = 0o022
"""Of every command: programs that we start expect the usual one; what we forget, only we may write."""


_REMEDIES = {
    errno.EACCES: "check owner and permissions of {directory} and those above it",
    errno.EPERM: "check owner, permissions and attributes (lsattr) of what is in {directory}",
    errno.EROFS: "{directory} is mounted read-only: see findmnt, and why in dmesg",
    errno.ENOTDIR: "a file is where a directory should be: move it away",
    errno.EISDIR: "a directory is where a file should be: move it away",
    errno.EEXIST: "something else has that name: move it away",
    errno.EMFILE: "let it have more files open at once: ulimit -n, limits.conf(5)",
    errno.ENFILE: "let this machine have more files open at once: fs.file-max, sysctl(8)",
    errno.EIO: "see dmesg: the disk below {directory} may be failing",
}


def file_error(error: OSError, path: Path, what: str) -> FarmhandError:
    """The error for an admin: ``what`` is the thing that was being done, such as "write"."""
    reason = error.strerror or str(error)
    message = f"cannot {what} {path}: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(message, remedy=f"make room on the file system of {path.parent}")
    remedy = _REMEDIES.get(error.errno or 0, "")
    return WrongState(message, remedy=remedy.format(directory=path.parent))


def make_directory(path: Path, *, mode: int) -> None:
    """With its parents; those made here get 0711, so that a QEMU under another user may pass."""
    try:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):
                wanted = mode if directory == path else 0o711
                directory.mkdir(wanted)
                directory.chmod(wanted)
    except OSError as error:
        raise file_error(error, path, "make the directory") from error


def open_new(path: Path, *, mode: int = 0o600) -> BinaryIO:
    """To write the file, made or emptied. OSError."""
    return os.fdopen(_open(path, os.O_TRUNC, mode), "wb")


def write_note(path: Path, text: str) -> None:
    """A file that anybody may read and a power cut may take, in a cache of ours that is made if there is
    none: whole or not at all, whoever else writes it. OSError, FarmhandError."""
    make_directory(path.parent, mode=0o711)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with open_new(fresh, mode=0o644) as file:
        file.write(text.encode())
    fresh.replace(path)


def open_to_append(path: Path, *, mode: int = 0o600) -> BinaryIO:
    """Made if there is none, with that mode. Each write is one of write(2). OSError."""
    make_file(path, mode=mode)
    return path.open("ab", buffering=0)


def make_file(path: Path, *, mode: int = 0o600) -> None:
    """An empty file, if there is none: for a library that would make it with a mode of its own.
    OSError."""
    with contextlib.suppress(FileExistsError):
        os.close(_open(path, os.O_EXCL, mode))


def _open(path: Path, how: int, mode: int) -> int:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o600)
    try:
        os.fchmod(handle, mode)
    except BaseException:
        os.close(handle)
        raise
    return handle
