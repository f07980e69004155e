"""Builds found again: by what was built, by when, with which VM; and followed while they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from cycle_farm import Lab, environment, lab, run, run_cycle
from sshd_machine import free_port, wait_for

from builds.record import BuildRecord, find_record, load_records
from builds.source import Resolved, resolve
from cli import options
from host.program import ROOT
from host.run import Runner
from inventory.errors import BuildFailed, NotFound, UsageError

__all__ = ["lab"]
BUILD = run("build", "echo built")


def typed(lab: Lab, *words: str, **more) -> subprocess.Popen:
    """The command line in a process of its own."""
    argv = [sys.executable, "-P", ROOT / "cli" / "start.py", "--search-root", ROOT, *words]
    farm = str(lab.root / "farm.yaml")
    return subprocess.Popen(
        [*map(str, argv), "--farm", farm], env=environment(lab.root), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def said(lab: Lab, *words: str, status: int = 0) -> str:
    child = typed(lab, *words)
    out, err = child.communicate(timeout=120)
    assert child.returncode == status, err
    return out if status == 0 else err


@pytest.fixture
def three(lab: Lab) -> tuple[BuildRecord, BuildRecord, BuildRecord]:
    """A good build of master, a failed one of branch topic/x, a good one of a tag; the newest last."""
    with lab.site([BUILD]) as site:
        first = run_cycle(site)
    lab.git("checkout", "-q", "-b", "topic/x")
    (lab.source / "debian").mkdir()
    (lab.source / "debian" / "changelog").write_text("kata (1.2-3) unstable; urgency=low\n")
    lab.commit("Two")
    with lab.site([run("build", "exit 3")]) as site:
        with pytest.raises(BuildFailed):
            run_cycle(site)
        second = find_record(site.paths)
    lab.git("checkout", "-q", "master")
    lab.commit("Three")
    lab.git("tag", "v3")
    with lab.site([run("install", "true", vm="prod")]) as site:
        return first, second, run_cycle(site, revision="v3")


def test_branch_version_and_subject_are_recorded(lab, three):
    first, second, third = (one.source for one in three)
    assert (first.branch, first.version, first.subject) == ("master", "", "One")
    assert (second.branch, second.version, second.subject) == ("topic/x", "1.2-3", "Two")
    assert (third.branch, third.version, third.asked) == ("", "v3", "v3")
    shown = said(lab, "history").splitlines()
    assert [*filter(None, (word in shown[0] for word in ("VERSION", "BRANCH", "SUBJECT")))] == [True] * 3
    assert all(word in shown[2] for word in (three[1].id, "1.2-3", "topic/x", "Two"))
    assert " topic/x " in said(lab, "log", "--build", "topic/x")
    assert "branch topic/x, version 1.2-3" in three[1].page.read_text()


def test_of_a_url_the_branch_is_known(lab):
    lab.git("clone", "-q", "--bare", ".", str(lab.root / "far.git"))
    port = free_port()
    options = ("--reuseaddr", "--listen=127.0.0.1", f"--port={port}", "--export-all")
    daemon = subprocess.Popen(["git", "daemon", *options, f"--base-path={lab.root}", str(lab.root)])
    try:
        url = f"git://127.0.0.1:{port}/far.git"
        asked = {"HEAD": "master", "master": "master", lab.git("rev-parse", "HEAD"): ""}
        for revision, branch in asked.items():
            found = wait_for(lambda revision=revision: _resolved(lab, url, revision))
            assert found.branch == branch
    finally:
        daemon.terminate()
        daemon.wait(60)


def _resolved(lab: Lab, url: str, revision: str) -> Resolved | None:
    """None: the daemon isn't up yet."""
    found = resolve(Runner(), url, revision, base=lab.root, sources=lab.root / "sources")
    return found if found.commit else None


def test_a_build_is_found_by_what_was_built(lab, three):
    first, second, third = three
    with lab.site([BUILD]) as site:
        paths = site.paths
        for word, found in {
            first.source.commit: first, first.source.commit[:7]: first, "master": first,
            "topic/x": second, "1.2-3": second, second.source.commit[:12].upper(): second,
            "v3": third, third.id: third, "last": third, "last-good": third,
        }.items():  # fmt: skip
            assert find_record(paths, word).id == found.id, word
        with pytest.raises(NotFound, match="no build 'mastre'") as missed:
            find_record(paths, "mastre")
        assert "master" in missed.value.remedy
        with pytest.raises(NotFound, match=f"no build '{first.source.commit[:3]}'"):
            find_record(paths, first.source.commit[:3])
        short = (
            replace(first.source, branch="a", commit="a" * 40),
            replace(third.source, branch="a", commit="ab" * 20),
        )
        for one, source in zip((first, third), short, strict=True):
            replace(one, source=source).save()
        assert find_record(paths, "a").id == third.id, "a branch, not the beginning of two commits"
        for one in (first, third):
            one.save()
        replace(third, result="partial").save()
        assert find_record(paths, "last-good").id == first.id
        replace(first, result="failed").save()
        with pytest.raises(NotFound, match="no build that passed"):
            find_record(paths, "last-good")
        # two commits that begin alike
        like = first.source.commit[:8] + "0" * 32
        replace(second, source=replace(second.source, commit=like)).save()
        with pytest.raises(NotFound, match="several builds") as several:
            find_record(paths, first.source.commit[:8])
        assert first.id in several.value.remedy and second.id in several.value.remedy


