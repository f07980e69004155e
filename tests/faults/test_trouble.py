"""What a host may do to us in the middle: a full pool, a full thin pool's data or metadata, a snapshot
that overflows, a module that is missing, a volume that somebody has open, a libvirtd that dies. Each
gives one clear line, nothing is lost, recovery has nothing left to do or does it, and once the trouble
is over the same command goes through."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench import Bench
from benches import bench_on
from places import OLD, LvmPlace, Machines, ZfsPlace, run

from hypervisors.disks.zfs.disks import ZfsDisks
from inventory.errors import Busy, DriverFailed, FarmhandError, NoSpace
from provision.member import Member, is_on
from tests import farm
from tests.contract import lvm_rig

pytestmark = [pytest.mark.lab, pytest.mark.timeout(3600)]
MIB = 2**20


def refused(bench: Bench, error: type[FarmhandError], words: str, act: Callable[..., object]) -> None:
    """One line with these words, what to do about it, and nothing that is unfinished."""
    with bench.site() as site:
        with pytest.raises(error, match=words) as raised:
            act(site)
        assert "\n" not in raised.value.message
        assert raised.value.remedy
        assert site.locks.held() == ()
    bench.recovered(words)


def holds(bench: Bench, vm: str, letter: str = OLD) -> None:
    """Its disk is what it was."""
    with bench.site() as site:
        disk = site.disks("here").find(Member(site, vm).machine)
        assert disk
        assert bench.place.read(disk, site) == letter
        assert Member(site, vm).look() is not None


def half(bench: Bench) -> None:
    """prod is made, and something is on its disk since a checkpoint; dev2 isn't there."""
    with bench.site() as site:
        farm.destroy(site, list(site.farm.vms))
        farm.clone_farm(site, ["prod"], start=False, wait=False)
        bench.write_on(site, "prod")
        farm.checkpoint(site, ["prod"], "kept", wait=False)
        bench.write_on(site, "prod")


def all_well(bench: Bench) -> None:
    bench.usable("after the trouble")
    with bench.site() as site:
        farm.reset(site, ["prod"], wait=False)
        farm.destroy(site, list(site.farm.vms))
    assert bench.shape()["prod"] == bench.shape()["dev2"] == []


def clone_dev2(site: object) -> object:
    return farm.clone_farm(site, ["dev2"], wait=False)  # type: ignore[arg-type]


def reset_prod(site: object) -> object:
    return farm.reset(site, ["prod"], start=False, wait=False)  # type: ignore[arg-type]


def keep_prod(site: object) -> object:
    return farm.checkpoint(site, ["prod"], "more", wait=False)  # type: ignore[arg-type]


@contextlib.contextmanager
def opened_by_another(bench: Bench) -> Iterator[int]:
    """prod's disk; the pid of who has it."""
    with bench.site() as site:
        disk = site.disks("here").find(Member(site, "prod").machine)
        assert disk
    with disk.path.open("rb") as file:
        holder = subprocess.Popen(["sleep", "600"], stdin=file)
    try:
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def busy(bench: Bench) -> None:
    half(bench)
    with opened_by_another(bench) as pid:
        words = rf"sleep \(pid {pid}\)"
        refused(bench, Busy, words, reset_prod)
        holds(bench, "prod")
        with bench.site() as site:
            disk = site.disks("here").find(Member(site, "prod").machine)
            with pytest.raises(Busy, match=words):
                farm.destroy(site, ["prod"])
            # the definition went first: what is left can't be started, and goes when it is called again
            assert site.journal.unfinished() == ()
            assert disk
            assert bench.place.read(disk, site) == OLD
    with bench.site() as site:
        farm.destroy(site, ["prod"])
    all_well(bench)


@contextlib.contextmanager
def not_loadable(*modules: str) -> Iterator[None]:
    """These kernel modules, which must be out of use."""
    rule = Path("/etc/modprobe.d/farmhand-test.conf")
    rule.write_text("".join(f"install {module} /bin/false\n" for module in modules))
    try:
        for module in modules:
            run("modprobe", "-r", module)
        yield
    finally:
        rule.unlink()
        for module in modules:
            run("modprobe", module)


@pytest.fixture(scope="module")
def zfs(pool: str, cache: Path) -> Iterator[Bench]:
    with bench_on(ZfsPlace(pool, 900), cache) as bench:
        yield bench


