"""The unit that starts a farm's VMs at boot: systemd's own word on it, its links in a scratch root."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from inventory.errors import Interrupted, NotOurs, UsageError, spelled
from inventory.loader import load
from inventory.model import Farm
from provision import boot_unit
from provision.engine.operation import Operation
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.operations.boot_unit import BootUnitInstall, BootUnitRemove, BootUnitResult
from provision.site import Site

FARM = (
    "farm: kata\nhosts: {here: {driver: fake}}\ntemplates: {base: {build: debian-12, size: 64M}}\n"
    "vms:\n  prod: {autostart: yes}\n  dev2: {}\n"
)


def farm_in(directory: Path) -> Farm:
    directory.mkdir(exist_ok=True)
    (directory / "kata.yaml").write_text(FARM)
    return load(directory / "kata.yaml")


@pytest.mark.parametrize("name", ["plain", 'a "b" 100% \\ c'])
def test_systemd_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "s 1"))
    made = boot_unit.boot_unit(farm_in(tmp_path / name), root=tmp_path)
    file = tmp_path / made.name
    file.write_text(made.text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert made.name not in done.stderr, "not a word against it"
    assert "start --autostart --no-wait --farm" in made.text


def test_a_path_that_no_unit_can_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="systemd unit"):
        boot_unit.boot_unit(farm_in(tmp_path / "a$b"), root=tmp_path)


@pytest.fixture
def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Farm:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    return farm_in(tmp_path / "farm")


def done(farm: Farm, operation: Operation[BootUnitResult], *, plan: bool = False) -> str:
    """What its only line says."""
    with Site(farm, reporter=QuietReporter(), plan=plan) as site:
        outcome = perform(site, operation)
    (action,) = outcome.actions
    return f"{action.verb}: {action.text}"


def links(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*.wants/*") if path.is_symlink()]


def test_it_is_installed_and_removed(farm: Farm, tmp_path: Path) -> None:
    made = boot_unit.boot_unit(farm, root=tmp_path)
    assert done(farm, BootUnitInstall(tmp_path), plan=True).startswith(f"install: {made.file}: enabled")
    assert not made.file.exists()
    assert done(farm, BootUnitInstall(tmp_path)).startswith(f"install: {made.file}: enabled")
    assert made.file.read_text() == made.text
    assert links(tmp_path) == [made.name]
    assert done(farm, BootUnitInstall(tmp_path)).startswith("keep: ")
    assert done(farm, BootUnitRemove(tmp_path)) == f"remove: {made.file}: disabled and removed"
    assert not made.file.exists()
    assert links(tmp_path) == []
    assert done(farm, BootUnitRemove(tmp_path)) == f"keep: {made.file}: not there"
    with Site(farm, reporter=QuietReporter()) as site:
        assert [one.verb for one in site.journal.history()] == ["boot-unit-remove", "boot-unit-install"]


def test_one_whose_enabling_was_cut_off_starts_nothing(
    farm: Farm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its file alone nor its recovery makes ``status`` say that all is well."""

    def killed(*_: object) -> None:
        raise Interrupted("as if it was killed")

    made = boot_unit.boot_unit(farm, root=tmp_path)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(boot_unit, "_systemctl", killed)
        with pytest.raises(Interrupted):
            done(farm, BootUnitInstall(tmp_path))
    assert made.file.exists()
    monkeypatch.setattr(boot_unit, "boot_unit", lambda _farm: made)
    assert spelled(boot_unit.unstarted(farm)).endswith("boot-unit --install")
    with Site(farm, reporter=QuietReporter()) as site:
        recovered, installed = perform(site, BootUnitInstall(tmp_path)).actions
    assert "the same again does the rest" in str(recovered)
    assert installed.verb == "install"
    assert links(tmp_path) == [made.name]
    assert boot_unit.unstarted(farm) == ""


def test_a_file_that_is_not_ours_stays(farm: Farm, tmp_path: Path) -> None:
    file = boot_unit.boot_unit(farm, root=tmp_path).file
    file.parent.mkdir(parents=True)
    file.write_text("[Unit]\n")
    for operation in (BootUnitInstall(tmp_path), BootUnitRemove(tmp_path)):
        with pytest.raises(NotOurs, match="left alone"):
            done(farm, operation)
    assert file.read_text() == "[Unit]\n"


def test_that_nothing_starts_them_is_said(tmp_path: Path) -> None:
    farm = farm_in(tmp_path / "farm")
    assert spelled(boot_unit.unstarted(farm)).endswith("boot-unit --install")
