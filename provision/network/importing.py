"""network-import: a farm file from what an admin has: a zone, and a dhcpd.conf.

A host statement with a MAC is a VM of its name; its address is there or, by name, in the zone, whose
further names of that address are its aliases. What a farm file doesn't say is named in its comments,
with its line: what goes with the lines of these VMs that the admin takes out, and what stays where it
is. Nothing is changed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from itertools import islice
from pathlib import Path

from host.files import write_atomic
from inventory.base import quote
from inventory.errors import Conflict, NotFound, UsageError, some
from inventory.reading import MAX_BYTES
from inventory.values import MAX_TTL, check_config_path, check_hostname, check_label, check_mac
from provision.network.dhcpd_source import DhcpdStatement, Scope, read_statements, walk
from provision.network.imported_network import ImportedNetwork, merged, span
from provision.network.services.bind import Bind
from provision.network.sources import Left, SourceLine, Sources, one_line
from provision.network.zone_source import ZoneNames, ZoneRecord, read_zone

_MAX_HOSTS = 20_000
_MOST = 64
"""Addresses of a host or a name that are looked at: enough to find the one in the subnet."""
_AROUND_HOSTS = {"group", "subnet", "shared-network", "pool"}


@dataclass(frozen=True, slots=True)
class Imported:
    """``text``: the farm file. ``left``: what it doesn't say, in words, each with its file and line."""

    text: str
    vms: tuple[str, ...]
    left: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {"text": self.text, "vms": list(self.vms), "left": list(self.left)}


def network_import(
    zone: Path, dhcpd: Path, *, origin: str = "", name: str = "farm", out: Path | None = None
) -> Imported:
    """Read both. ``origin`` "": what follows ``db.`` in the zone file's name. ``out``: written there.

    Errors: NotFound, InventoryError (with the line) and WrongState of what can't be read, UsageError (no
    origin, or a name that can't be), Conflict (``out`` is there)."""
    if not origin:
        if not zone.name.startswith("db.") or len(zone.name) < 4:
            raise UsageError(
                f"{one_line(str(zone))}: which zone is this?",
                remedy="--origin NAME, such as --origin farm",
            )
        origin = zone.name[3:]
    origin = origin.strip(".").lower()
    for flag, value, check in (("origin", origin, check_hostname), ("name", name, check_label)):
        try:
            check(value)
        except ValueError as error:
            raise UsageError(f"--{flag}: {error}", remedy=f"give another --{flag}") from None
    if out is not None and out.exists():
        raise Conflict(f"{out} is there already", remedy="give --out another name")
    sources = Sources()
    names = ZoneNames(origin, read_zone(sources, zone, origin))
    maker = _FarmMaker(names, read_statements(sources, dhcpd), name, zone, dhcpd)
    maker.left += sources.missing
    found = maker.farm_file(list(sources.files))
    if out is not None:
        write_atomic(out, found.text.encode())
    return found


class _NoVm(Exception):
    """Why a host is no VM of the farm, in words."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A host statement with a MAC and addresses. ``host``: its name, in lower case. ``full``: what the
    zone calls it, "" if nothing. ``used``: the statements in it that say so."""

    statement: DhcpdStatement
    scope: Scope
    host: str
    used: tuple[DhcpdStatement, ...]
    mac: str
    addresses: tuple[IPv4Address, ...]
    full: str


@dataclass(slots=True)
class _ImportedVm:
    """``lines``: what is said of it in the admin's files."""

    mac: str
    address: IPv4Address
    full: str
    lines: list[SourceLine]
    aliases: list[str] = field(default_factory=list)


