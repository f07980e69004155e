"""SIGKILL before anything that a task of package repositories changes in the file system. Readers find
the old or the new at once, whole; the next command recovers: nothing is left over, nothing is lost, and
the task can be done again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from bench import KILLS, MANY, ROOT, SEED

from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.site import Site
from repositories.leases import leases
from tests import farm
from tests.repos import FORMATS, RepoFarm, others, read_all
from tests.unit.test_signing import Admin

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]
CHILD = Path(__file__).with_name("repo_child.py")
EACH = 20 if MANY else 2
"""Kills of each task in each format."""


class RepoChildren:
    """The process whose forks are killed, see repo_child.py."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, CHILD],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *request: object) -> tuple[int, str]:
        assert self._server.stdin and self._server.stdout
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        status, text = json.loads(self._server.stdout.readline())
        return status, text

    def close(self) -> None:
        with self._server:
            assert self._server.stdin
            self._server.stdin.close()


class RepoBench:
    """A repository that is put back before each kill."""

    def __init__(self, place: Path, kind: str, more: str = "") -> None:
        self.place = place
        self.now = place / "now"
        self.now.mkdir()
        self.farm = RepoFarm(self.now, kind, more=more)
        self.children = RepoChildren()

    def keep(self) -> None:
        """What there is now is what is put back."""
        subprocess.run(["rm", "-rf", self.place / "kept"], check=True)
        _copy(self.now, self.place / "kept")

    def put_back(self) -> None:
        subprocess.run(["rm", "-rf", self.now], check=True)
        _copy(self.place / "kept", self.now)

    def ask(self, at: int, fault: str, task: str, request: dict[str, Any]) -> tuple[int, str]:
        more = {} if task == "recover" else {"repo": "packages"}
        return self.children.ask(str(self.farm.file), at, fault, task, {**request, **more})

    def ask_anew(self, at: int, task: str, request: dict[str, Any]) -> tuple[int, str]:
        self.put_back()
        return self.ask(at, "kill", task, request)

    def points(self, task: str, request: dict[str, Any]) -> int:
        """Of a task that nobody interrupts."""
        self.put_back()
        status, text = self.ask(0, "kill", task, request)
        assert status == 0, f"{task} {request} failed by itself: {text}; see its standard error"
        return int(text)

    def kills(self, operation: str, task: str, request: dict[str, Any]) -> Iterator[str]:
        """It is put back, and killed elsewhere, each time. The caller looks and recovers."""
        dice = random.Random(f"{SEED} {operation} {self.farm.kind}")
        total = self.points(task, request)
        at = sorted(dice.sample(range(1, total + 1), min(EACH, total)))
        for point in at:
            self.put_back()
            status, text = self.ask(point, "kill", task, request)
            if status == 0:
                continue
            assert status == signal.SIGKILL, f"wait status {status}: {text}; see its standard error"
            KILLS.add(operation, self.farm.kind)
            context = (
                f"{operation}, {self.farm.kind}, killed at {point} of {total} (FARMHAND_SEED={SEED})"
            )
            KILLS.open[context] = None
            yield context
            del KILLS.open[context]

    def recover(self) -> None:
        """As somebody does who changes nothing else: what was killed before it was in the journal
        repo-fsck tells of, and repo-gc takes away."""
        with Site(load(self.farm.file), reporter=QuietReporter()) as site:
            begun = bool(site.journal.unfinished())
            farm.recover(site)
            assert site.journal.unfinished() == ()
        if not begun and any("repo-gc" in line for line in self.farm.fsck()):
            self.farm.gc()

    def nothing_left_over(self, context: str) -> None:
        assert self.farm.fsck() == [], context
        top = self.farm.top
        for name in (".farmhand/staging", ".farmhand/trash"):
            assert list((top / name).glob("*")) == [], context
        hidden = {str(p.relative_to(top)) for p in top.rglob(".*")} - {".farmhand"}
        assert not hidden, context

    def close(self) -> None:
        self.children.close()


