"""Index files, put together from their chunks' parts. A chunk's texts are rendered and compressed once;
an index is the parts one after the other, for gzip takes that (RFC 1952, 2.2: members)."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from host.documents import damaged
from host.files import file_error, make_directory, open_new, write_atomic
from inventory.errors import Call, WrongState
from repositories.chunks import ChunkRef, Chunks
from repositories.format import IndexFile, PackageFormat, Sum
from repositories.layout import Layout
from repositories.package import Package, Reading
from repositories.staging import keep_reading, kept_reading


@dataclass(frozen=True, slots=True)
class IndexRenderer:
    """Of one repository. ``architectures``: the repository's."""

    layout: Layout
    format: PackageFormat
    chunks: Chunks
    architectures: Sequence[str]

    def index(self, section: str, kind: str, chunks: Sequence[ChunkRef], path: Path) -> IndexFile:
        """Write one index, of the packages of these chunks that are in its section; for all to read.
        Not durably: that is for whoever makes the tree."""
        before, after = self.format.frame(kind, sum(chunk.count for chunk in chunks))
        try:
            with open_new(path, mode=0o444) as file:
                out = _IndexWriter(file)
                out.add(before, _packed(before))
                for chunk in chunks:
                    out.add(*self._part(chunk, section, kind))
                out.add(after, _packed(after))
                if not out.packed_size:
                    out.add(b"", gzip.compress(b"", mtime=0))
        except OSError as error:
            raise file_error(error, path, "write") from error
        return IndexFile(section, kind, *out.sums())

    def _part(self, chunk: ChunkRef, section: str, kind: str) -> tuple[bytes, bytes]:
        """The rendered texts of a chunk in an index, and compressed; made if they aren't there whole."""
        path = self.layout.rendered(chunk.digest, section, kind)
        try:
            sums, _, data = path.read_bytes().partition(b"\n")
            packed = path.with_name(f"{path.name}.gz").read_bytes()
            if sums == _sums(data, packed):
                return data, packed
        except FileNotFoundError:
            pass
        return self._render(chunk, section)[section, kind]

    def _render(self, chunk: ChunkRef, asked: str) -> dict[tuple[str, str], tuple[bytes, bytes]]:
        """All parts of a chunk, of the section asked for also where it has nothing in it."""
        texts: dict[tuple[str, str], list[str]] = {(asked, kind): [] for kind in self.format.KINDS}
        for package in self.chunks.packages(chunk):
            reading = self._reading(package)
            for section in self.format.sections(package, self.architectures):
                for kind in self.format.KINDS:
                    texts.setdefault((section, kind), []).append(reading.texts[kind])
        made: dict[tuple[str, str], tuple[bytes, bytes]] = {}
        for (section, kind), parts in texts.items():
            path = self.layout.rendered(chunk.digest, section, kind)
            make_directory(path.parent, mode=0o700)
            data = "".join(parts).encode()
            made[section, kind] = data, (packed := _packed(data))
            write_atomic(path.with_name(f"{path.name}.gz"), packed, mode=0o600)
            write_atomic(path, _sums(data, packed) + b"\n" + data, mode=0o600)
        return made

    def _reading(self, package: Package) -> Reading:
        """What was read of a package when it came in; where that is lost, it is read again."""
        kept = kept_reading(self.layout, package.sha256, package.file, package.component)
        if kept is not None:
            return kept
        path = self.layout.file(package)
        try:
            found = sum_of(path)
        except OSError as error:
            raise damaged(path, f"the package {package}", error, Call("repo-fsck")) from error
        if found != Sum(package.sha256, package.size):
            raise WrongState(
                f"{path} is damaged: its bytes are not those of {package}", remedy=Call("repo-fsck")
            )
        reading = self.format.read(path, package.file, found, package.component)
        keep_reading(self.layout, package, reading)
        return reading


def sum_of(path: Path) -> Sum:
    """OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return Sum(hashlib.file_digest(file, "sha256").hexdigest(), size)


def _sums(data: bytes, packed: bytes) -> bytes:
    """By which a disk's damage is seen before it gets into an index."""
    return b" ".join(hashlib.sha256(each).hexdigest().encode() for each in (data, packed))


def _packed(data: bytes) -> bytes:
    """One member, without name and time; of nothing, none."""
    return gzip.compress(data, 6, mtime=0) if data else b""


class _IndexWriter:
    """An index file being written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._packed, self._plain = hashlib.sha256(), hashlib.sha256()
        self.packed_size = self._plain_size = 0

    def add(self, plain: bytes, packed: bytes) -> None:
        self._file.write(packed)
        self._packed.update(packed)
        self._plain.update(plain)
        self.packed_size += len(packed)
        self._plain_size += len(plain)

    def sums(self) -> tuple[Sum, Sum]:
        packed = Sum(self._packed.hexdigest(), self.packed_size)
        return packed, Sum(self._plain.hexdigest(), self._plain_size)
