"""A machine as libvirt's domain XML, and back (https://libvirt.org/formatdomain.html).

Built and read with ElementTree only: no name of the farm file is ever pasted into a string.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from ipaddress import IPv4Address
from pathlib import Path

from hypervisors.answers import answer_of
from hypervisors.api import Forward, MachineSpec, Nic, Owner, marked_address, spec_hash
from hypervisors.libvirt.firmware import OVMF
from hypervisors.marks import DamagedMark, moment, read_fields
from hypervisors.ownership import FarmIdentity

MARK_URI = "urn:farmhand:machine:1"
MARK_KEY = "farmhand"
START_URI = "urn:farmhand:start:1"
START_KEY = "farmhand-start"
QEMU_URI = "http://libvirt.org/schemas/domain/qemu/1.0"
MEMORY_ID = "fhmem"
"""QEMU's name of a machine's memory: the same whatever is behind it, for a migration stream names it."""
_UNSEEN = "cpu-unavailable-features"
"""What libvirt is not to know of QEMU: else it asks for each of 400 features of the CPU, one by one, at
every start (qemuMonitorJSONGetGuestCPU()). QEMU reads its monitor byte by byte, so that takes three
quarters of a start's CPU time. Now it asks for all at once, as it does with an older QEMU."""
_NETDEV = "fh0"
_AGENT = "org.qemu.guest_agent.0"  # where qemu-ga(8) listens
_CONNECTED = f"devices/channel/target[@name='{_AGENT}'][@state='connected']"
_FORWARD = re.compile(r"hostfwd=tcp:127\.0\.0\.1:(\d+)-:(\d+)")

ET.register_namespace("farmhand", MARK_URI)
ET.register_namespace("farmhand-start", START_URI)
ET.register_namespace("qemu", QEMU_URI)


@dataclass(frozen=True, slots=True)
class DomainDefinition:
    """What a definition says of itself. ``owner`` None: no mark of ours, or a damaged one (then
    ``damaged`` says how). ``kind``: libvirt's domain type ("kvm", "qemu", "xen")."""

    kind: str
    uuid: str
    owner: Owner | None
    spec_hash: str
    template: str
    address: IPv4Address | None
    memory: int
    vcpus: int
    mac: str
    disk: Path | None  # the first one
    disks: tuple[Path, ...]  # all images and devices it opens
    console_log: Path | None
    ports: tuple[int, ...]
    nic: Nic | None
    started: datetime | None  # None as well while that is pending
    starts: bool  # was about to run, and perhaps does
    agent: bool  # its guest has opened the channel for it
    damaged: str = ""


