"""The locks of a volume group's store are those of the machine that has the group, whoever asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from host import paths
from host.run import Runner
from hypervisors.api import Callbacks, Directories
from hypervisors.disks.lvm.volumes import LvmVolumes
from hypervisors.disks.stores import StorePlace, open_disks
from inventory.errors import WrongState
from tests.identities import KATA, identity


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(paths, "SHARED", tmp_path / "run/farmhand")
    return paths.SHARED


def store(place: Path, farm=KATA, kind: str = "lvm", group: str = "vg0") -> LvmVolumes:
    """That of a controller with a state directory of its own."""
    directories = Directories(state=place, farm=place / "kata", cache=place, runtime=place)
    where = StorePlace(farm=farm, store=kind, pool=group, dataset="pool" if kind == "lvm-thin" else "")
    made = open_disks(where, directories, Runner(), Callbacks(), None)
    assert isinstance(made, LvmVolumes)
    return made


@pytest.mark.parametrize("kind", ["lvm", "lvm-thin"])
def test_two_state_directories_have_one_lock(shared: Path, tmp_path: Path, kind: str) -> None:
    one = store(tmp_path / "one", kind=kind)
    two = store(tmp_path / "two", identity("kata", "/root/farm.yaml"), kind)
    other = store(tmp_path / "two", kind=kind, group="vg1")
    with one._locked() as held:
        assert two._lock.held() and not other._lock.held()
        with held.released():
            assert not two._lock.held()
    assert not two._lock.held()
    with one._filling("fh.base.1.abcd"):
        assert two._alive("fh.base.1.abcd")
    assert not two._alive("fh.base.1.abcd")
    assert {path.name for path in shared.rglob("*") if path.is_file()} == {"lock"}
    assert not [path for name in ("one", "two") for path in (tmp_path / name).rglob("*lock")]


def test_who_had_the_lock_is_seen_from_every_state_directory(shared: Path, tmp_path: Path) -> None:
    one, two = store(tmp_path / "one"), store(tmp_path / "two")
    with one._locked():
        stamp = one._stamp()
    assert stamp and two._stamp() == stamp
    with two._locked():
        pass
    assert one._stamp() != stamp


def test_a_directory_of_locks_that_others_may_write_in_is_refused(shared: Path, tmp_path: Path) -> None:
    place = shared / "stores/lvm-vg0"
    place.mkdir(parents=True)
    place.chmod(0o777)
    with pytest.raises(WrongState, match="lvm-vg0"), store(tmp_path / "one")._locked():
        pass
