"""Standard input, output and errors that are closed, full or read by nobody; signals that are ignored.
Real processes: the work is done, and the exit status tells of it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from cycle_farm import Lab, environment, run

from tests.unit.cli_farm import ROOT, CommandLine, Done, command_line

NO_ROOM = "could not be written: No space left on device"
UNREAD = "UNREAD"  # a pipe whose reader has left


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    yield from command_line(tmp_path)


def redirected(argv: list[str], how: str, env: dict[str, str]) -> Done:
    """As a shell starts it. No traceback, nothing that Python says while it ends, no defect."""
    stdout = subprocess.PIPE
    if how == UNREAD:
        end, stdout = os.pipe()
        os.close(end)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {how if how != UNREAD else ""}', "sh", *argv],
        env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    if how == UNREAD:
        os.close(stdout)
    for word in ("Traceback", "Exception ignored", "defect"):
        assert word not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout or "", done.stderr)


@pytest.mark.parametrize(
    ("words", "how", "status"),
    [
        ("status", ">&-", 0),
        ("status --json", "<&- >&- 2>&-", 0),
        ("status", ">/dev/full", 74),
        ("status", ">/dev/full 2>/dev/full", 74),
        ("--list", ">&-", 0),
        ("--list", ">/dev/full", 74),
        ("--list", UNREAD, 0),
        ("--help", ">&- 2>&-", 0),
        ("--help", ">/dev/full", 74),
        ("--help", UNREAD, 0),
        ("status --help", UNREAD, 0),
        ("status --farm /nowhere --json", ">&-", 2),
        ("status --farm /nowhere --json", ">/dev/full", 2),
        ("status --farm /nowhere", "2>&-", 2),
        ("status --farm /nowhere", "2>/dev/full", 2),
    ],
)
def test_the_status_stays_true(cli: CommandLine, words: str, how: str, status: int) -> None:
    done = redirected(cli.argv(*words.split()), how, cli.environment)
    assert done.status == status
    assert (NO_ROOM in done.err) is (status == 74 and "2>" not in how)


def test_invoke_itself_without_the_wrapper(cli: CommandLine) -> None:
    words = ["-m", "invoke", "--search-root", str(ROOT), "--list"]
    done = redirected([sys.executable, "-P", *words], ">/dev/full", cli.environment)
    assert (done.status, done.err) == (74, f"farmhand: it {NO_ROOM}\n")


def test_what_was_done_is_said_where_the_result_is_lost(cli: CommandLine) -> None:
    made = redirected(cli.argv("clone-farm", "--no-wait"), "<&- 2>/dev/full", cli.environment)
    assert made.status == 0
    assert "clone from base" in made.out
    done = redirected(cli.argv("stop", "--all"), ">/dev/full", cli.environment)
    assert done.status == 74
    assert f"farmhand: the result {NO_ROOM}; stop was done\n" in done.err
    plan = redirected(cli.argv("start", "--all", "--plan"), ">/dev/full", cli.environment)
    assert plan.status == 74
    assert f"farmhand: the result {NO_ROOM}\n" in plan.err
    assert {vm["state"] for vm in cli("status", "--json").json["vms"]} == {"stopped"}


@pytest.mark.parametrize("how", [UNREAD, ">/dev/full", "2>&-"])
def test_a_failed_build_is_one_whoever_reads(tmp_path: Path, how: str) -> None:
    lab = Lab(tmp_path)
    try:
        farm = lab.farm_file([run("build", "echo no; exit 3")], source=None)
        argv = [sys.executable, "-P", str(ROOT / "cli" / "start.py"), "--search-root", str(ROOT)]
        done = redirected([*argv, "cycle", "--farm", str(farm)], how, environment(tmp_path))
    finally:
        lab.stop()
    assert done.status == 3
    assert "cycle was done" not in done.err
    if how != "2>&-":
        assert (f"farmhand: the result {NO_ROOM}\n" in done.err) is (how == ">/dev/full")
        assert done.err.splitlines()[-1].startswith(("  ", "farmhand: "))


# ---- Tasks of our own, for what no task of farmhand's shows.

PROBE = """\
import sys
sys.path.insert(0, {root!r})
from cli import streams, terminal
streams.take_over()
from cli.command import command
from cli.run import TaskResult
from host.run import Runner

