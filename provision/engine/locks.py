"""Locks that the kernel releases when their holder dies: flock(2) on a file each.

The file holds a note of who took it, for the refusal, and of what they do; it does not decide who has
the lock. A file left by a dead process blocks nobody.

What is held belongs to an operation, not to a process. Whoever takes the first lock in a context
begins a *lease*; all that is done within it (also by its threads, which copy the context, and by
operations that it begins itself) has the same lease and may take the lock again. Another operation of
the same process is refused just as another process is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from host.documents import json_object, made
from host.files import is_at, matching, open_lock, own_directory
from host.processes import Process, may_open
from inventory.errors import Busy, WrongState
from provision.engine.requester import NOBODY, Requester

_FILES, _FILES_EACH = 1024, 6  # open at once: of any command; for a VM its locks, and its store's
_VM = "vm-"
_TRIES = 100  # to open a lock file that others keep removing
_PATIENCE = 0.3  # seconds: somebody may just be looking (``holder``), or letting go


BesideFn = Callable[[Sequence[str], str], AbstractContextManager[None]]
"""Holds what goes with these locks, within the context. ``doing``, the second, says what for. Busy."""


class Lease:
    """One operation's claim on its locks, in whatever farms they are."""

    def __init__(self) -> None:
        self.recovering = threading.Lock()
        """Of its threads, one at a time looks for what killed commands left."""


_lease: ContextVar[Lease | None] = ContextVar("farmhand_lease", default=None)


@contextlib.contextmanager
def leased() -> Iterator[Lease]:
    """The lease of this context; a new one, for the duration of the ``with``, if there is none."""
    lease = _lease.get()
    if lease is not None:
        yield lease
        return
    lease = Lease()
    token = _lease.set(lease)
    try:
        yield lease
    finally:
        _lease.reset(token)


def has_lease() -> bool:
    """Whether this context is within an operation, which may hold locks."""
    return _lease.get() is not None


def lock_of(vm: str) -> str:
    return f"{_VM}{vm}"


