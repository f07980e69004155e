"""The first steps of docs/packages.md on real VMs, line by line, with more between them: a VM that dies
in the middle of a build, `build` itself killed, and another GIT_REVISION."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from package_machines import ROOT, BuilderFarm, became, builder_farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
ALL = {"libtally", "tally", "tally-book", "farm-notes"}
_BEGUN = "dpkg-buildpackage: info: source package"


def lines() -> list[str]:
    """What is to be typed."""
    _, _, rest = (ROOT / "docs" / "packages.md").read_text().partition("\n## First steps\n")
    found = [line for line in rest.partition("\n## ")[0].splitlines() if line.startswith("    ")]
    return [line.partition("  #")[0].strip() for line in found]


COPY, SED, CLONE, PLAN, BUILD, AGAIN, EDIT, WHY, CHANGED, VERIFY, OTHER = lines()


@pytest.fixture(scope="module")
def farm() -> Iterator[BuilderFarm]:
    with builder_farm("mine") as made:
        for line in (COPY, SED, CLONE):
            made.typed(line)
        yield made


def vm_of(farm: BuilderFarm, package: str) -> str:
    """Where it is built now."""
    (entry,) = (one for one in farm.last_run()["packages"] if one["name"] == package)
    return str(entry["vm"])


def book(farm: BuilderFarm, number: int) -> str:
    """What the package holds."""
    package = farm.artifact("tally-book", number, "*.deb")
    tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True).stdout
    out = ["tar", "-xO", "./usr/share/tally-book/book.txt"]
    return subprocess.run(out, input=tar, capture_output=True, check=True).stdout.decode()


def test_a_vm_dies_then_build_is_killed_and_the_same_command_goes_on(farm: BuilderFarm) -> None:
    planned = farm.typed(PLAN)
    assert all(f"build {name} 1.0+1." in planned for name in ALL), planned
    with farm.begun("build") as building:
        farm.wait_for(lambda: _BEGUN in farm.log("farm-notes", 1), building)
        dead = vm_of(farm, "farm-notes")
        farm.kill_vm(dead)
        farm.wait_for(lambda: farm.record("farm-notes", 1).get("attempts"), building)
        farm.wait_for(lambda: vm_of(farm, "farm-notes") and farm.log("tally", 1), building)
        assert vm_of(farm, "farm-notes") != dead
    cut = farm.record("farm-notes", 1)
    (attempt,) = cut["attempts"]
    assert (attempt["vm"], attempt["failure"]) == (dead, "infrastructure")
    assert _BEGUN in farm.log("farm-notes", 1, attempt["directory"])
    assert cut["console"], "the tail of what it said last"

    said = farm.typed(BUILD)
    run = farm.last_run()
    assert became(run) == {"passed": {"tally", "tally-book", "farm-notes"}, "taken": {"libtally"}}, said
    assert {farm.record(name, 1)["result"] for name in ("tally", "farm-notes")} == {"interrupted"}
    assert run["generation"] and "experimental is generation" in said
    assert book(farm, 1).startswith("Contents\nchapters/1-spring: 2 lines, 14 words\n")


def test_nothing_has_changed_and_no_vm_is_touched(farm: BuilderFarm) -> None:
    before = farm.qemu(), farm.builds(), farm.last_run()
    assert "as built before" in farm.typed(AGAIN)
    assert (farm.qemu(), farm.builds(), farm.last_run()) == before


def test_a_change_in_one_rebuilds_it_and_what_needs_it(farm: BuilderFarm) -> None:
    farm.typed(EDIT)
    why = farm.typed(WHY)
    assert "tally" in why and "the source" in why, why
    farm.typed(CHANGED)
    assert became(farm.last_run()) == {
        "passed": {"tally", "tally-book"}, "taken": {"libtally", "farm-notes"},
    }  # fmt: skip
    assert "chapters/1-spring has 2 lines, 14 words\n" in book(farm, 2)


def test_a_rebuild_makes_the_same_bytes(farm: BuilderFarm) -> None:
    assert "identical" in farm.typed(VERIFY)


def test_another_revision_builds_all_anew(farm: BuilderFarm) -> None:
    planned = farm.typed(OTHER)
    assert all(f"build {name} 1.0+" in planned for name in ALL), planned
