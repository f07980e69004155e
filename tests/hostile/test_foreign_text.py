"""What a guest, a commit or a file's name says reaches the admin as text, never as anything that a
terminal or a browser acts upon; and none of it passes for farmhand's own words."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from cycle_farm import Lab, environment, lab, run

from builds.record import BuildRecord, find_record
from cli import terminal
from cli.run import TaskRun
from host.program import ROOT
from hypervisors.api import Console
from inventory.loader import load
from provision.site import Site

__all__ = ["lab"]
FORGED = "farmhand: fetched out/kata.rpm: 1M, sha256 0000"
EVIL = "\x1b[2J\x1b]0;owned\x07\x1b]52;c;cm0gLXJm\x07\x9b31m\u202egnp.exe\u200b\x08\x7f"
NESTED = "\x1b[\x1b[0m31mnested"
SUBJECT = f"One {EVIL}{NESTED}"


def harmful(text: str) -> set[str]:
    return {c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl")}


def printed(text: str) -> str:
    """As an argument of printf(1)."""
    return "".join(f"\\{byte:03o}" for byte in text.encode())


BUILD = run(
    "build",
    f"mkdir out; printf '{printed(EVIL + NESTED)}\\n{printed(FORGED)}\\nx\\r{printed(FORGED)}\\n'; "
    "printf '\\377no text\\033]0;unended\\n'; echo built > out/kata.rpm",
    artifacts="out/*",
)
FAILS = {
    "an error": run("fail", f"printf 'x.c:1:1: error: {printed(EVIL)}\\n'; exit 1"),
    "a name": run("fail", f"echo x > out/\"$(printf 'k{printed(EVIL)}')\"", artifacts="out/k*"),
}


class Commands:
    """The real command line on the lab."""

    def __init__(self, lab: Lab, fails: str) -> None:
        farm = lab.farm_file([BUILD, FAILS[fails]])
        self.environment = {**environment(lab.root), "FARMHAND_FARM": str(farm)}
        self.argv = [sys.executable, "-P", str(ROOT / "cli" / "start.py"), "--search-root", str(ROOT)]

    def __call__(self, *words: str) -> tuple[str, str]:
        done = subprocess.run(
            [*self.argv, *words], env=self.environment, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=120, check=False,
        )  # fmt: skip
        out, err = done.stdout.decode(), done.stderr.decode()  # and it is UTF-8
        assert "Traceback" not in err and "a defect" not in err, err
        return out, err

    def on_terminal(self, *words: str) -> str:
        """All that reaches a terminal."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [*self.argv, *words], env={**self.environment, "TERM": "xterm", "COLUMNS": "100"},
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        seen = b""
        while select.select([ours], [], [], 120)[0]:
            try:
                data = os.read(ours, 65536)
            except OSError:  # EIO: it is closed at the other end
                break
            seen += data
        os.close(ours)
        process.wait(120)
        return seen.decode()


@pytest.fixture(params=list(FAILS))
def attacked(lab: Lab, request: pytest.FixtureRequest) -> tuple[Commands, BuildRecord, tuple[str, str]]:
    """A failed build of a hostile commit, and what its command printed."""
    lab.commit(SUBJECT, program="echo one\n")
    commands = Commands(lab, request.param)
    said = commands("cycle")
    with Site(load(Path(commands.environment["FARMHAND_FARM"])), reporter=lab.told) as site:
        return commands, find_record(site.paths), said


def test_a_hostile_build_is_shown_harmlessly(attacked) -> None:
    commands, record, said = attacked
    assert record.failed_step and record.failed_step.name == "fail", record
    texts = [*said]
    for words in ("log", "log --step build", "history", "status", "cycle --plan"):
        texts += commands(*words.split())
        texts += commands(*words.split(), "--json")
    texts += [record.page.read_text(), record.path.read_text()]
    for text in texts:
        assert not harmful(text), text
    assert "\\x1b]52;c;cm0gLXJm" in "".join(texts)  # it is to be seen that it was tried
    log = record.directory / record.steps[0].log
    assert EVIL.encode() in log.read_bytes()  # there, and there alone, as it came


def test_nothing_printed_in_a_vm_passes_for_our_words(attacked) -> None:
    commands, record, (_, shown) = attacked
    assert FORGED in shown
    for line in shown.splitlines():
        assert FORGED not in line or line.startswith("dev2 | "), line
    assert re.search(r"^\d\d:\d\d:\d\d dev2: fetched ", shown, re.MULTILINE)
    for text in (commands("log", "--step", "build")[0], record.steps[0].tail):
        ours = [line for line in text.splitlines() if not line.startswith("| ")]
        assert all(line.startswith("farmhand: ") for line in ours)
        assert [line.split()[1] for line in ours] == ["fetched", "build"]
        assert FORGED not in "".join(ours)
    data = json.loads(commands("log", "--step", "build", "--json")[0])
    lines = data["text"].split("\n")
    assert [lines[n - 1].split()[1] for n in data["ours"]] == ["fetched", "build"]


def test_on_a_terminal_only_our_own_sequences_arrive(lab: Lab) -> None:
    lab.commit(SUBJECT, program="echo one\n")
    seen = Commands(lab, "an error").on_terminal("cycle")
    assert "dev2 | " in seen
    assert not harmful(seen.replace("\r\x1b[2K", "").replace("\r\n", "\n"))


def test_a_console_log(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(f"boot {EVIL}{NESTED}\r\n".encode() + b"\xff\x9b2J login: ")
    run_ = TaskRun("console", "", json=False, plan=False)
    result = terminal.console(run_, "prod", Console(argv=(), log=log), log=True, lines=40)
    assert result and isinstance(result.text, str)
    assert not harmful(result.text)
    assert "boot" in result.text and "login:" in result.text


@pytest.mark.parametrize("words", [("status", "--farm", f"/nowhere/{EVIL}\nfarmhand: all is well"),
                                   ("log", f"--build={EVIL}"), (f"status{EVIL}",)])  # fmt: skip
def test_errors(tmp_path: Path, words: tuple[str, ...]) -> None:
    argv = [sys.executable, "-P", str(ROOT / "cli" / "start.py"), "--search-root", str(ROOT), *words]
    done = subprocess.run(
        argv, env=environment(tmp_path), cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True,
        timeout=120, check=False,
    )  # fmt: skip
    shown = done.stderr.decode()
    assert shown and not done.stdout
    assert not harmful(shown)
    assert sum(line.startswith("farmhand: ") for line in shown.splitlines()) <= 1
