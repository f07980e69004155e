"""The ZFS store where room is short, rights are missing, or the pool is gone or doesn't answer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rigs import PROD, SIZE, short_directory, template, with_two_disks
from zfs_rig import MIB, ZfsRig, pool, zfs

from host.run import Runner
from hypervisors.api import Owner
from hypervisors.disks.zfs.disks import ZfsDisks
from inventory.errors import (
    DriverFailed,
    FarmhandError,
    NoSpace,
    NotFound,
    UsageError,
)
from tests.identities import KATA

pytestmark = pytest.mark.lab


@pytest.fixture
def store(zfs_pool, tmp_path: Path) -> ZfsRig:
    return ZfsRig(tmp_path)


@pytest.fixture
def made(store) -> ZfsDisks:
    return with_two_disks(store)


def test_a_full_pool_is_said_and_loses_nothing(tmp_path):
    with pool("fhtiny", 160 * MIB) as name:
        store = ZfsRig(tmp_path, name)
        disks = store.disks(headroom=8 * MIB)
        sealed = disks.seal(store.image(), template())
        disks.clone(sealed, "kata-prod", PROD, SIZE)
        disks.checkpoint("kata-prod", "one")
        # All that is left is promised to somebody else: to us the pool is full. It is so at once, where
        # writing it full takes minutes of ever smaller transaction groups.
        zfs("create", "-o", f"reservation={disks.capacity().free - MIB // 2}", f"{name}/filler")
        assert disks.capacity().free < MIB
        bold = store.disks(headroom=0)
        for act in (
            lambda: disks.clone(sealed, "kata-x", Owner(KATA, "x"), SIZE),
            lambda: store.disks().checkpoint("kata-prod", "two"),
            lambda: disks.restore("kata-prod", "clean"),
            lambda: store.disks().seal(store.image(), template(2)),
        ):
            with pytest.raises(NoSpace):
                act()
        for act in (
            lambda: bold.clone(sealed, "kata-x", Owner(KATA, "x"), SIZE),
            lambda: bold.checkpoint("kata-prod", "two"),
        ):
            try:
                act()
            except FarmhandError as error:
                assert isinstance(error, NoSpace), error
        newest = disks.find("kata-prod").base
        assert disks.restore("kata-prod", newest).base == newest  # frees: needs no room
        assert store.read("kata-prod") == "T"
        assert [c.name for c in disks.find("kata-prod").checkpoints][:2] == ["clean", "one"]
        disks.destroy("kata-prod")


def test_a_quota_counts(store, made):
    zfs("set", "quota=100M", store.root)
    assert made.capacity().total <= 100 * MIB
    with pytest.raises(NoSpace):
        store.disks().clone(made.templates()[0], "kata-x", Owner(KATA, "x"), SIZE)


def test_what_others_reserve_is_not_free(store, made):
    free = made.capacity().free
    zfs("create", "-V", "300M", f"{store.pool}/thick-{store.dataset}")  # refreservation of its size
    try:
        assert free - made.capacity().free > 290 * MIB
        zfs("create", "-o", "reservation=200M", f"{store.pool}/promised-{store.dataset}")
        assert free - made.capacity().free > 490 * MIB
    finally:
        zfs("destroy", f"{store.pool}/thick-{store.dataset}")
        zfs("destroy", f"{store.pool}/promised-{store.dataset}")


def test_a_disk_with_a_reservation_is_frozen_only_where_there_is_room(store, made):
    """A snapshot of a volume with refreservation reserves what it may yet overwrite (zfsprops(7))."""
    volume = made.ready("kata-prod").path.relative_to("/dev/zvol")
    zfs("set", "quota=400M", store.root)
    zfs("set", "refreservation=60M", volume)
    with Path("/dev/zvol", volume).open("r+b") as file:
        file.write(os.urandom(16 * MIB))
    bold = store.disks(headroom=0)
    zfs("create", "-o", f"reservation={made.capacity().free - MIB}", f"{store.root}/filler")
    before = store.names()
    with pytest.raises(NoSpace):
        bold.checkpoint("kata-prod", "one")
    assert store.names() == before
    zfs("destroy", f"{store.root}/filler")
    bold.checkpoint("kata-prod", "one")
    assert [c.name for c in made.find("kata-prod").checkpoints] == ["clean", "one"]


def test_no_such_pool_and_no_such_names(tmp_path):
    disks = ZfsDisks("nosuchpool", "x", KATA, Runner())
    with pytest.raises(NotFound, match="nosuchpool"):
        disks.list()
    for names in (("a b", "x"), ("tank", "../x"), ("tank", "x@y"), ("-r", "x"), ("tank", "")):
        with pytest.raises(UsageError):
            ZfsDisks(*names, KATA, Runner())


def test_without_rights_it_says_so(store, made):
    code = short_directory()  # where nobody may read it
    for package in ("hypervisors", "inventory"):
        shutil.copytree(Path(__file__).parents[2] / package, code / package)
    code.chmod(0o755)
    script = (
        "import os, sys, json\n"
        "from hypervisors.disks.zfs.disks import ZfsDisks; from host.run import Runner\n"
        "from hypervisors.ownership import FarmIdentity\n"
        "from inventory.errors import FarmhandError\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "farm = FarmIdentity('kata', '0' * 32)\n"
        f"disks = ZfsDisks({store.pool!r}, {store.dataset!r}, farm, Runner())\n"
        "try: disks.list()\n"
        "except FarmhandError as error: print(type(error).__name__, error, '|', error.remedy)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], cwd="/", env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    shutil.rmtree(code)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("DriverFailed") and "root" in out.stdout


def test_a_suspended_pool_is_said_and_goes_on_when_its_devices_are_back(tmp_path):
    """A pool on a device that fails: dmsetup(8), target "error"."""
    backing = Path("/dev/shm", f"fh-fails-{os.getpid()}")
    with backing.open("wb") as file:
        file.truncate(256 * MIB)
    loop = run("losetup", "--find", "--show", backing)
    good, bad = f"0 {256 * 2048} linear {loop} 0", f"0 {256 * 2048} error"
    name, device = "fhfails", f"fhfails{os.getpid()}"

    def table(text: str) -> None:
        run("dmsetup", "suspend", "--noflush", "--nolockfs", device)
        run("dmsetup", "load", device, "--table", text)
        run("dmsetup", "resume", device)

    run("dmsetup", "create", device, "--table", good)
    try:
        run("zpool", "create", "-f", "-O", "mountpoint=none", name, f"/dev/mapper/{device}")
        store = ZfsRig(tmp_path, name)
        disks = store.disks(headroom=0)
        sealed = disks.seal(store.image(), template())
        disks.clone(sealed, "kata-prod", PROD, SIZE)
        table(bad)
        with subprocess.Popen(["zfs", "set", "test:try=1", name], stderr=subprocess.DEVNULL):  # hangs
            wait_for(lambda: run("zpool", "list", "-H", "-o", "health", name) == "SUSPENDED")
            for act in (
                lambda: disks.clone(sealed, "kata-x", Owner(KATA, "x"), SIZE),
                lambda: disks.checkpoint("kata-prod", "one"),
                lambda: disks.restore("kata-prod", "clean"),
                lambda: disks.destroy("kata-prod"),
            ):
                with pytest.raises(DriverFailed, match="is suspended") as got:
                    act()
                assert "zpool clear fhfails" in got.value.remedy
            table(good)
            run("zpool", "clear", name)
        assert store.read("kata-prod") == "T"
        disks.checkpoint("kata-prod", "one")
        disks.destroy("kata-prod")
        run("zpool", "destroy", "-f", name)
    finally:
        run("dmsetup", "remove", "--force", device)
        run("losetup", "--detach", loop)
        backing.unlink()


def wait_for(true) -> None:
    limit = time.monotonic() + 120
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.2)


def run(*argv: str | Path) -> str:
    done = subprocess.run([str(a) for a in argv], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout.strip()
