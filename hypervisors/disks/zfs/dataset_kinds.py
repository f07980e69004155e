"""What a disk is in a ZFS store: a volume, or a dataset with one raw file in it. All else is the same
for both: a dataset, its snapshots and clones, its marks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from host.files import make_directory, open_node, reachable
from host.run import Runner
from hypervisors.disks.devices import await_no_link, await_node, give
from hypervisors.disks.zfs.command import Zfs
from inventory.errors import Busy, CommandFailed, DriverFailed

BLOCK = 16 * 2**10
_DEV = Path("/dev/zvol")
_CLOSING = 10.0  # seconds that udev may take to look at a device


class DatasetKind(Protocol):
    name: str  # the value of "farmhand:store" on the store's own datasets
    parents: Sequence[str]  # properties of these, inherited by all that is made

    def path(self, dataset: str) -> Path:
        """What the hypervisor opens. It is there once the dataset is opened up."""

    def rounded(self, size: int) -> int:
        """The size rounded up to one that a disk can have, in bytes."""

    def made(self, size: int, /) -> list[str]:
        """The arguments of ``zfs create`` for a disk of that size."""

    def resized(self, size: int, /) -> list[str]:
        """The arguments of ``zfs clone`` for a disk larger than its origin."""

    def open_up(self, dataset: str, size: int = 0, /) -> None:
        """Let QEMU's user open it; returns when that works. ``size`` in bytes: what a clone is to have;
        0: what it has."""

    def enlarge(self, dataset: str, size: int, /) -> None:
        """Make an opened one ``size`` bytes large; one that is as large already is left as it is."""

    def seal(self, dataset: str) -> None:
        """Make it read-only, and not to be opened any more."""

    def may_exist(self, stem: str, /) -> bool:
        """False if there is certainly no disk STEM.NUMBER of ours. It runs no command, for it is asked
        before each clone."""

    def paths(self, stem: str, /) -> list[Path]:
        """Those paths of the disks STEM.NUMBER that can be opened now."""

    def free_from(self, stem: str, /) -> int:
        """The first NUMBER of which no disk STEM.NUMBER that was removed has left anything."""

    def await_gone(self, dataset: str, /) -> None:
        """Wait until nothing is left of a disk of that name that was removed."""

    def opened(self, stem: str, /) -> list[str]:
        """Those of the datasets STEM.NUMBER that must be shut before they are changed."""

    def shut(self, datasets: Sequence[str], /) -> None:
        """Make datasets ready to be rolled back or removed, all of them or none. Busy if one is in
        use."""


class Zvols:
    """Block devices below /dev/zvol. Nothing need be shut: that they are open the kernel says."""

    name = "1"
    parents: Sequence[str] = ("-o", "mountpoint=none", "-o", "canmount=off", "-o", "volmode=dev")

    def __init__(self, reader: int | None, zfs: Zfs) -> None:
        self._reader = reader
        self._zfs = zfs

    def path(self, dataset: str) -> Path:
        return _DEV / dataset

    def rounded(self, size: int) -> int:
        return -(-size // BLOCK) * BLOCK

    def made(self, size: int) -> list[str]:
        return ["-s", "-V", str(size), "-b", str(BLOCK)]

    def resized(self, size: int) -> list[str]:
        return ["-o", f"volsize={size}"]

    def open_up(self, dataset: str, _size: int = 0, /) -> None:
        """The kernel writes to a volume once when it makes its device, if its origin has a ZIL header
        (zil_replay): from then on ``written`` tells what others wrote."""
        await_node(self.path(dataset), nudge=self._zfs.nudge)
        give(self.path(dataset), self._reader)

    def enlarge(self, dataset: str, size: int) -> None:
        """A clone is sparse: it has no refreservation that would grow with it (zfsprops(7))."""
        if _length(self.path(dataset)) < size:
            self._zfs.change("set", f"volsize={size}", dataset)

    def seal(self, dataset: str) -> None:
        """The kernel leaves a device that is open just then, as by udev. Told again, it tries again."""
        limit = time.monotonic() + _CLOSING
        while True:
            self._zfs.change("set", "readonly=on", "volmode=none", dataset)
            again = time.monotonic() + 1
            while self.path(dataset).is_symlink() and time.monotonic() < again:
                time.sleep(0.02)
            if not self.path(dataset).is_symlink() or time.monotonic() > limit:
                return  # at the latest the next boot takes it away

    def may_exist(self, stem: str) -> bool:
        """By its device: what is a disk has had one since before its maker returned."""
        return bool(self.paths(stem))

    def paths(self, stem: str) -> list[Path]:
        place = self.path(stem)
        return [p for p in place.parent.glob(f"{place.name}.*") if p.suffix[1:].isdigit()]

    def free_from(self, stem: str) -> int:
        """udev removes the link of a volume that is gone some time later; until then it may lead to
        somebody else's new device of the same number."""
        return 1 + max((int(path.suffix[1:]) for path in self.paths(stem)), default=0)

    def await_gone(self, dataset: str) -> None:
        await_no_link(self.path(dataset))

    def opened(self, _stem: str, /) -> list[str]:
        return []

    def shut(self, _datasets: Sequence[str], /) -> None:
        pass


