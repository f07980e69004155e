"""The packages of a generation, as runs of a few hundred that generations share.

All packages of a generation stand in one order. It is cut before each package whose name says so by its
own hash, so that the cuts depend on nothing else: what is added or removed changes the run it is in, and
no other. A run (a *chunk*) is a file named by the SHA-256 of its bytes. So a generation of 20,000
packages is a list of about 80 names, and making the next one costs what changed. (Content-defined
chunking, as in rsync's and Casync's.)"""

from __future__ import annotations

import hashlib
import json
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from host.documents import Malformed, damaged, json_value, read_file
from host.files import make_directory, sync, write_atomic
from repositories.layout import Layout
from repositories.package import Package

_MEAN = 256  # packages of a chunk, on average
_RECENT = 16
_ROW = (str, str, str, str, int, str, str, str, str)

PackageKey = tuple[str, str, str, str]


def key_of(package: Package) -> PackageKey:
    """By what packages are put in order. Two of one key are never in one generation."""
    return package.name, package.version, package.architecture, package.component


@dataclass(frozen=True, slots=True)
class ChunkRef:
    """A chunk, as a generation names it. ``first``: the name of its first package. ``size``: bytes of
    its packages' files."""

    digest: str
    first: str
    count: int
    size: int


class Chunks:
    """The chunks of a repository."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._recent: dict[str, tuple[Package, ...]] = {}

    def packages(self, chunk: ChunkRef) -> tuple[Package, ...]:
        """Those in it, in their order. WrongState: its file is damaged, or gone."""
        path = self._layout.chunk(chunk.digest)
        try:
            data = read_file(path)
            if hashlib.sha256(data).hexdigest() != chunk.digest:
                raise Malformed("its bytes are not those that it is named by")
            return _rows(json_value(data))
        except (OSError, Malformed) as error:
            raise damaged(
                path,
                "a list of packages",
                error,
                "put it back from a backup or a mirror; the generations that need it can't be read "
                "until then",
            ) from error

    def recent(self, chunk: ChunkRef) -> tuple[Package, ...]:
        """As ``packages``; what was read or written just before isn't read again."""
        found = self._recent.get(chunk.digest)
        return self._keep(chunk.digest, self.packages(chunk)) if found is None else found

    def _keep(self, digest: str, packages: tuple[Package, ...]) -> tuple[Package, ...]:
        while len(self._recent) >= _RECENT:
            self._recent.pop(next(iter(self._recent)), None)
        self._recent[digest] = packages
        return packages

    def all(self, chunks: Iterable[ChunkRef]) -> Iterator[Package]:
        for chunk in chunks:
            yield from self.packages(chunk)

    def named(self, chunks: Sequence[ChunkRef], name: str) -> tuple[Package, ...]:
        """The packages of that name; of the chunks only that one is read."""
        at = _position(chunks, name)
        found = self.recent(chunks[at]) if chunks else ()
        return tuple(package for package in found if package.name == name)

    def homes(self, chunks: Sequence[ChunkRef], names: Iterable[str]) -> tuple[ChunkRef, ...]:
        """Of the chunks those that have packages of these names, or would have."""
        found = {_position(chunks, name) for name in names} if chunks else ()
        return tuple(chunks[at] for at in sorted(found))

    def changed(
        self, chunks: Sequence[ChunkRef], added: Iterable[Package], removed: Iterable[Package]
    ) -> tuple[ChunkRef, ...]:
        """The chunks of the same packages without ``removed`` and with ``added``, written durably."""
        gone = {key_of(package) for package in removed}
        fresh = {key_of(package): package for package in added}
        if not chunks:
            return tuple(self._write(fresh.values()))
        homes: dict[int, list[Package]] = defaultdict(list)
        for package in fresh.values():
            homes[_position(chunks, package.name)].append(package)
        touched = homes.keys() | {_position(chunks, name) for name, *_ in gone}
        # Where the first name of a chunk goes, the one before it takes the rest.
        touched |= {at - 1 for at in touched if at}
        result: list[ChunkRef] = []
        for again, run in groupby(range(len(chunks)), touched.__contains__):
            if not again:
                result += (chunks[at] for at in run)
                continue
            packages: list[Package] = []
            for at in run:
                kept = (p for p in self.recent(chunks[at]) if key_of(p) not in gone)
                packages += (p for p in kept if key_of(p) not in fresh)
                packages += homes.get(at, ())
            result += self._write(packages)
        return tuple(result)

    def _write(self, unordered: Iterable[Package]) -> Iterator[ChunkRef]:
        packages, start = sorted(unordered, key=key_of), 0
        for at, package in enumerate(packages):
            if at and package.name != packages[at - 1].name and _cuts(package.name):
                yield self._one(packages[start:at])
                start = at
        if start < len(packages):
            yield self._one(packages[start:])

    def _one(self, packages: Sequence[Package]) -> ChunkRef:
        rows = [
            [p.name, p.version, p.architecture, p.sha256, p.size, p.file, p.component, p.source, p.build]
            for p in packages
        ]
        data = ("[" + ",\n".join(json.dumps(row) for row in rows) + "]\n").encode()
        digest = hashlib.sha256(data).hexdigest()
        path = self._layout.chunk(digest)
        if not _has(path, data):
            make_directory(path.parent, mode=0o700)
            sync(path.parent.parent)
            write_atomic(path, data, mode=0o600)
        self._keep(digest, tuple(packages))
        return ChunkRef(digest, packages[0].name, len(packages), sum(p.size for p in packages))


def _has(path: Path, data: bytes) -> bool:
    try:
        return read_file(path) == data
    except (OSError, Malformed):
        return False


def _cuts(name: str) -> bool:
    return zlib.crc32(name.encode()) % _MEAN == 0


def _position(chunks: Sequence[ChunkRef], name: str) -> int:
    """The chunk that has packages of that name, or would have."""
    return max(bisect_right(chunks, name, key=lambda chunk: chunk.first) - 1, 0)


def _rows(found: object) -> tuple[Package, ...]:
    if not isinstance(found, list):
        raise Malformed("it is no list")
    for row in found:
        if not isinstance(row, list) or tuple(map(type, row)) != _ROW:
            raise Malformed("a package in it has not the fields that it should")
    return tuple(Package(*row) for row in found)
