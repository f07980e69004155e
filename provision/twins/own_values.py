"""What of a farm no other farm may have: one table, for who makes a second farm, and who compares two.

A value may be in the farm file, or follow from what is there: then its place is where it could be
written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv6Address
from typing import TypeAlias

from inventory.model import Farm
from inventory.places import Path
from provision.network.renderer import Renderer
from provision.network.service import services
from repositories.places import directory


class OwnKind(StrEnum):
    """What it is. Equal values of one kind are one and the same thing."""

    FARM = "farm's name"
    MACHINE = "machine's name"
    NAME = "name"
    MAC = "MAC"
    ADDRESS = "address"
    PORT = "port"
    FILE = "path"
    LINK = "network"
    SUBNET = "subnet"
    ZONE = "zone"
    VARIABLE = "variable"
    URL = "URL"
    LOCK = "lock"


MAY_BE_SHARED = frozenset({OwnKind.LOCK})
"""Each farm is to have its own, unless two farms are meant to keep out of each other's way."""


@dataclass(frozen=True, slots=True)
class OwnValue:
    """``path``: in the farm file, there or where it would be."""

    kind: OwnKind
    value: str
    path: Path


def own_values(farm: Farm) -> Iterator[OwnValue]:
    """All that the farm file decides. MACs, addresses and ports that it leaves to be given out are not
    among them: those are given to nobody twice."""
    yield OwnValue(OwnKind.FARM, farm.farm, ("farm",))
    for vm in farm.vms:
        yield from _of_vm(farm, vm)
    yield from _of_services(farm)
    for name, section in farm.repositories.items():
        here: Path = ("repositories", name)
        yield OwnValue(OwnKind.FILE, str(directory(farm, name)), (*here, "path"))
        if section.incoming:
            yield OwnValue(OwnKind.FILE, section.incoming, (*here, "incoming"))
        if section.serve != "none":
            at = section.served
            host = f"{at.host}:{at.port}" if at.port else at.host
            yield OwnValue(OwnKind.NAME, host, (*here, "url"))
        elif section.url:
            yield OwnValue(OwnKind.URL, section.url, (*here, "url"))
    if farm.cycle and farm.cycle.lock:
        yield OwnValue(OwnKind.LOCK, farm.cycle.lock.webdav, ("cycle", "lock", "webdav"))


def _of_vm(farm: Farm, name: str) -> Iterator[OwnValue]:
    vm, here = farm.vms[name], ("vms", name)
    virtual = farm.driver_of(name).virtual
    yield OwnValue(OwnKind.MACHINE, farm.machine_of(name), here)
    yield OwnValue(OwnKind.NAME, farm.qualified(farm.hostname_of(name)), (*here, "hostname"))
    for number, alias in enumerate(vm.aliases):
        yield OwnValue(OwnKind.NAME, farm.qualified(alias), (*here, "aliases", number))
    for number, proxy in enumerate(vm.proxy):
        yield OwnValue(OwnKind.NAME, proxy.name, (*here, "proxy", number, "name"))
        if proxy.access_log:
            path = (*here, "proxy", number, "access_log")
            yield OwnValue(OwnKind.FILE, proxy.access_log, path)
    if vm.mac:
        yield OwnValue(OwnKind.MAC, vm.mac, (*here, "mac"))
    if vm.address and not (virtual and farm.network.mode == "user"):
        # listed machines may stand behind one address, each with its port
        where = "" if virtual else f" port {vm.ssh_port or 22}"
        yield OwnValue(OwnKind.ADDRESS, f"{vm.address}{where}", (*here, "address"))
    if address6 := _address6(farm, name):
        yield OwnValue(OwnKind.ADDRESS, str(address6), (*here, "address6"))
    if vm.ssh_port and virtual and farm.network.mode == "user":
        yield OwnValue(OwnKind.PORT, str(vm.ssh_port), (*here, "ssh_port"))
    if vm.nat_port:
        yield OwnValue(OwnKind.PORT, str(vm.nat_port), (*here, "nat_port"))


def _address6(farm: Farm, name: str) -> IPv6Address | None:
    """The declared one; or the one that follows from the declared IPv4 address."""
    vm, net = farm.vms[name], farm.network
    if vm.address6 or not (vm.address and net.subnet6 and net.subnet and vm.address in net.subnet):
        return vm.address6
    return net.subnet6.network_address + (int(vm.address) - int(net.subnet.network_address))


def _of_services(farm: Farm) -> Iterator[OwnValue]:
    for service in services(farm):
        here: Path = ("services", service.NAME)
        for key in service.whole:
            value = getattr(service, key)
            kind = OwnKind.PORT if isinstance(value, int) else OwnKind.FILE
            kind = kind if "/" in str(value) or kind is OwnKind.PORT else OwnKind.LINK
            yield OwnValue(kind, str(value), (*here, key))
        if service.MAKES_NETWORK:
            yield OwnValue(OwnKind.LINK, str(farm.network.network), ("network", "network"))
            yield OwnValue(OwnKind.SUBNET, str(farm.network.subnet), ("network", "subnet"))
        for vm, variable in service.variables(farm):
            yield OwnValue(OwnKind.VARIABLE, variable, ("vms", vm))
        if service.own_block:
            continue
        for zone in service.zones(Renderer(farm, {})):
            back = zone.name.endswith(".arpa")
            key = "reverse" if back else "zone"
            path = (*here, key) if back or getattr(service, key, None) else ("network", "domain")
            yield OwnValue(OwnKind.ZONE, zone.name, path)


Stretch: TypeAlias = tuple[int, int]
"""The first and the last of addresses in a row, as numbers."""


def pool_of(farm: Farm) -> tuple[Stretch, ...]:
    """The addresses that the farm may give to its VMs: what its subnet and ``reserved`` leave. None
    where nothing is given out."""
    net = farm.network
    virtual = any(farm.driver_of(vm).virtual for vm in farm.vms)
    if net.subnet is None or net.mode == "user" or not virtual:
        return ()
    closed = [(int(low), int(high)) for low, high in net.reserved_ranges]
    closed += [(int(one), int(one)) for one in (net.gateway, *net.nameservers) if one]
    first, last = int(net.subnet.network_address) + 1, int(net.subnet.broadcast_address) - 1
    return tuple(left_of((first, last), closed))


def left_of(whole: Stretch, closed: Iterable[Stretch]) -> Iterator[Stretch]:
    """What a stretch has beside others."""
    following, end = whole
    for low, high in sorted(closed):
        if following < low and following <= end:
            yield following, min(low - 1, end)
        following = max(following, high + 1)
    if following <= end:
        yield following, end


def common(ones: Iterable[Stretch], others: Sequence[Stretch]) -> Iterator[Stretch]:
    """What is in some of both."""
    for low, high in ones:
        for first, last in others:
            if low <= last and first <= high:
                yield max(low, first), min(high, last)


def with_names(command: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """A command's words with others in place of these names and addresses, where they stand whole."""
    pattern = "|".join(re.escape(name) for name in names if names[name] != name)
    if not pattern:
        return tuple(command)
    whole = re.compile(rf"(?<![\w.-])(?:{pattern})(?![\w-]|\.\w)")
    return tuple(whole.sub(lambda found: names[found[0]], word) for word in command)
