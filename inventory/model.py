"""The model of a farm: what one farm file says, typed, checked and frozen.

Scalars reach the model as the very text the file holds (``inventory.loader``), so YAML's ideas of
``on``, ``022`` and ``52:54:00`` never matter; the types here convert. The field descriptions are the
reference documentation and the JSON Schema.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from inventory import kinds
from inventory.base import EXAMPLES, Model, at_key, parse_range, quote
from inventory.hosts import DriverInfo, default_hosts
from inventory.sizes import format_size

if TYPE_CHECKING:  # for the annotations, which inventory.annotations has evaluated
    from pydantic import Field

    from inventory.errors import Problem
    from inventory.fields import (
        Address,
        Address6,
        Addresses,
        Bool,
        ConfigPath,
        Count,
        Cpus,
        DebianPackages,
        FilePath,
        GitSource,
        Hostname,
        Hostnames,
        Keys,
        Label,
        LeaseTime,
        Line,
        Lines,
        Mac,
        Name,
        Names,
        Port,
        Ranges,
        Revision,
        Seconds,
        ServedName,
        Size,
        Subnet,
        Subnet6,
        WebAddress,
    )
    from inventory.hosts import Host
    from inventory.packages import ClonedBuilders, PackageBuilds, PackageSource
    from inventory.places import Places
    from inventory.repositories import PackageRepository
    from inventory.subscribers import EventSubscriber


@dataclass(frozen=True, kw_only=True)
class Network(Model):
    """How the VMs are connected."""

    mode: Literal["user", "bridge", "network"] = "user"
    """user: QEMU's own, no privileges, ssh through a port on the host's loopback; bridge: an
    existing bridge of the host; network: a libvirt network, or a XenAPI server's."""
    bridge: Name | None = None
    """mode bridge: its name."""
    network: ServedName | None = None
    """mode network: the network's name. A libvirt network's is plain; on a XenAPI server it may be any
    text, such as "Pool-wide network associated with eth0"."""
    subnet: Subnet | None = None
    """The subnet that addresses come from."""
    gateway: Address | None = None
    """The VMs' default route."""
    nameservers: Addresses = ()
    """The VMs' name servers."""
    reserved: Ranges = ()
    """Addresses never given out: single ones, or ranges such as 10.10.60.200-10.10.60.254."""
    subnet6: Subnet6 | None = None
    """IPv6 beside it: each VM's address has the same host number here as in `subnet`."""
    gateway6: Address6 | None = None
    """The VMs' IPv6 default route, told to DHCP servers' clients by router advertisements only."""
    pool: Ranges = ()
    """Addresses that DHCP gives to machines that are not the farm's; they are reserved too. Absent:
    none, only the farm's own get an answer."""
    lease_time: LeaseTime = 43200
    """How long DHCP leases last."""
    domain: Hostname | None = None
    """DNS domain of the VMs."""
    internet: Bool = False
    """mode user: whether guests may reach beyond ssh. Off, a build sees nothing but its source."""
    host_loopback: Literal["closed", "reachable"] = "closed"
    """With `internet`: whether guests reach what listens on this machine's own loopback, as QEMU's
    network lets them. `closed`, by nftables, takes root and farmhand's own libvirtd (`uri: private`);
    with `reachable` guests are trusted like this machine's users."""
    addressing: Literal["static", "dhcp"] = "static"
    """Whether the guest is told its address at first boot, or asks DHCP for it."""

    def __post_init__(self) -> None:
        for mode in ("bridge", "network"):
            if self.mode == mode and getattr(self, mode) is None:
                raise at_key("mode", f"mode {mode} needs '{mode}'", mode)
            if self.mode != mode and getattr(self, mode) is not None:
                raise at_key(mode, f"'{mode}' is for mode {mode}; the mode is {self.mode}", "mode")
        if self.mode != "user" and self.internet:
            raise at_key(
                "internet", "'internet' is for mode user: elsewhere it's the host's matter", "mode"
            )
        if self.host_loopback == "reachable" and not self.internet:
            raise at_key(
                "host_loopback", "without 'internet: yes' guests reach nothing of the host", "internet"
            )
        if self.subnet and self.subnet.prefixlen > 30:
            raise at_key("subnet", f"{self.subnet} has no room for machines")
        if self.gateway and self.subnet:
            if self.gateway not in self.subnet:
                raise at_key("gateway", f"{self.gateway} is outside {self.subnet}", "subnet")
            if self.gateway in (self.subnet.network_address, self.subnet.broadcast_address):
                raise at_key("gateway", f"{self.gateway} is not a machine's address", "subnet")
        if self.subnet6 and self.subnet is None:
            raise at_key(
                "subnet6", "'subnet6' needs 'subnet': host numbers are taken from there", "subnet"
            )
        if self.subnet6 and self.subnet and 128 - self.subnet6.prefixlen < 32 - self.subnet.prefixlen:
            raise at_key("subnet6", f"{self.subnet6} is smaller than {self.subnet}", "subnet")
        if self.gateway6 and (self.subnet6 is None or self.gateway6 not in self.subnet6):
            raise at_key("gateway6", f"{self.gateway6} is outside of 'subnet6'", "subnet6")

    @property
    def reserved_ranges(self) -> tuple[tuple[IPv4Address, IPv4Address], ...]:
        """First and last address of each entry of ``reserved`` and ``pool``."""
        return tuple(parse_range(entry) for entry in (*self.reserved, *self.pool))


