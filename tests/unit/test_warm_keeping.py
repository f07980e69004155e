"""Keeping of running machines' memory: what needs no QEMU."""

import shutil
from pathlib import Path

import pytest

from hypervisors.libvirt.warm import keeping
from hypervisors.libvirt.warm.images import MemoryImages
from hypervisors.libvirt.warm.place import MemoryPlace
from inventory.errors import NoSpace
from tests.identities import KATA


class Played:
    """One that stands still at once; ``busy``: when it is made to."""

    def __init__(self, machine: str, *, busy: bool) -> None:
        self.machine = machine
        self._held = not busy
        self.forced = False

    def stands(self) -> bool:
        return self._held

    def go_on(self, _downtime: int) -> None:
        self._held = self.forced = True


def test_where_one_stands_still_a_busy_one_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "_PATIENCE", 3000.0)
    monkeypatch.setattr(keeping, "_OTHERS", 0.0)
    quiet, busy = Played("quiet", busy=False), Played("busy", busy=True)
    keeping.hold_all([busy, quiet])
    assert busy.forced and not quiet.forced
    monkeypatch.setattr(keeping, "_PATIENCE", 0.0)
    all_busy = [Played("one", busy=True), Played("two", busy=True)]
    keeping.hold_all(all_busy)
    assert all(one.forced for one in all_busy)


def test_there_must_be_room_for_all_of_them_together(tmp_path: Path) -> None:
    images = MemoryImages(MemoryPlace(tmp_path / "warm", KATA, None))
    half = int(shutil.disk_usage(tmp_path).free * 0.6)
    for machine in ("one", "two"):
        images.need({machine: half})
    with pytest.raises(NoSpace, match="the memory of one, two needs"):
        images.need({"one": half, "two": half})
