"""The outbox: what began and how it ended, to be told to the farm file's subscribers.

An event is written in the transaction that writes the operation's row in the journal, once for each
subscriber that wants it. So a kill loses none, and none tells of an operation that never was.

Each subscriber has a courier: a thread that delivers its events in their order, beside the operation. An
event leaves the outbox when the subscriber has taken it, so it is delivered at least once; a second time
it has the same id. What is left is delivered by the next command. At a command's end nobody waits for a
courier longer than ``PATIENCE`` seconds, and no operation fails because of one.

What can't be delivered is tried again after longer and longer waits. It is given up after ``_GIVE_UP``
days and ``_TRIES`` tries, or when the subscriber says that it will never take it. ``Outbox.troubles``
tells."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from host.documents import moment, texts
from host.file_lock import FileLock
from host.files import own_directory
from inventory.errors import FarmhandError
from inventory.subscribers import EventSubscriber

if TYPE_CHECKING:
    from host.run import Runner
    from provision.engine.record import Record

PATIENCE = 3.0
"""Seconds that a command waits at its end for what can be delivered now."""
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 900.0  # seconds between tries; each is twice the one before
_TRIES, _GIVE_UP = 8, 3  # tries, days
_MOST = 10_000  # events that wait for one subscriber; of more, the oldest go
_TOLD = 7  # days that ``troubles`` tells of events given up
_KEPT_TROUBLES = 100
_LONGEST_ERROR = 4000  # characters of an operation's error

SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    id INTEGER PRIMARY KEY, subscriber TEXT NOT NULL, event TEXT NOT NULL, type TEXT NOT NULL,
    at TEXT NOT NULL, body TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL DEFAULT 0,
    why TEXT NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS outbox_of ON outbox (subscriber, id);
CREATE TABLE IF NOT EXISTS undelivered (
    id INTEGER PRIMARY KEY, subscriber TEXT NOT NULL, event TEXT NOT NULL, type TEXT NOT NULL,
    at TEXT NOT NULL, why TEXT NOT NULL
);
"""
"""Of the journal's file, beside its own. ``at`` is when it was written, or given up; ``due`` is in
seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a subscriber is told, the same at each try. ``body`` is JSON; the id and the type are in it,
    too."""

    id: str
    type: str
    body: bytes


class Undelivered(FarmhandError):
    """The subscriber did not take it now; it may later."""


class Refused(Undelivered):
    """The subscriber will never take this event. It is not tried again."""


class Subscriber(Protocol):
    """Somebody who is told of events. Each kind is a file in ``provision/events/``."""

    def deliver(self, event: Event) -> None:
        """Deliver it once, within a time limit of its own. Refused: never try again. Undelivered, or any
        other error: try again later."""

    def check(self) -> None:
        """Raises FarmhandError for what would keep events from being delivered, as far as that shows
        from here."""


class SubscriberSection(EventSubscriber, ABC):
    """The base of each kind's section of the farm file: it makes the subscriber."""

    @abstractmethod
    def opened(self, beside: Path, runner: Runner) -> Subscriber:
        """The subscriber; nobody is called yet. ``beside``: the farm file's directory."""