@dataclass(frozen=True, kw_only=True)
class Boot(Model):
    """Direct kernel boot: of a kernel that is the host's, instead of the disk's own boot loader."""

    kernel: ConfigPath
    """The kernel's file, on each host with VMs of this template. A new one there is taken at the next
    start."""
    initrd: ConfigPath | None = None
    """Its initial RAM disk, in the same place."""
    cmdline: Line
    """The kernel's command line, such as `root=/dev/xvda1 ro console=hvc0`."""


@dataclass(frozen=True, kw_only=True)
class TemplateSource(Model):
    """A golden disk: built from a recipe, or imported. Each build or import is a new generation."""

    KEYS: ClassVar = {"image": "import"}

    build: Name | None = None
    """Name of a recipe, such as debian-12."""
    image: FilePath | None = None
    """A disk image to import: raw, qcow2, vmdk, VDI, VHD or VHDX; relative to the farm file."""
    size: Size = 4 * 2**30
    """Virtual size of the disk."""
    packages: DebianPackages = ()
    """Debian packages beside the recipe's own."""
    firstboot: Literal["farmhand", "cloud-init", "none"] | None = None
    """Who makes a clone unique at its first boot. Absent: farmhand's own for built ones, cloud-init
    for imported ones. `none`: nobody; what is the image's own then is in docs/logins.md."""
    boot: Boot | None = None
    """What its VMs boot; absent: what is on their disk. Not for xenapi hosts."""
    firmware: Literal["bios", "efi"] = "bios"
    """What starts its VMs from their disk; `efi` is for kvm hosts and imported images. Its variables are
    new at each start: the boot loader must be where it is looked for without them,
    `EFI/BOOT/BOOTX64.EFI`."""

    def __post_init__(self) -> None:
        if self.firmware == "efi" and self.boot is not None:
            raise at_key("firmware", "'firmware' starts from the disk, and 'boot' doesn't", "boot")
        if self.firmware == "efi" and self.build is not None:
            raise at_key("firmware", "what is built starts by BIOS", "build")
        if self.build is None and self.image is None:
            raise at_key("", "a template needs either 'build' or 'import'", "build", "import")
        if self.build is not None and self.image is not None:
            raise at_key("import", "a template has either 'build' or 'import', not both", "build")
        if self.image is not None and self.packages:
            raise at_key("packages", "'packages' is for templates that are built", "import", "build")

    @property
    def first_boot(self) -> Literal["farmhand", "cloud-init", "none"]:
        """Who makes a clone unique at its first boot."""
        return self.firstboot or ("farmhand" if self.build else "cloud-init")


