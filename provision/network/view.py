"""What templates see of a farm: rows of words, made once.

Ten thousand VMs are rendered for a dozen services: whatever costs something per VM is done here, once,
not in a template. Every ``Word`` was checked at load or made by us.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING

from inventory.base import parse_range
from inventory.errors import Conflict
from provision.network.templating import Word

if TYPE_CHECKING:
    from inventory.model import Farm, Proxy
    from provision.allocate import Allocation


_NONE = Word()


@dataclass(frozen=True, slots=True)
class VmRow:
    """``names``: the full name first, then the short one, then aliases, each once, as in hosts(5).
    ``full``: names for DNS, the VM's own first. Absent ones are ""."""

    vm: Word
    machine: Word
    hostname: Word
    fqdn: Word
    names: tuple[Word, ...]
    full: tuple[Word, ...]
    address: Word
    address6: Word
    mac: Word
    port: int
    nat_port: int | None
    description: str | None


@dataclass(frozen=True, slots=True)
class ProxyRow:
    """A proxy name and where it leads."""

    name: Word
    target: Word
    port: int
    certificate: Word
    key: Word
    websocket: bool
    body_size: int | None
    log: Word
    description: str | None


@dataclass(frozen=True, slots=True)
class Zone:
    """A reverse zone. ``records``: owner names in full, and the VMs' names."""

    name: Word
    file: Word
    records: tuple[tuple[Word, Word], ...]
    parent: Word = _NONE  # classless: the zone that delegates it
    labels: tuple[tuple[Word, Word], ...] = ()  # classless: the parent's names, and ours


@dataclass(frozen=True)
class View:
    """One farm, for its templates."""

    declared: Farm

    farm: Word
    identifier: Word  # the farm's name where '-' is no part of a name
    domain: Word
    subnet: IPv4Network | None
    subnet6: IPv6Network | None
    vms: tuple[VmRow, ...]

    @cached_property
    def proxies(self) -> tuple[ProxyRow, ...]:
        rows = {row.vm: row for row in self.vms if row.address}
        return tuple(
            _proxy(rows[Word(vm)], proxy)
            for vm, declared in self.declared.vms.items()
            if declared.proxy and vm in rows
            for proxy in declared.proxy
        )

    @cached_property
    def reverse(self) -> tuple[Zone, ...]:
        """Zones of all addresses of the subnets."""
        return (*_reverse4(self.subnet, self.vms), *_reverse6(self.subnet6, self.vms))

    @property
    def nat(self) -> tuple[VmRow, ...]:
        """By port."""
        rows = [row for row in self.vms if row.nat_port and row.address]
        return tuple(sorted(rows, key=lambda row: row.nat_port or 0))

    @property
    def dhcp(self) -> tuple[VmRow, ...]:
        """Those that can ask: with MAC and address."""
        return tuple(row for row in self.vms if row.mac and row.address)


def view(farm: Farm, allocations: Mapping[str, Allocation]) -> View:
    """Of the VMs that something was given to, in the farm file's order; those on ssh hosts are there
    always. Conflict: two VMs with one IPv6 address."""
    network = farm.network
    rows = tuple(
        _row(farm, vm, allocations.get(vm))
        for vm in farm.vms
        if vm in allocations or not farm.driver_of(vm).virtual
    )
    _distinct(farm, rows)
    return View(
        farm,
        Word(farm.farm),
        Word(farm.farm.replace("-", "_")),
        Word(network.domain or ""),
        network.subnet,
        network.subnet6,
        rows,
    )


def _row(farm: Farm, vm: str, given: Allocation | None) -> VmRow:
    declared, network = farm.vms[vm], farm.network
    alone = not farm.driver_of(vm).virtual
    hostname = declared.hostname or vm
    fqdn = farm.qualified(hostname)
    full = [fqdn, *map(farm.qualified, declared.aliases)]
    names = dict.fromkeys((*full, hostname.split(".")[0], *declared.aliases))
    address = declared.address if alone else given.address if given else None
    mac = declared.mac if alone else given.mac if given else None
    user = network.mode == "user" and not alone
    address6: IPv6Address | None = declared.address6
    if address6 is None and network.subnet6 and network.subnet and address and address in network.subnet:
        offset = int(address) - int(network.subnet.network_address)
        address6 = IPv6Address(int(network.subnet6.network_address) + offset)
    return VmRow(
        Word(vm),
        Word(farm.machine_of(vm)),
        Word(hostname),
        Word(fqdn),
        tuple(map(Word, names)),
        tuple(map(Word, full)),
        Word("127.0.0.1" if user else address or ""),
        Word(address6 or ""),
        Word(mac or ""),
        given.ssh_port if given else declared.ssh_port or 22,
        declared.nat_port,
        declared.description,
    )


