"""network-import: a farm file from what an admin has: a zone, and a dhcpd.conf.

A host statement with a MAC is a VM; its address is there or, by name, in the zone. All else is left
where it is, and named in the new file's comments. Nothing is changed: the lines that farmhand then
writes itself are for the admin to take out.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from host.documents import Malformed, read_file
from host.files import file_error, write_atomic
from inventory.errors import Conflict, InventoryError, NotFound, Problem, UsageError

_TOKEN = re.compile(r'\s+|#[^\n]*|"(?:[^"\\]|\\[\s\S])*(?:"|\\?\Z)|[{};,]|[^\s{};,"#]+')
"""A text that isn't closed ends with the file: each character is looked at once."""
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NAME = re.compile(rf"{_LABEL.pattern}(?:\.{_LABEL.pattern})*")
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_GENERATED = re.compile(r"^\$GENERATE\s+(\d+)-(\d+)(?:/(\d+))?\b(.*)$", re.MULTILINE | re.IGNORECASE)
_MOST = 2**16
"""Records that $GENERATE may make: as many as a /16 has addresses. And how wide their numbers may be."""
_PLAIN = re.compile(r"/[A-Za-z0-9._/-]*")
_DEEPEST = 50  # braces within braces


@dataclass(frozen=True, slots=True)
class Imported:
    """``text``: the farm file. ``left``: what was not taken over, in words."""

    text: str
    vms: tuple[str, ...]
    left: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {"text": self.text, "vms": list(self.vms), "left": list(self.left)}


@dataclass(frozen=True, slots=True)
class _HostStatement:
    """A host statement. ``address``: as written, a name or an address."""

    name: str
    line: int
    mac: str
    address: str


@dataclass(slots=True)
class _DhcpdConfig:
    hosts: list[_HostStatement] = field(default_factory=list)
    subnets: list[IPv4Network] = field(default_factory=list)
    routers: list[str] = field(default_factory=list)
    servers: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    other: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _ZoneRecords:
    """By full name, lower case, without the last dot."""

    addresses: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)


def network_import(
    zone: Path, dhcpd: Path, *, origin: str = "", name: str = "farm", out: Path | None = None
) -> Imported:
    """Read both. ``origin`` "": what follows ``db.`` in the zone file's name. ``out``: written there.

    Errors: NotFound and InventoryError (with the line) of what can't be read, UsageError (no origin),
    Conflict (``out`` is there)."""
    if not origin:
        if not zone.name.startswith("db.") or len(zone.name) < 4:
            raise UsageError(
                f"{zone}: which zone is this?", remedy="--origin NAME, such as --origin farm"
            )
        origin = zone.name[3:]
    if out is not None and out.exists():
        raise Conflict(f"{out} is there already", remedy="give --out another name")
    for what, text in (("--name", name), ("--origin", origin.strip(".").lower())):
        if not _NAME.fullmatch(text):
            raise UsageError(f"{what}: {text!r} is no name (RFC 1123)", remedy=f"{what} farm")
    found = _farm_file(
        _read_zone(zone, origin.strip(".").lower()), _read_dhcpd(dhcpd), zone, dhcpd, origin, name
    )
    if out is not None:
        write_atomic(out, found.text.encode())
    return found


def _text(path: Path) -> str:
    try:
        return read_file(path).decode(errors="replace")
    except FileNotFoundError:
        raise NotFound(f"no file {path}", remedy="give the path of one") from None
    except Malformed as error:
        raise UsageError(f"{path}: {error}", remedy="give the path of a text file") from error
    except OSError as error:
        raise file_error(error, path, "read") from error


# ---- Reading


def _read_zone(path: Path, origin: str) -> _ZoneRecords:
    """A whole zone, or lines of one, as an editor has them."""
    import dns.exception
    import dns.rdatatype
    import dns.zone

    text = _text(path)
    for made in _GENERATED.finditer(text):
        first, last, by, rest = made.groups()
        wide = any(len(digits) > 3 for digits in re.findall(r"\d+", rest) if "$" in rest)
        if max(map(len, (first, last, by or ""))) > 10 or wide or int(last) - int(first) > _MOST:
            line = text.count("\n", 0, made.start()) + 1
            raise InventoryError(
                [Problem(str(path), line, 1, f"$GENERATE of more than {_MOST} records")]
            )
    if "$TTL" not in text.upper():
        text = f"$TTL 3600 {text}" if text.startswith("\n") else f"$TTL 3600\n{text}"
        shift = 1
    else:
        shift = 0
    try:
        content = dns.zone.from_text(
            text, origin=f"{origin}.", relativize=False, check_origin=False, allow_include=False
        )
    except (dns.exception.DNSException, ValueError) as error:
        match = re.search(r":(\d+): (.*)", str(error)) or re.search(r"line (\d+)(.*)", str(error))
        line = max(int(match[1]) - shift - 1, 1) if match else 1  # it has read the line's end already
        why = _one_line(f"not a zone: {error}")
        raise InventoryError([Problem(str(path), line, 1, why)]) from error
    found = _ZoneRecords()
    for name, node in content.nodes.items():
        owner = name.to_text(omit_final_dot=True).lower()
        for rdataset in node.rdatasets:
            kind = dns.rdatatype.to_text(rdataset.rdtype)
            first = next(iter(rdataset)).to_text().lower()
            if kind == "A":
                found.addresses[owner] = first
            elif kind == "CNAME":
                found.aliases.setdefault(first.rstrip("."), []).append(owner)
    return found


