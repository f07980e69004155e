"""Machines nobody virtualizes: their reset is the admin's own command, all else is refused in words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.api import Power
from hypervisors.host import ListedMachine
from hypervisors.ssh import SshHypervisor
from inventory.errors import CommandFailed, NotFound, Unsupported, UsageError
from tests.identities import KATA


def driver(*reset: str, changes: bool = True, steps: list[str] | None = None) -> SshHypervisor:
    machines = {
        "kata-dev2": ListedMachine(address="192.0.2.1", port=22, reset_argv=reset),
        "kata-prod": ListedMachine(address="build.example", port=2222, reset_argv=()),
    }
    noted = steps if steps is not None else []
    return SshHypervisor(KATA, machines, Runner(changes=changes), step=noted.append)


def test_the_declared_machines_are_ours_and_nobody_asked_them() -> None:
    machines = driver().list()
    assert [m.name for m in machines] == ["kata-dev2", "kata-prod"]
    assert {m.power for m in machines} == {Power.UNKNOWN}
    assert machines[1].owner is not None and machines[1].owner.vm == "prod"
    assert driver().find("kata-other") is None


def test_reset_runs_the_command_as_it_stands_without_a_shell(tmp_path: Path) -> None:
    target, steps = tmp_path / "a $(b); c", list[str]()
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('done')"
    driver(sys.executable, "-c", code, str(target), steps=steps).reset("kata-dev2", "clean")
    assert target.read_text() == "done"
    assert len(steps) == 1 and "kata-dev2" in steps[0]


def test_a_failed_command_is_an_error_that_shows_it() -> None:
    with pytest.raises(CommandFailed, match="out of order") as caught:
        driver("sh", "-c", "echo out of order >&2; exit 7").reset("kata-dev2", "clean")
    assert caught.value.status == 7


def test_a_plan_runs_no_reset_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a plan must not"):
        driver("touch", str(tmp_path / "x"), changes=False).reset("kata-dev2", "clean")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "attempt",
    [
        lambda d: d.reset("kata-prod", "clean"),
        lambda d: d.reset("kata-dev2", "other"),
        lambda d: d.start("kata-dev2"),
        lambda d: d.stop("kata-dev2", grace=0),
        lambda d: d.checkpoint("kata-dev2", "x"),
        lambda d: d.balloon("kata-dev2", 2**30, timeout=1),
        lambda d: d.memory("kata-dev2"),
        lambda d: d.console("kata-dev2"),
    ],
)
def test_what_it_cannot_do_it_refuses_with_a_remedy(attempt) -> None:
    with pytest.raises(Unsupported, match="kata-") as caught:
        attempt(driver("true"))
    assert caught.value.remedy


def test_an_unknown_machine_is_named_with_the_known_ones() -> None:
    with pytest.raises(NotFound, match="kata-nope") as caught:
        driver().reset("kata-nope", "clean")
    assert "kata-dev2" in caught.value.remedy
