"""Cycles that skip steps: what they build is what the VMs hold, or the record says that nobody knows."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cycle_farm import STEPS, Lab, environment, lab, plan_cycle, reset, run, run_cycle

from builds.record import BuildRecord, find_record, load_records
from cli import views
from cli.run import TaskRun
from inventory.errors import (
    BuildFailed,
    Call,
    FarmhandError,
    NotFound,
    WrongState,
    calls_in,
    spelled,
)
from provision.site import Site
from tests.farm import reset as reset_by_hand

__all__ = ["lab"]
ROOT = Path(__file__).resolve().parents[2]
# As in the case that made a false record: `passes` passes ci, HEAD doesn't.
FETCH = """git init -q src; cd src
git fetch -q "$SOURCE_URL" '+refs/*:refs/source/*'
git checkout -q --detach "$GIT_REVISION"
"""
CI = [
    reset("dev2"),
    run("fetch", FETCH),
    run("ci", "sh src/program; touch tried; test -e repaired || sh src/program | grep -v bad"),
    run("pack", "cat src/program > pack"),
]


def fails(site: Site, **options) -> tuple[BuildFailed, BuildRecord]:
    with pytest.raises(BuildFailed) as caught:
        run_cycle(site, **options)
    return caught.value, find_record(site.paths)


def in_vm(lab: Lab) -> str:
    done = subprocess.run(
        ["git", "-C", lab.dev2.home / "src", "rev-parse", "HEAD"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout.strip()


def step(record: BuildRecord, name: str):
    return next(s for s in record.steps if s.name == name)


def test_the_printed_remedy_makes_a_record_of_what_is_in_the_vm(lab):
    wanted = lab.commit("Bad", program="echo bad\n")
    lab.git("tag", "asked")
    head = lab.commit("Good", program="echo good\n")
    with lab.site(CI) as site:
        run_cycle(site)
        error, failed = fails(site, start_from="fetch", revision="asked", keep_going=False)
        assert (failed.source.commit, failed.verdict) == (wanted, "failed, partial 3/4")
        command = spelled(error.remedy).partition("go on from there: ")[2]
        assert command == "cycle --from ci --revision asked"
        (lab.dev2.home / "repaired").touch()
        lab.commit("Newer still", program="echo newer\n")
        for revision in ("asked", None):
            record = run_cycle(site, start_from="ci", revision=revision)
            assert record.source.commit == wanted == in_vm(lab) != head
            assert (record.source.subject, record.verdict) == ("Bad", "partial 2/4")
            assert step(record, "fetch").done_in == failed.id
            assert f"-{wanted[:7]}" in record.id
            assert f"fetch: not run, passed in build {failed.id}" in record.notes
        assert record.source.asked == "asked"
        # and one that goes on from that one goes on from the same
        again = run_cycle(site, only=["pack"])
        assert again.source.commit == wanted
        assert {s.name: s.done_in for s in again.steps if not s.chosen} == {
            "reset-dev2": "", "fetch": failed.id, "ci": record.id,
        }  # fmt: skip


def test_another_revision_than_the_one_in_the_vm_is_refused(lab):
    one = lab.git("rev-parse", "HEAD")
    with lab.site(CI) as site:
        build = run_cycle(site).id
        two = lab.commit("Two", program="echo two\n")
        for ask in (run_cycle, plan_cycle):
            with pytest.raises(WrongState) as caught:
                ask(site, start_from="ci", revision="master")
            assert caught.value.message == (
                f"{site.name}: dev2 holds commit {one[:10]} (HEAD, build {build}), but "
                f"master is {two[:10]}, and step fetch is skipped"
            )
            assert Call("cycle", from_="fetch", revision="master") in calls_in(caught.value.remedy)
        assert find_record(site.paths).id == build, "nothing was begun"
        assert run_cycle(site, start_from="fetch", revision="master").source.commit == two == in_vm(lab)


@pytest.mark.parametrize("how", ["by hand", "behind our back"])
def test_a_vm_that_was_reset_meanwhile_holds_nothing_known(lab, how):
    steps = [reset("dev2"), run("fetch", "touch src"), run("ci", "echo $GIT_REVISION")]
    with lab.site(steps) as site:
        run_cycle(site)
        if how == "by hand":
            reset_by_hand(site, ["dev2"])
        else:
            subprocess.run(["sh", "-c", f"rm -rf {lab.dev2.home}; mkdir {lab.dev2.home}"], check=True)
        planned = [a.text for a in plan_cycle(site, start_from="ci")]
        record = run_cycle(site, start_from="ci")
        why = "dev2 holds no build's work: it was reset, or nothing was built in it"
        assert record.source.commit == ""
        assert record.source.unverified == f"fetch: {why}"
        assert step(record, "fetch").unverified == why
        assert f"not verified: fetch: {why}" in record.notes
        assert f"not verified: fetch: {why}" in planned
        assert planned[0].startswith(f"build what the VMs hold of {lab.source}; GIT_REVISION is ")
        assert record.inputs == ()
        assert lab.git("rev-parse", "HEAD")[:7] not in record.id
        shown = views.build_record(record).text
        assert "commit not verified" in shown
        # what goes on from it knows no more
        assert run_cycle(site, only=["ci"]).source.commit == ""


def test_a_fetch_that_failed_is_not_what_the_vm_holds(lab):
    with lab.site(CI) as site:
        run_cycle(site)
        lab.commit("Two", program="echo two\n")
        (lab.dev2.home / "src" / ".git" / "index.lock").touch()
        _, failed = fails(site, start_from="fetch")
        record = run_cycle(site, start_from="ci")
        assert (record.source.commit, record.result) == ("", "partial")
        assert record.source.unverified == f"fetch: failed in build {failed.id}"


def test_a_commit_that_the_source_has_no_more(lab):
    with lab.site(CI) as site:
        held = run_cycle(site).source.commit
        lab.git("checkout", "-q", "--orphan", "other")
        lab.commit("Other", program="echo other\n")
        lab.git("branch", "-qD", "master")
        lab.git("reflog", "expire", "--expire=now", "--all")
        lab.git("gc", "-q", "--prune=now")
        with pytest.raises(NotFound, match=f"{held}', the commit that the VMs hold") as caught:
            run_cycle(site, start_from="ci")
        assert spelled(caught.value.remedy) == "build what is there now: cycle"


def test_what_was_built_of_another_commit_is_not_taken_for_this_one(lab):
    with lab.site(CI) as site:
        run_cycle(site)
        lab.commit("Two", program="echo two\n")
        run_cycle(site, only=["fetch"])
        record = run_cycle(site, only=["pack"])
        assert record.source.commit == ""
        assert step(record, "ci").unverified.startswith("skipped in build ")
        record = run_cycle(site, only=["fetch", "pack"])
        assert step(record, "ci").unverified == "skipped, though fetch is run"
        assert record.source.commit == ""


def test_two_vms_of_different_commits_are_no_known_state(lab):
    one = lab.git("rev-parse", "HEAD")
    steps = [*STEPS[:4], STEPS[4], STEPS[5], run("try", "true", vm="prod")]
    with lab.site(steps) as site:
        run_cycle(site)
        two = lab.commit("Two", program="echo two\n")
        (lab.dev2.home / "src" / "program").unlink()
        run_cycle(site, only=["reset-dev2", "fetch", "build"])
        record = run_cycle(site, start_from="try")
        assert record.source.unverified == (
            f"fetch, build, transfer, install: dev2 holds {two[:10]} and prod holds {one[:10]}"
        )


def test_partial_builds_are_not_the_build_before(lab):
    with lab.site(CI) as site:
        one = run_cycle(site).source.commit
        lab.commit("Two", program="echo two\n")
        run_cycle(site, start_from="fetch")
        record = run_cycle(site)
        assert (record.source.previous, record.source.changed) == (one, True)


def test_a_remedy_has_the_options_of_the_run(lab):
    steps = [run("one", "true"), run("two-words", "exit 3"), run("three", "exit 4")]
    lab.git("tag", "it's")
    with lab.site(steps) as site:
        error, record = fails(site, only=["two-words", "three"], revision="it's", keep_going=True)
        command = spelled(error.remedy).partition("go on from there: ")[2]
        assert shlex.split(command) == [
            "cycle", "--from", "two-words", "--only", "two-words", "--only", "three",
            "--revision", "it's", "--keep-going",
        ]  # fmt: skip
        page = record.page.read_text()
        assert f"./invoke cycle --farm {site.farm.path} --from two-words" in page
        assert f"./invoke ssh --farm {site.farm.path} --vm dev2" in page


def test_the_farm_is_in_each_command_that_the_line_says(lab, tmp_path):
    """The real command line, in a directory whose own farm is another one."""
    steps = [run("one", "exit 3")]
    farm = lab.farm_file(steps)
    words = [sys.executable, "-P", "-m", "invoke", "--search-root", str(ROOT)]

    def type_it(*more: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in environment(lab.root).items() if k != "FARMHAND_FARM"}
        return subprocess.run(
            [*words, *more], cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    named = elsewhere / "a farm.yaml"
    named.write_bytes(farm.read_bytes().replace(b'"kata"', json.dumps(str(lab.source)).encode()))
    done = type_it("cycle", "--farm", str(named), "--keep-going", "--json")
    flag = f"--farm '{named}'"
    told = (
        f"look inside: ./invoke ssh {flag} --vm dev2; "
        f"then go on from there: ./invoke cycle {flag} --from one --keep-going"
    )
    assert done.returncode == 3, done.stderr
    assert told in done.stderr
    assert json.loads(done.stdout)["remedy"] == told
    # ./farm.yaml is found by itself
    assert "./invoke cycle --from one" in type_it("cycle", "--farm", str(farm), cwd=lab.root).stderr


def test_a_call_names_the_farm_where_it_must(tmp_path, monkeypatch):
    monkeypatch.delenv("FARMHAND_FARM", raising=False)
    monkeypatch.chdir(tmp_path)
    farm = tmp_path / "x.yaml"
    farm.touch()
    run_ = TaskRun(task="status", farm=str(farm), json=False, plan=False)
    remedy = ("it is told; ", Call("ssh"), ", then: ", Call("clone-farm", vm="a"), "; ",
              Call("cycle", farm="b"))  # fmt: skip
    assert run_.words.text(remedy) == (
        f"it is told; ./invoke ssh --farm {farm}, then: "
        f"./invoke clone-farm --farm {farm} --vm a; ./invoke cycle --farm b"
    )
    assert run_.words.data([{"remedy": remedy}])[0]["calls"] == [
        {"task": "ssh", "flags": {"farm": str(farm)}},
        {"task": "clone-farm", "flags": {"farm": str(farm), "vm": "a"}},
        {"task": "cycle", "flags": {"farm": "b"}},
    ]
    plain = "it is told; ./invoke ssh, then: ./invoke clone-farm --vm a; ./invoke cycle --farm b"
    monkeypatch.setenv("FARMHAND_FARM", str(farm))
    assert run_.words.text(remedy) == plain
    run_.farm = "gone.yaml"
    assert run_.words.text(remedy) == plain


def test_history_and_log_tell_partial_runs(lab):
    with lab.site(CI) as site:
        run_cycle(site)
        record = run_cycle(site, only=["pack"])
        shown = views.history([], load_records(site.paths), 20).text.splitlines()
        assert "  partial 1/4  " in shown[1]
        assert "  passed" in shown[2]
        text = views.build_record(record).text
        assert text.splitlines()[0].startswith(f"build {record.id}  partial 1/4, ")
        assert f"passed in build {step(record, 'fetch').done_in}" in text


def test_a_vm_that_cannot_be_asked_is_not_known(lab):
    with lab.site(CI) as site:
        run_cycle(site)
        lab.dev2.stop()
        texts = [a.text for a in plan_cycle(site, start_from="ci")]
        assert any(t.startswith("not verified: fetch: dev2 could not be asked: ") for t in texts)
        with pytest.raises(FarmhandError):
            run_cycle(site, start_from="ci")
        assert find_record(site.paths).source.commit == ""
