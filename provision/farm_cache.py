"""Farm files that were validated before: an unchanged one is not validated again.

Validating takes a while: pydantic's engine, YAML, the checks. Its result depends on the file's bytes and
on our own code alone. So it is kept in the cache directory under a name made of both, and what is found
under that name is never out of date. A kept file is used only if it, and its directory, are ours alone
to write. Any other is treated as absent."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import inventory
from host.files import make_directory
from inventory import kinds, plain
from inventory.collector import without_collector
from inventory.errors import FarmhandError
from inventory.model import Farm
from inventory.reading import read

_KEPT = 500  # farms; of more, those go that were not used for longest
_SLACK = 100  # so many more may be there: to look at the ages of all takes a while
_SUM = hashlib.sha256().digest_size


def known_farm(path: Path, cache: Path, *, keep: bool = True) -> Farm:
    """The farm in this file, as ``inventory.loader.load`` returns it. With ``keep`` False nothing is
    written, as in a plan. Errors: NotFound, InventoryError."""
    data = read(path)
    directory, name = cache / f"farms-{os.geteuid()}", _name(data)
    farm = _kept(directory, name)
    if farm is not None:
        return farm.at(path.absolute())
    from inventory.loader import loads

    farm = loads(data, path)
    if not keep:
        return farm
    with contextlib.suppress(OSError, FarmhandError):  # it costs time, no more
        _keep(directory, name, plain.dumps(farm))
    return farm


def _name(data: bytes) -> str:
    """A name made of the farm file's bytes and all that decides what they mean. The environment's
    packages are pinned: its path has their hashes. Of the modules in the kinds' rooms only names, sizes
    and times count: reading them would take a millisecond."""
    rooms = [(str(room), _looks(room)) for room in kinds.rooms()]
    digest = hashlib.sha256(repr((sys.version, sys.prefix, kinds.places(), rooms)).encode())
    own = Path(*inventory.__path__)
    for source in sorted((*own.glob("*.py"), *own.glob("*.core.json"))):
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def _looks(room: Path) -> list[tuple[object, ...]]:
    """Of its modules: a file that was written anew is another, or has another time."""
    with os.scandir(room) as entries:
        seen = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(".py")]
    return sorted((name, info.st_ino, info.st_size, info.st_mtime_ns) for name, info in seen)


def _kept(directory: Path, name: str) -> Farm | None:
    """The kept result; None if there is none, or none that may be believed."""
    try:
        with _opened(directory) as inside:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(name, flags, dir_fd=inside)
            with os.fdopen(handle, "rb") as file:
                _refuse_others(handle, stat.S_ISREG)
                content = file.read()
                with contextlib.suppress(OSError):
                    os.utime(handle)
            if hashlib.sha256(content[_SUM:]).digest() != content[:_SUM]:
                return None
            with without_collector():
                return plain.loads(content[_SUM:])
    except (OSError, ValueError):
        return None


def _keep(directory: Path, name: str, text: bytes) -> None:
    make_directory(directory, mode=0o700)
    with _opened(directory) as inside:
        fresh = f".{name}.{os.getpid()}.{threading.get_ident()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(fresh, flags, 0o600, dir_fd=inside)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(text).digest() + text)
            os.replace(fresh, name, src_dir_fd=inside, dst_dir_fd=inside)
        except BaseException:
            os.unlink(fresh, dir_fd=inside)
            raise
        with os.scandir(inside) as entries:
            kept = list(entries)
        if len(kept) <= _KEPT + _SLACK:
            return
        ages = sorted((os.stat(entry.name, dir_fd=inside).st_mtime_ns, entry.name) for entry in kept)
        for _, old in ages[:-_KEPT]:
            os.unlink(old, dir_fd=inside)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[int]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _refuse_others(handle, stat.S_ISDIR)
        yield handle
    finally:
        os.close(handle)


def _refuse_others(handle: int, of_kind: Callable[[int], bool]) -> None:
    """PermissionError unless it is ours alone to write."""
    found = os.fstat(handle)
    if not of_kind(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"not ours alone: mode {found.st_mode:o}, owner {found.st_uid}")