def _proxy(row: VmRow, proxy: Proxy) -> ProxyRow:
    return ProxyRow(
        Word(proxy.name),
        row.address,
        proxy.port,
        Word(proxy.certificate or ""),
        Word(proxy.key or proxy.certificate or ""),
        proxy.websocket,
        proxy.body_size,
        Word(proxy.access_log or ""),
        row.description,
    )


def _distinct(farm: Farm, rows: tuple[VmRow, ...]) -> None:
    if farm.network.subnet6 is None:
        return
    first: dict[str, str] = {str(farm.network.gateway6): "the gateway"} if farm.network.gateway6 else {}
    for row in rows:
        if row.address6 and first.setdefault(row.address6, row.vm) != row.vm:
            raise Conflict(
                f"{farm.path.name}: {row.vm}'s IPv6 address would be {row.address6}, which "
                f"{first[row.address6]} has",
                remedy=f"give {row.vm} an 'address6'",
            )


def _reverse4(subnet: IPv4Network | None, rows: tuple[VmRow, ...]) -> list[Zone]:
    """One zone for each whole octet that the subnet covers; for less than an octet the classless zone
    of RFC 2317, called FIRST/LENGTH as there."""
    if subnet is None:
        return []
    network, size = int(subnet.network_address), subnet.num_addresses
    grouped: dict[str, list[tuple[Word, Word]]] = defaultdict(list)
    length = 24 if subnet.prefixlen > 24 else -(-max(subnet.prefixlen, 8) // 8) * 8
    octets = length // 8
    classless = subnet.prefixlen > 24
    seen = set()
    for row in rows:
        if not row.address:
            continue
        parts = row.address.split(".")
        number = int(parts[0]) << 24 | int(parts[1]) << 16 | int(parts[2]) << 8 | int(parts[3])
        if not 0 <= number - network < size or row.address in seen:
            continue
        seen.add(row.address)  # machines may share one, each with its ssh port
        origin = f"{'.'.join(reversed(parts[:octets]))}.in-addr.arpa"
        grouped[origin].append((Word(".".join(reversed(parts[octets:]))), row.fqdn))
    bits = 32 - length
    first = network >> bits
    count = 1 if classless else max(1, size >> bits)
    zones = []
    for number in range(first, first + count):
        parts = str(IPv4Address(number << bits)).split(".")[:octets]
        origin = f"{'.'.join(reversed(parts))}.in-addr.arpa"
        found = grouped.get(origin, [])
        name = f"{network & 255}/{subnet.prefixlen}.{origin}" if classless else origin
        zones.append(
            Zone(
                Word(name),
                Word(f"db.{name.replace('/', '-')}"),
                tuple((Word(f"{label}.{name}"), fqdn) for label, fqdn in found),
                Word(origin if classless else ""),
                tuple((Word(f"{label}.{origin}"), Word(f"{label}.{name}")) for label, _ in found)
                if classless
                else (),
            )
        )
    return zones


def _reverse6(subnet: IPv6Network | None, rows: tuple[VmRow, ...]) -> list[Zone]:
    if subnet is None:
        return []
    name = _pointer(subnet.network_address).split(".", 32 - subnet.prefixlen // 4)[-1]
    records = tuple(
        (Word(_pointer(IPv6Address(row.address6))), row.fqdn) for row in rows if row.address6
    )
    return [Zone(Word(name), Word(f"db.{name}"), records)]


def _pointer(address: IPv6Address) -> str:
    """As ``reverse_pointer``, five times as fast."""
    return f"{'.'.join(f'{int(address):032x}'[::-1])}.ip6.arpa"


def pointers(rows: Iterable[VmRow]) -> dict[Word, Word]:
    """By the name that an address is looked up by: the full name of the first VM that has it."""
    found: dict[Word, Word] = {}
    for row in rows:
        if row.address:
            name = ".".join(reversed(row.address.split(".")))
            found.setdefault(Word(f"{name}.in-addr.arpa"), row.fqdn)
        if row.address6:
            found.setdefault(Word(_pointer(IPv6Address(row.address6))), row.fqdn)
    return found


def pools(farm: Farm) -> tuple[tuple[Word, Word], ...]:
    """First and last address of each range for strangers."""
    ranges = map(parse_range, farm.network.pool)
    return tuple((Word(first), Word(last)) for first, last in ranges)
