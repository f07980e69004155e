"""Steps use and publish, and cycle --like: real sshds, a real apt with directories of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cli_farm import ROOT
from cycle_farm import FETCH, Lab, environment, plan_cycle, reset, run, run_cycle
from repo_tree import make_deb
from sshd_machine import Sshd, wait_for

from builds.record import find_record, load_records
from inventory.errors import BuildFailed, Call, FarmhandError, InventoryError, NotFound
from inventory.loader import load, loads
from provision.engine.runner import perform
from provision.operations.repositories import RepoAdd, RepoRemove
from provision.operations.repository_upkeep import RepoGc
from provision.package_repositories import opened
from provision.site import Site
from repositories.change import changing
from repositories.collect import Retention, collect, survey
from repositories.leases import leases
from repositories.repository import Repository
from tests.apt_machine import AptMachine
from tests.rpms import rpm

# What the "VM" builds: a package of the version that the source says.
BUILD = """
export SOURCE_DATE_EPOCH=1
mkdir -p tree/DEBIAN tree/usr/share/hello out
cp src/program tree/usr/share/hello/program
printf 'Package: hello\\nVersion: %s\\nArchitecture: all\\nMaintainer: A <a@example.org>\\n' \
  "$(cat src/version)" >tree/DEBIAN/control
echo 'Description: hello' >>tree/DEBIAN/control
dpkg-deb --root-owner-group -b tree "out/hello_$(cat src/version)_all.deb"
"""
KNOWN = "apt-cache policy hello base | grep -E '^[a-z]|Candidate'"


class RepoLab(Lab):
    """Its dev2 has an apt of its own. ``url``: of its repository; None: there is none."""

    url: str | None = None
    retest = "yes"
    format = "deb"

    def farm_file(self, steps: list[dict], **changes) -> Path:
        path = super().farm_file(steps, **changes)
        farm = json.loads(path.read_text())
        section = {"format": self.format, "channels": ["experimental", "tested"], "retest": self.retest}
        farm["repositories"] = {"debs": {**section, **({"url": self.url} if self.url else {})}}
        path.write_text(json.dumps(farm, indent=1))
        return path

    def add(self, site: Site, name: str, version: str = "1.0", channel: str = "tested") -> int:
        path = self.root / f"{name}_{version}_all.deb"
        path.write_bytes(make_deb(name, version))
        return perform(site, RepoAdd("debs", channel, (path,))).result.generation

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The real command line."""
        argv = [sys.executable, "-P", ROOT / "cli" / "start.py", "--search-root", str(ROOT), *words]
        env = {**environment(self.root), "FARMHAND_FARM": str(self.root / "farm.yaml")}
        done = subprocess.run(
            argv, env=env, cwd=self.root, capture_output=True, text=True, timeout=120, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RepoLab]:
    for name, value in environment(tmp_path).items():
        if name.startswith("FARMHAND_"):
            monkeypatch.setenv(name, value)
    apt = AptMachine(tmp_path / "apt")
    made = RepoLab(tmp_path, dev2={"environment": {"APT_CONFIG": str(apt.top / "apt.conf")}})
    made.commit("Version", version="2.0\n")
    yield made
    made.stop()


def use(name: str = "use", **more: str) -> dict:
    return {"name": name, "use": "debs", "vm": "dev2", "timeout": "60s", **more}


def publish(name: str = "publish", **more: str) -> dict:
    return {"name": name, "publish": "debs", "timeout": "60s", **more}


MAKE = [reset("dev2"), run("fetch", FETCH), run("build", BUILD, artifacts="out/*.deb")]


def log_of(record, step: str) -> str:
    name = next(s.log for s in record.steps if s.name == step)
    return (record.directory / name).read_text()


def held(repository: Repository) -> set[tuple[str, int]]:
    return {(lease.holder, lease.generation) for lease in leases(repository.layout)}


def failed(site: Site, **options):
    with pytest.raises(BuildFailed) as caught:
        run_cycle(site, **options)
    return caught.value, find_record(site.paths)


