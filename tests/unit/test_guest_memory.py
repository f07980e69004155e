"""A copy of another process's memory, set right by that memory itself. With QEMU: test_warm_qemu.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.files import blocks
from hypervisors.libvirt.warm import guest_memory
from hypervisors.libvirt.warm.guest_memory import GuestMemory

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 4096
_HOLDER = f"""
import ctypes, mmap, sys
memory = mmap.mmap(-1, {PAGES * PAGE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for number in (0, 1, 7, 300, 301, {PAGES - 1}):
    memory[number * {PAGE}] = 1 + number % 100
memory[5 * {PAGE}] = 0  # written, and zeros
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        yield GuestMemory(process.pid, int(process.stdout.readline()), PAGES * PAGE)
        process.stdin.close()


@pytest.fixture
def copy(tmp_path: Path) -> Iterator[int]:
    handle = os.open(tmp_path / "copy", os.O_RDWR | os.O_CREAT)
    os.ftruncate(handle, PAGES * PAGE)
    yield handle
    os.close(handle)


def test_what_a_copy_lacks_is_written_and_nothing_else(
    memory: GuestMemory, copy: int, tmp_path: Path
) -> None:
    wanted = {n: 1 + n % 100 for n in (0, 1, 7, 300, 301, PAGES - 1)}
    assert memory.correct(copy) == len(wanted)
    for number in range(PAGES):
        page = os.pread(copy, PAGE, number * PAGE)
        assert page == bytes([wanted.get(number, 0)]) + bytes(PAGE - 1), number
    assert blocks(tmp_path / "copy") == len(wanted) * PAGE, "what is zeros stays a hole"
    assert memory.correct(copy) == 0


def test_what_the_copy_has_as_it_was_before_is_set_right(memory: GuestMemory, copy: int) -> None:
    memory.correct(copy)
    for at in (0, 5 * PAGE, 301 * PAGE + PAGE - 1):
        os.pwrite(copy, b"x", at)
    assert memory.correct(copy) == 3
    assert os.pread(copy, 1, 5 * PAGE) == bytes(1), "a page that has become zeros"
    assert os.pread(copy, 1, 301 * PAGE + PAGE - 1) == bytes(1)


def test_pieces_that_are_looked_at_apart_are_told_as_they_lie(
    memory: GuestMemory, copy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_memory, "_AT_ONCE", 301)
    monkeypatch.setattr(guest_memory, "_CHUNK", PAGE)
    assert memory.correct(copy) == 6
    monkeypatch.undo()
    assert memory.correct(copy) == 0


def test_a_copy_that_ends_too_early_is_no_copy(memory: GuestMemory, copy: int) -> None:
    os.ftruncate(copy, 8 * PAGE)
    with pytest.raises(OSError, match="ends too early"):
        memory.correct(copy)


def test_a_process_that_is_gone_can_not_be_read(memory: GuestMemory, copy: int) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    one = GuestMemory(gone.pid, memory.address, memory.size)
    assert not one._can_be_read() and memory._can_be_read()
    assert not GuestMemory(memory.pid, PAGE, PAGE)._can_be_read()
    with pytest.raises(OSError, match="No such"):
        one.correct(copy)
