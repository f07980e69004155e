"""What other users of the machine, and unexpected names, can do to our locks and records."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from neighbour import NEEDS_ROOT, UID, locked_by_stranger, opened_by_stranger, square

from host.file_lock import FileLock, directory_lock
from inventory.errors import Busy, WrongState
from provision.claims import Claims
from provision.engine import database
from provision.engine import journal as journal_module
from provision.engine.facts import NoFacts
from provision.engine.journal import Journal
from provision.engine.locks import Locks
from provision.power import START

__all__ = ["square"]


def _link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _dangling(path: Path, victim: Path) -> None:
    path.symlink_to(victim.with_name("nothing"))


def _fifo(path: Path, _victim: Path) -> None:
    os.mkfifo(path)


def _directory(path: Path, _victim: Path) -> None:
    path.mkdir()


def _socket(path: Path, _victim: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


ODD = pytest.mark.parametrize(
    ("plant", "kind"),
    [
        (_link, "a symbolic link"),
        (_dangling, "a symbolic link"),
        (lambda path, victim: path.hardlink_to(victim), "another name"),
        (_fifo, "a FIFO"),
        (_directory, "a directory"),
        (_socket, "a socket"),
    ],
    ids=["link", "dangling", "hard-link", "fifo", "directory", "socket"],
)


@ODD
def test_an_unexpected_thing_by_a_lock_s_name_is_refused_in_one_line(
    square: Path, plant: Callable[[Path, Path], None], kind: str
) -> None:
    victim, path = square / "victim", square / "locks" / "vm-prod.lock"
    victim.write_text("precious")
    path.parent.mkdir(mode=0o700)
    plant(path, victim)
    for lock in (
        Locks(path.parent).hold("vm-prod", doing="reset"),
        FileLock(path).hold(),
    ):
        with pytest.raises(WrongState) as refused, lock:
            pass
        assert f"{path} " in refused.value.message and kind in refused.value.message
        assert "move it away" in refused.value.remedy
        assert "\n" not in refused.value.message
    assert Locks(path.parent).held() == ()
    assert victim.read_text() == "precious"
    assert not victim.with_name("nothing").exists()


@pytest.mark.parametrize("plant", [_dangling, _fifo, _link], ids=["dangling", "fifo", "file"])
def test_an_unexpected_thing_in_the_place_of_the_locks(
    square: Path, plant: Callable[[Path, Path], None]
) -> None:
    (square / "victim").write_text("precious")
    plant(square / "locks", square / "victim")
    with (
        pytest.raises(WrongState, match=f"{square}/locks "),
        Locks(square / "locks").hold("vm-prod", doing="reset"),
    ):
        pass


def test_a_refused_lock_keeps_its_holder_s_note(square: Path) -> None:
    """Nothing is emptied before the lock is held."""
    path = square / "locks" / "vm-prod.lock"
    with Locks(path.parent).hold("vm-prod", doing="cycle"):
        note = path.read_text()
        with pytest.raises(Busy, match="cycle"), Locks(path.parent).hold("vm-prod", doing="reset"):
            pass
        assert path.read_text() == note != ""


@NEEDS_ROOT
def test_nobody_else_can_open_what_a_lock_can_be_taken_on(square: Path) -> None:
    """Also where an earlier umask, or a restored copy, left them open to all."""
    root = square / "farm"
    root.mkdir(mode=0o711)
    (root / "locks").mkdir(mode=0o755)
    lax = [root / name for name in ("journal.db", "claims.db", "locks/vm-prod.lock", "locks/gc.lock")]
    for path in lax:
        path.touch()
        path.chmod(0o666)
    assert opened_by_stranger(lax)
    journal = Journal(root / "journal.db")
    with (
        Locks(root / "locks").hold("vm-prod", doing="reset"),
        FileLock(root / "locks" / "gc.lock").hold(),
        journal.begin(START, ["prod"], NoFacts()),
        Claims(root / "claims.db").writing() as claims,
    ):
        claims.give({"kata/prod": {"02:00:00:00:00:01"}})
        there = [path for path in root.rglob("*") if path.is_file()]
        assert {path.name for path in there} >= {"journal.db-wal", "journal.db-shm", "claims.db"}
        assert opened_by_stranger(there) == []
    journal.close()


@NEEDS_ROOT
def test_a_lock_of_somebody_else_is_no_lock(square: Path) -> None:
    path = square / "locks" / "vm-prod.lock"
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    os.chown(path, UID, UID)
    with (
        pytest.raises(WrongState, match="belongs to"),
        Locks(path.parent).hold("vm-prod", doing="reset"),
    ):
        pass
    os.chown(path.parent, UID, UID)
    with (
        pytest.raises(WrongState, match=r"locks belongs to"),
        Locks(path.parent).hold("vm-prod", doing="reset"),
    ):
        pass


HOLDS = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


def _write_claims(place: Path) -> None:
    with Claims(place / "claims.db").writing() as claims:
        claims.give({"kata/prod": {"02:00:00:00:00:01"}})


def _write_journal(place: Path) -> None:
    journal = Journal(place / "journal.db")
    try:
        with journal.begin(START, ["prod"], NoFacts()):
            pass
    finally:
        journal.close()


@pytest.mark.parametrize(
    ("write", "name"), [(_write_claims, "claims.db"), (_write_journal, "journal.db")]
)
def test_a_record_that_is_busy_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], name: str
) -> None:
    for module in (database, journal_module):
        monkeypatch.setattr(module, "PATIENCE", 0.1)
    write(tmp_path)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / name)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        with pytest.raises(Busy, match=rf"{name} stays locked by pid {holder.pid} of .*python") as busy:
            write(tmp_path)
        assert f"kill {holder.pid}" in busy.value.remedy
        assert "damaged" not in busy.value.message + str(busy.value.remedy)
    finally:
        holder.communicate()
    write(tmp_path)


@NEEDS_ROOT
def test_what_sqlite_left_open_to_all_is_closed(square: Path) -> None:
    """A killed command leaves its files; locks of a journal are on the -shm file."""
    journal = Journal(square / "journal.db")
    with journal.begin(START, ["prod"], NoFacts()):
        beside = [square / f"journal.db{end}" for end in ("-wal", "-shm")]
        for path in beside:
            path.chmod(0o666)
        again = Journal(square / "journal.db")
        with again.begin(START, ["dev"], NoFacts()):
            assert opened_by_stranger(beside) == []
        again.close()
    journal.close()


@NEEDS_ROOT
def test_a_directory_of_the_admin_s_is_locked_by_those_alone_who_may_write_there(square: Path) -> None:
    place = square / "farms"
    place.mkdir()
    place.chmod(0o755)
    with locked_by_stranger(place):
        with directory_lock(place, patience=300):
            pass  # it is none of us
        place.chmod(0o777)
        with pytest.raises(Busy, match="stays locked by pid"), directory_lock(place, patience=0.1):
            pass
        os.chown(place, 0, UID)
        place.chmod(0o775)
        with pytest.raises(Busy, match="stays locked by pid"), directory_lock(place, patience=0.1):
            pass
    with directory_lock(place, patience=0.1):
        pass
