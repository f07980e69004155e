"""The journal: durable, shared, honest when it can't write."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from contextvars import copy_context
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from host.processes import Process
from inventory.errors import (
    FarmhandError,
    Interrupted,
    LeaseLost,
    NoSpace,
    Several,
    UsageError,
    WrongState,
)
from provision.engine.facts import NoFacts, from_json, to_json
from provision.engine.journal import Entry, Journal, current_entry, current_step
from provision.operations.clone import CLONE, CloneFacts
from provision.operations.reset import RESET, Proof, ResetFacts
from provision.power import START

ROOT = Path(__file__).parents[2]
MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def begin(journal: Journal, *vms: str) -> AbstractContextManager[Entry[NoFacts]]:
    return journal.begin(START, vms, NoFacts())


def test_an_operation_its_steps_and_its_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    begun = ResetFacts(was_on=("prod",), to={"prod": "clean"})
    with journal.begin(RESET, ["prod"], begun) as entry:
        current_step("swap the disk")
        entry.note(replace(entry.facts, proofs={"prod": Proof("clean", True)}, asked=MOMENT))
        assert journal.history()[0].ended is None
        assert journal.unfinished() == (), "its process lives"
    assert current_entry() is None
    current_step("outside: nothing is written")
    (record,) = journal.history()
    assert (record.verb, record.vm, record.outcome) == ("reset", "prod", "done")
    kept = RESET.facts_of(record)
    assert kept == replace(begun, proofs={"prod": Proof("clean", True)}, asked=MOMENT)
    assert [text for _, text in record.steps] == ["swap the disk"]
    assert record.ended
    assert record.as_dict()["outcome"] == "done"


def test_a_failed_operation_is_settled_an_interrupted_one_is_not(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(WrongState), begin(journal, "a"):
        raise WrongState("no")
    assert journal.unfinished() == ()
    with pytest.raises(KeyboardInterrupt), begin(journal, "b"):
        raise KeyboardInterrupt
    with pytest.raises(Interrupted), begin(journal, "c"):
        journal.interrupted.set()
        current_step("never done")
    journal.interrupted.clear()
    left = journal.unfinished()
    assert [record.vm for record in left] == ["b", "c"]
    assert left[1].steps == ()
    with journal.resume(left[0], NoFacts()):
        current_step("undo")
    journal.settle(left[0].id, "recovered", "undone")
    assert [record.vm for record in journal.unfinished()] == ["c"]
    found = journal.find(left[0].id)
    assert found
    assert found.outcome == "recovered"
    assert [text for _, text in found.steps] == ["undo"]


def test_one_that_nobody_foresaw_is_left_for_recovery(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(OSError, match="Input"), begin(journal, "a"):
        raise OSError(5, "Input/output error")
    assert [record.outcome for record in journal.unfinished()] == ["failed"]


def test_what_could_not_be_written_is_not_known(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    with pytest.raises(FarmhandError), begin(journal, "a") as entry:
        known = entry.facts
        with pytest.MonkeyPatch.context() as patch, pytest.raises(FarmhandError):
            patch.setattr(journal, "write", _full)
            entry.note(NoFacts())
        assert entry.facts is known
        _full()


def _full(*_: object) -> None:
    raise NoSpace("the journal's file system is full")


def test_one_that_lost_its_lease_is_left_for_recovery(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    lost = LeaseLost("kata-a is held by another")
    for error in (lost, Several({"a": WrongState("no"), "b": lost})):
        with pytest.raises(type(error)), begin(journal, "a"):
            raise error
    with pytest.raises(Several), begin(journal, "a"):
        raise Several({"a": WrongState("no"), "b": WrongState("no")})
    assert len(journal.unfinished()) == 2


def test_a_killed_process_leaves_its_step(tmp_path: Path) -> None:
    code = """
import os, pathlib, signal, sys
from provision.engine.facts import NoFacts
from provision.engine.journal import Journal, current_step
from provision.power import START
with Journal(pathlib.Path(sys.argv[1])).begin(START, ["dev2"], NoFacts()):
    current_step("make the disk")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "journal.db"
    child = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert child.returncode == -signal.SIGKILL
    (record,) = Journal(path).unfinished()
    assert (record.verb, record.vm) == ("start", "dev2")
    assert [text for _, text in record.steps] == ["make the disk"]
    assert (record.outcome, record.state) == ("", "interrupted")
    assert replace(record, process=Process.this()).state == "running"
    reader = Journal(path, writable=False)
    assert reader.unfinished() == (record,)
    with pytest.raises(UsageError), begin(reader):
        pass


def _work(path: Path, number: int) -> None:
    journal = Journal(path)
    for turn in range(10):
        with begin(journal, f"vm{number}"):
            current_step(f"turn {turn}")
            current_step("done")
    journal.close()


