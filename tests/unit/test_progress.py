"""Patience by progress, by a clock of its own: what counts as going on, and when it is given up."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from host.progress import IN_ALL, Progress, Pulse
from host.run import Runner
from inventory.errors import DriverFailed, TimedOut

MIB = 2**20


class Wait:
    """A guest whose pulse is a function of the seconds since, waited for with 100 s of patience."""

    def __init__(self, pulse: Callable[[int], Pulse | None]) -> None:
        self.now = 0
        self.progress = Progress(lambda: pulse(self.now), 100, clock=lambda: self.now)

    def end(self) -> int:
        """Seconds until it is given up, looked at each second."""
        while self.progress.left() > 0:
            self.now += 1
            self.progress.look()
        return self.now


def test_without_a_pulse_the_clock_counts_alone() -> None:
    wait = Wait(lambda _: None)
    assert wait.end() == 100
    assert wait.progress.verdict() == "within 1m40s"
    assert str(wait.progress) == ""


def test_a_console_that_grows_is_waited_for() -> None:
    wait = Wait(lambda now: Pulse(console=min(now, 350), said="\x1b[1;32m[  OK  ] Started udevd\r\n"))
    assert wait.end() == 450
    said = "console 1m40s ago: '[  OK  ] Started udevd'"
    assert wait.progress.verdict() == f"and nothing has gone on in it for 1m40s ({said})"


def test_a_disk_that_works_is_waited_for() -> None:
    wait = Wait(lambda now: Pulse(console=0, read=min(now, 200) * MIB, written=0))
    assert wait.end() == 300
    assert str(wait.progress) == "nothing on its console, disk 1m40s ago: 200M"


def test_what_a_system_at_rest_writes_is_no_progress() -> None:
    """Some kilobytes each ten seconds, after the boot."""
    wait = Wait(lambda now: Pulse(console=70, read=40 * MIB, written=now // 10 * 4096))
    assert wait.end() == 101


def test_a_boot_sector_is_more_than_0() -> None:
    wait = Wait(lambda now: Pulse(console=0, read=512, written=0))
    wait.end()
    assert str(wait.progress) == "nothing on its console, disk 1m40s ago: hardly anything"


def test_a_log_that_was_turned_over_is_progress_too() -> None:
    wait = Wait(lambda now: Pulse(console=90 if now < 50 else 10))
    assert wait.end() == 150


def test_one_that_boots_again_and_again_ends_at_the_limit_for_all() -> None:
    wait = Wait(lambda now: Pulse(console=now * 50, said="SeaBIOS\n"))
    assert wait.end() == 100 * IN_ALL
    assert wait.progress.verdict() == "within 10m, though it goes on (console 0s ago: 'SeaBIOS')"


def test_a_daemon_that_is_away_for_a_moment_is_no_end() -> None:
    def pulse(now: int) -> Pulse:
        if 10 < now < 20:
            raise DriverFailed("away")
        return Pulse(console=now)

    assert Wait(pulse).end() == 100 * IN_ALL


def test_it_is_asked_once_a_second_however_often_it_is_looked_at() -> None:
    asked: list[int] = []
    progress = Progress(lambda: asked.append(1), 100, clock=lambda: 5)
    for _ in range(100):
        progress.look()
    assert len(asked) == 1


def lifeless(pulse: Callable[[int], Pulse | None], at: int = 99) -> bool:
    wait = Wait(pulse)
    for _ in range(at):
        wait.now += 1
        wait.progress.look()
    return wait.progress.lifeless(90)


def test_no_sign_of_life() -> None:
    """A boot loader reads, and then nothing comes."""
    assert lifeless(lambda now: Pulse(console=0, read=min(now, 5) * MIB, written=0))
    assert not lifeless(lambda now: Pulse(console=0, read=min(now, 5) * MIB, written=0), at=80)
    assert not lifeless(lambda now: Pulse(console=0, read=now * 512, written=0)), "it reads still"
    assert not lifeless(lambda _: Pulse(console=1, read=0, written=0))
    assert not lifeless(lambda _: Pulse(console=0, read=0, written=512)), "no boot loader writes"
    assert not lifeless(lambda _: Pulse(read=0, written=0)), "nobody sees its console"
    assert not lifeless(lambda _: Pulse(console=0)), "nobody sees its disks"
    assert not lifeless(lambda _: None)


def test_a_command_with_a_log_runs_on_as_long_as_that_grows(tmp_path: Path) -> None:
    log, runner = tmp_path / "log", Runner()
    runner.change("sh", "-c", "for n in 1 2 3 4 5; do sleep 1; echo $n; done", timeout=3, log=log)
    assert log.read_text().split() == ["1", "2", "3", "4", "5"]
    with pytest.raises(TimedOut, match=r"still running after \d+ s, ended: sh"):
        runner.change("sh", "-c", "echo 6; sleep 600", timeout=2, log=log)
    with pytest.raises(TimedOut, match=r"still running after 0\.1 s"):
        runner.change("sleep", "600", timeout=0.1)


def test_a_patient_command_runs_on_as_long_as_it_works() -> None:
    """Where it says nothing, its CPU time tells: also that of children that are through, and those that
    run."""
    quick = "i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done"
    busy = f"while [ $(date +%s) -lt $1 ]; do sh -c '{quick}'; done; echo through"
    until = str(int(time.time()) + 4)
    done = Runner().change("sh", "-c", busy, "sh", until, timeout=2, patient=True)
    assert done.stdout == "through\n"


def test_a_patient_command_that_hangs_is_ended() -> None:
    with pytest.raises(TimedOut, match=r"still running after \d+ s, ended: sh -c"):
        Runner().change("sh", "-c", "sleep 60", timeout=1, patient=True)
