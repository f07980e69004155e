"""What the network services ask of the rest of a farm file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv6Address

from inventory.base import quote
from inventory.errors import Problem
from inventory.model import Farm, ServiceSection
from inventory.places import Path, Places


def check_services(farm: Farm, places: Places) -> Iterator[Problem]:
    """All problems of the network services with the rest of the file. None where the file names no
    service."""
    yield from _addresses6(farm, places)
    sections = farm.services.sections
    if not sections or places.is_bad(("network",)):
        return
    for section in sections:
        yield from _network(farm, places, section)
    for section in sections:
        yield from section.problems(farm, places)
    yield from _taken(sections, places)


def _network(farm: Farm, places: Places, section: ServiceSection) -> Iterator[Problem]:
    path: Path = ("services", section.NAME)
    if farm.network.mode == "user":
        if section.NEEDS_ADDRESSES:
            yield places.problem(
                path,
                "in mode user the VMs have no addresses: 'network' needs another mode",
                key=True,
            )
    elif section.NEEDS_SUBNET and farm.network.subnet is None:
        yield places.problem(path, "'network' needs 'subnet' for it", key=True)


def _taken(sections: Sequence[ServiceSection], places: Places) -> Iterator[Problem]:
    """No file and no port is used by two services."""
    files: dict[str, Path] = {}
    ports: dict[tuple[object, int], Path] = {}
    for section in sections:
        for key in section.FILES:
            path: Path = ("services", section.NAME, key)
            file = getattr(section, key)
            first = files.setdefault(file, path)
            if first != path:
                yield places.problem(path, f"{quote(file)} is {places.name(first)} already")
        for key in section.ports:
            path = ("services", section.NAME, key)
            address, port = section.address, getattr(section, key)  # type: ignore[attr-defined]
            first = ports.setdefault((address, port), path)
            if first != path:
                yield places.problem(path, f"port {port} of {address} is {places.name(first)} already")


def _addresses6(farm: Farm, places: Places) -> Iterator[Problem]:
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
