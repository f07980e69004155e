"""The embedded server, by real clients: curl, apt, and sockets that say what no client would."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate, parsedate_to_datetime
from itertools import count
from pathlib import Path

import pytest
from repo_tree import RepoTree, make_deb, sha256
from sshd_machine import free_port, wait_for
from tls import certificate

from host.program import ROOT
from inventory.errors import Conflict, FarmhandError, NotFound, UsageError, WrongState
from repositories.package import place
from repositories.serving.files import open_served
from repositories.serving.server import Server, ServerLimits

BIG = make_deb("big", size=5 * 2**20)
BIG_URL = f"/{place(sha256(BIG), 'big_1.0_all.deb')}"
RELEASE = "/channels/tested/dists/tested/Release"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> RepoTree:
    made = RepoTree(tmp_path_factory.mktemp("repository"))
    made.publish("tested", ("big", BIG))
    made.layout.keys[0].write_text("a key\n")
    return made


@pytest.fixture(scope="module")
def server(tree: RepoTree) -> Iterator[Server]:
    with Server(tree.top) as running:
        yield running


def curl(url: str, *options: str, head: bool = False) -> tuple[int, dict[str, str], bytes]:
    """Status, fields and body."""
    argv = ["curl", "-sS", "--path-as-is", "-D", "/dev/stderr", *(["-I"] if head else []), *options, url]
    done = subprocess.run(argv, check=True, capture_output=True)
    line, *lines = done.stderr.decode().strip().splitlines()
    fields = dict(text.split(": ", 1) for text in lines)
    return int(line.split()[1]), fields, done.stdout


def said(port: int, text: bytes, *, end: bool = False) -> bytes:
    """All that the server answers to that, until it hangs up. ``end``: nothing more is said."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as talking:
        talking.sendall(text)
        if end:
            talking.shutdown(socket.SHUT_WR)
        found = b""
        while data := talking.recv(65536):
            found += data
        return found


def test_a_file_whole_and_its_fields(server: Server) -> None:
    status, fields, body = curl(server.url + BIG_URL)
    assert (status, body) == (200, BIG)
    assert fields["Content-Type"] == "application/vnd.debian.binary-package"
    assert fields["ETag"] == f'"{sha256(BIG)}"'
    assert fields["Content-Length"] == str(len(BIG))
    assert fields["Accept-Ranges"] == "bytes"
    assert fields["Cache-Control"] == "public, max-age=31536000, immutable"
    again = curl(server.url + BIG_URL, head=True)
    assert again[0] == 200
    assert {**again[1], "Date": ""} == {**fields, "Date": ""}


