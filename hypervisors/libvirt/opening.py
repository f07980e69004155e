"""From what a farm file says of a host that libvirt drives to the drivers for it. Complete: nothing is
looked up elsewhere, so that it can be done on another machine (``hypervisors.far``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from host import paths
from host.leases import FileLeases
from host.run import Runner
from hypervisors.api import Callbacks, Directories, Disks
from hypervisors.disks.stores import StorePlace
from hypervisors.libvirt.domain_types import DomainType, Qemu
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.kvm import Accelerator, judge
from hypervisors.libvirt.warm.place import MemoryPlace
from hypervisors.ownership import FarmIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a libvirt driver and its store are opened with. ``uri`` is for the machine that they run
    on."""

    disks: StorePlace
    driver: Literal["kvm", "xen"]
    uri: str
    accelerator: Accelerator = "auto"
    guests: Literal["pv", "pvh"] = "pv"

    @property
    def farm(self) -> FarmIdentity:
        return self.disks.farm


def open_machines(
    place: Place,
    uri: str | Callable[[], str],
    disks: Disks,
    directories: Directories,
    runner: Runner,
    callbacks: Callbacks,
    reader: int | None,
) -> LibvirtHypervisor:
    """The driver of a place. ``uri``: what it connects to at first use. ``reader``: who QEMU runs as, if
    not ourselves."""
    return LibvirtHypervisor(
        uri, place.farm, disks, runner,
        step=callbacks.step, kind=_kind(place, directories), working=callbacks.working,
        warn=callbacks.warn, memory=MemoryPlace(directories.farm / "warm", place.farm, reader),
    )  # fmt: skip


def leases_of(place: Place, directories: Directories) -> Sequence[FileLeases]:
    """Of those who change things on this machine, each user by himself: another one's marks are refused,
    and libvirt defines no name twice; a lock that two users can both hold either can hold up for ever.
    Besides, of those who have this store: a directory of files, or a pool or a volume group, which is
    root's."""
    found = [FileLeases(directories.runtime / "leases")]
    if place.disks.pool:
        kind = place.disks.store.partition("-")[0]
        found.append(FileLeases(paths.SHARED / "leases" / f"{kind}-{place.disks.pool}"))
    if place.disks.path is not None:
        found.append(FileLeases(place.disks.path / ".leases"))
    return found


def _kind(place: Place, directories: Directories) -> DomainType:
    """The kind of domains of that place."""
    if place.driver == "xen":
        from hypervisors.libvirt.libxl import Xen

        return Xen(Runner(), place.guests)
    return Qemu(judge(place.accelerator, Runner(), directories.cache))


def reader_of(driver: str, uri: str) -> int | None:
    """Who must be able to read disks and seeds: the user that the system's libvirtd runs QEMU as, where
    that isn't ours and we may give files away (root)."""
    if driver != "kvm" or os.geteuid() != 0 or "/system" not in uri:
        return None
    import pwd

    try:
        return pwd.getpwnam("libvirt-qemu").pw_uid
    except KeyError:
        return None
