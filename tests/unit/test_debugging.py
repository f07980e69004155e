"""cycle --debug: a shell where a step failed. Real sshds, the real program, with a terminal or not."""

from __future__ import annotations

import json
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cycle_farm import Lab, environment, lab, reset, run

from builds.record import BuildRecord, find_record
from host.paths import FarmPaths

__all__ = ["lab"]
ROOT = Path(__file__).resolve().parents[2]
BREAKS = 'mkdir -p "it is here"; cd "it is here"; MADE="a \'b\' c"; export MADE; false'
ASK = b'echo "<$PWD|$MADE|$BUILD_ID|$TERM>"; git ls-remote "$SOURCE_URL" HEAD; echo done'


def argv(file: Path, *words: str) -> list[str]:
    program = [sys.executable, "-P", str(ROOT / "cli" / "start.py"), "--search-root", str(ROOT)]
    return [*program, "cycle", "--debug", "--farm", str(file), *words]


def record_of(lab: Lab) -> BuildRecord:
    return find_record(FarmPaths("lab"), "last")


def on_terminal(lab: Lab, command: list[str], *keys: bytes) -> tuple[int, str]:
    """Its status, and what the terminal showed. Keys are typed once the shell is there."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command, env={**environment(lab.root), "TERM": "xterm"},
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    left = list(keys)
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # EIO: nobody has it open any more
            break
        shown += part
        if left and b"by 'exit'" in shown:
            os.write(leader, left.pop(0) + b"\n")
    os.close(leader)
    return process.wait(timeout=60), shown.decode(errors="replace")


def without_terminal(lab: Lab, command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(lab.root), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_on_a_terminal_it_is_a_shell_in_its_directory_with_its_environment(lab: Lab) -> None:
    file = lab.farm_file([reset("dev2"), run("break", BREAKS), run("later", "true")])
    status, shown = on_terminal(lab, argv(file), ASK, b"exit")
    record = record_of(lab)
    where = lab.dev2.home / "it is here"
    assert f"<{where}|a 'b' c|{record.id}|xterm>" in shown, shown
    assert f"{lab.git('rev-parse', 'HEAD')}\tHEAD" in shown, "the source can still be fetched"
    assert (status, record.result) == (3, "failed")
    assert [step.status for step in record.steps] == ["passed", "failed", "skipped"]
    assert "break failed on dev2" in shown


def test_without_a_terminal_the_command_that_opens_it_is_told(lab: Lab) -> None:
    file = lab.farm_file([reset("dev2"), run("break", BREAKS)])
    done = without_terminal(lab, argv(file))
    assert done.returncode == 3, done.stderr
    assert record_of(lab).result == "failed"
    (line,) = (line for line in done.stderr.splitlines() if "to look into it, type: " in line)
    command = shlex.split(line.partition("type: ")[2])
    assert command[:2] == ["ssh", "-t"]
    shell = subprocess.run(
        ["ssh", *command[2:]], input=ASK.decode() + "\n", capture_output=True, text=True, check=False
    )
    assert f"<{lab.dev2.home / 'it is here'}|a 'b' c|{record_of(lab).id}|" in shell.stdout, shell.stderr


@pytest.mark.parametrize(
    ("step", "where"),
    [
        (run("break", "cd /; trap 'echo own' EXIT; false"), "home"),
        (run("break", "cd /; sleep 300", timeout="2s"), "home"),
        ({"name": "break", "transfer": ["none"], "from": "dev2", "to": "dev2", "into": "in",
          "timeout": "60s"}, "home"),
    ],
    ids=["own trap", "killed", "another kind"],
)  # fmt: skip
def test_where_no_script_tells_it_is_the_home_with_what_scripts_get(
    lab: Lab, step: dict, where: str
) -> None:
    file = lab.farm_file([reset("dev2"), step])
    done = without_terminal(lab, argv(file))
    (line,) = (line for line in done.stderr.splitlines() if "to look into it, type: " in line)
    command = shlex.split(line.partition("type: ")[2])
    shell = subprocess.run(
        ["ssh", *command[2:]], input='echo "<$PWD|$BUILD_ID>"\n', capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert f"<{getattr(lab.dev2, where)}|{record_of(lab).id}>" in shell.stdout, shell.stderr


def test_without_debug_nothing_is_left_and_a_passed_step_is_not_asked_about(lab: Lab) -> None:
    file = lab.farm_file([reset("dev2"), run("fine", "cd /"), run("break", "false")])
    words = [word for word in argv(file, "--json") if word != "--debug"]
    done = without_terminal(lab, words)
    assert json.loads(done.stdout)["ok"] is False
    assert not (lab.dev2.home / ".farmhand-failed").exists()
    file = lab.farm_file([reset("dev2"), run("fine", "cd /; true")])
    done = without_terminal(lab, argv(file))
    assert done.returncode == 0
    assert "look into" not in done.stderr
