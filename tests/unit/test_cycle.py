"""The build cycle against real sshds, real git, real files."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cycle_farm import FETCH, STEPS, Lab, environment, lab, plan_cycle, reset, run, run_cycle
from sshd_machine import alive, gone, wait_for

from builds.operation import RunCycle
from builds.record import find_record, load_records
from builds.scripts import DIRECTORY, SHELL, VARIABLES
from host.run import which
from hypervisors.fake.driver import FakeDisks
from inventory.errors import (
    BuildFailed,
    Busy,
    Call,
    InventoryError,
    NotFound,
    UsageError,
    calls_in,
    spelled,
)
from inventory.loader import load, loads
from inventory.model import Limits
from inventory.sizes import format_size
from provision.engine.runner import perform
from provision.guest import connection as connections
from provision.guest.connection import Connection
from provision.member import Member
from provision.site import Site
from tests.farm import clone_farm
from tests.unit.cli_farm import command_line

__all__ = ["lab"]
HERE = Path(__file__).resolve()


def fails(site, **options):
    with pytest.raises(BuildFailed) as caught:
        run_cycle(site, **options)
    return caught.value, find_record(site.paths)


def log_of(record, step: str) -> str:
    name = next(s.log for s in record.steps if s.name == step)
    return (record.directory / name).read_text()


def statuses(record) -> list[str]:
    return [step.status for step in record.steps]


def test_the_whole_cycle(lab):
    head = lab.git("rev-parse", "HEAD")
    (lab.dev2.home / "left over").touch()
    with lab.site(STEPS) as site:
        record = run_cycle(site, stream=lab.keep)
        assert load_records(site.paths) == (record,)
    assert statuses(record) == ["passed"] * 6
    assert not (lab.dev2.home / "left over").exists()
    assert (lab.prod.home / "incoming/prod.rpm").read_text() == "one\n"
    assert (lab.prod.home / "installed").exists()
    assert (record.source.commit, record.source.subject, record.source.changed) == (head, "One", None)
    assert record.id.endswith(head[:7])
    (artifact,) = record.outputs
    assert (record.directory / artifact.path).read_text() == "one\n"
    assert artifact.sha256 == hashlib.sha256(b"one\n").hexdigest()
    assert next(s for s in record.steps if s.name == "transfer").files[0].sha256 == artifact.sha256
    archive = subprocess.run(
        ["git", "-C", lab.source, "archive", "--format=tar", head], check=True, capture_output=True
    )
    assert [f.sha256 for f in record.inputs] == [hashlib.sha256(archive.stdout).hexdigest()]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert [(vm.vm, vm.boot_id) for vm in record.vms] == [("dev2", boot), ("prod", boot)]
    dev2 = record.vms[0]
    assert (record.directory / dev2.packages).read_text().count("\n") == dev2.packages_count > 10
    assert ("dev2", b"one\n") in lab.output
    assert "one\n" in log_of(record, "build")
    assert json.loads(record.path.read_text())["result"] == "passed"
    assert oct(record.path.stat().st_mode & 0o777) == "0o644"
    assert oct(record.directory.stat().st_mode & 0o777) == "0o755"
    assert (record.directory.parent / "last").readlink() == Path(record.id)
    shares = record.guest_seconds + record.hypervisor_seconds + record.controller_seconds
    assert shares == pytest.approx(record.seconds, abs=0.01)


def test_resets_that_follow_one_another_run_side_by_side(lab):
    meet = lab.root / "meet"
    steps = [reset("dev2"), reset("prod"), run("build", "true")]
    with lab.site(steps) as site:
        path = lab.root / "farm.yaml"
        farm = json.loads(path.read_text())
        for vm, other in (("dev2", "prod"), ("prod", "dev2")):  # each waits for the other
            script = f"touch {meet}-{vm}; while [ ! -e {meet}-{other} ]; do sleep 0.02; done"
            farm["vms"][vm]["reset"] = ["/bin/sh", "-c", script]
        path.write_text(json.dumps(farm))
        with Site(load(path), reporter=site.reporter) as both:
            assert run_cycle(both).result == "passed"


def test_one_connection_a_vm_and_output_as_it_is_made(lab):
    seen = []

    def stream(vm: str, data: bytes) -> None:
        seen.append(data)
        if b"waiting" in data:
            (lab.dev2.home / "go").touch()  # before the step has ended: it waits for us

    wait = "echo waiting; while [ ! -e go ]; do sleep 0.02; done; echo $SSH_CONNECTION > 1"
    steps = [run("one", wait), run("two", ["echo $SSH_CONNECTION > 2", "cat 1 2"])]
    with lab.site(steps) as site:
        run_cycle(site, stream=stream)
    assert (lab.dev2.home / "1").read_text() == (lab.dev2.home / "2").read_text() != ""


def test_scripts_know_what_is_built(lab):
    steps = [run("show", 'echo "$FARM $BUILD_ID $GIT_REVISION $SOURCE_URL $LC_ALL"')]
    with lab.site(steps) as site:
        record = run_cycle(site)
    line = next(ln for ln in log_of(record, "show").splitlines() if ln.startswith("lab "))
    farm, build, revision, url, locale = line.split()
    assert (farm, build, revision, locale) == ("lab", record.id, lab.git("rev-parse", "HEAD"), "C.UTF-8")
    assert url.startswith("git://127.0.0.1:")
    assert url.endswith("/kata.git")


def test_the_docs_table_has_what_the_code_gives_no_more_and_no_less(lab):
    """By what a real login has without us, and with us; and the limits, as the model has them."""

    async def alone() -> str:
        async with await Connection.open(lab.dev2.endpoint()) as connection:
            return await connection.output("env")

    with lab.site([reset("dev2"), run("show", "env")]) as site:
        record = run_cycle(site)
    ours = log_of(record, "show").split("farmhand: ")[0]
    given, without = ({line.partition("=")[0] for line in text.splitlines()} for text in
                      (ours, asyncio.run(alone())))  # fmt: skip
    text = (HERE.parents[2] / "docs" / "cycle.md").read_text()
    script, _, rest = text.partition("## What a script gets\n")[2].partition("\nIn its environment")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", rest.partition("\n## ")[0], re.M))
    assert {*VARIABLES} == given - without == {name for name in rows if not name.startswith("GIT_D")}
    told = dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", script, re.M))
    assert {"shell", "user", "directory", "standard input", "output", "length", "time limit"} <= {*told}
    assert f"`{SHELL}`" in told["shell"]
    assert DIRECTORY in told["directory"].lower()
    assert f"{connections._SCRIPT_MAX} bytes" in told["length"]
    step = loads(f"{FARM}cycle:\n  steps:\n    - {{name: a, vm: b, run: x}}\n".encode(), HERE)
    assert step.cycle is not None
    (one,) = step.cycle.steps
    assert f"{one.timeout / 60:g} minutes" in told["time limit"]
    assert f"{connections._GRACE} seconds" in told["time limit"]
    limits = dict(re.findall(r"^\| `(\w+)` \| (\w+) \| ", text, re.M))
    assert limits == {
        key: format_size(most) if key.endswith("size") else str(most)
        for key, most in vars(Limits()).items()
    }


FARM = "farm: docs\ntemplates: {base: {build: debian-12}}\nvms: {b: }\n"


def test_the_whole_of_it_is_shown_before_there_are_vms(tmp_path):
    """--plan and --explain, on a farm of which nothing is made; nothing is made by them either."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "file").write_text("text\n")
    script = "\n".join(f"echo line {number}" for number in range(30))
    text = f"{FARM}hosts: {{here: {{driver: kvm}}}}\nsource: {{repository: project}}\ncycle:\n  steps:\n"
    steps = [
        {"name": "back", "reset": "b"}, {"name": "get", "checkout": "b", "into": "there"},
        {"name": "make", "vm": "b", "run": [script, "echo second \u202e"], "root": "yes"},
    ]  # fmt: skip
    for cli in command_line(tmp_path):
        cli.farm.write_text(text + "".join(f"    - {json.dumps(step)}\n" for step in steps))
        for words in (("--plan",), ("--explain",)):
            done = cli("cycle", *words)
            assert done.status == 0, done.err
            for line in (*script.split("\n"), "echo second \\u202e", "into=there"):
                assert re.search(rf"^ +{re.escape(line)}$", done.out, re.M), line
            assert "script 2 of 2" in done.out
        assert "not made yet: first ./invoke clone-farm --vm b" in cli("cycle", "--plan").out
        explained = cli("cycle", "--explain")
        assert all(name in explained.out for name in VARIABLES)
        assert "as root, by sh -eu, in the login's home; killed after 30m\n" in explained.out
        data = cli("cycle", "--explain", "--json").json
        assert [step["name"] for step in data["steps"]] == ["back", "get", "make"]
        assert data["steps"][2]["scripts"][0] == script
        planned = cli("cycle", "--plan", "--json").json
        assert script in [s for action in planned["actions"] for s in action.get("scripts", ())]
        assert not (tmp_path / "state").exists()
        assert "is not made yet" in cli("cycle").error


