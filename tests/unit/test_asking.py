"""destroy --all on a terminal says what goes, and asks: the real program, on a terminal of its own."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cli_farm import CommandLine, command_line

QUESTION = b'Type "yes" to destroy it: '


class Terminal:
    """With one command on it. ``shown``: all that it showed."""

    def __init__(self, cli: CommandLine, *words: str) -> None:
        self._leader, follower = pty.openpty()
        self.shown = b""
        self.process = subprocess.Popen(
            cli.argv(*words), env={**cli.environment, "TERM": "xterm", "COLUMNS": "60"},
            stdin=follower, stdout=subprocess.DEVNULL, stderr=follower,
        )  # fmt: skip
        os.close(follower)

    def until(self, text: bytes) -> str:
        """What is shown from now to that text; to the end where it never comes."""
        begin = len(self.shown)
        while text not in self.shown[begin:]:
            try:
                part = os.read(self._leader, 4096)
            except OSError:  # EIO: nobody has it open any more
                break
            self.shown += part
        return self.shown[begin:].decode().replace("\r\n", "\n")

    def type(self, keys: bytes) -> None:
        os.write(self._leader, keys)

    def end(self) -> tuple[int, str]:
        """The exit status, and the last of what it said."""
        rest = self.until(b"\0")
        os.close(self._leader)
        return self.process.wait(timeout=60), rest


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    for made in command_line(tmp_path):
        assert made("clone-farm", "--no-wait").status == 0
        yield made


def test_yes_alone_destroys(cli: CommandLine) -> None:
    terminal = Terminal(cli, "destroy", "--all")
    lines = terminal.until(QUESTION).splitlines()
    assert lines[0] == f"farm try ({cli.farm}): all of this goes, for good"
    assert [line.split() for line in lines[2:5]] == [
        ["VM", "STATE", "CHECKPOINTS", "DISK"],
        ["dev2", "running", "clean", "0B"],
        ["prod", "running", "clean", "0B"],
    ]
    assert "would: remove template base@1" in lines
    terminal.type(b"yes\n")
    status, said = terminal.end()
    assert status == 0
    assert "the farm is destroyed" in said
    assert not (cli.directory / "state" / "farms").exists()


def test_anything_else_does_nothing(cli: CommandLine) -> None:
    for answer in (b"\n", b"y\n", b"\x04", signal.SIGINT):
        terminal = Terminal(cli, "destroy", "--all", "--purge")
        terminal.until(QUESTION)
        if isinstance(answer, bytes):
            terminal.type(answer)
            expected = (1, '\nfarmhand: nothing was done: only "yes" would destroy it\n')
        else:
            terminal.process.send_signal(answer)
            expected = (130, "\nfarmhand: interrupted\n  nothing was done\n")
        status, said = terminal.end()
        assert (status, said[-len(expected[1]) :]) == expected, answer
    assert states(cli) == {"running"}


def states(cli: CommandLine) -> set[str]:
    return {vm["state"] for vm in cli("status", "--json").json["vms"]}


def test_a_farm_that_changed_meanwhile_is_asked_about_again(cli: CommandLine) -> None:
    terminal = Terminal(cli, "destroy", "--all")
    terminal.until(QUESTION)
    assert cli("checkpoint", "--vm", "prod", "--name", "tools").status == 0
    terminal.type(b"yes\n")
    assert "clean, tools" in terminal.until(QUESTION)
    terminal.type(b"no\n")
    assert terminal.end()[0] == 1
    assert states(cli) == {"running"}


def test_what_is_not_asked(cli: CommandLine) -> None:
    for words, left in (
        (("--all", "--plan"), {"running"}),
        (("--vm", "prod"), {"running", "not made"}),
        (("--all", "--yes"), {"not made"}),
    ):
        status, said = Terminal(cli, "destroy", *words).end()
        assert status == 0
        assert QUESTION.decode() not in said
        assert states(cli) == left, words