def test_what_is_built_is_published_and_installed(lab: RepoLab) -> None:
    steps = [*MAKE, publish(channel="experimental"), use(channel="experimental"), run("know", KNOWN)]
    with lab.site(steps) as site:
        repository = opened(site.farm)
        record = run_cycle(site)
        head = repository.head("experimental")
        assert head
        (package,) = repository.packages(head)
        assert (package.name, package.version, package.build) == ("hello", "2.0", record.id)
        assert record.outputs[0].sha256 == package.sha256
        (used,) = record.repositories
        assert (used.repository, used.channel, used.generation) == (
            "debs",
            "experimental",
            head.sequence,
        )
        assert (used.vm, used.step, used.url) == ("dev2", "use", "")
        assert "hello:\n  Candidate: 2.0\n" in log_of(record, "know")
        assert f"publish of {record.id}" not in log_of(record, "publish")
        assert "hello 2.0 all" in log_of(record, "publish")
        assert held(repository) == set()
        assert load_records(site.paths) == (record,)
        assert "debs</dt><dd>generation 1 of experimental, by dev2 in use" in record.page.read_text()
        again = run_cycle(site)
        assert again.repositories[0].generation == head.sequence, "the very same files: kept"
        planned = [str(action) for action in plan_cycle(site)]
    assert any("publish: what was fetched, to debs's experimental" in line for line in planned)
    shown = lab.command("log")
    assert "dev2 used generation 1 of debs's experimental" in shown.stdout


def test_all_of_a_build_use_what_was_there_when_it_began(lab: RepoLab) -> None:
    steps = [use("one", channel="tested"), run("wait", "echo now"), use("two", channel="tested"),
             run("know", KNOWN)]  # fmt: skip
    numbers = []
    with lab.site(steps) as site:
        numbers.append(lab.add(site, "hello", "1.0"))
        repository = opened(site.farm)
        seen = []

        def stream(_vm: str, data: bytes) -> None:
            if b"now" in data:
                seen.append(held(repository))
                with Site(site.farm, reporter=site.reporter) as other:
                    numbers.append(lab.add(other, "hello", "1.1"))

        record = run_cycle(site, start_from="one", stream=stream)
        assert numbers == [1, 2]
        assert [used.generation for used in record.repositories] == [1, 1]
        assert "Candidate: 1.0" in log_of(record, "know")
        assert seen == [{(f"build {record.id}", 1)}], "kept meanwhile"
        assert held(repository) == set()
        assert run_cycle(site, start_from="one").repositories[0].generation == 2
        _collect(repository, site)
        assert {1, 2} <= set(repository.documents.sequences()), "their records keep them"


def _collect(repository: Repository, site: Site, *, records: bool = True) -> None:
    """As repo-gc does, of all that it may."""
    pinned = {u.generation: "used" for r in load_records(site.paths) for u in r.repositories}
    with changing(repository) as change:
        now = datetime.max.replace(tzinfo=UTC)
        collect(change, survey(repository, Retention(1, 0), now, pinned if records else {}))


def test_sources_of_other_builds_go_and_all_others_stay(lab: RepoLab) -> None:
    lists = lab.root / "apt/etc/apt/sources.list.d"
    (lists / "farmhand-old.sources").write_text("# farmhand: build 1\nTypes: deb\n")
    (lists / "admin.sources").write_text("# nothing yet\n")
    (lists / "farmhand.list").write_text("# nothing either\n")
    with lab.site([use(channel="tested"), run("know", KNOWN)]) as site:
        lab.add(site, "base")
        run_cycle(site, start_from="use")
    assert {path.name for path in lists.iterdir()} == {
        "admin.sources", "farmhand.list", "farmhand-debs.sources",
    }  # fmt: skip


def test_a_build_that_was_killed_gives_its_leases_back(lab: RepoLab) -> None:
    steps = [use(channel="tested"), run("slow", "touch ready; sleep 300")]
    with lab.site(steps) as site:
        lab.add(site, "base")
        repository = opened(site.farm)
        argv = [sys.executable, "-P", ROOT / "cli" / "start.py", "--search-root", str(ROOT)]
        child = subprocess.Popen(
            [*argv, "cycle", "--from", "use"], cwd=lab.root, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**environment(lab.root), "FARMHAND_FARM": str(lab.root / "farm.yaml")},
        )  # fmt: skip
        wait_for((lab.dev2.home / "ready").exists)
        child.kill()
        child.wait()
        record = find_record(site.paths)
        assert held(repository) == {(f"build {record.id}", 1)}, "a kill takes nothing away"
        assert [used.generation for used in record.repositories] == [1], "and its record keeps it"
        perform(site, RepoGc("debs", {}))
        assert held(repository) == set()


def test_a_failed_build_gives_its_leases_back(lab: RepoLab) -> None:
    with lab.site([use(channel="tested"), run("bad", "exit 3")]) as site:
        lab.add(site, "base")
        _, record = failed(site, start_from="use")
        assert len(record.repositories) == 1
        assert held(opened(site.farm)) == set()


