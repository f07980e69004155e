"""QEMU's migration stream, taken apart while it is read: one RAM block's pages go to a file that can be
mapped, all else to a file that a QEMU with that memory takes as its incoming migration.

The format (docs/devel/migration.rst, migration/savevm.c and migration/ram.c of QEMU): a header;
sections, each with a type byte, a number, and for a first one its name; a footer. RAM comes first, in
sections of records: eight bytes of address and flags, the block's name unless it is the last record's,
the page. A page may come again, when the guest has written to it; the last one counts. What follows RAM
is of unknown length: the devices, to the stream's end.

What is read comes from a QEMU whose guest we don't trust: every length and address is checked.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import BinaryIO

from inventory.errors import DriverFailed, Unsupported

PAGE = 4096
"""Bytes of a page: x86's TARGET_PAGE_SIZE."""
_MAGIC, _VERSION = b"QEVM", 3
_EOF, _START, _PART, _END, _FULL, _CONFIGURATION, _FOOTER = 0, 1, 2, 3, 4, 7, 0x7E
_ZERO, _SIZES, _DATA, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_FLAGS = PAGE - 1
_MOST_STATE = 256 * 2**20
"""Bytes of all but the guest's memory: devices have 0.4 MiB, a graphics card some tens."""
_CHUNK = 2**20
_LONGEST_NAME = 255
_OFTEN = 2**24 // PAGE  # pages that are written until it is looked again whether there is room


class StreamSplitter:
    """``run`` reads to the stream's end. ``pages``: how many it has written so far."""

    def __init__(
        self,
        stream: BinaryIO,
        block: str,
        size: int,
        memory: int,
        state: BinaryIO,
        *,
        room: Callable[[], None] = lambda: None,
    ) -> None:
        """``block``: name of the RAM block with the guest's memory, of ``size`` bytes. ``memory``: a
        file descriptor of its file, which is empty and of that size. ``state``: gets the rest. ``room``:
        called now and then; it may raise."""
        self._stream = stream
        self._block = block.encode()
        self._size = size
        self._memory = memory
        self._state = state
        self._room = room
        self._kept = 0
        self._written = bytearray(size // PAGE)
        self._ram: set[bytes] = set()
        self._last = b""  # block that a record without a name is of, from one section to the next
        self.pages = 0

    def run(self) -> None:
        """Errors: DriverFailed (it ends too early, or says what can't be), Unsupported (another QEMU's
        way to say it), OSError (the files)."""
        magic, version = struct.unpack(">4sI", self._copy(8))
        if (magic, version) != (_MAGIC, _VERSION):
            raise Unsupported(f"QEMU's migration stream begins with {magic!r}, version {version}")
        while True:
            kind = self._copy(1)[0]
            if kind == _CONFIGURATION:
                self._copy(self._number(self._copy(4), _LONGEST_NAME, "a machine's name"))
            elif kind == _START:
                self._begin()
            elif kind in (_PART, _END):
                number = self._copy(4)
                if number not in self._ram:
                    raise DriverFailed("QEMU's migration stream goes on with a section it hasn't begun")
                self._pages()
            elif kind == _FULL:
                self._rest()
                return
            elif kind == _EOF:
                raise DriverFailed("QEMU's migration stream has no devices")
            else:
                raise Unsupported(f"QEMU's migration stream has sections of the unknown kind {kind}")

    def _begin(self) -> None:
        number = self._copy(4)
        name = self._copy(self._copy(1)[0])
        self._copy(8)  # instance, version
        if name != b"ram":
            raise Unsupported(
                f"QEMU's migration stream has {name.decode(errors='replace')} beside its memory: "
                "a device that is migrated while the guest runs"
            )
        self._ram.add(number)
        self._pages()

    def _pages(self) -> None:
        """One section's records and its footer."""
        while True:
            word = self._take(8)
            (value,) = struct.unpack(">Q", word)
            address, flags = value & ~_FLAGS, value & _FLAGS
            if flags == _EOS:
                self._keep(word)
                break
            if flags == _SIZES:
                self._keep(word)
                self._sizes(address)
                continue
            if not flags & _CONTINUE:
                self._last = self._take(self._take(1)[0])
            flags &= ~_CONTINUE
            if flags not in (_ZERO, _DATA):
                raise Unsupported(f"QEMU's migration stream has pages with the unknown flags {flags:#x}")
            data = self._take(1 if flags == _ZERO else PAGE)
            if self._last == self._block:
                self._page(address, None if flags == _ZERO and data == b"\0" else data)
            else:  # with its name, for the record before it may be one that is left out here
                self._keep(struct.pack(">QB", address | flags, len(self._last)) + self._last + data)
        if self._copy(1)[0] != _FOOTER:
            raise DriverFailed("QEMU's migration stream has a section without its end")
        self._copy(4)

    def _page(self, address: int, data: bytes | None) -> None:
        if address + PAGE > self._size:
            raise DriverFailed(f"QEMU's migration stream has a page beyond its memory, at {address:#x}")
        number = address // PAGE
        if data is None:
            if not self._written[number]:
                return  # a hole reads as zeros
            data = bytes(PAGE)
        elif len(data) < PAGE:
            data *= PAGE
        self._written[number] = 1
        os.pwrite(self._memory, data, address)
        self.pages += 1
        if self.pages % _OFTEN == 0:
            self._room()

    def _sizes(self, total: int) -> None:
        """The list of RAM blocks."""
        found: dict[bytes, int] = {}
        while total > 0:
            name = self._copy(self._copy(1)[0])
            (found[name],) = struct.unpack(">Q", self._copy(8))
            total -= found[name]
        if total or found.get(self._block) != self._size:
            raise DriverFailed(f"QEMU's migration stream has no memory of {self._size} bytes")

    def _rest(self) -> None:
        while data := self._stream.read(_CHUNK):
            self._keep(data)

    def _number(self, word: bytes, most: int, what: str) -> int:
        (value,) = struct.unpack(">I", word)
        if value > most:
            raise DriverFailed(f"QEMU's migration stream has {what} of {value} bytes")
        return int(value)

    def _copy(self, size: int) -> bytes:
        data = self._take(size)
        self._keep(data)
        return data

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise DriverFailed("QEMU's migration stream ends too early")
        return data

    def _keep(self, data: bytes) -> None:
        self._kept += len(data)
        if self._kept > _MOST_STATE:
            raise DriverFailed(f"QEMU's migration stream has over {_MOST_STATE} bytes beside its memory")
        self._state.write(data)
