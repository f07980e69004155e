"""A second farm's file, made from a first one's: the same templates and builds, with names, addresses,
ports and paths of its own.

What is to be its own is said by ``provision.own_values``, and of each service by the service. The first
file's text is changed at these places only, so its comments, order and formatting stay. The result is
loaded, and compared with all farms that are known here, before it is written.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import count
from pathlib import Path

from host.files import file_error, sync, write_new
from host.paths import FarmPaths
from inventory.base import parse_range
from inventory.errors import Conflict, FarmhandError, InventoryError, NotFound, UsageError, some
from inventory.farm_text import FarmText
from inventory.leaves import relative_paths
from inventory.model import Farm, Vm
from inventory.places import Path as Place
from inventory.reading import read
from inventory.sizes import format_size
from provision.farm_difference import (
    DifferenceGroup,
    FarmDifference,
    FarmFile,
    both_may_give,
    differences,
)
from provision.neighbours import Neighbours, TakenHere, addresses_of, neighbours
from provision.network.renderer import Renderer
from provision.network.service import services
from provision.own_values import (
    MAY_BE_SHARED,
    OwnKind,
    left_of,
    own_values,
    pool_of,
    with_names,
)

_OTHERS = "--as ANOTHER, or another --hostname or --address for the VM"
_STEP = 100  # between a port and its twin
_IFNAMSIZ = 16  # netdevice(7): of a network interface's name, with the NUL at its end
_SUBNETS = 256  # that are looked at for a free one


@dataclass(frozen=True, slots=True)
class TwinEndpoint:
    """Where a VM's twin is. ``port``: of its ssh; None: as the first one's."""

    address: IPv4Address
    port: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinAsked:
    """``name``: the new farm's. ``out``: its file. What is absent is chosen. ``range``: the first and
    last address of the subnet that are to be its. ``endpoints``, ``hostnames``: by VM. ``shift``: what
    is added to each port."""

    name: str
    out: Path
    revision: str = ""
    subnet: IPv4Network | None = None
    range: tuple[IPv4Address, IPv4Address] | None = None
    endpoints: Mapping[str, TwinEndpoint] = field(default_factory=dict)
    hostnames: Mapping[str, str] = field(default_factory=dict)
    shift: int | None = None


@dataclass(frozen=True, slots=True)
class Twin:
    """``text``: of its file; ``mode``: as the first one's, who may keep it to himself. ``own``: where it
    differs from that. ``notes``: what the admin has to see to."""

    farm: str
    file: Path
    of: Path
    text: str
    mode: int
    own: tuple[FarmDifference, ...]
    notes: tuple[str, ...]

    def write(self) -> None:
        """Conflict: a file is there already."""
        if self.file.exists() or self.file.is_symlink():
            raise _there(self.file)
        fresh = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:
            write_new(fresh, self.text.encode(), mode=self.mode)
            self.file.hardlink_to(fresh)  # which replaces nothing
            sync(self.file.parent)
        except FileExistsError:
            raise _there(self.file) from None
        except OSError as error:
            raise file_error(error, self.file, "write") from error
        finally:
            fresh.unlink(missing_ok=True)


def twin_of(first: Path, asked: TwinAsked) -> Twin:
    """The twin's file; nothing is written. Errors: NotFound and InventoryError (of the first file),
    UsageError (what was asked can't be), Conflict (something of it is taken)."""
    data = read(first)
    file = FarmFile.of(data, first)
    around = neighbours()
    maker = _TwinMaker(file, FarmText(data, first), asked, around)
    if asked.out.exists() or asked.out.is_symlink():
        raise _there(asked.out)
    if not asked.out.parent.is_dir():
        raise NotFound(f"there is no directory {asked.out.parent}", remedy="make it, or give another")
    return maker.made()


def _there(path: Path) -> Conflict:
    return Conflict(f"{path} is there already: nothing is overwritten", remedy="--out ANOTHER")


class _TwinMaker:
    """Implements ``provision.network.service.OtherNames``."""

    def __init__(self, file: FarmFile, text: FarmText, asked: TwinAsked, around: Neighbours) -> None:
        self._file, self._text, self._asked, self._around = file, text, asked, around
        self._first = first = file.farm
        self._others = tuple(one for one in around.farms if one.farm != first.farm)
        if asked.name in (first.farm, *(one.farm for one in around.farms)) or (
            FarmPaths(asked.name).root.exists()
        ):
            raise Conflict(f"there is a farm {asked.name} here already", remedy="--as ANOTHER")
        self._taken = TakenHere((first, *self._others))
        self._notes: list[str] = []
        self._hosts: dict[str, str] = {}  # of repositories' URLs
        self._renamed = _renamer(first.farm, asked.name)
        self._zone = self._own_zone()
        self.domain = self._new_domain()
        makes = any(service.MAKES_NETWORK for service in services(first))
        self._subnet = asked.subnet or (self._free_subnet() if makes else None)
        self._check_subnet()
        self._range = self._own_range()

    @property
    def same_subnet(self) -> bool:
        return self._subnet is None

    def made(self) -> Twin:
        asked, first, text = self._asked, self._first, self._text
        text.set(("farm",), asked.name)
        if self.domain != (first.network.domain or ""):
            text.set(("network", "domain"), self.domain)
        self._network()
        self._check_machines()
        for name, vm in first.vms.items():
            self._vm(name, vm)
        for service in services(first):
            apart = service.apart(self)
            for key, value in apart.keys.items():
                if value != str(getattr(service, key)):
                    text.set(("services", service.NAME, key), value)
            if apart.note:
                self._notes.append(f"{service.NAME}: {apart.note}")
        self._repositories()
        self._builds()
        if asked.out.parent.resolve() != first.path.parent.resolve():
            for place, path in relative_paths(first):
                text.set(place, path)
        return self._checked()

    # ---- Names

    def path(self, path: str) -> str:
        """The farm's name in it is replaced; where it has none, the new one is added to its end."""
        whole = Path(path)
        found = [part for part in whole.parts if part == self._first.farm]
        if found:
            parts = [self._asked.name if part == self._first.farm else part for part in whole.parts]
            return self._free(OwnKind.FILE, str(Path(*parts)))
        return self._free(OwnKind.FILE, str(whole.with_stem(self._renamed(whole.stem))))

    def link(self, name: str) -> str:
        long = self._renamed(name)
        short = f"{name[:10]}-{hashlib.sha256(long.encode()).hexdigest()[:4]}"
        return self._free(OwnKind.LINK, long if len(long) < _IFNAMSIZ else short)

    def port(self, port: int) -> str:
        if self._asked.shift is not None:
            found = port + self._asked.shift
            if not 0 < found < 65536 or self._taken.port(found):
                raise Conflict(f"port {found}, for {port}, is taken", remedy="--port-shift ANOTHER")
        else:
            candidates = (*range(port + _STEP, 65536, _STEP), *range(1024, 65536))
            found = next(one for one in candidates if not self._taken.port(one))
        self._taken.add(OwnKind.PORT, str(found), self._asked.name)
        return str(found)

    def _host(self, name: str) -> str:
        """In place of a host name or alias."""
        head, dot, rest = name.partition(".")
        if dot and self.domain != (self._first.network.domain or "") and _inside(name, self._zone):
            rest = self.domain  # the old zone is the first farm's

        def candidates() -> Iterator[str]:
            label = self._renamed(head)
            yield f"{label}{dot}{rest}"
            yield from (f"{label}-{number}{dot}{rest}" for number in count(2))

        for found in candidates():
            full = found if dot or not self.domain else f"{found}.{self.domain}"
            if not self._taken.holder(OwnKind.NAME, full):
                self._taken.add(OwnKind.NAME, full, self._asked.name)
                return found
        raise AssertionError

    def _free(self, kind: OwnKind, value: str) -> str:
        if holder := self._taken.holder(kind, value):
            raise Conflict(f"{kind} {value} is farm {holder}'s", remedy=_OTHERS)
        self._taken.add(kind, value, self._asked.name)
        return value

    def _own_zone(self) -> str:
        """The zone that is all the first farm's; "": it has none."""
        for service in services(self._first):
            zones = () if service.own_block else service.zones(Renderer(self._first, {}))
            if zones:
                return str(zones[0].name)
        return ""

    def _new_domain(self) -> str:
        """Another one only where the zone is the first farm's."""
        domain, name = self._first.network.domain or "", self._asked.name
        if not self._zone:
            return domain
        head, _, rest = domain.partition(".")
        if head == self._first.farm and rest:
            return f"{name}.{rest}"
        return f"{name}.{domain}"

    # ---- The network

    def _check_subnet(self) -> None:
        new, old = self._subnet, self._first.network.subnet
        if self._asked.range and (new or old is None or self._first.network.mode == "user"):
            raise UsageError(
                "--addresses is for a farm in the first one's subnet", remedy="leave it out"
            )
        if new is None:
            return
        if old is None or self._first.network.mode == "user":
            raise UsageError("--subnet: the first farm has no subnet", remedy="leave it out")
        if new.prefixlen > old.prefixlen:
            raise UsageError(f"--subnet: {new} is smaller than {old}", remedy=f"one of /{old.prefixlen}")
        for farm in (self._first, *self._others):
            known = farm.network.subnet
            if known is not None and known.overlaps(new):
                words = f"{new} overlaps {known}, which farm {farm.farm} has"
                raise Conflict(words, remedy="--subnet ANOTHER")

    def _free_subnet(self) -> IPv4Network | None:
        old = self._first.network.subnet
        if old is None:
            return None
        known = [farm.network.subnet for farm in self._others if farm.network.subnet] + _routes()
        begin, size = int(old.network_address), old.num_addresses
        for number in range(1, _SUBNETS):
            if begin + (number + 1) * size > 2**32:
                break
            new = IPv4Network((begin + number * size, old.prefixlen))
            if new.is_private and not any(new.overlaps(one) for one in known):
                return new
        raise Conflict(f"no subnet after {old} is free", remedy="--subnet ADDRESS/LENGTH")

    def _own_range(self) -> tuple[int, int] | None:
        """What is to be the twin's of the first farm's subnet; None: it has another one, or none."""
        net = self._first.network
        virtual = [vm for vm in self._first.vms if self._first.driver_of(vm).virtual]
        if self._subnet or net.subnet is None or net.mode == "user" or not virtual:
            return None
        mates = [one for one in self._others if _overlap(one, net.subnet)]
        ours = addresses_of(self._first)
        taken = [(one, one) for one in ours]
        for mate in mates:
            try:
                taken += ((one, one) for one in addresses_of(mate))
            except FarmhandError as error:
                self._notes.append(f"not looked at: addresses of farm {mate.farm}: {error.message}")
        for mate in mates:  # what it may give out is its own, if it keeps off the first farm's
            pool = pool_of(mate)
            if not any(low <= one <= high for low, high in pool for one in ours):
                taken += pool
        if self._asked.range:
            low, high = map(int, self._asked.range)
            if found := sorted(one for one, last in taken if low <= one <= high or low <= last <= high):
                words = f"--addresses: {IPv4Address(found[0])} is another farm's"
                raise Conflict(words, remedy="--addresses FIRST-LAST")
            return low, high
        free = [run for part in pool_of(self._first) for run in left_of(part, taken)]
        first, last = max(free, key=lambda run: run[1] - run[0], default=(1, 0))
        room = last - first + 1
        if room < len(virtual):
            raise Conflict(
                f"{net.subnet} has no {len(virtual)} addresses in a row left for another farm",
                remedy="--subnet ADDRESS/LENGTH, for one of its own; or --addresses FIRST-LAST",
            )
        return last - max(len(virtual), room // 2) + 1, last  # the other half is left for others

    def _network(self) -> None:
        net, text = self._first.network, self._text
        if self._range is not None:
            asked = [(int(one.address), int(one.address)) for one in self._asked.endpoints.values()]
            its = [self._range, *asked]
            closed = [run for part in pool_of(self._first) for run in left_of(part, its)]
            text.add(("network", "reserved"), [_stretch(*map(IPv4Address, one)) for one in closed])
            return
        if self._subnet is None or net.subnet is None:
            return
        text.set(("network", "subnet"), str(self._subnet))
        for service in services(self._first):
            if service.MAKES_NETWORK:
                link = self._free(OwnKind.LINK, self._renamed(net.network or ""))
                text.set(("network", "network"), link)
        if net.gateway:
            text.set(("network", "gateway"), str(self._moved(net.gateway)))
        for number, server in enumerate(net.nameservers):
            text.set(("network", "nameservers", number), str(self._moved(server)))
        for key in ("reserved", "pool"):
            for number, entry in enumerate(getattr(net, key)):
                moved = _stretch(*map(self._moved, parse_range(entry)))
                text.set(("network", key, number), moved)
        if net.subnet6:
            self._subnet6 = self._free_subnet6(net.subnet6)
            text.set(("network", "subnet6"), str(self._subnet6))
            if net.gateway6:
                text.set(("network", "gateway6"), str(self._moved6(net.gateway6)))
        if not any(service.MAKES_NETWORK for service in services(self._first)):
            by = f" by {self._moved(net.gateway)}" if net.gateway else ""
            self._notes.append(f"network: {net.bridge or net.network} must lead to {self._subnet}{by}")

    def _moved(self, address: IPv4Address) -> IPv4Address:
        """The same host number in the new subnet; others are as they were."""
        old, new = self._first.network.subnet, self._subnet
        if old is None or new is None or address not in old:
            return address
        return new.network_address + (int(address) - int(old.network_address))

    def _moved6(self, address: IPv6Address) -> IPv6Address:
        old = self._first.network.subnet6
        assert old is not None
        return self._subnet6.network_address + (int(address) - int(old.network_address))

    def _free_subnet6(self, old: IPv6Network) -> IPv6Network:
        known = [farm.network.subnet6 for farm in self._others if farm.network.subnet6]
        for number in range(1, _SUBNETS):
            begin = (int(old.network_address) + number * old.num_addresses) % 2**128
            new = IPv6Network((begin, old.prefixlen))
            if not any(new.overlaps(one) for one in known):
                return new
        raise Conflict(f"no subnet after {old} is free", remedy="give 'subnet6' another one")

    # ---- VMs

    def _check_machines(self) -> None:
        """Listed machines are there already: only the admin knows which are the twin's."""
        first, asked = self._first, self._asked
        for flag, known in (("--address", asked.endpoints), ("--hostname", asked.hostnames)):
            if unknown := [vm for vm in known if vm not in first.vms]:
                raise NotFound(
                    f"{flag}: there is no VM {unknown[0]!r}", remedy=f"it has {some(first.vms)}"
                )
        listed = [vm for vm in first.vms if not first.driver_of(vm).virtual]
        if unsaid := [vm for vm in listed if vm not in asked.endpoints]:
            raise UsageError(
                f"which machines are the twins of {some(unsaid)}? farmhand doesn't make those",
                remedy=" ".join(f"--address {vm}=ADDRESS" for vm in unsaid),
            )

    def _vm(self, name: str, vm: Vm) -> None:
        text, here = self._text, ("vms", name)
        virtual = self._first.driver_of(name).virtual
        old = self._first.hostname_of(name)
        hostname = self._asked.hostnames.get(name) or self._host(old)
        text.set((*here, "hostname"), hostname)
        for number, alias in enumerate(vm.aliases):
            text.set((*here, "aliases", number), self._host(alias))
        for number, proxy in enumerate(vm.proxy):
            served = self._proxy(proxy.name)
            text.set((*here, "proxy", number, "name"), served)
            if proxy.access_log:
                text.set((*here, "proxy", number, "access_log"), self.path(proxy.access_log))
            tls = f"; {proxy.certificate} must hold for it" if proxy.certificate else ""
            self._notes.append(f"{name}: {served} must lead to this machine{tls}")
        if vm.mac:
            text.set((*here, "mac"), self._mac(name, vm.mac))
        address = self._address(name, vm)
        if address is not None:
            text.set((*here, "address"), str(address))
        if vm.address6:
            text.set((*here, "address6"), str(self._address6(vm.address6)))
        endpoint = self._asked.endpoints.get(name)
        if endpoint and endpoint.port:
            text.set((*here, "ssh_port"), str(endpoint.port))
        elif vm.ssh_port and virtual and self._first.network.mode == "user":
            text.set((*here, "ssh_port"), self.port(vm.ssh_port))
        if vm.nat_port:
            text.set((*here, "nat_port"), self.port(vm.nat_port))
        if vm.reset:
            machines = self._first.machine_of(name), f"{self._asked.name}-{name}"
            names = {old: hostname, str(vm.address): str(address), machines[0]: machines[1]}
            self._reset(name, vm, names)

    def _proxy(self, name: str) -> str:
        head, dot, rest = name.partition(".")
        label = self._renamed(head)
        candidates = (f"{label}{'' if n == 1 else f'-{n}'}{dot}{rest}" for n in count(1))
        found = next(one for one in candidates if not self._taken.holder(OwnKind.NAME, one))
        return self._free(OwnKind.NAME, found)

    def _mac(self, vm: str, old: str) -> str:
        """Of the same maker."""
        for attempt in count():
            seed = hashlib.sha256(f"{self._asked.name}/{vm}/{attempt}".encode()).digest()
            mac = f"{old[:8]}:{seed[0]:02x}:{seed[1]:02x}:{seed[2]:02x}"
            if not self._taken.mac(mac):
                return self._free(OwnKind.MAC, mac)
        raise AssertionError

    def _address(self, name: str, vm: Vm) -> IPv4Address | None:
        if endpoint := self._asked.endpoints.get(name):
            if self._first.driver_of(name).virtual:
                return IPv4Address(self._free(OwnKind.ADDRESS, str(endpoint.address)))
            return endpoint.address
        if vm.address is None or self._first.network.mode == "user":
            return vm.address
        if self._range is None:
            return self._moved(vm.address)
        low, high = self._range
        given = {one.address for one in self._asked.endpoints.values()}
        for number in range(low, high + 1):
            found = IPv4Address(number)
            if found not in given and not self._taken.holder(OwnKind.ADDRESS, str(found)):
                return IPv4Address(self._free(OwnKind.ADDRESS, str(found)))
        raise Conflict("--addresses: there are not enough for the VMs", remedy="give more of them")

    def _address6(self, old: IPv6Address) -> IPv6Address:
        """In the same subnet one that follows from no IPv4 address."""
        net = self._first.network
        assert net.subnet6 is not None and net.subnet is not None
        if self._subnet is not None:
            return self._moved6(old)
        for number in range(net.subnet.num_addresses, net.subnet6.num_addresses):
            found = net.subnet6.network_address + number
            if not self._taken.holder(OwnKind.ADDRESS, str(found)):
                return IPv6Address(self._free(OwnKind.ADDRESS, str(found)))
        raise Conflict(f"{net.subnet6} has no address left", remedy="--subnet, for one of its own")

    def _reset(self, name: str, vm: Vm, names: Mapping[str, str]) -> None:
        """Of a listed machine: by a command that names it. One that doesn't would reset the first farm's
        machine."""
        words = with_names(vm.reset, names)
        if words == vm.reset:
            place = self._file.side(("vms", name, "reset"), "")
            raise UsageError(
                f"{place}: it names neither address nor host name of {name}: the second farm "
                "would reset the first one's machine",
                remedy="have the command name the machine (an argument), then again",
            )
        for number, word in enumerate(words):
            if word != vm.reset[number]:
                self._text.set(("vms", name, "reset", number), word)

    # ---- Builds

    def _repositories(self) -> None:
        for name, section in self._first.repositories.items():
            here: Place = ("repositories", name)
            for key in ("path", "incoming"):
                if path := getattr(section, key):
                    self._text.set((*here, key), self.path(path))
            if section.url:
                url = self._url(section.url, served=section.serve == "nginx")
                self._text.set((*here, "url"), url)
                tls = f"; {section.certificate} must hold for it" if section.certificate else ""
                self._notes.append(f"repository {name}: {url} must lead to it{tls}")

    def _url(self, url: str, *, served: bool) -> str:
        """nginx has a virtual host for each farm; elsewhere it is another path."""
        scheme, _, rest = url.partition("://")
        host, slash, path = rest.partition("/")
        if not served:
            head, _, last = path.rstrip("/").rpartition("/")
            last = self._renamed(last) if last else self._asked.name
            return f"{scheme}://{host}/{head}{'/' if head else ''}{last}"
        name, colon, port = host.partition(":")
        if _is_address(name):  # a name of its own is what it can't have
            usual = 443 if scheme == "https" else 80
            return f"{scheme}://{name}:{self.port(int(port or usual))}{slash}{path}"
        known = f"{scheme}://{host}"
        if known not in self._hosts:
            self._hosts[known] = f"{scheme}://{self._proxy(name)}{colon}{port}"
        return f"{self._hosts[known]}{slash}{path}"

    def _builds(self) -> None:
        first, text = self._first, self._text
        if revision := self._asked.revision:
            if first.source is None:
                raise UsageError("--revision: the farm builds nothing: it has no 'source'")
            text.set(("source", "revision"), revision)
        if first.cycle and first.cycle.lock:
            head, _, last = first.cycle.lock.webdav.rpartition("/")
            text.set(("cycle", "lock", "webdav"), f"{head}/{self._renamed(last)}")

    # ---- The whole

    def _checked(self) -> Twin:
        asked, first = self._asked, self._first
        when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
        head = [
            f"Made by farm-twin from {first.path}, {when}: names, addresses and ports are its own.",
            "What differs later: farm-diff.",
        ]
        for host in {first.host_of(vm): None for vm in first.vms}:
            if memory := first.hosts[host].memory:
                both = format_size(2 * memory)
                self._notes.append(
                    f"host {host}: each farm keeps to its own {format_size(memory)}, together {both}"
                )
        twin = self._loaded(self._text.text([*head, *self._notes]))
        taken = TakenHere((first, *self._others))
        for value in own_values(twin.farm):
            if value.kind not in MAY_BE_SHARED and (holder := taken.holder(value.kind, value.value)):
                raise Conflict(
                    f"{value.kind} {value.value} is farm {holder}'s already",
                    remedy=_OTHERS,
                )
        for other in (first, *self._others):
            if other.network.subnet is None or not _overlap(twin.farm, other.network.subnet):
                continue
            for low, high in both_may_give(other, twin.farm):
                self._notes.append(
                    f"{other.path}: both farms may give out {_stretch(low, high)}: add that to "
                    "'reserved' there"
                )
        self._notes += (f"not looked at: farm {one}" for one in self._around.unread)
        text = self._text.text([*head, *self._notes])
        found = differences(self._file, self._loaded(text))
        own = tuple(one for one in found if one.group is DifferenceGroup.OWN)
        mode = stat.S_IMODE(first.path.stat().st_mode)
        return Twin(asked.name, asked.out, first.path, text, mode, own, tuple(self._notes))

    def _loaded(self, text: str) -> FarmFile:
        """As it is loaded once it is written."""
        try:
            return FarmFile.of(text.encode(), self._asked.out)
        except InventoryError as error:
            raise UsageError(
                f"the second farm's file would not load: {error.problems[0].message}",
                remedy="give the names, addresses or ports yourself; or change that in the first file",
                detail="\n".join(map(str, error.problems)),
            ) from error


def _renamer(old: str, new: str) -> Callable[[str], str]:
    """A function that puts the new farm's name in place of the old one's, where a word has it between
    its dashes; else behind the word."""
    whole = re.compile(rf"(?<![a-z0-9]){re.escape(old)}(?![a-z0-9])")

    def renamed(word: str) -> str:
        found, times = whole.subn(new, word, count=1)
        return found if times else f"{word}-{new}"

    return renamed


def _inside(name: str, zone: str) -> bool:
    return name == zone or name.endswith(f".{zone}")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _stretch(low: IPv4Address, high: IPv4Address) -> str:
    return f"{low}-{high}" if low != high else str(low)


def _overlap(farm: Farm, subnet: IPv4Network) -> bool:
    its = farm.network.subnet
    return its is not None and farm.network.mode != "user" and its.overlaps(subnet)


def _routes() -> list[IPv4Network]:
    """The subnets that this machine's kernel has routes to, but for the default ones (proc(5))."""
    found = []
    for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        address, mask = (int.from_bytes(bytes.fromhex(fields[at]), sys.byteorder) for at in (1, 7))
        if mask:
            found.append(IPv4Network((address, mask.bit_count())))
    return found
