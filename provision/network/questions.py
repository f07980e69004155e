"""What services' clients ask, and how: of DNS servers, proxies and forwarded ports."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import SplitResult, urljoin, urlsplit, urlunsplit

from inventory.model import Farm
from provision.network.service import NotAsked, Question, Silent
from provision.network.view import ProxyRow, View, VmRow

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_PATIENCE = 3.0  # seconds for each answer
_USUAL = {"http": 80, "https": 443}
_REDIRECTS = 5

# ---- Names


def names(
    service: str,
    server: tuple[str, int],
    rows: Mapping[str, VmRow],
    *,
    reverse: Mapping[str, tuple[str, str]],
) -> Iterator[Question]:
    """``server``: its address and port. ``reverse``: by address the name that is asked for, and whose it
    is."""
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


def pointers(found: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """``names``' ``reverse``, from addresses and full names, each asked for by its usual name."""
    return {address: (ip_address(address).reverse_pointer, fqdn) for address, fqdn in found}


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
            why = type(error).__name__
            continue
        found = sorted(
            rdata.to_text()
            for rrset in answer.answer
            if rrset.rdtype == dns.rdatatype.from_text(kind)
            for rdata in rrset
        )
        return " ".join(found) or str(dns.rcode.to_text(answer.rcode()))
    raise Silent(why)


# ---- Proxies and NAT, beside the VM's own answer


def proxies(
    service: str, server: tuple[str, int, int], farm: Farm, view: View, rows: Mapping[str, VmRow]
) -> Iterator[Question]:
    """``server``: its address, the port of plain HTTP, and that of names with a certificate."""
    address, port, tls_port = server
    ports = {"http": port, "https": tls_port}
    by_name = {row.name: row for row in view.proxies}
    for vm in rows:
        for declared in farm.vms[vm].proxy:
            proxy = by_name[next(name for name in by_name if name == declared.name)]
            yield _proxy(service, address, ports, vm, proxy)
            if proxy.certificate:
                yield _certificate(service, (address, tls_port), vm, proxy)


def _proxy(service: str, address: str, ports: Mapping[str, int], vm: str, proxy: ProxyRow) -> Question:
    """What the VM itself answers to what the proxy hands on, and what the proxy answers."""
    scheme = "https" if proxy.certificate else "http"
    start = f"{scheme}://{_host(str(proxy.name), ports[scheme], scheme)}/"
    own = partial(_page, start, lambda url: _http((str(proxy.target), proxy.port), url, handed_on=True))
    through = partial(_page, start, lambda url: _http((address, _port(url)), url))
    return Question(service, vm, f"GET {start}, expect what the VM answers", own, through)


def _page(url: str, get: Callable[[SplitResult], tuple[int, str, int]]) -> str:
    """Status and a little of what identifies the answer, where redirects within the site lead to, as a
    browser follows them."""
    site, path = urlsplit(url).hostname, ""
    for _ in range(_REDIRECTS):
        status, location, size = get(urlsplit(url))
        if status not in (301, 302, 303, 307, 308) or not location:
            return f"{status}, {size} bytes{path}"
        url = urljoin(url, location)
        if urlsplit(url).scheme not in ("http", "https") or urlsplit(url).hostname != site:
            return f"{status} to {url}"
        path = f" at {url}"
    return f"more than {_REDIRECTS} redirects, the last to {url}"


def _host(name: str, port: int, scheme: str) -> str:
    """A Host header (RFC 9110, 7.2)."""
    return name if port == _USUAL[scheme] else f"{name}:{port}"


def _port(url: SplitResult) -> int:
    return url.port or _USUAL[url.scheme]


def _http(server: tuple[str, int], url: SplitResult, *, handed_on: bool = False) -> tuple[int, str, int]:
    """Ask a server for a page: status, Location, size. ``handed_on``: as a proxy hands it on, which
    speaks plain HTTP."""
    connection = http.client.HTTPConnection(*server, timeout=_PATIENCE)
    name, port = url.hostname or "", _port(url)
    headers = {"Host": _host(name, port, url.scheme), "User-Agent": "farmhand"}
    if handed_on:
        headers |= {
            "X-Forwarded-Proto": url.scheme,
            "X-Forwarded-Host": headers["Host"],
            "X-Forwarded-Port": str(port),
        }
    try:
        if url.scheme == "https" and not handed_on:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # another question
            connection.connect()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=name)
        connection.request("GET", urlunsplit(("", "", url.path or "/", url.query, "")), headers=headers)
        response = connection.getresponse()
        size = len(response.read(1 << 20))
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Silent(why) from None
    finally:
        connection.close()
    return response.status, response.getheader("Location", ""), size


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
        raise NotAsked(f"could not read {file}: {error.strerror}") from None
    if not found:
        raise NotAsked(f"could not find a certificate in {file}")
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
        raise Silent(error.strerror or error) from None
    return right if given == ssl.PEM_cert_to_DER_cert(found[0]) else "another: the file is newer"


def nat(address: str, row: VmRow, service: str) -> Question:
    """What ssh says through the port and at the VM itself."""
    text = f"connect to port {row.nat_port} of {address}, expect {row.address}:{row.port}"
    own = partial(_banner, str(row.address), row.port)
    return Question(service, row.vm, text, own, partial(_banner, address, row.nat_port or 0))


def _banner(address: str, port: int) -> str:
    """What ssh says first; "connected" of one that waits."""
    try:
        with socket.create_connection((address, port), timeout=_PATIENCE) as peer:
            peer.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                return peer.recv(255).decode(errors="replace").strip() or "closed"
            return "connected"
    except OSError as error:
        raise Silent(error.strerror or error) from None
