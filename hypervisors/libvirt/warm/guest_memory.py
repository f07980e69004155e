"""A guest's memory where its QEMU has it, and a copy of it set right by that.

QEMU tells which pages a guest wrote again while they were sent (migration's dirty bitmap). Of an
emulated guest (TCG) it can miss some: until QEMU 9.0 a write through an entry of the emulator's TLB that
is older than the last look at the bitmap isn't noted in it (cpu_physical_memory_sync_dirty_bitmap();
QEMU's commit 03bfc2188f; 7.2.22 is without). The host's own page tables miss none. So when the guest
stands still, all that its QEMU has is compared with the copy."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hypervisors.answers import answer_of
from hypervisors.libvirt.domain_xml import MEMORY_ID
from hypervisors.libvirt.qemu_process import find_qemu
from hypervisors.libvirt.warm.monitor import Monitor

_PAGE = os.sysconf("SC_PAGE_SIZE")
_ENTRY = 8  # bytes a page in /proc/PID/pagemap
_THERE = re.compile(rb"[\x40-\xff]+")  # bit 63: in memory; bit 62: in swap; else it is as it began
_AT_ONCE = 2**18  # pages that are looked up in one read
_CHUNK = 2**18  # bytes that are compared at once: they stay in the CPU's cache
_LIBC = ctypes.CDLL(None, use_errno=True)
_HVA = re.compile(rf"Host virtual address for 0x0 \({MEMORY_ID}\) is (0x[0-9a-f]+)")


class _Piece(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@dataclass(frozen=True, slots=True)
class GuestMemory:
    """``address``: where it is in the process ``pid``, in one piece of ``size`` bytes."""

    pid: int
    address: int
    size: int

    @classmethod
    def of(cls, monitor: Monitor, size: int) -> GuestMemory | None:
        """Of a machine of ours. None where its QEMU isn't here, or we may not read it (ptrace(2),
        "Ptrace access mode checking")."""
        domain = monitor.domain
        pid = find_qemu(domain.name(), domain.UUIDString())
        if pid is None:
            return None
        with answer_of("QEMU"):
            # Of the guest's address 0; the block is in one piece, though the guest sees it in two.
            said = monitor.run("human-monitor-command", command_line="gpa2hva 0")
            found = _HVA.search(said)
            address = int(found[1], 16) if found else 0
        one = cls(pid, address, size)
        return one if found and one._can_be_read() else None

    def _can_be_read(self) -> bool:
        try:
            next(self._there(), None)
            self._read(0, ctypes.create_string_buffer(_PAGE), _PAGE)
        except OSError:
            return False
        return True

    def correct(self, copy: int) -> int:
        """Write to the file ``copy`` what isn't as here; a hole is zeros. Returns how many pages. The
        guest must stand still meanwhile. OSError."""
        pages = 0
        ours, theirs = (ctypes.create_string_buffer(_CHUNK) for _ in range(2))
        here, there = memoryview(ours), memoryview(theirs)
        for at, length in self._there():
            self._read(at, ours, length)
            if os.preadv(copy, [there[:length]], at) != length:
                raise OSError(errno.EIO, "the copy ends too early")
            if _LIBC.memcmp(ours, theirs, ctypes.c_size_t(length)) == 0:
                continue
            for page in range(0, length, _PAGE):
                if (right := here[page : page + _PAGE]) != there[page : page + _PAGE]:
                    os.pwrite(copy, right, at + page)
                    pages += 1
        return pages

    def _there(self) -> Iterator[tuple[int, int]]:
        """Pieces that QEMU has pages of, each at most ``_CHUNK``: offset and length in bytes. What has
        none was never written since it was mapped. See proc_pid_pagemap(5)."""
        with Path(f"/proc/{self.pid}/pagemap").open("rb", buffering=0) as pagemap:
            first, end = self.address // _PAGE, (self.address + self.size) // _PAGE
            for number in range(first, end, _AT_ONCE):
                count = min(_AT_ONCE, end - number)
                entries = os.pread(pagemap.fileno(), count * _ENTRY, number * _ENTRY)
                for run in _THERE.finditer(entries[_ENTRY - 1 :: _ENTRY]):
                    begin, past = ((number - first + at) * _PAGE for at in run.span())
                    for at in range(begin, past, _CHUNK):
                        yield at, min(_CHUNK, past - at)

    def _read(self, at: int, to: ctypes.Array[ctypes.c_char], length: int) -> None:
        """process_vm_readv(2)."""
        here = _Piece(ctypes.addressof(to), length)
        there = _Piece(self.address + at, length)
        one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
        done = _LIBC.process_vm_readv(self.pid, ctypes.byref(here), one, ctypes.byref(there), one, none)
        if done != length:
            number = ctypes.get_errno() if done < 0 else errno.EFAULT
            raise OSError(number, os.strerror(number))
