"""What runs in a lab goes on when the connection is lost, and nothing of what it says is. Here the lab
is this machine, and a connection a shell of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from host.run import CommandResult, Runner
from inventory.errors import CommandFailed, DriverFailed, TimedOut
from tests.lab.away import Away


class Here:
    """Connections that can be cut."""

    def __init__(self) -> None:
        self.gone = False

    def ssh_argv(self, *command: str) -> list[str]:
        return ["sh", "-c", *command]

    def run(self, script: str, *, timeout: float = 120, input: bytes | None = None) -> CommandResult:
        if self.gone:
            raise CommandFailed("ssh exited with 255: no route to host")
        return Runner().change("sh", "-c", script, timeout=timeout, input=input)


def _away(tmp_path: Path, shown: list[bytes], said: list[str], place: Here | None = None) -> Away:
    return Away(place or Here(), str(tmp_path / "o u't"), tmp_path / "log", shown.append, said.append)


def _cut(away: Away) -> None:
    """SIGKILL to the shell that follows its output, as a lost connection ends ssh; and to its tail."""
    for entry in Path("/proc").glob("[1-9]*"):
        try:
            line, there = (entry / "cmdline").read_bytes(), (entry / "cwd").readlink()
        except OSError:
            continue
        if there == Path(away.out) and (line.startswith(b"tail\0") or b"tail -s" in line):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)


@pytest.mark.parametrize(
    ("command", "status"),
    [("exit 0", 0), ('echo "it\'s"; exit 3', 3), ("exec sh -c 'kill -TRAP $$'", 128 + 5)],
)
def test_its_status_tells_how_it_ended(tmp_path: Path, command: str, status: int) -> None:
    away = _away(tmp_path, [], [])
    away.begin(command)
    assert away.follow(60) == status


def test_a_lost_connection_loses_nothing(tmp_path: Path) -> None:
    shown: list[bytes] = []
    said: list[str] = []
    away = _away(tmp_path, shown, said)

    def show(data: bytes) -> None:
        shown.append(data)
        if not said:
            _cut(away)

    away.show = show
    go_on = tmp_path / "go on"
    away.begin(f"echo one; until [ -e '{go_on}' ]; do sleep 0.1; done; seq 2 20000; exit 7")
    away.say = lambda text: (said.append(text), go_on.touch())[0]
    assert away.follow(60) == 7
    assert said == ["the connection was lost; the tests went on, and so does what they say"]
    wanted = b"one\n" + b"".join(b"%d\n" % n for n in range(2, 20001))
    assert b"".join(shown) == wanted
    assert away.log.read_bytes() == wanted


def test_an_interrupted_one_ends_in_order_and_is_heard_to_its_end(tmp_path: Path) -> None:
    shown: list[bytes] = []
    away = _away(tmp_path, shown, [])
    away.begin("trap 'echo tidied up; exit 2' INT; echo begun; while :; do sleep 0.1; done")
    with pytest.raises(TimedOut):
        away.follow(2)
    assert away.interrupt(60) == 2
    assert b"".join(shown) == b"begun\ntidied up\n"


def test_where_nobody_answers_any_more_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.lab.away._SILENT", 0.0)
    place = Here()
    shown: list[bytes] = []
    away = _away(tmp_path, shown, [], place)

    def show(data: bytes) -> None:
        shown.append(data)
        place.gone = True
        _cut(away)

    away.show = show
    away.begin("echo $$; exec sleep 60")
    with pytest.raises(DriverFailed, match="no new connection: ssh exited with 255"):
        away.follow(60)
    os.kill(int(b"".join(shown)), signal.SIGKILL)


def test_one_that_left_no_status_is_not_taken_for_passed(tmp_path: Path) -> None:
    away = _away(tmp_path, [], [])
    away.begin("echo $$; exec sleep 60")
    while not (said := Path(away.out, "output").read_text()):
        time.sleep(0.01)
    os.kill(int(Path(away.out, "pid").read_text()), signal.SIGKILL)
    with pytest.raises(DriverFailed, match="left no status"):
        away.follow(60)
    os.kill(int(said), signal.SIGKILL)


def test_a_zombie_is_not_waited_for(tmp_path: Path) -> None:
    """Its parent, here this process, may be late to reap it."""
    away = _away(tmp_path, [], [])
    away.begin("exit 0")
    assert away.follow(60) == 0
    with subprocess.Popen(["sh", "-c", "exit 0"]) as dead:
        Path(away.out, "pid").write_text(f"{dead.pid}\n")
        Path(away.out, "status").unlink()
        with pytest.raises(DriverFailed, match="left no status"):
            away.follow(60)
