"""A whole volume copied at idle I/O priority: sparse-aware, with progress, going on after a kill.

How far it came is kept in a small file, written only once the copied bytes are on the disk (fsync). What
was copied before a kill is not taken on trust, for the source may have changed since and the record may
be older than the disk: it is compared with the source again, and put right where it differs. Reading is
cheap next to writing, and what comes out is the source, always.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from host.documents import json_object, made, read_file
from host.run import Runner
from hypervisors.disks.qcow2.store import write_durably
from inventory.errors import DriverFailed

CopyProgressFn = Callable[[str, int, int], None]
"""Told what is being copied, bytes done, and bytes in all."""

_BLKZEROOUT = 0x127F  # linux/fs.h: the device zeroes a range by itself where it can
_PUNCH_HOLE_KEEP_SIZE = 0x03  # linux/falloc.h
_libc = ctypes.CDLL(None, use_errno=True)
_CHUNK = 2**20
_RECORD_EVERY = 64 * 2**20


@dataclass(frozen=True, slots=True)
class _Copied:
    what: str
    size: int
    done: int


def no_progress(_what: str, _done: int, _total: int) -> None:
    """The CopyProgressFn of callers who show none."""


def copy_idle(
    runner: Runner,
    source: Path,
    target: Path,
    size: int,
    record: Path,
    what: str,
    progress: CopyProgressFn,
) -> None:
    """Copy ``size`` bytes of ``source`` to ``target`` at idle I/O priority, and make the rest of it
    zeros, for a new volume holds what its extents held before. ``record``: the file that says how far it
    came; a copy that was cut off is gone on with. DriverFailed if reading or writing fails."""
    try:
        _at_idle(runner, lambda stop: _copy(source, target, size, record, what, progress, stop))
    except OSError as error:
        raise DriverFailed(
            f"copying {source} to {target} failed: {error.strerror}",
            remedy="if the source is a snapshot it may have overflowed: see lvs",
        ) from error


def wipe_idle(runner: Runner, target: Path, start: int, what: str, progress: CopyProgressFn) -> None:
    """Make all bytes of ``target`` from ``start`` on zeros, at idle I/O priority, for a volume that was
    made larger holds there what its extents held before. DriverFailed if writing fails."""
    try:
        _at_idle(runner, lambda stop: _wipe(target, start, what, progress, stop))
    except OSError as error:
        raise DriverFailed(f"wiping the end of {target} failed: {error.strerror}") from error


def same_content(one: Path, other: Path, size: int) -> bool:
    """Whether the first ``size`` bytes of both are the same. It reads all of them."""
    with one.open("rb", buffering=0) as a, other.open("rb", buffering=0) as b:
        for at in range(0, size, _CHUNK):
            length = min(_CHUNK, size - at)
            if os.pread(a.fileno(), length, at) != os.pread(b.fileno(), length, at):
                return False
    return True


def empty_from(node: Path, start: int) -> bool:
    """Whether all bytes from ``start`` on are zeros: what a larger disk has beyond its base."""
    with node.open("rb") as file:
        file.seek(start)
        while data := file.read(2**20):
            if data.count(0) != len(data):
                return False
    return True


def _at_idle(runner: Runner, work: Callable[[threading.Event], None]) -> None:
    """I/O priorities are a thread's own (ioprio_set(2)). The event is set when nobody waits any more."""
    stop = threading.Event()

    def idle() -> None:
        runner.change("ionice", "-c3", "-p", str(threading.get_native_id()))
        work(stop)

    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(idle).result()
        finally:
            stop.set()


def _wipe(target: Path, start: int, what: str, progress: CopyProgressFn, stop: threading.Event) -> None:
    write = os.open(target, os.O_RDWR)
    try:
        total = os.lseek(write, 0, os.SEEK_END) - start
        for done in range(0, total, _RECORD_EVERY):
            if stop.is_set():
                return
            _zero(write, start + done, min(_RECORD_EVERY, total - done))
            progress(what, min(done + _RECORD_EVERY, total), total)
        os.fsync(write)
    finally:
        os.close(write)


def _copy(
    source: Path,
    target: Path,
    size: int,
    record: Path,
    what: str,
    progress: CopyProgressFn,
    stop: threading.Event,
) -> None:
    before = _recorded(record, what, size)
    zeros = bytes(_CHUNK)
    read = os.open(source, os.O_RDONLY)
    write = os.open(target, os.O_RDWR)
    try:
        noted = 0
        for at in range(0, size, _CHUNK):
            if stop.is_set():
                return
            length = min(_CHUNK, size - at)
            data = os.pread(read, length, at)
            if len(data) != length:
                raise OSError(0, f"{source} ends at {at + len(data)} of {size} bytes")
            if at >= before or os.pread(write, length, at) != data:
                _put(write, at, data, zeros)
            done = at + length
            if done - noted >= _RECORD_EVERY or done == size:
                os.fsync(write)
                for handle in (read, write):  # a build host's page cache has better uses
                    os.posix_fadvise(handle, noted, done - noted, os.POSIX_FADV_DONTNEED)
                _note(record, what, size, max(done, before))
                noted = done
                progress(what, done, size)
        _zero(write, size, os.lseek(write, 0, os.SEEK_END) - size)
        os.fsync(write)
    finally:
        os.close(read)
        os.close(write)


def _put(handle: int, at: int, data: bytes, zeros: bytes) -> None:
    if data == zeros:
        _zero(handle, at, len(data))
        return
    left = memoryview(data)
    while left:
        count = os.pwrite(handle, left, at)
        left, at = left[count:], at + count


def _zero(handle: int, at: int, length: int) -> None:
    """Make these bytes zeros, without taking room where the device can give it back, as thin volumes and
    SSDs can: fallocate(2) makes a hole in a block device (block/fops.c of Linux: zeros, or EOPNOTSUPP).
    BLKZEROOUT, which keeps the room, works everywhere."""
    if length <= 0:
        return
    numbers = map(ctypes.c_longlong, (at, length))
    if _libc.fallocate(handle, _PUNCH_HOLE_KEEP_SIZE, *numbers) == 0:
        return
    if (code := ctypes.get_errno()) != errno.EOPNOTSUPP:
        raise OSError(code, os.strerror(code))
    fcntl.ioctl(handle, _BLKZEROOUT, struct.pack("QQ", at, length))


def _note(record: Path, what: str, size: int, done: int) -> None:
    facts = asdict(_Copied(what, size, done))
    write_durably(record, json.dumps(facts).encode(), mode=0o600)


def _recorded(record: Path, what: str, size: int) -> int:
    """Bytes that an earlier run with the same purpose copied."""
    try:
        seen = made(_Copied, json_object(read_file(record)))
    except (OSError, ValueError):
        return 0
    return seen.done if (seen.what, seen.size) == (what, size) else 0
