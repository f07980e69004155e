"""What the stores of the lab need to know of larger disks, without them; they themselves are in
tests/contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.disks.lvm.command import LogicalVolume, VolumeGroup
from hypervisors.disks.lvm.copy import wipe_idle
from hypervisors.disks.lvm.state import LvmState
from hypervisors.disks.zfs.state import Dataset, read_state
from inventory.errors import DriverFailed

MIB = 2**20


def test_an_end_is_wiped_and_nothing_before_it(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    disk = tmp_path / "disk"
    size, start = 130 * MIB, MIB + 512
    with disk.open("wb") as file:
        for _ in range(130):
            file.write(b"?" * MIB)
    wipe_idle(Runner(), disk, start, "it", lambda *words: told.append(words))
    data = disk.read_bytes()
    assert data[:start] == b"?" * start and data[start:].count(0) == len(data) - start == size - start
    assert told[-1] == ("it", size - start, size - start)
    wipe_idle(Runner(), disk, size, "it", lambda *words: told.append(words))
    assert disk.read_bytes() == data
    with pytest.raises(DriverFailed, match="wiping the end"):
        wipe_idle(Runner(), tmp_path / "none", 0, "it", lambda *_: None)


def volume(name: str, size: int, kind: str, origin: str = "", /, **facts: str) -> LogicalVolume:
    return LogicalVolume(
        name=name, size=size, space=size, origin=origin, pool="", snapshot=bool(origin), data=0,
        metadata=0, metadata_size=0, thin_id=None, active=True, open=False, writable=True,
        invalid=False, health="", ours=True,
        facts={"kind": kind, "machine": "kata-prod", "size": str(size), **facts},
    )  # fmt: skip


def test_of_a_checkpoint_that_was_copied_to_a_larger_volume_that_one_counts(tmp_path: Path) -> None:
    one = volume("one", 64 * MIB, "checkpoint", name="A", created="1", seq="1")
    copied = volume("copied", 128 * MIB, "checkpoint", name="A", created="1", seq="1")
    two = volume("two", 64 * MIB, "checkpoint", name="B", created="2", seq="1")
    disk = volume("disk", 64 * MIB, "disk", "one", base="A", seq="2", template="base@1")
    seen = LvmState(VolumeGroup("vg", 2**40, 2**40, 4 * MIB, (copied, two, disk, one)), tmp_path)
    assert seen.checkpoints("kata-prod") == [copied, two]
    assert seen.base(disk, "A") == copied
    assert seen.outgrown("kata-prod") == [one]
    assert seen.of("kata-prod")[0] is disk and len(seen.of("kata-prod")) == 4


def dataset(grown: str | None, *snapshots: tuple[str, int, str]) -> Dataset:
    """``snapshots``: name, txg, the checkpoint that it is."""
    marks = {"machine": "kata-prod", "farm": "kata", "vm": "prod", "template": "base@1", "base": "clean",
             "size": "1", "created": "2026-01-01T00:00:00+00:00", "state": "disk"}  # fmt: skip
    facts = {
        "marks": marks | ({"grown": grown} if grown else {}), "used": 1, "written": 0,
        "newest": snapshots[-1][0] if snapshots else "",
        "snapshots": {
            name: {"txg": txg, "marks": {"kind": "checkpoint", "name": of}}
            for name, txg, of in snapshots
        },
    }  # fmt: skip
    (found,) = read_state({"volumes": {"tank/kata/vms/kata-prod.1": facts}}).volumes
    return found


@pytest.mark.parametrize(
    ("grown", "name", "back"),
    [(None, "B", True), (None, "A", False), ("0", "B", True), ("12", "B", True), ("20", "B", False)],
)
def test_a_zfs_disk_is_rolled_back_to_its_newest_snapshot_if_that_is_as_large(
    grown: str | None, name: str, back: bool
) -> None:
    seen = dataset(grown, ("A", 12, "A"), ("B", 20, "B"))
    assert seen.goes_back_to(name) is back
    assert not dataset(grown).goes_back_to("clean")


def test_a_mark_of_growth_that_is_no_number_is_damaged() -> None:
    assert "'grown'" in dataset("12x").damaged
