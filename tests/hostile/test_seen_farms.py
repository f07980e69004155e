"""`farms` over farms of several users: what may not be looked at is told, and is not absent."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from neighbour import NEEDS_ROOT, UID, square

from host.run import which
from inventory.loader import load
from provision import farms
from provision.engine.report import QuietReporter
from provision.farms import SeenFarm, seen_farms
from provision.site import Site
from tests.unit.sshd_machine import wait_for

__all__ = ["square"]
FARM = "farm: {}\nhosts: {{here: {{driver: fake}}}}\nvms: {{prod: {{memory: 512M}}}}\n"
FARM += "templates: {{base: {{build: debian-12}}}}\n"


@pytest.fixture
def ours(square: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Our state, beside which a neighbour has the same."""
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(square / name.lower()))
    places = {square / "state": "root", square / "theirs": pwd.getpwuid(UID).pw_name}
    monkeypatch.setattr(farms, "_places", lambda: places)
    return square


def made(square: Path, name: str) -> Path:
    """A farm that has state; its file."""
    file = square / f"{name}.yaml"
    file.write_text(FARM.format(name))
    with Site(load(file), reporter=QuietReporter()) as site:
        site.prepare()
    return file


def by_name(*, state: Path) -> dict[str, SeenFarm]:
    return {one.farm: one for one in seen_farms().farms if one.state.is_relative_to(state)}


@contextlib.contextmanager
def qemu(state: Path, farm: str, vm: str) -> Iterator[None]:
    """A real one that has a machine's seed, and runs nothing."""
    program = which("qemu-system-x86_64")
    assert program, "these tests need QEMU"
    seed = state / "farms" / farm / "seeds" / f"{farm}-{vm}.iso"
    seed.parent.mkdir(parents=True, exist_ok=True)
    seed.write_bytes(bytes(2048))
    drive = f"file={seed},format=raw,if=none,readonly=on"
    process = subprocess.Popen(
        [program, "-S", "-machine", "none", "-nodefaults", "-display", "none", "-drive", drive],
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: any(str(seed) in str(h) for h in _held(process.pid)))
        yield
    finally:
        process.kill()
        process.wait()


def _held(pid: int) -> list[Path]:
    with contextlib.suppress(OSError):
        return [handle.readlink() for handle in Path(f"/proc/{pid}/fd").iterdir()]
    return []


def test_files_that_are_there_gone_wrong_or_anothers(ours: Path) -> None:
    good, gone, wrong, other = (made(ours, name) for name in ("good", "gone", "wrong", "other"))
    gone.unlink()
    wrong.write_text("farm: [\n")
    other.write_text(FARM.format("renamed"))
    disks = ours / "state" / "farms" / "gone" / "disks" / "vms" / "gone-dev2"
    disks.mkdir(parents=True)
    (disks / "disk").write_bytes(b"x" * 2**20)
    (ours / "state" / "farms" / ".hidden").mkdir()
    seen = by_name(state=ours / "state")
    assert {name: one.file_state for name, one in seen.items()} == {
        "good": "there", "gone": "gone", "wrong": "wrong", "other": "of another farm",
    }  # fmt: skip
    assert seen["good"].file == str(good)
    assert [(vm.vm, vm.state) for vm in seen["good"].vms] == [("prod", "not made")]
    assert [(vm.vm, vm.state) for vm in seen["gone"].vms] == [("dev2", "not running")]
    assert "of farm renamed by now" in seen["other"].note
    assert str(wrong) in seen["wrong"].note
    assert (seen["gone"].bytes or 0) >= 2**20 > (seen["good"].bytes or 2**30)


def test_what_runs_is_seen_wherever_its_state_is(ours: Path) -> None:
    made(ours, "kata").unlink()
    hidden = ours / "hidden" / "state"
    with qemu(ours / "state", "kata", "dev2"), qemu(hidden, "secret", "prod"):
        assert [(vm.vm, vm.state) for vm in by_name(state=ours / "state")["kata"].vms] == [
            ("dev2", "running")
        ]
        (found,) = by_name(state=hidden).values()
        assert [(vm.vm, vm.state) for vm in found.vms] == [("prod", "running")]
        assert (found.farm, found.ours) == ("secret", False)
    assert not by_name(state=hidden)


@NEEDS_ROOT
def test_others_are_told_as_such(ours: Path) -> None:
    """A neighbour looks at ours, which root may read and the neighbour may not."""
    made(ours, "kata")
    seen_farms()  # all modules are loaded
    (ours / "theirs" / "farms" / "mine").mkdir(parents=True)
    for place in (ours / "theirs", *(ours / "theirs").rglob("*")):
        os.chown(place, UID, UID)
    seen = by_name(state=ours).values()
    assert {one.farm: (one.user, one.ours) for one in seen} == {
        "kata": ("root", True), "mine": (pwd.getpwuid(UID).pw_name, False),
    }  # fmt: skip
    for place in (ours / "state", ours / "state" / "farms"):
        place.chmod(0o711)
    with qemu(ours / "state", "kata", "dev2"):
        os.seteuid(UID)
        try:
            others = seen_farms()
        finally:
            os.seteuid(0)
    assert others.closed == {ours / "state": "root"}
    (kata,) = (one for one in others.farms if one.farm == "kata" and ours in one.state.parents)
    assert [(vm.vm, vm.state) for vm in kata.vms] == [("dev2", "running")]
    assert (kata.user, kata.file_state, kata.bytes) == ("root", "closed", None)
    assert "can't be looked at" in kata.note