def test_history_is_sought_through(lab, three):
    first, second, third = three
    old = datetime.now().astimezone() - timedelta(days=3)
    replace(first, started=old.isoformat()).save()

    def found(*words: str) -> list[str]:
        return [build["id"] for build in json.loads(said(lab, "history", "--json", *words))["builds"]]

    assert found() == [third.id, second.id, first.id]
    assert found("--since", "2 days") == [third.id, second.id]
    assert found("--since", old.date().isoformat()) == [third.id, second.id, first.id]
    assert found("--revision", "topic/x") == found("--failed") == [second.id]
    assert found("--revision", first.source.commit[:9]) == [first.id]
    assert found("--vm", "prod") == [third.id]
    assert found("--failed", "--vm", "prod") == []
    assert "nothing like that was done" in said(lab, "history", "--failed", "--vm", "prod")
    assert "did you mean prod?" in said(lab, "history", "--vm", "prot", status=2)
    verbs = json.loads(said(lab, "history", "--json", "--failed"))["operations"]
    assert {one["outcome"] for one in verbs} == {"failed"}


@pytest.mark.parametrize(
    ("text", "ago"),
    [("2 days", timedelta(days=2)), ("1 week ago", timedelta(weeks=1)), ("9 min", timedelta(minutes=9)),
     ("1h30m", timedelta(minutes=90)), ("3d", timedelta(days=3)), ("1 hour", timedelta(hours=1))],
)  # fmt: skip
def test_how_long_ago(text, ago):
    before = datetime.now().astimezone()
    found = options.since("--since", text)
    assert before - ago <= found <= datetime.now().astimezone() - ago


def test_days_begin_at_midnight():
    today = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0)
    assert options.since("--since", "today") == today
    assert options.since("--since", "Yesterday").date() == today.date() - timedelta(days=1)
    assert options.since("--since", "yesterday").hour == 0
    assert options.since("--since", "2026-11-20").isoformat().startswith("2026-11-20T00:00:00")
    for wrong in ("soon", "2", "5 blue moons", "999999 weeks", "2026-13-01"):
        with pytest.raises(UsageError, match="--since"):
            options.since("--since", wrong)


def test_a_running_build_is_followed_to_its_end(lab):
    gate = lab.root / "gate"
    script = f"echo begun; while [ ! -e '{gate}' ]; do sleep 0.05; done; echo farmhand: ended"
    steps = [run("one", "echo first"), run("two", script, vm="prod")]
    lab.farm_file(steps)
    assert "no cycle is running" in said(lab, "log", "--follow", status=1)
    cycle = typed(lab, "cycle")
    with lab.site(steps) as site:
        wait_for((site.paths.builds / "last").exists)
        follower = typed(lab, "log", "--follow")
        assert follower.stdout is not None
        seen: list[str] = []
        while "| begun\n" not in seen:
            seen.append(follower.stdout.readline())
            assert seen[-1], (seen, follower.stderr.read())
        assert cycle.poll() is None and follower.poll() is None
        gate.touch()
        rest, err = follower.communicate(timeout=60)
        cycle.communicate(timeout=60)
        text = "".join(seen) + rest
        assert follower.returncode == 0 and not err
        heads = [line for line in text.splitlines() if line.startswith("==>")]
        assert heads == ["==> one on dev2 <==", "==> two on prod <=="]
        assert text.index("| first") < text.index("==> two") < text.index("| farmhand: ended")
        assert f"build {find_record(site.paths).id}  passed" in text
        again = said(lab, "log", "--build", "last", "--follow")
        assert "| begun" in again and "\nfarmhand: two passed" in again


def test_a_line_without_end_makes_no_other_one_pass_for_farmhands(lab):
    fakes = "for n in 1 2 3 4 5 6; do echo farmhand: faked; done"
    with lab.site([run("one", f"head -c 3000000 /dev/zero | tr '\\0' x; echo; {fakes}")]) as site:
        run_cycle(site)
    lines = said(lab, "log", "--build", "last", "--follow").splitlines()
    assert lines.count("| farmhand: faked") == 6
    assert not [line for line in lines if line.startswith("farmhand: faked")]
    assert [line for line in lines if line.startswith("farmhand: one passed")]


def test_a_follower_ends_with_a_cycle_that_is_killed(lab):
    steps = [run("one", "sleep 600")]
    lab.farm_file(steps)
    cycle = typed(lab, "cycle", start_new_session=True)
    with lab.site(steps) as site:
        wait_for(lambda: (site.paths.builds / "last").exists() and load_records(site.paths))
        follower = typed(lab, "log", "--follow")
        assert follower.stdout is not None
        assert follower.stdout.readline() == "==> one on dev2 <==\n"
        os.kill(cycle.pid, 9)
        out, _ = follower.communicate(timeout=60)
        cycle.communicate(timeout=60)
        assert "interrupted" in out