def test_the_source_is_checked_out_without_a_line_of_git(lab):
    first = lab.git("rev-parse", "HEAD")
    steps = [
        reset("dev2"),
        {"name": "get", "checkout": "dev2", "into": "deep/it's here", "timeout": "60s"},
        run("show", 'cat "deep/it\'s here/program"; git -C deep/* rev-parse HEAD'),
    ]
    with lab.site(steps) as site:
        record = run_cycle(site)
    assert f"echo one\n{first}\n" in log_of(record, "show")
    lab.commit("Two", program="echo two\n")
    with lab.site(steps) as site:
        record = run_cycle(site, revision="HEAD~1", start_from="get", only=("get", "show"))
    assert f"echo one\n{first}\n" in log_of(record, "show")
    for into in (".", "/", "../x", "a/.."):
        bad = [{"name": "get", "checkout": "dev2", "into": into}]
        with pytest.raises(InventoryError, match="a directory of its own is expected"):
            load(lab.farm_file(bad))
    with pytest.raises(InventoryError, match="the farm file has no 'source'"):
        load(lab.farm_file(steps, source=None))


def test_what_the_docs_say_of_a_script(lab):
    """docs/cycle.md: each variable that we set is there; its farm loads; what is said of processes."""
    text = (HERE.parents[2] / "docs" / "cycle.md").read_text()
    rows = dict(re.findall(r"^\| `?([\w ]+)`? \| (.*) \|$", text, re.M))
    steps = [
        run("show", "env; pwd; echo shell $-; cat; id -un; touch $HOME/state"),
        run("left", "test -e state; sleep 300 >/dev/null 2>&1 & echo $! > left"),
        run("ended", "sleep 300 >/dev/null 2>&1 & echo $! > ended; exit 3"),
    ]
    with lab.site(steps) as site:
        _, record = fails(site)
    lines = log_of(record, "show").splitlines()
    for name in ("SOURCE_URL", "GIT_REVISION", "BUILD_ID", "FARM", "LC_ALL"):
        assert name in rows
        assert any(line.startswith(f"{name}=") for line in lines), name
    assert {str(lab.dev2.home), lab.user} <= {*lines}
    (flags,) = [line for line in lines if line.startswith("shell ")]
    assert {"e", "u"} <= {*flags.removeprefix("shell ")}
    left, ended = (int((lab.dev2.home / name).read_text()) for name in ("left", "ended"))
    assert alive(left)
    os.kill(left, signal.SIGKILL)
    assert gone(ended)
    first, _, _ = text.partition("\n## ")
    example = "\n".join(line[4:] for line in first.splitlines() if line.startswith("    "))
    base = "farm: docs\ntemplates: {base: {build: debian-12}}\nvms: {build: , target: }\n"
    assert loads((base + example).encode(), Path("docs.yaml")).cycle is not None