@dataclass(frozen=True, kw_only=True)
class Proxy(Model):
    """A reverse proxy name for a VM."""

    name: Hostname
    """The public server name."""
    port: Port = 80
    """The port of the VM behind it."""
    certificate: ConfigPath | None = None
    """TLS: the certificate's file with its chain; for haproxy the key is in the same file. Plain HTTP
    is then sent on to https."""
    key: ConfigPath | None = None
    """TLS: the private key's file, for nginx; absent: it is in the certificate's."""
    websocket: Bool = False
    """Whether connections may be upgraded (RFC 6455)."""
    body_size: Size | None = None
    """The largest request body, for nginx; absent: the server's own limit."""
    access_log: ConfigPath | None = None
    """nginx: the access log; absent: NAME.access.log among the server's logs."""

    def __post_init__(self) -> None:
        if self.key is not None and self.certificate is None:
            raise at_key("key", "a key without 'certificate'", "certificate")


@dataclass(frozen=True, kw_only=True)
class Vm(Model):
    """A machine of the farm; its role is its name."""

    host: Name | None = None
    """One of `hosts`; may be left out where there is only one."""
    template: Name | None = None
    """One of `templates`; may be left out where there is only one. Not for ssh hosts."""
    hostname: Hostname | None = None
    """Its own host name; absent: the VM's name."""
    description: Line | None = None
    """What it is for; shown in rendered files."""
    aliases: Hostnames = ()
    """More names for DNS and /etc/hosts."""
    memory: Size = 2**30
    """Memory at start and while building: the maximum."""
    idle_memory: Size | None = None
    """Memory it is ballooned down to when idle, and may be at any time while nobody uses it; never below
    what its guest needs. Absent: it keeps `memory`."""
    vcpus: Cpus = 1
    """Virtual CPUs."""
    disk: Size | None = None
    """Virtual disk size; absent: the template's."""
    mac: Mac | None = None
    """Absent: derived from farm and VM, the same each time."""
    address: Address | None = None
    """Absent: from the subnet's pool, recorded in the lock file. A VM on an ssh host needs one."""
    address6: Address6 | None = None
    """Absent: the host number of its IPv4 address, in the network's `subnet6`."""
    ssh_port: Port | None = None
    """Where its ssh answers on the host's loopback (mode user), or the port of its address."""
    nat_port: Port | None = None
    """A port of the host forwarded to the VM's ssh."""
    proxy: tuple[Proxy, ...] = ()
    """Reverse proxy names."""
    reset: Lines = ()
    """driver ssh only: the command, an argument list run on this machine, that resets it."""
    start: Bool = True
    """Whether clone-farm starts it."""
    autostart: Bool = False
    """Whether it is started when its farm's machine boots: by the unit that the task boot-unit makes."""
    reset_to: Name | None = None
    """The checkpoint that a reset puts it back to where nobody names one; absent: clean. `warm` is made
    by clone-farm, with its memory, once it answered for the first time; see docs/warm.md."""
    boot_instead: Bool = False
    """Whether it is booted from a warm checkpoint's disk where its memory can't be used any more; else
    that is refused."""

    def __post_init__(self) -> None:
        if self.idle_memory is not None and self.idle_memory > self.memory:
            raise at_key(
                "idle_memory",
                f"idle_memory, {format_size(self.idle_memory)}, is more than memory, "
                f"{format_size(self.memory)}",
                "memory",
            )


@dataclass(frozen=True, kw_only=True)
class Ssh(Model):
    """How the guests are reached."""

    user: Name = "root"
    """The login on the VMs."""
    key: FilePath | None = None
    """Private key; absent: farmhand makes the farm one of its own. A template with `firstboot: none`
    needs it: a key that its image lets in."""
    authorized_keys: Keys = ()
    """Public keys that may log in, or files that hold them (relative to the farm file): for the
    login above."""
    users: dict[Name, Keys] = field(default_factory=dict)
    """More logins on the VMs, each with its public keys or files of them."""
    sudo: Names = ()
    """Those of all these logins that may do everything by sudo(8), without a password."""
    ready_timeout: Seconds = 300
    """How long a started VM, whose ssh doesn't answer yet, is waited for without a sign that it goes on
    (its console grows, its disks are read or written); in all, six times as long. Where nobody sees
    that (drivers xenapi and ssh), how long it may take."""

    def __post_init__(self) -> None:
        if unknown := next((name for name in self.sudo if name not in (self.user, *self.users)), ""):
            raise at_key("sudo", f"{unknown} is neither 'user' nor one of 'users'", "user", "users")