def test_a_build_that_goes_on_has_what_its_vm_was_pointed_to(lab: RepoLab) -> None:
    with lab.site([reset("dev2"), use(channel="tested"), run("test", "test -e ok")]) as site:
        lab.add(site, "base")
        _, first = failed(site)
        lab.add(site, "more")
        (lab.dev2.home / "ok").touch()
        later = run_cycle(site, start_from="test")
        assert later.repositories == first.repositories
        assert later.repositories[0].generation == 1
        assert any("begin with step use where it is needed" in note for note in later.notes)
        assert run_cycle(site, start_from="test").repositories == first.repositories


def test_nothing_is_published_of_a_build_that_failed(lab: RepoLab) -> None:
    steps = [*MAKE, run("test", "exit 1"), publish(channel="experimental")]
    with lab.site(steps) as site:
        _, record = failed(site, keep_going=True)
        assert [step.status for step in record.steps][-2:] == ["failed", "failed"]
        assert record.steps[-1].message == "step test failed: nothing is published"
        assert not opened(site.farm).exists


def test_like_an_earlier_build(lab: RepoLab) -> None:
    steps = [*MAKE[:2], use(channel="tested"), run("know", f"{KNOWN}; cat src/version")]
    with lab.site(steps) as site:
        lab.add(site, "base", "1.0")
        first = run_cycle(site)
        lab.commit("Later", version="3.0\n")
        lab.add(site, "base", "1.1")
        second = run_cycle(site)
        assert second.repositories[0].generation == 2
        again = run_cycle(site, like=first.id)
        assert again.repositories[0].generation == first.repositories[0].generation == 1
        assert again.source.commit == first.source.commit
        assert "base:\n  Candidate: 1.0\n" in log_of(again, "know")
        assert log_of(again, "know").count("\n2.0\n") == 1
        assert again.asked == Call("cycle", like=first.id)
        assert any(f"like build {first.id}" in note for note in again.notes)
        perform(site, RepoRemove("debs", "tested", ("base=1.1",)))
        with pytest.raises(NotFound, match="no build 'nope'"):
            run_cycle(site, like="nope")
        _collect(opened(site.farm), site, records=False)
        with pytest.raises(NotFound) as caught:
            run_cycle(site, like=first.id)
        gone = f"build {first.id} used generation 1 of debs, which is gone: it can't be done again on"
        assert gone in caught.value.message
        assert len(load_records(site.paths)) == 3, "refused before anything was done"


def test_a_run_like_another_publishes_nothing(lab: RepoLab) -> None:
    steps = [*MAKE, publish(channel="experimental"), use(channel="experimental"), run("know", KNOWN)]
    with lab.site(steps) as site:
        first = run_cycle(site)
        lab.commit("Later", version="3.0\n", program="other\n")
        run_cycle(site)
        again = run_cycle(site, like=first.id)
        assert again.repositories[0].generation == 1
        assert "Candidate: 2.0" in log_of(again, "know")
        assert opened(site.farm).documents.head("experimental") == 2


def test_what_contradicts_the_repository_is_the_sources_fault(lab: RepoLab) -> None:
    steps = [*MAKE, publish(channel="experimental")]
    with lab.site(steps) as site:
        run_cycle(site)
        lab.commit("Another", program="echo another\n")
        error, record = failed(site)
        step = record.failed_step
        assert step
        assert (step.name, step.failure, step.vm) == ("publish", "source", "")
        assert "there is another hello 2.0 all in debs already: they differ in" in step.message
        assert error.message.startswith("step publish failed, source: hello_2.0_all.deb: ")
        assert record.page.read_text()
    with lab.site([run("bad", "mkdir -p out; echo no >out/bad_1_all.deb", artifacts="out/*.deb"),
                   publish(channel="experimental")]) as site:  # fmt: skip
        _, record = failed(site, start_from="bad")
        assert record.failed_step
        assert record.failed_step.failure == "source"
    with lab.site([run("none", "true"), publish(channel="experimental")]) as site:
        _, record = failed(site, start_from="none")
        assert record.failed_step
        assert "no step of this build has fetched a .deb file" in record.failed_step.message


