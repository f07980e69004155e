"""The state directory's file system is full, read-only or gone; numbers that nobody means.

A small file system of its own, in a mount namespace: really full, so that each write fails where it does
in life. What a command then says is one line, and what was there before it is there afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Forked
from neighbour import NEEDS_ROOT
from test_damaged_files import CLONE, RESET, fit

FARM = """\
farm: try
hosts: {here: {driver: fake}}
templates: {base: {build: debian-12, size: 1M}}
vms: {dev2: {memory: 64M}, prod: {memory: 64M}}
"""
MORE = FARM.replace("prod: ", "more: {memory: 64M}, prod: ")
CHANGES = (CLONE, RESET, ("destroy", "--vm", "dev2"), ("template-build",))
LOOKS = (("status",), ("history",), ("doctor",))


class Box:
    """A farm whose state is to have a file system of its own."""

    def __init__(self, top: Path) -> None:
        self.state, self.good = top / "state", top / "good"
        self.farm = top / "try.yaml"
        self.farm.write_text(FARM)
        environment = {
            "FARMHAND_STATE_DIR": str(self.state), "FARMHAND_CACHE_DIR": str(top / "cache"),
            "FARMHAND_RUNTIME_DIR": str(top / "run"), "FARMHAND_FARM": str(self.farm),
        }  # fmt: skip
        self._top, self._environment = top, environment
        with self.forked() as run:
            assert run("clone-farm", "--no-wait").status == 0
        shutil.copytree(self.state, self.good)
        shutil.copy(top / "try.yaml.lock", top / "good.lock")

    def forked(self, mounts: str = "") -> Forked:
        return Forked(self._top, self._environment, mounts=mounts)

    def heal(self, state: Path) -> None:
        """As it was before."""
        for path in state.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self.good, state, dirs_exist_ok=True)
        shutil.copy(self._top / "good.lock", self._top / "try.yaml.lock")


@pytest.fixture(scope="module")
def box() -> Iterator[Box]:
    with tempfile.TemporaryDirectory(prefix="fh", dir="/dev/shm") as top:
        yield Box(Path(top))


def fill(directory: Path, leave: int) -> Path:
    """A file that takes all room but so many bytes."""
    path = directory / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(path, max(path.stat().st_size - leave, 0))
    return path


def rows(status: str) -> list[str]:
    """Of VMs."""
    return [line for line in status.splitlines() if line.startswith(("dev2 ", "prod ", "more "))]


@NEEDS_ROOT
@pytest.mark.parametrize("words", CHANGES, ids=lambda words: words[0])
def test_a_full_disk_is_said_and_costs_nothing(box: Box, words: tuple[str, ...]) -> None:
    """With ever more room: each write of the command is once the first that fails. As soon as there is
    room the same command does what it should."""
    box.farm.write_text(MORE if words == CLONE else FARM)
    with box.forked(f"mount -t tmpfs -o size=4M,mode=711 none {box.state}") as run:
        state = run.inside(box.state)
        failed, before = 0, list[str]()
        for leave in (0, 12288, 36864):
            box.heal(state)
            before = before or rows(run("status").out)
            filler = fill(state, leave)
            done = run(*words)
            fit(done, f"{words}, {leave} bytes left")
            if done.status:
                failed += 1
                assert str(box.state) in done.err, done
                assert "make room on the file system of" in done.err, done
            if leave == 0:
                looked = run("status")
                fit(looked, "status on a full disk")
                assert done.status, f"{words}: without any room"
                assert rows(looked.out) == before, "nothing was changed"
            filler.unlink()
            again = run(*words)
            fit(again, f"{words} again")
            if "exists already" not in again.err:
                assert again.status == 0, f"{words}, {leave} bytes left: {done}, then {again}"
        assert failed


@NEEDS_ROOT
def test_a_read_only_disk_is_said_and_can_be_looked_at(box: Box) -> None:
    box.farm.write_text(MORE)
    ro = f"mount --bind {box.state} {box.state}; mount -o remount,bind,ro {box.state}"
    with box.forked(ro) as run:
        for words in LOOKS:
            done = run(*words)
            fit(done, " ".join(words))
            assert done.status == 0 or words[0] in ("doctor", "status"), done  # a host is not looked at
        for words in CHANGES:
            done = run(*words)
            fit(done, " ".join(words))
            assert done.status == 1, done
            assert str(box.state) in done.err, done


@NEEDS_ROOT
def test_a_state_that_is_gone_is_no_farm_and_comes_back(box: Box) -> None:
    """What it was on isn't mounted: an empty directory, then the real one again."""
    box.farm.write_text(FARM)
    with box.forked(f"mount -t tmpfs -o size=4M,mode=711 none {box.state}") as run:
        for words in (*LOOKS, ("recover",), ("log",)):
            fit(run(*words), " ".join(words))
        assert "not made" in run("status").out
    with box.forked() as run:
        assert "not made" not in run("status").out


NUMBERS = ("9" * 20, "9" * 5000, "-1", "1e3", "\u0663", "")
COUNTS = (("history", "--limit"), ("console", "--vm", "dev2", "--log", "--lines"))


@pytest.mark.parametrize("words", COUNTS, ids=lambda words: words[0])
def test_numbers_that_nobody_means_as_counts(box: Box, words: tuple[str, ...]) -> None:
    box.farm.write_text(FARM)
    with box.forked() as run:
        for number in NUMBERS:
            done = run(*words, number)
            fit(done, f"{words} {number[:30]}")
            assert done.status == 2, f"{words} {number[:30]}: {done}"
            assert len(done.err) < 300, done


def test_numbers_that_nobody_means_as_sizes(box: Box) -> None:
    box.farm.write_text(FARM)
    with box.forked() as run:
        for number in (*NUMBERS, "9" * 20 + "T", "2000000T", "0.0000000000000001T"):
            done = run("balloon", "--vm", "dev2", "--to", number)
            fit(done, f"balloon {number[:30]}")
            assert done.status in (1, 2), done
            assert len(done.err) < 400, done


KEYS = ("memory", "idle_memory", "disk", "vcpus", "ssh_port", "nat_port")


def test_numbers_that_nobody_means_in_a_farm_file(box: Box) -> None:
    with box.forked() as run:
        for key in KEYS:
            for number in ("9" * 20, "9" * 5000, "-1", "9" * 15 + "T"):
                box.farm.write_text(FARM.replace("dev2: {memory: 64M}", f"dev2: {{{key}: {number}}}"))
                done = run("status")
                fit(done, f"{key}: {number[:30]}")
                assert done.status in (0, 2), done
                assert len(done.err) < 600, done
