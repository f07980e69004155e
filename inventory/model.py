"""The model of a farm: what one farm file says, typed, checked and frozen.

Scalars reach the model as the very text the file holds (``inventory.loader``), so YAML's ideas of
``on``, ``022`` and ``52:54:00`` never matter; the types here convert. The field descriptions are the
reference documentation and the JSON Schema.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from inventory.sizes import parse_duration, parse_size

# RFC 1123 section 2.1 with RFC 1035's lower case and 63 octets a label.
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
_FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?:[:=][A-Za-z0-9.+~:-]+)?")  # Debian policy 5.6.1
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@{}^~-]{0,199}")


def _check_label(value: str) -> str:
    if not _LABEL.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a host name label: use a-z, 0-9 and '-', at most 63, "
            "not beginning or ending with '-'"
        )
    return value


def _check_hostname(value: str) -> str:
    if len(value) > 253:
        raise ValueError("a host name has at most 253 characters (RFC 1035)")
    for label in value.split("."):
        _check_label(label)
    return value


def _check_mac(value: str) -> str:
    value = value.lower()
    if not _MAC.fullmatch(value):
        raise ValueError(f"{value!r} is not a MAC address: write six pairs, such as 52:54:00:12:34:56")
    if int(value[:2], 16) & 1:
        raise ValueError(f"{value} is a multicast address; a machine's own has an even first pair")
    return value


def _check_filename(value: str) -> str:
    if not _FILENAME.fullmatch(value):
        raise ValueError(f"{value!r} is not a plain name: letters, digits, '.', '_' and '-', at most 64")
    return value


def _check_package(value: str) -> str:
    if not _PACKAGE.fullmatch(value):
        raise ValueError(f"{value!r} is not a Debian package name")
    return value


def _check_revision(value: str) -> str:
    if not _REVISION.fullmatch(value) or ".." in value:
        raise ValueError(f"{value!r} is not a git revision (gitrevisions(7)): a branch, tag or commit")
    return value


def _check_line(value: str) -> str:
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise ValueError("control characters and line breaks are not allowed here")
    return value


def _to_bool(value: object) -> object:
    if isinstance(value, str):
        if value.lower() in ("true", "yes", "on"):
            return True
        if value.lower() in ("false", "no", "off"):
            return False
        raise ValueError(f"{value!r} is not yes or no")
    return value


def _to_int(value: object) -> object:
    if isinstance(value, str):
        if not re.fullmatch(r"0|[1-9]\d{0,17}", value):
            raise ValueError(f"{value!r} is not a whole number (write it without leading zeros)")
        return int(value)
    return value


def _to_size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _to_duration(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Label = Annotated[str, AfterValidator(_check_label)]
Hostname = Annotated[str, AfterValidator(_check_hostname)]
Mac = Annotated[str, AfterValidator(_check_mac)]
Name = Annotated[str, AfterValidator(_check_filename)]
Line = Annotated[str, AfterValidator(_check_line), Field(min_length=1, max_length=4096)]
Revision = Annotated[str, AfterValidator(_check_revision)]
Package = Annotated[str, AfterValidator(_check_package)]
Bool = Annotated[bool, BeforeValidator(_to_bool)]
Int = Annotated[int, BeforeValidator(_to_int)]
Port = Annotated[int, BeforeValidator(_to_int), Field(ge=1, le=65535)]
Size = Annotated[int, BeforeValidator(_to_size), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(_to_duration), Field(gt=0)]
Script = Annotated[str, Field(min_length=1)]
Scripts = Annotated[tuple[Script, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
Lines = Annotated[tuple[Line, ...], BeforeValidator(_one_or_many)]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DiskStore(Model):
    """Where a host keeps disks."""

    store: Literal["qcow2", "zfs", "lvm-thin", "lvm"] = "qcow2"
    """qcow2 files; ZFS volumes; LVM thin volumes; classic LVM snapshots."""
    path: Path | None = None
    """qcow2: the directory; absent: farmhand's own state directory."""
    pool: Name | None = None
    """ZFS: the dataset's pool; LVM: the volume group."""
    dataset: Line | None = None
    """ZFS: the dataset that holds the farm, below the pool; LVM thin: the thin pool."""
    copy_mode: Literal["linked", "full"] = Field(default="linked", alias="copy")
    """LVM classic: `linked` runs on a writable snapshot, `full` copies at idle I/O priority."""

    @model_validator(mode="after")
    def _store_has_its_place(self) -> DiskStore:
        if self.store != "qcow2" and self.pool is None:
            raise ValueError(f"a {self.store} store needs 'pool'")
        if self.store == "qcow2" and (self.pool or self.dataset):
            raise ValueError("a qcow2 store has 'path', not 'pool' or 'dataset'")
        return self


