"""network-verify: the live services, asked as their clients do.

A DHCP exchange for each VM, forward and reverse queries to the server itself, a request through each
proxy name and a connection through each NAT port, the last two compared with what the VM itself answers.
What can't be told (the VM is off) is said, and is not taken for right.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from inventory.errors import FarmhandError
from inventory.model import Farm
from provision.network.dhcp_probe import probe
from provision.network.rendered import chosen
from provision.network.view import ProxyRow, View, VmRow, view
from provision.site import Site

_AT_ONCE = 16
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_PATIENCE = 3.0  # seconds for each answer
NO_ANSWER = "no answer"


@dataclass(frozen=True, slots=True)
class Question:
    """``ask`` gives what is seen; ``expected`` what should be, told beforehand or asked for as well.
    Either may say that it can't be known."""

    service: str
    vm: str
    text: str
    expected: Callable[[], str]
    ask: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Answer:
    """``ok`` None: it could not be told."""

    service: str
    vm: str
    text: str
    expected: str
    seen: str
    ok: bool | None

    def as_dict(self) -> dict[str, object]:
        return {
            "service": self.service,
            "vm": self.vm,
            "question": self.text,
            "expected": self.expected,
            "seen": self.seen,
            "ok": self.ok,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """``planned``: what would be asked; nothing was."""

    answers: tuple[Answer, ...]
    planned: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.wrong

    @property
    def wrong(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.ok is False)

    @property
    def unknown(self) -> tuple[Answer, ...]:
        return tuple(answer for answer in self.answers if answer.ok is None)

    def as_dict(self) -> dict[str, object]:
        return {
            "verified": self.ok,
            "questions": list(self.planned),
            "answers": [answer.as_dict() for answer in self.answers],
        }


def network_verify(site: Site, services: Sequence[str] = (), vms: Sequence[str] = ()) -> Report:
    """Ask about the VMs that something was given to (or those named). In a plan only say what."""
    names = chosen(site, services)
    recorded = site.allocator.recorded()
    wanted = [vm for vm in site.vms(vms or None) if vm in recorded or not site.member(vm).info.virtual]
    seen = view(site.farm, {vm: recorded[vm] for vm in wanted if vm in recorded})
    rows = {str(row.vm): row for row in seen.vms if row.vm in wanted}
    found = list(_questions(site.farm, seen, rows, names))
    servers = [name for name in names if name in _DHCP] if site.farm.network.bridge else []
    asked = [row for row in rows.values() if row.mac and row.address] if servers else []
    if site.plan:
        dhcp = [f"dhcp: {row.vm}: exchange for {row.mac}, expect {row.address}" for row in asked]
        return Report((), (*dhcp, *(f"{q.service}: {q.vm}: {q.text}" for q in found)))
    answers = list(_dhcp(site, ", ".join(servers), asked)) if asked else []
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="verify") as pool:
        answers += pool.map(_answer, found)
    return Report(tuple(answers))


_DHCP = ("dhcpd", "kea", "dnsmasq")


def _questions(
    farm: Farm, seen: View, rows: Mapping[str, VmRow], services: Sequence[str]
) -> Iterator[Question]:
    for service in services:
        if service == "bind" and farm.services.bind:
            bind = farm.services.bind
            yield from _names(service, (str(bind.address), bind.port), rows, reverse=_pointers(seen))
        elif service == "dnsmasq" and farm.services.dnsmasq and farm.services.dnsmasq.dns:
            dnsmasq = farm.services.dnsmasq
            pointers = {row.address: (row.address, row.fqdn) for row in rows.values() if row.address}
            yield from _names(
                service, (str(dnsmasq.address), dnsmasq.port), rows,
                reverse={a: (_reverse_name(a), fqdn) for a, (_, fqdn) in pointers.items()},
            )  # fmt: skip
        elif service in ("nginx", "haproxy"):
            section = getattr(farm.services, service)
            for vm, proxy in _proxies(farm, seen, rows):
                yield _proxy(service, str(section.address), section.port, section.tls_port, vm, proxy)
                if proxy.certificate:
                    yield _certificate(service, (str(section.address), section.tls_port), vm, proxy)
        elif service == "nftables" and farm.services.nftables:
            for row in seen.nat:
                if row.vm in rows:
                    address = farm.services.nftables.address or farm.network.gateway
                    yield _nat(str(address or ""), row, service)
        elif service == "shorewall" and farm.services.shorewall:
            outer = farm.services.shorewall.address
            outside = outer is not None and not _ours(str(outer))
            for row in seen.nat:
                if row.vm in rows:
                    yield _nat(str(outer), row, service) if outside else _rule(row)
        elif service == "hosts":
            yield from _hosts_file(farm, rows)


