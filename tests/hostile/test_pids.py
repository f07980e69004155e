"""Pids that others have by now."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from host.processes import Process, command_line
from hypervisors.libvirt import private
from provision.engine.facts import NoFacts
from provision.engine.journal import Journal
from provision.engine.locks import Locks
from provision.power import START
from tests.unit.sshd_machine import wait_for


@pytest.fixture
def somebody() -> Iterator[subprocess.Popen[bytes]]:
    """A living process, whose command line has "a sign"."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600) # a sign"]) as process:
        # execve(2) closes descriptors, which Popen waits for, before the new command line can be read
        wait_for(lambda: "a sign" in " ".join(command_line(process.pid)))
        yield process
        process.kill()


def test_the_process_that_has_the_pid_now_is_let_alone(somebody: subprocess.Popen[bytes]) -> None:
    assert private._end(somebody.pid, "another sign", signal.SIGKILL), "ours is gone"
    assert somebody.poll() is None
    assert private._end(somebody.pid, "a sign", signal.SIGKILL)
    assert somebody.wait() == -signal.SIGKILL


def test_a_pid_that_goes_to_another_while_we_look_is_let_alone(
    somebody: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the descriptor and the signal the first one ends, and the second has its pid: stood for by
    a descriptor of the first and the pid of the second."""
    with subprocess.Popen(["true"]) as first:
        handle = os.pidfd_open(first.pid)
    monkeypatch.setattr(os, "pidfd_open", lambda _pid: handle)
    assert private._end(somebody.pid, "a sign", signal.SIGKILL)
    assert somebody.poll() is None


def test_a_pid_file_says_one_process(tmp_path: Path) -> None:
    """kill(2) takes 0 and negative numbers for many."""
    file = tmp_path / "x.pid"
    for text in ("0", "-1", str(2**31), str(2**70), "9" * 5000, "", "x", "1 2"):
        file.write_text(text)
        assert private._pid(file) is None
    file.write_text("17\n")
    assert private._pid(file) == 17


def test_a_daemon_that_was_killed_is_stopped_all_the_same(tmp_path: Path) -> None:
    """Its pid file stays, and a process that is gone has no parent."""
    with subprocess.Popen(["true"]) as gone:
        pass
    runtime = tmp_path / "run"
    (runtime / "run").mkdir(parents=True)
    (runtime / "run/libvirtd.pid").write_text(f"{gone.pid}\n")
    private.PrivateLibvirt(tmp_path / "state", runtime, tmp_path, hide_kvm=False).stop(force=True)
    assert not runtime.exists()


def test_what_is_noted_of_a_process_is_not_of_the_next_with_its_pid(tmp_path: Path) -> None:
    """In the journal and in a lock's note: our own pid, of another start, and of another boot."""
    us = Process.this()
    locks = Locks(tmp_path / "locks")
    for other in (replace(us, start=f"{int(us.start) - 1}"), replace(us, boot="another")):
        assert not other.alive()
        assert not Process.parse(other.mark).alive()
        journal = Journal(tmp_path / f"{other.boot}-{other.start}.db")
        journal._process = other
        with pytest.raises(KeyboardInterrupt), journal.begin(START, ("prod",), NoFacts()):
            raise KeyboardInterrupt
        assert [record.process for record in journal.unfinished()] == [other]
        journal.close()
        with locks.hold("vm-prod", doing="start"):
            note = (tmp_path / "locks" / "vm-prod.lock").read_text()
        (tmp_path / "locks" / "vm-prod.lock").write_text(note.replace(us.start, other.start))
        assert locks.holder("vm-prod") is None
