"""BIND: zones in files of ours or the admin's, or records by dynamic update."""

from __future__ import annotations

import base64
import binascii
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from host.files import file_error
from host.processes import runs_here
from inventory.base import at_key, quote
from inventory.errors import DriverFailed, FarmhandError, WrongState
from provision.network.daemons import Settling, command, runs
from provision.network.document import Document, digest
from provision.network.listeners import taken
from provision.network.serial import following, later, serial_of, with_serial
from provision.network.service import (
    Apart,
    ApplyStep,
    Checker,
    Inclusion,
    Question,
    Service,
    Unserved,
    ZoneFile,
)
from provision.network.templating import Unwritable, Word, backslashed

if TYPE_CHECKING:
    import dns.tsig

    from host.run import Runner
    from inventory.errors import Problem
    from inventory.fields import (
        Address,
        Bool,
        ConfigPath,
        Hostname,
        Hostnames,
        Lines,
        Own,
        Port,
        TimeToLive,
    )
    from inventory.model import Farm
    from inventory.places import Path as Place
    from inventory.places import Places
    from provision.network.file_change import FileChange
    from provision.network.live_dns import DnsServer
    from provision.network.records import Records, Zones
    from provision.network.renderer import Renderer
    from provision.network.service import OtherNames
    from provision.network.view import View, VmRow, Zone

_HERE = IPv4Address("127.0.0.1")
_COMMENT = ("; ", "")
_KEY_VARIABLE = "FARMHAND_TSIG_KEY"


def _string(text: str) -> Word:
    """A <character-string> of RFC 1035 section 5.1, \\DDD for what isn't printable ASCII."""
    data = text.encode()
    if len(data) > 255:
        raise Unwritable("a string of DNS has at most 255 bytes")
    return Word(
        '"'
        + "".join(
            f"\\{chr(byte)}" if byte in b'"\\' else chr(byte) if 32 <= byte < 127 else f"\\{byte:03d}"
            for byte in data
        )
        + '"'
    )


