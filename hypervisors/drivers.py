"""The drivers, a line each: where the section of a host with that driver is, module:class."""

from __future__ import annotations

from collections.abc import Mapping

from hypervisors.host import DrivenHost
from inventory import kinds

DRIVERS: Mapping[str, str] = {
    "kvm": "hypervisors.libvirt.kvm_host:KvmHost",
    "xen": "hypervisors.libvirt.xen_host:XenHost",
    "xenapi": "hypervisors.xenapi.host:XenApiHost",
    "ssh": "hypervisors.ssh:SshHost",
    "fake": "hypervisors.fake.host:FakeHost",
}


def all_drivers() -> tuple[type[DrivenHost], ...]:
    """The kinds of hosts that there are."""
    return tuple(kinds.host_section(name) for name in kinds.hosts)
