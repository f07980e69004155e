"""What was read of commits, trees and source packages, so that what didn't change isn't read again. Keys
are ids of git's, or what lstat(2) tells of files: what is known under one stays true. A cache alone:
lost, damaged or another farmhand's, all is read anew."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from host.documents import json_object, made, read_file
from host.files import make_directory, write_atomic
from inventory.errors import FarmhandError

FORMAT = 1
_SPARE = 4000
"""Entries that are kept beside those that were used: of other revisions."""

T = TypeVar("T")


class ReadCache:
    """Threads may use it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = {}
        self._used: set[str] = set()
        self._new = False
        with contextlib.suppress(OSError, ValueError):
            found = json_object(read_file(path))
            entries = found.get("entries")
            if found.get("format") == FORMAT and isinstance(entries, dict):
                self._entries = entries

    def get(self, key: str, kind: type[T]) -> T | None:
        """A value of that dataclass; None: nothing is known."""
        found = self._entries.get(key)
        if found is None:
            return None
        try:
            value = made(kind, found)
        except ValueError:
            return None
        self._used.add(key)
        return value

    def put(self, key: str, value: Any) -> None:
        self._entries[key] = asdict(value)
        self._used.add(key)
        self._new = True

    def save(self, *, whole: bool = False) -> None:
        """Where it can't be written, all is read again next time. ``whole``: all that there is was asked
        for, and of what was not, only some is kept."""
        if not self._new:
            return
        others = [key for key in self._entries if key not in self._used]
        kept = (*(others[-_SPARE:] if whole else others), *sorted(self._used))
        data = {"format": FORMAT, "entries": {key: self._entries[key] for key in kept}}
        with contextlib.suppress(FarmhandError):
            make_directory(self._path.parent, mode=0o700)
            write_atomic(self._path, json.dumps(data).encode(), mode=0o600)


class Once:
    """Makes each thing once, whichever thread asks for it first; the others wait for it."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Future[Any]] = {}
        self._guard = threading.Lock()

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        with self._guard:
            future: Future[T] | None = self._made.get(key)
            mine = future is None
            if future is None:
                future = self._made[key] = Future()
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:  # noqa: BLE001 - whoever asks has it
                future.set_exception(error)
        return future.result()
