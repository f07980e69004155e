"""`rebuild`: a build done again from its record alone, compared with what that made: real git, sshds,
apt and dpkg (``package_lab``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builds.packages.inputs import BuildInputs, InstalledPackage
from builds.packages.rebuild import REBUILD, Rebuild, RebuildFacts
from builds.packages.rebuilding import builder_differences, installed_differences, wanted
from builds.packages.record import BuilderRecord
from builds.packages.verified import RebuildResult, verified
from inventory.errors import BuildFailed, Interrupted, NotFound, WrongState
from provision.engine.runner import perform
from provision.operations.recover import Recover
from provision.package_repositories import opened
from repositories.change import changing
from repositories.leases import leases, take
from tests.unit.cycle_farm import environment
from tests.unit.package_lab import PackageLab, stand_in

USES = 'deb tool "tool with $(text_of libfoo)"\n'


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageLab]:
    for name, value in environment(tmp_path).items():
        if name.startswith("FARMHAND_"):
            monkeypatch.setenv(name, value)
    stand_in(monkeypatch)
    made = PackageLab(tmp_path)
    yield made
    made.stop()


def rebuild(lab: PackageLab, build: str, *, verify: bool = True) -> RebuildResult:
    with lab.site() as site:
        return perform(site, Rebuild(build=build, verify=verify)).result


def holders(lab: PackageLab) -> set[str]:
    with lab.site(plan=True) as site:
        return {one.holder for one in leases(opened(site.farm).layout)}


def test_from_the_record_alone(lab: PackageLab) -> None:
    """The farm has gone on: libfoo is another, and the source of tool is, too."""
    lab.source("libfoo")
    lab.source("tool", USES, needs="libfoo")
    lab.run()
    lab.source("libfoo", 'deb libfoo "libfoo two"\n', version="1.0-2")
    lab.source("tool", USES, needs="libfoo", version="1.0-2")
    lab.run()
    first = lab.records.read("tool", 1)
    with lab.site(plan=True) as site:
        (action,) = perform(site, Rebuild(build="tool/1", verify=True)).actions
    commit = first.source.commit[:10]
    assert action.text == f"build tool/1 again: tool 1.0-1 of commit {commit}, with 1 package installed"
    assert not (first.directory / "rebuilds").exists()
    before = lab.last_run().id

    done = rebuild(lab, "tool/1")
    assert (done.rebuild, done.compared, done.differences, done.notes) == (1, True, (), ())
    kept = Path(done.directory)
    assert kept == first.directory / "rebuilds" / "1"
    name = first.packages[0].path
    assert (kept / name).read_bytes() == (first.directory / name).read_bytes()
    found = verified(first.directory)
    assert found is not None
    assert (found.rebuild, found.identical) == (1, True)
    assert "gets generation" in (kept / "build.log").read_text()
    assert lab.last_run().id == before, "it is no run of build, and publishes nothing"
    assert not any("rebuild" in holder for holder in holders(lab))
    assert rebuild(lab, "tool/1", verify=False).rebuild == 2
    found = verified(first.directory)
    assert found is not None
    assert found.rebuild == 1, "what wasn't compared tells nothing"


def test_what_does_not_come_out_the_same_is_named(lab: PackageLab) -> None:
    lab.source("libfoo", 'deb libfoo "made at $(date +%s%N)"\n')
    lab.run()
    done = rebuild(lab, "libfoo")
    assert done.differences == ("libfoo_1.0-1_all.deb: ./usr/share/libfoo/text: content",)
    found = verified(lab.last("libfoo").directory)
    assert found is not None
    assert (found.identical, found.differences) == (False, done.differences)
    assert done.differences[0] in (lab.last("libfoo").directory / "index.html").read_text()


def test_what_is_gone_is_named_before_anything_is_touched(lab: PackageLab) -> None:
    lab.source("libfoo")
    lab.source("tool", USES, needs="libfoo")
    lab.run()
    record = lab.last("tool")
    for machine in lab.machines.values():
        machine.stop()

    def refused(build: str = "tool", **changed: object) -> str:
        replace(record, **changed).save()  # type: ignore[arg-type]
        with pytest.raises(WrongState) as caught:
            rebuild(lab, build)
        record.save()
        return caught.value.message

    commit = "0123456789" * 4
    text = refused(source=replace(record.source, commit=commit))
    assert text.startswith(f"build tool/1: its source, commit {commit[:12]} of ")
    assert "is gone: " in text
    assert "no longer what was built" in refused(source=replace(record.source, tree="f" * 40))
    text = refused(inputs=replace(record.inputs, template="base@1 0123456789abcdef, clean"))
    assert text.startswith(
        "build tool/1 was made on base@1 0123456789abcdef, clean, which no builder has"
    )
    for vm in ("b1", "b2"):
        assert f"{vm} has as its reset command leaves it, clean" in text
    assert refused(result="failed").startswith("build tool/1 failed: a build that passed")
    installed = tuple(replace(one, sha256="f" * 64) for one in record.inputs.installed)
    inputs = replace(record.inputs, installed=installed)
    text = refused(generation=99, inputs=inputs)
    assert "generation 99 of debs is gone, and experimental has no libfoo 1.0-1 of those bytes" in text
    downloads = replace(record.inputs, downloads={"a.tar.gz": "a" * 64})
    assert "no longer says where a.tar.gz aaaaaaaaaaaa is from" in refused(inputs=downloads)
    (record.directory / record.packages[0].path).unlink()
    assert "tool_1.0-1_all.deb is gone" in refused()
    with pytest.raises(NotFound) as caught:
        rebuild(lab, "tol/1")
    assert caught.value.remedy == "did you mean tool?"
    assert not (record.directory / "rebuilds").exists()


def test_another_generation_of_the_same_packages_will_do(lab: PackageLab) -> None:
    lab.source("libfoo")
    lab.source("tool", USES, needs="libfoo")
    lab.run()
    replace(lab.last("tool"), generation=99).save()
    assert rebuild(lab, "tool").differences == ()


def test_other_packages_installed_end_it(lab: PackageLab) -> None:
    lab.source("libfoo")
    lab.source("tool", USES, needs="libfoo")
    lab.run()
    record = lab.last("tool")
    gcc = InstalledPackage(name="libfoo", version="1.0-1", architecture="amd64")
    inputs = replace(record.inputs, installed=(*record.inputs.installed, gcc))
    replace(record, inputs=inputs).save()
    with pytest.raises(BuildFailed) as caught:
        rebuild(lab, "tool")
    assert "tool/1 can't be built again: dependencies: " in caught.value.message
    assert verified(record.directory) is None
    assert not any("rebuild" in holder for holder in holders(lab))


def test_what_a_kill_leaves_is_given_back_and_cleared_away(lab: PackageLab) -> None:
    lab.source("libfoo")
    lab.run()
    left = lab.last("libfoo").directory / "rebuilds" / "1"
    (left / ".half").mkdir(parents=True)
    (left / ".source.tar").touch()
    (left / "build.log").touch()
    facts = RebuildFacts("libfoo/1", 1, "debs")
    holder = f"build {facts.holder}"
    with lab.site() as site:
        repository = opened(site.farm)
        head = repository.head("experimental")
        assert head
        with changing(repository):
            take(repository.layout, head.sequence, holder)
        with pytest.raises(Interrupted), site.journal.begin(REBUILD, ["b1"], facts):
            raise Interrupted("as if it was killed")
    assert holder in holders(lab)
    with lab.site() as site:
        done = perform(site, Recover())
    assert any("stays beside the record" in action.text for action in done.actions)
    assert holder not in holders(lab)
    assert [path.name for path in left.iterdir()] == ["build.log"]


def test_subscribers_are_told_of_runs_and_rebuilds_as_of_builds(lab: PackageLab) -> None:
    """Each by its own id: that of a rebuild isn't the record's, which a build had long before."""
    told = lab.root / "told"
    append = f"cat >>'{told}'; echo >>'{told}'"
    lab.events = {"log": {"command": ["sh", "-c", append], "on": "build"}}

    def taken() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in told.read_text().splitlines()]
        told.unlink()
        return [{"type": event["type"], **event["data"]} for event in found]

    lab.source("libfoo")
    lab.run()
    began, passed = taken()
    run = lab.last_run()
    assert (began["type"], began["build"]) == ("build.began", {"id": run.id})
    assert (passed["type"], passed["build"]["id"]) == ("build.passed", run.id)
    assert passed["build"]["record"] == str(run.path)
    assert passed["build"]["packages"] == {"passed": 1, "taken": 0, "failed": 0, "skipped": 0}
    assert passed["build"]["generation"] == run.generation

    lab.source("tool", "echo broken >&2; exit 3\n", needs="libfoo")
    with pytest.raises(BuildFailed):
        lab.run()
    _, failed = taken()
    assert (failed["type"], failed["build"]["packages"]["taken"]) == ("build.failed", 1)
    assert failed["build"]["failed"] == {
        "package": "tool", "vm": lab.last("tool").builder.vm, "class": "source", "message": "broken",
    }  # fmt: skip

    rebuild(lab, "libfoo/1")
    began, passed = taken()
    assert (began["operation"]["verb"], began["build"]) == ("rebuild", {"id": "libfoo/1/rebuilds/1"})
    assert passed["build"]["id"] == "libfoo/1/rebuilds/1"
    assert passed["build"]["rebuild_of"] == "libfoo/1"
    with (
        lab.site() as site,
        pytest.raises(Interrupted),
        site.journal.begin(REBUILD, ["b1"], RebuildFacts("libfoo/1", 2, "debs")),
    ):
        raise Interrupted("as if it was killed")
    with lab.site() as site:
        perform(site, Recover())
    assert [event["build"] for event in taken()] == [{"id": "libfoo/1/rebuilds/2"}] * 3


# -- its values --------------------------------------------------------------------------------------


def inputs(*installed: InstalledPackage, format_: str = "deb") -> BuildInputs:
    return BuildInputs(
        format=format_, tree="", version="", recipe="", template="", architecture="amd64",
        installed=installed,
    )  # fmt: skip


def package(
    name: str, version: str = "1", architecture: str = "amd64", sha256: str = ""
) -> InstalledPackage:
    return InstalledPackage(name=name, version=version, architecture=architecture, sha256=sha256)


def test_what_is_to_be_installed() -> None:
    found = inputs(package("a"), package("b", architecture="all"), package("c", architecture="i386"))
    assert [*wanted(found)] == ["a=1", "b=1", "c:i386=1"]
    assert [*wanted(inputs(package("d", architecture="noarch"), format_="rpm"))] == ["d=1"]


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (package("a"), []),
        (package("a", "2"), ["a:amd64: 1 then, 2 now"]),
        (package("a", architecture="i386"), ["a:amd64 1: only then", "a:i386 1: only now"]),
        (package("a", sha256="f"), ["a:amd64 1: of other bytes than then"]),
    ],
)
def test_what_is_installed_otherwise(now: InstalledPackage, says: list[str]) -> None:
    then = package("a", sha256="e" if now.sha256 else "")
    assert [*installed_differences((then,), (now,))] == says


def test_what_of_the_builder_is_otherwise() -> None:
    def builder(environment: Mapping[str, str], **given: object) -> BuilderRecord:
        return BuilderRecord(vm="b", environment=environment, **given)  # type: ignore[arg-type]

    then = builder({"A": "1", "B": "x"}, features="fpu sse2 avx", kernel="6.1", cpus=2)
    now = builder({"A": "2"}, features="fpu sse2 aes", kernel="6.12", cpus=2)
    assert [*builder_differences(then, now)] == [
        "the builder's kernel: 6.1 then, 6.12 now",
        "the CPU's features: now without avx, with aes",
        "A: 1 then, 2 now",
        "B: x then, unset now",
    ]
    assert [*builder_differences(then, then)] == []