def domain_xml(
    spec: MachineSpec,
    disk: Path,
    disk_format: str,
    template: str,
    *,
    kvm: bool,
    system: bool,
    uuid: str = "",
) -> str:
    """The whole definition. ``kvm``: else QEMU emulates. ``system``: for a libvirtd
    run by root, not an ordinary user's session. ``uuid``: of the one it replaces.

    The disk's cache mode is "unsafe": QEMU hands the guest's writes to the host's page cache and
    leaves out the fsyncs, which makes package installs several times faster. What it gives up is the
    *present* disk's content after a power cut of the host, and a build VM's present disk is what the
    next reset throws away. What must outlast a power cut does: templates and checkpoints are synced
    by the disk store before they get their names, a swap is durable, and the driver syncs the disk of
    a guest that was shut down. A killed QEMU loses nothing that it reported as written."""
    domain = head("kvm" if kvm else "qemu", spec, template, uuid)
    machine = ET.SubElement(domain, "os")
    text(machine, "type", "hvm", arch="x86_64", machine="pc")
    if spec.kernel:
        text(machine, "kernel", str(spec.kernel))
        if spec.initrd:
            text(machine, "initrd", str(spec.initrd))
        text(machine, "cmdline", spec.cmdline)
    else:
        if spec.firmware == "efi":
            # As ROM, not as flash with a file of its variables: what a guest sets there is gone when it
            # stops. So its disk is all its state, and a reset or a checkpoint of that is whole: a second
            # file could not be switched in the same step as the disk, which is the store's.
            text(machine, "loader", OVMF, readonly="yes", type="rom")
        ET.SubElement(machine, "boot", dev="hd")
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    # What the host's CPU has, or all that QEMU can emulate: never migrated, so no common subset.
    ET.SubElement(domain, "cpu", mode="host-passthrough" if kvm else "maximum")
    # A guest that is given back its memory, with another id than it had, learns by it that it lives once
    # more: libvirt makes one, and makes a new one by itself only for what it restores.
    ET.SubElement(domain, "genid")
    add_ends(domain, crashed="preserve")
    devices = ET.SubElement(domain, "devices")
    _disk(devices, disk, disk_format, "vda", readonly=False, system=system)
    if spec.seed:
        # On virtio, not as a CD drive: the smallest kernels have no ATAPI. NoCloud goes by the label.
        _disk(devices, spec.seed, "raw", "vdb", readonly=True, system=system)
    ET.SubElement(devices, "controller", type="usb", model="none")
    serial = ET.SubElement(devices, "serial", type="pty")
    if spec.console_log:
        ET.SubElement(serial, "log", file=str(spec.console_log), append="on")
    balloon = ET.SubElement(devices, "memballoon", model="virtio")
    ET.SubElement(balloon, "stats", period="1")
    rng = ET.SubElement(devices, "rng", model="virtio")
    text(rng, "backend", "/dev/urandom", model="random")
    if system:
        # For a guest that has an agent. libvirt names its socket, in a session by a path that is longer
        # than one may be (unix(7)) wherever a home or a runtime directory lies.
        channel = ET.SubElement(devices, "channel", type="unix")
        ET.SubElement(channel, "target", type="virtio", name=_AGENT)
    # Linux tells by it that it panicked (pvpanic): else it is a machine that runs and never answers.
    ET.SubElement(devices, "panic", model="isa")
    _nic(domain, devices, spec.nic)
    _arguments(domain, "-object", memory_object(spec.memory), "-machine", f"memory-backend={MEMORY_ID}")
    known = ET.SubElement(domain, f"{{{QEMU_URI}}}capabilities")
    ET.SubElement(known, f"{{{QEMU_URI}}}del", capability=_UNSEEN)
    return ET.tostring(domain, encoding="unicode")


