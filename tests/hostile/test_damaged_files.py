"""Every file of ours that is read, damaged in every way, under the real commands: no traceback, no hang,
one line that names the file where anything is lost or refused, and the rest of the farm as it was.

``FILES`` is the list of what is read. A file that a farm has and that isn't in it fails a test here."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest
from forked import Forked

import cli.composition  # noqa: F401 - what there is
from builds.record import BuildRecord, FileRecord, StepRecord, VmRecord, now
from host.paths import FarmPaths
from hypervisors.api import Template
from inventory.loader import load
from provision.engine.report import QuietReporter
from tests.faults.still import StillSite
from tests.unit.cli_farm import Done

FARM = """\
farm: try
hosts: {{here: {{{driver}}}}}
templates: {{base: {{build: debian-12, size: 1M}}}}
network: {{mode: bridge, bridge: br0, subnet: 10.9.9.0/24, gateway: 10.9.9.1, addressing: static}}
vms:
  dev2: {{memory: 64M}}
  prod: {{memory: 64M}}
services: {{hosts: {{config: {hosts}}}}}
events: {{us: {{webhook: "http://127.0.0.1:9/", secret_variable: SECRET}}}}
"""
DRIVERS = {"fake": "driver: fake", "qcow2": "driver: kvm, uri: 'qemu:///system'"}
BUILD = "20260101T000000Z-abc1234"
STATE = "state/farms/try"
CLONE = ("clone-farm", "--no-start")
RESET = ("reset", "--vm", "prod", "--no-start")


@dataclass(frozen=True)
class Kept:
    """A file that is read. ``told``: the commands that say so where it is damaged; where there is none,
    it is made again, or nothing is lost. ``fine``: commands that go on all the same."""

    path: str
    told: tuple[tuple[str, ...], ...] = ()
    fine: tuple[tuple[str, ...], ...] = ()
    store: str = "fake"


FILES = (
    Kept("try.yaml", (("status",), ("doctor",))),
    Kept("try.yaml.lock", (("status",), CLONE)),
    Kept("cache/farms-*/*", fine=(("status",),)),
    Kept("state/claims.db", (CLONE,), (("status",),)),
    Kept("state/.claims.lock", fine=(("status",), CLONE)),
    Kept(f"{STATE}/identity.json", (("status",), CLONE)),
    Kept(f"{STATE}/journal.db", (("status",), ("history",), ("recover",))),
    Kept(f"{STATE}/network.db", (("network-apply", "--no-verify"),), (("status",),)),
    Kept(f"{STATE}/fake-here.state", (("status",), CLONE)),
    Kept(f"{STATE}/fake-here.state.lock", fine=(("status",), CLONE)),
    Kept(f"{STATE}/generations.json", (("template-build",),), (("status",),)),
    Kept(f"{STATE}/locks/vm-prod.lock", fine=(("status",), CLONE)),
    Kept(f"{STATE}/keys/id_ed25519.pub", fine=(CLONE,)),
    Kept(f"{STATE}/keys/hostkeys/prod", (("start", "--vm", "prod"),), (("status",),)),
    Kept(f"{STATE}/keys/hostkeys/prod.pub", fine=(("status",), ("start", "--vm", "prod"))),
    Kept(f"{STATE}/keys/hostkeys/prod.known", fine=(("status",), ("start", "--vm", "prod"))),
    Kept(f"{STATE}/seeds/try-prod.sum", fine=(("start", "--vm", "prod"),)),
    Kept(f"{STATE}/builds/{BUILD}/record.json", (("history",), ("log",)), (("status",),)),
    Kept(f"{STATE}/disks/templates/base@1.json", (("template-list",),), (("status",),), store="qcow2"),
    Kept(f"{STATE}/disks/templates/base@1.qcow2", fine=(("status",), CLONE), store="qcow2"),
    Kept(f"{STATE}/disks/vms/try-prod/owner.json", (("status",), RESET), store="qcow2"),
    Kept(f"{STATE}/disks/vms/try-prod/disk.qcow2", fine=(("status",), RESET), store="qcow2"),
    Kept(f"{STATE}/disks/vms/try-prod/checkpoint-x.qcow2", fine=(("status",), RESET), store="qcow2"),
    Kept(f"{STATE}/disks/.lock", fine=(("status",), RESET), store="qcow2"),
)
UNREAD = ("hosts", "*.iso", "*.log", "*-wal", "*-shm", "*/keys/id_ed25519", "*.lock")
"""Of a farm: the admin's own, what others read, what was just seen, and other locks than those above."""