class _FarmMaker:
    def __init__(
        self,
        names: ZoneNames,
        statements: Sequence[DhcpdStatement],
        farm: str,
        zone: Path,
        dhcpd: Path,
    ) -> None:
        self.left: list[Left] = []
        self._names = names
        self._farm = farm
        self._zone, self._dhcpd = zone, dhcpd
        self._statements = list(walk(statements))
        self._known = {IPv4Address(text) for text in names.names}
        """Addresses that the zone or a host has."""
        self._counts = Counter(record.name for record in names.records)
        self._by_address: dict[str, dict[str, str]] = {}
        self._vms: dict[str, _ImportedVm] = {}
        self._owners: dict[object, str] = {}
        """By MAC, address and full name: the VM that has it."""
        self._said: set[int] = set()
        """Records of the zone that the farm file says too, by id()."""
        self._groups: set[int] = set()
        """Groups that VMs were in, by id(): a block of farmhand's is outside of them."""

    def farm_file(self, files: Sequence[Path]) -> Imported:
        """``files``: all that were read, in their order."""
        candidates = self._candidates()
        hosts = [(c.scope, c.addresses[0]) for c in candidates]
        network = ImportedNetwork(self._statements, hosts, self._addresses_of)
        self.left += network.left
        self._take_hosts(candidates, network)
        self._take_names()
        ttl = self._ttl()
        self._leave_records(ttl)
        self._leave_statements(network)
        order = {path: number for number, path in enumerate(files)}
        self.left.sort(key=lambda left: (order[left.line.path], left.line.line))
        text = "".join(f"{line}\n" for line in self._lines(network, files, ttl))
        if len(text.encode()) > MAX_BYTES:
            words = f"the farm file would be larger than {MAX_BYTES >> 20} MiB: import parts of it"
            raise SourceLine(self._zone, 1).wrong(words)
        return Imported(text, tuple(self._vms), tuple(map(str, self.left)))

    # ---- Hosts

    def _candidates(self) -> list[_Candidate]:
        hosts = [(statement, scope) for statement, scope in self._statements if statement.kind == "host"]
        if len(hosts) > _MAX_HOSTS:
            raise hosts[_MAX_HOSTS][0].line.wrong(f"with this there are more than {_MAX_HOSTS} hosts")
        labels = {_host_name(statement).partition(".")[0] for statement, _ in hosts}
        found = []
        for statement, scope in hosts:
            host = _host_name(statement)
            try:
                hardware, fixed = _identity(statement)
                words = fixed.words[1:] if fixed else ()
                addresses, full = self._resolved(words or (host,), named=not words)
                self._known.update(addresses)
                if hardware is None:
                    raise _NoVm("no MAC")
                full = full or self._named(host, addresses, labels)
                used = (hardware, fixed) if fixed and len(words) == 1 else (hardware,)
                found.append(_Candidate(statement, scope, host, used, _mac(hardware), addresses, full))
            except (_NoVm, ValueError) as error:
                self._leave_host(statement, error)
        if not found:
            why = f": {self.left[-1]}" if self.left else ""
            raise NotFound(
                f"{one_line(str(self._dhcpd))}: no host with a MAC and an address is in it{why}",
                remedy="give a dhcpd.conf with host statements",
            )
        return found

    def _leave_host(self, statement: DhcpdStatement, why: Exception) -> None:
        self.left.append(Left(statement.line, f"{one_line(statement.text, 100)}: {why}"))

    def _resolved(
        self, words: Sequence[str], *, named: bool = False
    ) -> tuple[tuple[IPv4Address, ...], str]:
        """The addresses of a fixed-address statement, and the first name in it. ``named``: they can only
        be names."""
        found: dict[IPv4Address, None] = {}
        full = ""
        for name, address in islice(self._looked_up(words, named), _MOST):
            full = full or name
            found[IPv4Address(address)] = None
        if not found:
            raise _NoVm(f"no address of {quote(some(words))} is in the zone")
        return tuple(found), full

    def _looked_up(self, words: Iterable[str], named: bool) -> Iterator[tuple[str, str]]:
        """Names in the zone, "" for an address that is given, and addresses."""
        for word in words:
            if not named and re.fullmatch(r"[0-9.]+", word):
                yield "", word
                continue
            name = self._names.find(word.lower().rstrip("."))
            yield from ((name, record.value) for record in self._names.addresses.get(name, ()))

    def _addresses_of(self, word: str) -> tuple[IPv4Address, ...]:
        try:
            return self._resolved([word])[0]
        except (_NoVm, ValueError):
            return ()

    def _named(self, host: str, addresses: Iterable[IPv4Address], hosts: set[str]) -> str:
        """What the zone calls the host with these addresses: the name that is its own, or else the first
        one that isn't another host's; "" for none."""
        label, apex = host.partition(".")[0], self._names.origin
        for address in addresses:
            called = self._called(str(address), hosts)
            for own in (host, f"{host}.{apex}", f"{label}.", ""):
                if own in called:
                    return called[own]
        return ""

    def _called(self, address: str, hosts: set[str]) -> dict[str, str]:
        """The zone's names of an address: each by itself, by its first label with a dot, and by "" the
        first one that isn't another host's, the zone's own last."""
        if (known := self._by_address.get(address)) is None:
            known = self._by_address[address] = {}
            names = [r.name for r in self._names.names.get(address, ()) if self._fits(r.name)]
            for name in sorted(names, key=lambda name: name == self._names.origin):
                label = name.partition(".")[0]
                known[name] = name
                known.setdefault(f"{label}.", name)
                if label not in hosts:
                    known.setdefault("", name)
        return known

    def _fits(self, name: str) -> bool:
        """Whether a farm file can say it, as the full name of a VM."""
        try:
            check_hostname(name)
        except ValueError:
            return False
        return "." in name and self._names.has(name)

    def _take_hosts(self, candidates: Sequence[_Candidate], network: ImportedNetwork) -> None:
        origin = self._names.origin
        parents = (candidate.full.partition(".")[2] for candidate in candidates)
        domains = Counter(parent for parent in parents if self._names.has(parent))
        self._domain = domains.most_common(1)[0][0] if domains else origin
        for candidate in candidates:
            try:
                self._take_host(candidate, network)
            except (_NoVm, ValueError) as error:
                self._leave_host(candidate.statement, error)
        if not self._vms:
            raise NotFound(
                f"{one_line(str(self._dhcpd))}: none of its hosts can be a VM: {self.left[-1]}",
                remedy="put that right, and import again",
            )

    def _take_host(self, candidate: _Candidate, network: ImportedNetwork) -> None:
        host, statement = candidate.host, candidate.statement
        inside = [address for address in candidate.addresses if address in network.subnet]
        address = self._usable(inside[0] if inside else candidate.addresses[0], network)
        label = host.partition(".")[0]
        try:
            check_label(label)
        except ValueError:
            label = candidate.full.partition(".")[0]
            check_label(label)
        full = candidate.full or f"{label}.{self._domain}"
        if not self._fits(full):
            raise _NoVm(f"{one_line(full, 100)} can't be the name of a VM in {self._names.origin}")
        if not candidate.full and self._names.leads(full):
            raise _NoVm(f"{address} has no name in the zone, and {full} leads elsewhere")
        if len(f"{self._farm}-{label}") > 63:
            raise _NoVm(f"{self._farm}-{label}, farm and VM name together, is longer than 63")
        if label in self._vms:
            raise _NoVm(f"VM {label} is there already ({self._vms[label].lines[0]})")
        for what in (candidate.mac, address, full):
            if what in self._owners:
                raise _NoVm(f"{what} is taken: VM {self._owners[what]} has it")
        self._owners |= dict.fromkeys((candidate.mac, address, full), label)
        vm = self._vms[label] = _ImportedVm(candidate.mac, address, full, [statement.line])
        self._groups.update(id(outer) for outer in candidate.scope if outer.kind == "group")
        notes = []
        if _declared_name(statement) not in (label, full, f"{label}.{self._domain}"):
            notes.append(f"it is VM {label} here, {full}")
        if not candidate.full:
            notes.append(f"its address has no name in the zone: it gets {full}")
        if more := [str(other) for other in candidate.addresses if other != address]:
            notes.append(f"a VM has one address, {address}, and not {some(more)}")
        notes += _options(candidate, vm, network, self._domain)
        if notes:
            words = f"{one_line(statement.text, 100)}: {'; '.join(notes)}"
            self.left.append(Left(statement.line, words, gone=True))

    def _usable(self, address: IPv4Address, network: ImportedNetwork) -> IPv4Address:
        subnet = network.subnet
        if address not in subnet:
            raise _NoVm(f"{address} is outside of {subnet}: a farm has one subnet")
        if address in (subnet.network_address, subnet.broadcast_address):
            raise _NoVm(f"{address} is no machine's address in {subnet}")
        if address == network.gateway:
            raise _NoVm(f"{address} is the gateway's address")
        return address

    # ---- Names

    def _take_names(self) -> None:
        """Further names of the VMs' addresses, then CNAME records that lead to any of these: where an
        address is all that the name has, for an alias has no more."""
        for label, vm in self._vms.items():
            for record in self._names.names.get(str(vm.address), ()):
                self._take_name(record, label)
        for label, vm in self._vms.items():
            for name in (vm.full, *vm.aliases):
                for record in () if self._has_more(name) else self._names.aliases.get(name, ()):
                    self._take_name(record, label)

    def _has_more(self, name: str) -> bool:
        """Than an address, in the zone."""
        return self._counts[name] > (name in self._names.addresses)

    def _take_name(self, record: ZoneRecord, label: str) -> None:
        vm = self._vms[label]
        if record.name not in self._owners and self._fits(record.name):
            self._owners[record.name] = label
            vm.aliases.append(record.name)
        if self._owners.get(record.name) == label and record.written != "generated":
            vm.lines.append(record.line)
            self._said.add(id(record))

    def _ttl(self) -> int:
        """That of most of the VMs' records."""
        records = (record for record in self._names.records if id(record) in self._said)
        counts = Counter(record.ttl for record in records if 0 < record.ttl <= MAX_TTL)
        return counts.most_common(1)[0][0] if counts else int(Bind.ttl)

    def _leave_records(self, ttl: int) -> None:
        """All but the VMs', and the zone's own SOA and NS; those of a $GENERATE line at once."""
        left: dict[SourceLine, list[ZoneRecord]] = defaultdict(list)
        named: ZoneRecord | None = None
        for record in self._names.records:
            if record.written == "named":
                named = record
            if id(record) in self._said:
                if record.ttl != ttl:
                    words = f"{record.name}: its TTL is {ttl}, as most have it, and not {record.ttl}"
                    self.left.append(Left(record.line, words, gone=True))
                continue
            if record.name != self._names.origin or record.kind not in ("SOA", "NS"):
                left[record.line].append(record)
            if record.written == "unnamed" and named and id(named) in self._said:
                words = (
                    f"{record.kind} has its name, {record.name}, from line {named.line.line}, which is"
                )
                self.left.append(Left(record.line, f"{words} to be taken out: write it here first"))
        for line, records in left.items():
            first = records[0]
            words = f"{first.name} {first.kind} {one_line(first.value, 200)}{self._why_left(first)}"
            if len(records) > 1:
                words = f"{len(records)} records, the last of {records[-1].name}, the first {words}"
            self.left.append(Left(line, words))

    def _why_left(self, record: ZoneRecord) -> str:
        if not self._names.has(record.name):
            return f": outside of {self._names.origin}"
        if record.kind == "CNAME":
            owner = self._owners.get(record.value) if self._has_more(record.value) else None
            return f": that has more than VM {owner}'s address" if owner else ""
        if record.kind != "A" or not (owner := self._owners.get(IPv4Address(record.value))):
            return ""
        other = self._owners.get(record.name)
        if other is None:
            return f": VM {owner}'s address, but no name that a farm file can say"
        return "" if other == owner else f": the name is VM {other}'s, and the address VM {owner}'s"

    # ---- Statements

    def _leave_statements(self, network: ImportedNetwork) -> None:
        """All but hosts and what is said. Of blocks that no hosts are in, the head alone: secrets may be
        in them."""
        for statement, scope in self._statements:
            if statement.kind == "host" or id(statement) in network.said or not statement.words:
                continue
            if any(outer.kind not in _AROUND_HOSTS for outer in scope):
                continue
            if statement.inner is not None and statement.words == ("group",):
                continue
            where = "".join(f" (in {one_line(outer.text, 60)})" for outer in reversed(scope))
            gone = any(id(outer) in self._groups for outer in scope)
            self.left.append(Left(statement.line, f"{statement.head}{where}", gone))

    # ---- Writing

    def _lines(self, network: ImportedNetwork, files: Sequence[Path], ttl: int) -> Iterator[str]:
        yield f"# Made by network-import from {some([one_line(str(path)) for path in files], 24)}."
        yield "# Look at hosts, templates and bridge: those files don't say. Then: network-apply --plan."
        for gone, words in (
            (True, "Said of these VMs there, but not here: it goes with the lines that you take out."),
            (False, "Not taken over, and left where it is:"),
        ):
            if left := [left for left in self.left if left.gone is gone]:
                yield from ("#", f"# {words}", *(f"#   {one}" for one in left))
        yield from ("", f"farm: {self._farm}", "", "hosts:", "  here:", "    driver: kvm")
        yield from ("    uri: qemu:///system", "")
        yield from self._network_lines(network)
        yield from self._service_lines(ttl)
        yield from ("templates:", "  base:", "    build: debian-12", "", "vms:")
        for label, vm in self._vms.items():
            yield from self._vm_lines(label, vm)

    def _network_lines(self, network: ImportedNetwork) -> Iterator[str]:
        yield from ("network:", "  mode: bridge", "  bridge: br0")
        guess = "  # a guess: no subnet statement has it" if network.guessed else ""
        yield f"  subnet: {network.subnet}{guess}"
        yield from (f"  {key}: {value}" for key, value in network.values.items())
        addresses = {vm.address for vm in self._vms.values()}
        others = [int(one) for one in self._known - addresses if one in network.subnet]
        if reserved := [span(*pair) for pair in merged((number, number) for number in others)]:
            yield f"  reserved: [{', '.join(reserved)}]  # others' in your files"
        if pools := list(network.pools(addresses)):
            yield f"  pool: [{', '.join(pools)}]"
        yield from (f"  domain: {self._domain}", "  addressing: dhcp", "")

    def _service_lines(self, ttl: int) -> Iterator[str]:
        yield "# Blocks in the files as they are. The lines of these VMs that you wrote, named with each"
        yield "# VM, are then there twice: take yours out before the first network-apply."
        origin = self._names.origin
        yield from ("services:", "  bind:")
        if self._domain != origin:
            yield f"    zone: {origin}"
        if self._zone.name == f"db.{origin}":
            yield from _path_lines("directory", self._zone.parent.resolve())
        else:
            yield f"    # directory: where your zone file is; it has to be called db.{origin} there"
        if ttl != Bind.ttl:
            yield f"    ttl: {ttl}"
        yield from ("    own: block", "    reverse: no", "  dhcpd:")
        yield from _path_lines("config", self._dhcpd.parent.resolve() / self._dhcpd.name)
        yield from ("    own: block", "")

    def _vm_lines(self, label: str, vm: _ImportedVm) -> Iterator[str]:
        yield f"  {label}:"
        yield f"    # your lines: {one_line(_places(vm.lines), 4000)}"
        yield from (f"    mac: {vm.mac}", f"    address: {vm.address}")
        if vm.full != f"{label}.{self._domain}" or label.isdigit():
            yield f"    hostname: {vm.full}"
        if vm.aliases:
            yield f"    aliases: [{', '.join(vm.aliases)}]"


