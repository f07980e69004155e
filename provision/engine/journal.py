"""What began, how far it came, how it ended: in SQLite, durable, for recovery and for history.

An operation is written before it begins, each of its steps before it is done. An operation without an
end was killed; ``recover`` finishes or undoes it. The hypervisor and the disk store are the truth: a
lost journal loses history, not VMs."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from host.documents import json_object, json_value, moment, texts
from host.files import check_files_left, make_directory
from host.processes import Process
from inventory.errors import (
    FarmhandError,
    Interrupted,
    NoSpace,
    Text,
    UsageError,
    WrongState,
    remedy_as_data,
    remedy_of,
)
from provision.engine import events
from provision.engine.database import FILES, PATIENCE, busy, own_database, refuse_foreign
from provision.engine.events import Outbox
from provision.engine.facts import Facts, to_json
from provision.engine.record import Record
from provision.engine.requester import NOBODY, Requester

_VERSION = 2
_FOREIGN = "move it aside: history is lost, VMs are not"
_SCHEMA = (
    """
CREATE TABLE IF NOT EXISTS operations (
    id INTEGER PRIMARY KEY, verb TEXT NOT NULL, vms TEXT NOT NULL, facts TEXT NOT NULL,
    pid INTEGER NOT NULL, pid_start TEXT NOT NULL, boot TEXT NOT NULL,
    started TEXT NOT NULL, ended TEXT, outcome TEXT, error TEXT, hindrance TEXT,
    settled INTEGER NOT NULL DEFAULT 0,
    user TEXT NOT NULL DEFAULT '', uid INTEGER, login TEXT NOT NULL DEFAULT '',
    tty TEXT NOT NULL DEFAULT '', token TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS steps (
    operation INTEGER NOT NULL REFERENCES operations, n INTEGER NOT NULL,
    at TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY (operation, n)
);
CREATE INDEX IF NOT EXISTS unsettled ON operations (id) WHERE settled = 0;
"""
    + events.SCHEMA
)
_COLUMNS = (
    "id, verb, vms, facts, pid, pid_start, boot, started, ended, outcome, error, hindrance, settled,"
    " user, uid, login, tty, token"
)
_T = TypeVar("_T")
_F = TypeVar("_F", bound=Facts)
_F_co = TypeVar("_F_co", bound=Facts, covariant=True)
_current: ContextVar[Entry[Any] | None] = ContextVar("farmhand_entry", default=None)


def current_step(text: str) -> None:
    """The StepFn for drivers: writes a step of the activity under way in this context. Without one it
    does nothing."""
    entry = _current.get()
    if entry is not None:
        entry.step(text)


def current_entry() -> Entry[Any] | None:
    return _current.get()


class Journaled(Protocol[_F_co]):
    """What the journal has to know of an activity (``engine.operation.Activity``) to begin it."""

    @property
    def name(self) -> str: ...
    @property
    def facts(self) -> type[_F_co]: ...
    def build_of(self, facts: Any, /) -> str: ...


class Entry(Generic[_F]):
    """An activity under way."""

    def __init__(self, journal: Journal, id: int, facts: _F, steps: int = 0) -> None:
        self.id = id
        self.facts = facts
        self.must_finish = False  # an error then leaves it unfinished: recovery goes on with it
        self.verdict, self.why = "done", ""  # where it came to its end, and that is no good one
        self.told: Mapping[str, object] = {}  # of a build, to those who are told of its end
        self._journal = journal
        self._steps = steps
        self._guard = threading.Lock()

    def step(self, text: str) -> None:
        """Write a step; it is durable when this returns. Raises when it can't be written, or when the
        run is being interrupted: then the change must not be made."""
        if self._journal.interrupted.is_set():
            raise Interrupted("interrupted")
        with self._guard:
            self._steps += 1
            self._journal.write(
                "INSERT INTO steps VALUES (?, ?, ?, ?)", (self.id, self._steps, _now(), text)
            )

    def note(self, facts: _F) -> None:
        """Write what is known by now; it is durable when this returns."""
        with self._guard:
            self._journal.write(
                "UPDATE operations SET facts = ? WHERE id = ?", (to_json(facts), self.id)
            )
            self.facts = facts  # what could not be written isn't known to recovery


class Journal:
    """One farm's journal. Opened at first use; threads and processes may use it at once. ``writable``
    False: only reads, makes no file. ``outbox``: takes the events of what is written."""

    def __init__(
        self,
        path: Path,
        *,
        writable: bool = True,
        requester: Requester | None = None,
        outbox: Outbox | None = None,
    ) -> None:
        self.path = path
        self._requester = requester or NOBODY
        self._outbox = outbox
        self.interrupted = threading.Event()
        self._writable = writable
        self._guard = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._process: Process | None = None

    @contextlib.contextmanager
    def begin(self, activity: Journaled[_F], vms: Sequence[str], facts: _F) -> Iterator[Entry[_F]]:
        """Write the beginning, bind ``current_step`` to it, write the end. Left by Ctrl-C, Interrupted
        or what is no FarmhandError, the entry stays unfinished, as if the process were killed."""
        process, who = self._this_process(), self._requester
        build = activity.build_of(facts)
        row = self.write(
            "INSERT INTO operations (verb, vms, facts, pid, pid_start, boot, started,"
            " user, uid, login, tty, token) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                activity.name, json.dumps(list(vms)), to_json(facts),
                process.pid, process.start, process.boot, _now(),
                who.user, who.uid, who.login, who.tty, who.token,
            ),
            stage="began", build=build,
        )  # fmt: skip
        entry = Entry(self, row, facts)
        token = _current.set(entry)
        try:
            yield entry
        except Interrupted:
            self._end_quietly(row, "interrupted", "interrupted", build, settled=False)
            raise
        except Exception as error:
            # What nobody foresaw is as a kill: nobody has undone anything.
            undone = isinstance(error, FarmhandError) and not error.unfinished
            settled = undone and not entry.must_finish
            self._end_quietly(row, "failed", str(error), build, settled=settled)
            raise
        except BaseException:
            self._end_quietly(row, "interrupted", "interrupted", build, settled=False)
            raise
        else:
            stage = "passed" if entry.verdict == "done" else "failed"
            self._settle(row, entry.verdict, entry.why, stage, build, entry.told)
        finally:
            _current.reset(token)

    @contextlib.contextmanager
    def resume(self, record: Record, facts: _F) -> Iterator[Entry[_F]]:
        """Bind ``current_step`` to an unfinished activity while it is recovered. Left without an error,
        it is settled as recovered; left by an error, it stays unfinished."""
        entry = Entry(self, record.id, facts, len(record.steps))
        token = _current.set(entry)
        try:
            yield entry
        finally:
            _current.reset(token)

    def hinder(self, id: int, why: Text) -> None:
        """Note why it could not be recovered."""
        text = json.dumps(remedy_as_data(why))
        self.write("UPDATE operations SET hindrance = ? WHERE id = ?", (text, id))

    def settle(self, id: int, outcome: str, error: str = "", *, build: str = "") -> None:
        """Write the end of an activity that was recovered. ``build``: the id of the build it was."""
        self._settle(id, outcome, error, "recovered", build, {})

    def _settle(
        self, id: int, outcome: str, error: str, stage: str, build: str, told: Mapping[str, object]
    ) -> None:
        self.write(
            "UPDATE operations SET ended = coalesce(ended, ?), outcome = ?, error = ?, settled = 1"
            " WHERE id = ?",
            (_now(), outcome, error, id),
            id, stage=stage, build=build, told=told,
        )  # fmt: skip

    def unfinished(self) -> tuple[Record, ...]:
        """Activities whose process died, or was interrupted midway; oldest first."""
        records = self._records("WHERE settled = 0 ORDER BY id", ())
        return tuple(r for r in records if r.ended is not None or not r.process.alive())

    def find(self, id: int) -> Record | None:
        return next(iter(self._records("WHERE id = ?", (id,))), None)

    def history(
        self,
        limit: int = 50,
        *,
        vm: str = "",
        since: datetime | None = None,
        failed: bool = False,
        steps: bool = True,
    ) -> tuple[Record, ...]:
        """The latest activities, newest first: of all VMs, or of ``vm``; begun ``since`` then; only what
        did not end well."""
        where: list[str] = []
        arguments: list[object] = []
        if vm:
            where.append("? IN (SELECT value FROM json_each(vms))")
            arguments.append(vm)
        if since is not None:
            where.append("started >= ?")
            arguments.append(since.astimezone(UTC).isoformat(timespec="milliseconds"))
        if failed:
            where.append("outcome IN ('failed', 'interrupted', 'recovered')")  # the last: it was killed
        chosen = f"WHERE {' AND '.join(where)} " if where else ""
        return self._records(
            f"{chosen}ORDER BY id DESC LIMIT ?", (*arguments, limit), steps=steps
        )  # fmt: skip

    def close(self) -> None:
        with self._guard:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def write(
        self,
        sql: str,
        arguments: tuple[object, ...],
        operation: int | None = None,
        *,
        stage: str = "",
        build: str = "",
        told: Mapping[str, object] | None = None,
    ) -> int:
        """Run one statement, committed durably. Returns the row's id for an INSERT. ``stage``: what the
        statement makes of ``operation`` (absent: of the row inserted); its events are written in the
        same transaction, as those of ``build`` if it is one, with what is ``told`` of that. For this
        module and its operations only."""
        if not self._writable:
            raise UsageError(f"would write to {self.path}, which a plan must not")
        outbox = self._outbox if stage else None

        def run(connection: sqlite3.Connection) -> int:
            if outbox is None:
                return connection.execute(sql, arguments).lastrowid or 0
            with events.transaction(connection):
                row = connection.execute(sql, arguments).lastrowid or 0
                query = f"SELECT {_COLUMNS} FROM operations WHERE id = ?"  # noqa: S608 - our own words
                now = connection.execute(query, (operation or row,)).fetchone()
                outbox.put(connection, _record(now, ()), stage, build, told or {})
            return row

        row = self._use(run)
        if outbox is not None:
            outbox.start()
        return row

    def troubles(self) -> tuple[str, ...]:
        """What of the outbox could not be delivered so far, or was given up, in words."""
        outbox = self._outbox
        if outbox is None or not os.path.lexists(self.path):
            return ()
        return self._use(outbox.troubles)

    def _records(
        self, rest: str, arguments: tuple[object, ...], *, steps: bool = True
    ) -> tuple[Record, ...]:
        if not os.path.lexists(self.path):
            return ()

        def run(connection: sqlite3.Connection) -> tuple[Record, ...]:
            query = f"SELECT {_COLUMNS} FROM operations {rest}"  # noqa: S608 - our own words only
            rows = connection.execute(query, arguments).fetchall()
            return tuple(_record(row, _steps(connection, row[0]) if steps else ()) for row in rows)

        return self._use(run)

    def _use(self, run: Callable[[sqlite3.Connection], _T]) -> _T:
        with self._guard:
            try:
                if self._connection is None:
                    self._connection = self._open()
                return run(self._connection)
            except sqlite3.Error as error:
                if not self._writable and self._connection is not None:
                    # read as unchanging while somebody began to write: look again, the next time too
                    self.close()
                raise self._failure(error) from error
            except ValueError as error:
                raise self._damaged(str(error)) from error

    def _open(self) -> sqlite3.Connection:
        if not self._writable or self._read_only():
            return self._open_for_reading()
        make_directory(self.path.parent, mode=0o711)
        with contextlib.suppress(OSError):  # SQLite says why
            own_database(self.path)
        connection = sqlite3.connect(
            self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            deadline = time.monotonic() + 10
            while True:  # the change to WAL doesn't wait for a process that does the same
                try:
                    # first: what isn't ours is left as it is
                    refuse_foreign(connection, self.path, _VERSION, _FOREIGN)
                    connection.execute("PRAGMA journal_mode = WAL")
                    break
                except sqlite3.OperationalError as error:
                    locked = error.sqlite_errorcode & 0xFF in (
                        sqlite3.SQLITE_BUSY,
                        sqlite3.SQLITE_LOCKED,
                    )
                    if not locked or time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
            connection.execute("PRAGMA synchronous = FULL")
            if not refuse_foreign(connection, self.path, _VERSION, _FOREIGN):
                connection.executescript(
                    f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _read_only(self) -> bool:
        """Whether its file system is mounted so: what was done can be looked at all the same."""
        try:
            return bool(os.statvfs(self.path.parent).f_flag & os.ST_RDONLY)
        except OSError:
            return False

    def _open_for_reading(self) -> sqlite3.Connection:
        # Without a -wal file nobody has it open, and "immutable" makes no -shm file beside it.
        wal = self.path.with_name(self.path.name + "-wal").exists()
        uri = f"{self.path.absolute().as_uri()}?{'mode=ro' if wal else 'immutable=1'}"
        connection = sqlite3.connect(
            uri, uri=True, timeout=PATIENCE, isolation_level=None, check_same_thread=False
        )
        try:
            refuse_foreign(connection, self.path, _VERSION, _FOREIGN)
        except BaseException:
            connection.close()
            raise
        return connection

    def _this_process(self) -> Process:
        process = self._process
        if process is None:
            process = self._process = Process.this()
        return process

    def _end_quietly(self, id: int, outcome: str, error: str, build: str, *, settled: bool) -> None:
        """The error that ended the operation is the one to show, also if the journal fails now."""
        with contextlib.suppress(FarmhandError):
            self.write(
                "UPDATE operations SET ended = ?, outcome = ?, error = ?, settled = ? WHERE id = ?",
                (_now(), outcome, error, int(settled), id),
                id, stage="failed", build=build,
            )  # fmt: skip

    def _failure(self, error: sqlite3.Error) -> FarmhandError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            return NoSpace(
                f"cannot write the journal {self.path}: {error}; nothing was changed without it",
                remedy=f"make room on the file system of {self.path.parent}",
            )
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return busy(self.path, f"the journal {self.path}")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            check_files_left(FILES, f"write the journal {self.path}")
            return WrongState(
                f"cannot write the journal {self.path}: {error}",
                remedy=f"check owner, permissions and mount of {self.path.parent}",
            )
        return self._damaged(str(error))

    def _damaged(self, why: str) -> FarmhandError:
        return WrongState(
            f"the journal {self.path} is damaged: {why}",
            remedy=f"move it aside (mv {self.path} {self.path}.damaged): history is lost, VMs are not",
        )


def _steps(connection: sqlite3.Connection, id: int) -> tuple[tuple[datetime, str], ...]:
    rows = connection.execute("SELECT at, text FROM steps WHERE operation = ? ORDER BY n", (id,))
    return tuple((moment(at, "at"), str(text)) for at, text in rows)


def _record(row: tuple[object, ...], steps: tuple[tuple[datetime, str], ...]) -> Record:
    number, verb, vms, facts, pid, start, boot, started, ended, outcome, error, *rest = row
    hindrance, settled, *who = rest
    return Record(
        id=int(str(number)),
        verb=str(verb),
        vms=texts(json_value(str(vms)), "vms"),
        facts=json_object(str(facts)),
        process=Process(int(str(pid)), str(start), str(boot)),
        started=moment(started, "started"),
        ended=moment(ended, "ended") if ended else None,
        outcome=str(outcome or ""),
        error=str(error or ""),
        in_its_way=remedy_of(json_value(str(hindrance))) if hindrance else "",
        settled=bool(settled),
        requester=_requester(*who),
        steps=steps,
    )


def _requester(user: object, uid: object, login: object, tty: object, token: object) -> Requester:
    return Requester(
        user=str(user), uid=None if uid is None else int(str(uid)), login=str(login), tty=str(tty),
        token=str(token),
    )  # fmt: skip


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