def test_revisions(lab):
    first = lab.git("rev-parse", "HEAD")
    lab.git("tag", "-a", "v1", "-m", "tagged")
    lab.commit("Two", program="echo two\n")
    lab.git("checkout", "-q", "--detach")
    loose = lab.commit("Loose", program="echo loose\n")
    lab.git("checkout", "-q", "master")
    fetch = FETCH.replace("; cd src;", "; cd src; git fetch -q origin $GIT_REVISION;")
    steps = [reset("dev2"), run("fetch", fetch), run("build", "sh src/program")]
    results = []
    with lab.site(steps) as site:
        for revision in ("v1", "HEAD~1", ":/On", "master", loose[:12]):
            record = run_cycle(site, revision=revision)
            results.append((record.source.commit, record.source.changed))
        assert results[:3] == [(first, None), (first, False), (first, False)]
        assert [changed for _, changed in results[3:]] == [True, True]
        assert results[4][0] == loose
        assert "loose" in log_of(record, "build")
        with pytest.raises(NotFound, match="no revision 'mastr'") as caught:
            run_cycle(site, revision="mastr")
        assert "master" in caught.value.remedy
        for bad in ("--help", "", "a\nb"):
            with pytest.raises(UsageError):
                run_cycle(site, revision=bad)
        assert len(load_records(site.paths)) == 5


