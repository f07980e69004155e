"""What disks hold: a sparse file each, and how much of it is the disk's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

BLOCK = 2**21
"""A VHD's: storage is taken in blocks of 2 MiB, once they are written to."""
EMPTY = 8192
"""Of a new leaf: its headers."""


class Contents:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._own: dict[str, set[int]] = {}
        self._kept, self._kept_own = directory.with_name(f"{directory.name}-kept"), self._own
        self._guard = threading.Lock()

    def path(self, uuid: str) -> Path:
        return self._directory / uuid

    def uuids(self) -> set[str]:
        """Of all there are, whatever the database knows."""
        return {path.name for path in self._directory.iterdir()}

    def create(self, uuid: str, size: int) -> None:
        with self.path(uuid).open("wb") as file:
            file.truncate(size)
        self._own[uuid] = set()

    def clone(self, source: str, target: str) -> None:
        """Copy on write, as far as one can tell."""
        with self.path(source).open("rb") as read, self.path(target).open("wb") as write:
            size = os.fstat(read.fileno()).st_size
            write.truncate(size)
            at = 0
            while at < size:
                try:
                    at = os.lseek(read.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(read.fileno(), at, os.SEEK_HOLE)
                read.seek(at)
                write.seek(at)
                write.write(read.read(end - at))
                at = end
        self._own[target] = set()

    def copy(self, source: str, target: str) -> None:
        self.clone(source, target)
        size = self.path(target).stat().st_size
        self._own[target] = set(range(-(-size // BLOCK)))

    def leaf(self, uuid: str) -> None:
        """What it held is its parent's now, shared with a snapshot."""
        self._own[uuid] = set()

    def remove(self, uuid: str) -> None:
        self.path(uuid).unlink(missing_ok=True)
        self._own.pop(uuid, None)

    def resize(self, uuid: str, size: int) -> None:
        os.truncate(self.path(uuid), size)

    def used(self, uuid: str) -> int:
        return EMPTY + BLOCK * len(self._own.get(uuid, ()))

    def write(self, uuid: str, data: Any, length: int) -> None:
        """From the beginning; blocks of zeros over zeros are skipped, as the server's import does."""
        with self.path(uuid).open("r+b") as file, self._guard:
            at = 0
            while at < length:
                piece = data.read(min(BLOCK, length - at))
                if not piece:
                    raise ConnectionError("the upload ended early")
                file.seek(at)
                if piece.strip(b"\0") or file.read(len(piece)).strip(b"\0"):
                    file.seek(at)
                    file.write(piece)
                    self._own[uuid].add(at // BLOCK)
                at += len(piece)

    def keep(self) -> None:
        self._kept_own = {uuid: set(own) for uuid, own in self._own.items()}
        _copy(self._directory, self._kept)

    def put_back(self) -> None:
        self._own = {uuid: set(own) for uuid, own in self._kept_own.items()}
        _copy(self._kept, self._directory)

    def close(self) -> None:
        for directory in (self._directory, self._kept):
            shutil.rmtree(directory, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Sparse files as they are."""
    shutil.rmtree(target, ignore_errors=True)
    subprocess.run(["cp", "-r", "--sparse=always", source, target], check=True)