# ---- Names


def _names(
    service: str,
    server: tuple[str, int],
    rows: Mapping[str, VmRow],
    *,
    reverse: Mapping[str, tuple[str, str]],
) -> Iterator[Question]:
    for row in rows.values():
        for name in row.full:
            for kind, address in (("A", row.address), ("AAAA", row.address6)):
                if address:
                    text = f"{name} {kind}, expect {address}"
                    yield Question(
                        service, row.vm, text, partial(str, address), partial(_query, server, name, kind)
                    )
        for address in (row.address, row.address6):
            if address in reverse:
                pointer, fqdn = reverse[address]
                text = f"{address} PTR, expect {fqdn}"
                expected = partial(str, f"{fqdn}.")
                yield Question(service, row.vm, text, expected, partial(_query, server, pointer, "PTR"))


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


def _reverse_name(address: str) -> str:
    return ip_address(address).reverse_pointer


def _query(server: tuple[str, int], name: str, kind: str) -> str:
    import dns.exception
    import dns.message
    import dns.query
    import dns.rcode
    import dns.rdatatype

    question = dns.message.make_query(name, kind)
    for _ in range(2):  # a datagram may be lost
        try:
            answer = dns.query.udp(question, server[0], port=server[1], timeout=_PATIENCE)
        except (dns.exception.DNSException, OSError) as error:
            seen = f"{NO_ANSWER} ({type(error).__name__})"
            continue
        found = sorted(
            rdata.to_text()
            for rrset in answer.answer
            if rrset.rdtype == dns.rdatatype.from_text(kind)
            for rdata in rrset
        )
        return " ".join(found) or str(dns.rcode.to_text(answer.rcode()))
    return seen


def _hosts_file(farm: Farm, rows: Mapping[str, VmRow]) -> Iterator[Question]:
    """The file that is the resolver's own is asked through it."""
    service = farm.services.hosts
    if service is None or service.config != "/etc/hosts":
        return
    for row in rows.values():
        text = f"{row.fqdn} by the resolver, expect {row.address}"
        yield Question("hosts", row.vm, text, partial(str, row.address), partial(_resolve, row.fqdn))


def _resolve(name: str) -> str:
    try:
        found = {str(item[4][0]) for item in socket.getaddrinfo(name, None, socket.AF_INET)}
    except OSError as error:
        return f"{NO_ANSWER} ({error.strerror})"
    return " ".join(sorted(found))


# ---- DHCP


def _dhcp(site: Site, servers: str, rows: Sequence[VmRow]) -> Iterator[Answer]:
    bridge = site.farm.network.bridge or ""
    try:
        found = probe(site.runner, bridge, [row.mac for row in rows])
    except FarmhandError as error:
        found = dict.fromkeys((row.mac for row in rows), f"could not be asked: {error.message}")
    for row in rows:
        seen = found.get(row.mac, NO_ANSWER)
        text = f"exchange for {row.mac}, expect {row.address}"
        known = None if seen.startswith("could not") else seen == row.address
        yield Answer(servers, row.vm, text, str(row.address), seen, known)


# ---- Proxies and NAT, beside the VM's own answer


def _proxies(farm: Farm, seen: View, rows: Mapping[str, VmRow]) -> Iterator[tuple[str, ProxyRow]]:
    by_name = {row.name: row for row in seen.proxies}
    for vm in rows:
        for proxy in farm.vms[vm].proxy:
            yield vm, by_name[next(name for name in by_name if name == proxy.name)]


