"""What the fake hypervisor and its disk store know: SQLite, in memory or in a file that processes share.

Each template, disk and machine is a row, read and checked when it is asked for, and written when it
was changed: one change costs one change, however many there are. Sums over all are kept as they change.
What was written outlives a kill; a power cut may damage the file.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from host.files import make_directory, make_file, open_lock
from hypervisors.api import ON, Machine, MachineSpec, Owner, Power, Template
from inventory.errors import DriverFailed, FarmhandError, NoSpace

_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS items (
    kind TEXT, name TEXT, farm TEXT, value TEXT, PRIMARY KEY (kind, name)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS items_of ON items (kind, farm);
CREATE TABLE IF NOT EXISTS ports (port INTEGER, machine TEXT, PRIMARY KEY (port, machine)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS ports_of ON ports (machine);
CREATE TABLE IF NOT EXISTS sums (id INTEGER PRIMARY KEY, used INTEGER, given INTEGER, peak INTEGER);
INSERT OR IGNORE INTO sums VALUES (1, 0, 0, 0);
COMMIT;
"""
_PATIENCE = 30  # seconds, for whoever takes back what a killed process was writing


_BYTES: Mapping[str, object] = {"ser_json_bytes": "base64", "val_json_bytes": "base64"}


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """``content``: what was written since ``template``, a label, from which it grows."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = _BYTES
    made: datetime
    content: bytes
    template: str


@dataclass(slots=True)
class StoredDisk:
    """A disk: its content, since its template, stands for all of its bytes."""

    __pydantic_config__: ClassVar[Mapping[str, object]] = _BYTES
    owner: Owner
    size: int
    template: str
    base: str
    content: bytes
    checkpoints: dict[str, StoredCheckpoint]  # oldest first; clean is the template


@dataclass(slots=True)
class StoredMemory:
    """What a machine held in memory, kept with a checkpoint of its disk. ``of``: that one's id; "": it
    isn't known to be kept yet. ``size``, ``vcpus``: the machine's then."""

    word: str
    of: str
    created: datetime
    size: int
    vcpus: int
    pause: float
    trouble: str = ""
    hidden: str = ""  # more of it that only a whole look shows


@dataclass(slots=True)
class StoredMachine:
    """``spec`` None: somebody else's machine. ``memory``: what it holds in memory while it is on:
    another word after each boot. ``opened``: the file that it writes to then. ``kept``: by
    checkpoint."""

    machine: Machine
    spec: MachineSpec | None
    memory: str = ""
    opened: str = ""
    kept: dict[str, StoredMemory] = field(default_factory=dict)


KINDS: Mapping[str, Any] = {"templates": Template, "disks": StoredDisk, "machines": StoredMachine}
_T = TypeVar("_T", Template, StoredDisk, StoredMachine)


@functools.cache
def adapter(kind: str) -> TypeAdapter[Any]:
    """Once a process: to make it takes far longer than to use it."""
    return TypeAdapter(KINDS[kind])


class Table(Generic[_T]):
    """All of one kind by their names, within one look or change. What it handed out may be changed in
    place."""

    def __init__(
        self,
        db: sqlite3.Connection,
        kind: str,
        *,
        farm: Callable[[_T], str],
        counts: Callable[[_T], int],
    ) -> None:
        """``farm``: whose one is. ``counts``: bytes that it adds to a sum."""
        self._db, self._kind = db, kind
        self._farm: Callable[[_T], str] = farm
        self._counts: Callable[[_T], int] = counts
        self._read: dict[str, tuple[str, int]] = {}  # as it is written, and what it counted for then
        self._values: dict[str, _T | None] = {}  # None: there is none

    def get(self, name: str) -> _T | None:
        if name not in self._values:
            self._values[name] = None
            query = "SELECT name, value FROM items WHERE kind = ? AND name = ?"
            self._load(query, self._kind, name)
        return self._values[name]

    def __getitem__(self, name: str) -> _T:
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def __setitem__(self, name: str, value: _T) -> None:
        self.get(name)  # what it may replace counts no longer
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        self[name]
        self._values[name] = None

    def of(self, farm: str) -> dict[str, _T]:
        """By name; "": nobody's."""
        self._load("SELECT name, value FROM items WHERE kind = ? AND farm = ?", self._kind, farm)
        found = {n: v for n, v in self._values.items() if v is not None and self._farm(v) == farm}
        return dict(sorted(found.items()))

    def all(self) -> dict[str, _T]:
        self._load("SELECT name, value FROM items WHERE kind = ?", self._kind)
        return {name: v for name, v in sorted(self._values.items()) if v is not None}

    def changed(self) -> Iterator[tuple[str, _T | None, int]]:
        """Each that was, now written; None: gone. And by how much more it counts."""
        for name, value in self._values.items():
            text, counted = self._read.get(name, ("", 0))
            if value is None:
                if text:
                    self._db.execute("DELETE FROM items WHERE kind = ? AND name = ?", (self._kind, name))
                    yield name, None, -counted
                continue
            fresh = adapter(self._kind).dump_json(value).decode()
            if fresh != text:
                row = (self._kind, name, self._farm(value), fresh)
                self._db.execute("REPLACE INTO items VALUES (?, ?, ?, ?)", row)
                yield name, value, self._counts(value) - counted

    def _load(self, query: str, *arguments: str) -> None:
        """ValidationError."""
        for name, text in self._db.execute(query, arguments):
            if name in self._read:
                continue  # seen before, and perhaps changed since
            value = adapter(self._kind).validate_json(text)
            self._read[name] = text, self._counts(value)
            if self._values.get(name) is None:
                self._values[name] = value