@dataclass(frozen=True, kw_only=True)
class Source(Model):
    """What is built."""

    repository: GitSource | None = None
    """A git URL that the VM can reach; or a directory on this machine (relative to the farm file, or
    beginning with `~`), which is then offered to the VM through its ssh connection. A directory that
    is not a git repository by itself is offered as one that farmhand makes of it and keeps, outside
    the directory, with a commit for each change it finds."""
    example: Literal["greet", "hello-deb", "kata"] | None = None
    """Instead of `repository`: a project that comes with farmhand, from the `examples/` beside its
    program, wherever the farm file lies."""
    revision: Revision = "HEAD"
    """gitrevisions(7); `--revision` overrides it. In the VM it is GIT_REVISION."""

    def __post_init__(self) -> None:
        if self.repository is None and self.example is None:
            raise at_key("", "a source needs either 'repository' or 'example'", "repository", "example")
        if self.repository is not None and self.example is not None:
            raise at_key("example", "a source has 'repository' or 'example', not both", "repository")

    @property
    def place(self) -> str:
        """The git URL or directory, whichever of the two says so."""
        return self.repository or str(EXAMPLES / str(self.example))


@dataclass(frozen=True, kw_only=True)
class Limits(Model):
    """How much is taken from a step's VM. What wants to leave more has failed: the log is kept up to its
    limit, and no file is taken."""

    log_size: Size = 64 * 2**20
    """What its scripts print, on both outputs together."""
    files: Count = 1000
    """How many files are fetched (`artifacts`), or carried (`transfer`)."""
    file_size: Size = 8 * 2**30
    """The largest of them, its holes included."""
    total_size: Size = 32 * 2**30
    """All of them together."""

    def but(self, own: StepLimits) -> Limits:
        """With a step's own ones in their places."""
        return replace(self, **{key: value for key, value in vars(own).items() if value is not None})

    @staticmethod
    def remedy(key: str) -> str:
        """What to do where one of them is too small."""
        return f"if that is meant to be, give the step 'limits' with a larger '{key}'"


@dataclass(frozen=True, kw_only=True)
class StepLimits(Model):
    """Limits of one step; what is absent is as the cycle has it."""

    log_size: Size | None = None
    """What its scripts print, on both outputs together."""
    files: Count | None = None
    """How many files are fetched (`artifacts`), or carried (`transfer`)."""
    file_size: Size | None = None
    """The largest of them, its holes included."""
    total_size: Size | None = None
    """All of them together."""


FailureClass = Literal["source", "dependencies", "environment", "network", "infrastructure", "time-out"]


@dataclass(frozen=True, kw_only=True)
class Step(Model):
    """A step of the cycle: each kind is a section of its own, see ``inventory.kinds``."""

    KIND: ClassVar[str]
    """The key of the file by which it is known."""
    VMS: ClassVar[tuple[str, ...]]
    """Fields that each name a VM of the farm; the last one's is what the step changes. Of some kinds
    none: those do their work on this machine."""

    name: Label
    """Names the step in `--from`, `--only`, logs and the record."""
    timeout: Seconds = 1800
    """Limit; the remote process is ended too."""

    @property
    def vms(self) -> tuple[str, ...]:
        """The VMs that it uses."""
        return tuple(getattr(self, field) for field in self.VMS)

    @property
    def first(self) -> str:
        """The VM that it is shown with; "": it uses none."""
        return next(iter(self.vms), "")

    @property
    def changes(self) -> str:
        """The VM that it changes; "": none."""
        return next(reversed(self.vms), "")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Environment variables that hold secrets for it."""
        return ()

    def on(self, _farm: Farm) -> Step:
        """The step with what the farm's VMs say where it says nothing."""
        return self

    def refusal(self, _farm: Farm) -> tuple[str, str] | None:
        """Why the farm's VMs can't have it: a key, and what is wrong there; None: they can."""
        return None


def step_section(kind: str) -> type[Step]:
    """The class of that kind of step. KeyError: there is no such kind."""
    return kinds.load(kinds.steps[kind], Step)