def _proxy(service: str, address: str, port: int, tls: int, vm: str, proxy: ProxyRow) -> Question:
    own = partial(_http, str(proxy.target), proxy.port, str(proxy.name))
    if proxy.certificate:
        through = partial(_http, address, tls, str(proxy.name), secure=True)
    else:
        through = partial(_http, address, port, str(proxy.name))
    text = f"GET http{'s' if proxy.certificate else ''}://{proxy.name}/, expect what the VM answers"
    return Question(service, vm, text, own, through)


def _http(address: str, port: int, host: str, *, secure: bool = False) -> str:
    """Status and a little of what identifies the answer."""
    connection = http.client.HTTPConnection(address, port, timeout=_PATIENCE)
    try:
        if secure:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # another question
            connection.connect()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        connection.request("GET", "/", headers={"Host": host, "User-Agent": "farmhand"})
        response = connection.getresponse()
        size = len(response.read(1 << 20))
    except (OSError, http.client.HTTPException) as error:
        return f"{NO_ANSWER} ({getattr(error, 'strerror', None) or str(error) or type(error).__name__})"
    finally:
        connection.close()
    return f"{response.status}, {size} bytes"


def _certificate(service: str, server: tuple[str, int], vm: str, proxy: ProxyRow) -> Question:
    """Asked apart from the page: it is there whether or not the VM answers."""
    right = f"that of {proxy.certificate}, valid for {proxy.name}"
    text = f"certificate on port {server[1]} for {proxy.name}, expect {right}"
    ask = partial(_presented, server, str(proxy.name), str(proxy.certificate), right)
    return Question(service, vm, text, partial(str, right), ask)


def _presented(server: tuple[str, int], name: str, file: str, right: str) -> str:
    """The first of the file's certificates is the server's own; it and the others vouch for it. So the
    name and the dates are checked, and nothing is asked of this machine's authorities."""
    try:
        found = _PEM.findall(Path(file).read_text(encoding="ascii", errors="replace"))
    except OSError as error:
        return f"could not read {file}: {error.strerror}"
    if not found:
        return f"could not find a certificate in {file}"
    try:
        context = ssl.create_default_context(cadata="\n".join(found))
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        with (
            socket.create_connection(server, timeout=_PATIENCE) as plain,
            context.wrap_socket(plain, server_hostname=name) as peer,
        ):
            given = peer.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        return f"refused: {error.verify_message}"
    except OSError as error:
        return f"{NO_ANSWER} ({error.strerror or error})"
    return right if given == ssl.PEM_cert_to_DER_cert(found[0]) else "another: the file is newer"


def _nat(address: str, row: VmRow, service: str) -> Question:
    text = f"connect to port {row.nat_port} of {address}, expect {row.address}:{row.port}"
    own = partial(_banner, str(row.address), row.port)
    return Question(service, row.vm, text, own, partial(_banner, address, row.nat_port or 0))


def _ours(address: str) -> bool:
    """Whether this machine has the address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _banner(address: str, port: int) -> str:
    """What ssh says first; "connected" of one that waits."""
    try:
        with socket.create_connection((address, port), timeout=_PATIENCE) as peer:
            peer.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                return peer.recv(255).decode(errors="replace").strip() or "closed"
            return "connected"
    except OSError as error:
        return f"{NO_ANSWER} ({error.strerror or error})"


def _rule(row: VmRow) -> Question:
    """From this machine itself a rule for the outside can't be tried: the kernel is asked for it."""
    target = f"{row.address}:{row.port}"

    def ask() -> str:
        from host.run import Runner

        try:
            rules = Runner().read("iptables", "-w", "-t", "nat", "-S").stdout
        except FarmhandError as error:
            return f"could not be asked: {error.message}"
        match = re.search(rf"--dport {row.nat_port} .*--to-destination (\S+)", rules)
        return match[1] if match else "no rule"

    text = f"the kernel's rule for port {row.nat_port}, expect {target}"
    return Question("shorewall", row.vm, text, partial(str, target), ask)


def _answer(question: Question) -> Answer:
    seen, expected = question.ask(), question.expected()
    ok: bool | None = seen == expected
    if expected.startswith(NO_ANSWER) or seen.startswith("could not"):
        ok = None  # the VM itself is silent: what its proxy or port says proves nothing
    return Answer(question.service, question.vm, question.text, expected, seen, ok)
