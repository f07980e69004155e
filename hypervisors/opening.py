"""From what a farm file says of a host that libvirt drives to the drivers for it. Complete: nothing is
looked up elsewhere, so that it can be done on another machine (``hypervisors.far``)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from host.run import Runner
from hypervisors.api import Disks, StepFn, no_step
from hypervisors.libvirt.kinds import Kind
from hypervisors.libvirt.kvm import Accelerator


@dataclass(frozen=True, slots=True, kw_only=True)
class Directories:
    """``state``: all farms' lasting things; ``farm``: this farm's own, below it; ``cache``: what can be
    made again."""

    state: Path
    farm: Path
    cache: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """``uri``: libvirt's, of the machine that these drivers run on. ``path``: the directory of a qcow2
    store; None: below the farm's own."""

    farm: str
    driver: Literal["kvm", "xen"]
    uri: str
    accelerator: Accelerator = "auto"
    guests: Literal["pv", "pvh"] = "pv"
    store: str = "qcow2"
    path: Path | None = None
    pool: str = ""
    dataset: str = ""
    copy: Literal["linked", "full"] = "linked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Voices:
    """What drivers tell while they work: before each change, of what an admin should know, and of how
    far a long one has come."""

    step: StepFn = no_step
    warn: Callable[[str], None] = no_step
    working: Callable[[str], None] = no_step


def store_kind(store: str) -> type[Disks]:
    """Its class, which tells what it offers besides ``Disks``."""
    if store in ("zfs", "zfs-files"):
        from hypervisors.disks.zfs.disks import ZfsDisks

        return ZfsDisks
    if store == "lvm-thin":
        from hypervisors.disks.lvm.thin import LvmThinDisks

        return LvmThinDisks
    if store == "lvm":
        from hypervisors.disks.lvm.classic import LvmClassicDisks

        return LvmClassicDisks
    from hypervisors.disks.qcow2.disks import Qcow2Disks

    return Qcow2Disks


def open_disks(
    place: Place, places: Directories, runner: Runner, voices: Voices, *, reader_uid: int | None
) -> Disks:
    """The host's disk store. Nothing is read or made yet."""
    if place.store in ("zfs", "zfs-files"):
        from hypervisors.disks.zfs.disks import ZfsDisks

        return ZfsDisks(
            place.pool, place.dataset or "farmhand", place.farm, runner,
            step=voices.step, reader_uid=reader_uid,
            files=places.state / "zfs" if place.store == "zfs-files" else None,
        )  # fmt: skip
    if place.store == "lvm-thin":
        from hypervisors.disks.lvm.thin import LvmThinDisks

        return LvmThinDisks(
            place.pool, place.dataset, place.farm, runner, links=places.state / "lvm",
            step=voices.step, reader_uid=reader_uid, warn=voices.warn,
        )  # fmt: skip
    if place.store == "lvm":
        from hypervisors.disks.lvm.classic import LvmClassicDisks

        return LvmClassicDisks(
            place.pool, place.farm, runner, links=places.state / "lvm", copy=place.copy,
            step=voices.step, reader_uid=reader_uid, warn=voices.warn,
            progress=lambda what, done, total: voices.working(f"{what}: {done * 100 // total} %"),
        )  # fmt: skip
    from hypervisors.disks.qcow2.disks import Qcow2Disks

    root = place.path or places.farm / "disks"
    return Qcow2Disks(root, place.farm, runner, step=voices.step, reader_uid=reader_uid)


def open_kind(place: Place, places: Directories) -> Kind:
    """Which hypervisor libvirt drives there."""
    if place.driver == "xen":
        from hypervisors.libvirt.libxl import Xen

        return Xen(Runner(), place.guests)
    from hypervisors.libvirt.kinds import Qemu
    from hypervisors.libvirt.kvm import judge

    return Qemu(judge(place.accelerator, Runner(), places.cache))


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