@dataclass(frozen=True, kw_only=True)
class Bind(Service):
    """BIND: the farm's zone, and its reverse zones."""

    NAME: ClassVar = "bind"
    NEEDS_SUBNET: ClassVar = True
    TOOLS: ClassVar = {"named-checkconf": "bind9-utils", "named-checkzone": "bind9-utils"}
    STRINGS: ClassVar = {"named": backslashed, "zone": _string, "reverse": _string, "parent": _string}
    APART: ClassVar = ("config", "own", "zone", "reverse")
    TOLD_LAST: ClassVar = True
    """Its serial numbers can't go back."""

    config: ConfigPath = "/etc/bind/named.conf.farmhand"
    """The zone statements: a file of ours, to `include` from named.conf.local."""
    main: ConfigPath = "/etc/bind/named.conf"
    """The server's own configuration, which the check begins with."""
    directory: ConfigPath = "/var/lib/bind"
    """Where the zone files are: db.ZONE each."""
    own: Own = "file"
    """`file`: the zone files are ours. `block`: they are the admin's, who also has the zone statements;
    ours is a marked block in each, and the serial number in their SOA record, which has to move."""
    zone: Hostname | None = None
    """The zone; absent: the network's `domain`, which must be inside it."""
    nameserver: Hostname | None = None
    """The primary server's name; absent: ns in the zone."""
    secondaries: Hostnames = ()
    """Names of further name servers."""
    contact: Hostname | None = None
    """Who is responsible, as a name (RFC 1035 section 3.3.13); absent: hostmaster in the zone."""
    ttl: TimeToLive = 3600
    """How long answers may be kept."""
    reverse: Bool = True
    """Whether the reverse zones are ours too. Of a subnet longer than /24 it is the classless one of
    RFC 2317."""
    parent: ConfigPath | None = None
    """Classless reverse zones: the file of the parent zone, where it is on this server: a marked block
    in it delegates to ours."""
    dynamic: Bool = False
    """Whether records are changed by dynamic update (RFC 2136) instead of by rewriting the zone."""
    key: ConfigPath | None = None
    """dynamic: the file of the TSIG key, as tsig-keygen writes it. Absent: $FARMHAND_TSIG_KEY holds
    its text."""
    key_name: Hostname = "farmhand"
    """dynamic: the key's name, where it comes from the environment."""
    address: Address = _HERE
    """Where the server answers."""
    port: Port = 53
    """Where the server answers."""
    rndc: Lines = ("rndc",)
    """The command that tells the server, an argument list; `reload`, `reconfig` and so on are added."""

    def __post_init__(self) -> None:
        if self.dynamic and self.own == "block":
            raise at_key(
                "own", "a dynamic zone's file is the server's: 'own: block' can't be", "dynamic"
            )

    @property
    def ports(self) -> tuple[str, ...]:
        return ("port",)

    # ---- Its rules for the farm file

    def problems(self, farm: Farm, places: Places) -> Iterator[Problem]:
        here: Place = ("services", self.NAME)
        if places.is_bad(here):
            return
        domain = farm.network.domain
        zone = self.zone or domain
        if zone is None or domain is None:
            yield places.problem(here, "'network' needs 'domain' for it", key=True)
            return
        if len(zone) > 200:
            where: Place = (*here, "zone") if self.zone else ("network", "domain")
            yield places.problem(where, "a zone's file is named after it: at most 200 characters")
        if not _inside(domain, zone):
            words = f"the network's domain, {domain}, is outside of {zone}"
            yield places.problem((*here, "zone"), words)
            return
        for name, vm in farm.vms.items():
            path: Place = ("vms", name)
            if vm.hostname is None:
                if len(name) + len(domain) > 252:
                    words = f"{name}.{domain} is longer than 253 characters"
                    yield places.problem(path, words, key=True)
            elif not places.is_bad((*path, "hostname")):
                yield from _name_problems(farm, places, (*path, "hostname"), vm.hostname, zone)
            for number, alias in enumerate(vm.aliases):
                yield from _name_problems(farm, places, (*path, "aliases", number), alias, zone)

    # ---- Two farms on one machine

    @property
    def whole(self) -> tuple[str, ...]:
        return () if self.own_block else ("config",)

    def apart(self, other: OtherNames) -> Apart:
        """A zone of its own, where the zone is all ours. Two farms can't both have one subnet's reverse
        zones."""
        if self.own_block:
            return Apart({})
        keys = {"config": other.path(self.config)}
        if self.zone:
            keys["zone"] = other.domain
        if not (self.reverse and other.same_subnet):
            return Apart(keys)
        note = (
            "the reverse zones of its subnet are the first farm's: its addresses lead to no names "
            "('own: block' in both files lets two farms share zones of yours)"
        )
        return Apart({**keys, "reverse": "no"}, note)

    # ---- Files

    def zones(self, r: Renderer) -> Sequence[ZoneFile]:
        name = Word(self._zone(r.farm))
        found = [ZoneFile(name, Word(f"{self.directory}/db.{name}"), r.serial(name), "zone")]
        for zone in r.view.reverse if self.reverse else ():
            path = Word(f"{self.directory}/{zone.file}")
            found.append(ZoneFile(zone.name, path, r.serial(zone.name), "reverse", zone.records))
        return found

    def documents(self, r: Renderer) -> Iterator[Document]:
        zones = self.zones(r)
        if self.own == "file":
            text = r.render("named", self, zones=zones)
            yield Document(self.NAME, self.config, text, comment=("// ", ""))
        for zone in zones:
            yield self._zone_file(r, zone, zone.serial)
        if self.parent and self.reverse:
            for classless in r.view.reverse:
                if classless.parent:
                    yield self._parent(r, self.parent, classless)

    def _zone(self, farm: Farm) -> str:
        return self.zone or farm.network.domain or ""

    def _zone_file(self, r: Renderer, zone: ZoneFile, serial: int) -> Document:
        numbered = replace(zone, serial=serial)
        text = r.render(zone.template, self, zone=numbered, **self._authority(r.farm, r.view))
        return Document(
            self.NAME, zone.path, text, 0o644, self.own, _COMMENT, zone.name, serial, self.dynamic,
            partial(self._zone_file, r, zone),
        )  # fmt: skip

    def _parent(self, r: Renderer, path: str, zone: Zone) -> Document:
        text = r.render("parent", self, zone=zone, **self._authority(r.farm, r.view))
        serial = r.serial(zone.parent)
        return Document(self.NAME, path, text, 0o644, "block", _COMMENT, zone.parent, serial)

    def _authority(self, farm: Farm, view: View) -> dict[str, Any]:
        """Who answers for the zones."""
        network, zone = farm.network, self._zone(farm)
        nameserver = self.nameserver or f"ns.{zone}"
        named = any(nameserver in row.full for row in view.vms)
        inside = nameserver.endswith(f".{zone}")
        address = self.address
        if address.is_loopback:
            address = next(iter((*network.nameservers, network.gateway or address)))
        return {
            "ttl": int(self.ttl),
            "nameserver": nameserver,
            "nameservers": (nameserver, *self.secondaries),
            "contact": self.contact or f"hostmaster.{zone}",
            "glue": Word(address) if inside and not named else "",
        }

    def inclusion(self) -> Inclusion | None:
        if self.own == "block":
            return None
        main = Path(self.main)
        into = main.with_name("named.conf.local")  # Debian's, for this
        into = into if into.exists() and main.name == "named.conf" else main
        line = f'include "{self.config}";'
        remedy = f"as root: touch {self.config} && echo '{line}' >> {into}"  # a restart finds it
        return Inclusion(self.config, self.main, Checker(("named-checkconf", self.main)), remedy)

    def missing(
        self, farm: Farm, files: Sequence[FileChange], runner: Runner
    ) -> Iterator[FarmhandError]:
        status = runner.read(*self.rndc, "status", ok=range(256))
        if status.status != 0:
            said = (status.stderr or status.stdout).strip().partition("\n")[0]
            yield WrongState(
                f"bind doesn't answer to {' '.join(self.rndc)} status: {said}",
                remedy="as root: systemctl start named; if it runs, correct services.bind.rndc",
            )
            if any(change.zone for change in files):
                at = (str(self.address),)
                yield from taken(runner, self.NAME, "udp", self.port, own=("named",), at=at)
            return
        for change in files:
            theirs = change.zone and (self.own == "block" or change.path == self.parent)
            if theirs and _loaded_serial(runner, self.rndc, change.zone) is None:
                yield WrongState(
                    f"BIND does not serve {change.zone}, whose file {change.path} is the admin's",
                    remedy=f"write its zone statement below {self.main}, or correct the zone's file",
                )
        if self.dynamic:
            self.record_server(farm)  # an error where there is no key

    def unserved(self, _farm: Farm, files: Sequence[FileChange], runner: Runner) -> Iterator[Unserved]:
        for change in files:
            if not change.zone or change.after is None:
                continue
            loaded = _loaded_serial(runner, self.rndc, change.zone)
            if loaded is None:
                step = _load(self.rndc, change, reload=False, as_it_is=self.dynamic)
                yield Unserved(f"BIND does not serve {change.zone}", step)
            elif not self.dynamic and loaded != serial_of(change.after):
                text = f"BIND serves {change.zone} with another serial number than {change.path} has"
                yield Unserved(text, _load(self.rndc, change, reload=True))

    def checkers(self, _farm: Farm, documents: Sequence[Document]) -> Iterator[Checker]:
        for document in documents:
            if document.zone and not document.initial and document.path != self.parent:
                yield Checker(("named-checkzone", "-q", document.zone, document.path))
        if Path(self.main).exists():
            yield Checker(("named-checkconf", "-z", self.main))
        elif self.own == "file":
            yield Checker(("named-checkconf", self.config))

    # ---- How it is told

    def is_live(self, _farm: Farm, runner: Runner) -> bool:
        return runs_here("named") or runs(runner, (*self.rndc, "status"))

    def steps(self, _farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        if any(change.path == self.config for change in changes):
            yield command(self.NAME, (*self.rndc, "reconfig"))
        for change in changes:
            if change.zone and change.after is not None:
                yield _load(self.rndc, change, reload=change.before is not None)

    def put_back(self, runner: Runner, back: FileChange) -> FileChange:
        """The old zone under a new serial number, where the server has gone on to ours already:
        secondaries may have it, and would not take an older one."""
        old = serial_of(back.after or "")
        if not back.zone or back.after is None or old is None:
            return back
        loaded = _loaded_serial(runner, self.rndc, back.zone)
        if loaded is None or not later(loaded, old):
            return back
        serial = following([old, loaded], datetime.now(UTC).date())
        return replace(back, after=_marked_again(with_serial(back.after, serial), back.after))

    def not_live(self) -> Iterator[str]:
        if not self.dynamic:
            yield "its zones are reloaded, one by one ('dynamic: yes' changes records instead)"

    # ---- Dynamic zones

    @property
    def live_records(self) -> Bind | None:
        return self if self.dynamic else None

    def record_server(self, farm: Farm) -> DnsServer:
        from provision.network.live_dns import DnsServer

        mark = f"farmhand {farm.farm}"
        return DnsServer(str(self.address), self.port, _tsig_key(self), ttl=int(self.ttl), mark=mark)

    def records(self, view: View) -> Zones:
        return _desired(view, self._zone(view.declared), reverse=self.reverse)

    # ---- Questions

    def questions(self, _farm: Farm, view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        from provision.network import questions

        server = (str(self.address), self.port)
        reverse = _pointers(view) if self.reverse else {}
        yield from questions.names(self.NAME, server, rows, reverse=reverse)


def _inside(name: str, zone: str) -> bool:
    return name == zone or name.endswith(f".{zone}")


def _name_problems(farm: Farm, places: Places, path: Place, name: str, zone: str) -> Iterator[Problem]:
    full = farm.qualified(name)
    if not _inside(full, zone):
        yield places.problem(path, f"{quote(name)} is outside of {zone}, the zone that BIND serves")
    elif len(full) > 253:
        yield places.problem(path, f"{quote(full)} is longer than 253 characters")


def _load(rndc: Sequence[str], change: FileChange, *, reload: bool, as_it_is: bool = False) -> ApplyStep:
    """Loaded is what counts: rndc answers before it is, and doesn't say if a zone won't load.
    ``as_it_is``: with whatever serial number, for the server has gone on from the file's."""
    serial = serial_of(change.after or "")

    def run(runner: Runner) -> None:
        loaded = _loaded_serial(runner, rndc, change.zone)
        if loaded is None:  # it wasn't there, or wouldn't load, when the server last read its files
            runner.change(*rndc, "reconfig")
        elif not as_it_is and (reload or loaded != serial):  # a file may be new and its zone not
            runner.change(*rndc, "reload", change.zone)
        settling = Settling()
        while True:
            loaded = _loaded_serial(runner, rndc, change.zone)
            if loaded == serial or (as_it_is and loaded is not None):
                return
            if settling.over():
                raise _not_loaded(change, loaded)
            time.sleep(0.05)

    return ApplyStep(Bind.NAME, f"bind: {'reload' if reload else 'load'} {change.zone}", run)


def _loaded_serial(runner: Runner, rndc: Sequence[str], zone: str) -> int | None:
    """The serial number the server answers with. None: it serves no such zone."""
    result = runner.read(*rndc, "zonestatus", zone, ok=range(256))
    match = re.search(r"^serial: (\d+)$", result.stdout, re.MULTILINE)
    return int(match[1]) if match else None


def _not_loaded(change: FileChange, loaded: int | None) -> FarmhandError:
    if loaded is None:
        return DriverFailed(
            f"BIND does not serve {change.zone}",
            remedy="include 'services.bind.config' in named.conf.local; see its log",
        )
    return DriverFailed(
        f"BIND did not load {change.path}: it still answers with the serial number {loaded}",
        remedy="see its log",
    )


def _marked_again(text: str, before: str) -> str:
    """With the digest in our mark made to fit, for a whole file of ours."""
    first, _, rest = before.partition("\n")
    if digest(rest) not in first:
        return text
    new = text.partition("\n")[2]
    return f"{first.replace(digest(rest), digest(new))}\n{new}"


def _desired(view: View, zone: str, *, reverse: bool) -> dict[str, dict[str, Records]]:
    """The records of a farm's VMs."""
    found: dict[str, dict[str, list[tuple[str, str]]]] = {zone: {}}
    for row in view.vms:
        for name in row.full:
            records = found[zone].setdefault(str(name), [])
            for kind, address in (("A", row.address), ("AAAA", row.address6)):
                if address and (kind, address) not in records:
                    records.append((kind, str(address)))
    for back in view.reverse if reverse else ():
        pointers = found.setdefault(str(back.name), {})
        for name, fqdn in back.records:
            pointers[str(name)] = [("PTR", f"{fqdn}.")]
    return {
        name: {owner: tuple(sorted(records)) for owner, records in names.items() if records}
        for name, names in found.items()
    }


def _pointers(seen: View) -> dict[str, tuple[str, str]]:
    """By address: the name that is asked for, in the zone that is ours, and what it says."""
    by_name = {name: fqdn for zone in seen.reverse for name, fqdn in zone.records}
    classless = {ours: name for zone in seen.reverse for name, ours in zone.labels}
    found = {}
    for name, fqdn in by_name.items():
        found[_address_of(classless.get(name, name))] = (str(name), str(fqdn))
    return found


def _address_of(pointer: str) -> str:
    labels = pointer.split(".")
    if pointer.endswith(".in-addr.arpa"):
        return ".".join(reversed(labels[:-2]))
    digits = "".join(reversed(labels[:-2]))
    return str(ip_address(int(digits, 16)))


# ---- The key


_KEY = re.compile(r'key\s+"?(?P<name>[A-Za-z0-9_.-]+)"?\s*\{(?P<body>[^}]*)\}', re.IGNORECASE)
_FIELD = re.compile(r'\b(algorithm|secret)\s+"?([A-Za-z0-9+/=_.-]+)"?\s*;', re.IGNORECASE)


def _tsig_key(bind: Bind) -> dns.tsig.Key:
    """From the key's file, or from the environment: a key statement as tsig-keygen(8) writes it, or
    there the bare secret of an hmac-sha256 key. WrongState, without a word of what is in it."""
    import dns.name
    import dns.tsig

    if bind.key is not None:
        where, text = bind.key, _private(Path(bind.key))
    else:
        where, text = f"${_KEY_VARIABLE}", os.environ.get(_KEY_VARIABLE, "")
    if not text.strip():
        raise WrongState(
            f"a dynamic zone needs a TSIG key: {where} is empty",
            remedy="tsig-keygen farmhand > FILE, mode 0640, then services.bind.key: FILE",
        )
    match = _KEY.search(text)
    fields = {k.lower(): v for k, v in _FIELD.findall(match["body"])} if match else {}
    if match is None and bind.key is None:
        fields = {"secret": text.strip()}
    name = match["name"] if match else bind.key_name
    algorithm = fields.get("algorithm", "hmac-sha256").lower()
    try:
        secret = base64.b64decode(fields["secret"], validate=True)
    except (KeyError, binascii.Error):
        raise WrongState(
            f"{where} is no TSIG key", remedy="it should be as tsig-keygen writes it"
        ) from None
    if name != bind.key_name:
        raise WrongState(
            f"{where} holds a key named {name}, and the zones let {bind.key_name} update them",
            remedy=f"set services.bind.key_name: {name}",
        )
    return dns.tsig.Key(dns.name.from_text(name), secret, dns.name.from_text(algorithm))


def _private(path: Path) -> str:
    try:
        if path.stat().st_mode & 0o004:
            raise WrongState(
                f"{path} can be read by everybody", remedy=f"chown root:bind {path} && chmod 0640 {path}"
            )
        return path.read_text(errors="replace")
    except OSError as error:
        raise file_error(error, path, "read the TSIG key") from error
