"""What is in the cache directory: all of it can be made again. How large it is, since when nobody
changed it, and what uses it now."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

from host.file_lock import FileLock
from host.files import changed, file_error, remove, same_place
from host.processes import command_line, described, lockers, pids
from host.space import taken
from inventory.errors import Busy

_GONE = ".gone-"
_COMMAND = "/"
_PROGRAMS = ("/cli/start.py", "/farmhand")
"""What a command of farmhand's is run by: python(1)'s argument."""


@dataclass(frozen=True, slots=True)
class CacheKind:
    """``pattern``: of its items, below the cache directory. ``locks``: held, in the item's directory, by
    who makes one. ``beside``: suffixes of what belongs to an item; the first of them says that it is
    whole. ``by_commands``: any command of farmhand's may be about to use it."""

    name: str
    pattern: str
    locks: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    by_commands: bool = False


_KINDS = (
    CacheKind("Python environment", "venv-*", locks=("setup.lock",)),
    CacheKind("built image", "images/*.qcow2", (".lock",), (".json", ".packages")),
    CacheKind("fetched file", "fetched/[!.]*", by_commands=True),
    CacheKind("package download", "downloads/[!.]*", by_commands=True),
    CacheKind("lab image", "lab/image-*", ("build.lock", "start.lock")),
    CacheKind("saved lab start", "lab/start-*", ("build.lock", "start.lock")),
    CacheKind("lab module set", "lab/zfs-*", ("build.lock",)),
    CacheKind("lab emulator", "lab/qemu-*", ("qemu.lock",)),
    CacheKind("test guest", "test-*"),
    CacheKind("test tool", "tests/[!.]*"),
    *(CacheKind("removed cache", f"{place}{_GONE}*") for place in ("", "*/")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CachedItem:
    """``changed``: last. ``in_use``: by what; "" by nothing that is seen."""

    kind: CacheKind
    path: Path
    bytes: int
    changed: datetime
    in_use: str


def cached(cache: Path) -> Sequence[CachedItem]:
    """All that is of any size, the largest first. What is small, and belongs to no kind of ours, is not
    told."""
    there = [(kind, path) for kind in _KINDS for path in cache.glob(kind.pattern)]
    users = _users(cache) if there else {}  # to look at all processes takes a while
    found = []
    for kind, path in there:
        if path.suffix != ".lock":
            beside = tuple(path.with_suffix(suffix) for suffix in kind.beside)
            size = sum(map(taken, (path, *beside)))
            in_use = _in_use(kind, path, cache, users)
            found.append(CachedItem(kind, path, size, changed(path), in_use))
    return sorted(found, key=lambda item: (-item.bytes, item.path))


def drop(item: CachedItem, cache: Path) -> None:
    """Remove it: it goes in one step. Busy if it is in use by now; WrongState."""
    with contextlib.ExitStack() as stack:
        for name in item.kind.locks:
            if (lock := item.path.parent / name).exists():
                stack.enter_context(FileLock(lock).hold(waits=partial(_refuse, lock)))
        if user := _in_use(item.kind, item.path, cache, _users(cache)):
            raise Busy(f"{item.path} is in use by {user}")
        gone = item.path.with_name(f"{_GONE}{secrets.token_hex(8)}")
        try:
            for suffix in item.kind.beside:
                item.path.with_suffix(suffix).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                item.path.rename(gone)
        except OSError as error:
            raise file_error(error, item.path, "remove") from error
    remove(gone)


def _refuse(lock: Path) -> NoReturn:
    raise Busy(f"{lock} is locked")


def _in_use(kind: CacheKind, path: Path, cache: Path, users: Mapping[str, str]) -> str:
    """By what; "" by nothing that is seen."""
    if same_place(Path(sys.prefix), path):
        return "this very command"
    for name in kind.locks:
        for pid in lockers(path.parent / name):
            return described(pid)
    if kind.by_commands and _COMMAND in users:
        return users[_COMMAND]
    return users.get(str(path.relative_to(cache)), "")


def _users(cache: Path) -> Mapping[str, str]:
    """Who uses what below it: of each path, and of those above it, relative to it, a process that has it
    open, runs it, is in it, or was told of it; and of ``_COMMAND`` another command of farmhand's. As far
    as processes can be seen."""
    names = "|".join(re.escape(str(name)) for name in {cache, cache.resolve()})
    below = re.compile(rf"(?:{names})/([^\s\0\"',:;=]+)")
    found: dict[str, str] = {}
    for pid in pids():
        if pid == os.getpid():
            continue
        for text in _named_by(pid):
            for path in dict.fromkeys(below.findall(text)):
                for place in (path, *map(str, Path(path).parents)):
                    if place in found:
                        break
                    found[place] = described(pid)
        with contextlib.suppress(OSError):
            if any(word.endswith(_PROGRAMS) for word in command_line(pid)[:4]):
                found[_COMMAND] = described(pid)
    return found


def _named_by(pid: int) -> Iterator[str]:
    place = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        yield "\0".join(command_line(pid))
    for link in ("cwd", "exe", "root"):
        with contextlib.suppress(OSError):
            yield str((place / link).readlink())
    with contextlib.suppress(OSError):
        for handle in (place / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(handle.readlink())
    with contextlib.suppress(OSError):
        yield (place / "maps").read_text(errors="replace")


def by_kind(items: Sequence[CachedItem]) -> Mapping[str, Sequence[CachedItem]]:
    """By their kinds' names."""
    kinds = dict.fromkeys(item.kind.name for item in items)
    return {kind: [item for item in items if item.kind.name == kind] for kind in kinds}