if TYPE_CHECKING:
    Steps = tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class ServiceSection(Model):
    """A service's section of a farm file. What is not in the file is not rendered and not touched. A
    service with all its defaults is its name alone: ``hosts:``."""

    NAME: ClassVar[str]
    """Its key below ``services``."""
    NEEDS_ADDRESSES: ClassVar[bool] = True
    """VMs without addresses are no use to it."""
    NEEDS_SUBNET: ClassVar[bool] = False
    PLAIN_NETWORK: ClassVar[bool] = False
    """It uses the network's name as libvirt does."""
    FILES: ClassVar[tuple[str, ...]] = ("config",)
    """Keys of files that no other service may have."""
    SERVES_REPOSITORIES: ClassVar[bool] = False
    """A package repository can name it in `serve`: it has a virtual host for its URL."""

    @property
    def ports(self) -> tuple[str, ...]:
        """Keys of the ports of ``address`` that it listens on."""
        return ()

    def problems(self, _farm: Farm, _places: Places) -> Iterator[Problem]:
        """What it asks of the rest of the file, beyond the above."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class Services(Model):
    """Which network services are kept in step with the farm. What isn't named is not touched."""

    templates: ConfigPath | None = None
    """A directory with templates of your own: a file of the same name is used instead of farmhand's."""

    @property
    def sections(self) -> tuple[ServiceSection, ...]:
        """Those named, in the order they are applied: names before who looks them up."""
        found = (getattr(self, name, None) for name in kinds.services)
        return tuple(section for section in found if section is not None)

    @property
    def used(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(section.NAME for section in self.sections)


HOST_SOURCES = "host"
"""In ``package_cache``: the repositories that this machine's apt has."""
_REPOSITORY_URL = re.compile(r"https?://[\w.:\[\]-]+(?:/[\w.~%+/-]*)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class CycleLock(Model):
    """A lock that a cycle shares with those of other machines: a file on a WebDAV server."""

    webdav: WebAddress
    """The file, such as `https://dav.example/locks/kata`: it is there for nothing else, and made where
    it isn't. On this very machine http:// will do."""
    credentials: FilePath | None = None
    """A file with `USER:PASSWORD`, that nobody else may read; relative to the farm file."""
    ca: FilePath | None = None
    """The PEM file of the CA that the server's certificate is checked by; absent: the system's CAs."""
    timeout: Seconds = 300
    """How long the lock of one who died lasts, where the server lets us choose: 3s to 1d."""

    def __post_init__(self) -> None:
        _, _, path = self.webdav.partition("://")[2].partition("/")
        if not path or path.endswith("/") or "?" in path:
            raise at_key("webdav", "a file's URL is expected, such as https://dav.example/locks/kata")
        if self.ca is not None and self.webdav.startswith("http:"):
            raise at_key("ca", "'ca' is for an https URL", "webdav")
        if not 3 <= self.timeout <= 86400:
            raise at_key("timeout", "3s to 1d is expected here")


@dataclass(frozen=True, kw_only=True)
class Cycle(Model):
    """The build cycle, as data."""

    steps: Annotated[Steps, Field(min_length=1)]
    """In their order."""
    keep_records: Count = 200
    """Build records kept; older successful ones are removed first, failed ones last."""
    limits: Limits = field(default_factory=Limits)
    """How much is taken from a step's VM."""
    lock: CycleLock | None = None
    """A lock that others share; see docs/cycle.md."""
    package_cache: Lines = ()
    """Package repositories, by their http or https URLs, that the VMs reach through a cache on this
    machine, also without a network; `host` stands for this machine's own Debian ones. See
    docs/cycle.md."""

    def __post_init__(self) -> None:
        for url in self.package_cache:
            if url != HOST_SOURCES and not _REPOSITORY_URL.fullmatch(url):
                raise at_key("package_cache", f"{quote(url)} is neither an http(s) URL nor 'host'")


if TYPE_CHECKING:
    NetworkServices = Services  # with a key for each that there is: inventory.services.declared


@dataclass(frozen=True, kw_only=True)
class Farm(Model):
    """One farm file."""

    farm: Label
    """The farm's name: part of every machine's name and mark."""
    hosts: Annotated[dict[Name, Host], Field(min_length=1)] = field(default_factory=default_hosts)
    """Hosts by name. Which keys one has depends on its `driver`; absent: kvm."""
    network: Network = field(default_factory=Network)
    """How the VMs are connected."""
    services: NetworkServices = field(default_factory=Services)
    """Network services that are kept in step."""
    templates: dict[Name, TemplateSource] = field(default_factory=dict)
    """Templates by name."""
    ssh: Ssh = field(default_factory=Ssh)
    """How the guests are reached."""
    vms: Annotated[dict[Label, Vm], Field(min_length=1)]
    """VMs by name. One that is made and gets another name here goes on under that: `rename`."""
    source: Source | None = None
    """What the cycle builds."""
    cycle: Cycle | None = None
    """The build cycle; absent: the Autobuild cycle over dev2 and prod."""
    repositories: dict[Label, PackageRepository] = field(default_factory=dict)
    """Package repositories by name."""
    packages: dict[Name, PackageSource] = field(default_factory=dict)
    """Source packages that `build` builds, by name; see docs/packages.md."""
    build: PackageBuilds | None = None
    """How they are built."""
    events: dict[Label, EventSubscriber] = field(default_factory=dict)
    """Who is told of operations and builds, by name; see docs/events.md."""

    _path = Path()

    def __post_init__(self) -> None:
        if self.build is not None and self.build.cloned is not None:
            object.__setattr__(self, "vms", {**self.vms, **self._cloned(self.build.cloned)})

    def _cloned(self, builders: ClonedBuilders) -> dict[str, Vm]:
        like = self.vms.get(builders.like)  # if there is none, inventory.checks says so
        own: dict[str, Any] = {
            "description": None, "aliases": (), "mac": None, "address": None,
            "address6": None, "ssh_port": None, "nat_port": None, "proxy": (),
        }  # fmt: skip
        new = [name for name in builders.names if name not in self.vms]
        if like is None:
            return {}
        hosts = {name: self.machine_of(name)[:63].rstrip("-") for name in new}
        return {name: replace(like, hostname=host, **own) for name, host in hosts.items()}

    @property
    def path(self) -> Path:
        """The farm file itself; set by the loader, not from the file."""
        return self._path

    def at(self, path: Path) -> Farm:
        """The same farm, as the one of this file."""
        placed = copy.copy(self)
        object.__setattr__(placed, "_path", path)
        return placed

    @property
    def secrets(self) -> tuple[str, ...]:
        """Environment variables that hold secrets for farmhand, and for nobody that it starts."""
        users: tuple[EventSubscriber | Step, ...]
        users = (*self.events.values(), *(self.cycle.steps if self.cycle else ()))
        return tuple(name for user in users for name in user.secrets)

    def host_of(self, vm: str) -> str:
        return self.vms[vm].host or next(iter(self.hosts))

    def driver_of(self, vm: str) -> DriverInfo:
        """What its host's driver can, and can't."""
        return self.hosts[self.host_of(vm)].INFO

    def goes_back_to(self, vm: str, to: str | None = None) -> str:
        """The checkpoint that a reset puts it back to; ``to``: the one that somebody asks for."""
        return to or self.vms[vm].reset_to or "clean"

    def template_of(self, vm: str) -> str | None:
        """None for machines that nobody virtualizes."""
        if not self.driver_of(vm).virtual:
            return None
        return self.vms[vm].template or next(iter(self.templates), None)

    def boot_of(self, vm: str) -> Boot | None:
        """None where its disk says what it boots."""
        template = self.template_of(vm)
        return self.templates[template].boot if template else None

    def firmware_of(self, vm: str) -> str:
        """What starts it from its disk: bios or efi."""
        template = self.template_of(vm)
        return self.templates[template].firmware if template else "bios"

    @property
    def locked_templates(self) -> tuple[str, ...]:
        """Those whose VMs let us in by no key: nobody tells them one at their first boot, and the file
        names none that their image lets in."""
        if self.ssh.key is not None:
            return ()
        used = {self.template_of(vm) for vm in self.vms if self.driver_of(vm).guests}
        return tuple(
            name for name, source in self.templates.items()
            if name in used and source.first_boot == "none"
        )  # fmt: skip

    def machine_of(self, vm: str) -> str:
        """The VM's name on its host."""
        return f"{self.farm}-{vm}"

    def hostname_of(self, vm: str) -> str:
        return self.vms[vm].hostname or vm

    def qualified(self, name: str) -> str:
        """In the network's domain, unless it has dots of its own."""
        domain = self.network.domain
        return name if domain is None or "." in name or name == domain else f"{name}.{domain}"