def _copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-a", "--no-target-directory", source, target], check=True)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fh-", dir="/dev/shm") as place:
        monkeypatch.setenv("FARMHAND_STATE_DIR", f"{place}/now/s")
        monkeypatch.setenv("FARMHAND_RUNTIME_DIR", f"{place}/r")
        yield Path(place)


@pytest.fixture(params=FORMATS)
def bench(request: pytest.FixtureRequest, place: Path) -> Iterator[RepoBench]:
    made = RepoBench(place, request.param, "keep: 1\nkeep_for: 60s\ngrace: 60s\nversions: 2")
    repo = made.farm
    repo.add(repo.package(), repo.package("other"), repo.package("other", "2.0-1"))
    repo.promote()
    repo.add(repo.package(version="2.0-1"))
    made.keep()
    yield made
    made.close()


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "repo-add": ("repo-add", {"channel": "experimental"}),
    "repo-add, the first one": ("repo-add", {"channel": "tested"}),
    "repo-remove": ("repo-remove", {"channel": "experimental", "packages": ["other", "hello=1.0-1"]}),
    "repo-promote": ("repo-promote", {"from_": "experimental", "channel": "tested"}),
    "repo-promote, one package": (
        "repo-promote", {"from_": "experimental", "channel": "tested", "packages": ["hello=2.0-1"]},
    ),
    "repo-rollback": ("repo-rollback", {"channel": "experimental", "to": 1}),
    "repo-import": ("repo-import", {"channel": "tested"}),
    "repo-gc": ("repo-gc", {}),
    "repo-gc, a channel dropped": ("repo-gc", {"drop": ["tested"]}),
}  # fmt: skip


@pytest.mark.parametrize("operation", TASKS)
def test_kills(bench: RepoBench, operation: str) -> None:
    task, request = TASKS[operation]
    repo = bench.farm
    if task == "repo-add":
        more = repo.package("more")
        request = {**request, "paths": [str(more), str(repo.package(version="3.0-1"))]}
        if "first" in operation:
            subprocess.run(["rm", "-rf", repo.top, bench.now / "s"], check=True)
    if task == "repo-import":
        request = {**request, "source": str(others(repo, "third", "fourth"))}
    if task == "repo-gc":
        repo.rollback("experimental")
        repo.age(timedelta(minutes=5))
    if "drop" in request:
        repo.file.write_text(repo.file.read_text().replace("[experimental, tested]", "[experimental]"))
    bench.keep()
    _killed(bench, operation, task, request)


def _killed(bench: RepoBench, operation: str, task: str, request: dict[str, Any]) -> None:
    top = bench.farm.top
    bench.put_back()
    before = read_all(top) if top.exists() else {}
    bench.points(task, request)
    after = read_all(top)
    assert after != before
    for number, context in enumerate(bench.kills(operation, task, request)):
        _old_or_new(before, read_all(top) if _begun(top) else {}, after, context)
        if number % 2:  # or else the next command of all finds it
            bench.recover()
            if (top / ".farmhand").exists():
                bench.nothing_left_over(context)
                _old_or_new(before, read_all(top) if _begun(top) else {}, after, context)
        status, text = bench.ask(0, "kill", task, request)
        again = read_all(top)
        for channel in ("experimental", "tested"):
            assert again.get(channel) == after.get(channel), f"{context}: {status} {text}"
        bench.nothing_left_over(context)
        if task != "repo-gc":
            assert (
                before.items() - {(c, before.get(c)) for c in ("experimental", "tested")}
                <= again.items()
            )
        else:
            assert set(again) == set(after), context


