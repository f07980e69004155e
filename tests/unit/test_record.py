"""Records on disk, their page's numbers, failure classes, a build's machines in memory."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from builds import page
from builds.classify import classify
from builds.log_text import log_lines
from builds.machines import Machines
from builds.meter import Meter
from builds.record import (
    BuildRecord,
    FileRecord,
    SourceRecord,
    StepRecord,
    VmRecord,
    all_records,
    find_record,
    load_records,
    new_directory,
    now,
    point_last,
    prune,
)
from builds.source import mask, name_of
from builds.step_run import StepLog
from cli.words import Words
from host.paths import FarmPaths
from hypervisors.fake.driver import FakeHypervisor
from inventory.errors import DriverFailed, NotFound, WrongState
from inventory.loader import load
from inventory.values import is_directory
from provision.engine.report import QuietReporter
from provision.engine.requester import Requester
from provision.member import Member
from provision.site import Site
from tests import farm


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FarmPaths:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FARMHAND_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FARMHAND_RUNTIME_DIR", str(tmp_path / "run"))
    return FarmPaths("kata")


def make(paths: FarmPaths, result: str = "passed", *, started: str = "") -> BuildRecord:
    commit = "a" * 40
    files = (FileRecord(name="x.rpm", size=3, sha256="ab", path="artifacts/x.rpm"),)
    last = "running" if result == "running" else "passed"
    directory = new_directory(paths, commit)
    record = BuildRecord(
        id=directory.name, farm="kata", result=result, started=started or now(), directory=directory,
        source=SourceRecord(repository="/kata", asked="HEAD", commit=commit, subject="One"),
        vms=(VmRecord(vm="dev2", pristine=True, clock_skew=0.1),),
        steps=(
            StepRecord(name="build", kind="run", vm="dev2", status="passed", started=now(),
                       log="01-build.log", files=files),
            StepRecord(name="more", kind="run", vm="dev2", status=last),
        ),
        notes=("a note",),
        requester=Requester(user="root", uid=0, login="juha", tty="pts/3"),
    )  # fmt: skip
    record.save()
    return record


def test_written_and_read_back_the_same(paths):
    record = make(paths)
    assert load_records(paths) == (record,)
    data = json.loads(record.path.read_text())
    assert data["format"] == 2
    assert "directory" not in data
    assert record.as_dict()["page"] == str(record.directory / "index.html")
    json.dumps(Words().data(record.as_dict()))
    assert [p.name for p in record.directory.iterdir()] == ["record.json"]


def test_what_a_newer_version_added_is_passed_by_and_rubbish_too(paths):
    record = make(paths)
    data = json.loads(record.path.read_text())
    record.path.write_text(json.dumps({**data, "novelty": 1}))
    (paths.builds / "empty").mkdir()
    (paths.builds / "broken").mkdir()
    (paths.builds / "broken" / "record.json").write_text("{")
    assert load_records(paths) == (record,)


@pytest.mark.parametrize("format", [1, 3, None], ids=["older", "newer", "none"])
def test_a_record_in_another_format_is_refused_in_words(paths, format):
    ours, other = make(paths), make(paths)
    data = {**json.loads(other.path.read_text()), "format": format}
    other.path.write_text(json.dumps(data))
    assert load_records(paths) == (ours,)
    assert find_record(paths) == ours
    assert list(all_records(paths)[1]) == [other.id]
    with pytest.raises(WrongState, match="this farmhand reads and writes format 2") as refused:
        find_record(paths, other.id)
    assert str(other.path) in refused.value.message
    assert str(other.directory / "index.html") in refused.value.remedy


def test_ids_never_collide_and_last_points_to_the_newest(paths):
    records = [make(paths) for _ in range(3)]
    assert len({record.id for record in records}) == 3
    for record in records:
        point_last(paths, record.id)
    assert (paths.builds / "last").resolve() == records[-1].directory
    assert [r.id for r in load_records(paths)] == [r.id for r in reversed(records)]


def test_finding(paths):
    with pytest.raises(NotFound, match="no build record"):
        find_record(paths)
    one = make(paths, started="2026-01-01T00:00:00+00:00")
    two = make(paths, started="2026-01-02T00:00:00+00:00")
    assert find_record(paths) == find_record(paths, "last") == two
    assert find_record(paths, one.id) == one
    with pytest.raises(NotFound, match="several builds '2'"):
        find_record(paths, "2")
    with pytest.raises(NotFound, match="no build 'nonesuch'") as caught:
        find_record(paths, "nonesuch")
    assert two.id in caught.value.remedy


def test_running_without_a_living_cycle_was_interrupted(paths):
    make(paths, "running")
    (record,) = load_records(paths)
    assert record.result == "interrupted"
    assert [step.status for step in record.steps] == ["passed", "interrupted"]


def test_pruning_keeps_failed_ones_longest(paths):
    results = ["failed", "passed", "interrupted", "passed", "passed"]
    made = [
        make(paths, result, started=f"2026-01-0{n}T00:00:00+00:00")
        for n, result in enumerate(results, 1)
    ]
    current = make(paths)
    assert prune(paths, 6, current=current.id) == ()
    assert prune(paths, 4, current=current.id) == (made[1].id, made[3].id)
    assert prune(paths, 2, current=current.id) == (made[4].id, made[0].id)
    assert {r.id for r in load_records(paths)} == {made[2].id, current.id}
    assert prune(paths, 1, current=current.id) == (made[2].id,)
    assert {p.name for p in paths.builds.iterdir()} == {current.id}


def test_partial_runs_are_told_from_whole_ones(paths):
    """In words, in the JSON, on the page; and they go as early as other good ones."""
    whole = make(paths)
    assert (whole.partial, whole.verdict) == ("", "passed")
    last = replace(whole.steps[1], status="skipped", chosen=False, done_in="20260101T000000Z")
    partial = replace(whole, result="partial", steps=(whole.steps[0], last))
    failed = replace(partial, result="failed")
    assert [r.verdict for r in (partial, failed)] == ["partial 1/2", "failed, partial 1/2"]
    assert [r.as_dict()["partial"] for r in (whole, partial)] == ["", "1/2"]
    partial.save()
    assert load_records(paths) == (partial,)
    assert json.loads(partial.path.read_text())["partial"] == "1/2"
    text = page.render(partial)
    assert '<span class="badge partial">partial 1/2</span>' in text
    assert "1 of 2 steps run and passed" in text
    assert "passed in build 20260101T000000Z" in text
    lost = replace(partial.source, commit="", unverified="fetch: box was reset")
    text = page.render(replace(failed, source=lost))
    assert "commit not verified" in text
    assert "<strong>not verified</strong>: fetch: box was reset" in text


def test_page_of_every_state(paths):
    record = make(paths)
    for result in ("running", "passed", "failed", "interrupted"):
        steps = (
            replace(record.steps[0], status=result, failure="source", message="it broke", tail="last"),
            replace(record.steps[1], status="skipped", kind="transfer", to="prod"),
        )
        text = page.render(replace(record, result=result, steps=steps, seconds=75.0))
        assert ("http-equiv" in text) == (result == "running")
        assert "<pre>last</pre>" in text
        assert "skipped" in text
    page.write(record)
    assert record.page.read_text().startswith("<!doctype html>")
    page.render(replace(record, steps=(), vms=(), source=SourceRecord()))


# Printed by the tools named; where the machine has them, by themselves just now.
CASES = [
    ("dependencies", "error: Failed build dependencies:\n\tzlib-devel is needed by dev-1.0-1.x86_64\n",
     "error: Failed build dependencies: zlib-devel is needed by dev-1.0-1.x86_64"),
    ("dependencies", "a.c:1:10: fatal error: zlib.h: No such file or directory\n 1 |#include <zlib.h>\n",
     "a.c:1:10: fatal error: zlib.h: No such file or directory"),
    ("source", 'a.c:1:10: fatal error: kata.h: No such file or directory\n    1 | #include "kata.h"\n',
     "a.c:1:10: fatal error: kata.h: No such file or directory"),
    ("source", "kata.c:3:5: error: expected ';' before 'return'\nmake: *** [all] Error 1\n",
     "kata.c:3:5: error: expected ';' before 'return'"),
    ("environment", "x.c:1:2: error: x\ncc1: fatal: /tmp/a.s: No space left on device\n",
     "cc1: fatal: /tmp/a.s: No space left on device"),
    ("environment", "sh: 1: rpmbuild: not found\n", "sh: 1: rpmbuild: not found"),
    ("infrastructure", "fatal: unable to connect to 127.0.0.1:\n127.0.0.1: errno=Connection refused\n",
     "fatal: unable to connect to 127.0.0.1: 127.0.0.1: errno=Connection refused"),
    ("source", "dh_install: warning: x\ndh_install: error: missing files, aborting\n"
     "make: *** [debian/rules:4: binary] Error 25\n"
     "dpkg-buildpackage: error: debian/rules binary subprocess returned exit status 2\n",
     "dh_install: error: missing files, aborting"),
    ("source", "FAIL: kata: 3\nmake[1]: *** [Makefile:5: check] Error 1\n"
     "dh_auto_test: error: make -j2 check returned exit code 2\n", "FAIL: kata: 3"),
    ("source", "dh_auto_test: error: ./test returned exit code 2\nmake: *** [x] Error 25\n",
     "make: *** [x] Error 25"),
    ("source", "dpkg-shlibdeps: error: cannot find library x.so needed by y\n"
     "dh_shlibdeps: error: dpkg-shlibdeps -Tdebian/x returned exit code 25\n",
     "dpkg-shlibdeps: error: cannot find library x.so needed by y"),
    ("dependencies", "dh: error: unable to load addon python3: Can't locate x.pm in @INC\n",
     "dh: error: unable to load addon python3: Can't locate x.pm in @INC"),
    ("environment", "dpkg-buildpackage: error: fakeroot not found, either install the fakeroot\n",
     "dpkg-buildpackage: error: fakeroot not found, either install the fakeroot"),
    ("source", "error: File not found: /b/x\n\nRPM build errors:\n    File not found: /b/x\n",
     "error: File not found: /b/x"),
    ("source", "error: Bad exit status from /var/tmp/rpm-tmp.x (%build)\n\nRPM build errors:\n",
     "error: Bad exit status from /var/tmp/rpm-tmp.x (%build)"),
    ("network", "curl: (6) Could not resolve host: git.example.org\n",
     "curl: (6) Could not resolve host: git.example.org"),
    ("network", "wget: unable to connect: Connection refused\n",
     "wget: unable to connect: Connection refused"),
    ("source", "something else went wrong\n", ""),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "output", "evidence"), CASES)
def test_classes(kind, output, evidence):
    assert classify(output, status=1) == (kind, evidence)
    assert classify(output, status=1, declared="dependencies")[0] == "dependencies"
    assert classify(output, status=124, timed_out=True) == ("time-out", "")


APT = (  # apt-get update && apt-get install foo, of apt 2.6 in a guest without a network
    "Err:1 http://archive.example.org/debian bookworm InRelease\n"
    "  Temporary failure resolving 'archive.example.org'\n"
    "W: Some index files failed to download. They have been ignored, or old ones used instead.\n"
    "E: Unable to locate package foo\n"
)


def test_without_a_network_what_was_wanted_from_there_is_missing_for_that():
    assert classify(APT, status=100) == ("dependencies", "E: Unable to locate package foo")
    why = "Temporary failure resolving 'archive.example.org'"
    assert classify(APT, status=100, offline=True) == ("network", why)
    assert classify(APT, status=100, offline=True, declared="source")[0] == "source", "its own word"
    never_updated = "E: Unable to locate package foo\n"
    assert classify(never_updated, status=100, offline=True) == ("network", never_updated.strip())
    full = f"{APT}tar: x: No space left on device\n"
    assert classify(full, status=2, offline=True)[0] == "environment"
    of_a_test = "AssertionError: connect to 127.0.0.1: Connection refused\n"
    assert classify(of_a_test, status=1, offline=True) == classify(of_a_test, status=1)


def test_statuses_of_the_shell():
    assert classify("", status=127)[0] == classify("", status=126)[0] == "environment"
    assert classify("", status=137)[0] == "environment"
    assert classify("", status=2)[0] == "source"


def test_a_real_shell_and_a_real_git(tmp_path):
    done = subprocess.run(["sh", "-c", "nonesuch-tool"], check=False, capture_output=True, text=True)
    assert classify(done.stderr, status=done.returncode)[0] == "environment"
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    done = subprocess.run(
        ["git", "-C", tmp_path, "checkout", "-q", "nonesuch"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert classify(done.stderr, status=done.returncode)[0] == "source"


def test_the_log_keeps_bytes_and_a_plain_tail(tmp_path):
    seen, told = [], []
    stream = lambda vm, data: seen.append((vm, data))  # noqa: E731
    log = StepLog(tmp_path / "log", "dev2", stream, told=told.append)
    log.write(b"10%\r50%\r100%\n\x1b[31mred\x1b[0m\n\xff")
    log.say("a word of ours")
    log.mark()
    log.write(b"after\n" * 100_000)
    assert log.text().startswith("after") or log.text().startswith(("fter", "ter", "er", "r", "\n"))
    assert len(log.text()) <= 65536
    log.close()
    data = (tmp_path / "log").read_bytes()
    assert data.startswith(b"10%\r50%\r100%\n\x1b[31mred\x1b[0m\n\xff\nfarmhand: a word of ours\n")
    assert b"".join(chunk for _, chunk in seen) == data.replace(b"\nfarmhand: a word of ours\n", b"")
    assert told == ["a word of ours"]


def test_lines_of_ours_are_known_however_long_the_log_is(tmp_path):
    log = StepLog(tmp_path / "log", "dev2", None)
    log.say("first\nof ours")
    log.write(b"farmhand: forged\n\r\n" * 20_000 + b"no newline")
    log.say("second")
    log.write(b"farmhand: forged")
    log.close()
    text = (tmp_path / "log").read_bytes().decode()
    shown = log_lines(text, frozenset(log.ours))
    ours = ["farmhand: first\\nof ours", "farmhand: second"]
    assert [line for line in shown if not line.startswith("| ")] == ours
    assert log.last(4) == "\n".join(shown[-4:])
    assert log.last(2) == "farmhand: second\n| farmhand: forged"


def test_sources_by_name(tmp_path):
    assert is_directory("kata")
    assert is_directory("/srv/kata")
    assert is_directory("file:///srv/kata")
    assert not is_directory("https://example.org/kata.git")
    assert not is_directory("git@example.org:kata.git")
    assert name_of("git@example.org:team/kata.git", tmp_path) == "kata"
    assert name_of("../my kata", tmp_path) == "my-kata"
    assert mask("https://user:secret@example.org/x.git") == "https://user:********@example.org/x.git"
    assert mask("https://user:a:b@example.org/x.git") == "https://user:********@example.org/x.git"
    assert mask("https://token@example.org:8/x.git") == "https://********@example.org:8/x.git"
    assert mask("ssh://git@example.org/x.git") == "ssh://git@example.org/x.git"
    assert mask("https://example.org/x.git") == "https://example.org/x.git"


def test_time_is_shared_out_once():
    meter = Meter()
    with meter.guest(), meter.hypervisor():
        time.sleep(0.02)
    with meter.hypervisor(), meter.hypervisor():
        time.sleep(0.02)
    time.sleep(0.02)
    shares = meter.shares()
    parts = [shares[f"{name}_seconds"] for name in ("guest", "hypervisor", "controller")]
    assert all(part >= 0.019 for part in parts)
    assert sum(parts) == pytest.approx(shares["seconds"], abs=0.002)


def test_memory_is_raised_to_build_and_given_back(paths, tmp_path, monkeypatch):
    """On the fake driver: what is asked of the hypervisor is what matters here."""
    (tmp_path / "farm.yaml").write_text(
        "farm: kata\nhosts:\n  here: {driver: fake}\ntemplates:\n  base: {build: debian-12}\n"
        "vms:\n  dev2: {memory: 1G, idle_memory: 256M}\n  prod: {memory: 1G}\n"
    )
    notes: list[str] = []
    with Site(load(tmp_path / "farm.yaml"), reporter=QuietReporter()) as site:
        _seal(site)
        farm.clone_farm(site, start=True, wait=False)
        machines = Machines(site, None, tmp_path, Meter(), notes.append)

        def memory(vm: str) -> int:
            machine = Member(site, vm).driver.find(Member(site, vm).machine)
            assert machine is not None
            return machine.current

        async def go() -> None:
            for vm in ("dev2", "prod"):
                machines.begin(vm, resets=True)
                await machines.deflate(vm)
            assert (memory("dev2"), memory("prod")) == (256 * 2**20, 2**30)
            for vm in ("dev2", "prod"):
                await machines.inflate(vm)
            assert (memory("dev2"), memory("prod")) == (2**30, 2**30)
            assert machines.records["dev2"].memory == 2**30

        asyncio.run(go())
        farm.stop(site, ["dev2"], force=True)
        asyncio.run(machines.deflate("dev2"))  # off: nothing to give back
        assert notes == []
        assert machines.records["dev2"].template == "base@1"

        def find(_self: FakeHypervisor, _name: str) -> None:
            raise DriverFailed("nobody answers")

        monkeypatch.setattr(FakeHypervisor, "find", find)
        for work in (machines.inflate, machines.deflate):  # the build goes on: its steps will tell
            asyncio.run(work("dev2"))
            assert notes.pop() == "dev2: its memory can't be looked at: nobody answers"


def _seal(site: Site) -> None:
    """A template for the fake store, from a real file."""
    from datetime import UTC, datetime

    from hypervisors.api import Template

    image = site.paths.root / "image.raw"
    site.prepare()
    image.write_bytes(b"x" * 4096)
    site.disks("here").seal(
        image,
        Template(name="base", generation=1, ref="", size=4096, sha256="0" * 64,
                 created=datetime.now(UTC), origin="test", firstboot="none"),
    )  # fmt: skip
