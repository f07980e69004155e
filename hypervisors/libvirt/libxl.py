"""Xen through libvirt's libxl driver: PV and PVH guests (https://libvirt.org/drvxen.html, xl.cfg(5)).

Libxl has no libvirt snapshots: checkpoints and reset are the disk store's. Disks that are block devices
go to the kernel's blkback; files, through QEMU in dom0 (package qemu-system-xen). A guest's console is
kept by xenconsoled, where dom0 has it keep logs (``XENCONSOLED_TRACE=guest`` in /etc/default/xen).
"""

from __future__ import annotations

import contextlib
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from host.run import Runner
from hypervisors.api import Capabilities, Disk, MachineSpec, MemoryUse, StepFn
from hypervisors.libvirt import libxl_balloon
from hypervisors.libvirt.domain_types import SHUTDOWN_PARAVIRT, UNDEFINE_MANAGED_SAVE
from hypervisors.libvirt.domain_xml import DomainDefinition, add_ends, head, is_device, read_domain, text
from inventory.errors import Conflict, FarmhandError, Unsupported

if TYPE_CHECKING:
    import libvirt

Guests = Literal["pv", "pvh"]
_GRUB: dict[Guests, str] = {
    "pv": "/usr/lib/grub-xen/grub-x86_64-xen.bin",
    "pvh": "/usr/lib/grub-xen/grub-i386-xen_pvh.bin",
}
_CONSOLES = Path("/var/log/xen/console")
_ACTIVE = 1  # libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE


@dataclass(frozen=True, slots=True)
class Xen:
    """``guests``: what all of them are."""

    runner: Runner
    guests: Guests = "pv"
    consoles: Path = _CONSOLES
    shutdown: int = SHUTDOWN_PARAVIRT
    maps_memory: bool = False
    saves_paused: bool = False  # "has to be running because libxenlight will suspend it"
    undefine: int = UNDEFINE_MANAGED_SAVE

    def capabilities(self) -> Capabilities:
        notes = [f"Xen, {self.guests.upper()} guests; checkpoints are the disk store's"]
        if not self.consoles.is_dir():
            notes.append("no console logs: set XENCONSOLED_TRACE=guest in /etc/default/xen")
        return Capabilities(
            driver="xen",
            accelerated=True,
            live_balloon=True,
            warm_checkpoints=False,
            notes=tuple(notes),
            warm_together=False,
        )

    def xml(
        self,
        spec: MachineSpec,
        disk: Disk,
        template: str,
        *,
        system: bool,  # noqa: ARG002 - there is no other libvirtd that drives Xen
        uuid: str,
    ) -> str:
        if spec.nic.mode == "user":
            raise Unsupported(
                f"{spec.name}: Xen has no user-mode network, and thus no forwarded ports",
                remedy="in the farm file: 'network: {mode: bridge, bridge: xenbr0}', a bridge of dom0",
            )
        domain = head("xen", spec, template, uuid)
        machine = ET.SubElement(domain, "os")
        kind, name = ("linux", "xenpv") if self.guests == "pv" else ("xenpvh", "xenpvh")
        text(machine, "type", kind, arch="x86_64", machine=name)
        # without a kernel of ours: GRUB as the guest's kernel, which boots the one on its disk
        text(machine, "kernel", str(spec.kernel or _GRUB[self.guests]))
        if spec.kernel and spec.initrd:
            text(machine, "initrd", str(spec.initrd))
        if spec.kernel:
            text(machine, "cmdline", spec.cmdline)
        add_ends(domain)
        devices = ET.SubElement(domain, "devices")
        _disk(devices, "disk", disk.path, disk.format, "xvda")
        if spec.seed:  # QEMU 7.2 opens a read-only disk for writing as well, and fails; not a CD-ROM
            _disk(devices, "cdrom", spec.seed, "raw", "xvdb")
        interface = ET.SubElement(devices, "interface", type=spec.nic.mode)
        ET.SubElement(interface, "mac", address=spec.nic.mac)
        ET.SubElement(interface, "source", {spec.nic.mode: spec.nic.target})
        console = ET.SubElement(devices, "console", type="pty")
        ET.SubElement(console, "target", type="xen", port="0")
        return ET.tostring(domain, encoding="unicode")

    def cut_power(self, name: str, uuid: str) -> bool:  # noqa: ARG002
        return False

    def console_log(self, name: str, seen: DomainDefinition) -> Path | None:  # noqa: ARG002
        """Path of xenconsoled's log of the machine, which goes on over all its starts; None if there is
        none."""
        log = self.consoles / f"guest-{name}.log"
        return log if log.exists() else None

    def set_memory(
        self, domain: libvirt.virDomain, name: str, target: int, timeout: float, step: StepFn
    ) -> int:
        store = libxl_balloon.Xenstore(self.runner, domain.ID())
        return libxl_balloon.set_memory(domain, name, target, timeout, step, store)

    def memory(self, domain: libvirt.virDomain, name: str) -> MemoryUse:
        return libxl_balloon.memory(domain, name, libxl_balloon.Xenstore(self.runner, domain.ID()))

    def notes(self, connection: libvirt.virConnect) -> Mapping[str, str]:  # noqa: ARG002
        """None: Xen counts pages itself, and knows no time at which a guest told anything."""
        return {}

    def why_no_start(self, domain: libvirt.virDomain, seen: DomainDefinition) -> FarmhandError | None:
        """See ``DomainType.why_no_start``. libxl says only that it failed; the usual reason is a device
        that another guest has open."""
        import libvirt

        wanted = {path.resolve() for path in seen.disks}
        for other in domain.connect().listAllDomains(_ACTIVE):
            with contextlib.suppress(libvirt.libvirtError):  # it ended meanwhile
                name = other.name()
                shared = {p.resolve() for p in read_domain(other.XMLDesc(0)).disks} & wanted
                if name != domain.name() and shared:
                    return Conflict(
                        f"{domain.name()} can't start: {name} has {min(shared)} open",
                        remedy=f"stop {name} first, or give one of them another disk",
                    )
        return None


def _disk(devices: ET.Element, kind: str, path: Path, form: str, target: str) -> None:
    device = is_device(path)
    disk = ET.SubElement(devices, "disk", type="block" if device else "file", device=kind)
    ET.SubElement(disk, "driver", name="phy" if device else "qemu", type=form)
    ET.SubElement(disk, "source", {"dev" if device else "file": str(path)})
    ET.SubElement(disk, "target", dev=target, bus="xen")
    if kind == "cdrom":
        ET.SubElement(disk, "readonly")
