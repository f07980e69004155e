"""Every file of a farm's network services, from the model alone: no clock, no disk, no daemon."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import Any
from zlib import crc32

from inventory.model import Farm
from inventory.reading import resolve
from provision.allocate import Allocation
from provision.network.document import Document
from provision.network.templating import Templates
from provision.network.view import View, VmRow, Word, Zone, pools, view

SHARDS = 64
"""Files that dnsmasq's and Kea's hosts are spread over: one VM more rewrites a small one."""

_ZONE = ("; ", "")
_SLASHES = ("// ", "")
_XML = ("<!-- ", " -->")


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


@dataclass(frozen=True, slots=True)
class ZoneFile:
    """A zone of ours: what its templates see as ``zone``."""

    name: Word
    path: Word
    serial: int
    template: str
    records: tuple[tuple[Word, Word], ...] = ()


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
        self._others = others
        self._serials = dict(serials or {})
        self._templates = Templates(Path(own) if own else None)

    @cached_property
    def view(self) -> View:
        """Made when something is rendered that has VMs in it."""
        return view(self.farm, self._allocations)

    def documents(self, services: Collection[str] | None = None) -> tuple[Document, ...]:
        """Of the services the farm uses, or of those among them, in the order they are applied."""
        used = [name for name in self.farm.services.used if services is None or name in services]
        return tuple(document for name in used for document in _RENDERERS[name](self))

    def zones(self) -> tuple[ZoneFile, ...]:
        """BIND's, forward first."""
        bind = self.farm.services.bind
        if bind is None:
            return ()
        name = Word(bind.zone or self.farm.network.domain or "")
        found = [ZoneFile(name, Word(f"{bind.directory}/db.{name}"), self._serial(name), "zone")]
        for zone in self.view.reverse if bind.reverse else ():
            path = Word(f"{bind.directory}/{zone.file}")
            found.append(ZoneFile(zone.name, path, self._serial(zone.name), "reverse", zone.records))
        return tuple(found)

    def zone(self, zone: ZoneFile, serial: int) -> Document:
        """One zone's file, with this serial number."""
        bind = self.farm.services.bind
        assert bind is not None
        numbered = ZoneFile(zone.name, zone.path, serial, zone.template, zone.records)
        text = self._render(zone.template, bind, zone=numbered, **self._authority())
        return Document("bind", zone.path, text, 0o644, bind.own, _ZONE, zone.name, serial, bind.dynamic)

    def _serial(self, zone: str) -> int:
        return self._serials.get(zone, 1)

    def _render(self, template: str, service: object, **values: object) -> str:
        return self._templates.render(template, net=self.view, service=service, **values)

    def _authority(self) -> dict[str, Any]:
        """Who answers for the zones."""
        bind, network = self.farm.services.bind, self.farm.network
        assert bind is not None
        zone = bind.zone or network.domain or ""
        nameserver = bind.nameserver or f"ns.{zone}"
        named = any(nameserver in row.full for row in self.view.vms)
        inside = nameserver.endswith(f".{zone}")
        address = bind.address
        if address.is_loopback:
            address = next(iter((*network.nameservers, network.gateway or address)))
        return {
            "ttl": int(bind.ttl),
            "nameserver": nameserver,
            "nameservers": (nameserver, *bind.secondaries),
            "contact": bind.contact or f"hostmaster.{zone}",
            "glue": Word(address) if inside and not named else "",
        }

    def _dhcp(self) -> dict[str, Any]:
        """What DHCP servers tell besides addresses."""
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

    def _login(self) -> dict[str, Any]:
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


def _bind(r: Renderer) -> Iterator[Document]:
    bind = r.farm.services.bind
    assert bind is not None
    zones = r.zones()
    if bind.own == "file":
        text = r._render("named", bind, zones=zones)
        yield Document("bind", bind.config, text, comment=_SLASHES)
    for zone in zones:
        yield r.zone(zone, zone.serial)
    for classless in r.view.reverse:
        if bind.parent and classless.parent:
            yield _parent(r, classless)