class RawFiles:
    """``disk.raw`` in each dataset, mounted below a directory of ours that only QEMU's user may enter;
    so the file itself needs no change when a clone is given to that user, which would count as written.

    Legacy mounts (zfs-mount(8)): nothing is mounted but what ``open_up`` was asked for, at boot neither.
    """

    name = "files"
    parents: Sequence[str] = (
        "-o", "mountpoint=legacy", "-o", "atime=off", "-o", f"recordsize={BLOCK}", "-o", "xattr=sa",
    )  # fmt: skip

    def __init__(self, reader: int | None, zfs: Zfs, runner: Runner, mounts: Path) -> None:
        self._reader = reader
        self._zfs = zfs
        self._runner = runner
        self._mounts = mounts.absolute()

    def path(self, dataset: str) -> Path:
        return self._place(dataset) / "disk.raw"

    def rounded(self, size: int) -> int:
        return -(-size // 512) * 512

    def made(self, _size: int, /) -> list[str]:
        return []

    def resized(self, _size: int, /) -> list[str]:
        return []

    def open_up(self, dataset: str, size: int = 0, /) -> None:
        place = self._place(dataset)
        if not place.is_mount():
            make_directory(self._mounts, mode=0o700)
            self._mounts.chmod(0o700)
            if self._reader is not None:
                os.chown(self._mounts, self._reader, -1)
                reachable(self._mounts, self._reader)
            make_directory(place, mode=0o711)
            try:
                self._runner.change("mount", "-t", "zfs", dataset, place, timeout=60)
            except CommandFailed as error:
                if not place.is_mount():  # else another process was quicker
                    raise DriverFailed(
                        f"{dataset} can't be mounted: {error.message}",
                        remedy=f"mount -t zfs {dataset} {place} says why",
                        detail=error.detail,
                    ) from error
        if size:
            with self.path(dataset).open("ab") as file:
                file.truncate(size)
                os.fchmod(file.fileno(), 0o666)

    def enlarge(self, dataset: str, size: int) -> None:
        path = self.path(dataset)
        if _length(path) < size:
            os.truncate(path, size)
            self._zfs.flush(path)

    def seal(self, dataset: str) -> None:
        self.shut([dataset])
        self._zfs.change("set", "readonly=on", dataset)

    def may_exist(self, _stem: str, /) -> bool:
        return True  # mounted or not

    def paths(self, stem: str) -> list[Path]:
        return [path for path in map(self.path, self.opened(stem)) if path.exists()]

    def free_from(self, _stem: str, /) -> int:
        return 1  # a directory nobody is mounted on harms nobody

    def await_gone(self, _dataset: str, /) -> None:
        pass

    def opened(self, stem: str) -> list[str]:
        found = (path.name.replace("%", "/") for path in self._mounts.glob(f"{_flat(stem)}.*"))
        return [name for name in found if name.removeprefix(f"{stem}.").isdigit()]

    def shut(self, datasets: Sequence[str]) -> None:
        done: list[str] = []
        for dataset in datasets:
            place = self._place(dataset)
            if not place.is_mount():
                continue
            try:
                self._runner.change("umount", place, timeout=60)
            except CommandFailed as error:
                for other in done:
                    self.open_up(other)
                raise Busy(
                    f"{self.path(dataset)} is in use: left as it is",
                    remedy=f"stop that, then again; fuser -vm {place} shows who it is",
                    detail=error.detail,
                ) from error
            done.append(dataset)
            with contextlib.suppress(OSError):
                place.rmdir()

    def _place(self, dataset: str) -> Path:
        return self._mounts / _flat(dataset)


def _length(path: Path) -> int:
    """Bytes of a file or a device. A device's is what its volume has once it is opened: after a roll
    back the kernel doesn't know yet (OpenZFS's zvol_setup_zv)."""
    with os.fdopen(open_node(path, os.O_RDONLY), "rb") as file:
        return file.seek(0, os.SEEK_END)


def _flat(dataset: str) -> str:
    return dataset.replace("/", "%")  # which no dataset's name has
