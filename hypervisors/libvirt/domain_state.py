"""What libvirt tells of a domain, as what is told everywhere else."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from host.progress import Pulse
from hypervisors import console_log
from hypervisors.api import Machine, Power
from hypervisors.libvirt.domain_xml import START_KEY, START_URI, read_domain, start_mark
from hypervisors.libvirt.errors import going_down
from hypervisors.marks import DamagedMarks

if TYPE_CHECKING:
    import libvirt

_TAIL = 4096  # bytes of a console, for its last line
INACTIVE = 2  # libvirt.VIR_DOMAIN_XMLINACTIVE, a module imported late
ACTIVE = 1  # libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE


def as_machine(domain: libvirt.virDomain, damaged: DamagedMarks) -> Machine | None:
    """The domain as ``Hypervisor.find`` has it; None if it has gone since it was listed."""
    import libvirt

    try:
        seen = read_domain(domain.XMLDesc(0))
        state, current = _state(domain, seen.kind)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise
    if seen.damaged:
        damaged.tell(f"domain {domain.name()}", seen.damaged)
    power = {
        libvirt.VIR_DOMAIN_RUNNING: Power.RUNNING,
        libvirt.VIR_DOMAIN_BLOCKED: Power.RUNNING,
        libvirt.VIR_DOMAIN_SHUTDOWN: Power.RUNNING,  # on its way down: its disk is still in use
        libvirt.VIR_DOMAIN_PAUSED: Power.PAUSED,
        libvirt.VIR_DOMAIN_PMSUSPENDED: Power.PAUSED,
        libvirt.VIR_DOMAIN_CRASHED: Power.PANICKED,
        libvirt.VIR_DOMAIN_SHUTOFF: Power.STOPPED,
    }.get(state, Power.UNKNOWN)
    if power is Power.PANICKED and not has_panicked(domain):  # such as Xen's, that are gone
        power = Power.STOPPED
    return Machine(
        name=domain.name(),
        owner=seen.owner,
        power=power,
        memory=seen.memory,
        current=current * 1024,
        vcpus=seen.vcpus,
        mac=seen.mac,
        disk=seen.disk,
        spec_hash=seen.spec_hash,
        template=seen.template,
        address=seen.address,
        started=seen.started if power is not Power.STOPPED else None,
        accelerated={"kvm": True, "qemu": False}.get(seen.kind),
        nic=seen.nic,
        agent=seen.agent,
    )


def note_start(domain: libvirt.virDomain, *, pending: bool = False) -> None:
    """Mark the running machine with the time of its start. The mark goes when the machine stops.
    ``pending``: it is about to run. libvirtError."""
    import libvirt

    domain.setMetadata(
        libvirt.VIR_DOMAIN_METADATA_ELEMENT,
        start_mark(datetime.now(UTC), pending=pending),
        START_KEY,
        START_URI,
        libvirt.VIR_DOMAIN_AFFECT_LIVE,
    )


def has_panicked(domain: libvirt.virDomain) -> bool:
    """Whether its guest panicked, and its machine is kept as it was then."""
    import libvirt

    try:
        return bool(domain.state(0)[0] == libvirt.VIR_DOMAIN_CRASHED and domain.isActive())
    except libvirt.libvirtError:  # it has gone, or is on its way
        return False


def pulse_of(domain: libvirt.virDomain, log: Path | None) -> Pulse | None:
    """See ``Hypervisor.pulse``. ``log``: the console's since the start. None if the domain doesn't
    run."""
    import libvirt

    if not domain.isActive():
        return None
    console, said = None, ""
    if log is not None:
        with contextlib.suppress(OSError):  # another user's
            console = console_log.size_of(log)
            said = console_log.end_of(log, _TAIL).decode(errors="replace")
    read = written = None
    with contextlib.suppress(libvirt.libvirtError):  # libxl counts only what dom0's kernel serves
        _, read, _, written, _ = domain.blockStats("")  # "": all its disks together
    return Pulse(console=console, said=said, read=read, written=written)


def opened_by(domain: libvirt.virDomain) -> tuple[Path, ...]:
    """The disks' files and devices of any domain, links followed; none if it has gone since it was
    listed."""
    import libvirt

    try:
        return tuple(path.resolve() for path in read_domain(domain.XMLDesc(INACTIVE)).disks)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return ()
        raise


def _state(domain: libvirt.virDomain, kind: str) -> tuple[int, int]:
    """virDomainState, and the KiB of memory that the domain has now. Xen's domains are called shut off
    some time before they have let go of their devices, and while one is destroyed nothing can be said of
    it (``going_down``): both count as shutting down."""
    import libvirt

    try:
        state, _, current, _, _ = domain.info()
    except libvirt.libvirtError as error:
        if not going_down(error):
            raise
        return libvirt.VIR_DOMAIN_SHUTDOWN, 0
    if kind == "xen" and state == libvirt.VIR_DOMAIN_SHUTOFF and domain.isActive():
        return libvirt.VIR_DOMAIN_SHUTDOWN, current
    return state, current


def resume(domain: libvirt.virDomain) -> None:
    """Let a paused machine run on. No error if somebody else did meanwhile, such as our guard."""
    import libvirt

    try:
        domain.resume()
    except libvirt.libvirtError:
        if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            raise
