"""Files and directories of ours. We set their modes ourselves, whatever the umask is, so that exactly
those whom the mode names can read, write or pass. What an admin made is left as it is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import secrets
import shlex
import shutil
import stat
import threading
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from host.processes import account, is_there
from inventory.errors import DriverFailed, FarmhandError, NoSpace, NotOurs, WrongState
from inventory.sizes import about

UMASK = 0o022
"""Of every command: programs that we start expect the usual one; what we forget, only we may write."""


_REMEDIES = {
    errno.EACCES: "check owner and permissions of {directory} and those above it",
    errno.EPERM: "check owner, permissions and attributes (lsattr) of what is in {directory}",
    errno.EROFS: "{directory} is mounted read-only: see findmnt, and why in dmesg",
    errno.ENOTDIR: "a file is where a directory should be: move it away",
    errno.EISDIR: "a directory is where a file should be: move it away",
    errno.EEXIST: "something else has that name: move it away",
    errno.ELOOP: "a link there leads to itself: move it away",
    errno.EMFILE: "let it have more files open at once: ulimit -n, limits.conf(5)",
    errno.ENFILE: "let this machine have more files open at once: fs.file-max, sysctl(8)",
    errno.EIO: "see dmesg: the disk below {directory} may be failing",
}


_TEMPORARY = re.compile(r"\.(.+?)\.([1-9]\d*)\.(?:\d+|iso)")
"""Ours, and the seed images'."""

_PART = re.compile(r"\.[0-9a-f]{16}\.part")

_ERESTARTSYS = 512  # the kernel's own: no program should see it


def file_error(error: OSError, path: Path, what: str) -> FarmhandError:
    """The error to show an admin. ``what``: what was being done, such as "write"."""
    reason = error.strerror or str(error)
    message = f"cannot {what} {path}: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(message, remedy=f"make room on the file system of {path.parent}")
    remedy = _REMEDIES.get(error.errno or 0, "")
    return WrongState(message, remedy=remedy.format(directory=path.parent))


SPARE = 256 * 2**20
"""Bytes that what others send leaves free on a file system of ours: for journal, logs and records."""


def check_room(directory: Path, wanted: int) -> None:
    """NoSpace unless so many bytes of others' fit there, and leave ``SPARE`` free. OSError."""
    free = shutil.disk_usage(directory).free
    if free < wanted + SPARE:
        raise NoSpace(
            f"no room for {about(wanted)} in {directory}: {about(free)} are free, of which "
            f"{about(SPARE)} are left for farmhand's own records",
            remedy=f"make room on the file system of {directory}",
        )


def out_of_files(error: Exception, doing: str) -> FarmhandError | None:
    """The error to show an admin where no more files could be opened, which any call may meet; None: it
    is another."""
    if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
        return None
    return WrongState(f"cannot {doing}: {error.strerror}", remedy=_REMEDIES[error.errno])


def check_files_left(files: int, doing: str) -> None:
    """WrongState unless this process can open so many files more, now. For a library that ends the
    process where it can't. ``doing``: such as "connect to libvirt"."""
    held: list[int] = []
    try:
        while len(held) < files:
            held.append(os.eventfd(0))
    except OSError as error:
        raise out_of_files(error, doing) or WrongState(f"cannot {doing}: {error.strerror}") from error
    finally:
        for handle in held:
            os.close(handle)


def of_the_disk(error: OSError) -> FarmhandError | None:
    """The error to show for what nobody looked out for, where it is a file that is at fault (full,
    read-only, failing, something else in its place), not our program: None."""
    path = error.filename2 or error.filename
    known = {*_REMEDIES, errno.ENOSPC, errno.EDQUOT}
    if not isinstance(path, str) or error.errno not in known:
        return None
    return file_error(error, Path(path), "use")


def foreign(path: Path, found: object, ours: int, remedy: str) -> WrongState:
    """The error for a file in a format that isn't ours: another farmhand wrote it, and there is no
    conversion. ``remedy``: what to do if that farmhand is no longer used."""
    known = f"in format {found}" if isinstance(found, int) else "in an unknown format"
    return WrongState(
        f"{path} is {known}, and this farmhand reads and writes format {ours}",
        remedy=f"use the farmhand that wrote it, or {remedy}",
    )


