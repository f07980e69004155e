"""Which disks we made on a XenAPI server that its own disk may not know of yet.

A power cut takes what the server had not written of its database, and leaves the disks' files. At its
next look at the storage these are VDIs again, with their uuids, without names and marks: nothing on the
server tells whose they are. So each uuid is noted here as soon as it is known, an empty file a disk, and
goes when the server has written its database (``Pool.keep``). What a killed process noted, the next
sweep goes through.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class Notes:
    """Uuids of disks that were made for us, each noted as a file of that name. ``directory`` None:
    nothing is noted. ``plan``: notes are only read."""

    def __init__(self, directory: Path | None = None, *, plan: bool = False) -> None:
        self._directory, self.plan = directory, plan

    def add(self, uuids: Iterable[str]) -> None:
        """Note these; the notes are durable when this returns."""
        wanted = [uuid for uuid in uuids if _UUID.fullmatch(uuid)]
        if self._directory is None or not wanted:
            return
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for uuid in wanted:
            (self._directory / uuid).touch(mode=0o600)
        handle = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def drop(self, uuids: Iterable[str]) -> None:
        if self._directory is None or self.plan:
            return
        for uuid in uuids:
            (self._directory / uuid).unlink(missing_ok=True)

    def all(self) -> frozenset[str]:
        """All uuids that are noted, those of living processes among them."""
        if self._directory is None or not self._directory.is_dir():
            return frozenset()
        names = (path.name for path in self._directory.iterdir())
        return frozenset(name for name in names if _UUID.fullmatch(name))
