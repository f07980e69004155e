"""Locks between real processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path

import pytest

from host.file_lock import FileLock
from inventory.errors import Busy
from provision.engine.locks import Locks

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, pathlib
from provision.engine.locks import Locks
with Locks(pathlib.Path(sys.argv[1])).hold("vm-prod", doing="cycle --from build-prod"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_who_waits_for_a_file_may_say_so_or_give_up(tmp_path: Path) -> None:
    """Giving up, it leaves the lock's file to its holder."""
    path, said = tmp_path / "x.lock", list[str]()

    def give_up() -> None:
        raise Busy("not now")

    def wait() -> None:
        with FileLock(path).hold(waits=lambda: (said.append("waits"), going.set())):
            said.append("held")

    going, waiter = threading.Event(), threading.Thread(target=wait)
    with FileLock(path).hold():
        with pytest.raises(Busy, match="not now"), FileLock(path).hold(remove=True, waits=give_up):
            said.append("never")
        assert FileLock(path).held()
        waiter.start()
        assert going.wait(60)
        assert said == ["waits"]
    waiter.join(60)
    assert said == ["waits", "held"]
    with FileLock(path).hold(remove=True, waits=give_up):
        said.append("free")
    assert said[-1] == "free" and not path.exists()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds vm-prod until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "locks")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


def test_the_refusal_says_who_since_when_doing_what(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    locks = Locks(tmp_path / "locks")
    with pytest.raises(Busy) as refused, locks.hold("vm-dev2", "vm-prod", doing="reset"):
        pass
    assert "prod is held by" in refused.value.message
    assert f"pid {other.pid} of " in refused.value.message
    assert "since 20" in refused.value.message
    assert "cycle --from build-prod" in refused.value.message
    assert f"kill {other.pid}" in refused.value.remedy
    assert locks.holder("vm-dev2") is None, "all of them or none"
    holder = locks.holder("vm-prod")
    assert holder
    assert holder.pid == other.pid
    assert [held.lock for held in locks.held()] == ["vm-prod"]
    assert not locks.mine("vm-prod")


def test_a_killed_holder_blocks_nobody(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    locks = Locks(tmp_path / "locks")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "locks/vm-prod.lock").read_text(), "its note is still there"
    assert locks.holder("vm-prod") is None
    with locks.hold("vm-prod", doing="reset"):
        assert locks.mine("vm-prod")
    assert locks.holder("vm-prod") is None


def test_reentrant_in_one_operation_also_from_its_threads(tmp_path: Path) -> None:
    locks = Locks(tmp_path / "locks")
    taken = []
    with locks.hold("vm-prod", doing="cycle"):

        def again() -> None:
            with locks.hold("vm-prod", "vm-dev2", doing="reset"):
                taken.append(True)

        thread = threading.Thread(target=copy_context().run, args=(again,))
        thread.start()
        thread.join()
        holder = locks.holder("vm-prod")
        assert taken
        assert holder
        assert holder.doing == "cycle", "the first one's purpose stays"
        with pytest.raises(Busy), Locks(tmp_path / "locks").hold("vm-prod", doing="reset"):
            pass
    assert locks.holder("vm-prod") is None


def test_another_operation_of_this_process_is_refused(tmp_path: Path) -> None:
    """Through the same object, as another process is."""
    locks = Locks(tmp_path / "locks")
    refusals: list[Busy] = []

    def other() -> None:
        assert not locks.mine("vm-prod")
        with pytest.raises(Busy) as refused, locks.hold("vm-dev2", "vm-prod", doing="reset"):
            pass
        refusals.append(refused.value)

    with locks.hold("vm-prod", doing="cycle"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert locks.mine("vm-prod")
    (refusal,) = refusals
    assert f"prod is held by pid {os.getpid()} of " in refusal.message
    assert refusal.message.endswith("doing: cycle")
    assert refusal.remedy == "wait until that ends and try again", "nobody is told to kill himself"
    assert locks.held() == (), "all of them or none"


def test_children_inherit_no_lock(tmp_path: Path) -> None:
    locks = Locks(tmp_path / "locks")
    with locks.hold("vm-prod", doing="reset"):
        child = subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False, bufsize=0
        )
    try:
        assert child.stdin and child.stdout
        child.stdin.write(b"there\n")  # an answer: no library is being opened and closed any more
        assert child.stdout.readline() == b"there\n"
        with Locks(tmp_path / "locks").hold("vm-prod", doing="next"):
            pass
        fds = [str(fd.readlink()) for fd in Path(f"/proc/{child.pid}/fd").iterdir()]
        assert not any(str(tmp_path) in fd for fd in fds)
    finally:
        child.kill()
        child.communicate()


def test_a_lock_removed_with_its_farm_is_no_lock(tmp_path: Path) -> None:
    first, second = Locks(tmp_path / "locks"), Locks(tmp_path / "locks")
    with first.hold("vm-prod", doing="destroy"):
        first.remove_all()
        assert not (tmp_path / "locks").exists()
        with second.hold("vm-prod", doing="clone-farm"):
            assert second.mine("vm-prod")
            third = Locks(tmp_path / "locks")
            with pytest.raises(Busy), third.hold("vm-prod", doing="reset"):
                pass


def test_a_note_cut_off_by_a_full_disk_takes_nothing_from_the_lock(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    (tmp_path / "locks/vm-prod.lock").write_text('{"pid": 1')
    with (
        pytest.raises(Busy, match="prod is held by"),
        Locks(tmp_path / "locks").hold("vm-prod", doing="x"),
    ):
        pass


def test_the_locks_of_a_large_farm_are_more_files_than_is_usual(tmp_path: Path) -> None:
    """Each is an open file, and 1024 are what a shell gives its programs."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        locks = Locks(tmp_path)
        with locks.hold(*(f"vm-{n}" for n in range(400)), doing="all"):
            assert len(locks.held()) == 400
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert (soft, hard) == (1024 + 6 * 400, before[1]), "and no more than is needed"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