def _parent(r: Renderer, zone: Zone) -> Document:
    bind = r.farm.services.bind
    assert bind is not None and bind.parent is not None
    text = r._render("parent", bind, zone=zone, **r._authority())
    serial = r._serial(zone.parent)
    return Document("bind", bind.parent, text, 0o644, "block", _ZONE, zone.parent, serial)


def _dhcpd(r: Renderer) -> Iterator[Document]:
    service = r.farm.services.dhcpd
    assert service is not None
    yield Document("dhcpd", service.config, r._render("dhcpd", service, **r._dhcp()), own=service.own)


def _kea(r: Renderer) -> Iterator[Document]:
    service, network = r.farm.services.kea, r.farm.network
    assert service is not None
    interfaces = list(service.interfaces) or [network.bridge or "*"]
    servers = ", ".join(map(str, network.nameservers))
    options = {"routers": str(network.gateway or ""), "domain-name-servers": servers}
    options["domain-name"] = network.domain or ""
    values: dict[str, Any] = {
        **r._dhcp(),
        "interfaces": interfaces,
        "options4": [{"name": name, "data": data} for name, data in options.items() if data],
        "options6": [{"name": "domain-search", "data": network.domain}] if network.domain else [],
    }
    rows = r.view.dhcp
    yield from _kea_files(r, "4", service.config4, rows, values)
    if network.subnet6:
        rows = tuple(row for row in rows if row.address6)
        yield from _kea_files(r, "6", service.config6, rows, values)


def _kea_files(
    r: Renderer, kind: str, config: str, rows: tuple[VmRow, ...], values: Mapping[str, Any]
) -> Iterator[Document]:
    """The hosts first: a server that reads the configuration finds all that it includes."""
    service = r.farm.services.kea
    assert service is not None
    begin = kea_path(r.farm, kind)
    included = {path for path in r._others if path.startswith(begin)}
    for shard, some in sorted(_sharded(rows).items()):
        path = f"{begin}{shard:02}.json"
        included.add(path)
        text = r._render(f"kea{kind}-hosts", service, vms=some)
        yield Document("kea", path, text, comment=_SLASHES)
    text = r._render(f"kea{kind}", service, hosts=tuple(map(Word, sorted(included))), **values)
    yield Document("kea", config, text, comment=_SLASHES)


def kea_path(farm: Farm, kind: str) -> str:
    """What the paths of its files of hosts begin with."""
    assert farm.services.kea is not None
    return f"{farm.services.kea.hosts}/{farm.farm}-dhcp{kind}-"


def part_of(farm: Farm, vms: Mapping[str, Any]) -> Farm:
    """The farm with these of its VMs alone."""
    return replace(farm, vms=dict(vms)).at(farm.path)


APART = frozenset(("dnsmasq", "kea"))
"""Services whose hosts are spread over files."""


def host_files(
    farm: Farm,
    allocations: Mapping[str, Allocation],
    vms: Collection[str],
    services: Collection[str],
    known: Collection[str],
) -> tuple[tuple[Document, ...], set[str]]:
    """The files of hosts, of those of these services that are ``APART``, which have these VMs in them,
    or had, and the configurations that include them: documents, and all paths that the former may
    have. ``known``: paths of all files that are there."""
    shards = {_shard(vm) for vm in vms}
    names = [vm for vm in farm.vms if crc32(vm.encode()) % SHARDS in shards]  # _shard, of thousands
    some = {vm: farm.vms[vm] for vm in names if vm in allocations}
    paths = set()
    configs = set()
    if "dnsmasq" in services and (dnsmasq := farm.services.dnsmasq):
        begins = [f"{dnsmasq.hosts}/{kind}/{farm.farm}-" for kind in ("dhcp", "dns")]
        paths |= {f"{begin}{shard:02}" for begin in begins for shard in shards}
    if "kea" in services and (kea := farm.services.kea):
        begins = [kea_path(farm, kind) for kind in ("4", "6")]
        paths |= {f"{begin}{shard:02}.json" for begin in begins for shard in shards}
        configs = {kea.config4, kea.config6}
    others = {path for path in known if path not in paths}
    renderer = Renderer(part_of(farm, some), allocations, others=others)
    documents = renderer.documents(APART & {*services})
    return tuple(d for d in documents if d.path in paths or d.path in configs), paths


