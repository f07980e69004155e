"""What the documents of a farm's network services are made with: its words, its VMs, its templates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Protocol

from inventory.model import Farm
from inventory.reading import resolve
from provision.allocate import Allocation
from provision.network.templating import Templates, Word, never
from provision.network.view import View, pools, view


@dataclass(frozen=True, slots=True)
class SubnetWords:
    """A subnet's words."""

    address: Word
    mask: Word
    length: int
    cidr: Word


def _subnet(subnet: IPv4Network | IPv6Network) -> SubnetWords:
    address, mask = Word(subnet.network_address), Word(subnet.netmask)
    return SubnetWords(address, mask, subnet.prefixlen, Word(subnet))


class Quoting(Protocol):
    """What a service says of its templates."""

    @property
    def STRINGS(self) -> Mapping[str, Callable[[str], Word]]:  # noqa: N802 - as services have it
        """How its formats quote a text, by the template; others have no quoted strings."""


class Renderer:
    """What a service makes its documents with, of one farm. ``serials``: the serial number that each
    zone's file should hold. ``others``: paths of files of hosts that are there too, for VMs that are
    left out here."""

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

    def serial(self, zone: str) -> int:
        """The number that the zone's file should hold."""
        return self._serials.get(zone, 1)

    def render(self, template: str, service: Quoting, **values: object) -> str:
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
        return {"user": Word(ssh.user), "key": str(resolve(self.farm.path, ssh.key)) if ssh.key else ""}
