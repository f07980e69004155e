"""Compressed bytes of strangers, read forward and to their very end: bounded in what they grow to and in
the memory they take, and never taken for whole before their own check sums are right."""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import BinaryIO, Protocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CHUNK = 256 * 1024
_MEMORY = 256 * 1024 * 1024
"""More than xz -9 (65 MiB) needs; a header can ask for 4 GiB."""
_STREAMS = 100_000
"""Gzip members, zstd frames and the like; each costs time, also where nothing is in it."""


class Damaged(ValueError):
    """What is read is not what it should be; the words say how."""


class _Decompressor(Protocol):
    """As the standard library has it in bz2 and lzma."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gunzip:
    """zlib's, in that shape; one member."""

    def __init__(self) -> None:
        self._of = zlib.decompressobj(wbits=31)
        self._full = False

    @property
    def eof(self) -> bool:
        return self._of.eof

    @property
    def needs_input(self) -> bool:
        return not self._full

    @property
    def unused_data(self) -> bytes:
        return self._of.unused_data

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        out = self._of.decompress(self._of.unconsumed_tail + data, max_length)
        self._full = len(out) == max_length or bool(self._of.unconsumed_tail)
        return out


_xz = partial(lzma.LZMADecompressor, lzma.FORMAT_AUTO, _MEMORY)
DECOMPRESSORS: Mapping[str, Callable[[], _Decompressor]] = {
    ".gz": _Gunzip,
    ".xz": _xz,
    ".zst": zstd.ZstdDecompressor,  # takes windows up to 128 MiB, all that "zstd -22 --ultra" makes
    ".bz2": bz2.BZ2Decompressor,
    ".lzma": _xz,
}
"""By the end of a file's name. Files without such an end are plain."""
ENDS = ("", *DECOMPRESSORS)


def pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next ``size`` bytes of a file. Damaged: it has fewer."""
    while size:
        piece = file.read(min(size, CHUNK))
        if not piece:
            raise Damaged("it ends too early")
        size -= len(piece)
        yield piece


def unpacked(packed: Iterator[bytes], end: str, most: int) -> Iterator[bytes]:
    """What is in ``packed``, in pieces of up to 256 KiB: of each stream in it, to its end. ``end``: one
    of ``ENDS``. Damaged: it can't be unpacked, goes on with something else, or grows too far."""
    total = 0
    for piece in packed if end == "" else _streams(packed, DECOMPRESSORS[end]):
        total += len(piece)
        if total > most:
            raise Damaged(f"it grows to more than {most >> 20} MiB")
        yield piece


def _streams(packed: Iterator[bytes], make: Callable[[], _Decompressor]) -> Iterator[bytes]:
    data = next(packed, b"")
    if not data:
        raise Damaged("it is empty")
    count = 0
    while data:
        if (count := count + 1) > _STREAMS:
            raise Damaged(f"it has more than {_STREAMS} streams")
        stream = make()
        while not stream.eof:
            if stream.needs_input and not data and not (data := next(packed, b"")):
                raise Damaged("it ends too early")
            try:
                out = stream.decompress(data, CHUNK)
            except (zlib.error, lzma.LZMAError, zstd.ZstdError, OSError, EOFError, MemoryError) as error:
                raise Damaged(f"it can't be unpacked: {error}") from None
            data = b""
            if out:
                yield out
        data = stream.unused_data or next(packed, b"")


class ExactReader:
    """Exact reads of what comes in pieces."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source = source
        self._piece = memoryview(b"")

    def pieces(self, size: int) -> Iterator[memoryview]:
        """The next ``size`` bytes. Damaged: there are fewer."""
        while size:
            if not self._piece:
                self._piece = memoryview(next(self._source, b""))
                if not self._piece:
                    raise Damaged("what is in it ends too early")
            taken, self._piece = self._piece[:size], self._piece[size:]
            size -= len(taken)
            yield taken

    def read(self, size: int) -> bytes:
        """Exactly so many bytes."""
        if size <= len(self._piece):  # nearly always
            taken, self._piece = self._piece[:size], self._piece[size:]
            return bytes(taken)
        return b"".join(self.pieces(size))

    def ended(self) -> bool:
        while not self._piece:
            piece = next(self._source, None)
            if piece is None:
                return True
            self._piece = memoryview(piece)
        return False

    def drain(self) -> None:
        """To the end, for the sake of the check sum there."""
        self._piece = memoryview(b"")
        for _ in self._source:
            pass
