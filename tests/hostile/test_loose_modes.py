"""Modes that somebody loosened: doctor says which, and sets them right where that is asked for, but
nothing that isn't ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from controllers import Controller
from neighbour import NEEDS_ROOT, UID

from host.modes import loose_modes
from provision.doctor import examine
from tests import farm


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STATE", "RUNTIME", "CACHE"):
        place = tmp_path / name
        place.mkdir()
        place.chmod(0o711)
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(place))
    return tmp_path / "STATE"


def made(path: Path, mode: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o711)
    path.write_text("x")
    path.chmod(mode)
    return path


def doctor(tmp_path: Path, *, repair: bool = False) -> bool:
    file = tmp_path / "farm.yaml"
    file.write_text("farm: kata\nhosts: {here: {driver: fake}}\n")
    report = examine(file, hosts=False, repair=repair)
    return next(check.ok for check in report.checks if check.name == "modes")


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o7777


def test_loose_modes_are_told_and_set_right(places: Path, tmp_path: Path) -> None:
    key = made(places / "farms/kata/keys/hostkeys/prod", 0o640)
    public = made(places / "farms/kata/keys/id_ed25519.pub", 0o644)
    written = made(places / "farms/kata/generations.json", 0o666)
    journal = made(places / "farms/kata/journal.db", 0o644)
    golden = made(places / "farms/kata/disks/templates/base@1.qcow2", 0o444)
    (places / "farms/kata/disks/templates").chmod(0o777)
    assert not doctor(tmp_path)
    for path in (key, written, journal):
        assert str(path) in str([str(each) for each in loose_modes(places)])
    assert mode(key) == 0o640, "nothing is changed unasked"
    assert doctor(tmp_path, repair=True)
    found = [mode(path) for path in (key, written, journal, golden, golden.parent, public)]
    assert found == [0o600, 0o644, 0o600, 0o400, 0o755, 0o644]
    assert doctor(tmp_path)


def test_what_farmhand_makes_is_tight(places: Path, tmp_path: Path) -> None:
    made = Controller(tmp_path / "one", "driver: kvm, uri: 'qemu:///system'", tmp_path / "world")
    made.seal()
    with made.site() as site:
        farm.clone_farm(site, start=False)
    assert list(made.state.rglob("*.pub"))
    assert [str(each) for each in loose_modes(made.state)] == []


@NEEDS_ROOT
def test_what_is_not_ours_keeps_its_mode(places: Path, tmp_path: Path) -> None:
    theirs = made(places / "farms/kata/logs/theirs", 0o666)
    os.chown(theirs, UID, UID)
    outside = made(tmp_path / "outside", 0o666)
    (places / "farms/kata/logs/link").symlink_to(outside)
    os.link(outside, places / "farms/kata/logs/second-name")
    assert list(loose_modes(places)) == []
    doctor(tmp_path, repair=True)
    assert [mode(theirs), mode(outside)] == [0o666, 0o666]


def test_a_file_swapped_for_a_link_is_not_followed(places: Path, tmp_path: Path) -> None:
    key = made(places / "farms/kata/keys/id_ed25519", 0o644)
    key.parent.chmod(0o700)
    outside = made(tmp_path / "outside", 0o666)
    (found,) = loose_modes(places)
    key.unlink()
    key.symlink_to(outside)
    assert found.tighten() is False
    assert mode(outside) == 0o666