def test_uncommitted_changes_are_noted(lab):
    (lab.source / "program").write_text("echo dirty\n")
    with lab.site([run("build", "true")]) as site:
        record = run_cycle(site)
    assert any("uncommitted" in note for note in record.notes)


def test_a_plain_directory_inside_another_repository_is_built(lab):
    """As examples/kata in our own checkout."""
    inner = lab.source / "examples" / "inner"
    inner.mkdir(parents=True)
    (inner / "program").write_text("echo inner\n")
    steps = [reset("dev2"), run("fetch", FETCH), run("build", "ls src; sh src/program")]
    with lab.site(steps, source="kata/examples/inner") as site:
        one = run_cycle(site)
        again = run_cycle(site)
        assert again.source.commit == one.source.commit != lab.git("rev-parse", "HEAD")
        assert log_of(one, "build").splitlines()[:2] == ["program", "inner"]
        (inner / "program").write_text("echo changed\n")
        (inner / "__pycache__").mkdir()
        (inner / "__pycache__" / "x.pyc").touch()
        changed = run_cycle(site)
    assert changed.source.changed is True
    assert log_of(changed, "build").splitlines()[:2] == ["program", "changed"]
    assert not (inner / ".git").exists()
    assert lab.git("status", "--porcelain", "--untracked-files=no") == ""


def test_a_url_is_resolved_by_the_vm_where_this_machine_cannot(lab, tmp_path):
    """master~1 is more than ls-remote knows; the URL is one the VM reaches."""
    first = lab.git("rev-parse", "HEAD")
    lab.commit("Two", program="echo two\n")
    with subprocess.Popen(
        ["git", "daemon", "--export-all", "--listen=127.0.0.1", f"--base-path={lab.root}",
         f"--port={(port := _port())}", str(lab.root)], stderr=subprocess.DEVNULL,
    ) as daemon:  # fmt: skip
        try:
            wait_for(lambda: _listens(port))
            url = f"git://127.0.0.1:{port}/kata"
            with lab.site([reset("dev2"), run("fetch", FETCH)], source=url) as site:
                record = run_cycle(site, revision="master~1")
                assert (record.source.commit, record.source.subject) == (first, "One")
                assert run_cycle(site).source.commit == lab.git("rev-parse", "HEAD")
                error, _ = fails(site, revision="nonesuch~1")
                assert "fetch failed on dev2, source: no revision 'nonesuch~1'" in error.message
        finally:
            daemon.terminate()


def _port() -> int:
    from sshd_machine import free_port

    return free_port()


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_failure_names_step_class_lines_log_and_remedy(lab):
    build = "echo making; echo 'kata.c:3:5: error: expected ;' >&2; exit 1"
    steps = [run("first", "true"), run("build", build), run("after", "touch after")]
    with lab.site(steps) as site:
        error, record = fails(site)
        message = "step build failed on dev2, source: kata.c:3:5: error: expected ;; log: "
        assert error.message == f"{message}{record.directory}/02-build.log"
        assert "ssh --vm dev2" in spelled(error.remedy)
        assert "cycle --from build" in spelled(error.remedy)
        assert "making" in error.detail
        assert error.as_dict()["build"] == record.id
        assert statuses(record) == ["passed", "failed", "skipped"]
        assert not (lab.dev2.home / "after").exists()
        error, record = fails(site, keep_going=True)
        assert statuses(record) == ["passed", "failed", "passed"]
        assert (lab.dev2.home / "after").exists()


