"""What the network services ask of the rest of a farm file."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv6Address

from inventory.base import quote
from inventory.errors import Problem
from inventory.model import Farm
from inventory.places import Path, Places

Found = Iterator[Problem]

_DHCP = ("dhcpd", "kea", "dnsmasq", "libvirt")
_WITHOUT_ADDRESSES = ("ssh_config", "ansible")


def check_services(farm: Farm, places: Places) -> Found:
    """Nothing where the file names no service."""
    yield from _addresses6(farm, places)
    used = farm.services.used
    if not used or places.is_bad(("network",)):
        return
    yield from _network(farm, places)
    yield from _zone(farm, places)
    yield from _taken(farm, places)
    yield from _proxies(farm, places)


def _network(farm: Farm, places: Places) -> Found:
    network = farm.network
    for name in farm.services.used:
        path: Path = ("services", name)
        if network.mode == "user":
            if name not in _WITHOUT_ADDRESSES:
                yield places.problem(
                    path,
                    "in mode user the VMs have no addresses: 'network' needs another mode",
                    key=True,
                )
        elif name in (*_DHCP, "bind") and network.subnet is None:
            yield places.problem(path, "'network' needs 'subnet' for it", key=True)
    if farm.services.libvirt and network.mode == "bridge":
        yield places.problem(
            ("services", "libvirt"), "it is for mode network; the mode is bridge", key=True
        )
    if farm.services.libvirt and network.gateway is None:
        yield places.problem(
            ("services", "libvirt"), "'network' needs 'gateway': libvirt's own address", key=True
        )


def _zone(farm: Farm, places: Places) -> Found:
    bind, domain = farm.services.bind, farm.network.domain
    if bind is None or places.is_bad(("services", "bind")):
        return
    zone = bind.zone or domain
    if zone is None or domain is None:
        yield places.problem(("services", "bind"), "'network' needs 'domain' for it", key=True)
        return
    if len(zone) > 200:
        key = "zone" if bind.zone else "domain"
        where: Path = ("services", "bind", key) if bind.zone else ("network", key)
        yield places.problem(where, "a zone's file is named after it: at most 200 characters")
    inside = f".{zone}"
    if domain != zone and not domain.endswith(inside):
        yield places.problem(
            ("services", "bind", "zone"), f"the network's domain, {domain}, is outside of {zone}"
        )
        return
    for name, vm in farm.vms.items():
        path: Path = ("vms", name)
        if vm.hostname is None:
            if len(name) + len(domain) > 252:
                yield places.problem(path, f"{name}.{domain} is longer than 253 characters", key=True)
        elif not places.is_bad((*path, "hostname")):
            yield from _inside(farm, places, (*path, "hostname"), vm.hostname, zone)
        for number, alias in enumerate(vm.aliases):
            yield from _inside(farm, places, (*path, "aliases", number), alias, zone)


def _inside(farm: Farm, places: Places, path: Path, name: str, zone: str) -> Found:
    full = farm.qualified(name)
    if full != zone and not full.endswith(f".{zone}"):
        yield places.problem(path, f"{quote(name)} is outside of {zone}, the zone that BIND serves")
    elif len(full) > 253:
        yield places.problem(path, f"{quote(full)} is longer than 253 characters")


def _taken(farm: Farm, places: Places) -> Found:
    """No file and no port for two services."""
    services = farm.services
    files: dict[str, Path] = {}
    ports: dict[tuple[object, int], Path] = {}
    for name in services.used:
        section = getattr(services, name)
        for key in ("config", "config4", "config6", "map"):
            path: Path = ("services", name, key)
            value = getattr(section, key, None)
            if value is None:
                continue
            first = files.setdefault(value, path)
            if first != path:
                yield places.problem(path, f"{quote(value)} is {places.name(first)} already")
        if name in ("nginx", "haproxy"):
            keys: tuple[str, ...] = ("port", "tls_port")
        else:
            keys = ("port",) if name == "bind" or (name == "dnsmasq" and section.dns) else ()
        for key in keys:
            path = ("services", name, key)
            port = getattr(section, key)
            first = ports.setdefault((section.address, port), path)
            if first != path:
                yield places.problem(
                    path, f"port {port} of {section.address} is {places.name(first)} already"
                )


def _proxies(farm: Farm, places: Places) -> Found:
    if farm.services.haproxy is None:
        return
    for name, vm in farm.vms.items():
        for number, proxy in enumerate(vm.proxy):
            if proxy.key is not None:
                yield places.problem(
                    ("vms", name, "proxy", number, "key"),
                    "haproxy reads the key from the certificate's file: put it there, leave 'key' out",
                )


def _addresses6(farm: Farm, places: Places) -> Found:
    network = farm.network
    taken: dict[IPv6Address, Path] = {}
    if network.gateway6 is not None:
        taken[network.gateway6] = ("network", "gateway6")
    declared = [(name, vm) for name, vm in farm.vms.items() if vm.address6 is not None]
    for name, vm in declared:
        path: Path = ("vms", name, "address6")
        address = vm.address6
        assert address is not None
        if places.is_bad(path) or places.is_bad(("network",)):
            continue
        if network.subnet6 is None or address not in network.subnet6:
            where = f"outside the subnet, {network.subnet6}" if network.subnet6 else "without 'subnet6'"
            yield places.problem(path, f"{address} is {where}")
        first = taken.setdefault(address, path)
        if first != path:
            yield places.problem(path, f"{address} is taken: {places.name(first)} has it")
    if network.subnet6 is None or network.subnet is None or not taken:
        return
    base6, base4 = int(network.subnet6.network_address), int(network.subnet.network_address)
    for name, vm in farm.vms.items():
        if vm.address is None or vm.address6 is not None:
            continue
        derived = IPv6Address(base6 + int(vm.address) - base4) if vm.address in network.subnet else None
        if derived in taken:
            yield places.problem(
                ("vms", name, "address"),
                f"its IPv6 address would be {derived}, which {places.name(taken[derived])} has: "
                "give it an 'address6'",
            )