@command()
def lands(run):
    "Prints, by a child too, with a file open."
    import subprocess
    with open("kept", "w") as file:
        print("one", flush=True)
        print("two", file=sys.stderr)
        subprocess.run(["sh", "-c", "echo three; echo four >&2"], check=True)
        return TaskResult({{}}, "five")

@command()
def goes_on(run):
    "Waits for a line; tells what a child ignores."
    run.screen.say("waiting")
    sys.stdin.readline()
    return TaskResult({{}}, Runner().read("grep", "SigIgn", "/proc/self/status").stdout)

@command()
def hands_over(run):
    "Tells what it ignores."
    return terminal.replace_process(run, ["grep", "SigIgn", "/proc/self/status"])

@command(does=["reset"])
def much(run):
    "Prints more than a pipe holds."
    return TaskResult({{}}, "x" * 400_000)
"""


@pytest.fixture
def probe(cli: CommandLine) -> list[str]:
    (cli.directory / "tasks.py").write_text(PROBE.format(root=str(ROOT)))
    return [*cli.argv()[:3], "--search-root", str(cli.directory)]


def test_what_is_printed_never_lands_in_a_file(
    cli: CommandLine, probe: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would get the number of a closed one."""
    monkeypatch.chdir(cli.directory)
    assert redirected([*probe, "lands"], "<&- >&- 2>&-", cli.environment).status == 0
    assert (cli.directory / "kept").read_text() == ""


def ignored(line: str) -> set[int]:
    mask = int(line.split()[1], 16)
    return {number for number in range(1, 32) if mask >> (number - 1) & 1}


def test_ignored_signals_stay_ignored(cli: CommandLine, probe: list[str]) -> None:
    """By nohup, by & in a script. Those that Python ignores for itself are not handed on."""
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP INT TERM; exec "$@"', "sh", *probe, "goes-on"],
        env=cli.environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    assert "waiting" in process.stderr.readline()
    kept = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
    for number in kept:
        process.send_signal(number)
    out, err = process.communicate("go\n", timeout=120)
    assert (process.returncode, err) == (0, "")
    others = {signal.SIGPIPE, signal.SIGXFSZ}
    assert ignored(out) & (kept | others) == kept


def test_ssh_gets_the_signals_as_they_were(cli: CommandLine, probe: list[str]) -> None:
    done = subprocess.run(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *probe, "hands-over"],
        env=cli.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    mine = {signal.SIGHUP, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ}
    assert ignored(done.stdout) & mine == {signal.SIGHUP}


def waiting_in(pipe: int) -> int:
    """Bytes."""
    found = array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, found)
    return found[0]


@pytest.mark.parametrize("ends", [False, True])
def test_a_slow_reader(cli: CommandLine, probe: list[str], ends: bool) -> None:
    """Of a pipe that another made non-blocking; and one that is too slow for whoever typed Ctrl-C: then
    it is not said that anything was under way."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = subprocess.Popen(
        [*probe, "much"], env=cli.environment, text=True,
        stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(writer)
    while waiting_in(reader) < 65536 and process.poll() is None:
        time.sleep(0.05)
    if ends:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said == "farmhand: interrupted while the result was being written; much was done\n"
    with os.fdopen(reader, "rb") as pipe:
        text = pipe.read()
    _, err = process.communicate(timeout=120)
    assert process.returncode == (130 if ends else 0)
    assert err == ""
    assert ends or text == b"x" * 400_000 + b"\n"


def test_no_character_is_too_odd_to_be_printed(cli: CommandLine) -> None:
    """For an ASCII terminal; nor is a file's name that is no text at all."""
    odd = cli.directory / os.fsdecode("é€".encode() + b"\xff.yaml")
    cli.farm.rename(odd)
    for encoding in ("ascii", "utf-8"):
        environment = {"PYTHONIOENCODING": encoding, "FARMHAND_FARM": str(odd)}
        done = cli("status", "--json", **environment)
        assert (done.status, json.loads(done.out)["file"]) == (0, str(odd))
        assert cli("status", **environment).status == 0
    gone = cli("status", PYTHONIOENCODING="ascii", FARMHAND_FARM="/nowhere/é")
    assert gone.error == "farmhand: $FARMHAND_FARM: no farm file /nowhere/\\xe9"