def _bytes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Any file, damaged: what each is called, and what is in it."""
    yield "empty", b""
    yield "cut off", data[: len(data) // 2]
    yield "random", random.Random(1).randbytes(512)
    yield "UTF-16", data.decode("latin-1").encode("utf-16")
    if not data.startswith(b"{"):
        return
    yield "null", b"null"
    yield "a list", b"[1]"
    yield "a huge number", b"9" * 5000
    yield "deep lists", b"[" * 100_000
    yield "deep objects", b'{"a":' * 100_000
    yield "twice the same key", data.replace(b"{", b'{"format": 1, "format": 2,', 1)
    found = json.loads(data)
    for key in {"format", "farmhand"} & found.keys():
        yield "a newer format", json.dumps({**found, key: found[key] + 1}).encode()


def _things(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What else may have its name."""
    yield "a directory", path.mkdir
    yield "a FIFO", lambda: os.mkfifo(path)
    yield "a link to itself", lambda: path.symlink_to(path.name)


class Damage:
    """A farm that was made once, and a copy of it to damage. ``stack``: of what runs its commands."""

    def __init__(self, top: Path, store: str, stack: contextlib.ExitStack) -> None:
        self.live, self.good = top / "live", top / "good"
        self.live.mkdir()
        farm = self.live / "try.yaml"
        farm.write_text(FARM.format(driver=DRIVERS[store], hosts=self.live / "hosts"))
        (self.live / "hosts").write_text("127.0.0.1 localhost\n")
        places = {
            f"FARMHAND_{of}_DIR": str(self.live / of.lower()) for of in ("STATE", "CACHE", "RUNTIME")
        }
        self.environment = {**places, "FARMHAND_FARM": str(farm), "SECRET": "x" * 32}
        self.run = run = stack.enter_context(Forked(top, self.environment, still=store != "fake"))
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            if store == "qcow2":
                self._seal(top, farm)
            for words in (
                CLONE,
                ("network-apply", "--no-verify"),
                ("checkpoint", "--all", "--name", "x"),
            ):
                done = run(*words)
                assert done.status == 0, done
            self._build()
            assert (
                run("start", "--all", "--no-wait").status == run("stop", "--all", "--force").status == 0
            )
        shutil.copytree(self.live, self.good, symlinks=True)

    def _seal(self, top: Path, farm: Path) -> None:
        image = top / "base.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
        template = Template(
            name="base", generation=1, ref="", size=2**20, sha256="", created=datetime.now(UTC),
            origin="nothing", firstboot="farmhand",
        )  # fmt: skip
        with StillSite(load(farm), reporter=QuietReporter()) as site:
            site.prepare()
            site.disks("here").seal(image, template)

    def _build(self) -> None:
        directory = FarmPaths("try").builds / BUILD
        directory.mkdir(parents=True)
        (directory / "01-make.log").write_text("made\n")
        files = (FileRecord(name="a.deb", size=1, sha256="0" * 64),)
        step = StepRecord(
            name="make", kind="run", vm="dev2", status="passed", log="01-make.log", files=files,
            details={"a": "b"}, exit=0,
        )  # fmt: skip
        BuildRecord(
            id=BUILD, farm="try", result="passed", started=now(), ended=now(), directory=directory,
            vms=(VmRecord(vm="dev2", pristine=True),), steps=(step,), outputs=files, notes=("a note",),
        ).save()  # fmt: skip

    def find(self, kept: Kept) -> Path:
        """Where it is to be damaged."""
        (found,) = self.good.glob(kept.path)
        return self.live / found.relative_to(self.good)

    def heal(self) -> None:
        shutil.rmtree(self.live)
        shutil.copytree(self.good, self.live, symlinks=True)


