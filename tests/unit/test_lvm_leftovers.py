"""What an LVM store finds left over, by a report of its group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_farm import Desk, lines
from test_lvm_locks import store

from host import paths
from hypervisors.api import Leftover
from hypervisors.disks.lvm.command import LogicalVolume, VolumeGroup
from hypervisors.disks.lvm.disks import LvmStore
from hypervisors.disks.lvm.state import LvmState
from hypervisors.fake.driver import FakeDisks
from tests import farm
from tests.identities import KATA


def volume(lv: str, **facts: str) -> LogicalVolume:
    """One of kata's prod."""
    of_vm = {
        "farm": KATA.mark, "vm": "prod", "machine": "kata-prod", "template": "base@1", "size": "4096",
        "cloned": "2026-01-01T00:00:00+00:00", "created": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return LogicalVolume(
        name=lv, size=4096, space=4096, origin="", pool="", snapshot=False, data=0.0, metadata=0.0,
        metadata_size=0, thin_id=None, active=True, open=False, writable=False, invalid=False, health="",
        ours=True, facts={**of_vm, **facts},
    )  # fmt: skip


@pytest.mark.parametrize("mark", ["", "merging", "moving"])
def test_checkpoints_without_a_disk_stay_while_it_is_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    """All of them, not only the one that is marked."""
    monkeypatch.setattr(paths, "SHARED", tmp_path / "run/farmhand")
    one = store(tmp_path)
    assert isinstance(one, LvmStore)
    volumes = (
        volume("fh.a", kind="checkpoint", name="mine", **({mark: "2"} if mark else {})),
        volume("fh.b", kind="checkpoint", name="other"),
        volume("fh.c", kind="checkpoint", name="gone", machine="kata-dev2", vm="dev2"),
    )
    seen = LvmState(VolumeGroup("vg0", 2**30, 2**20, 4096, volumes), tmp_path / "links")
    left = [(item.ref, item.why) for item in one._left(seen)]
    ours = [] if mark else ["vg0/fh.a", "vg0/fh.b"]
    assert left == [(ref, "half removed: its disk is gone") for ref in (*ours, "vg0/fh.c")]


def test_gc_removes_what_swaps_left_of_a_vm_that_the_farm_file_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told as a disk, too, and is none that anybody could miss."""
    with monkeypatch.context() as patch:
        patch.setattr(paths, "SHARED", tmp_path / "run/farmhand")
        one = store(tmp_path)
        volumes = (
            volume("fh.old", kind="disk", base="clean", seq="1"),
            volume("fh.new", kind="disk", base="clean", seq="2"),
        )
        seen = LvmState(VolumeGroup("vg0", 2**30, 2**20, 4096, volumes), tmp_path / "links")
        left = list(one._left(seen))
    assert [(item.kind, item.ref) for item in left] == [("disk", "vg0/fh.old")]
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    left = [replace(item, owner=desk.machine("prod").owner) for item in left]

    def discard(_: FakeDisks, item: Leftover) -> None:
        left.remove(item)

    monkeypatch.setattr(FakeDisks, "leftovers", lambda _: tuple(left))
    monkeypatch.setattr(FakeDisks, "discard", discard)
    with desk.site() as site:
        (line,) = lines(farm.gc(site))
    assert line.startswith("prod: remove disk vg0/fh.old ")
    assert not left
