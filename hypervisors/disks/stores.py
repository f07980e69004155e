"""The disk stores, a line each; and a host's store, opened. A store is opened by its class's ``at``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, Self

from host.run import Runner
from hypervisors.api import Callbacks, Directories, Disks
from hypervisors.ownership import FarmIdentity


class StoreInfo(NamedTuple):
    """``place``: module:class. ``tool``: the command it can't do without, of these Debian packages."""

    place: str
    tool: str = ""
    packages: str = ""
    remark: str = ""  # said before how to install them


_ZFS = StoreInfo(
    place="hypervisors.disks.zfs.disks:ZfsDisks", tool="zfs", packages="zfsutils-linux",
    remark="with Debian's contrib, ",
)  # fmt: skip
STORES: Mapping[str, StoreInfo] = {
    "qcow2": StoreInfo(place="hypervisors.disks.qcow2.disks:Qcow2Disks"),
    "zfs": _ZFS,
    "zfs-files": _ZFS,
    "lvm-thin": StoreInfo(
        place="hypervisors.disks.lvm.thin:LvmThinDisks", tool="lvm",
        packages="lvm2 thin-provisioning-tools",
    ),
    "lvm": StoreInfo(place="hypervisors.disks.lvm.classic:LvmClassicDisks", tool="lvm", packages="lvm2"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StorePlace:
    """What a farm file says of a host's store. ``path``: the directory of a qcow2 store; None: below the
    farm's own."""

    farm: FarmIdentity
    store: str = "qcow2"
    path: Path | None = None
    pool: str = ""
    dataset: str = ""
    copy: Literal["linked", "full"] = "linked"


class Openable(Disks, Protocol):
    """What a store's class has besides what its instances do."""

    @classmethod
    def at(
        cls,
        place: StorePlace,
        directories: Directories,
        runner: Runner,
        callbacks: Callbacks,
        reader_uid: int | None,
    ) -> Self:
        """Nothing is read or made yet. ``reader_uid``: who else must be able to read disks."""


def store_class(store: str) -> type[Openable]:
    """The class of a host's store. It tells what the store offers besides ``Disks``."""
    module, _, name = STORES[store].place.partition(":")
    found: type[Openable] = getattr(import_module(module), name)
    return found


def open_disks(
    place: StorePlace,
    directories: Directories,
    runner: Runner,
    callbacks: Callbacks,
    reader_uid: int | None,
) -> Disks:
    """The host's disk store. Nothing is read or made yet."""
    return store_class(place.store).at(place, directories, runner, callbacks, reader_uid)
