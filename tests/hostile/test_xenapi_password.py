"""A XenAPI server's password: told to that server, and to nobody else, whatever happens."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from neighbour import NEEDS_ROOT

import cli.composition  # noqa: F401 - a farm is loaded
from hypervisors.api import Template
from hypervisors.xenapi.session import Sessions, XenApiServer
from inventory.errors import DriverFailed, FarmhandError, spelled
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.site import Site
from tests.contract.xenapi_rig import NETWORK, TestServer
from tests.unit.cli_farm import CommandLine

PASSWORD = "p'a<s>s&wörd-7f3a"
MIB = 2**20
FARM = """
farm: hush
hosts: {{xen: {{driver: xenapi, uri: '{uri}', credentials: credentials, ca: {ca}}}}}
network: {{mode: network, network: {network}, addressing: dhcp}}
templates: {{base: {{build: debian-12, size: 64M}}}}
ssh: {{key: key}}
vms: {{prod: {{memory: 192M}}}}
"""
COMMANDS = (
    ("doctor",), ("clone-farm", "--no-wait"), ("status", "--json"), ("reset", "--all", "--no-wait"),
)  # fmt: skip
FAILING = (("status",), ("start", "--all"))


class _Watch:
    """Looks at the arguments and the environment of all processes that began since, again and again."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.looks = 0
        self._before = frozenset(Path("/proc").glob("[0-9]*"))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.01):
            self.looks += 1
            for process in set(Path("/proc").glob("[0-9]*")) - self._before:
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        if PASSWORD.encode() in (process / name).read_bytes():
                            self.found.add(f"{name} of {(process / 'comm').read_text().strip()}")


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[CommandLine, TestServer]]:
    with contextlib.closing(TestServer()) as server:
        server.tell(knobs={"users": {"root": PASSWORD}})
        (tmp_path / "r").mkdir()
        made = CommandLine(tmp_path, tmp_path / "r")
        (tmp_path / "key").touch(0o600)  # as for an image that nobody tells whom to let in
        (tmp_path / "credentials").write_text(f"root\n{PASSWORD}\n")
        (tmp_path / "credentials").chmod(0o600)
        made.farm.write_text(FARM.format(uri=server.https, ca=server.ca, network=NETWORK))
        for name in ("STATE", "CACHE", "RUNTIME"):
            monkeypatch.setenv(f"FARMHAND_{name}_DIR", made.environment[f"FARMHAND_{name}_DIR"])
        image = tmp_path / "image"
        image.write_bytes(bytes(MIB))
        template = Template(
            name="base", generation=1, ref="", size=64 * MIB, sha256="", created=datetime.now(UTC),
            origin="nothing", firstboot="none",
        )  # fmt: skip
        with Site(load(made.farm), reporter=QuietReporter()) as site:
            site.prepare()
            site.disks("xen").seal(image, template)
        yield made, server


def _written(directory: Path) -> list[str]:
    """Files that hold it, but the one that it is for."""
    return [
        str(path)
        for path in directory.rglob("*")
        if path.is_file() and path.name != "credentials" and PASSWORD.encode() in path.read_bytes()
    ]


@NEEDS_ROOT
def test_no_command_tells_it(line: tuple[CommandLine, TestServer], tmp_path: Path) -> None:
    command, server = line
    said = []
    with _Watch() as watch:
        for words in COMMANDS:
            done = command(*words)
            assert done.status == 0 or words[0] == "doctor", done.err
            said.append(done)
        echo = ["error", "INTERNAL_ERROR", f"login_with_password(root, {PASSWORD})"]
        for words in FAILING:
            server.fail("session.login_with_password", echo)
            said.append(failed := command(*words))
            assert "********" in failed.out + failed.err, "the server repeats it"
        server.tell(knobs={"users": {"root": "another"}})
        said += [command(*words) for words in FAILING]
        assert all("AUTHENTICATION" in done.out + done.err for done in said[-len(FAILING) :])
    assert watch.looks > len(said)
    assert not watch.found
    assert not [done for done in said if PASSWORD in done.out + done.err]
    assert not _written(tmp_path)


ECHOES = {
    "a reason": lambda body: b"HTTP/1.1 500 no " + body + b"\r\nContent-Length: 0\r\n\r\n",
    "another program's words": lambda body: _page(b"you said " + body),
    "no status": lambda body: _page(
        b"<methodResponse><params><param><value><string>" + body + b"</string></value></param></params>"
        b"</methodResponse>"
    ),
    "a fault": lambda body: _page(
        b"<methodResponse><fault><value><struct><member><name>faultCode</name><value><int>1</int></value>"
        b"</member><member><name>faultString</name><value><string>" + body + b"</string></value>"
        b"</member></struct></value></fault></methodResponse>"
    ),
}  # fmt: skip


def _page(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )


@pytest.mark.parametrize("how", ECHOES)
def test_a_server_that_repeats_it_is_not_repeated(how: str, tmp_path: Path) -> None:
    password = "secret-5b1d"  # in one form everywhere
    heard: list[bytes] = []

    class Echo(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.wfile.write(ECHOES[how](password.encode()))
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    credentials = tmp_path / "credentials"
    credentials.touch(0o600)
    credentials.write_text(f"root\n{password}\n")
    with HTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(DriverFailed) as caught:
            Sessions(XenApiServer(url=url, credentials=credentials)).call("pool.get_all")
        server.shutdown()
    assert password.encode() in heard[0]
    error = caught.value
    assert password not in f"{error.message} {spelled(error.remedy)} {error.detail}"


def test_a_url_with_a_password_is_refused_and_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "hush.yaml"
    file.write_text(FARM.format(uri="https://root:s3cret@xen.example", ca="ca.pem", network="n"))
    with pytest.raises(FarmhandError) as caught:
        load(file)
    text = f"{caught.value.message} {spelled(caught.value.remedy)} {caught.value.detail}"
    assert "no user or password belongs in 'uri': 'credentials' names their file" in text
    assert "s3cret" not in text
