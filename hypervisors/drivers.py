"""The drivers, a line each: where the section of a host with that driver is, module:class."""

from __future__ import annotations

from collections.abc import Mapping

DRIVERS: Mapping[str, str] = {
    "kvm": "hypervisors.libvirt.kvm_host:KvmHost",
    "xen": "hypervisors.libvirt.xen_host:XenHost",
    "xenapi": "hypervisors.xenapi.host:XenApiHost",
    "ssh": "hypervisors.ssh:SshHost",
    "fake": "hypervisors.fake.host:FakeHost",
}
PARTS: Mapping[str, str] = {"DiskStore": "hypervisors.disks.section:DiskStore"}
"""Sections within theirs."""
