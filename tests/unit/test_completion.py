"""Completion in real shells: what a tabulator key makes of a line."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.unit.cli_farm import ROOT, CommandLine, command_line
from tests.unit.test_wrapper import ready_cache

SHELLS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "--interactive"],
}


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    for made in command_line(tmp_path):
        made.environment["FARMHAND_CACHE_DIR"] = str(ready_cache(tmp_path, ROOT))
        made.environment |= {"HOME": str(tmp_path), "TERM": "dumb", "PS1": "$ ", "PROMPT": "$ "}
        yield made


def completed(cli: CommandLine, *words: str) -> list[str]:
    return [line.partition("\t")[0] for line in cli("--complete", "--", *words).out.splitlines()]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["sta"], ["start", "status"]),
        (["reset", ""], ["dev2", "prod"]),
        (["reset", "prod", ""], ["dev2"]),
        (["reset", "p"], ["prod"]),
        (["reset", "--vm", "p"], ["prod"]),
        (["reset", "--vm=p"], ["--vm=prod"]),
        (["reset", "--vm", "=", "p"], ["prod"]),  # as bash splits it
        (["reset", "--no-"], ["--no-start", "--no-wait"]),
        (["reset", "--all", "--al"], []),
        (["reset", "--wait", ""], ["dev2", "prod"]),
        (["--vers"], ["--version"]),
        (["template-build", ""], ["base"]),
        (["template-remove", "b"], ["base@"]),
        (["log", "--step", "install-"], ["install-dev", "install-prod"]),
        (["cycle", "--from", "f"], ["fetch"]),
        (["test", "--only", "f"], []),  # no step of a cycle
        (["new", "--kind", ""], ["autobuild", "deb", "make", "rpm"]),
        (["rename", "--vm", "p"], ["prod"]),
        (["cp", ""], ["dev2:", "prod:"]),
        (["cp", "notes", "p"], ["prod:"]),
        (["cp", "prod:/etc/hosts", ""], []),  # a file here
        (["ssh", "prod", "--", ""], []),
        (["status", "--farm", ""], []),  # a file
        (["xyzzy", "pr"], []),
        (["reset", "--farm", "/nowhere.yaml", "pr"], []),
    ],
)
def test_what_a_word_can_become(cli: CommandLine, words: list[str], found: list[str]) -> None:
    assert sorted(completed(cli, *words)) == sorted(found)


def test_names_of_the_farm_that_is_named(cli: CommandLine) -> None:
    other = cli.directory / "other.yaml"
    other.write_text(cli.farm.read_text().replace("prod:", "preview:"))
    assert completed(cli, "reset", "--farm", str(other), "p") == ["preview"]
    assert completed(cli, "reset", f"--farm={other}", "p") == ["preview"]


def test_each_with_what_it_is(cli: CommandLine) -> None:
    assert "status\tShow the VMs as they are now.\n" in cli("--complete", "--", "sta").out


def test_a_shell_that_there_is_no_script_for(cli: CommandLine) -> None:
    done = cli("--print-completion-script", "bahs")
    assert (done.status, done.out) == (2, "")
    assert done.err.splitlines()[-1] == "  did you mean bash?"


class Terminal:
    """A shell on a terminal."""

    def __init__(self, argv: Sequence[str], cwd: Path, environment: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *argv], cwd=cwd, env=environment, stdin=theirs, stdout=theirs,
            stderr=theirs,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def type(self, text: str, until: str) -> str:
        """What is seen from then on, up to a match."""
        begin = len(self.seen)
        os.write(self._ours, text.encode())
        end = time.monotonic() + 60
        while not re.search(until, self.seen[begin:]):
            assert time.monotonic() < end, self.seen
            if select.select([self._ours], [], [], 1)[0]:
                self.seen += os.read(self._ours, 65536).decode(errors="replace")
        return self.seen[begin:]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_tabulator_key(cli: CommandLine, shell: str) -> None:
    script = cli.directory / "completion"
    script.write_text(cli("--print-completion-script", shell).out)
    link = cli.directory / "invoke"
    link.symlink_to(ROOT / "invoke")
    terminal = Terminal(SHELLS[shell], cli.directory, cli.environment)
    try:
        terminal.type(f". {shlex.quote(str(script))}; echo rea''dy\r", "ready")
        # What is typed after the key is there only when the word is complete.
        for typed, becomes in (
            ("./invoke reset pr\t", r"reset pr.*od "),
            (f"{ROOT}/invoke recov\t", r"recov.*er "),
            ("./invoke reset --no-st\t", r"--no-st.*art "),
            ("./invoke cp pr\tetc", r"cp pr.*od:.*etc"),
        ):
            terminal.type("\x15" + typed, becomes)  # Ctrl-U: an empty line
    finally:
        terminal.end()


@pytest.mark.parametrize("shell", SHELLS)
def test_another_program_of_that_name_is_not_started(cli: CommandLine, shell: str) -> None:
    """Whatever lies in the directory where somebody types."""
    script = cli.directory / "completion"
    script.write_text(cli("--print-completion-script", shell).out)
    other = cli.directory / "invoke"
    other.write_text(f"#!/bin/sh\ntouch {cli.directory}/started\n")
    other.chmod(0o755)
    (cli.directory / "prose.txt").touch()
    terminal = Terminal(SHELLS[shell], cli.directory, cli.environment)
    try:
        terminal.type(f". {shlex.quote(str(script))}; echo rea''dy\r", "ready")
        terminal.type("./invoke reset pro\t", r"reset pro.*se\.txt")  # a file's name, as without us
    finally:
        terminal.end()
    assert not (cli.directory / "started").exists()