def test_zfs_full_pool(zfs: Bench, pool: str) -> None:
    half(zfs)
    free = int(run("zfs", "get", "-Hpo", "value", "available", pool))
    # all but a little is promised to somebody else
    run("zfs", "create", "-o", f"reservation={free - 100 * MIB}", f"{pool}/filler")
    try:
        refused(zfs, NoSpace, "free|available", clone_dev2)
        refused(zfs, NoSpace, "available", keep_prod)
        refused(zfs, NoSpace, "available", reset_prod)
        holds(zfs, "prod")
        with zfs.site() as site:
            disk = site.disks("here").find(Member(site, "prod").machine)
            assert disk
        _fill(disk.path, 8 * MIB)
        left = int(run("zfs", "get", "-Hpo", "value", "available", pool))
        reserved = int(run("zfs", "get", "-Hpo", "value", "reservation", f"{pool}/filler"))
        run("zfs", "set", f"reservation={reserved + left - MIB // 2}", f"{pool}/filler")
        with zfs.site() as site:  # the newest: that frees what filled the pool
            farm.reset(site, ["prod"], to="kept", start=False)
        holds(zfs, "prod")
    finally:
        run("zfs", "destroy", f"{pool}/filler")
    all_well(zfs)


def test_zfs_open_elsewhere(zfs: Bench) -> None:
    busy(zfs)


def test_zfs_module_missing(zfs: Bench, pool: str) -> None:
    half(zfs)
    listed = run("zpool", "list", "-HvPo", "name", pool).splitlines()
    vdev = Path(listed[1].split()[0])
    run("udevadm", "settle", "--timeout=60")
    run("zpool", "export", pool)
    with not_loadable("zfs"), zfs.site() as site:
        for act in (clone_dev2, reset_prod, lambda site: farm.destroy(site, ["prod"])):
            with pytest.raises(DriverFailed, match="ZFS isn't loaded") as raised:
                act(site)
            assert "modprobe zfs" in raised.value.remedy
    with zfs.site() as site, pytest.raises(FarmhandError, match=f"no ZFS pool {pool}") as raised:
        clone_dev2(site)
    assert "zpool import" in raised.value.remedy
    run("zpool", "import", "-d", vdev.parent, pool)
    zfs.recovered("module missing")
    holds(zfs, "prod")
    all_well(zfs)


