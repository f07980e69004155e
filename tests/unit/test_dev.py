"""The developer's tools, run for them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from sshd_machine import wait_for

from tests.dev import lanes, suite

ROOT = Path(__file__).resolve().parents[2]
SLOW = """
import pathlib, time, pytest

@pytest.fixture
def lab():
    yield
    time.sleep(1)
    pathlib.Path({tidied!r}).touch()

def test_slow(lab):
    pathlib.Path({there!r}).touch()
    time.sleep(60)
"""
RUN = """
import signal, sys, types
signal.signal(signal.SIGINT, {sigint})
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.path.insert(0, {root!r})
from tests.dev import lanes, suite

suite._tool(types.SimpleNamespace(json={json}), "pytest", {suite!r}, "-p", "no:cacheprovider")
"""


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize(
    ("number", "sigint"),
    [
        (signal.SIGINT, "signal.default_int_handler"),
        (signal.SIGTERM, "signal.SIG_IGN"),  # as in a shell's background job
    ],
)
def test_interrupted_tests_tidy_up(
    tmp_path: Path, number: signal.Signals, sigint: str, json: bool
) -> None:
    there, tidied, suite = tmp_path / "there", tmp_path / "tidied", tmp_path / "test_slow.py"
    suite.write_text(SLOW.format(there=str(there), tidied=str(tidied)))
    program = RUN.format(root=str(ROOT), json=json, suite=str(suite), sigint=sigint)
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(600):
        if there.exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    process.wait(timeout=60)
    assert tidied.exists()


@pytest.fixture
def lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., suite.Aside]:
    """With tasks that say what they were asked for in ``asked``, and last as many seconds as that
    says."""
    program = tmp_path / "invoke"
    program.write_text(
        f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n'
        "trap 'kill $!; exit 143' TERM; sleep \"$3\" >/dev/null & wait\n"
        """echo '{"ok": false, "message": "the lab went away", "seconds": '"$3"'}'; [ "$3" = 0 ]\n"""
    )
    program.chmod(0o755)
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    return lambda *runs: suite.Aside(SimpleNamespace(json=True), runs)


def test_labs_run_one_after_another(lane: Callable[..., suite.Aside], tmp_path: Path) -> None:
    with lane(("lab-test", "0", "--kvm"), ("test", "0.1", "--only")) as labs:
        first, second = labs.finish()
    assert (first.ok, first.data["seconds"]) == (True, 0)
    assert (second.ok, second.problem) == (False, "the lab went away")
    assert (tmp_path / "asked").read_text() == "lab-test --json 0 --kvm\ntest --json 0.1 --only\n"


def test_labs_that_are_left_end_and_no_more_begin(
    lane: Callable[..., suite.Aside], tmp_path: Path
) -> None:
    started = time.monotonic()
    both = [("lab-test", "60", kind) for kind in ("--kvm", "--xen")]
    with contextlib.suppress(KeyboardInterrupt), lane(*both):
        while not (tmp_path / "asked").exists():
            time.sleep(0.05)
        time.sleep(0.2)  # for its trap
        raise KeyboardInterrupt
    assert time.monotonic() - started < 30
    assert (tmp_path / "asked").read_text() == "lab-test --json 60 --kvm\n"


TOGETHER = """
import pathlib, time, pytest

@pytest.fixture(scope="session")
def place(tmp_path_factory):
    yield tmp_path_factory.mktemp("one")
    note("end")

def note(what):
    print({name!r}, what, file=open({log!r}, "a"))

@pytest.mark.parametrize("number", range(3))
def test_one(place, number):
    note(number)
    while not {{"a 0", "b 0"}} <= set(pathlib.Path({log!r}).read_text().splitlines()):
        time.sleep(0.01)

def test_that_fails():
    note("fails")
    assert {name!r} == "a"
"""


def test_lanes_run_each_test_once(tmp_path: Path) -> None:
    """Two files, neither of which ends before the other has begun; and what is there of a session's
    fixtures is there until a lane has nothing left."""
    log, claims = tmp_path / "log", tmp_path / "claims"
    claims.mkdir()
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom tests.conftest import pytest_configure\n"
    )
    for name in "ab":
        (tmp_path / f"test_{name}.py").write_text(TOGETHER.format(name=name, log=str(log)))
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_a.py", "test_b.py"]
    both = [
        subprocess.Popen(
            argv, cwd=tmp_path, env={**os.environ, lanes.CLAIMS: str(claims)}, stdout=subprocess.DEVNULL
        )
        for _ in range(2)
    ]
    assert sorted(process.wait(60) for process in both) == [0, 1]
    lines = log.read_text().splitlines()
    for name in "ab":
        mine = [line for line in lines if line.startswith(name)]
        assert mine == [f"{name} {what}" for what in (0, 1, 2, "fails", "end")]
    assert lanes.ends(claims) == "all lanes: 1 failed, 7 passed"


def test_a_lane_beside_ends_with_an_interruption(tmp_path: Path) -> None:
    there, tidied, file = tmp_path / "there", tmp_path / "tidied", tmp_path / "test_slow.py"
    file.write_text(SLOW.format(there=str(there), tidied=str(tidied)))
    with (
        contextlib.suppress(KeyboardInterrupt),
        suite._beside([str(file), "-p", "no:cacheprovider"]),
    ):
        wait_for(there.exists)
        raise KeyboardInterrupt
    assert tidied.exists()
