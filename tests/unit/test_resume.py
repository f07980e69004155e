"""A guest that runs on from its memory is brought to the present: a real sshd, whose logins find a clock
and a kernel log of their own, so that nothing of this machine is set."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_farm import CommandLine
from cycle_farm import Told
from sshd_machine import Sshd, make_key

from host.progress import Progress
from inventory.errors import TimedOut
from inventory.loader import load
from provision.guest.remote import CLOCK_LIMIT, Ready, Resumed
from provision.guest.ssh_connection import wait_ready
from provision.member import Member
from provision.power import wait_until_ready
from provision.site import Site

# Its clock is as far from this machine's as the file says. "coarse": as busybox has it.
DATE = r"""#!/bin/sh
here=${0%/*}
read -r off <"$here/off"
[ -e "$here/coarse" ] && part= || part=.%N
now=$(DATE +%s.%N)
for word; do :; done
case "$*" in
    *-s*)
        [ -e "$here/locked" ] && exit 1
        [ -e "$here/coarse" ] && case $word in *.*) exit 1; esac
        [ -e "$here/slow" ] && sleep 0.7 && now=$(DATE +%s.%N)
        awk "BEGIN { printf \"%.6f\n\", ${word#@} - $now }" >"$here/off"
        DATE ;;
    *)
        now=$(awk "BEGIN { printf \"%.6f\n\", $now + $off }")
        [ -e "$here/coarse" ] && now=${now%.*}.%N
        printf '%s\n' "${word%"%s.%N"}" | sed "s/^+//; s/\$/$now/" ;;
esac
"""
PROGRAMS = {"sudo": "exit 1", "perl": "exit 0", "python3": "exit 1", "dmesg": 'cat "${0%/*}/log"'}


@dataclass
class Guest(Sshd):
    """``driver``: whether its kernel has one for vmgenid."""

    driver: bool = False

    def command(self) -> list[str]:
        script = (
            'mount -t tmpfs none /sys/bus && mkdir -p "/sys/bus/acpi/drivers/$1" && '
            'mount -t tmpfs none /run && mkdir /run/sshd && shift && exec "$@"'
        )
        driver = "vmgenid" if self.driver else "other"
        return ["unshare", "--mount", "sh", "-c", script, "sh", driver, *super().command()]

    @property
    def tools(self) -> Path:
        return self.root / "tools"

    def equip(self) -> Guest:
        self.tools.mkdir(parents=True)
        date = DATE.replace("DATE", str(shutil.which("date")))
        programs = {name: f"#!/bin/sh\n{text}\n" for name, text in PROGRAMS.items()}
        for name, text in {"date": date, **programs}.items():
            self.give(name, text)
        (self.tools / "off").write_text("-3600\n")
        self.environment["PATH"] = f"{self.tools}:/usr/bin:/bin"
        return self

    def give(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    @property
    def off(self) -> float:
        """Seconds that its clock is off."""
        return float((self.tools / "off").read_text())

    def wake(self, *, since: float | None = None) -> tuple[Resumed, Ready]:
        ready = self.wait(since=since)
        assert ready.resumed is not None
        return ready.resumed, ready

    def wait(self, *, since: float | None = None) -> Ready:
        return asyncio.run(
            wait_ready(
                self.endpoint(), since=time.monotonic() if since is None else since,
                progress=Progress(lambda: None, 20), running=lambda: True, tail=lambda: "",
                working=lambda text: None, asleep=True,
            )
        )  # fmt: skip


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    make_key(tmp_path / "key")
    machine = Guest("prod", tmp_path / "machine", tmp_path / "key").equip()
    yield machine
    machine.stop()


def start(guest: Guest, *marks: str) -> None:
    for mark in marks:
        (guest.tools / mark).touch()
    guest.prepare().start()


@pytest.mark.parametrize("marks", [(), ("coarse",), ("slow",)])
def test_its_clock_is_set(guest: Guest, marks: tuple[str, ...]) -> None:
    start(guest, *marks)
    resumed, ready = guest.wake()
    assert abs(guest.off) <= CLOCK_LIMIT
    assert abs(resumed.clock_after) <= CLOCK_LIMIT
    assert ready.skew == resumed.clock_after
    assert resumed.troubles == ()


def test_a_clock_that_is_right_is_let_alone(guest: Guest) -> None:
    (guest.tools / "off").write_text("0.05\n")
    start(guest)
    assert abs(guest.wake()[0].clock_after) <= CLOCK_LIMIT
    assert guest.off == 0.05


def test_a_clock_that_cannot_be_set_is_told(guest: Guest) -> None:
    start(guest, "locked")
    (trouble,) = guest.wake()[0].troubles
    assert trouble.startswith("its clock is -3600.") and trouble.endswith("s off, and can't be set")


def test_it_is_one_program_whatever_its_uptime(guest: Guest) -> None:
    """This machine has been up for longer than since now; and each program costs."""
    guest.options = ("LogLevel VERBOSE",)
    start(guest)
    _, ready = guest.wake()
    assert ready.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert guest.log.read_text().count("Starting session") == 1


@pytest.mark.parametrize(
    ("perl", "python", "random"), [(0, 1, "ioctl"), (1, 0, "ioctl"), (1, 1, "mixed")]
)
def test_its_random_numbers_are_made_anew(guest: Guest, perl: int, python: int, random: str) -> None:
    guest.give("perl", f"#!/bin/sh\nexit {perl}\n")
    guest.give("python3", f"#!/bin/sh\nexit {python}\n")
    start(guest)
    resumed, _ = guest.wake()
    assert resumed.random == random
    assert len(resumed.troubles) == (random == "mixed")


@pytest.mark.parametrize(
    ("ago", "random"), [((0,), "vmgenid"), ((9000, 0), "vmgenid"), ((9000,), "ioctl"), ((), "ioctl")]
)
def test_the_kernels_own_word_counts_if_it_is_of_this_life(
    guest: Guest, ago: tuple[int, ...], random: str
) -> None:
    guest.driver = True
    up = float(Path("/proc/uptime").read_text().split()[0])
    said = "random: crng reseeded due to virtual machine fork"
    lines = [f"[{up - seconds:12.6f}] {said}" for seconds in ago]
    guest.tools.joinpath("log").write_text("\n".join(["[    0.05] random: crng init done", *lines, ""]))
    start(guest)
    assert guest.wake()[0].random == random


def test_the_kernels_word_is_of_no_use_without_the_start(guest: Guest) -> None:
    guest.driver = True
    guest.give("dmesg", "#!/bin/sh\necho '[1.0] crng reseeded due to virtual machine fork'\n")
    start(guest)
    assert guest.wake(since=float("-inf"))[0].random == "ioctl"


def test_nonsense_is_not_taken_for_an_answer(guest: Guest) -> None:
    guest.give("date", "#!/bin/sh\necho no date; exit 1\n")
    start(guest)
    with pytest.raises(TimedOut, match="it can't be told that it runs again: no date"):
        asyncio.run(
            wait_ready(
                guest.endpoint(), since=0.0, progress=Progress(lambda: None, 1), running=lambda: True,
                tail=lambda: "", working=lambda text: None, asleep=True,
            )
        )  # fmt: skip


def write_farm(guest: Guest, directory: Path) -> None:
    vm = {"host": "lab", "address": "127.0.0.1", "ssh_port": str(guest.port)}
    farm = {
        "farm": "lab", "hosts": {"lab": {"driver": "ssh"}}, "vms": {"prod": vm},
        "ssh": {"key": str(guest.client_key), "ready_timeout": "20s", "user": guest.endpoint().user},
        "cycle": {"steps": [{"name": "build", "vm": "prod", "run": "date +%s.%N"}]},
    }  # fmt: skip
    (directory / "farm.yaml").write_text(json.dumps(farm))


def test_what_could_not_be_done_is_told_once_it_answers(guest: Guest, tmp_path: Path) -> None:
    start(guest, "locked")
    write_farm(guest, tmp_path)
    told = Told()
    with Site(load(tmp_path / "farm.yaml"), reporter=told) as site:
        wait_until_ready(Member(site, "prod"), since=time.monotonic(), asleep=True)
    assert [line for line in told.warned if "it runs again, but its clock is -3600." in line]
    assert [line for line in told.said if "answers on ssh after" in line]


@pytest.mark.parametrize(
    "words",
    [["ssh", "--vm", "prod", "--command", "date +%s.%N"], ["cycle"], ["cp", "prod:file", "here"]],
    ids=lambda words: words[0],
)
def test_whoever_logs_in_first_tells_it(guest: Guest, tmp_path: Path, words: list[str]) -> None:
    """Nobody waited for its start. It is told before anything is run there, and once."""
    start(guest)
    (guest.home / "file").touch()
    line = CommandLine(tmp_path, tmp_path / "run")
    line.farm = tmp_path / "farm.yaml"
    line.environment["FARMHAND_FARM"] = str(line.farm)
    write_farm(guest, tmp_path)
    assert line("clone-farm", "--no-wait").status == 0
    assert line("ssh", "--vm", "prod", "--command", "true").status == 0
    assert guest.off == -3600
    note = tmp_path / "state/farms/lab/untold/prod"
    note.parent.mkdir()
    note.touch()
    done = line(*words)
    assert done.status == 0, done.err
    assert abs(guest.off) <= CLOCK_LIMIT and not note.exists()
    if words[0] == "ssh":
        assert float(done.out) == pytest.approx(time.time(), abs=60)
    (guest.tools / "off").write_text("-60\n")
    assert line("ssh", "--vm", "prod", "--command", "true").status == 0
    assert guest.off == -60