def test_from_and_only(lab):
    steps = [run(name, f"echo {name} >> done") for name in ("one", "two", "three")]
    done = lab.dev2.home / "done"
    with lab.site(steps) as site:
        assert statuses(run_cycle(site, start_from="two")) == ["skipped", "passed", "passed"]
        assert done.read_text().split() == ["two", "three"]
        done.unlink()
        assert statuses(run_cycle(site, only=("three", "one"))) == ["passed", "skipped", "passed"]
        assert done.read_text().split() == ["one", "three"]
        with pytest.raises(NotFound, match="no step 'tow'") as caught:
            run_cycle(site, start_from="tow")
        assert "two" in caught.value.remedy
        with pytest.raises(UsageError, match="nothing is left"):
            run_cycle(site, start_from="two", only=("one",))


def test_a_vm_that_is_not_reset_first_is_recorded_as_no_known_state(lab):
    with lab.site(STEPS) as site:
        record = run_cycle(site)
        assert {vm.vm: vm.pristine for vm in record.vms} == {"dev2": None, "prod": None}
        assert not any("not reset" in note for note in record.notes)
        notes = [a.text for a in plan_cycle(site, start_from="build") if a.verb == "note" and a.vm]
        assert notes == ["taken as it is, not reset: the record will say so"] * 2
        (lab.dev2.home / "out/prod.rpm").unlink()
        (lab.dev2.home / "out").rmdir()
        record = run_cycle(site, start_from="build")
        assert {vm.vm: vm.pristine for vm in record.vms} == {"dev2": False, "prod": False}
        assert sum("taken as it was, not reset in this build" in note for note in record.notes) == 2
    with lab.site([run("build", "true"), reset("dev2")]) as site:
        assert run_cycle(site).vms[0].pristine is False, "reset only after it was built on"


def test_a_whole_cycle_resets_what_it_builds_on(lab):
    """Where the disk is ours to prove; what an ssh host's machine holds nobody can tell."""
    path = lab.farm_file([reset("box"), run("build", "true")])
    farm = json.loads(path.read_text())
    farm["hosts"]["here"] = {"driver": "fake"}
    farm["templates"] = {"base": {"build": "debian-12"}}
    farm["vms"]["box"] = {"host": "here", "address": "127.0.0.1", "ssh_port": "2"}
    carry = {"name": "carry", "transfer": "a", "from": "dev2", "to": "box", "into": "."}
    farm["cycle"]["steps"] = [run("first", "true"), carry]
    path.write_text(json.dumps(farm))
    with Site(load(path), reporter=lab.told) as site:
        clone_farm(site, ["box"])
        for whole in (run_cycle, plan_cycle):
            with pytest.raises(UsageError, match="carry uses box before the cycle resets it") as caught:
                whole(site)
            assert "cycle --from first" in spelled(caught.value.remedy)


@pytest.mark.parametrize("lacks", ["its disk is gone", "box has no checkpoint 'tools'"])
def test_what_a_reset_needs_is_looked_at_before_any(lab, lacks):
    lost = "disk" in lacks
    path = lab.farm_file([reset("dev2"), {**reset("box"), "to": "clean" if lost else "tools"}])
    farm = json.loads(path.read_text())
    farm["hosts"]["here"] = {"driver": "fake"}
    farm["templates"] = {"base": {"build": "debian-12"}}
    farm["vms"]["box"] = {"host": "here"}
    path.write_text(json.dumps(farm))
    with Site(load(path), reporter=lab.told) as site:
        clone_farm(site, ["box"], start=False)
        if lost:
            with site.disks("here").store.change() as world:
                del world.disks[Member(site, "box").machine]
        for whole in (run_cycle, plan_cycle):
            with pytest.raises(NotFound, match=lacks):
                whole(site)
        assert load_records(site.paths) == ()


def test_nothing_is_built_on_a_vm_whose_reset_failed(lab):
    steps = [reset("dev2"), run("build", "touch built"), run("other", "touch other", vm="prod")]
    path = lab.farm_file(steps)
    farm = json.loads(path.read_text())
    farm["vms"]["dev2"]["reset"] = ["/bin/false"]
    path.write_text(json.dumps(farm))
    with Site(load(path), reporter=lab.told) as site:
        for keep_going, expected in ((False, "skipped"), (True, "failed")):
            _, record = fails(site, keep_going=keep_going)
            assert statuses(record)[:2] == ["failed", expected]
            assert not (lab.dev2.home / "built").exists()
            assert record.vms[0].pristine is False
        assert "its reset failed" in record.steps[1].message
        assert (lab.prod.home / "other").exists(), "another VM is built on: --keep-going"


