"""The section of a farm file that names a disk store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from hypervisors.disks.stores import StorePlace
from inventory.base import Model, at_key

if TYPE_CHECKING:  # for the annotations, which inventory has evaluated
    from hypervisors.ownership import FarmIdentity
    from inventory.fields import FilePath, Line, Name


@dataclass(frozen=True, kw_only=True)
class DiskStore(Model):
    """Where a host keeps disks."""

    KEYS: ClassVar = {"copy_mode": "copy"}

    store: Literal["qcow2", "zfs", "zfs-files", "lvm-thin", "lvm"] = "qcow2"
    """qcow2 files; ZFS volumes; ZFS datasets with a raw file each; LVM thin volumes; classic LVM
    snapshots."""
    path: FilePath | None = None
    """qcow2: the directory; absent: farmhand's own state directory."""
    pool: Name | None = None
    """ZFS: the dataset's pool; LVM: the volume group."""
    dataset: Line | None = None
    """ZFS: the dataset that holds the farm, below the pool; LVM thin: the thin pool."""
    copy_mode: Literal["linked", "full"] = "linked"
    """LVM classic: `linked` runs on a writable snapshot, `full` copies at idle I/O priority."""

    def __post_init__(self) -> None:
        if self.store != "qcow2" and self.pool is None:
            raise at_key("store", f"a {self.store} store needs 'pool'", "pool")
        if self.store == "qcow2":
            for key in ("pool", "dataset"):
                if getattr(self, key) is not None:
                    raise at_key(key, f"a qcow2 store has 'path', not '{key}'", "store")
        elif self.path is not None:
            raise at_key("path", f"a {self.store} store has 'pool', not 'path'", "store")
        if self.store == "lvm-thin" and self.dataset is None:
            raise at_key("store", "an lvm-thin store needs 'dataset', the thin pool", "dataset")
        if self.copy_mode == "full" and self.store != "lvm":
            raise at_key("copy", "'copy: full' is for an lvm store", "store")

    def place(self, farm: FarmIdentity, beside: Path) -> StorePlace:
        """The store's place. ``beside``: the farm file's directory."""
        return StorePlace(
            farm=farm, store=self.store, path=beside / self.path if self.path else None,
            pool=self.pool or "", dataset=self.dataset or "", copy=self.copy_mode,
        )  # fmt: skip