def test_what_is_not_there_is_told_before_anything_is_done(lab: RepoLab) -> None:
    def refused(*steps: dict) -> FarmhandError:
        with lab.site(list(steps)) as site, pytest.raises(FarmhandError) as caught:
            plan_cycle(site, start_from=steps[0]["name"])
        assert load_records(site.paths) == ()
        return caught.value

    assert "nothing was published in debs yet" in refused(use(channel="tested")).message
    with lab.site([use(channel="tested")]) as site:
        lab.add(site, "base")
    assert "debs has no flow new: it has none" in refused(use(flow="new")).message
    assert "nothing was published in debs's channel experimental yet" in refused(
        use(channel="experimental")).message  # fmt: skip
    for step, words in (
        (use(), "a step uses a 'channel' or a 'flow', one of them"),
        (use(channel="tested", flow="x"), "a step uses a 'channel' or a 'flow', one of them"),
        (use(channel="released"), "repository debs has no channel released"),
        ({**use(channel="tested"), "use": "rpms"}, "no repository is called rpms"),
        (publish(), "a step publishes to a 'channel' or to a 'flow'"),
        (publish(flow="x", channel="released"), "debs has no channel released"),
    ):
        with pytest.raises(InventoryError) as wrong:
            load(lab.farm_file([step]))
        assert words in str(wrong.value)


def test_a_vm_that_forwards_no_ports_needs_a_url(lab: RepoLab) -> None:
    lab.dev2.stop()
    config = lab.dev2.root / "config"
    config.write_text(config.read_text().replace("AllowTcpForwarding yes", "AllowTcpForwarding no"))
    lab.dev2.start()
    with lab.site([use(channel="tested")]) as site:
        lab.add(site, "base")
        error, record = failed(site, start_from="use")
        assert "its sshd forwards no ports" in error.message
        assert record.failed_step
        assert "give the repository a 'url' that the VM reaches" in str(record.failed_step.remedy)
    lab.url = "http://127.0.0.1:9/debs"
    with lab.site([use(channel="tested")]) as site:
        error, record = failed(site, start_from="use")
        assert record.failed_step
        assert record.failed_step.failure == "infrastructure"
        assert "dev2 does not take http://127.0.0.1:9/debs/generations/1/" in error.message
        assert record.repositories[0].url == "http://127.0.0.1:9/debs/generations/1/"


def test_a_lost_connection_is_offered_the_same_port_again(lab: RepoLab) -> None:
    steps = [use(channel="tested"), run("cut", "echo now; sleep 60"), run("know", "sleep 1"),
             run("read", "apt-get update -q -o APT::Update::Error-Mode=any")]  # fmt: skip
    with lab.site(steps) as site:
        lab.add(site, "base")

        def stream(_vm: str, data: bytes) -> None:
            if b"now" in data:
                lab.dev2.cut()

        with pytest.raises(BuildFailed):
            run_cycle(site, start_from="use", keep_going=True, stream=stream)
        record = find_record(site.paths)
        ends = {step.name: step.status for step in record.steps}
        assert ends["cut"] == "failed"
        assert ends["read"] == "passed", log_of(record, "read")