def test_libvirtd_dies_in_the_middle(pool: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the disk and the definition: what it makes of that, with or without an error, is whole."""
    with bench_on(Machines(ZfsPlace(pool, 901)), cache) as bench:
        half(bench)
        real = ZfsDisks.clone

        def then_it_dies(self: ZfsDisks, *arguments: object) -> object:
            disk = real(self, *arguments)  # type: ignore[arg-type]
            _kill_libvirtd(bench)
            return disk

        monkeypatch.setattr(ZfsDisks, "clone", then_it_dies)
        with bench.site() as site:
            try:
                farm.clone_farm(site, ["dev2"], start=False, wait=False)
            except FarmhandError as error:
                assert "\n" not in error.message
                assert re.search("libvirt", error.message)
        monkeypatch.undo()
        bench.recovered("libvirtd died")
        holds(bench, "prod")
        with bench.site() as site:
            farm.clone_farm(site, start=False, wait=False)
            _kill_libvirtd(bench)
            farm.reset(site, ["prod"], start=False, wait=False)
            _kill_libvirtd(bench)
            farm.destroy(site, ["prod"])
        bench.recovered("libvirtd died")


def _kill_libvirtd(bench: Bench) -> None:
    with bench.site() as site:
        private = site.daemon()
        assert private.running()
        os.kill(int(private._pidfile.read_text()), signal.SIGKILL)


@pytest.fixture
def small(cache: Path) -> Iterator[tuple[Bench, lvm_rig.ThinRig]]:
    """A thin pool with room for a clone or two, which fails writes at once when it is full."""
    with lvm_rig.ThinRig(data="400M", metadata="2M") as rig:
        run("lvchange", "-q", "--errorwhenfull", "y", f"{rig.vg}/pool")
        with bench_on(LvmPlace(rig.vg, rig.pool, "lvm-thin"), cache) as bench:
            try:
                yield bench, rig
            finally:
                subprocess.run(["lvremove", "-q", "-f", f"{rig.vg}/filler"], check=False)


def test_thin_full_of_data(small: tuple[Bench, lvm_rig.ThinRig]) -> None:
    bench, rig = small
    half(bench)
    run("lvcreate", "-q", "-V", "1G", "-n", "filler", "--thinpool", "pool", rig.vg)
    filler = Path("/dev", rig.vg, "filler")
    _fill(filler, 200 * MIB)
    refused(bench, NoSpace, "free", clone_dev2)
    refused(bench, NoSpace, "data free", keep_prod)
    with bench.site() as site:  # takes little before it gives some back
        reset_prod(site)
        bench.write_on(site, "prod")
    holds(bench, "prod")
    with pytest.raises(OSError):
        _fill(filler, 600 * MIB)  # to the last block
    refused(bench, NoSpace, "free", clone_dev2)
    refused(bench, NoSpace, "data free", keep_prod)
    holds(bench, "prod")
    refused(bench, NoSpace, "threshold", reset_prod)  # LVM makes nothing in a full pool
    holds(bench, "prod")
    run("lvremove", "-q", "-f", f"{rig.vg}/filler")
    all_well(bench)


def test_thin_full_of_metadata(small: tuple[Bench, lvm_rig.ThinRig]) -> None:
    """4 MiB of it, taken by empty volumes that LVM knows nothing of."""
    bench, rig = small
    half(bench)
    device, made = f"{rig.vg}-pool-tpool", range(10_000, 11_000)
    last = 0
    for n in made:
        run("dmsetup", "message", device, "0", f"create_thin {n}")
        if n % 25:
            continue
        used, total = map(int, run("dmsetup", "status", device).split()[4].split("/"))
        last = n
        if used > total * 0.91:
            break
    else:
        raise AssertionError(f"{used} of {total} metadata blocks are used")
    try:
        for act in (clone_dev2, keep_prod, reset_prod):
            refused(bench, NoSpace, "metadata", act)
        holds(bench, "prod")
    finally:
        for n in range(last - 400, last + 1):
            run("dmsetup", "message", device, "0", f"delete {n}")
    all_well(bench)


def test_thin_module_missing(small: tuple[Bench, lvm_rig.ThinRig]) -> None:
    bench, rig = small
    half(bench)
    run("vgchange", "-q", "-an", rig.vg)
    with not_loadable("dm_thin_pool"), bench.site() as site:
        for act in (clone_dev2, reset_prod):
            with pytest.raises(DriverFailed, match="device-mapper module") as raised:
                act(site)
            assert "modprobe dm-thin-pool" in raised.value.remedy
    run("vgchange", "-q", "-ay", rig.vg)
    bench.recovered("module missing")
    holds(bench, "prod")
    all_well(bench)


def _fill(device: Path, size: int) -> None:
    data = os.urandom(MIB)
    handle = os.open(device, os.O_WRONLY)
    try:
        for at in range(0, size, MIB):
            os.pwrite(handle, data, at)
        os.fsync(handle)
    finally:
        os.close(handle)


@pytest.fixture(scope="module")
def linked(group: lvm_rig.ThinRig, cache: Path) -> Iterator[Bench]:
    with bench_on(LvmPlace(group.vg, group.pool, "lvm-linked"), cache, disk="160M") as bench:
        yield bench


def test_classic_snapshot_overflows(linked: Bench) -> None:
    """The disk is lost, as LVM has it; no other, and not the name."""
    with linked.site() as site:
        farm.clone_farm(site, start=False, wait=False)
        linked.write_on(site, "dev2")
        disk = site.disks("here").find(Member(site, "prod").machine)
        assert disk
    with pytest.raises(OSError):
        _fill(disk.path, 100 * MIB)
        disk.path.read_bytes()
    refused(linked, DriverFailed, "is lost", lambda site: farm.start(site, ["prod"], wait=False))
    refused(linked, DriverFailed, "is lost", keep_prod)
    with linked.site() as site:
        assert not is_on(Member(site, "prod").look())
        farm.reset(site, ["prod"], wait=False)
        assert is_on(Member(site, "prod").look())
    holds(linked, "prod", "T")
    holds(linked, "dev2")
    all_well(linked)


def test_classic_open_elsewhere(linked: Bench) -> None:
    busy(linked)


def test_classic_group_full(linked: Bench, group: lvm_rig.ThinRig) -> None:
    half(linked)
    run("lvcreate", "-q", "-y", "-l", "100%FREE", "-n", "filler", group.vg)
    try:
        for act in (clone_dev2, keep_prod, reset_prod):
            refused(linked, NoSpace, "free", act)
        holds(linked, "prod")
    finally:
        run("lvremove", "-q", "-f", f"{group.vg}/filler")
    all_well(linked)