@pytest.fixture(scope="module")
def farms() -> Iterator[dict[str, Damage]]:
    """By their stores. In memory: nobody waits for a disk."""
    import tempfile

    with (
        tempfile.TemporaryDirectory(prefix="fh", dir="/dev/shm") as top,
        contextlib.ExitStack() as stack,
    ):
        made = {}
        for store in DRIVERS:
            (Path(top) / store).mkdir()
            made[store] = Damage(Path(top) / store, store, stack)
        yield made


def fit(done: Done, what: str) -> None:
    """Whatever is damaged, a command ends so."""
    said = f"{what}: {done}"
    assert done.status in (0, 1, 2, 69), said
    assert "Traceback" not in done.err + done.out, said
    assert "defect" not in done.err + done.out, said
    if done.status and "everything" not in done.out and "ok    " not in done.out:  # but for a table
        assert len([line for line in done.err.splitlines() if line.startswith("farmhand: ")]) == 1, said


NEVER_WERE = ("empty",)
"""Nobody can tell such a file from one that isn't written yet."""


@pytest.mark.parametrize("kept", FILES, ids=lambda kept: kept.path)
def test_a_damaged_file_is_told_in_a_line_and_hurts_nothing_else(
    farms: dict[str, Damage], kept: Kept
) -> None:
    farm = farms[kept.store]
    farm.heal()
    path = farm.find(kept)
    data = path.read_bytes()

    def damages() -> Iterator[str]:
        for name, bad in _bytes(data):
            farm.heal()
            path.write_bytes(bad)
            yield name
        for name, put in _things(path):
            farm.heal()
            path.unlink()
            put()
            yield name

    for damage in damages():
        before = path.read_bytes() if path.is_file() else b""
        for words in (*kept.told, *kept.fine):
            done, what = farm.run(*words), f"{kept.path} is {damage}, {' '.join(words)}"
            fit(done, what)
            if words in kept.told and damage not in NEVER_WERE:
                assert path.name in done.out + done.err, f"{what}: {done}"
                if path.is_file() and words != ("template-build",):
                    assert path.read_bytes() == before, f"{what}: it was changed"
            if words in kept.fine and path.is_file():
                assert done.status == 0, f"{what}: {done}"


@pytest.mark.parametrize("store", DRIVERS)
def test_all_that_is_read_is_listed(farms: dict[str, Damage], store: str) -> None:
    good = farms[store].good
    listed = {path for kept in FILES for path in good.glob(kept.path.replace("prod", "*"))}
    others = {
        path
        for path in good.rglob("*")
        if path.is_file() and not path.is_symlink() and path not in listed
    }
    assert not {path for path in others if not any(path.match(known) for known in UNREAD)}


@pytest.mark.parametrize("name", ["journal", "claims", "network"])
def test_a_newer_format_is_told_and_left(farms: dict[str, Damage], name: str) -> None:
    farm = farms["fake"]
    kept = next(kept for kept in FILES if kept.path.endswith(f"{name}.db"))
    farm.heal()
    with contextlib.closing(sqlite3.connect(farm.live / kept.path)) as db:
        db.execute("PRAGMA user_version = 99")
    done = farm.run(*kept.told[-1])
    fit(done, name)
    assert done.status == 1
    assert f"{name}.db is in format 99" in done.err


@pytest.mark.parametrize("name", ["journal", "claims", "network"])
def test_rows_of_other_types_are_a_damaged_file_too(farms: dict[str, Damage], name: str) -> None:
    """Each column of each table, with what SQLite lets into it."""
    farm = farms["fake"]
    kept = next(kept for kept in FILES if kept.path.endswith(f"{name}.db"))
    path = farm.good / kept.path
    with contextlib.closing(sqlite3.connect(path)) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        columns = [(t, c[1]) for t in tables for c in db.execute(f"PRAGMA table_info({t})")]
    for table, column in columns:
        for bad in (b"\xff\xfe", '[[["\\u0000"]]]'):
            farm.heal()
            with contextlib.closing(sqlite3.connect(farm.live / kept.path)) as db:
                with contextlib.suppress(sqlite3.Error):  # keys, and columns that are no such thing
                    db.execute(f"UPDATE {table} SET {column} = ?", (bad,))
                db.commit()
            words = kept.told[-1]
            fit(farm.run(*words), f"{table}.{column} = {bad!r}, {' '.join(words)}")