class World:
    """All of it, within one look or change."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self.templates: Table[Template] = Table(
            db, "templates", farm=lambda _: "", counts=lambda template: template.size
        )
        self.disks: Table[StoredDisk] = Table(
            db, "disks", farm=lambda disk: disk.owner.farm.id, counts=lambda disk: len(disk.content)
        )
        self.machines: Table[StoredMachine] = Table(db, "machines", farm=_farm, counts=_given)

    @property
    def used(self) -> int:
        """Bytes of templates and disks, before this change."""
        return self._sums()[0]

    @property
    def peak(self) -> int:
        """Bytes: the most that machines which ran at once ever had, before this change."""
        return self._sums()[1]

    def taken(self, ports: Iterable[int]) -> int | None:
        """One of these loopback ports that a running machine has; before this change."""
        for port in ports:
            if self._db.execute("SELECT 1 FROM ports WHERE port = ?", (port,)).fetchone():
                return port
        return None

    def save(self) -> None:
        used = given = 0
        for shelf in (self.templates, self.disks):
            used += sum(more for _, _, more in shelf.changed())
        for name, fake, more in self.machines.changed():
            given += more
            self._db.execute("DELETE FROM ports WHERE machine = ?", (name,))
            if fake and fake.spec and fake.machine.power in ON:
                rows = {(forward.host, name) for forward in fake.spec.nic.forwards}
                self._db.executemany("INSERT INTO ports VALUES (?, ?)", rows)
        if used or given:
            query = "UPDATE sums SET used = used + ?, given = given + ?, peak = max(peak, given + ?)"
            self._db.execute(query, (used, given, given))

    def _sums(self) -> tuple[int, int]:
        used, peak = self._db.execute("SELECT used, peak FROM sums").fetchone()
        return int(used), int(peak)


class Store:
    """A world in memory, or in a file shared by processes."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._guard = threading.RLock()
        self._world: World | None = None
        self._writes = False
        self._db: tuple[object, sqlite3.Connection] | None = None  # of which file

    def look(self) -> contextlib.AbstractContextManager[World]:
        """The world as it is: what is changed in it is lost. DriverFailed."""
        return self._use(write=False)

    def change(self) -> contextlib.AbstractContextManager[World]:
        """The world to work on, for this process alone; written when it is left, and nothing of it where
        that is by an error. DriverFailed, NoSpace."""
        return self._use(write=True)

    @contextlib.contextmanager
    def _use(self, *, write: bool) -> Iterator[World]:
        with self._guard:
            if self._world is not None:  # within another of this thread's, whose end is the end
                assert self._writes or not write, "a change within a look would be lost"
                yield self._world
                return
            with self._translated(), self._locked(exclusive=write), self._transaction() as db:
                self._world, self._writes = World(db), write
                try:
                    yield self._world
                    if write:
                        self._world.save()
                finally:
                    self._world = None

    @contextlib.contextmanager
    def _locked(self, *, exclusive: bool) -> Iterator[None]:
        """Against other processes. Who waits for it is woken; SQLite would look again and again."""
        if self.path is None:
            yield
            return
        make_directory(self.path.parent, mode=0o711)
        handle = open_lock(self.path.with_name(self.path.name + ".lock"))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._open()
        db.execute("BEGIN")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            db.rollback()
            raise

    def _open(self) -> sqlite3.Connection:
        """Kept between uses, unless the file was removed meanwhile (the farm was destroyed), or this is
        a fork."""
        if self._db is not None and self._db[0] == self._which():
            return self._db[1]
        if self.path:
            make_file(self.path)
        db = sqlite3.connect(
            self.path or ":memory:", timeout=_PATIENCE, isolation_level=None, check_same_thread=False
        )
        db.executescript(f"PRAGMA synchronous = OFF; {_SCHEMA}")
        self._db = self._which(), db
        return db

    def _which(self) -> object:
        if self.path is None:
            return None
        try:
            seen = self.path.stat()
        except FileNotFoundError:
            return "gone"
        return os.getpid(), seen.st_dev, seen.st_ino

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValidationError) as error:
            raise _failure(error, self.path) from error


def _farm(fake: StoredMachine) -> str:
    return fake.machine.owner.farm.id if fake.machine.owner else ""


def _given(fake: StoredMachine) -> int:
    return 0 if fake.machine.power is Power.STOPPED else fake.machine.current


def _failure(error: sqlite3.Error | ValidationError, path: Path | None) -> FarmhandError:
    why = str(error)
    if isinstance(error, ValidationError):
        why = error.errors()[0]["msg"]
    elif path:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            room = f"make room on the file system of {path.parent}"
            return NoSpace(f"cannot write {path}: {why}", remedy=room)
        if code not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            look = f"check owner, permissions and mount of {path.parent}"
            return DriverFailed(f"cannot use {path}: {why}", remedy=look)
    return DriverFailed(
        f"{path}: not the fake driver's state: {why}",
        remedy="remove it: the fake machines in it are gone then",
    )
