"""What only ZFS disks as raw files have: mounts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from rigs import SIZE, opened, short_directory, template
from zfs_rig import ZfsFilesRig, zfs

from hypervisors.api import Owner
from hypervisors.disks.zfs.disks import ZfsDisks
from inventory.errors import Busy, Conflict
from tests.identities import KATA

pytestmark = pytest.mark.lab
BOTH = ["kata-prod", "kata-dev2"]


@pytest.fixture
def store(zfs_pool) -> Iterator[ZfsFilesRig]:
    with opened("zfs-files", short_directory()) as rig:
        yield rig


@pytest.fixture
def made(store) -> ZfsDisks:
    disks = store.disks()
    sealed = disks.seal(store.image(), template())
    for machine in BOTH:
        disks.clone(sealed, machine, Owner(KATA, machine.removeprefix("kata-")), SIZE)
    return disks


def mounts(store) -> list[str]:
    return sorted(path.name.rpartition("%")[2] for path in store.mounts.glob("*") if path.is_mount())


def test_only_present_disks_are_mounted_and_after_a_boot_none(store, made):
    assert mounts(store) == ["kata-dev2.1", "kata-prod.1"]
    store.write("kata-prod", "A")
    made.checkpoint("kata-prod", "one")
    made.restore("kata-prod", "clean")
    assert store.read("kata-prod") == "T"
    assert mounts(store) == ["kata-dev2.1", "kata-prod.2"]
    for path in list(store.mounts.glob("*")):
        subprocess.run(["umount", path], check=True)
    assert made.pristine("kata-prod", "clean")
    with pytest.raises(Conflict):
        made.clone(made.templates()[0], "kata-prod", Owner(KATA, "prod"), SIZE)
    made.restore("kata-prod", "one")
    assert store.read("kata-prod") == "A"
    made.destroy("kata-prod")
    assert mounts(store) == []


def test_a_file_in_use_is_left_and_the_others_too(store, made):
    for machine in BOTH:
        store.write(machine, "A")
    handle = os.open(store.path("kata-dev2"), os.O_RDONLY)
    try:
        for act in (
            lambda: made.restore("kata-dev2", "clean"),
            lambda: made.destroy("kata-dev2"),
            lambda: made.restore_all(BOTH, "clean"),
        ):
            with pytest.raises(Busy, match="kata-dev2"):
                act()
        assert mounts(store) == ["kata-dev2.1", "kata-prod.1"]
    finally:
        os.close(handle)
    assert [store.read(machine) for machine in BOTH] == ["A", "A"]
    made.restore_all(BOTH, "clean")
    assert [store.read(machine) for machine in BOTH] == ["T", "T"]
    assert list(made.leftovers()) == []


def test_qemus_user_may_come_in_and_giving_writes_nothing(store, made):
    disks = store.disks(reader_uid=64055)
    disk = disks.clone(disks.templates()[0], "kata-x", Owner(KATA, "x"), SIZE)
    assert (store.mounts.stat().st_uid, store.mounts.stat().st_mode & 0o777) == (64055, 0o700)
    assert disk.path.stat().st_mode & 0o777 == 0o666
    subprocess.run(["zpool", "sync", store.pool], check=True)
    volume = disk.path.parent.name.replace("%", "/")
    assert zfs("get", "-Hpo", "value", "written", volume).strip() == "0"
    assert disks.pristine("kata-x", "clean")


def test_volumes_and_files_do_not_mix(store, made):
    volumes = ZfsDisks(store.pool, store.dataset, KATA, made._runner)
    with pytest.raises(Conflict, match="another kind"):
        volumes.seal(store.image(), template(2))