def test_a_disk_that_is_not_its_checkpoint_is_not_built_on(lab, monkeypatch):
    """The store's word is what counts: here it swaps the disk, and something has written to it since."""
    steps = [reset("box"), run("build", "touch built")]
    path = lab.farm_file(steps)
    farm = json.loads(path.read_text())
    farm["hosts"]["here"] = {"driver": "fake"}
    farm["templates"] = {"base": {"build": "debian-12"}}
    farm["vms"]["box"] = {"host": "here", "address": "127.0.0.1", "ssh_port": "2"}
    path.write_text(json.dumps(farm))
    with Site(load(path), reporter=lab.told) as site:
        clone_farm(site, ["box"])
        restored = FakeDisks.restore_all

        def written_to(self, machines, name):
            disks = restored(self, machines, name)
            self.write(machines[0], b"by somebody")
            return disks

        monkeypatch.setattr(FakeDisks, "restore_all", written_to)
        error, record = fails(site)
        assert "isn't provably checkpoint clean: not started" in error.message
        assert statuses(record) == ["failed", "skipped"]
        assert {vm.vm: vm.pristine for vm in record.vms}["box"] is False
        assert Member(site, "box").driver.find("lab-box").power == "stopped"
        assert not (lab.dev2.home / "built").exists()


def test_a_time_limit_ends_the_step_and_what_it_started(lab):
    script = "sleep 300 & echo $! > pid; echo begun; wait"
    limit = "5s"  # on a busy machine a step's first word takes more than one
    with lab.site([{**run("slow", script), "timeout": limit}]) as site:
        error, record = fails(site)
    assert (record.steps[0].failure, record.steps[0].exit) == ("time-out", 124)
    assert "within its limit of 5.0s" in error.message
    assert "begun" in log_of(record, "slow")
    assert gone(int((lab.dev2.home / "pid").read_text()))


def test_a_lost_vm_leaves_the_partial_log(lab):
    def stream(vm: str, data: bytes) -> None:
        if b"halfway" in data:
            lab.dev2.stop()

    with lab.site([run("build", "echo halfway; sleep 300"), run("more", "true", vm="prod")]) as site:
        error, record = fails(site, stream=stream, keep_going=True)
    assert record.steps[0].failure == "infrastructure"
    assert "dev2: the ssh connection to" in error.message
    assert "console --vm dev2" in spelled(error.remedy)
    assert Call("ssh", vm="dev2") not in calls_in(error.remedy)
    assert "halfway" in log_of(record, "build")
    assert record.steps[1].status == "passed"


def test_missing_artifacts_and_files_are_the_sources_fault(lab):
    carry = {"name": "carry", "transfer": "nothing*", "from": "dev2", "to": "prod", "into": "in"}
    with lab.site([run("build", "true", artifacts="out/*.rpm"), carry]) as site:
        _, record = fails(site, keep_going=True)
    assert [(s.failure, s.status) for s in record.steps] == [("source", "failed")] * 2
    assert "no file matches out/*.rpm" in record.steps[0].message


def test_artifacts_of_one_name_are_kept_apart(lab):
    steps = [run(n, f"echo {n} > result", artifacts="result") for n in ("one", "two")]
    with lab.site(steps) as site:
        record = run_cycle(site)
    assert [file.path for file in record.outputs] == ["artifacts/result", "artifacts/two/result"]
    assert (record.directory / record.outputs[1].path).read_text() == "two\n"


def test_a_stranger_is_an_infrastructure_failure(lab):
    with lab.site([run("build", "true")]) as site:
        run_cycle(site)
        known = Path(Member(site, "dev2").endpoint().key).parent / "known_hosts"
        mine, other = lab.dev2.host_key.split()[1], lab.prod.host_key.split()[1]
        known.write_text(known.read_text().replace(mine, other))
        error, record = fails(site)
    assert "somebody else answers" in error.message
    assert record.steps[0].failure == "infrastructure"