class Outbox:
    """One farm's outbox. ``path``: the journal's file. ``open``: makes a subscriber of its section."""

    def __init__(
        self,
        farm: str,
        sections: Mapping[str, EventSubscriber],
        path: Path,
        locks: Path,
        open: Callable[[EventSubscriber], Subscriber],
    ) -> None:
        self._farm = farm
        self._sections = sections
        self._path = path
        self._locks = locks
        self._open = open
        self._guard = threading.Lock()
        self._couriers: dict[str, _Courier] = {}

    def put(
        self,
        db: sqlite3.Connection,
        record: Record,
        stage: str,
        build: str,
        more: Mapping[str, object],
    ) -> None:
        """Write the events of one change of ``record``, within the transaction that writes the record.
        ``stage``: began, passed, failed or recovered. ``build``: the id of the build that it is; "": of
        none. ``more``: what a build adds."""
        kind = f"{'build' if build else 'operation'}.{stage}"
        wanting = [name for name, one in self._sections.items() if _wants(one, kind, record)]
        if not wanting:
            return
        key, at = f"evt_{os.urandom(16).hex()}", datetime.now(UTC).isoformat(timespec="milliseconds")
        data: dict[str, object] = {
            "farm": self._farm,
            "controller": os.uname().nodename,
            "operation": {
                "id": record.id,
                "verb": record.verb,
                "vms": list(record.vms),
                "started": record.started.isoformat(),
                "ended": record.ended.isoformat() if record.ended else None,
                "outcome": record.outcome,
                "error": record.error[:_LONGEST_ERROR],
            },
            "requester": record.requester.as_dict(),
        }
        if build:
            data["build"] = {"id": build, **more}
        body = json.dumps({"id": key, "type": kind, "timestamp": at, "data": data})
        _forget_strangers(db, self._sections)
        for name in wanting:
            db.execute(
                "INSERT INTO outbox (subscriber, event, type, at, body) VALUES (?, ?, ?, ?, ?)",
                (name, key, kind, at, body),
            )
            _drop_oldest(db, name)

    def start(self) -> None:
        """Start the couriers; they deliver until ``close``."""
        if not self._sections or not self._path.exists():
            return
        with self._guard:
            for name, section in self._sections.items():
                courier = self._couriers.get(name)
                if courier is None or not courier.is_alive():
                    lock = self._locks / f"events-{name}.lock"
                    courier = self._couriers[name] = _Courier(
                        name, section, self._open, self._path, lock
                    )
                    courier.start()
                courier.wake()

    def close(self, patience: float = PATIENCE) -> None:
        """Wait at most ``patience`` seconds for what can be delivered now. The next command delivers the
        rest."""
        with self._guard:
            couriers = tuple(self._couriers.values())
            self._couriers.clear()
        end = time.monotonic() + patience
        for courier in couriers:
            courier.finish()
        for courier in couriers:
            courier.join(max(0.0, end - time.monotonic()))
        for courier in couriers:
            courier.leave()

    def check(self) -> Iterator[tuple[str, FarmhandError | None]]:
        """Each subscriber, with what would keep events from being delivered to it."""
        for name, section in self._sections.items():
            try:
                with _unforeseen():
                    self._open(section).check()
            except FarmhandError as error:
                yield name, error
            else:
                yield name, None

    def troubles(self, db: sqlite3.Connection) -> tuple[str, ...]:
        """What could not be delivered so far, and what was given up lately, in words."""
        found = []
        for name in self._sections:
            row = db.execute(
                "SELECT tries, why, (SELECT count(*) FROM outbox WHERE subscriber = ?)"
                " FROM outbox WHERE subscriber = ? ORDER BY id LIMIT 1",
                (name, name),
            ).fetchone()
            if row and row[1]:
                waiting = f"{row[2]} event{'s' * (row[2] > 1)}"
                found.append(f"events for {name}: {waiting} not delivered yet: {row[1]}")
            since = (datetime.now(UTC) - timedelta(days=_TOLD)).isoformat()
            count, why = db.execute(
                "SELECT count(*), (SELECT why FROM undelivered WHERE subscriber = ?1"
                " ORDER BY id DESC LIMIT 1) FROM undelivered WHERE subscriber = ?1 AND at > ?2",
                (name, since),
            ).fetchone()
            if count:
                lost = f"{count} event{'s' * (count > 1)} given up in the last {_TOLD} days"
                found.append(f"events for {name}: {lost}: {why}")
        return tuple(found)


def _wants(section: EventSubscriber, type: str, record: Record) -> bool:
    if section.on and type not in section.on and type.partition(".")[0] not in section.on:
        return False
    if section.operations and record.verb not in section.operations:
        return False
    return not section.vms or bool(set(section.vms) & set(record.vms))


def _forget_strangers(db: sqlite3.Connection, known: Collection[str]) -> None:
    """Drop events older than ``_GIVE_UP`` days of subscribers that are no longer in the farm file.
    Younger ones stay: the subscriber may come back."""
    before = (datetime.now(UTC) - timedelta(days=_GIVE_UP)).isoformat()
    gone = [
        name for (name,) in db.execute("SELECT DISTINCT subscriber FROM outbox") if name not in known
    ]
    for name in gone:
        db.execute("DELETE FROM outbox WHERE subscriber = ? AND at < ?", (name, before))


def _drop_oldest(db: sqlite3.Connection, subscriber: str) -> None:
    row = db.execute(
        "SELECT id FROM outbox WHERE subscriber = ? ORDER BY id DESC LIMIT 1 OFFSET ?",
        (subscriber, _MOST),
    ).fetchone()
    if row is not None:
        _give_up(db, int(row[0]), f"more than {_MOST} events were waiting")


def _give_up(db: sqlite3.Connection, id: int, why: str) -> None:
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    db.execute(
        "INSERT INTO undelivered (subscriber, event, type, at, why)"
        " SELECT subscriber, event, type, ?, ? FROM outbox WHERE id = ?",
        (at, why, id),
    )
    db.execute("DELETE FROM outbox WHERE id = ?", (id,))
    db.execute(
        "DELETE FROM undelivered WHERE id <= (SELECT max(id) FROM undelivered) - ?", (_KEPT_TROUBLES,)
    )


