"""Records of the state directory in SQLite, for what is read and changed a few rows at a time."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from host.files import make_directory, make_file
from inventory.errors import FarmhandError, NoSpace, WrongState

_PATIENCE = 30  # seconds for somebody else's transaction


@contextlib.contextmanager
def transaction(
    path: Path, schema: str, *, write: bool, remedy: str
) -> Iterator[sqlite3.Connection | None]:
    """With ``write`` durable when it is left, and nothing of it where it is left by an error. None: to
    read, and there is no such file. ``schema``: statements that do nothing where all is there.
    ``remedy``: what to do about a file that is damaged.

    Errors: NoSpace, WrongState."""
    if not write and not path.exists():
        yield None
        return
    if write:
        make_directory(path.parent, mode=0o711)
        with contextlib.suppress(OSError):  # SQLite says why
            make_file(path)
    uri = f"{path.absolute().as_uri()}?mode={'rwc' if write else 'rw'}"
    try:
        with contextlib.closing(
            sqlite3.connect(uri, uri=True, timeout=_PATIENCE, isolation_level=None)
        ) as db:
            if write:
                db.executescript(f"PRAGMA synchronous = FULL; BEGIN IMMEDIATE; {schema} COMMIT;")
                db.execute("BEGIN IMMEDIATE")
            yield db
            if write:
                db.execute("COMMIT")
    except sqlite3.Error as error:
        raise _failed(path, error, remedy) from error


def _failed(path: Path, error: sqlite3.Error, remedy: str) -> FarmhandError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        room = f"make room on the file system of {path.parent}"
        return NoSpace(f"cannot write {path}: {error}", remedy=room)
    return WrongState(f"{path} is damaged, or not to be read: {error}", remedy=remedy)