def test_processes_at_once_from_the_very_first_write(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.db"
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_work, args=(path, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    records = Journal(path).history(1000)
    assert len(records) == 40
    assert all(record.outcome == "done" and len(record.steps) == 2 for record in records)


def test_threads_each_write_to_their_own_operation(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")

    def work(vm: str) -> None:
        with begin(journal, vm):
            for n in range(20):
                current_step(f"{vm} {n}")

    threads = [threading.Thread(target=copy_context().run, args=(work, f"vm{n}")) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for record in journal.history():
        assert [text for _, text in record.steps] == [f"{record.vm} {n}" for n in range(20)]


def test_reading_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    reader = Journal(path, writable=False)
    assert reader.history() == ()
    writer = Journal(path)
    with begin(writer, "prod"):
        pass
    assert len(reader.history()) == 1, "while it is being written"
    writer.close()
    reader.close()
    before = sorted(tmp_path.iterdir())
    again = Journal(path, writable=False)
    assert len(again.history()) == 1
    again.close()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", [b"not a database at all" * 50, None], ids=["garbage", "holes"])
def test_a_damaged_journal_says_what_to_do(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "journal.db"
    if content is None:
        journal = Journal(path)
        for _ in range(50):
            with journal.begin(CLONE, ["prod"], CloneFacts("x" * 500, again=False)):
                pass
        journal.close()
        content = bytearray(path.read_bytes())  # type: ignore[assignment]
        content[4096:] = b"\xff" * (len(content) - 4096)  # type: ignore[index, arg-type]
    path.write_bytes(content)
    with pytest.raises(WrongState, match="damaged") as damaged:
        Journal(path).history()
    assert "history is lost, VMs are not" in damaged.value.remedy
    with pytest.raises(FarmhandError), begin(Journal(path)):
        pass


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file system of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    return place


FULL = """
import pathlib, sys
from inventory.errors import NoSpace
from provision.engine.facts import NoFacts
from provision.engine.journal import Journal, current_step
from provision.power import START
place = pathlib.Path(sys.argv[1])
journal = Journal(place / "journal.db")
changed = 0
try:
    with journal.begin(START, ["prod"], NoFacts()):
        while True:
            current_step("x" * 4000)
            changed += 1
            if changed == 3:
                (place / "filler").write_bytes(b"x" * 100)
                with (place / "filler").open("ab", buffering=0) as filler:
                    try:
                        while filler.write(b"x" * 4096): pass
                    except OSError:
                        pass
            if changed > 10000:
                sys.exit("never full")
except NoSpace as error:
    print(error.message, "|", error.remedy)
"""


def test_a_full_disk_stops_the_change_with_a_clear_error(small: Path) -> None:
    """In a mount namespace of its own, on a real full tmpfs."""
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-eu", "-c",
         'mount -t tmpfs -o size=256k none "$1"; "$2" -c "$3" "$1"', "sh",
         str(small), sys.executable, FULL],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cannot write the journal" in done.stdout
    assert "make room" in done.stdout


READ_ONLY = """
import pathlib, sys
from inventory.errors import WrongState
from provision.engine.facts import NoFacts
from provision.engine.journal import Journal
from provision.power import START
journal = Journal(pathlib.Path(sys.argv[1]) / "journal.db")
try:
    with journal.begin(START, ["prod"], NoFacts()):
        sys.exit("wrote")
except WrongState as error:
    print(error.message, "|", error.remedy)
reader = Journal(pathlib.Path(sys.argv[1]) / "journal.db", writable=False)
print(len(reader.history()))
"""


def test_a_read_only_place_says_so(small: Path) -> None:
    journal = Journal(small / "journal.db")
    with begin(journal, "prod"):
        pass
    journal.close()
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-eu", "-c",
         'mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; "$2" -c "$3" "$1"', "sh",
         str(small), sys.executable, READ_ONLY],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cannot write the journal" in done.stdout
    assert "permissions" in done.stdout
    assert done.stdout.splitlines()[-1] == "1"


def test_a_lost_journal_loses_history_only(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(path)
    with begin(journal, "prod"):
        pass
    journal.close()
    for file in tmp_path.iterdir():
        file.unlink()
    again = Journal(path)
    with contextlib.closing(again), begin(again, "prod"):
        current_step("x")
    assert len(Journal(path).history()) == 1


def test_a_pid_given_to_another_process_is_not_the_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    with begin(journal, "prod") as entry:
        journal.write("UPDATE operations SET pid_start = '1' WHERE id = ?", (entry.id,))
        (record,) = journal.unfinished()
        assert record.process.pid == os.getpid()


def test_history_of_a_vm_has_what_was_done_to_several(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.db")
    for vms in (["dev2", "prod"], ["dev2"], []):
        with begin(journal, *vms):
            pass
    assert [record.vms for record in journal.history(vm="prod")] == [("dev2", "prod")]
    assert [record.vm for record in journal.history(vm="dev2")] == ["dev2", ""]


@pytest.mark.parametrize("version", [0, 1, 99])
@pytest.mark.parametrize("writable", [True, False], ids=["to write", "to read"])
def test_another_format_is_refused_in_words(tmp_path: Path, version: int, writable: bool) -> None:
    """Older or newer than ours, or no journal at all: it is not read, and not written to."""
    path = tmp_path / "journal.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(f"CREATE TABLE operations (id, vm); PRAGMA user_version = {version};")
    before = path.read_bytes()
    with pytest.raises(WrongState, match=f"is in format {version}, and this farmhand") as refused:
        Journal(path, writable=writable).unfinished()
    assert "use the farmhand that wrote it, or move it aside" in refused.value.remedy
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"again": None}, "no 'again'"),
        ({"more": 1}, "an unknown 'more'"),
        ({"again": "yes"}, "again: Input should be a valid boolean"),
    ],
)
def test_facts_that_are_not_ours_are_refused_in_words(change: dict[str, object], words: str) -> None:
    found = json.loads(to_json(CloneFacts("base@1", again=False))) | change
    found = {key: value for key, value in found.items() if value is not None}
    with pytest.raises(WrongState, match="the journal's entry 7 is not in this farmhand's format") as no:
        from_json(CloneFacts, found, "the journal's entry 7")
    assert words in no.value.message
    assert no.value.remedy