def _shard(vm: str) -> int:
    return crc32(vm.encode()) % SHARDS


def _dnsmasq(r: Renderer) -> Iterator[Document]:
    service = r.farm.services.dnsmasq
    assert service is not None
    interface = service.interface or r.farm.network.bridge or ""
    text = r._render("dnsmasq", service, interface=interface, **r._dhcp())
    yield Document("dnsmasq", service.config, text)
    kinds = [("dhcp", r.view.dhcp)]
    if service.dns:
        kinds.append(("dns", tuple(row for row in r.view.vms if row.address)))
    for kind, rows in kinds:
        for shard, some in sorted(_sharded(rows).items()):
            path = f"{service.hosts}/{kind}/{r.view.farm}-{shard:02}"
            yield Document("dnsmasq", path, r._render(f"dnsmasq-{kind}", service, vms=some))


def _sharded(rows: tuple[VmRow, ...]) -> dict[int, list[VmRow]]:
    shards: dict[int, list[VmRow]] = {}
    for row in rows:
        shards.setdefault(_shard(row.vm), []).append(row)
    return shards


def _hosts(r: Renderer) -> Iterator[Document]:
    service = r.farm.services.hosts
    assert service is not None
    yield Document("hosts", service.config, r._render("hosts", service), own="block")


def _ssh_config(r: Renderer) -> Iterator[Document]:
    service = r.farm.services.ssh_config
    assert service is not None
    text = r._render("ssh_config", service, **r._login())
    yield Document("ssh_config", service.config, text, own=service.own)


def _nginx(r: Renderer) -> Iterator[Document]:
    service, proxies = r.farm.services.nginx, r.view.proxies
    assert service is not None
    long_names = len(proxies) > 256 or any(len(proxy.name) > 40 for proxy in proxies)
    yield Document("nginx", service.config, r._render("nginx", service, long_names=long_names))


def _haproxy(r: Renderer) -> Iterator[Document]:
    service = r.farm.services.haproxy
    assert service is not None
    certificates = tuple(dict.fromkeys(p.certificate for p in r.view.proxies if p.certificate))
    yield Document("haproxy", service.map, r._render("haproxy-map", service))
    text = r._render("haproxy", service, certificates=certificates)
    yield Document("haproxy", service.config, text, own=service.own)


def _nftables(r: Renderer) -> Iterator[Document]:
    service = r.farm.services.nftables
    assert service is not None
    text = r._render("nftables", service, address=_word(service.address))
    yield Document("nftables", service.config, text)


def _shorewall(r: Renderer) -> Iterator[Document]:
    service = r.farm.services.shorewall
    assert service is not None
    for name in ("params", "rules"):
        text = r._render(f"shorewall-{name}", service, address=_word(service.address))
        yield Document("shorewall", f"{service.directory}/{name}", text, 0o640, "block")


def _libvirt(r: Renderer) -> Iterator[Document]:
    service = r.farm.services.libvirt
    assert service is not None
    text = r._render("libvirt", service, network=r.farm.network.network, **r._dhcp())
    yield Document("libvirt", service.config, text, comment=_XML)


def _ansible(r: Renderer) -> Iterator[Document]:
    service = r.farm.services.ansible
    assert service is not None
    yield Document("ansible", service.config, r._render("ansible", service, **r._login()))


def _word(address: IPv4Address | None) -> Word:
    return Word(address or "")


_RENDERERS: Mapping[str, Callable[[Renderer], Iterator[Document]]] = {
    "bind": _bind,
    "dhcpd": _dhcpd,
    "kea": _kea,
    "dnsmasq": _dnsmasq,
    "hosts": _hosts,
    "ssh_config": _ssh_config,
    "nginx": _nginx,
    "haproxy": _haproxy,
    "nftables": _nftables,
    "shorewall": _shorewall,
    "libvirt": _libvirt,
    "ansible": _ansible,
}
