"""Hosts of driver xen: their section and its opening."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from hypervisors.host import Surroundings
from hypervisors.libvirt.host import TOOLS, LibvirtHost, OpenLibvirt
from inventory.base import at_key
from inventory.hosts import DriverInfo, NeededFile

if TYPE_CHECKING:  # the last, for the annotations, which inventory has evaluated
    from hypervisors.libvirt.opening import Place
    from inventory.fields import Line

_FILES = (
    NeededFile(path="/usr/lib/grub-xen/grub-x86_64-xen.bin", package="grub-xen-host",
               purpose="starts the VMs", disk_boot=True),
    NeededFile(path="/usr/libexec/xen-qemu-system-i386", package="qemu-system-xen",
               purpose="disks that are files, as first-boot data"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class XenHost(LibvirtHost):
    """Xen's libxl, through libvirt."""

    INFO: ClassVar = DriverInfo(
        name="xen", called="a xen host", firmware=(), mac_prefix="00:16:3e",
        modules=("libvirt",), tools=TOOLS, files=_FILES,
    )  # fmt: skip
    NEEDED: ClassVar = {"uri": "such as xen:///system"}

    driver: Literal["xen"] = "xen"
    uri: Line
    """A libvirt URI: xen:///system, or another machine's, xen+ssh://root@HOST/system."""
    guests: Literal["pv", "pvh"] = "pv"
    """What the VMs are: every Xen host can run pv. pvh needs a CPU with virtualization, and guests with
    a kernel of their own for it."""

    def __post_init__(self) -> None:
        if self.uri == "private":
            raise at_key("uri", f"driver xen needs 'uri', {self.NEEDED['uri']}")

    @property
    def paravirtual(self) -> bool:
        return self.guests == "pv"

    def opened(self, around: Surroundings) -> OpenXen:
        return OpenXen(self, around)


class OpenXen(OpenLibvirt):
    """A libvirtd with Xen's driver."""

    declared: XenHost

    def place(self) -> Place:
        from hypervisors.libvirt.opening import Place

        declared = self.declared
        return Place(disks=self.store_place(), driver="xen", uri=declared.uri, guests=declared.guests)