def memory_object(size: int, file: Path | None = None) -> str:
    """QEMU's -object for a machine's memory (qemu(1)); ``file``: mapped, and copied on write."""
    size = -(-size // 2**20) * 2**20  # as libvirt rounds it (qemuDomainAlignMemorySizes)
    if file is None:
        return f"memory-backend-ram,id={MEMORY_ID},size={size}"
    path = str(file).replace(",", ",,")
    return f"memory-backend-file,id={MEMORY_ID},size={size},mem-path={path},share=off"


def head(kind: str, spec: MachineSpec, template: str, uuid: str) -> ET.Element:
    """The elements that any kind of domain begins with: names, our mark, memory and CPUs."""
    domain = ET.Element("domain", type=kind)
    text(domain, "name", spec.name)
    if uuid:
        text(domain, "uuid", uuid)
    metadata = ET.SubElement(domain, "metadata")
    mark = ET.SubElement(metadata, f"{{{MARK_URI}}}machine")
    mark.attrib.update(
        name=spec.name,
        farm=spec.owner.farm.mark,
        vm=spec.owner.vm,
        spec=spec_hash(spec),
        template=template,
    )
    if spec.address:
        mark.set("address", str(spec.address))
    text(domain, "memory", str(spec.memory // 1024), unit="KiB")
    text(domain, "currentMemory", str(spec.memory // 1024), unit="KiB")
    text(domain, "vcpu", str(spec.vcpus))
    return domain


def add_ends(domain: ET.Element, *, crashed: str = "destroy") -> None:
    """``crashed``: what becomes of a crashed guest: its machine is stopped, or kept as it was then
    ("preserve"), for somebody to look at."""
    ET.SubElement(domain, "clock", offset="utc")
    text(domain, "on_poweroff", "destroy")
    text(domain, "on_reboot", "restart")
    text(domain, "on_crash", crashed)


def text(parent: ET.Element, tag: str, value: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = value


def is_device(path: Path) -> bool:
    """Whether the path is a block device, or a link to one, or a place where there will be one."""
    below = path.parts[:2] == ("/", "dev") and path.parts[2] != "shm"
    return below or path.is_block_device()


def _disk(
    devices: ET.Element, path: Path, form: str, target: str, *, readonly: bool, system: bool
) -> None:
    disk = ET.SubElement(devices, "disk", type="file", device="disk")
    if is_device(path):
        disk.set("type", "block")
    driver = ET.SubElement(disk, "driver", name="qemu", type=form)
    if not readonly:
        driver.attrib.update(cache="unsafe", discard="unmap")
    source = ET.SubElement(disk, "source")
    source.set("dev" if disk.get("type") == "block" else "file", str(path))
    if system:
        # libvirt would give the file, and a template below it, to QEMU's user and back to root: the
        # store has already given both to that user. A session's libvirtd can't give files away, and
        # refuses to be told not to.
        ET.SubElement(source, "seclabel", model="dac", relabel="no")
    ET.SubElement(disk, "target", dev=target, bus="virtio")
    if readonly:
        ET.SubElement(disk, "readonly")


def _nic(domain: ET.Element, devices: ET.Element, nic: Nic) -> None:
    if nic.mode == "user":
        # libvirt 9's own user interface knows no port forwards.
        forwards = "".join(f",hostfwd=tcp:127.0.0.1:{f.host}-:{f.guest}" for f in nic.forwards)
        reach = "off" if nic.internet else "on"
        arguments = [
            "-netdev", f"user,id={_NETDEV},restrict={reach}{forwards}",
            "-device", f"virtio-net-pci,netdev={_NETDEV},mac={nic.mac},romfile=,addr=0x1e",
        ]  # fmt: skip
        _arguments(domain, *arguments)
        return
    interface = ET.SubElement(devices, "interface", type=nic.mode)
    ET.SubElement(interface, "mac", address=nic.mac)
    ET.SubElement(interface, "source", {nic.mode: nic.target})
    ET.SubElement(interface, "model", type="virtio")
    ET.SubElement(interface, "rom", enabled="no")


def _arguments(domain: ET.Element, *arguments: str) -> None:
    """Add to QEMU's command line."""
    line = domain.find(f"{{{QEMU_URI}}}commandline")
    if line is None:
        line = ET.SubElement(domain, f"{{{QEMU_URI}}}commandline")
    for argument in arguments:
        ET.SubElement(line, f"{{{QEMU_URI}}}arg", value=argument)


def with_disk(xml: str, path: Path) -> str:
    """A definition of ours whose first disk is another device or file of the same format."""
    domain = ET.fromstring(xml)  # noqa: S314 - from libvirt, which has parsed and rewritten it
    source = domain.find("devices/disk[@device='disk']/source")
    assert source is not None, "definitions of ours have a disk"
    source.set("dev" if "dev" in source.attrib else "file", str(path))
    return ET.tostring(domain, encoding="unicode")


def mark_of(xml: str, owner: Owner) -> str:
    """The mark of a definition of ours with another owner: the element, as virDomainSetMetadata wants
    it."""
    domain = ET.fromstring(xml)  # noqa: S314 - from libvirt, which has parsed and rewritten it
    mark = domain.find(f"metadata/{{{MARK_URI}}}machine")
    assert mark is not None, "it was read as one with a mark"
    return ET.tostring(
        ET.Element("machine", {**mark.attrib, "farm": owner.farm.mark, "vm": owner.vm}),
        encoding="unicode",
    )


def marked_as(xml: str) -> tuple[str, Owner] | None:
    """The machine that its mark speaks of, whatever its name is, and whose that is; None without a sound
    mark."""
    mark = ET.fromstring(xml).find(f"metadata/{{{MARK_URI}}}machine")  # noqa: S314 - from libvirt
    try:
        found = read_fields(mark.attrib, ("name", "farm", "vm")) if mark is not None else None
    except DamagedMark:
        return None
    return (found["name"], Owner(FarmIdentity.of(found["farm"]), found["vm"])) if found else None


def start_mark(when: datetime, *, pending: bool = False) -> str:
    """The element that a running machine carries beside its definition's mark; libvirt itself puts it
    into the namespace that virDomainSetMetadata names. ``pending``: it is about to run."""
    mark = ET.Element("start", at=when.isoformat())
    if pending:
        mark.set("pending", "yes")
    return ET.tostring(mark, encoding="unicode")


def read_domain(xml: str) -> DomainDefinition:
    """Of any domain, ours or not. A mark that speaks of another machine came with a copy somebody made
    (virt-clone(1) copies metadata): that one is theirs."""
    with answer_of("libvirt"):
        return _domain(xml)


def _domain(xml: str) -> DomainDefinition:
    domain = ET.fromstring(xml)  # noqa: S314 - from libvirt, which has parsed and rewritten it
    mark = domain.find(f"metadata/{{{MARK_URI}}}machine")
    name = domain.findtext("name", "")
    marks: dict[str, str] = {}
    damaged = ""
    if mark is not None and mark.get("name", name) == name:
        try:
            marks = read_fields(mark.attrib, ("farm", "vm"))
        except DamagedMark as error:
            damaged = str(error)
    start = domain.find(f"metadata/{{{START_URI}}}start")
    arguments = [
        a.get("value", "") for a in domain.iterfind(f"{{{QEMU_URI}}}commandline/{{{QEMU_URI}}}arg")
    ]
    mac = domain.find("devices/interface/mac")
    devices = [a for a in arguments if a.startswith("virtio-net-pci,") and "mac=" in a]
    fallback = devices[0].partition("mac=")[2].partition(",")[0] if devices else ""
    disk = domain.find("devices/disk[@device='disk']/source")
    log = domain.find("devices/serial/log")
    memory = domain.find("memory")
    nic = _read_nic(domain, arguments, fallback)
    place = (disk.get("file") or disk.get("dev")) if disk is not None else None
    log_file = log.get("file") if log is not None else None
    return DomainDefinition(
        kind=domain.get("type", ""),
        uuid=domain.findtext("uuid", ""),
        owner=Owner(FarmIdentity.of(marks["farm"]), marks["vm"]) if marks else None,
        spec_hash=marks.get("spec", ""),
        template=marks.get("template", ""),
        address=marked_address(marks.get("address", "")),
        memory=int((memory.text if memory is not None else None) or 0) * 1024,  # dumps are in KiB
        vcpus=int(domain.findtext("vcpu") or 0),
        mac=(mac.get("address") or "") if mac is not None else fallback,
        disk=Path(place) if place else None,
        disks=tuple(
            Path(path)
            for source in domain.iterfind("devices/disk/source")
            if (path := source.get("file") or source.get("dev"))
        ),
        console_log=Path(log_file) if log_file else None,
        ports=tuple(forward.host for forward in nic.forwards) if nic else (),
        nic=nic,
        started=None if _is_pending(start) else _started(start),
        starts=_is_pending(start),
        agent=domain.find(_CONNECTED) is not None,
        damaged=damaged,
    )


def _read_nic(domain: ET.Element, arguments: Sequence[str], mac: str) -> Nic | None:
    """The first network card. ``arguments``: of QEMU's command line; ``mac``: of the card in them."""
    own = next((a for a in arguments if a.startswith(f"user,id={_NETDEV},")), "")
    if own:
        forwards = tuple(Forward(int(host), int(guest)) for host, guest in _FORWARD.findall(own))
        return Nic(mac=mac, mode="user", forwards=forwards, internet="restrict=off" in own)
    card = domain.find("devices/interface")
    source = card.find("source") if card is not None else None
    if card is None or source is None:
        return None
    mode, found = card.get("type", ""), card.find("mac")
    return Nic(
        mac=(found.get("address") or "") if found is not None else "",
        mode=mode,
        target=source.get(mode, ""),
    )


def _is_pending(mark: ET.Element | None) -> bool:
    return mark is not None and mark.get("pending") == "yes"


def _started(mark: ET.Element | None) -> datetime | None:
    try:
        return None if mark is None else moment(mark.get("at", ""))
    except DamagedMark:
        return None
