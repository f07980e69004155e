"""What an LVM store finds left over, by a report of its group."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_lvm_locks import store

from host import paths
from hypervisors.disks.lvm.command import LogicalVolume, VolumeGroup
from hypervisors.disks.lvm.disks import LvmStore
from hypervisors.disks.lvm.state import LvmState
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
