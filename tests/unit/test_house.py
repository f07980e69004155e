"""The developer's tools, run for them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.path.insert(0, {root!r})
import house
house._tool(types.SimpleNamespace(json={json}), "pytest", {suite!r}, "-p", "no:cacheprovider")
"""


@pytest.mark.parametrize("json", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_tests_tidy_up(tmp_path: Path, number: signal.Signals, json: bool) -> None:
    there, tidied, suite = tmp_path / "there", tmp_path / "tidied", tmp_path / "test_slow.py"
    suite.write_text(SLOW.format(there=str(there), tidied=str(tidied)))
    program = RUN.format(root=str(ROOT), json=json, suite=str(suite))
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