class DnfMachine(Sshd):
    """Its logins have an /etc, and a dnf, of their own."""

    def enclosed(self) -> list[str]:
        script = """
            own=$1 && shift
            mkdir "$own/etc" "$own/cache" "$own/lib"
            cp -a /etc/. "$own/etc"
            mkdir -p "$own/etc/yum.repos.d"
            cp "$own/passwd" "$own/etc/passwd"
            mount --bind "$own/etc" /etc
            mount --bind "$own/cache" /var/cache/dnf
            mount --bind "$own/lib" /var/lib/dnf
            exec "$@"
        """
        return ["unshare", "--mount", "sh", "-euc", script, "sh", str(self.root), *self.command()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a dnf another /etc here")
def test_rpms_for_a_dnf(lab: RepoLab) -> None:
    lab.dev2.stop()
    lab.dev2 = DnfMachine("dev2", lab.root / "dnf", lab.root / "key", shell="/bin/sh").prepare().start()
    repos = lab.dev2.root / "etc/yum.repos.d"
    (repos / "farmhand-old.repo").write_text("# farmhand: build 1\n[old]\nbaseurl=http://127.0.0.1:9/\n")
    lab.format = "rpm"
    know = "dnf -q repoquery --disablerepo='*' --enablerepo=debs-tested --qf '%{name} %{version}'"
    with lab.site([use(channel="tested"), run("know", know)]) as site:
        perform(site, RepoAdd("debs", "tested", (rpm(),)))
        record = run_cycle(site, start_from="use")
    assert "hello 1.0" in log_of(record, "know")
    assert [path.name for path in repos.iterdir()] == ["farmhand-debs.repo"]


def test_two_flows_one_passes_and_one_is_halved(lab: RepoLab) -> None:
    """By the command line: a cycle tests each; the verdict is its record's."""
    test = "apt-cache pkgnames | sort | tee known; ! grep -qx p2 known"
    steps = [use(flow="batch"), run("test", test)]
    lab.farm_file([use(flow="single"), run("test", test)])
    for name in ("base", "p0", "p1", "p2", "p3", "extra"):
        (lab.root / f"{name}_1.0_all.deb").write_bytes(make_deb(name))

    def done(*words: str, status: int = 0) -> str:
        said = lab.command(*words)
        assert said.returncode == status, said.stdout + said.stderr
        return said.stdout + said.stderr

    def file(name: str) -> str:
        return str(lab.root / f"{name}_1.0_all.deb")

    done("repo-add", "--channel", "tested", "--path", file("base"))
    done("flow-begin", "--flow", "single", "--path", file("extra"))
    batch = [word for n in range(4) for word in ("--path", file(f"p{n}"))]
    done("flow-begin", "--flow", "batch", *batch)
    done("cycle", "--from", "use")
    planned = done("flow-pass", "--flow", "single", "--build", "last", "--plan")
    assert "flow single: tested gets 1 package" in planned
    assert "flow single passed: tested is generation 4 now" in done(
        "flow-pass", "--flow", "single", "--build", "last")  # fmt: skip
    lab.farm_file(steps)
    done("cycle", "--from", "use", status=3)
    said = done("flow-pass", "--flow", "batch", "--build", "last", status=1)
    assert "did not pass, so it passes no flow" in said
    assert "flow-bisect --flow batch" in said
    runs = 0
    while "goes on without" not in (said := done("flow-bisect", "--flow", "batch", "--build", "last")):
        runs += 1
        bad = lab.command("cycle", "--from", "use").returncode
        assert bad in (0, 3)
    assert "p2 1.0 all fails; it goes on without" in said
    assert runs <= 2 + 1, "ceil(log2 4) more, and one that tries it alone"
    stale = done("flow-pass", "--flow", "batch", "--build", "last", status=1)
    assert "did not test generation" in stale
    done("cycle", "--from", "use")
    moved = done("flow-pass", "--flow", "batch", "--build", "last", status=1)
    assert "tested moved to generation 4 meanwhile: flow batch was put onto that" in moved
    assert "is to be tested again on generation" in moved
    done("cycle", "--from", "use")
    done("flow-pass", "--flow", "batch", "--build", "last")
    listed = json.loads(done("repo-list", "--which", "tested", "--json"))
    assert [p["name"] for p in listed["packages"]] == ["base", "extra", "p0", "p1", "p3"]
    shown = json.loads(done("flow-show", "--flow", "batch", "--json"))
    assert (shown["state"], [p["name"] for p in shown["fail"]]) == ("passed", ["p2"])
    assert {vm for one in shown["runs"] for vm in one["vms"]} == {"dev2"}
    assert all(one["build"] for one in shown["runs"])
    assert "all is right" in done("repo-fsck")
    assert "no flow is open" in done("flow-list")
    assert "passed" in done("flow-list", "--over")


def test_the_farm_of_the_docs(tmp_path: Path) -> None:
    text = (ROOT / "docs/repositories.md").read_text().partition("## In the cycle")[2]
    example = text.partition("```yaml\n")[2].partition("```")[0]
    cycle = loads(example.encode(), tmp_path / "docs.yaml").cycle
    assert cycle
    assert {"use", "publish"} <= {step.KIND for step in cycle.steps}


def test_a_cycle_publishes_to_a_flow_and_tests_it(lab: RepoLab) -> None:
    steps = [*MAKE, publish(flow="next"), use(flow="next"), run("know", KNOWN)]
    with lab.site(steps) as site:
        lab.add(site, "base")
        record = run_cycle(site)
        flow = opened(site.farm).flows.open("next")
        assert (flow.channel, flow.base, flow.candidate) == ("tested", 1, 2)
        assert record.repositories[0].generation == 2
        assert "base:\n  Candidate: 1.0\n" in log_of(record, "know")
        assert "hello:\n  Candidate: 2.0\n" in log_of(record, "know")
        assert held(opened(site.farm)) == {("flow next", 1), ("flow next", 2)}
        lab.commit("Later", version="3.0\n")
        later = run_cycle(site)
        assert later.repositories[0].generation == 3
        assert "hello:\n  Candidate: 3.0\n" in log_of(later, "know")
    assert "flow next passed" in lab.command("flow-pass", "--flow", "next", "--build", "last").stdout
