"""Records of the state directory in SQLite, for what is read and changed a few rows at a time."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from host.documents import Malformed
from host.files import check_files_left, foreign, make_directory, own_file
from host.processes import described, lockers
from inventory.errors import Busy, FarmhandError, NoSpace, WrongState

PATIENCE = 30  # seconds for somebody else's transaction
FILES = 4
"""That SQLite has open at once: its file, two beside it, the directory. Where it can't have them, it
doesn't say why."""
_BESIDE = ("-wal", "-shm", "-journal")  # names of files that SQLite keeps beside one


@contextlib.contextmanager
def transaction(
    path: Path, schema: str, version: int, *, write: bool, remedy: str
) -> Iterator[sqlite3.Connection | None]:
    """A transaction on the SQLite file at ``path``. With ``write`` it is durable when it is left, and
    rolled back when it is left by an error. Without ``write`` None where nothing was ever written.
    ``schema``: statements that do nothing where all is there; ``version`` is their number, from 1.
    ``remedy``: what to do about a file that is damaged or in another format; damaged it is, too, where
    the ``with`` is left by Malformed.

    Errors: Busy, NoSpace, WrongState."""
    if not write and not os.path.lexists(path):
        yield None
        return
    if write:
        make_directory(path.parent, mode=0o711)
        with contextlib.suppress(OSError):  # SQLite says why
            own_database(path)
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if write else 'rw'}"
    try:
        with contextlib.closing(
            sqlite3.connect(uri, uri=True, timeout=PATIENCE, isolation_level=None)
        ) as db:
            filled = refuse_foreign(db, path, version, remedy)
            if write:
                # In one transaction: each costs four fsync(2).
                fresh = "" if filled else f"{schema} PRAGMA user_version = {version};"
                db.executescript(f"PRAGMA synchronous = FULL; BEGIN IMMEDIATE; {fresh}")
            yield db if write or filled else None
            if write:
                db.execute("COMMIT")
    except Malformed as error:  # what is in its rows
        raise _damaged(path, error, remedy) from error
    except sqlite3.Error as error:
        raise _failed(path, error, remedy) from error


def own_database(path: Path) -> None:
    """Make an empty file for SQLite if there is none; nobody else can open it, nor what SQLite keeps
    beside it: whoever can open a file can lock it. OSError, WrongState."""
    own_file(path)
    for end in _BESIDE:
        with contextlib.suppress(FileNotFoundError):
            own_file(path.with_name(path.name + end), make=False)


def busy(path: Path, what: str) -> Busy:
    """The error for an SQLite file at ``path`` that others keep locked; it says who, where the kernel
    does."""
    files = (path, *(path.with_name(path.name + end) for end in _BESIDE))
    pids = sorted({pid for file in files for pid in lockers(file)})
    if not pids:
        return Busy(f"{what} stays locked", remedy="try again")
    who = ", ".join(described(pid) for pid in pids)
    return Busy(
        f"{what} stays locked by {who}",
        remedy=f"wait until that ends, or end it (kill {' '.join(map(str, pids))}), and try again",
    )


def refuse_foreign(db: sqlite3.Connection, path: Path, version: int, remedy: str) -> bool:
    """Whether anything is in the file yet. WrongState where it is not in format ``version``."""
    found, filled = db.execute(  # at one moment: somebody else may be filling it
        "SELECT user_version, EXISTS (SELECT 1 FROM sqlite_master) FROM pragma_user_version"
    ).fetchone()
    if found == version or (found == 0 and not filled):
        return bool(filled)
    raise foreign(path, found, version, remedy)


def _failed(path: Path, error: sqlite3.Error, remedy: str) -> FarmhandError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        room = f"make room on the file system of {path.parent}"
        return NoSpace(f"cannot write {path}: {error}", remedy=room)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return busy(path, str(path))
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        check_files_left(FILES, f"use {path}")
        check = f"check owner, permissions and mount of {path.parent}"
        return WrongState(f"cannot use {path}: {error}", remedy=check)
    return _damaged(path, error, remedy)


def _damaged(path: Path, error: Exception, remedy: str) -> WrongState:
    return WrongState(f"{path} is damaged, or not to be read: {error}", remedy=remedy)