def test_kills_of_a_queue(bench: RepoBench) -> None:
    """What was uploaded goes in once, or to what was rejected, once; what is due goes on once."""
    repo = bench.farm
    uploads = bench.now / "uploads"
    (uploads / "experimental").mkdir(parents=True)
    rule = "promotions: [{from: experimental, to: tested, after: 60s}]"
    repo.declare(f"incoming: {uploads}\n{rule}")
    repo.age(timedelta(minutes=5))
    good, bad = repo.package("more"), repo.package("bad")
    bad.write_bytes(b"no package")
    moved = [(str(path), str(uploads / "experimental" / path.name)) for path in (good, bad)]
    request = {"uploads": moved}
    bench.keep()
    before = read_all(repo.top)
    bench.points("queue", request)
    after, done = read_all(repo.top), _queued(repo, uploads)
    assert done == ([], [bad.name, f"{bad.name}.reason"], {"experimental": 3, "tested": 2})
    for number, context in enumerate(bench.kills("repo-queue", "queue", request)):
        _old_or_new(before, read_all(repo.top), after, context)
        if number % 2:
            bench.recover()
            bench.nothing_left_over(context)
        status, text = bench.ask(0, "kill", "queue", request)
        assert status == 0, f"{context}: {text}"
        assert _queued(repo, uploads) == done, context
        again = read_all(repo.top)
        for channel in ("experimental", "tested"):
            assert again[channel] == after[channel], context
        bench.nothing_left_over(context)


def _queued(repo: RepoFarm, uploads: Path) -> tuple[list[str], list[str], dict[str, int]]:
    """What waits, what was rejected, and how often each channel moved."""
    waiting = sorted(path.name for path in (uploads / "experimental").iterdir())
    rejected = sorted((uploads / "rejected").iterdir())
    kept = [path.read_bytes() for path in (uploads / "rejected").glob("*/*")]
    assert kept == [b"no package"]
    log = repo.repository.documents.log
    moves = {channel: len(log(channel)) for channel in ("experimental", "tested")}
    return waiting, [path.name.partition("-")[2] for path in rejected], moves


FLOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow-begin": ("flow-begin", {"flow": "new", "channel": "tested"}),
    "flow-begin, more": ("flow-begin", {"flow": "ready", "channel": "tested", "more": True}),
    "flow-pass": ("flow-pass", {"flow": "ready"}),
    "flow-pass, moved": ("flow-pass", {"flow": "late"}),
    "flow-fail": ("flow-fail", {"flow": "ready"}),
    "flow-bisect": ("flow-bisect", {"flow": "ready", "passed": False}),
}


@pytest.mark.parametrize("operation", FLOWS)
def test_kills_of_flows(bench: RepoBench, operation: str) -> None:
    task, request = _flowing(bench, operation)
    repo = bench.farm
    before, old = _flows(repo), read_all(repo.top)
    bench.points(task, request)
    after, new = _flows(repo), read_all(repo.top)
    assert after != before
    for number, context in enumerate(bench.kills(operation, task, request)):
        _old_or_new(old, read_all(repo.top), new, context)
        if number % 2:
            bench.recover()
            bench.nothing_left_over(context)
            assert _flows(repo) in (before, after), context
        status, text = bench.ask(0, "kill", task, request)
        if status:  # it was done before the kill: then it can't be done again
            bench.recover()
        bench.nothing_left_over(context)
        assert _flows(repo) == after, f"{context}: {status} {text}"
        assert read_all(repo.top).get("tested") == new.get("tested"), context


def _flowing(bench: RepoBench, operation: str) -> tuple[str, dict[str, Any]]:
    """Two flows, on a channel that one of them is no longer on; and what is asked."""
    task, request = FLOWS[operation]
    repo = bench.farm
    repo.declare("keep: 1\nkeep_for: 60s\ngrace: 60s\nretest: no")
    repo.perform("flow-begin", flow="late", channel="tested", paths=(repo.package("late"),))
    repo.promote("hello=2.0-1")
    several = tuple(repo.package(name) for name in ("one", "two", "three"))
    repo.perform("flow-begin", flow="ready", channel="tested", paths=several)
    if task == "flow-begin":
        request = {**request, "paths": [str(repo.package("more"))]}
    if task == "flow-bisect":  # or else, done again, it would be the verdict of the next one
        request = {**request, "generation": repo.repository.flows.open("ready").to_test}
    bench.keep()
    return task, request


