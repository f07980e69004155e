"""The unit that starts a farm's VMs at boot: systemd's own word on it, its links in a scratch root."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from host.run import Runner
from inventory.errors import NotOurs, UsageError, spelled
from inventory.loader import load
from inventory.model import Farm
from provision import boot_unit

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


def test_it_is_installed_and_removed(tmp_path: Path) -> None:
    farm = farm_in(tmp_path / "farm")
    made = boot_unit.install(farm, Runner(), root=tmp_path)
    links = [path for path in tmp_path.rglob("*.wants/*") if path.is_symlink()]
    assert made.file.read_text() == made.text
    assert [link.name for link in links] == [made.name]
    boot_unit.install(farm, Runner(), root=tmp_path)
    boot_unit.uninstall(farm, Runner(), root=tmp_path)
    assert not made.file.exists()
    assert not any(link.is_symlink() for link in links)
    boot_unit.uninstall(farm, Runner(), root=tmp_path)


def test_a_file_that_is_not_ours_stays(tmp_path: Path) -> None:
    farm = farm_in(tmp_path / "farm")
    file = boot_unit.boot_unit(farm, root=tmp_path).file
    file.parent.mkdir(parents=True)
    file.write_text("[Unit]\n")
    for act in (boot_unit.install, boot_unit.uninstall):
        with pytest.raises(NotOurs, match="left alone"):
            act(farm, Runner(), root=tmp_path)
    assert file.read_text() == "[Unit]\n"


def test_that_nothing_starts_them_is_said(tmp_path: Path) -> None:
    farm = farm_in(tmp_path / "farm")
    assert spelled(boot_unit.unstarted(farm)).endswith("boot-unit --install")