def make_directory(path: Path, *, mode: int) -> None:
    """Make a directory with its parents. Parents made here get mode 0711, so that a QEMU under another
    user may pass."""
    try:
        missing = takewhile(lambda each: not each.exists(), (path, *path.parents))
        for directory in reversed(tuple(missing)):
            with contextlib.suppress(FileExistsError):
                wanted = mode if directory == path else 0o711
                directory.mkdir(wanted)
                directory.chmod(wanted)
    except OSError as error:
        raise file_error(error, path, "make the directory") from error


def same_place(one: Path, other: Path) -> bool:
    """Whether both names lead to the same file or directory, be it by links or mounts; also where it
    isn't there and they are spelled alike."""
    try:
        return one == other or one.samefile(other)
    except (OSError, ValueError):  # not there; a NUL in the path
        return False


def own_directory(path: Path, *, mode: int) -> None:
    """Make a directory of ours with its parents, as ``make_directory`` does, or take the one that is
    there: only if it passes ``check_own_directory``."""
    make_directory(path, mode=mode)
    check_own_directory(path)


def check_own_directory(path: Path) -> None:
    """WrongState unless the directory is ours (or root's) and nobody else may write in it, or there is
    none. A link to it is an admin's way to move it: one that somebody else made is refused. What others
    may read is for the admin to say."""
    try:
        handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            found = os.fstat(handle)
        finally:
            os.close(handle)
        if stat.S_ISLNK(found.st_mode):
            if found.st_uid not in (0, os.geteuid()):
                raise _not_ours(path, f"is a link that {account(found.st_uid)} made")
            found = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise _not_ours(path, "is a link to nothing") from None
        return
    except PermissionError:
        check_whose(path, "a directory of ours")
        return
    except OSError as error:
        raise file_error(error, path, "look at") from error
    if not stat.S_ISDIR(found.st_mode):
        raise _not_ours(path, f"is {_kind(found.st_mode)}, and should be a directory of ours")
    if found.st_uid not in (0, os.geteuid()):
        us, other = account(os.geteuid()), account(found.st_uid)
        raise _not_ours(path, f"belongs to {other}, and we are {us}")
    if found.st_mode & 0o022:
        mode = stat.S_IMODE(found.st_mode)
        raise WrongState(
            f"{path}: others may write in this directory of ours (mode {mode:04o})",
            remedy=f"if all that is in it is yours: chmod go-w {shlex.quote(str(path))}",
        )


def check_whose(path: Path, what: str) -> None:
    """NotOurs, naming whose it is, where what is there belongs to another user, be it root: we could
    neither read nor change it. What can't be seen is never taken for absent: it is his whose directory
    hides it. ``what``: what it is to farmhand."""
    hidden: OSError | None = None
    for place in (path, *path.parents):
        try:
            owner = place.stat().st_uid
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError as error:  # a directory above hides it
            hidden = error
            continue
        except OSError as error:
            raise file_error(error, place, "look at") from error
        break
    if owner == os.geteuid():
        if hidden:
            raise file_error(hidden, path, "look at") from hidden
        return
    us, other = account(os.geteuid()), account(owner)
    seen = f"can't be seen: {place} belongs to" if hidden else "belongs to"
    raise NotOurs(
        f"{path}, {what}, {seen} {other}, and we are {us}",
        remedy=f"go on as {other}; or, for a farm of your own, set FARMHAND_STATE_DIR and "
        "FARMHAND_RUNTIME_DIR to directories of yours",
    )


def own_file(path: Path, *, mode: int = 0o600, make: bool = True) -> None:
    """Make an empty file if there is none (``make``), and see to it that what is there is a regular file
    of ours with one name, and with no more than our mode: for a library that opens it by name. It is
    not opened, for closing it would drop the locks that this process has on it (fcntl(2)). WrongState;
    OSError where it can't be made."""
    if make:
        make_file(path, mode=mode)  # O_EXCL follows no link
    handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        _refuse_file(path, found)
        if found.st_mode & 0o7777 & ~mode:
            os.chmod(f"/proc/self/fd/{handle}", mode)  # noqa: PTH101 - of a descriptor
    finally:
        os.close(handle)


