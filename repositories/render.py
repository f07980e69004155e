"""Index files, put together from their chunks' parts. A chunk's texts are rendered and compressed once;
an index is the parts one after the other, for gzip takes that (RFC 1952, 2.2: members)."""

from __future__ import annotations

import gzip
import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import BinaryIO

from host.documents import damaged
from host.files import file_error, make_directory, open_new
from inventory.errors import Call, WrongState
from repositories.chunks import ChunkRef, Chunks
from repositories.format import IndexFile, PackageFormat, Sum
from repositories.layout import Layout
from repositories.package import Package, Reading
from repositories.staging import keep_reading, kept_reading

_BLOCK = 2**18
_BATCH = 2**22  # bytes that are summed at once; as many wait


@dataclass(frozen=True, slots=True)
class _IndexPart:
    """The rendered texts of a chunk in an index, and ``packed``. ``lengths``: bytes of each text."""

    plain: bytes | memoryview
    packed: bytes
    lengths: Sequence[int] = ()

    @property
    def size(self) -> int:
        return len(self.plain) + len(self.packed) + 36 * len(self.lengths)


_PartKey = tuple[Path, str, str, str]
"""Of a part: the repository's directory, the chunk's digest, section, kind."""


class RecentParts:
    """Parts that this process read or made, and proved, lately: what goes on for days reads few again.
    They are named by their content; threads may share them."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._parts: dict[_PartKey, _IndexPart] = {}
        self._guard = threading.Lock()

    def find(self, key: _PartKey) -> _IndexPart | None:
        with self._guard:
            if part := self._parts.pop(key, None):
                self._parts[key] = part  # the latest
            return part

    def keep(self, key: _PartKey, part: _IndexPart) -> _IndexPart:
        with self._guard:
            if old := self._parts.pop(key, None):
                self._size -= old.size
            self._parts[key] = part
            self._size += part.size
            while self._size > self._most:
                self._size -= self._parts.pop(next(iter(self._parts))).size
        return part


_recent = RecentParts(64 * 2**20)


@dataclass(frozen=True, slots=True)
class IndexRenderer:
    """Of one repository. ``architectures``: the repository's. ``before``: chunks that were rendered
    before: of what a new one shares with them, the texts are taken from there."""

    layout: Layout
    format: PackageFormat
    chunks: Chunks
    architectures: Sequence[str]
    before: Sequence[ChunkRef] = ()

    def index(self, section: str, kind: str, chunks: Sequence[ChunkRef], path: Path) -> IndexFile:
        """Write one index, of the packages of these chunks that are in its section; for all to read.
        Its bytes are on the disk then; its name is for whoever makes the tree."""
        before, after = self.format.frame(kind, sum(chunk.count for chunk in chunks))
        with ThreadPoolExecutor(1) as aside:
            out = _IndexSums(aside)
            try:
                with open_new(path, mode=0o444) as file:
                    out.add(file, before, _packed(before))
                    for chunk in chunks:
                        part = self._part(chunk, section, kind)
                        part = part or self._render(chunk, section)[section, kind]
                        out.add(file, part.plain, part.packed)
                    out.add(file, after, _packed(after))
                    if not out.packed.size:
                        out.add(file, b"", gzip.compress(b"", mtime=0))
                    out.end()
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise file_error(error, path, "write") from error
        return IndexFile(section, kind, out.packed.sum(), out.plain.sum())

    def _key(self, chunk: ChunkRef, section: str, kind: str) -> _PartKey:
        return self.layout.top, chunk.digest, section, kind

    def _part(self, chunk: ChunkRef, section: str, kind: str) -> _IndexPart | None:
        """None: it isn't there whole."""
        key = self._key(chunk, section, kind)
        if part := _recent.find(key):
            return part
        path = self.layout.rendered(chunk.digest, section, kind)
        try:
            data = path.read_bytes()
            packed = path.with_name(f"{path.name}.gz").read_bytes()
        except FileNotFoundError:
            return None
        rest = memoryview(data)[_SUMS:]
        if data[:_SUMS] != _sums(rest, packed):
            return None
        end = data.index(b"\n", _SUMS)
        lengths = list(map(int, data[_SUMS:end].split()))
        return _recent.keep(key, _IndexPart(rest[end + 1 - _SUMS :], packed, lengths))

    def _render(self, chunk: ChunkRef, asked: str) -> dict[tuple[str, str], _IndexPart]:
        """All parts of a chunk, of the section asked for also where it has nothing in it."""
        texts: dict[tuple[str, str], list[bytes]] = {(asked, kind): [] for kind in self.format.KINDS}
        packages = self.chunks.recent(chunk)
        known = self._texts({package.name for package in packages})
        for package in packages:
            own = known.get(package.place, {})
            if len(own) < len(self.format.KINDS):
                reading = self._reading(package)
                own = {kind: reading.texts[kind].encode() for kind in self.format.KINDS}
            for section in self.format.sections(package, self.architectures):
                for kind in self.format.KINDS:
                    texts.setdefault((section, kind), []).append(own[kind])
        made: dict[tuple[str, str], _IndexPart] = {}
        for (section, kind), parts in texts.items():
            path = self.layout.rendered(chunk.digest, section, kind)
            make_directory(path.parent, mode=0o700)
            data = b"".join(parts)
            part = made[section, kind] = _IndexPart(data, _packed(data), list(map(len, parts)))
            rest = " ".join(map(str, part.lengths)).encode() + b"\n" + data
            # Not durably: what a power cut tears isn't what its sums say, and is made again
            _write_cache(path.with_name(f"{path.name}.gz"), part.packed)
            _write_cache(path, _sums(rest, part.packed) + rest)
            _recent.keep(self._key(chunk, section, kind), part)
        return made

    def _texts(self, names: Collection[str]) -> Mapping[str, Mapping[str, bytes]]:
        """Of packages of these names: by their places and the kinds of index, what was rendered of them
        before."""
        found: dict[str, dict[str, bytes]] = defaultdict(dict)
        for chunk in self.chunks.homes(self.before, names):
            listed: dict[str, list[Package]] = defaultdict(list)
            for package in self.chunks.recent(chunk):
                for section in self.format.sections(package, self.architectures):
                    listed[section].append(package)
            for (section, packages), kind in product(listed.items(), self.format.KINDS):
                part = self._part(chunk, section, kind)
                if part is None or len(part.lengths) != len(packages):
                    continue
                ends = tuple(accumulate(part.lengths, initial=0))
                for package, (start, end) in zip(packages, pairwise(ends), strict=True):
                    found[package.place][kind] = bytes(part.plain[start:end])
        return found

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
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        block = min(os.fstat(file.fileno()).st_size + 1, _BLOCK)
        while data := file.read(block):
            digest.update(data)
            size += len(data)
    return Sum(digest.hexdigest(), size)