@contextlib.contextmanager
def _unforeseen() -> Iterator[None]:
    """What nobody foresaw in a subscriber counts as undelivered: it is noted, and given up in the end,
    so that it doesn't hold up the events behind it for ever."""
    try:
        yield
    except FarmhandError:
        raise
    except Exception as error:
        raise Undelivered(f"it met {type(error).__name__}: {error}") from error


class _Courier(threading.Thread):
    """Delivers one subscriber's events, the oldest first. Of all processes' couriers for it, one works
    at a time. It ends with its process, whatever it is doing."""

    def __init__(
        self,
        name: str,
        section: EventSubscriber,
        open: Callable[[EventSubscriber], Subscriber],
        path: Path,
        lock: Path,
    ) -> None:
        super().__init__(name=f"events-{name}", daemon=True)
        self._subscriber = name
        self._section = section
        self._opened: Subscriber | None = None
        self._open = open
        self._path = path
        self._lock = lock
        self._woken = threading.Event()
        self._finishing = self._leaving = False

    def wake(self) -> None:
        self._woken.set()

    def finish(self) -> None:
        """Deliver what can be delivered now, then end."""
        self._finishing = True
        self._woken.set()

    def leave(self) -> None:
        """Begin no further delivery."""
        self._leaving = True
        self._woken.set()

    def run(self) -> None:
        """Errors stay here: events that fail remain in the outbox, and the operation goes on."""
        with contextlib.suppress(sqlite3.Error, OSError, FarmhandError):
            uri = f"{self._path.absolute().as_uri()}?mode=rw"
            with contextlib.closing(
                sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None)
            ) as db:
                db.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes is delivered again
                wait: float | None = 0.0
                while not self._leaving:
                    self._woken.wait(wait)
                    self._woken.clear()
                    last = self._finishing
                    wait = self._deliver(db)
                    if last:
                        return

    def _deliver(self, db: sqlite3.Connection) -> float | None:
        """Deliver all that is due. Returns the seconds until the next event is due; None: none is
        left."""
        if self._next(db) is None:
            return None
        own_directory(self._lock.parent, mode=0o700)
        with FileLock(self._lock).hold():
            while not self._leaving and (row := self._next(db)) is not None:
                number, event, tries, due, at = row
                wait = due - time.time()
                if 0 < wait <= _LONGEST_WAIT:  # longer: the clock was set back
                    return wait
                self._try(db, number, event, tries, at)
        return None

    def _next(self, db: sqlite3.Connection) -> tuple[int, Event, int, float, datetime] | None:
        while True:
            row = db.execute(
                "SELECT id, event, type, body, tries, due, at FROM outbox WHERE subscriber = ?"
                " ORDER BY id LIMIT 1",
                (self._subscriber,),
            ).fetchone()
            if row is None:
                return None
            number, key, kind, body, tries, due, at = row
            try:
                key, kind, body = texts([key, kind, body], "an event")
                return number, Event(key, kind, body.encode()), int(tries), float(due), moment(at, "at")
            except (TypeError, ValueError, OverflowError) as error:
                with transaction(db):
                    _give_up(db, number, f"it is damaged: {error}")

    def _try(self, db: sqlite3.Connection, id: int, event: Event, tries: int, at: datetime) -> None:
        # Before it is tried, so that a try that nobody saw the end of counts, too. After the first one,
        # cut off by a kill, the next command tries at once.
        noted = "UPDATE outbox SET tries = ?, due = ?, why = ? WHERE id = ?"
        wait = min(_FIRST_WAIT * 2 ** min(tries, 30), _LONGEST_WAIT)
        due = time.time() + wait if tries else 0.0
        db.execute(noted, (tries + 1, due, "no answer before the command's end", id))
        try:
            with _unforeseen():
                if self._opened is None:
                    self._opened = self._open(self._section)
                self._opened.deliver(event)
        except Refused as error:
            with transaction(db):
                _give_up(db, id, error.message)
        except FarmhandError as error:
            old = datetime.now(UTC) - at > timedelta(days=_GIVE_UP)
            with transaction(db):
                if old and tries + 1 >= _TRIES:
                    _give_up(db, id, error.message)
                else:
                    db.execute(noted, (tries + 1, time.time() + wait, error.message, id))
        else:
            db.execute("DELETE FROM outbox WHERE id = ?", (id,))


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Committed when it is left, rolled back when it is left by an error."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