@pytest.mark.parametrize("operation", FLOWS)
def test_flows_on_a_full_disk(bench: RepoBench, operation: str) -> None:
    task, request = _flowing(bench, operation)
    repo = bench.farm
    total = bench.points(task, request)
    after = _flows(repo)
    dice = random.Random(f"{SEED} full {operation}")
    for at in sorted(dice.sample(range(1, total + 1), min(EACH, total))):
        context = f"{operation}, {repo.kind}, full from {at} of {total} on (FARMHAND_SEED={SEED})"
        bench.put_back()
        status, text = bench.ask(at, "full", task, request)
        assert status in (0, 2 << 8), f"{context}: {text}"
        assert not status or text.startswith("NoSpace"), context
        again, text = bench.ask(0, "full", task, request)  # refused, where only its end was lacking
        assert _flows(repo) == after, f"{context}: {status}, {again} {text}"
        bench.nothing_left_over(context)


def _flows(repo: RepoFarm) -> dict[str, object]:
    """What each flow is, but for the numbers of its generations. Leases are of just what they need."""
    repository = repo.repository
    flows = list(repository.flows.all())
    held = {(lease.holder, lease.generation) for lease in leases(repository.layout)}
    assert held == {(flow.holder, number) for flow in flows for number in flow.needs}
    found: dict[str, object] = {}
    for flow in flows:
        generation = repository.documents.read(flow.to_test)
        listed = sorted(map(str, repository.packages(generation)))
        over = flow.state != "open"
        found[flow.name] = flow.state, listed, flow.packages, flow.bisection, over and len(flow.runs)
    return found


def _begun(top: Path) -> bool:
    return (top / "channels").is_dir() and (top / "generations").is_dir()


def _old_or_new(before: Any, now: Any, after: Any, context: str) -> None:
    for channel in ("experimental", "tested"):
        assert now.get(channel) in (before.get(channel), after.get(channel)), f"{context}: {channel}"
    for number in before.keys() & now.keys() - {"experimental", "tested"}:
        assert now[number] == before[number], f"{context}: generation {number}"
    assert before.keys() & after.keys() <= now.keys(), f"{context}: something is lost"


@pytest.fixture(scope="module")
def admin() -> Iterator[Admin]:
    with tempfile.TemporaryDirectory(prefix="fh") as place:
        made = Admin(Path(place, "home"))
        yield made
        made.close()


@pytest.mark.parametrize("kind", FORMATS)
def test_kills_of_a_signed_publish(place: Path, kind: str, admin: Admin) -> None:
    key = admin.make(f"signer-{kind}")
    made = RepoBench(place, kind, f"signing: [{{fingerprint: {key}, home: {admin.home}}}]")
    made.farm.add(made.farm.package())
    more = str(made.farm.package("more"))
    made.keep()
    _killed(made, "repo-add, signed", "repo-add", {"channel": "experimental", "paths": [more]})
    made.close()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_recovery_that_is_killed_too(place: Path, kind: str) -> None:
    made = RepoBench(place, kind)
    repo = made.farm
    repo.add(repo.package())
    request = {"channel": "experimental", "paths": [str(repo.package("more"))]}
    made.keep()
    total = made.points("repo-add", request)
    dice = random.Random(f"{SEED} {kind}")
    first = dice.randrange(total // 2, total - 5)
    assert made.ask_anew(first, "repo-add", request)[0] == signal.SIGKILL
    made.keep()
    for context in made.kills("recover of repo-add", "recover", {}):
        read_all(repo.top)
        made.recover()
        made.nothing_left_over(f"{context}, after {first} of {total}")
        read_all(repo.top)
    made.close()