def _declared_name(statement: DhcpdStatement) -> str:
    return " ".join(statement.words[1:])


def _host_name(statement: DhcpdStatement) -> str:
    return _declared_name(statement).lower().rstrip(".")


def _identity(statement: DhcpdStatement) -> tuple[DhcpdStatement | None, DhcpdStatement | None]:
    """The statements of its MAC and of its addresses, the first of each."""
    hardware = fixed = None
    for inner in statement.inner or ():
        match inner.words:
            case ("hardware", kind, _) if kind.lower() == "ethernet":
                hardware = hardware or inner
            case ("fixed-address", _, *_):
                fixed = fixed or inner
    return hardware, fixed


def _mac(hardware: DhcpdStatement) -> str:
    return check_mac(":".join(part.rjust(2, "0") for part in hardware.words[2].split(":")))


def _options(
    candidate: _Candidate, vm: _ImportedVm, network: ImportedNetwork, domain: str
) -> Iterator[str]:
    """What a host statement says beside MAC and address, and the farm file doesn't."""
    same = {
        ("option", "host-name"): (vm.full, vm.full.partition(".")[0]),
        ("option", "subnet-mask"): (str(network.subnet.netmask),),
        ("option", "routers"): (str(network.gateway),),
        ("option", "domain-name"): (domain,),
    }
    used = {id(statement) for statement in candidate.used}
    for inner in candidate.statement.inner or ():
        said = len(inner.words) == 3 and inner.words[2] in same.get(inner.words[:2], ())
        if id(inner) not in used and inner.words and not said:
            yield inner.head


def _path_lines(key: str, path: Path) -> Iterator[str]:
    try:
        yield f"    {key}: {check_config_path(str(path))}"
    except ValueError as error:
        yield f"    # {key}: {one_line(str(error))}"


def _places(lines: Iterable[SourceLine]) -> str:
    """FILE:LINE, LINE; FILE:LINE."""
    found: dict[Path, dict[str, None]] = defaultdict(dict)
    for line in lines:
        found[line.path][str(line.line)] = None
    return "; ".join(f"{path}:{', '.join(numbers)}" for path, numbers in found.items())