def open_lock(path: Path, *, make: bool = True) -> int:
    """A descriptor of a lock file of ours, for flock(2). Nothing in it is changed, no link is followed,
    and nobody is waited for. ``make``: it is made where there is none, and only we may open it; without,
    it is opened for looking alone. FileNotFoundError, WrongState."""
    flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    flags |= os.O_RDWR | os.O_CREAT if make else os.O_RDONLY
    try:
        handle = os.open(path, flags, 0o600)
    except FileNotFoundError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            _refuse_file(path, path.lstat())
        raise file_error(error, path, "open the lock") from error
    try:
        found = os.fstat(handle)
        _refuse_file(path, found)
        if make and found.st_mode & 0o077:
            os.fchmod(handle, 0o600)
    except BaseException:
        os.close(handle)
        raise
    return handle


def is_at(handle: int, path: Path) -> bool:
    """Whether the open file still has that name: a lock's holder may have removed it, and who waited
    for it holds nothing then."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _refuse_file(path: Path, found: os.stat_result) -> None:
    """WrongState unless it is a regular file, ours, with one name (none: it was just removed)."""
    if not stat.S_ISREG(found.st_mode):
        raise _not_ours(path, f"is {_kind(found.st_mode)}, and should be a file of ours")
    if found.st_uid != os.geteuid():
        us, other = account(os.geteuid()), account(found.st_uid)
        raise _not_ours(path, f"belongs to {other}, and we are {us}")
    if found.st_nlink > 1:
        raise _not_ours(path, "has another name too (a hard link)")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFREG: "a file",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def _not_ours(path: Path, why: str) -> WrongState:
    return WrongState(
        f"{path} {why}: it is not used",
        remedy=f"look who made it (ls -ld {shlex.quote(str(path))}), then move it away",
    )


def read_secret(path: Path, what: str, most: int) -> bytes:
    """A secret of the admin's, from a file that ``check_secret`` is content with. It is opened once.
    ``what``: such as "the passphrase". ``most``: bytes that it may have. WrongState."""
    with _secret(path, what) as file:
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise file_error(error, path, f"read {what}") from error
    if len(data) > most:
        raise WrongState(f"{path} is no file of {what}: it has more than {most} bytes")
    return data


def check_secret(path: Path, what: str) -> None:
    """WrongState unless it is a regular file of ours with one name, that nobody else may read. No link
    is followed and nobody is waited for. For a program that reads it by its name, right before that."""
    with _secret(path, what):
        pass


def _refuse_secret(path: Path, found: os.stat_result) -> None:
    """As ``_refuse_file``. The admin gave us its name."""
    try:
        _refuse_file(path, found)
    except WrongState as error:
        us, quoted = account(os.geteuid()), shlex.quote(str(path))
        error.remedy = f"give us a file of ours: install -m 600 -o {us} {quoted} NEW, and name that"
        raise


@contextlib.contextmanager
def _secret(path: Path, what: str) -> Iterator[BinaryIO]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        with contextlib.suppress(OSError):
            _refuse_secret(path, path.lstat())
        raise file_error(error, path, f"read {what}") from error
    try:
        found = os.fstat(handle)
        _refuse_secret(path, found)
        if found.st_mode & 0o077:
            raise WrongState(
                f"{path}: others may read or change {what} (mode {stat.S_IMODE(found.st_mode):04o})",
                remedy=f"chmod 600 {shlex.quote(str(path))}",
            )
    except BaseException:
        os.close(handle)
        raise
    with os.fdopen(handle, "rb") as file:
        yield file


def open_new(path: Path, *, mode: int = 0o600) -> BinaryIO:
    """Open a file for writing; it is made, or emptied. OSError."""
    return os.fdopen(_open(path, os.O_TRUNC, mode), "wb")


def write_note(path: Path, text: str) -> None:
    """Write a file that anybody may read and that a power cut may take, in a cache of ours (made if need
    be). It is written whole or not at all, whoever else writes it. Errors: OSError, FarmhandError."""
    own_directory(path.parent, mode=0o711)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with open_new(fresh, mode=0o644) as file:
        file.write(text.encode())
    fresh.replace(path)


def open_to_append(path: Path, *, mode: int = 0o600) -> BinaryIO:
    """Open a file for appending; it is made with that mode if there is none. Each write is one write(2).
    OSError."""
    make_file(path, mode=mode)
    return path.open("ab", buffering=0)


def make_file(path: Path, *, mode: int = 0o600) -> None:
    """Make an empty file if there is none, with our mode, for a library that would choose a mode itself.
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


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` durably: rename(2) after fsync(2), then fsync of its directory. The directory
    must exist. Errors: NoSpace, WrongState."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise file_error(error, path, "write") from error


def sweep(directory: Path, name: str = "") -> None:
    """Remove temporary files and directories (``.NAME.PID...``) that processes left when they died while
    writing; only of ``name`` if given. Those of living processes stay."""
    for path in directory.glob(f".{name}*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not is_there(int(match[2])) and name in ("", match[1]):
            with contextlib.suppress(FarmhandError):
                remove_for_good(path)


@contextlib.contextmanager
def part_of(name: str, directory: Path) -> Iterator[Path]:
    """A fresh directory within ``directory``, which may be anybody's, for what is to be called ``name``
    once it is whole. It is gone at the end, unless it was renamed. What a killed process left there for
    that name goes first: nobody holds its lock. OSError."""
    for left in directory.glob(f".{glob.escape(name)}.*.part"):
        if _PART.fullmatch(left.name.removeprefix(f".{name}")):
            with contextlib.suppress(OSError, FarmhandError), _locked(left):
                remove(left)
    part = directory / f".{name}.{secrets.token_hex(8)}.part"
    part.mkdir(0o700)
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # no locks on that file system: then nobody takes it away
                stack.enter_context(_locked(part))
            yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory of ours. OSError where it isn't ours, or somebody else does."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(directory))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def write_new(path: Path, data: bytes, *, mode: int) -> None:
    """Write a new file. When this returns, its bytes are on the disk; its name may not be yet."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.fchmod(handle, mode)
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """fsync(2) a file's or a device's bytes, or a directory's names."""
    handle = open_node(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_node(path: Path, flags: int, *, timeout: float = 60) -> int:
    """As open(2), for what may be a ZFS volume. While others work on the pool for more than a second,
    opening a volume fails with the kernel's own ERESTARTSYS, which means "try again" (OpenZFS's
    zvol_open, zvol_open_timeout_ms). OSError."""
    limit = time.monotonic() + timeout
    while True:
        try:
            return os.open(path, flags)
        except OSError as error:
            if error.errno != _ERESTARTSYS or time.monotonic() > limit:
                raise
        time.sleep(0.05)


def remove(path: Path) -> bool:
    """Remove a file or a whole directory. Returns whether there was one."""
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


def remove_for_good(path: Path) -> bool:
    """As ``remove``, also where a command is at work that has outlived the process which started it: a
    directory first gets another name, so a file that is yet to come finds no place."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        if path.is_symlink() or not path.is_dir():
            return remove(path)
        path.rename(aside)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise file_error(error, path, "remove") from error
    return remove(aside)


def blocks(path: Path) -> int:
    """Bytes that it takes on its file system; 0 if it is gone."""
    try:
        return path.stat().st_blocks * 512
    except OSError:  # or a link to itself
        return 0


def changed(path: Path) -> datetime:
    """Its modification time; the present time if it is gone."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except OSError:  # or a link to itself
        return datetime.now(UTC)


def matching(directory: Path, pattern: str) -> list[Path]:
    """Paths in the directory that match, sorted. Empty as well if the directory goes meanwhile: another
    thread or process may be destroying that machine, and a look at all machines must not fail because of
    it. WrongState where it can't be read."""
    try:
        with os.scandir(directory) as entries:
            return sorted(directory / one.name for one in entries if fnmatchcase(one.name, pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:  # Path.glob would find nothing in it
        raise file_error(error, directory, "look into") from error


def barred(directory: Path, uid: int, groups: Collection[int] = ()) -> Path | None:
    """The first directory on the way there, it included, that this user may not pass through; None: the
    way is free, as far as it is made."""
    for place in (*reversed(directory.parents), directory):
        try:
            seen = place.stat()
        except FileNotFoundError:
            return None
        owner, group = seen.st_uid == uid, seen.st_gid in groups
        needed = stat.S_IXUSR if owner else stat.S_IXGRP if group else stat.S_IXOTH
        if uid and not seen.st_mode & needed:
            return place
    return None


def reachable(directory: Path, uid: int) -> None:
    """DriverFailed unless that user may pass through to ``directory``. Otherwise QEMU would fail later,
    with "permission denied" on a file that is plainly its own."""
    if place := barred(directory, uid):
        raise DriverFailed(
            f"{place}: QEMU's user (uid {uid}) may not pass through to its disks below",
            remedy=f"chmod o+x {shlex.quote(str(place))}, "
            "or keep the farm's state elsewhere (FARMHAND_STATE_DIR)",
        )