def test_the_plan_is_what_the_run_does_and_does_nothing(lab):
    with lab.site(STEPS, plan=True) as site:
        lines = plan_cycle(site)
    named = [a.text.split(":")[0] for a in lines if a.verb in ("reset", "run", "transfer")]
    assert named == [step["name"] for step in STEPS]
    assert lines[0].text.startswith(f"build {lab.source} at {lab.git('rev-parse', 'HEAD')[:10]} (One)")
    assert not (lab.root / "state").exists()
    with lab.site(STEPS) as site:
        assert perform(site, RunCycle()).actions == lines


CHILD = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import cli.composition
from cycle_farm import run_cycle
from inventory.errors import FarmhandError, spelled
from inventory.loader import load, loads
from provision.engine.report import QuietReporter
from provision.site import Site
with Site(load(Path(sys.argv[1])), reporter=QuietReporter()) as site:
    try:
        run_cycle(site)
    except FarmhandError as error:
        print(type(error).__name__, error.message, "//", spelled(error.remedy))
        sys.exit(error.ending.status)
"""


def start_child(lab: Lab, steps: list[dict], *, before: str = "") -> subprocess.Popen:
    """``before``: what a shell does first."""
    script = CHILD.format(root=str(HERE.parents[2]), tests=str(HERE.parent))
    return subprocess.Popen(
        ["sh", "-c", f'{before}\nexec "$@"', "sh", sys.executable, "-c", script, lab.farm_file(steps)],
        stdout=subprocess.PIPE, env=environment(lab.root), text=True,
    )  # fmt: skip


SLOW = [
    run("one", "true"),
    run("slow", "sleep 300 & echo $! > pid; mv pid ready; wait"),
    run("two", "true"),
]


def ready_pid(lab: Lab) -> int:
    ready = lab.dev2.home / "ready"
    return int(wait_for(lambda: ready.exists() and ready.read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(lab, number):
    child = start_child(lab, SLOW)
    pid = ready_pid(lab)
    child.send_signal(number)
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "Interrupted interrupted at step slow" in output
    assert "cycle --from slow" in output
    assert gone(pid)
    with lab.site(SLOW) as site:
        record = find_record(site.paths)
        assert json.loads(record.path.read_text())["result"] == record.result == "interrupted"
        assert statuses(record) == ["passed", "interrupted", "skipped"]
        assert site.locks.held() == ()


def test_signals_that_are_ignored_do_not_interrupt(lab):
    child = start_child(lab, SLOW, before='trap "" INT TERM')
    pid = ready_pid(lab)
    for number in (signal.SIGINT, signal.SIGTERM):
        child.send_signal(number)
    os.kill(pid, signal.SIGTERM)  # what the step waits for
    output, _ = child.communicate(timeout=60)
    assert (child.returncode, output) == (0, "")


def test_killed(lab):
    child = start_child(lab, SLOW)
    pid = ready_pid(lab)
    with lab.site(SLOW) as site:
        assert find_record(site.paths).result == "running"
        pages = [site.paths.builds / "index.html", site.paths.root / "pages/index.html"]
        wait_for(lambda: all(page.exists() for page in pages))  # of all builds, while it runs
        assert all('class="state running"' in page.read_text() for page in pages)
        with pytest.raises(Busy, match=rf"a cycle is running already: pid {child.pid} of .*: cycle"):
            run_cycle(site)
        child.kill()
        child.wait()
        record = find_record(site.paths)
        assert json.loads(record.path.read_text())["result"] == "running"
        assert (record.result, statuses(record)) == ("interrupted", ["passed", "interrupted", "skipped"])
        assert gone(pid)  # the guest noticed
        assert run_cycle(site, only=("one",)).result == "partial"
        for page in pages:
            assert "state interrupted" in page.read_text() and "state running" not in page.read_text()
        assert "interrupted" in record.page.read_text() and "http-equiv" not in record.page.read_text()
    child.stdout.close()


def test_a_vm_in_use_is_left_alone(lab):
    with lab.site(STEPS) as site, lab.site(STEPS) as other:
        hold = other.locks.hold("vm-prod", doing="reset prod")
        with hold, pytest.raises(Busy, match="prod is held by"):
            run_cycle(site)
        assert load_records(site.paths) == ()


def test_the_page_is_self_contained_and_escapes(lab):
    steps = [run("build", "echo '<script>alert(1)</script>'; printf '\\033[31mred\\033[0m\\n'; exit 3")]
    lab.commit("<b>Subject</b> & more")
    with lab.site(steps) as site:
        _, record = fails(site)
    page = record.page.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;b&gt;Subject&lt;/b&gt; &amp; more" in page
    assert "\x1b" not in page
    assert "red" in page
    assert "http" not in page.replace("http-equiv", "")
    assert 'href="01-build.log"' in page


def test_only_a_key_file_of_ours_is_used(lab):
    """An agent in the environment is not asked."""
    os.environ["SSH_AUTH_SOCK"] = "/nonexistent/agent"
    try:
        with lab.site([run("build", "true")]) as site:
            assert run_cycle(site).result == "passed"
    finally:
        del os.environ["SSH_AUTH_SOCK"]


# -- accounts and servers ------------------------------------------------------------------------


@pytest.fixture
def labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in environment(tmp_path).items():
        if name.startswith("FARMHAND_"):
            monkeypatch.setenv(name, value)
    made: list[Lab] = []

    def make(**machines) -> Lab:
        made.append(Lab(tmp_path, **machines))
        return made[-1]

    yield make
    for laboratory in made:
        laboratory.stop()


def test_where_nothing_but_commands_is_allowed_all_is_carried_by_them(labs):
    """No SFTP, no forwarding, one session at a time, and a login that prints."""
    poor = {"shell": "/bin/bash", "sftp": False, "forwarding": False, "options": ("MaxSessions 1",)}
    lab = labs(dev2=poor, prod=poor)
    steps = [
        run("login", "echo 'echo -- authorised use only --' > ~/.bashrc"),
        run("fetch", FETCH),
        run("build", "mkdir out; sh src/program > out/prod.rpm", artifacts="out/*.rpm"),
        run("look", 'echo "$SOURCE_URL"; ls -A'),
        STEPS[4],
    ]
    with lab.site(steps) as site:
        record = run_cycle(site)
    assert (record.directory / "artifacts/prod.rpm").read_text() == "one\n"
    assert (lab.prod.home / "incoming/prod.rpm").read_text() == "one\n"
    assert any("dev2: its sshd forwards no ports" in note and "carried" in note for note in record.notes)
    assert f"file://{lab.dev2.home}/.farmhand-source-" in log_of(record, "look")
    assert not list(lab.dev2.home.glob(".farmhand-source-*"))
    assert not list(record.directory.glob(".*"))
    packages = (record.directory / record.vms[0].packages).read_text()
    assert "bash " in packages
    assert "authorised" not in packages


def test_what_an_account_lacks_is_known_before_the_build_begins(labs):
    lab = labs(prod={"shell": "/usr/sbin/nologin"})
    steps = [run("build", "touch built"), {**STEPS[4], "transfer": ["built"]}]
    with lab.site(steps) as site:
        error, record = fails(site)
    assert not (lab.dev2.home / "built").exists()
    assert statuses(record) == ["failed", "skipped"]
    assert "prod: its login runs no commands: it says: This account is currently" in error.message
    assert spelled(error.remedy).startswith("see docs/logins.md: a shell that runs `sh -c`")
    assert "cycle --from build" in spelled(error.remedy)
    step = record.failed_step
    assert step is not None
    assert error.remedy[0] == step.remedy and step.remedy
    assert step.remedy.partition("`")[0] in record.page.read_text()


def test_where_a_copy_can_not_be_carried_either_the_remedy_is_told(labs, tmp_path):
    applets = tmp_path / "applets"
    applets.mkdir()
    for name in ("sh", "cat", "date", "kill", "ls", "mkdir", "mktemp", "mv", "rm", "setsid", "sha256sum",
                 "sleep", "wc"):  # fmt: skip
        tool = which(name)
        assert tool
        (applets / name).symlink_to(tool)
    lab = labs(dev2={"shell": "/bin/bash", "forwarding": False, "environment": {"PATH": str(applets)}})
    with lab.site([run("fetch", FETCH)]) as site:
        error, _ = fails(site)
    assert "dev2: a command failed with 127: " in error.message
    assert "tar: not found" in error.message
    assert "AllowTcpForwarding yes" in spelled(error.remedy)
    assert not list(lab.dev2.home.glob(".farmhand-source-*"))
