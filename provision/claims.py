"""Which VM of which farm has which MAC or loopback port, for the whole host."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

from provision.engine.database import transaction

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS claims_of ON claims (owner);
"""
_REMEDY = "move it aside: what the farms' lock files say still holds"


class Claims:
    """The claims in the file ``path``. Whoever writes holds the allocator's locks. A key is a MAC or the
    number of a port; an owner is FARM/VM. Errors: WrongState, NoSpace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def reading(self) -> Iterator[OpenClaims]:
        """Open them as they are now. Takes no lock that a writer would wait for."""
        with self._transaction(write=False) as db:
            yield OpenClaims(db, self._farms)

    @contextlib.contextmanager
    def writing(self) -> Iterator[OpenClaims]:
        """Open them to be changed; durable when it is left. No file is made as long as there are no
        claims."""
        with self._transaction(write=True) as db:
            claimed = OpenClaims(db, self._farms)
            yield claimed
            nobody = claimed.nobody()
        if nobody:
            self.path.unlink(missing_ok=True)

    @property
    def _farms(self) -> Path:
        return self.path.parent / "farms"

    def _transaction(
        self, *, write: bool
    ) -> contextlib.AbstractContextManager[sqlite3.Connection | None]:
        return transaction(self.path, _SCHEMA, _VERSION, write=write, remedy=_REMEDY)


class OpenClaims:
    """Claims while they are open."""

    def __init__(self, db: sqlite3.Connection | None, farms: Path) -> None:
        self._db = db
        self._farms = farms
        self._void: dict[str, bool] = {}

    def owner(self, key: str) -> str | None:
        """Who has the key; None if nobody has, or a farm whose state was removed by hand."""
        for (owner,) in self._rows("SELECT owner FROM claims WHERE key = ?", key):
            farm = str(owner).split("/")[0]
            if farm not in self._void:
                self._void[farm] = not (self._farms / farm).exists()
            return None if self._void[farm] else owner
        return None

    def nobody(self) -> bool:
        return self._db is None or self._db.execute("SELECT 1 FROM claims LIMIT 1").fetchone() is None

    def of(self, owner: str) -> set[str]:
        return {key for (key,) in self._rows("SELECT key FROM claims WHERE owner = ?", owner)}

    def give(self, given: Mapping[str, set[str]]) -> None:
        """Give each of these owners these keys, and take all others from it."""
        assert self._db is not None
        for owner, keys in given.items():
            if self.of(owner) != keys:
                self.drop(owner)
                rows = ((key, owner) for key in sorted(keys))
                self._db.executemany("INSERT OR REPLACE INTO claims VALUES (?, ?)", rows)

    def drop(self, owner: str) -> None:
        """Drop the claims of one VM, or, if it ends in "/", of a whole farm."""
        assert self._db is not None
        if owner.endswith("/"):
            query = "DELETE FROM claims WHERE substr(owner, 1, ?) = ?"
            self._db.execute(query, (len(owner), owner))
        else:
            self._db.execute("DELETE FROM claims WHERE owner = ?", (owner,))

    def _rows(self, query: str, value: str) -> Iterator[tuple[str]]:
        return iter(self._db.execute(query, (value,)) if self._db is not None else ())