def _read_dhcpd(path: Path) -> _DhcpdConfig:
    found = _DhcpdConfig()
    statements = _statements(_text(path), str(path))
    _collect(statements, found)
    return found


@dataclass(slots=True)
class _Statement:
    words: list[str]
    line: int
    inner: list[_Statement] | None = None


def _statements(text: str, file: str) -> list[_Statement]:
    """dhcpd.conf(5): statements end with ';', or hold more in braces."""
    top: list[_Statement] = []
    open_: list[tuple[list[_Statement], int]] = [(top, 1)]
    words: list[str] = []
    line = begun = 1
    for match in _TOKEN.finditer(text):
        part = match[0]
        if part == ";":
            if words:
                open_[-1][0].append(_Statement(words, begun))
            words = []
        elif part == "{":
            if len(open_) > _DEEPEST:
                raise InventoryError([Problem(file, line, 1, f"more than {_DEEPEST} braces are open")])
            statement = _Statement(words, begun, [])
            open_[-1][0].append(statement)
            assert statement.inner is not None
            open_.append((statement.inner, begun))
            words = []
        elif part == "}":
            if len(open_) == 1:
                raise InventoryError([Problem(file, line, 1, "a '}' without its '{'")])
            open_.pop()
            words = []
        elif not part.isspace() and not part.startswith("#"):
            if not words:
                begun = line
            words.append(part.strip('"'))
        line += part.count("\n")
    if len(open_) > 1:
        raise InventoryError([Problem(file, open_[-1][1], 1, "a '{' that is never closed")])
    return top


def _collect(statements: Sequence[_Statement], found: _DhcpdConfig) -> None:
    for statement in statements:
        words = [word for word in statement.words if word != ","]
        match words:
            case ["host", name]:
                found.hosts.append(_host(name, statement))
            case ["subnet", address, "netmask", mask]:
                with contextlib.suppress(ValueError):
                    found.subnets.append(IPv4Network(f"{address}/{mask}"))
            case ["option", "routers", first, *_]:
                found.routers.append(first)
            case ["option", "domain-name-servers", *servers]:
                found.servers += servers
            case ["range", first, last]:
                found.ranges.append(f"{first}-{last}")
            case [word, *_] if statement.inner is None:
                found.other.add(" ".join(words[:2]) if word == "option" else word)
        if statement.inner is not None and words[:1] != ["host"]:
            _collect(statement.inner, found)


def _host(name: str, statement: _Statement) -> _HostStatement:
    mac = address = ""
    for inner in statement.inner or ():
        match [word for word in inner.words if word != ","]:
            case ["hardware", "ethernet", value]:
                mac = ":".join(part.rjust(2, "0") for part in value.lower().split(":"))
            case ["fixed-address", value, *_]:
                address = value.lower().rstrip(".")
    return _HostStatement(name.lower(), statement.line, mac, address)


# ---- Writing


