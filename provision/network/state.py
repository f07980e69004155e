"""What was written where, so that it can be removed after it left the farm file; the newest serial
number of each zone, so that a lost zone file doesn't set it back; and each VM's records in dynamic
zones. It is in SQLite: one VM more among ten thousand is a few rows."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from host.documents import Malformed, json_value, texts
from provision.engine.database import transaction
from provision.network.document import Document
from provision.network.records import Records, Zones

_VERSION = 1
_SCHEMA = """
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
"""
_FILE = "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)"
_SERIAL = "INSERT OR REPLACE INTO serials VALUES (?, ?)"
_RECORD = "INSERT INTO records VALUES (?, ?, ?, ?)"
_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"
_KNOWN, _BASIS, _BEHIND, _APPLIED = "records", "basis", "behind", "applied"


@dataclass(frozen=True, slots=True)
class NetworkState:
    """``files``: documents as they are ``noted``, by path. ``known``: whether it is certain what dynamic
    zones have of ours. ``basis``: a digest of all that isn't a VM in the farm file that was applied as a
    whole; "" if there is none, or an apply has begun since. ``behind``: services that could not be told
    when others were. ``applied``: that farm file itself, without VMs, as ``inventory.plain`` has it."""

    files: Mapping[str, Document] = field(default_factory=dict)
    serials: Mapping[str, int] = field(default_factory=dict)
    known: bool = False
    basis: str = ""
    behind: tuple[str, ...] = ()
    applied: str = ""


def noted(document: Document) -> Document:
    """What is remembered of a document: which part of which file is whose."""
    d = document
    return Document(d.service, d.path, "", own=d.own, comment=d.comment, zone=d.zone)


class StateFile:
    """One farm's state. Its writers hold the lock of network-apply. Errors: WrongState, NoSpace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def below(cls, root: Path) -> StateFile:
        """In a farm's state directory."""
        return cls(root / "network.db")

    def read(self) -> NetworkState:
        """The state; an empty one if there is no file."""
        with self._open(write=False) as db:
            if db is None:
                return NetworkState()
            files = {file.path: file for file in map(_file, db.execute("SELECT * FROM files"))}
            rows = db.execute("SELECT zone, serial FROM serials")
            serials = {zone: _serial(serial) for zone, serial in rows}
            rows = db.execute("SELECT name, value FROM facts")
            facts = {_text(name): _text(value) for name, value in rows}
        behind = tuple(facts.get(_BEHIND, "").split())
        known, basis = facts.get(_KNOWN) == "known", facts.get(_BASIS, "")
        return NetworkState(files, serials, known, basis, behind, facts.get(_APPLIED, ""))

    def records(self) -> Zones:
        """All records that were applied last."""
        with self._open(write=False) as db:
            rows = db.execute("SELECT zone, name, records FROM records").fetchall() if db else ()
            return _zones(rows)

    def records_of(self, vms: Iterable[str], names: Collection[tuple[str, str]]) -> Zones:
        """The records of these VMs, and those at these names (zone and name), whoever has them."""
        query = "SELECT zone, name, records FROM records WHERE"
        rows: list[tuple[str, str, str]] = []
        with self._open(write=False) as db:
            if db is not None:
                for vm in vms:
                    rows += db.execute(f"{query} vm = ?", (vm,))
                for place in names:
                    rows += db.execute(f"{query} zone = ? AND name = ?", place)
            return _zones(rows)

    def begin(self, new: Iterable[Document], *, updates: bool) -> None:
        """Note new files before an apply writes anything: they are ours even if the apply is killed, so
        they can be removed. Until the apply has finished, it is unknown whether all is as in the farm
        file, and, with ``updates``, what the zones have."""
        with self._open(write=True) as db:
            assert db is not None
            db.executemany(_FILE, map(_row, new))
            db.execute(_FACT, (_BASIS, ""))
            if updates:
                db.execute(_FACT, (_KNOWN, "unknown"))

    def finish(
        self,
        *,
        files: Iterable[Document],
        gone: Iterable[str],
        serials: Mapping[str, int],
        names: Mapping[tuple[str, str], tuple[str, Records]],
        anew: bool,
        known: bool,
        basis: str,
        behind: Iterable[str],
        applied: str,
    ) -> None:
        """Note what was applied: files that differ from what is noted, paths that are no longer ours,
        serials, and the VM and records of zones and names (empty records: none). ``anew``: these names
        are all there are."""
        with self._open(write=True) as db:
            assert db is not None
            db.executemany(_FILE, map(_row, files))
            db.executemany("DELETE FROM files WHERE path = ?", ((path,) for path in gone))
            db.executemany(_SERIAL, serials.items())
            if anew:
                db.execute("DELETE FROM records")
            else:
                db.executemany("DELETE FROM records WHERE zone = ? AND name = ?", names)
            rows = ((*at, vm, json.dumps(records)) for at, (vm, records) in names.items() if records)
            db.executemany(_RECORD, rows)
            db.execute(_FACT, (_KNOWN, "known" if known else "unknown"))
            db.execute(_FACT, (_BASIS, basis))
            db.execute(_FACT, (_BEHIND, " ".join(behind)))
            db.execute(_FACT, (_APPLIED, applied))

    def _open(self, *, write: bool) -> contextlib.AbstractContextManager[sqlite3.Connection | None]:
        """A transaction, durable when it is left. None: for reading, and there is no file."""
        remedy = "move it aside: what left the farm file since must then be removed by hand"
        return transaction(self.path, _SCHEMA, _VERSION, write=write, remedy=remedy)


def _row(document: Document) -> tuple[str, ...]:
    return document.path, document.service, document.own, *document.comment, document.zone


def _file(row: tuple[object, ...]) -> Document:
    path, service, own, begins, ends, zone = _texts(row)
    if own not in ("file", "block"):
        raise Malformed(f"{own!r} is no part of a file")
    whole_or_block = cast("Literal['file', 'block']", own)
    return Document(service, path, "", own=whole_or_block, comment=(begins, ends), zone=zone)


def _zones(rows: Iterable[tuple[str, str, str]]) -> Zones:
    found: dict[str, dict[str, Records]] = {}
    for zone, name, text in map(_texts, rows):
        found.setdefault(zone, {})[name] = tuple(map(_record, _list(json_value(text))))
    return found


def _texts(row: tuple[object, ...]) -> tuple[str, ...]:
    return texts(list(row), "a row")


def _record(pair: object) -> tuple[str, str]:
    match texts(pair, "a record"):
        case (kind, value):
            return kind, value
    raise Malformed("a record isn't its kind and its value")


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise Malformed("a VM's records are no list")
    return value


def _text(value: object) -> str:
    if type(value) is not str:
        raise Malformed(f"{value!r} is no text")
    return value


def _serial(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**32:  # RFC 1982
        raise Malformed(f"{value!r} is no serial number of a zone")
    return value
