"""What every host's section of a farm file is, and what is known of a driver before any is opened.

Each driver's own section and description stand beside the driver (``hypervisors.drivers`` lists them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from inventory import kinds
from inventory.base import Model


class Tool(NamedTuple):
    """A command that a driver runs on its host, and the Debian package that has it."""

    command: str
    package: str
    purpose: str
    near: bool = False
    """Only where the host is this machine."""


class NeededFile(NamedTuple):
    """Something that a driver needs on its host and that is no command."""

    path: str
    package: str
    purpose: str
    disk_boot: bool = False
    """Only for VMs that boot what is on their disk."""
    efi: bool = False
    """Only for VMs that do so by EFI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverInfo:
    """What is so for all hosts of a driver. What one host can at the moment, its driver says itself
    (``hypervisors.api.Capabilities``)."""

    name: str
    called: str
    """A host of it, in messages: "an ssh host"."""
    virtual: bool = True
    """Its machines are VMs, made from templates and given MACs and addresses; else the farm file lists
    machines that are there anyway."""
    power: bool = True
    """It switches its machines on and off."""
    disks: bool = True
    """It keeps disks that can be cloned, checkpointed and removed."""
    guests: bool = True
    """Something runs in its machines, that can be waited for and logged in to."""
    shares_memory: bool = False
    """Its VMs take the memory of the host's kernel, which doesn't refuse when there is too little."""
    user_mode: bool = True
    """It has the network mode user."""
    forwards: bool = False
    """In mode user the VMs' ssh ports are listened on here, on the loopback."""
    any_network_name: bool = False
    """A network's name may be any text; else it is a plain one."""
    kernel_boot: bool = True
    """It can boot a kernel that is the host's."""
    firmware: tuple[str, ...] = ("bios",)
    """What it can have its VMs start from their disks by; none: the host's own boot loader looks for a
    kernel there."""
    mac_prefix: str = "52:54:00"
    """The first three bytes of the MACs that it gives."""
    own_account: bool = False
    """Where farmhand is root, VMs run as an account of their own."""
    modules: tuple[str, ...] = ()
    """Of Python, that it works with where the host is this machine or is asked from it."""
    tools: tuple[Tool, ...] = ()
    files: tuple[NeededFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Host(Model):
    """A machine with a hypervisor driver, which decides what other keys there are."""

    INFO: ClassVar[DriverInfo]
    NEEDED: ClassVar[Mapping[str, str]] = {}
    """What to give for keys that can't be left out."""
    INSTEAD: ClassVar[Mapping[str, str]] = {}
    """What to say to keys that other drivers have."""

    driver: str
    """Which hypervisor it has, and so which other keys."""

    @property
    def far(self) -> bool:
        """Whether it is another machine, that the driver itself works on."""
        return False

    @property
    def memory(self) -> int | None:
        """What this farm's VMs may have of its memory, in bytes; None: no limit of ours."""
        return None

    @property
    def store(self) -> str:
        """The kind of its disk store; "": the driver's own, or none."""
        return ""

    @property
    def disks_in_state(self) -> bool:
        """Whether its disks are in farmhand's own state directory."""
        return False

    @property
    def paravirtual(self) -> bool:
        """Whether its VMs are Xen's paravirtual ones, which need a kernel of that kind."""
        return False


DEFAULT_DRIVER = "kvm"
"""The driver of a host that names none."""


def driver_of(section: object) -> str | None:
    """The driver's name of a host's section, or of what a file has in its place. None: it is no name."""
    if isinstance(section, Host):
        return section.driver
    if not isinstance(section, dict):
        return DEFAULT_DRIVER  # which refuses it
    driver = section.get("driver", DEFAULT_DRIVER)
    return driver if isinstance(driver, str) else None


def host_section(driver: str) -> type[Host]:
    """The class of that driver's hosts. KeyError: there is no such driver."""
    return kinds.load(kinds.hosts[driver], Host)


def default_hosts() -> dict[str, Host]:
    """The hosts of a farm that names none: this machine, with the default driver."""
    return {"here": host_section(DEFAULT_DRIVER)(driver=DEFAULT_DRIVER)}
