"""Every file of a farm's network services, from the model alone: no clock, no disk, no daemon."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any
from zlib import crc32

from inventory.model import Farm
from inventory.reading import resolve
from provision.allocate import Allocation
from provision.network.document import Document
from provision.network.service import Service
from provision.network.service import services as used
from provision.network.templating import Templates, Word, never
from provision.network.view import View, VmRow, pools, view

SHARDS = 64
"""Files that a service's hosts are spread over."""


@dataclass(frozen=True, slots=True)
class Subnet:
    """A subnet's words."""

    address: Word
    mask: Word
    length: int
    cidr: Word


def _subnet(subnet: IPv4Network | IPv6Network) -> Subnet:
    address, mask = Word(subnet.network_address), Word(subnet.netmask)
    return Subnet(address, mask, subnet.prefixlen, Word(subnet))


class Renderer:
    """One farm's documents. ``serials``: the serial number that each zone's file should hold.
    ``others``: paths of files of hosts that are there too, for VMs that are left out here."""

    def __init__(
        self,
        farm: Farm,
        allocations: Mapping[str, Allocation],
        *,
        serials: Mapping[str, int] | None = None,
        others: Collection[str] = (),
    ) -> None:
        own = farm.services.templates
        self.farm = farm
        self._allocations = allocations
        self.others = others
        self._serials = dict(serials or {})
        self._templates = Templates(Path(own) if own else None)

    @cached_property
    def view(self) -> View:
        """Made when something is rendered that has VMs in it."""
        return view(self.farm, self._allocations)

    def documents(self, services: Collection[str] | None = None) -> tuple[Document, ...]:
        """Of the services the farm uses, or of those among them, in the order they are applied."""
        meant = [s for s in used(self.farm) if services is None or s.NAME in services]
        return tuple(document for service in meant for document in service.documents(self))

    def serial(self, zone: str) -> int:
        """The number that the zone's file should hold."""
        return self._serials.get(zone, 1)

    def render(self, template: str, service: Service, **values: object) -> str:
        """One of a service's templates, which sees it as ``service`` and the farm as ``net``."""
        seen = {"net": self.view, "service": service, **values}
        return self._templates.render(template, seen, service.STRINGS.get(template, never))

    def dhcp(self) -> dict[str, Any]:
        """What DHCP servers hand out besides addresses."""
        network = self.farm.network
        subnet, subnet6 = network.subnet, network.subnet6
        assert subnet is not None
        return {
            "subnet": _subnet(subnet),
            "subnet6": _subnet(subnet6) if subnet6 else None,
            "gateway": Word(network.gateway or ""),
            "gateway6": Word(network.gateway6 or ""),
            "nameservers": tuple(map(Word, network.nameservers)),
            "lease": int(network.lease_time),
            "pools": pools(self.farm),
        }

    def login(self) -> dict[str, Any]:
        """How ssh logs in."""
        ssh = self.farm.ssh
        return {"user": Word(ssh.user), "key": str(resolve(self.farm, ssh.key)) if ssh.key else ""}


def render(
    farm: Farm,
    allocations: Mapping[str, Allocation],
    *,
    serials: Mapping[str, int] | None = None,
    services: Collection[str] | None = None,
) -> tuple[Document, ...]:
    """All documents. TemplateFailed, Conflict."""
    return Renderer(farm, allocations, serials=serials).documents(services)


def part_of(farm: Farm, vms: Mapping[str, Any]) -> Farm:
    """The farm with only these of its VMs."""
    return replace(farm, vms=dict(vms)).at(farm.path)


def host_files(
    farm: Farm,
    allocations: Mapping[str, Allocation],
    vms: Collection[str],
    services: Collection[Service],
    known: Collection[str],
) -> tuple[tuple[Document, ...], set[str]]:
    """Of services that spread their hosts over files: the files that have these VMs in them, or had, and
    the configurations that include them: documents, and all paths that the former may have. ``known``:
    paths of all files that are there."""
    shards = {_shard(vm) for vm in vms}
    names = [vm for vm in farm.vms if crc32(vm.encode()) % SHARDS in shards]  # _shard, of thousands
    some = {vm: farm.vms[vm] for vm in names if vm in allocations}
    places = [place for service in services for place in service.host_files(farm)]
    paths = {f"{begin}{shard:02}{end}" for begin, end in places for shard in shards}
    configs = {path for service in services for path in service.including}
    others = {path for path in known if path not in paths}
    renderer = Renderer(part_of(farm, some), allocations, others=others)
    documents = renderer.documents([service.NAME for service in services])
    return tuple(d for d in documents if d.path in paths or d.path in configs), paths


def _shard(vm: str) -> int:
    return crc32(vm.encode()) % SHARDS


def sharded(rows: Iterable[VmRow]) -> Iterator[tuple[str, list[VmRow]]]:
    """The hosts of each file, and the number in its name: one VM more rewrites a small one."""
    shards: dict[int, list[VmRow]] = {}
    for row in rows:
        shards.setdefault(_shard(row.vm), []).append(row)
    for shard, some in sorted(shards.items()):
        yield f"{shard:02}", some
