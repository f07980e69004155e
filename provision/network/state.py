"""What was written where, so that it can be taken away again after it left the farm file; the newest
serial number of each zone, so that a lost zone file doesn't take it back; and each VM's records in
dynamic zones. In SQLite: one VM more among ten thousand is a few rows.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from inventory.errors import FarmhandError, NoSpace, WrongState
from provision.files import make_directory
from provision.network.document import Document
from provision.network.live_dns import Op, Records, Zones

_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY, service TEXT NOT NULL, own TEXT NOT NULL,
    begins TEXT NOT NULL, ends TEXT NOT NULL, zone TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS serials (zone TEXT PRIMARY KEY, serial INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    zone TEXT NOT NULL, name TEXT NOT NULL, vm TEXT NOT NULL, records TEXT NOT NULL,
    PRIMARY KEY (zone, name)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS records_of ON records (vm);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
COMMIT;
"""
_FILE = "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)"
_SERIAL = "INSERT OR REPLACE INTO serials VALUES (?, ?)"
_RECORD = "INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)"
_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"
_KNOWN, _BASIS = "records", "basis"


@dataclass(frozen=True, slots=True)
class NetworkState:
    """``files``: documents without text, by path. ``known``: whether it is sure what dynamic zones have
    of ours. ``basis``: a digest of all that isn't a VM in the farm file that was applied as a whole."""

    files: Mapping[str, Document] = field(default_factory=dict)
    serials: Mapping[str, int] = field(default_factory=dict)
    known: bool = False
    basis: str = ""


class StateFile:
    """One farm's. Its writers hold the lock of network-apply. Errors: WrongState, NoSpace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> NetworkState:
        """Empty where there is none."""
        with self._open(write=False) as db:
            if db is None:
                return NetworkState()
            files = {
                path: Document(service, path, "", own=own, comment=(begins, ends), zone=zone)
                for path, service, own, begins, ends, zone in db.execute("SELECT * FROM files")
            }
            serials = dict(db.execute("SELECT zone, serial FROM serials"))
            facts = dict(db.execute("SELECT name, value FROM facts"))
        return NetworkState(files, serials, facts.get(_KNOWN) == "known", facts.get(_BASIS, ""))

    def records(self) -> Zones:
        """All that was applied last."""
        with self._open(write=False) as db:
            rows = db.execute("SELECT zone, name, records FROM records").fetchall() if db else ()
        return _zones(rows)

    def records_of(self, vms: Iterable[str], names: Collection[tuple[str, str]]) -> Zones:
        """These VMs', and what is at these names (zone and name), whoever has them."""
        query = "SELECT zone, name, records FROM records WHERE"
        rows: list[tuple[str, str, str]] = []
        with self._open(write=False) as db:
            if db is not None:
                for vm in vms:
                    rows += db.execute(f"{query} vm = ?", (vm,))
                for place in names:
                    rows += db.execute(f"{query} zone = ? AND name = ?", place)
        return _zones(rows)

    def doubt(self) -> None:
        """Until updates are through nobody knows what the zones have."""
        with self._open(write=True) as db:
            assert db is not None
            db.execute(_FACT, (_KNOWN, "unknown"))

    def replace(
        self, state: NetworkState, records: Zones | None, owners: Mapping[tuple[str, str], str]
    ) -> None:
        """All of it. ``records`` None: those noted stay. ``owners``: the VM of each zone and name."""
        with self._open(write=True) as db:
            assert db is not None
            for table in ("files", "serials", *(("records",) if records is not None else ())):
                db.execute(f"DELETE FROM {table}")  # noqa: S608 - our own words
            self._common(db, state, state.files.values(), state.serials)
            for zone, names in (records or {}).items():
                rows = ((zone, n, owners.get((zone, n), ""), json.dumps(r)) for n, r in names.items())
                db.executemany(_RECORD, rows)

    def change(
        self,
        state: NetworkState,
        *,
        files: Iterable[Document],
        gone: Iterable[str],
        serials: Mapping[str, int],
        ops: Iterable[Op],
        owners: Mapping[tuple[str, str], str],
    ) -> None:
        """What differs: files that are new, paths that are gone, serials, names of dynamic zones."""
        with self._open(write=True) as db:
            assert db is not None
            self._common(db, state, files, serials)
            db.executemany("DELETE FROM files WHERE path = ?", ((path,) for path in gone))
            for op in ops:
                if op.new:
                    owner = owners.get((op.zone, op.name), "")
                    db.execute(_RECORD, (op.zone, op.name, owner, json.dumps(op.new)))
                else:
                    db.execute("DELETE FROM records WHERE zone = ? AND name = ?", (op.zone, op.name))

    def _common(
        self,
        db: sqlite3.Connection,
        state: NetworkState,
        files: Iterable[Document],
        serials: Mapping[str, int],
    ) -> None:
        db.executemany(_FILE, ((d.path, d.service, d.own, *d.comment, d.zone) for d in files))
        db.executemany(_SERIAL, serials.items())
        db.execute(_FACT, (_KNOWN, "known" if state.known else "unknown"))
        db.execute(_FACT, (_BASIS, state.basis))

    @contextlib.contextmanager
    def _open(self, *, write: bool) -> Iterator[sqlite3.Connection | None]:
        """A transaction, durable when it is left; None: to read, and there is none."""
        if not write and not self.path.exists():
            yield None
            return
        if write:
            make_directory(self.path.parent, mode=0o711)
        try:
            uri = f"{self.path.absolute().as_uri()}?mode={'rwc' if write else 'rw'}"
            with contextlib.closing(
                sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None)
            ) as db:
                if write:
                    db.executescript(f"PRAGMA synchronous = FULL; {_SCHEMA}")
                    db.execute("BEGIN IMMEDIATE")
                yield db
                if write:
                    db.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def _failed(self, error: sqlite3.Error) -> FarmhandError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            return NoSpace(
                f"cannot write {self.path}: {error}",
                remedy=f"make room on the file system of {self.path.parent}",
            )
        return WrongState(
            f"{self.path} is damaged, or not to be read: {error}",
            remedy="move it aside: what left the farm file since must then be removed by hand",
        )


def _zones(rows: Iterable[tuple[str, str, str]]) -> Zones:
    found: dict[str, dict[str, Records]] = {}
    for zone, name, text in rows:
        found.setdefault(zone, {})[name] = tuple((kind, value) for kind, value in json.loads(text))
    return found