def _farm_file(
    zone: _ZoneRecords, dhcpd: _DhcpdConfig, zone_file: Path, dhcpd_file: Path, origin: str, name: str
) -> Imported:
    left: list[str] = []
    vms: dict[str, dict[str, str]] = {}
    by_address = {address: owner for owner, address in zone.addresses.items()}
    taken: dict[str, tuple[str, str, _HostStatement]] = {}
    for host in dhcpd.hosts:
        address, full = _resolved(host, zone, by_address, origin)
        label = full.split(".")[0]
        named = _NAME.fullmatch(full) and label not in taken
        if not _MAC.fullmatch(host.mac) or not address or not named:
            mac = _MAC.fullmatch(host.mac)
            why = "no MAC" if not mac else "no address" if not address else "its name"
            left.append(f"host {host.name} ({dhcpd_file}:{host.line}): {why}")
            continue
        taken[label] = (address, full, host)
    if not taken:
        raise NotFound(
            f"{dhcpd_file}: no host with a MAC and an address is in it",
            remedy="give a dhcpd.conf with host statements",
        )
    domains = Counter(full.partition(".")[2] or origin for _, full, _ in taken.values())
    domain = domains.most_common(1)[0][0]
    for label, (address, full, host) in taken.items():
        vms[label] = {"mac": host.mac, "address": address}
        if full != f"{label}.{domain}":
            vms[label]["hostname"] = full
        aliases = [alias for alias in zone.aliases.get(full, []) if alias != full]
        left += [f"the alias {alias} ({zone_file})" for alias in aliases if not _NAME.fullmatch(alias)]
        if aliases := [alias for alias in aliases if _NAME.fullmatch(alias)]:
            vms[label]["aliases"] = f"[{', '.join(sorted(aliases))}]"
    served = {address for address, _, _ in taken.values()}
    left += [
        f"{owner} A {address} ({zone_file})"
        for owner, address in sorted(zone.addresses.items())
        if address not in served
    ]
    if dhcpd.other:
        left.append(f"statements of {dhcpd_file}: {', '.join(sorted(dhcpd.other))}")
    lines = _lines(dhcpd, vms, domain, origin, zone_file, dhcpd_file, name, left)
    return Imported("\n".join(lines) + "\n", tuple(vms), tuple(left))


def _resolved(
    host: _HostStatement, zone: _ZoneRecords, by_address: Mapping[str, str], origin: str
) -> tuple[str, str]:
    """Address and full name."""
    if _is_address(host.address):
        named = by_address.get(host.address, host.name)
        return host.address, named if named.endswith(f".{origin}") else f"{named}.{origin}"
    for candidate in (host.address, f"{host.address}.{origin}", host.name, f"{host.name}.{origin}"):
        if candidate in zone.addresses:
            return zone.addresses[candidate], candidate
    return "", host.name


def _lines(
    dhcpd: _DhcpdConfig,
    vms: Mapping[str, Mapping[str, str]],
    domain: str,
    origin: str,
    zone_file: Path,
    dhcpd_file: Path,
    name: str,
    left: Sequence[str],
) -> Iterator[str]:
    addresses = [IPv4Address(vm["address"]) for vm in vms.values()]
    subnet = next((s for s in dhcpd.subnets if addresses[0] in s), None)
    subnet = subnet or IPv4Network(f"{addresses[0]}/24", strict=False)
    yield f"# Made by network-import from {_one_line(str(zone_file))} and {_one_line(str(dhcpd_file))}."
    yield "# Look at hosts, templates and bridge: those files don't say. Then: network-apply --plan."
    if left:
        yield "#"
        yield "# Not taken over, and left where it is:"
        yield from (f"#   {_one_line(line)}" for line in left)
    yield from ("", f"farm: {name}", "", "hosts:", "  here:", "    driver: kvm")
    yield from ("    uri: qemu:///system", "", "network:", "  mode: bridge", "  bridge: br0")
    yield f"  subnet: {subnet}"
    if routers := [r for r in dhcpd.routers if _inside(r, subnet)]:
        yield f"  gateway: {routers[0]}"
    if servers := [s for s in dict.fromkeys(dhcpd.servers) if _is_address(s)]:
        yield f"  nameservers: [{', '.join(servers)}]"
    pools = [r for r in dhcpd.ranges if all(_inside(end, subnet) for end in r.split("-"))]
    if pools:
        yield f"  pool: [{', '.join(pools)}]"
    yield from (f"  domain: {domain}", "  addressing: dhcp", "")
    yield "# Blocks in the files as they are. The lines of these VMs that you wrote there yourself are"
    yield "# then there twice: take yours out before the first network-apply."
    yield "services:"
    yield "  bind:"
    if domain != origin:
        yield f"    zone: {origin}"
    if zone_file.name == f"db.{origin}":
        yield f"    directory: {_scalar(zone_file.absolute().parent)}"
    yield from ("    own: block", "    reverse: no", "  dhcpd:")
    yield from (f"    config: {_scalar(dhcpd_file.absolute())}", "    own: block", "")
    yield from ("templates:", "  base:", "    build: debian-12", "", "vms:")
    for label, vm in vms.items():
        yield f"  {label}:"
        yield from (f"    {key}: {value}" for key, value in vm.items())


def _one_line(text: str) -> str:
    """For a comment: what would end its line, or is not to be seen, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _scalar(path: Path) -> str:
    """In YAML, whatever is in it."""
    text = str(path)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _is_address(text: str) -> bool:
    return _inside(text, IPv4Network("0.0.0.0/0"))


def _inside(address: str, subnet: IPv4Network) -> bool:
    try:
        return IPv4Address(address) in subnet
    except ValueError:
        return False