def vms_of(locks: Sequence[str]) -> tuple[str, ...]:
    """Those whose locks are among these."""
    return tuple(lock.removeprefix(_VM) for lock in locks if lock.startswith(_VM))


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. ``user`` is the requester, in words. ``since`` is UTC. ``is_build``: see
    ``Operation.is_build``."""

    lock: str
    pid: int
    user: str
    since: datetime
    doing: str
    is_build: bool = False

    def __str__(self) -> str:
        since = self.since.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        return f"pid {self.pid} of {self.user}, since {since}, doing: {self.doing}"

    def as_dict(self) -> dict[str, object]:
        return {
            "lock": self.lock,
            "pid": self.pid,
            "user": self.user,
            "since": self.since.isoformat(),
            "doing": self.doing,
        }


class Locks:
    """One farm's locks, as one process sees them. Re-entrant within a lease."""

    def __init__(
        self, directory: Path, requester: Requester | None = None, *, beside: BesideFn | None = None
    ) -> None:
        """``requester``: named in the lock's note. Not needed for only looking. ``beside``: what is held
        with the locks that are taken anew, where others have other locks."""
        self._directory = directory
        self._beside = beside
        self._requester = requester or NOBODY
        self._guard = threading.Lock()
        self._held: dict[str, _Held] = {}
        self._begun = 0
        self._since: dict[str, int] = {}

    @contextlib.contextmanager
    def hold(self, *names: str, doing: str, is_build: bool = False) -> Iterator[None]:
        """Hold all of these locks, or none. ``is_build``: see ``Operation.is_build``. Busy if another
        operation holds one: it says who, since when, doing what."""
        note = _note(doing, self._requester, is_build=is_build)
        may_open(_FILES + _FILES_EACH * len(names))
        with leased() as lease, contextlib.ExitStack() as stack:
            fresh = []
            for name in sorted(set(names)):  # one order for everybody: no two wait for each other
                if self._take(name, lease, note):
                    fresh.append(name)
                stack.callback(self._let_go, name)
            if fresh and self._beside:
                stack.enter_context(self._beside(fresh, doing))
            yield

    def mine(self, name: str) -> bool:
        """Whether the operation of this context holds the lock."""
        with self._guard:
            held = self._held.get(name)
            return held is not None and held.lease is _lease.get()

    def held_since(self, name: str) -> int:
        """A number that changes each time this object takes the lock anew. The same number as before:
        nobody else has had the lock in between."""
        with self._guard:
            return self._since[name]

    def holder(self, name: str) -> Holder | None:
        """Who holds the lock now; None if nobody does. Takes no lock that could make others wait."""
        try:
            handle = open_lock(self._path(name), make=False)
        except (OSError, WrongState):  # no lock of ours; who takes it is told so
            return None
        try:
            holder, process = _read(name, handle)
            if holder is None:
                return None
            with self._guard:
                if name in self._held:
                    return holder
            if process is not None and not process.alive():
                return None
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return holder
            return None
        finally:
            os.close(handle)

    def held(self) -> tuple[Holder, ...]:
        """All locks held now, by others and by us."""
        names = [path.stem for path in matching(self._directory, "*.lock")]
        return tuple(holder for name in names if (holder := self.holder(name)))

    def remove_all(self) -> None:
        """Remove the lock files, as the farm goes; each must be free, or held by us. Whoever comes next
        makes new ones; whoever waits on a removed one notices (see ``_open``)."""
        for path in self._directory.glob("*.lock"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.lock"

    def _take(self, name: str, lease: Lease, note: bytes) -> bool:
        """Whether it is taken anew."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            with self._guard:
                held = self._held.get(name)
                if held is not None and held.lease is lease:
                    held.times += 1
                    return False
                got = None if held is not None else self._open(name)
                if got is not None:
                    _write(got, note)
                    self._held[name] = _Held(lease, got)
                    self._begun += 1
                    self._since[name] = self._begun
                    return True
            if time.monotonic() >= deadline:
                raise self._refusal(name)
            time.sleep(0.01)

    def _open(self, name: str) -> int | None:
        path = self._path(name)
        for _ in range(_TRIES):
            own_directory(self._directory, mode=0o700)
            try:
                handle = open_lock(path)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_at(handle, path):
                    return handle
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # removed meanwhile, with its farm: take the new one
        raise Busy(f"{path} is removed again and again", remedy="see who does, and try again")

    def _let_go(self, name: str) -> None:
        with self._guard:
            held = self._held[name]
            held.times -= 1
            if held.times:
                return
            del self._held[name]
            with contextlib.suppress(OSError):
                os.ftruncate(held.handle, 0)
            os.close(held.handle)  # the kernel's lock goes with it

    def _refusal(self, name: str) -> Busy:
        holder = self.holder(name)
        what = name.removeprefix("vm-") if name.startswith("vm-") else f"the lock {name!r}"
        if holder is None:
            return Busy(f"{what} is busy", remedy="try again")
        end = "" if holder.pid in (0, os.getpid()) else f", or end it (kill {holder.pid})"
        return Busy(f"{what} is held by {holder}", remedy=f"wait until that ends{end} and try again")


@dataclass(slots=True)
class _Held:
    lease: Lease
    handle: int
    times: int = 1


def _note(doing: str, requester: Requester, *, is_build: bool) -> bytes:
    process = Process.this()
    note = {
        "pid": process.pid,
        "start": process.start,
        "boot": process.boot,
        "user": str(requester),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "doing": doing,
        "is_build": is_build,
    }
    return json.dumps(note).encode()


def _write(handle: int, note: bytes) -> None:
    with contextlib.suppress(OSError):  # a full disk takes away the note, not the lock
        os.ftruncate(handle, 0)
        os.pwrite(handle, note, 0)


def _read(name: str, handle: int) -> tuple[Holder | None, Process | None]:
    text = os.pread(handle, 65536, 0)
    if not text:
        return None, None
    try:
        note = json_object(text)
        return made(Holder, note, lock=name), made(Process, note)
    except ValueError:  # cut off by a full disk
        return Holder(name, 0, "somebody", datetime.now(UTC), "something it could not note"), None