def test_what_may_change_is_asked_for_again(tree: RepoTree, server: Server) -> None:
    for path in (RELEASE, "/channels/tested.mirrors", "/dists/tested/Release", "/key.asc"):
        status, fields, _ = curl(server.url + path)
        assert (status, fields["Cache-Control"]) == (200, "no-cache"), path
    (packed,) = tree.top.glob("generations/1/dists/*/*/*/Packages.gz")
    digest, index = sha256(packed.read_bytes()), "channels/tested/dists/tested/main/binary-amd64"
    for path in (
        "generations/1/dists/tested/Release",
        f"channels/tested{BIG_URL}",
        f"{index}/by-hash/SHA256/{digest}",
    ):
        status, fields, _ = curl(f"{server.url}/{path}", head=True)
        assert (status, "immutable" in fields["Cache-Control"]) == (200, True), path
    status, fields, body = curl(f"{server.url}/{index}/Packages.gz")
    assert (fields["Content-Type"], body) == ("application/gzip", packed.read_bytes())
    assert "Content-Encoding" not in fields


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        ("bytes=0-9", 206, BIG[:10]),
        ("bytes=5242880-", 206, BIG[5242880:]),
        ("bytes=-7", 206, BIG[-7:]),
        (f"bytes={len(BIG) - 1}-{len(BIG) + 100}", 206, BIG[-1:]),
        (f"bytes=-{len(BIG) + 1}", 206, BIG),
        ("Bytes=1-1", 206, BIG[1:2]),
        (f"bytes={len(BIG)}-", 416, b""),
        ("bytes=-0", 416, b""),
        ("bytes=9-2", 200, BIG),
        ("bytes=0-1,5-6", 200, BIG),
        ("bytes=-", 200, BIG),
        ("bytes=a-b", 200, BIG),
        ("lines=1-2", 200, BIG),
        (f"bytes=0-{'9' * 5000}", 200, BIG),
    ],
)
def test_ranges(server: Server, asked: str, status: int, part: bytes) -> None:
    found, fields, body = curl(server.url + BIG_URL, "-H", f"Range: {asked}")
    assert (found, body == part) == (status, True)
    if status == 206:
        first = asked.partition("=")[2].partition("-")[0]
        start = int(first) if first else len(BIG) - len(part)
        assert fields["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{len(BIG)}"
    if status == 416:
        assert fields["Content-Range"] == f"bytes */{len(BIG)}"
    head = curl(server.url + BIG_URL, "-H", f"Range: {asked}", head=True)
    assert head[0] == 200  # a range is of GET alone: RFC 9110, 14.2


def test_an_empty_file_has_no_ranges(tree: RepoTree, server: Server) -> None:
    (tree.top / "pool" / "empty").touch()
    url = f"{server.url}/pool/empty"
    assert curl(url)[0] == 200
    assert curl(url, "-H", "Range: bytes=0-")[0] == 416
    assert curl(url, "-H", "Range: bytes=-5")[0] == 200


def test_conditions(server: Server) -> None:
    for url in (server.url + BIG_URL, server.url + RELEASE):
        wait_for(lambda url=url: _is_past(curl(url, head=True)[1]))
        fields = curl(url, head=True)[1]
        tag, date = fields["ETag"], fields["Last-Modified"]
        old, late = formatdate(0, usegmt=True), formatdate(2**31, usegmt=True)
        lasting = "immutable" in fields["Cache-Control"]
        for status, *conditions in (
            (304, f"If-None-Match: {tag}"),
            (304, f'If-None-Match: "a", W/{tag}'),
            (304, "If-None-Match: *"),
            (200, 'If-None-Match: "a"'),
            (304, f"If-Modified-Since: {date}"),
            (200, f"If-Modified-Since: {old}"),
            (304 if lasting else 200, f"If-Modified-Since: {late}"),
            (200, "If-Modified-Since: yesterday"),
            (200, 'If-None-Match: "a"', f"If-Modified-Since: {date}"),
            (200, f"If-Match: {tag}"),
            (412, 'If-Match: "a"'),
            (412, f"If-Match: W/{tag}"),
            (412, f"If-Unmodified-Since: {old}"),
            (206, "Range: bytes=0-0", f"If-Range: {tag}"),
            (206, "Range: bytes=0-0", f"If-Range: {date}"),
            (200, "Range: bytes=0-0", f"If-Range: W/{tag}"),
            (200, "Range: bytes=0-0", 'If-Range: "a"'),
            (200, "Range: bytes=0-0", f"If-Range: {late}"),
            (304, "Range: bytes=0-0", f"If-None-Match: {tag}"),
        ):
            options = [word for condition in conditions for word in ("-H", condition)]
            found, said, body = curl(url, *options)
            assert found == status, (url, conditions)
            if status in (304, 412):
                assert (said["ETag"], body) == (tag, b"")


def _is_past(fields: dict[str, str]) -> bool:
    """Whether its second is over: so its date is its own."""
    return parsedate_to_datetime(fields["Last-Modified"]).timestamp() < time.time() - 3


def test_nobody_takes_the_next_publish_for_the_last_one(tmp_path: Path) -> None:
    """However many there are within a second, and although a generation is older than its publishing."""
    tree = RepoTree(tmp_path / "repository")
    tree.repository.make()
    with Server(tree.top) as server:
        known: dict[str, str] = {}
        for _ in range(20):
            release = tree.top / f"generations/{tree.publish('tested')}/dists/tested/Release"
            os.utime(release, (1, 1))
            for name, field in (("If-Modified-Since", "Last-Modified"), ("If-None-Match", "ETag")):
                condition = ["-H", f"{name}: {known[field]}"] if known else []
                status, _, body = curl(server.url + RELEASE, *condition)
                assert (status, body) == (200, release.read_bytes())
            known = curl(server.url + RELEASE, head=True)[1]


def test_each_client_gets_the_signature_of_what_it_got(tmp_path: Path) -> None:
    """However often the channel moved since. Each is told by its address and what it calls itself."""
    tree = RepoTree(tmp_path / "repository")
    signature = f"{RELEASE}.gpg"

    def publish() -> None:
        number = tree.publish("tested")
        for top in (tree.layout.tree(number), tree.layout.pointer("tested")):
            (top / "dists/tested/Release.gpg").write_text(f"of {number}\n")

    publish()
    with Server(tree.top) as server:
        early = ("-A", "apt"), ("-A", "dnf"), ("-A", "apt", "--interface", "127.0.0.2")
        seen = {}
        for client in early:
            seen[client] = curl(server.url + RELEASE, *client)[2]
            publish()
        late = ("-A", "late")
        curl(server.url + RELEASE, *late, head=True)
        for number, client in enumerate(early, 1):
            _, fields, body = curl(server.url + signature, *client)
            assert (body, fields["Cache-Control"]) == (b"of %d\n" % number, "no-cache")
            asked = ("-H", f"If-None-Match: {fields['ETag']}")
            assert curl(server.url + signature, *client, *asked)[0] == 304
            assert curl(server.url + signature, *late, *asked)[2] == b"of 4\n"
        assert curl(f"{server.url}/dists/tested/Release.gpg", *early[0])[2] == b"of 4\n"
        for client in early:
            assert curl(server.url + RELEASE, *client)[2] != seen[client]
            assert curl(server.url + signature, *client)[2] == b"of 4\n"
        publish()
        shutil.rmtree(tree.layout.tree(4))  # as if it had been collected
        assert curl(server.url + signature, *early[0])[2] == b"of 5\n"


def test_a_file_is_found_however_often_its_channel_moves(tmp_path: Path) -> None:
    """Although the tree is taken away that the channel's link has just led to."""
    (tmp_path / "published/tested").mkdir(parents=True)
    (tmp_path / "channels").mkdir()
    ending, top = threading.Event(), os.open(tmp_path, os.O_PATH)

    def move() -> None:
        for number in count(1):
            tree = tmp_path / f"published/tested/{number}"
            tree.mkdir()
            (tree / "Release").write_text("as ever\n")
            (tmp_path / "channels/next").symlink_to(f"../published/tested/{number}")
            (tmp_path / "channels/next").rename(tmp_path / "channels/tested")
            shutil.rmtree(tree.with_name(str(number - 1)), ignore_errors=True)
            begun.set()
            if ending.is_set():
                break

    begun = threading.Event()
    mover = threading.Thread(target=move)
    mover.start()
    try:
        begun.wait(60)
        for _ in range(5000):
            os.close(open_served(top, ("channels", "tested", "Release")).handle)
        with pytest.raises(FileNotFoundError):
            open_served(top, ("channels", "tested", "Release.gpg"))
    finally:
        ending.set()
        mover.join()
        os.close(top)


def test_only_the_layout_is_served(tmp_path: Path) -> None:
    tree = RepoTree(tmp_path / "repository")
    tree.publish("tested")
    top = tree.top
    (top / "key.asc").write_text("a key\n")
    outside = tree.scratch / "outside"
    outside.write_text("secret")
    (top / "pool" / ".hidden").write_text("secret")
    (top / "generations" / "1" / "outside").symlink_to(outside)
    (top / "pool" / "again").symlink_to("../key.asc")
    (top / "key.link").symlink_to("key.asc")
    (top / "channels" / "private").symlink_to("../.farmhand")
    (top / "channels" / "away").symlink_to("../..")
    (top / "channels" / "absolute").symlink_to(tree.scratch)
    (top / "channels" / "secret").symlink_to("../../outside")
    (top / "channels" / "loop").symlink_to("loop")
    (top / "published" / "tested" / "1" / "up").symlink_to("../../../.farmhand")
    os.mkfifo(top / "fifo")
    with Server(top) as server:
        assert curl(server.url + "//dists//tested/Release?x=1")[0] == 200
        assert curl(server.url + "/%6bey%2easc")[0] == 200
        (top / "index.html").write_text("a page\n")
        status, fields, body = curl(server.url + "/")
        assert (status, fields["Content-Type"], body) == (200, "text/html; charset=utf-8", b"a page\n")
        (top / "index.html").unlink()
        for path in (
            "", "/", "/pool", "/pool/", "/key.asc/", "/key.asc/x", "/nothing", "/fifo",
            "/channels/tested", "/.farmhand/lock", "/%2efarmhand/lock", "/pool/../.farmhand/lock",
            "/pool/.hidden", "/../outside", "/..%2foutside", "/%2e%2e/outside",
            "/pool%2f..%2f..%2foutside",
            "/generations/1/outside", "/pool/again", "/key.link", "/channels/private/lock",
            "/channels/away/outside", "/channels/away/top/key.asc", "/channels/absolute/outside",
            "/channels/secret", "/channels/loop/x", "/channels/tested/up/lock",
            "/key.asc%00", "/%ff%fe", "/" + "a" * 5000, "/" + "a/" * 2000 + "a",
        ):  # fmt: skip
            status, fields, body = curl(server.url + path)
            assert (status, body) == (404, b"404 Not Found\n"), path
            assert fields["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"GET /key.asc HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /key.asc HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /key.asc HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET /key.asc HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
        (b"GET /key.asc HTTP/1.1\r\nHost: a\0\r\n\r\n", 400),
        (b"GET  /key.asc HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET key.asc HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\r\n\r\n", 400),  # TLS where there is none
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"PUT /key.asc HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"GET /" + b"a" * 20000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 20000 + b"\r\n", 431),
        (b"GET /key.asc HTTP/1.0\r\n\r\n", 200),
        (b"\r\n\r\nGET /key.asc HTTP/1.0\r\n\r\n", 200),
        (b"GET http://example.org/key.asc HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 200),
        # A body is not read: what comes after it is no request of this client's.
        (b"GET /key.asc HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nGET /no HTTP/1.0\r\n\r\n", 200),
        (b"GET /key.asc HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200),
    ],
)  # fmt: skip
def test_requests_as_no_client_sends_them(server: Server, text: bytes, status: int) -> None:
    answer = said(server.port, text)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer


def test_a_connection_takes_many_requests(server: Server) -> None:
    asked = b"GET /key.asc HTTP/1.1\r\nHost: a\r\n\r\nHEAD /no HTTP/1.1\r\nHost: a\r\n\r\n" * 3
    answer = said(server.port, asked, end=True)
    assert answer.count(b"HTTP/1.1 200 OK") == answer.count(b"HTTP/1.1 404 Not Found") == 3
    assert answer.count(b"a key\n") == 3
    talking = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    ports = set()
    for _ in range(3):
        talking.request("GET", BIG_URL, headers={"Range": "bytes=-3"})
        assert talking.getresponse().read() == BIG[-3:]
        ports.add(talking.sock.getsockname()[1])
    assert len(ports) == 1
    talking.close()


def test_a_hundred_clients_at_once(server: Server) -> None:
    begin = threading.Barrier(100)

    def one(_number: int) -> bool:
        talking = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        talking.connect()
        begin.wait(60)
        talking.request("GET", BIG_URL)
        found = talking.getresponse().read()
        talking.close()
        return found == BIG

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(one, range(100)))


def test_a_client_that_goes_away_is_no_matter(tree: RepoTree) -> None:
    lines: list[str] = []
    with Server(tree.top, access=lines.append) as server:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port)) as talking:
                talking.sendall(f"GET {BIG_URL} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                talking.recv(1000)
                talking.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
        assert curl(server.url + "/key.asc")[0] == 200
        wait_for(lambda: not server._clients)
    assert lines[0] == f'127.0.0.1 "GET {BIG_URL}" 200 {len(BIG)}'


def test_a_slow_client_does_not_stay(tree: RepoTree) -> None:
    """Neither one that never ends its request, nor one that never reads its answer."""
    with Server(tree.top, limits=ServerLimits(request=0.3, piece=0.3, end=0.1)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as drop:
            drop.sendall(b"GET /key.asc HTTP/1.1\r\n")
            with pytest.raises(OSError):  # a reset, or a pipe that broke
                while True:
                    drop.sendall(b"a: b\r\n")
                    time.sleep(0.02)
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as full:
            full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for _ in range(4):
                full.sendall(f"GET {BIG_URL} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            wait_for(lambda: not server._clients)


def test_idle_clients_make_room(tree: RepoTree) -> None:
    with Server(tree.top, limits=ServerLimits(clients=4)) as server:
        idle = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(4)]
        for one in idle:
            one.request("GET", "/key.asc")
            assert one.getresponse().read() == b"a key\n"
        for _ in range(10):
            assert curl(server.url + "/key.asc")[0] == 200


def test_tls(tree: RepoTree, tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    with Server(tree.top, certificate=pem) as server:
        assert server.url.startswith("https://")
        assert curl(server.url + BIG_URL, "--cacert", str(pem))[2] == BIG
        part = curl(server.url + BIG_URL, "--cacert", str(pem), "-H", "Range: bytes=-5")
        assert (part[0], part[2]) == (206, BIG[-5:])
        old = subprocess.run(
            ["curl", "-sS", "--cacert", pem, "--tls-max", "1.1", server.url + "/key.asc"],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert old.returncode == 35
        assert b"HTTP" not in said(server.port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert curl(server.url + "/key.asc", "--cacert", str(pem))[0] == 200


def test_wrong_certificates(tree: RepoTree, tmp_path: Path) -> None:
    pem, text = certificate(tmp_path), tmp_path / "text"
    text.write_text("no key")
    locked = tmp_path / "locked.pem"
    argv = ["openssl", "genpkey", "-quiet", "-algorithm", "ED25519", "-aes256", "-pass", "pass:word"]
    subprocess.run([*argv, "-out", locked], check=True, capture_output=True)
    for certificate_, key, kind, said_ in (
        (None, pem, UsageError, "a key for TLS, and no certificate"),
        (pem, text, UsageError, "are no certificate with its key"),
        (pem, locked, UsageError, "the key of the certificate is encrypted"),
        (pem, tmp_path / "none", WrongState, f"cannot read {tmp_path}/none: No such file"),
    ):
        with pytest.raises(kind, match=said_) as raised:
            Server(tree.top, certificate=certificate_, key=key)
        assert "\n" not in raised.value.message


def test_where_it_cannot_listen(tree: RepoTree, server: Server, tmp_path: Path) -> None:
    def refused(**changed: object) -> FarmhandError:
        with pytest.raises(FarmhandError) as raised:
            Server(**{"top": tree.top, **changed})
        assert "\n" not in raised.value.message
        return raised.value

    taken = refused(port=server.port)
    assert isinstance(taken, Conflict)
    assert taken.message.startswith(f"127.0.0.1:{server.port} is taken: pid {os.getpid()}")
    assert isinstance(refused(address="192.0.2.1"), UsageError)
    assert isinstance(refused(address="no\nsuch.invalid"), UsageError)
    assert isinstance(refused(top=tmp_path / "none"), NotFound)


def test_ipv6(tree: RepoTree) -> None:
    with Server(tree.top, address="::1") as server:
        assert server.url == f"http://[::1]:{server.port}"
        assert curl(server.url + "/key.asc")[0] == 200
    with Server(tree.top, address="::") as server:
        for host in ("127.0.0.1", "[::1]"):
            assert curl(f"http://{host}:{server.port}/key.asc")[0] == 200


SERVE = """
import sys
from pathlib import Path
from repositories.serving.server import serve
def say(text):
    print(text, flush=True)
serve(Path(sys.argv[1]), address="127.0.0.1", port=int(sys.argv[2]), say=say)
say("ended")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_no_download(tree: RepoTree, number: signal.Signals) -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, tree.top, str(port)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == f"serving {tree.top} at http://127.0.0.1:{port}/\n"
    idle = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    idle.request("GET", "/key.asc")
    assert idle.getresponse().read() == b"a key\n"
    reading = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    reading.request("GET", BIG_URL)
    answer = reading.getresponse()
    begun = answer.read(1000)
    process.send_signal(number)
    assert idle.sock.recv(1) == b""  # so it has had the signal
    assert begun + answer.read() == BIG
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "ended\n", "")


def test_a_second_signal_ends_it_at_once(tree: RepoTree) -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, tree.top, str(port)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as full:
        full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        full.sendall(f"GET {BIG_URL} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        full.recv(100)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: _refuses(port))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "ended\n", "")


def _refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def test_apt(tmp_path: Path) -> None:
    """A channel and a generation, update and download, and "Hit" when nothing is new."""
    tree = RepoTree(tmp_path / "repository")
    deb = make_deb("hello")
    tree.publish("tested", ("hello", deb))
    apt = tmp_path / "apt"
    for name in ("etc/sources.list.d", "lists/partial", "cache/archives/partial", "down"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "conf").write_text(
        f'Dir::Etc "{apt}/etc";\nDir::State::lists "{apt}/lists";\nDir::State::status "{apt}/status";\n'
        f'Dir::Cache "{apt}/cache";\nAPT::Sandbox::User "";\nAPT::Architecture "amd64";\n'
        'Acquire::Languages "none";\nAcquire::http::Proxy "false";\n'
    )
    with Server(tree.top) as server:

        def get(*words: str) -> str:
            return subprocess.run(
                ["apt-get", *words], check=True, capture_output=True, text=True, cwd=apt / "down",
                env={**os.environ, "APT_CONFIG": str(apt / "conf"), "LC_ALL": "C"},
            ).stdout  # fmt: skip

        wait_for(lambda: _is_past(curl(server.url + RELEASE, head=True)[1]))
        for base in ("channels/tested", "generations/1", ""):
            sources = f"deb [trusted=yes] {server.url}/{base} tested main\n"
            (apt / "etc" / "sources.list").write_text(sources)
            assert "Get:" in get("update")
            get("download", "hello")
            (got,) = (apt / "down").iterdir()
            assert got.read_bytes() == deb
            got.unlink()
            assert "Hit:" in get("update")
            shutil.rmtree(apt / "lists")
            (apt / "lists" / "partial").mkdir(parents=True)
        tree.publish("tested", ("later", make_deb("later")))
        get("update")
        get("download", "later")


def test_a_file_that_may_not_be_read(tree: RepoTree) -> None:
    (tree.top / "barred").touch(mode=0)
    port = free_port()
    ordinary = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [*ordinary, sys.executable, "-c", SERVE, tree.top, str(port)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout
    process.stdout.readline()
    assert curl(f"http://127.0.0.1:{port}/barred")[0] == 403
    process.terminate()
    assert process.wait(60) == 0