class Host(Model):
    """A machine with a hypervisor driver, a connection URI and a disk store."""

    driver: Literal["kvm", "xen", "xenapi", "ssh", "fake"] = "kvm"
    """kvm falls back to QEMU's own emulation, saying so, where KVM doesn't work. ssh: machines that
    nobody virtualizes. fake: an in-memory hypervisor, to try commands out."""
    uri: Line = "private"
    """`private`: farmhand's own libvirtd, needing nothing from the host; or a libvirt URI such as
    qemu:///system, xen:///system; or a XenAPI https URL."""
    disks: DiskStore = DiskStore()
    """The disk store."""
    memory: Size | None = None
    """What the farm's VMs may use of this host's memory, all together; absent: no limit of ours."""


class Network(Model):
    """How the VMs are connected."""

    mode: Literal["user", "bridge", "network"] = "user"
    """user: QEMU's own, no privileges, ssh through a port on the host's loopback; bridge: an
    existing bridge of the host; network: a libvirt network."""
    bridge: Name | None = None
    """mode bridge: its name."""
    network: Name | None = None
    """mode network: the libvirt network's name."""
    subnet: IPv4Network | None = None
    """The subnet that addresses come from."""
    gateway: IPv4Address | None = None
    """The VMs' default route."""
    nameservers: tuple[IPv4Address, ...] = ()
    """The VMs' name servers."""
    reserved: tuple[Line, ...] = ()
    """Addresses never given out: single ones, or ranges such as 10.10.60.200-10.10.60.254."""
    domain: Hostname | None = None
    """DNS domain of the VMs."""
    internet: Bool = False
    """mode user: whether guests may reach beyond ssh. Off, a build sees nothing but its source."""
    addressing: Literal["static", "dhcp"] = "static"
    """Whether the guest is told its address at first boot, or asks DHCP for it."""

    @model_validator(mode="after")
    def _mode_has_its_target(self) -> Network:
        if self.mode == "bridge" and self.bridge is None:
            raise ValueError("mode bridge needs 'bridge'")
        if self.mode == "network" and self.network is None:
            raise ValueError("mode network needs 'network'")
        if self.mode != "user" and self.internet:
            raise ValueError("'internet' is for mode user; a bridge's reach is the host's matter")
        if self.gateway and self.subnet and self.gateway not in self.subnet:
            raise ValueError(f"gateway {self.gateway} is outside {self.subnet}")
        return self


class TemplateSource(Model):
    """A golden disk: built from a recipe, or imported. Each build or import is a new generation."""

    build: Name | None = None
    """Name of a recipe, such as debian-12."""
    image: Path | None = Field(default=None, alias="import")
    """A raw, qcow2 or vmdk image to import, relative to the farm file."""
    size: Size = 4 * 2**30
    """Virtual size of the disk."""
    packages: tuple[Package, ...] = ()
    """Debian packages beside the recipe's own."""
    firstboot: Literal["farmhand", "cloud-init", "none"] | None = None
    """Who makes a clone unique at its first boot. Absent: farmhand's own for built ones, cloud-init
    for imported ones."""

    @model_validator(mode="after")
    def _one_source(self) -> TemplateSource:
        if (self.build is None) == (self.image is None):
            raise ValueError("a template has either 'build' or 'import'")
        return self


class Proxy(Model):
    """A reverse proxy name for a VM."""

    name: Hostname
    """The public server name."""
    port: Port = 80
    """The port of the VM behind it."""


class Vm(Model):
    """A machine of the farm; its role is its name."""

    host: Name | None = None
    """One of `hosts`; may be left out where there is only one."""
    template: Name | None = None
    """One of `templates`; may be left out where there is only one. Not for ssh hosts."""
    hostname: Hostname | None = None
    """Its own host name; absent: the VM's name."""
    aliases: tuple[Hostname, ...] = ()
    """More names for DNS and /etc/hosts."""
    memory: Size = 2**30
    """Memory at start and while building: the maximum."""
    idle_memory: Size | None = None
    """Memory it is ballooned down to when idle; absent: it keeps `memory`."""
    vcpus: Annotated[int, BeforeValidator(_to_int), Field(ge=1, le=512)] = 1
    """Virtual CPUs."""
    disk: Size | None = None
    """Virtual disk size; absent: the template's."""
    mac: Mac | None = None
    """Absent: derived from farm and VM, the same each time."""
    address: IPv4Address | None = None
    """Absent: from the subnet's pool, recorded in the lock file."""
    ssh_port: Port | None = None
    """Where its ssh answers on the host's loopback (mode user), or the port of its address."""
    nat_port: Port | None = None
    """A port of the host forwarded to the VM's ssh, as the seed's 22006."""
    proxy: tuple[Proxy, ...] = ()
    """Reverse proxy names."""
    reset: Lines = ()
    """driver ssh only: the command, an argument list run on this machine, that resets it."""
    start: Bool = True
    """Whether clone-farm starts it."""

    @model_validator(mode="after")
    def _idle_within(self) -> Vm:
        if self.idle_memory is not None and self.idle_memory > self.memory:
            raise ValueError("idle_memory is more than memory")
        return self


