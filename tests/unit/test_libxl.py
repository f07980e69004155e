"""Definitions for Xen, and how far a guest is squeezed; the rest needs a Xen host (tests/contract/)."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.api import Checkpoint, Disk, MachineSpec, Nic, Owner
from hypervisors.libvirt.domain_xml import read_domain
from hypervisors.libvirt.libxl import Xen
from hypervisors.libvirt.libxl_balloon import least
from inventory.errors import Unsupported
from tests.identities import KATA

MIB = 2**20
OWNER = Owner(KATA, "prod")
SPEC = MachineSpec(
    name="kata-prod", owner=OWNER, memory=192 * MIB, vcpus=2, disk_size=64 * MIB,
    nic=Nic(mac="00:16:3e:01:02:03", mode="bridge", target='xen"br<&>'), seed=Path("/seed.iso"),
)  # fmt: skip
DISK = Disk(
    machine="kata-prod", owner=OWNER, path=Path("/dev/vg/kata-prod"), format="raw", size=64 * MIB,
    used=0, template="base@1", base="clean",
    checkpoints=(Checkpoint(name="clean", created=datetime.now(UTC)),),
)  # fmt: skip


def xml(guests="pv", **changes):
    kind = Xen(Runner(), guests)
    return kind.xml(replace(SPEC, **changes), DISK, "base@1", system=True, uuid="")


def test_a_definition_is_read_back():
    seen = read_domain(xml())
    assert (seen.owner, seen.template, seen.memory, seen.vcpus) == (OWNER, "base@1", 192 * MIB, 2)
    assert (seen.mac, seen.disk) == ("00:16:3e:01:02:03", DISK.path)
    assert seen.disks == (DISK.path, Path("/seed.iso"))
    assert "xen&quot;br&lt;&amp;&gt;" in xml()


@pytest.mark.parametrize(
    ("guests", "machine", "grub"),
    [("pv", "xenpv", "grub-x86_64-xen.bin"), ("pvh", "xenpvh", "grub-i386-xen_pvh.bin")],
)
def test_without_a_kernel_of_its_own_a_guest_boots_grub(guests, machine, grub):
    domain = ET.fromstring(xml(guests))
    assert domain.find("os/type").get("machine") == machine
    assert domain.findtext("os/kernel").endswith(grub)
    domain = ET.fromstring(xml(guests, kernel=Path("/k"), initrd=Path("/i"), cmdline="quiet"))
    assert [domain.findtext(f"os/{x}") for x in ("kernel", "initrd", "cmdline")] == ["/k", "/i", "quiet"]


def test_devices_go_to_blkback_and_files_to_qemu():
    domain = ET.fromstring(xml())
    drivers = [d.find("driver").attrib for d in domain.iterfind("devices/disk")]
    assert drivers == [{"name": "phy", "type": "raw"}, {"name": "qemu", "type": "raw"}]


def test_user_mode_is_refused():
    with pytest.raises(Unsupported, match="no forwarded ports"):
        xml(nic=Nic(mac="00:16:3e:01:02:03", mode="user"))


def test_the_least_grows_ever_slower_with_the_maximum():
    """The table in the kernel's own comment: 128 -> 72, 512 -> 168, 2048 -> 360 MiB."""
    assert [least(n * MIB) // MIB for n in (128, 192, 512, 2048)] == [72, 88, 168, 360]
    assert all(least(n * MIB) <= least((n + 16) * MIB) < (n + 16) * MIB for n in range(16, 8192, 16))
