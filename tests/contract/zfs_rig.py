"""The ZFS store for the contract's tests: one pool on a file, for as long as the tests run; a dataset of
its own for each test."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from host.run import Runner
from hypervisors.api import no_step
from hypervisors.disks.zfs.disks import ZfsDisks
from hypervisors.ownership import FarmIdentity
from tests.identities import KATA

MIB = 2**20
SIZE = 64 * MIB
FARM = "kata"
POOL = f"fhtest{os.getpid()}"
_numbers = itertools.count(1)


def zfs(*argv: str | Path) -> str:
    done = subprocess.run(["zfs", *map(str, argv)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"zfs {argv}: {done.stderr}"
    return done.stdout


@contextlib.contextmanager
def pool(name: str = POOL, size: int = 4 * 2**30) -> Iterator[str]:
    """A pool on a sparse file in memory, destroyed at the end."""
    subprocess.run(["modprobe", "zfs"], check=True)
    with tempfile.TemporaryDirectory(prefix="fh-zpool-", dir="/dev/shm") as place:
        vdev = Path(place, "vdev")
        with vdev.open("wb") as file:
            file.truncate(size)
        subprocess.run(["zpool", "create", "-f", "-O", "mountpoint=none", name, vdev], check=True)
        try:
            yield name
        finally:
            subprocess.run(["udevadm", "settle", "--timeout=20"], check=False)
            subprocess.run(["zpool", "destroy", "-f", name], check=True)


class ZfsRig:
    """A letter at 1 MiB stands for a disk's content."""

    kind = "zfs"

    def __init__(self, place: Path, pool: str = POOL) -> None:
        self.place = place
        self.pool = pool
        self.dataset = f"t{next(_numbers)}"
        self.root = f"{pool}/{self.dataset}"

    def disks(
        self, farm: FarmIdentity = KATA, *, runner: Runner | None = None, step=no_step, **options
    ) -> ZfsDisks:
        return ZfsDisks(self.pool, self.dataset, farm, runner or Runner(), step=step, **options)

    def image(self, size: int = SIZE) -> Path:
        path = self.place / "image.raw"
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
            file.seek(MIB)
            file.write(b"T" * 65536)
        return path

    def write(self, machine: str, letter: str, size: int = 65536) -> None:
        handle = os.open(self.path(machine), os.O_WRONLY)
        try:
            os.pwrite(handle, letter.encode() * size, MIB)
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, machine: str) -> str:
        with self.path(machine).open("rb") as file:
            file.seek(MIB)
            data = file.read(65536)
        assert len(set(data)) == 1
        return chr(data[0])

    def path(self, machine: str) -> Path:
        return self.disks().ready(machine).path

    def names(self, *options: str) -> list[str]:
        """Of everything below, snapshots too, relative to the rig's dataset."""
        lines = zfs("list", "-H", "-o", "name", "-t", "all", "-r", *options, self.root).splitlines()
        return [line.removeprefix(self.root).lstrip("/") for line in lines]


class ZfsFilesRig(ZfsRig):
    """The same with a raw file in each dataset. Its mounts reach a libvirtd that runs in a mount
    namespace of its own only from a shared mount (mount_namespaces(7)); systemd makes / one."""

    kind = "zfs-files"

    def __init__(self, place: Path, pool: str = POOL) -> None:
        super().__init__(place, pool)
        self.mounts = place / "mounts"

    def disks(
        self, farm: FarmIdentity = KATA, *, runner: Runner | None = None, step=no_step, **options
    ) -> ZfsDisks:
        return super().disks(farm, runner=runner, step=step, files=self.mounts, **options)

    def close(self) -> None:
        for place in self.mounts.glob("*"):
            if place.is_mount():
                subprocess.run(["umount", place], check=True)
