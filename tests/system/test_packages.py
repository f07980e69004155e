"""The packages of examples/packages/, built by their own farm file on real VMs: all of them, none, those that have
changed; with a VM killed in the middle, then the command itself."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_farm import ROOT, PackageFarm, package_farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]
ALL = {"libtally", "tally", "tally-book", "farm-notes"}


@pytest.fixture(scope="module")
def farm() -> Iterator[PackageFarm]:
    text = (ROOT / "inventory" / "packages.yaml").read_text()
    line = "  example: deb "
    assert line in text
    text = text.replace(line, "  directory: src ")  # a copy, for it is changed
    with package_farm("packages", text, ROOT / "examples" / "packages" / "deb") as made:
        made.json("clone-farm")
        yield made


def states(run: dict[str, object]) -> dict[str, set[str]]:
    """Names of a run's packages, by what became of them."""
    found: dict[str, set[str]] = {}
    packages = run["packages"]
    assert isinstance(packages, list)
    for entry in packages:
        found.setdefault(entry["state"], set()).add(entry["name"])
    return found


def test_a_vm_dies_then_build_is_killed_and_the_same_command_goes_on(farm: PackageFarm) -> None:
    with farm.begun("build") as building:
        farm.wait_for(
            lambda: "dpkg-buildpackage: info" in farm.file_of("libtally", 1, "build.log"), building
        )
        vm = next(
            vm for vm in farm.qemu() if f"{vm}: " in farm.file_of("libtally", 1, "build.log")
        )
        farm.kill_vm(vm)
        farm.wait_for(lambda: farm.record("libtally", 1).get("attempts"), building)
        farm.wait_for(
            lambda: "dpkg-buildpackage: info" in farm.file_of("tally", 1, "build.log"), building
        )
        building.kill()
        building.wait()
    again = farm.record("libtally", 1)
    (attempt,) = again["attempts"]
    assert (attempt["vm"], attempt["failure"]) == (vm, "infrastructure")
    assert again["result"] == "passed" and again["builder"]["vm"] != vm
    assert "dpkg-buildpackage: info" in farm.file_of("libtally", 1, f"{attempt['directory']}/build.log")
    assert again["console"]

    run = farm.json("build")
    became = states(run)
    assert {"tally", "tally-book"} <= became["passed"] and "libtally" in became["taken"]
    assert set().union(*became.values()) == ALL
    assert farm.record("tally", 1)["result"] == "interrupted"
    assert run["generation"]