class Ssh(Model):
    """How the guests are reached."""

    user: Name = "root"
    """The login on the VMs."""
    key: Path | None = None
    """Private key; absent: farmhand makes the farm one of its own."""
    authorized_keys: Lines = ()
    """Public keys that may log in, or files that hold them (relative to the farm file): for the
    login above."""
    users: dict[Name, Lines] = {}
    """More logins on the VMs, each with its public keys or files of them."""
    ready_timeout: Seconds = 300
    """How long a started VM may take until its ssh answers."""


class Source(Model):
    """What is built."""

    repository: Line
    """A git URL that the VM can reach, or a directory on this machine (relative to the farm file),
    which is then offered to the VM through its ssh connection."""
    revision: Revision = "HEAD"
    """gitrevisions(7); `--revision` overrides it. In the VM it is GIT_REVISION."""


FailureClass = Literal["source", "dependencies", "environment", "infrastructure", "time-out"]


class _StepBase(Model):
    name: Label
    """Names the step in `--from`, `--only`, logs and the record."""
    timeout: Seconds = 1800
    """Limit; the remote process is ended too."""


class ResetStep(_StepBase):
    """Put a VM back to a checkpoint, start it, wait until it answers."""

    reset: Label
    """The VM."""
    to: Name = "clean"
    """The checkpoint."""


class RunStep(_StepBase):
    """Run shell commands in a VM."""

    vm: Label
    """The VM."""
    run: Scripts
    """Shell scripts, run by `sh -eu` one after the other, as the ssh login."""
    failure: FailureClass | None = None
    """The class of its failure; absent: judged by what it printed."""
    artifacts: Lines = ()
    """Files (shell patterns) that are fetched into the build record afterwards."""


class TransferStep(_StepBase):
    """Carry files from one VM to another, through the host."""

    transfer: Lines
    """Files (shell patterns) in the VM they come from."""
    source: Label = Field(alias="from")
    """The VM they come from."""
    to: Label
    """The VM they go to."""
    into: Line
    """The directory they go into; made if it is missing."""


Step = ResetStep | RunStep | TransferStep


class Cycle(Model):
    """The build cycle, as data."""

    steps: tuple[Step, ...] = Field(min_length=1)
    """In their order."""
    keep_records: Annotated[int, BeforeValidator(_to_int), Field(ge=1)] = 200
    """Build records kept; older successful ones are removed first, failed ones last."""


class Farm(Model):
    """One farm file."""

    farm: Label
    """The farm's name: part of every machine's name and mark."""
    hosts: dict[Name, Host] = Field(default={"here": Host()}, min_length=1)
    """Hosts by name."""
    network: Network = Network()
    """How the VMs are connected."""
    templates: dict[Name, TemplateSource] = {}
    """Templates by name."""
    ssh: Ssh = Ssh()
    """How the guests are reached."""
    vms: dict[Label, Vm] = Field(min_length=1)
    """VMs by name."""
    source: Source | None = None
    """What the cycle builds."""
    cycle: Cycle | None = None
    """The build cycle; absent: the Autobuild cycle over dev2 and prod."""

    _path: Path = PrivateAttr(default=Path())

    @property
    def path(self) -> Path:
        """The farm file itself; set by the loader, not from the file."""
        return self._path

    def host_of(self, vm: str) -> str:
        return self.vms[vm].host or next(iter(self.hosts))

    def template_of(self, vm: str) -> str | None:
        return self.vms[vm].template or next(iter(self.templates), None)

    def machine_of(self, vm: str) -> str:
        """The VM's name on its host."""
        return f"{self.farm}-{vm}"

    def hostname_of(self, vm: str) -> str:
        return self.vms[vm].hostname or vm