_SUMS = 2 * (64 + 1)
"""Bytes that ``_sums`` has."""


def _sums(data: bytes | memoryview, packed: bytes) -> bytes:
    """By which a disk's damage is seen before it gets into an index."""
    return "".join(f"{hashlib.sha256(each).hexdigest()}\n" for each in (data, packed)).encode()


def _write_cache(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open_new(fresh) as file:
            file.write(data)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise file_error(error, path, "write") from error


def _packed(data: bytes) -> bytes:
    """One member, without name and time; of nothing, none."""
    return gzip.compress(data, 6, mtime=0) if data else b""


class _RunningSum:
    def __init__(self) -> None:
        self._digest, self.size = hashlib.sha256(), 0

    def add(self, pieces: Iterable[bytes | memoryview]) -> None:
        for piece in pieces:
            self._digest.update(piece)
            self.size += len(piece)

    def sum(self) -> Sum:
        return Sum(self._digest.hexdigest(), self.size)


class _IndexSums:
    """Of an index that is being written. The plain text is much the longer one, and nobody needs it but
    for its sum: that is made aside, while the packed one goes to the disk."""

    def __init__(self, aside: Executor) -> None:
        self.plain, self.packed = _RunningSum(), _RunningSum()
        self._aside = aside
        self._batch: list[bytes | memoryview] = []
        self._size = 0
        self._before: Future[None] | None = None

    def add(self, file: BinaryIO, plain: bytes | memoryview, packed: bytes) -> None:
        file.write(packed)
        self.packed.add((packed,))
        self._batch.append(plain)
        self._size += len(plain)
        if self._size >= _BATCH:
            self.end()

    def end(self) -> None:
        """All is given. What was given is summed when the executor has ended."""
        if self._before:
            self._before.result()
        self._before = self._aside.submit(self.plain.add, self._batch)
        self._batch, self._size = [], 0
