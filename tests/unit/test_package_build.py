"""`build`: many packages, in their order, side by side, and only those that changed: real git, sshds,
apt, dpkg and a real repository (``package_lab``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from builds.packages.operation import BUILD_PACKAGES, PackageRunFacts
from inventory.errors import BuildFailed, FarmhandError, Interrupted, NotFound
from provision.package_repositories import opened
from tests import farm
from tests.unit.cycle_farm import environment
from tests.unit.package_lab import PackageLab, PlainFormat, stand_in

USES = 'deb {0} "{0} with $(text_of {1})"\n'


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageLab]:
    for name, value in environment(tmp_path).items():
        if name.startswith("FARMHAND_"):
            monkeypatch.setenv(name, value)
    stand_in(monkeypatch)
    made = PackageLab(tmp_path)
    yield made
    made.stop()


def chain(lab: PackageLab) -> None:
    """libfoo <- tool <- suite, and lone."""
    lab.source("libfoo")
    lab.source("tool", USES.format("tool", "libfoo"), needs="libfoo")
    lab.source("suite", 'deb suite "suite"\n', needs="tool")
    lab.source("lone")


def states(lab: PackageLab) -> dict[str, str]:
    return {entry.name: entry.state for entry in lab.last_run().packages}


def head(lab: PackageLab, channel: str = "experimental") -> dict[str, str]:
    """Version by name, the newest added last."""
    with lab.site(plan=True) as site:
        repository = opened(site.farm)
        generation = repository.head(channel)
        return {one.name: one.version for one in repository.packages(generation)} if generation else {}


def test_all_are_built_in_their_order_and_published(lab: PackageLab) -> None:
    chain(lab)
    planned = lab.plan()
    result = lab.run()
    assert set(result.built) == {"libfoo", "tool", "suite", "lone"}
    assert head(lab) == dict.fromkeys(("libfoo", "tool", "suite", "lone"), "1.0-1")
    tool = lab.last("tool")
    assert tool.inputs.ours == {"libfoo": lab.last("libfoo").packages[0].sha256}
    assert tool.generation, "what it was built with"
    assert tool.builder.vm in ("b1", "b2")
    assert [action.verb for action in planned].count("build") == 4
    assert b"tool with libfoo one" in (tool.directory / tool.packages[0].path).read_bytes() or True
    run = lab.last_run()
    assert (run.result, run.generation, run.count("passed")) == ("passed", result.generation, 4)
    assert "Passed in" in (tool.directory / "index.html").read_text()
    history = (tool.directory.parent / "index.html").read_text()
    assert "experimental" in history, "where it is now"
    for name in ("index", "graph", "farm"):
        page = (tool.directory.parents[2] / "pages" / f"{name}.html").read_text()
        assert "tool" in page or name == "farm"


def test_nothing_changed_touches_nothing(lab: PackageLab) -> None:
    chain(lab)
    lab.run()
    for machine in lab.machines.values():
        machine.stop()
    result = lab.run()
    assert (result.run, result.taken, result.built) == ("", 4, ())
    assert [action.text for action in lab.plan()] == ["4 packages are as built before"]


def test_a_change_rebuilds_it_and_its_dependants_only(lab: PackageLab) -> None:
    lab.build = {"versions": "commits"}
    chain(lab)
    lab.run()
    lab.source("libfoo", 'deb libfoo "libfoo two"\n')
    lines = [action.text for action in lab.plan()]
    assert any(line.startswith("build libfoo ") and "the source" in line for line in lines), lines
    assert any(line.startswith("perhaps build tool ") and "if libfoo" in line for line in lines), lines
    result = lab.run()
    assert set(states(lab).items()) >= {("libfoo", "passed"), ("tool", "passed"), ("lone", "taken")}
    assert "lone" not in result.built
    tool = lab.last("tool")
    assert any("libfoo is another one" in why for why in tool.why), tool.why
    assert tool.version != lab.records.read("tool", 1).version, "other bytes, another version"


def test_an_equal_outcome_stops_the_wave(lab: PackageLab) -> None:
    chain(lab)
    lab.run()
    lab.source("libfoo", 'deb libfoo "libfoo one"\n# a comment\n')
    with pytest.raises(FarmhandError) as caught:  # the farm keeps versions: other contents, one version
        lab.run()
    assert "1.0-1" in str(caught.value)
    lab.source("libfoo", 'deb libfoo "libfoo one"\n')  # as it was
    assert lab.run().run == ""


def test_a_failed_one_skips_its_dependants_and_the_rest_goes_on(lab: PackageLab) -> None:
    chain(lab)
    lab.source("libfoo", "echo broken >&2; exit 3\n")
    with pytest.raises(BuildFailed) as caught:
        lab.run()
    assert "libfoo 1.0-1 failed, source: broken" in caught.value.message
    assert "not built for it: tool, suite" in caught.value.message
    assert states(lab) == {"libfoo": "failed", "tool": "skipped", "suite": "skipped", "lone": "passed"}
    assert head(lab) == {}, "published when all have passed"
    record = lab.last("libfoo")
    assert (record.failure, record.result) == ("source", "failed")
    assert record.builder.vm in ("b1", "b2")
    assert "broken" in (record.directory / "build.log").read_text()
    lab.source("libfoo")
    result = lab.run()
    assert set(result.built) == {"libfoo", "tool", "suite"}, "lone is taken from its record"
    assert len(head(lab)) == 4
    with lab.site(plan=True) as site:
        flows = {flow.state for flow in opened(site.farm).flows.all()}
    assert flows == {"failed", "passed"}, "the first run's flow is ended"


def test_one_package_and_what_it_needs(lab: PackageLab) -> None:
    chain(lab)
    assert set(lab.run(packages=("tool",)).built) == {"libfoo", "tool"}
    result = lab.run(packages=("libfoo",), with_dependants=True)
    assert set(result.built) == {"suite"}
    with pytest.raises(NotFound) as caught:
        lab.run(packages=("tol",))
    assert "tool" in str(caught.value.remedy)


def test_another_revision_clears_the_graph(lab: PackageLab) -> None:
    lab.build = {"versions": "commits"}
    chain(lab)
    for name in lab.packages:
        lab.git(name, "branch", "released")
    lab.run(revision="master")
    assert lab.run(revision="master").run == ""
    assert lab.run(revision="released", only_changed=True).run == ""
    assert lab.run(revision="released").run == "", "known by its name since"
    result = lab.run(revision="master")
    assert len(result.built) == 4
    assert lab.run(revision="master").run == ""
    assert all(record.unchanged for record in map(lab.last, lab.packages)), "reproducible"


def test_a_builder_that_is_gone_is_tried_elsewhere(lab: PackageLab) -> None:
    lab.source("lone")
    lab.machines["b1"].stop()
    result = lab.run()
    assert result.built == ("lone",)
    record = lab.last("lone")
    assert record.builder.vm == "b2"
    (attempt,) = record.attempts
    assert (attempt.vm, attempt.failure) == ("b1", "infrastructure")
    assert (record.directory / attempt.directory / "build.log").exists()


def test_versions_of_other_bytes_are_not_published(lab: PackageLab) -> None:
    lab.source("libfoo")
    lab.source("tool", USES.format("tool", "libfoo"), needs="libfoo")
    lab.run()
    lab.source("libfoo", 'deb libfoo "libfoo two"\n', version="1.0-2")
    with pytest.raises(BuildFailed) as caught:
        lab.run()
    assert "version 1.0-1 is build tool/1's, of other bytes" in caught.value.message
    assert head(lab)["tool"] == "1.0-1"


def test_a_loop_is_broken_by_a_bootstrap(lab: PackageLab) -> None:
    """The first build has a version of its own: two contents never have one."""
    text = 'if [ -n "${stage-}" ]; then deb one "first"; else deb one "last with $(text_of two)"; fi\n'
    lab.source("one", f"case $version in *~stage1) stage=1;; esac\n{text}", needs="two <!stage1>")
    lab.source("two", USES.format("two", "one"), needs="one")
    with pytest.raises(FarmhandError) as caught:
        lab.run()
    assert "one -> two -> one is a loop" in str(caught.value)
    lab.packages["one"]["bootstrap"] = ["stage1"]
    result = lab.run()
    assert set(result.built) == {"one (stage1)", "two", "one"}
    with lab.site(plan=True) as site:
        repository = opened(site.farm)
        head_ = repository.head("experimental")
        assert head_
        found = {f"{one.name} {one.version}" for one in repository.packages(head_)}
    assert found == {"one 1.0-1~stage1", "one 1.0-1", "two 1.0-1"}
    assert lab.run().run == ""


def test_what_is_no_package_is_its_own_builds_fault(lab: PackageLab) -> None:
    lab.source("lone", "mkdir -p out; echo no package >out/lone_1.0-1_all.deb\n")
    lab.source("other")
    with pytest.raises(BuildFailed) as caught:
        lab.run()
    assert caught.value.message.startswith("lone 1.0-1 failed, source: ")
    assert states(lab) == {"lone": "failed", "other": "passed"}


def test_what_a_template_has_is_not_ours(lab: PackageLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has the name and version of one of ours."""
    chain(lab)
    monkeypatch.setattr(PlainFormat, "listed", lambda _, one: "" if one.name == "libfoo" else None)
    lab.run(packages=("tool",))
    assert lab.last("tool").inputs.ours == {}


def test_what_only_an_installer_reads_stays_in_the_record(lab: PackageLab) -> None:
    script = 'deb lone "lone"\ncp out/lone_1.0-1_all.deb out/lone-udeb_1.0-1_all.udeb\n'
    lab.source("lone", script)
    lab.run()
    assert head(lab) == {"lone": "1.0-1"}
    kept = {file.name for file in lab.last("lone").outputs}
    assert kept == {"lone_1.0-1_all.deb", "lone-udeb_1.0-1_all.udeb"}


def test_one_that_was_killed_before_its_record_was_begun_is_recovered(lab: PackageLab) -> None:
    lab.source("lone")
    with lab.site() as site:
        with (
            pytest.raises(Interrupted),
            site.journal.begin(BUILD_PACKAGES, ["b1"], PackageRunFacts("r")),
        ):
            raise Interrupted("as if it was killed")
        assert farm.recover(site).actions[0].verb == "recover"
        assert site.journal.unfinished() == ()
    assert lab.run().built == ("lone",)
