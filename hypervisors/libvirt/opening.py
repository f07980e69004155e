"""From what a farm file says of a host that libvirt drives to the drivers for it. Complete: nothing is
looked up elsewhere, so that it can be done on another machine (``hypervisors.far``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from host.run import Runner
from hypervisors.api import Callbacks, Directories, Disks
from hypervisors.disks.stores import StorePlace
from hypervisors.libvirt.domain_types import DomainType, Qemu
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.kvm import Accelerator, judge


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
    def farm(self) -> str:
        return self.disks.farm


def open_machines(
    place: Place,
    uri: str | Callable[[], str],
    disks: Disks,
    directories: Directories,
    runner: Runner,
    callbacks: Callbacks,
) -> LibvirtHypervisor:
    """The driver of a place. ``uri``: what it connects to at first use."""
    return LibvirtHypervisor(
        uri, place.farm, disks, runner,
        step=callbacks.step, kind=_kind(place, directories), working=callbacks.working,
        warn=callbacks.warn,
    )  # fmt: skip


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
