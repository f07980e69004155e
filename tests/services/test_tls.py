"""Names with a certificate: served by nginx and haproxy, asked by a client that checks whose it is."""

from __future__ import annotations

import http.client
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemons
from http_machine import machine
from networks import wait_for
from test_verify import verify
from yard import Yard

NAME = "dev2.example.org"
PORTS = {"nginx": (8001, 8002), "haproxy": (8003, 8004)}


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def certify(directory: Path, name: str) -> str:
    """A certificate of the test's authority for a name, with the chain and the key behind it."""
    key, request, made = (directory / f"{name}.{kind}" for kind in ("key", "csr", "crt"))
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    if not (directory / "ca.crt").exists():
        openssl("req", "-x509", *new, "-subj", "/CN=try-it CA", "-days", "2",
                "-keyout", directory / "ca.key", "-out", directory / "ca.crt")  # fmt: skip
    openssl("req", *new, "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
            "-keyout", key, "-out", request)  # fmt: skip
    openssl("x509", "-req", "-in", request, "-CA", directory / "ca.crt", "-CAkey", directory / "ca.key",
            "-CAcreateserial", "-copy_extensions", "copy", "-days", "2", "-out", made)  # fmt: skip
    return made.read_text() + (directory / "ca.crt").read_text() + key.read_text()


def page(directory: Path, port: int, name: str) -> str:
    """By https, as a browser that trusts the authority."""
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.connect()
    connection.sock = context.wrap_socket(connection.sock, server_hostname=name)
    connection.request("GET", "/", headers={"Host": name})
    body = connection.getresponse().read().decode()
    connection.close()
    return body


@pytest.fixture
def tls(yard: Yard, daemons: Daemons) -> Iterator[Path]:
    """The directory of the certificates: two names, each with its own."""
    directory = yard.directory / "tls"
    directory.mkdir()
    for vm, port in (("dev2", "8080"), ("prod", "8081")):
        file = directory / f"{vm}.pem"
        file.write_text(certify(directory, f"{vm}.example.org"))
        yard.vms[vm]["proxy"] = [
            {"name": f"{vm}.example.org", "port": port, "certificate": str(file)}
        ]  # fmt: skip
    yard.use("nginx", "haproxy")
    daemons.start("nginx", "haproxy")
    with machine("10.77.0.6", 8080), machine("10.77.0.7", 8081):
        yard.apply()
        yield directory


@pytest.mark.parametrize("service", PORTS)
def test_each_name_has_its_own(yard: Yard, tls: Path, service: str) -> None:
    plain, secure = PORTS[service]
    wait_for(lambda: page(tls, secure, NAME) == "10.77.0.6:8080")
    assert page(tls, secure, "prod.example.org") == "10.77.0.7:8081"
    with pytest.raises(ssl.SSLCertVerificationError):
        page(tls, secure, "other.example.org")
    connection = http.client.HTTPConnection("127.0.0.1", plain, timeout=5)
    connection.request("GET", "/a?b=c", headers={"Host": f"{NAME}:{plain}"})
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("Location")) == (301, f"https://{NAME}:{secure}/a?b=c")
    connection.close()


def test_verify_looks_at_the_certificate(yard: Yard, tls: Path) -> None:
    for _, secure in PORTS.values():
        wait_for(lambda port=secure: page(tls, port, NAME) == "10.77.0.6:8080")
    report = verify(yard)
    assert report.ok and not report.unknown, report
    asked = [answer for answer in report.answers if answer.text.startswith("certificate")]
    assert len(asked) == 4

    file = tls / "dev2.pem"
    file.write_text(certify(tls, NAME))  # renewed, and nobody told
    assert {(a.service, a.seen) for a in verify(yard).wrong} == {
        ("nginx", "another: the file is newer"),
        ("haproxy", "another: the file is newer"),
    }
    file.write_text(certify(tls, "other.example.org"))  # not its own
    for service in PORTS:
        subprocess.run(yard.services[service]["reload"], check=True)
    wait_for(lambda: len([a for a in verify(yard).wrong if "mismatch" in a.seen]) == 2)
