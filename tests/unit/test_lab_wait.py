"""A lab is waited for as long as its console or its disks show that it boots."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from host.processes import Process
from host.run import CommandResult, Runner
from inventory.errors import CommandFailed, TimedOut
from tests.lab import machine as lab
from tests.lab import qemu


class Booting(lab.Machine):
    """One whose files are real, and whose QEMU is this process."""

    def run(self, script: str, **_: object) -> CommandResult:  # type: ignore[override]
        return CommandResult((script,), 0, "", "", 0.0)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Booting:
    for name in ("STATE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setattr(lab, "_COLD_PATIENCE", 2.5)
    made = Booting("boots", Runner(), lambda _: None)
    made.directory.mkdir(parents=True)
    for name in ("console.log", "run.qcow2", *(f"{disk}.raw" for disk in qemu.SPARE_DISKS)):
        (made.directory / name).touch()
    made._facts = lab.Facts("boots", Process.this(), 1, "", False, None, "")
    return made


def test_a_slow_one_is_waited_for(machine: Booting) -> None:
    """Twice as long as it would be without a word; half of the time it only writes to its disk."""

    def boot() -> None:
        for number in range(5):
            time.sleep(1)
            with (machine.directory / ("run.qcow2" if number < 3 else "console.log")).open("ab") as file:
                file.write(b"x" * 2**20)
        machine.console.write_text("lab: ready after 5 s")

    booting = threading.Thread(target=boot)
    booting.start()
    machine._wait()
    booting.join()


def test_one_that_stands_still_is_given_up(machine: Booting) -> None:
    machine.console.write_text("Loading initial ramdisk\n")
    with pytest.raises(TimedOut, match=r"nothing has gone on in it .*Loading initial ramdisk"):
        machine._wait()


@pytest.mark.parametrize("times", [1.0, 5.0])
def test_one_whose_clock_runs_too_fast_is_not_used(
    machine: Booting, monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    now = 1000.0  # ours, which only sleeping moves on

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: now)
    monkeypatch.setattr(lab, "time", clock)
    monkeypatch.setattr(machine, "run", lambda _: SimpleNamespace(stdout=f"{1e9 + times * now:.9f}\n"))
    if times == 1.0:
        machine._check_clock()
    else:
        with pytest.raises(CommandFailed, match=r"runs 5\.0 times too fast"):
            machine._check_clock()


def test_the_counter_is_measured_alike_each_time() -> None:
    """Or each lab would make a saved state of its own."""
    one, two = qemu.tsc_khz(), qemu.tsc_khz()
    assert one > 0
    assert abs(one - two) <= 10_000
