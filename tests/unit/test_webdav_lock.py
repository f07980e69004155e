"""The lock that several machines share, against real WebDAV servers, and against one that misbehaves."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from dav_servers import KINDS, PASSWORD, USER, DavServer, credentials, dav_server
from sshd_machine import wait_for
from tls import certificate

from builds import dav as client
from builds.dav import Dav, active_locks
from builds.dav_login import Credentials, Digest, login_for
from builds.webdav_lock import LockHolder, RemoteLock, break_lock, give_back, look
from host.web import trusted
from inventory.errors import (
    Busy,
    ConnectionLost,
    LeaseLost,
    Unsupported,
    UsageError,
    WrongState,
    spelled,
)

LONG, SHORT = 60.0, 2.0  # seconds
KNOWN = Credentials(USER, PASSWORD)
OFFICE = (
    '<?xml version="1.0"?><D:lockinfo xmlns:D="DAV:"><D:lockscope><D:exclusive/></D:lockscope>'
    "<D:locktype><D:write/></D:locktype><D:owner><D:href>Office of Satu</D:href></D:owner></D:lockinfo>"
)


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[DavServer]:
    with dav_server(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def apache() -> Iterator[DavServer]:
    with dav_server("apache") as found:
        yield found


def dav(url: str, known: Credentials | None = None) -> Dav:
    return Dav(url, known, None)


def holder(mark: str = "a1", who: str = "aleksi") -> LockHolder:
    return LockHolder(
        mark=mark, who=who, host="pc1", pid=77, farm="kata", since="2031-05-06T07:08:09+00:00"
    )  # fmt: skip


def lock_of(url: str, mark: str = "a1", timeout: float = LONG, who: str = "aleksi") -> RemoteLock:
    return RemoteLock(dav(url), holder(mark, who), timeout)


@contextmanager
def holding(lock: RemoteLock) -> Iterator[RemoteLock]:
    lock.take()
    try:
        yield lock
    finally:
        lock.give_back()


def fresh(server: DavServer, name: str) -> str:
    return f"{server.url}-{name}"


# -- with real servers ----------------------------------------------------------------------------


def test_one_has_it_and_the_other_is_told_who(server: DavServer) -> None:
    url = fresh(server, "two")
    with holding(lock_of(url)) as lock:
        with pytest.raises(Busy) as refused:
            lock_of(url, "b2", who="satu").take()
        for word in ("aleksi on pc1", "pid 77", "farm kata", "since 2031-05-06", "server's clock"):
            assert word in refused.value.message
        assert "unlock --remote --force" in spelled(refused.value.remedy)
        lock.tell_build("B7")
        assert "build B7" in str(look(dav(url)))
        lock.check()
        assert dav(url).ask("PUT", "x").status == 423
    seen = look(dav(url))
    assert (seen.held, seen.file, seen.foreign) == (False, None, False)
    assert dav(url).ask("GET").status == 404
    with holding(lock_of(url, "b2", who="satu")):
        assert "satu" in str(look(dav(url)))


def test_it_is_refreshed(server: DavServer) -> None:
    url = fresh(server, "kept")
    told: list[str] = []
    with holding(lock_of(url, timeout=SHORT)) as lock:
        lock.watch(told.append)
        assert lock.granted == 3600 if server.kind == "nginx" else lock.granted <= SHORT
        assert not threading.Event().wait(1.5 * SHORT)
        lock.check()
        assert look(dav(url)).held
    assert told == []


def test_broken_by_somebody_else(server: DavServer) -> None:
    url = fresh(server, "broken")
    told: list[str] = []
    lock = lock_of(url, timeout=SHORT)
    lock.take()
    lock.watch(told.append)
    seen = look(dav(url))
    assert seen.token
    break_lock(dav(url), seen)
    wait_for(lambda: told)
    assert lock.lost
    with pytest.raises(LeaseLost):
        lock.check()
    assert len(told) == 1
    assert not look(dav(url)).held  # also where the server made a new one for the refresh
    other = lock_of(url, "b2", who="satu")
    with holding(other):
        lock.give_back()  # takes nothing from whoever has it now
        other.check()
        assert "satu" in str(look(dav(url)))
        assert dav(url).ask("GET").status == 200


def test_lost_is_seen_before_publishing(server: DavServer) -> None:
    """Though the next refresh is far away."""
    url = fresh(server, "asked")
    lock = lock_of(url)
    lock.take()
    break_lock(dav(url), look(dav(url)))
    with pytest.raises(LeaseLost):
        lock.check()
    lock.give_back()
    assert not look(dav(url)).held


def test_another_ones_token_ends_nothing(server: DavServer) -> None:
    url = fresh(server, "token")
    with holding(lock_of(url)) as lock:
        give_back(dav(url), "urn:00000001")
        lock.check()
        assert look(dav(url)).file is not None


def test_what_a_dead_one_left(server: DavServer) -> None:
    url = fresh(server, "dead")
    with holding(lock_of(url)):
        note = dav(url).ask("GET").body.decode()
    assert dav(url).ask("PUT", note).good
    seen = look(dav(url))
    assert not seen.held
    assert "left behind by aleksi on pc1" in str(seen)
    second = lock_of(url, "b2", who="satu")
    before = second.take()
    try:
        assert before.file is not None
        assert before.file.mark == "a1"
        assert "satu" in dav(url).ask("GET").body.decode()
    finally:
        second.give_back()


def test_an_office_tools_own_lock(server: DavServer) -> None:
    url = fresh(server, "office")
    office = dav(url).ask("LOCK", OFFICE, Depth="0", Timeout="Second-60", Content_Type="text/xml")
    assert office.status in (200, 201)
    with pytest.raises(Busy) as refused:
        lock_of(url).take()
    shown = "somebody it doesn't name" if server.kind == "nginx" else "Office of Satu"
    assert shown in refused.value.message
    dav(url).ask("UNLOCK", Lock_Token=f"<{office.token}>")


def test_somebodys_document_stays(server: DavServer) -> None:
    url = fresh(server, "plan.odt")
    for text in ("a plan", "[1]", "{}", "x" * 100_000):
        assert dav(url).ask("PUT", text).good
        with pytest.raises(WrongState, match="not farmhand's"):
            lock_of(url).take()
        assert not look(dav(url)).held
        assert (server.root / Path(url).name).read_text() == text


def test_no_collection(server: DavServer) -> None:
    with pytest.raises(WrongState) as refused:
        lock_of(f"http://127.0.0.1:{server.port}/none/kata.lock").take()
    assert "make the collection" in spelled(refused.value.remedy)


@pytest.mark.parametrize(
    ("kind", "login"),
    [("apache", "basic"), ("apache", "digest"), ("wsgidav", "basic"), ("wsgidav", "digest")],
)
def test_logins(kind: str, login: str, tmp_path: Path) -> None:
    known = Credentials.read(credentials(tmp_path))
    with dav_server(kind, login) as server:
        lock = RemoteLock(dav(server.url, known), holder(), SHORT)
        with holding(lock):
            assert not threading.Event().wait(SHORT)
            lock.check()
        for wrong in (Credentials(USER, "other"), None):
            with pytest.raises(UsageError) as refused:
                RemoteLock(dav(server.url, wrong), holder(), LONG).take()
            assert PASSWORD not in refused.value.message
        logs = [path for path in server.directory.iterdir() if path.name in ("error", "out")]
        assert not any(PASSWORD in path.read_text() for path in logs)


def test_apache_ends_a_lock_for_its_own_login_alone() -> None:
    with dav_server("apache", "digest") as server:
        server.add_user("satu", "pw")
        with holding(RemoteLock(dav(server.url, KNOWN), holder(), LONG)) as lock:
            other = dav(server.url, Credentials("satu", "pw"))
            with pytest.raises(WrongState) as refused:
                break_lock(other, look(other))
            assert "the login that took it" in spelled(refused.value.remedy)
            lock.check()


def test_server_dies_and_comes_back() -> None:
    """Apache keeps its locks; what it doesn't answer meanwhile is no loss."""
    with dav_server("apache") as server:
        lock = lock_of(server.url, timeout=20)
        with holding(lock):
            server.stop()
            with pytest.raises(LeaseLost, match="nobody knows"):
                lock.check()
            assert not lock.lost
            server.start()
            lock.check()


def test_server_forgets() -> None:
    with dav_server("wsgidav") as server:
        told: list[str] = []
        lock = lock_of(server.url, timeout=SHORT)
        lock.take()
        lock.watch(told.append)
        server.stop()
        server.start()
        wait_for(lambda: told)
        assert "knows it no more" in told[0] or "could not be refreshed" in told[0]
        lock.give_back()


def test_server_gone_past_the_end() -> None:
    with dav_server("apache") as server:
        told: list[str] = []
        lock = lock_of(server.url, timeout=SHORT)
        lock.take()
        lock.watch(told.append)
        server.stop()
        wait_for(lambda: told)
        assert "could not be refreshed before its end" in told[0]
        lock.give_back()


_KEEPER = """
import sys
from builds.dav import Dav
from builds.webdav_lock import LockHolder, RemoteLock
since = "1970-01-01T00:00:00+00:00"
holder = LockHolder(mark="dead", who="aleksi", host="pc1", pid=1, farm="kata", since=since)
RemoteLock(Dav(sys.argv[1], None, None), holder, float(sys.argv[2])).take()
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["apache", "wsgidav"])
def test_killed_and_taken_over(kind: str) -> None:
    """Whatever the clocks say: the dead one's is 60 years behind."""
    with dav_server(kind) as server:
        root = Path(__file__).parents[2]
        child = subprocess.Popen(
            [sys.executable, "-c", _KEEPER, server.url, "3"], cwd=root, stdout=subprocess.PIPE,
            stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)},
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == b"taken\n"
        with pytest.raises(Busy):
            lock_of(server.url, "b2").take()
        child.kill()
        child.communicate()
        second = lock_of(server.url, "b2", who="satu")

        def taken() -> bool:
            try:
                before = second.take()
            except Busy:
                return False
            assert before.file is not None
            assert before.file.mark == "dead"
            return True

        wait_for(taken)
        second.check()
        second.give_back()


def test_certificates_are_checked(tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    with dav_server("apache", pem=pem) as server:
        with pytest.raises(ConnectionLost, match="isn't trusted"):
            RemoteLock(Dav(server.url, None, trusted(server.url, None)), holder(), LONG).take()
        lock = RemoteLock(Dav(server.url, None, trusted(server.url, pem)), holder(), LONG)
        with holding(lock):
            lock.check()


# -- with one that misbehaves ---------------------------------------------------------------------


class _Crooked(ThreadingHTTPServer):
    """Passes on to a real server, but for what ``instead`` answers: raw bytes; b"" says nothing, and
    waits."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, real: DavServer) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.real = real
        self.instead: Callable[[str, bytes], bytes | None] = lambda _method, _answer: None
        self.let_go = threading.Event()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/crooked.lock"


class _Passing(BaseHTTPRequestHandler):
    server: _Crooked

    def _pass(self) -> None:
        self.server.asked.append(self.command)
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        head = f"{self.command} {self.path} HTTP/1.0\r\n{str(self.headers).strip()}\r\n\r\n"
        head = head.replace("\n\r", "\n").replace("\r\r", "\r")
        with socket.create_connection(("127.0.0.1", self.server.real.port), timeout=30) as real:
            real.sendall(re.sub(r"\r?\n", "\r\n", head).encode() + body)
            answer = b"".join(iter(lambda: real.recv(65536), b""))
        instead = self.server.instead(self.command, answer)
        if instead == b"":
            self.server.let_go.wait(60)
        self.wfile.write(answer if instead is None else instead)

    do_OPTIONS = do_LOCK = do_UNLOCK = do_PROPFIND = do_GET = do_PUT = do_DELETE = _pass

    def log_message(self, *_arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def crooked(apache: DavServer) -> Iterator[_Crooked]:
    between = _Crooked(apache)
    thread = threading.Thread(target=between.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield between
    finally:
        between.let_go.set()
        between.shutdown()
        between.server_close()
        for left in apache.root.glob("crooked.lock*"):
            left.unlink()


def answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = (f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", "")
    return "\r\n".join(lines).encode() + body


def only(method: str, instead: bytes) -> Callable[[str, bytes], bytes | None]:
    return lambda asked, _answer: instead if asked == method else None


def direct(between: _Crooked) -> Dav:
    """The real server, without who is between."""
    return dav(f"http://127.0.0.1:{between.real.port}/crooked.lock")


def test_no_locks_there(crooked: _Crooked) -> None:
    for said in (answer("200 OK", b"", "DAV: 1, 3"), answer("405 Method Not Allowed"), answer("200 OK")):
        crooked.instead = only("OPTIONS", said)
        with pytest.raises(Unsupported, match="has no locks"):
            lock_of(crooked.url).take()
    assert set(crooked.asked) == {"OPTIONS"}


def test_answers_that_are_none(crooked: _Crooked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "LIMIT", 1.0)
    huge = answer("200 OK", b"<" * 2**20)
    cut = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n<?xml"
    endless = b"HTTP/1.1 100 Continue\r\n\r\n" * 999
    for said in (b"", b"\0\xff\n", b"HTTP/1.1 200 OK\r\n", huge, cut, endless):
        for method in ("OPTIONS", "LOCK", "GET", "PUT"):
            crooked.instead = only(method, said)
            if said.endswith(b"OK\r\n") and method in ("GET", "PUT"):
                continue  # who can tell it from an answer without headers?
            with pytest.raises((ConnectionLost, WrongState, Unsupported)):
                lock_of(crooked.url).take()
            crooked.instead = only("", b"")
            assert not look(direct(crooked)).held, (said[:40], method)


def test_a_name_that_no_host_can_have_is_told_as_such() -> None:
    with pytest.raises(ConnectionLost, match=r"can't be reached: a\.\.example can't be a host name"):
        dav("http://a..example/lock").ask("GET")


def test_a_lock_whose_answer_was_lost_is_ended(crooked: _Crooked) -> None:
    bad_gateway = answer("502 Bad Gateway")
    for said in (lambda real: real[:30], lambda real: real[:-20], lambda _real: bad_gateway):
        crooked.instead = lambda asked, real, said=said: said(real) if asked == "LOCK" else None
        with pytest.raises((ConnectionLost, WrongState)):
            lock_of(crooked.url).take()
        assert crooked.asked.pop() == "UNLOCK"
        assert not look(direct(crooked)).held


def test_redirects_are_not_followed(crooked: _Crooked) -> None:
    for method in ("OPTIONS", "LOCK", "PUT"):
        crooked.instead = only(method, answer("302 Found", b"", "Location: http://evil.example/\x1b[2J"))
        with pytest.raises(WrongState, match=r"redirects to http://evil.example/\\x1b") as refused:
            RemoteLock(dav(crooked.url, KNOWN), holder(), LONG).take()
        assert "\x1b" not in refused.value.message
    crooked.instead = only("", b"")
    assert not look(direct(crooked)).held


def test_refresh_refused(crooked: _Crooked) -> None:
    told: list[str] = []
    lock = lock_of(crooked.url, timeout=LONG)
    lock.take()
    lock.watch(told.append)
    crooked.instead = only("LOCK", answer("503 Service Unavailable"))
    with pytest.raises(LeaseLost, match="nobody knows"):
        lock.check()
    assert told == []
    crooked.instead = only("LOCK", answer("412 Precondition Failed"))
    with pytest.raises(LeaseLost, match="is lost"):
        lock.check()
    assert len(told) == 1
    crooked.instead = only("", b"")
    with pytest.raises(LeaseLost):  # for good
        lock.check()
    lock.give_back()


def test_a_bomb_is_no_xml() -> None:
    entity = b'<!DOCTYPE a [<!ENTITY b "x">]>'
    bomb = entity + b'<a xmlns="DAV:"><activelock>&b;</activelock></a>'
    assert active_locks(bomb) == []
    assert active_locks(b"<a>" * 20_000) == []
    assert active_locks(b"\xff\0") == []
    deep = b"<a>" * 9000 + b"</a>" * 9000
    assert active_locks(deep) == []
    (one,) = active_locks(
        b'<a xmlns="DAV:"><activelock><owner><href>X\xc2\x9b2J</href></owner><timeout>Infinite</timeout>'
        b"<locktoken><href>a&gt;b</href></locktoken></activelock></a>"
    )
    assert (one.token, one.owner, one.left) == ("", "X\\x9b2J", None)


# -- logins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "response"),
    [
        ("MD5", "8ca523f5e9506fed4657c9700eebdbec"),
        ("SHA-256", "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    ],
)
def test_digest_of_the_standard(algorithm: str, response: str) -> None:
    """The examples of RFC 7616, section 3.9.1."""
    challenge = (
        'Digest realm="http-auth@example.org", qop="auth, auth-int", algorithm=%s, '
        'nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v", '
        'opaque="FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"'
    )
    known = Credentials("Mufasa", "Circle of Life")
    login = login_for([challenge % algorithm], known)
    assert isinstance(login, Digest)
    cnonce = "f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ"
    assert f'response="{response}"' in login.header("GET", "/dir/index.html", cnonce)
    both = login_for([f'Basic realm="x", {challenge % "MD5"}', challenge % "SHA-256"], known)
    assert isinstance(both, Digest)
    assert both.challenge["algorithm"] == "SHA-256"


def test_other_logins() -> None:
    assert login_for(["Negotiate, NTLM"], KNOWN) is None
    assert login_for(['Digest realm="a", nonce="b", algorithm=SHA-512-256'], KNOWN) is None
    assert login_for(['Digest realm="a", nonce="b", qop="auth-int"'], KNOWN) is None
    assert login_for(['Digest realm="a\x1b", nonce="b"'], KNOWN) is None
    basic = login_for(['Negotiate, Digest realm="a, Basic x=1", Basic realm="x"'], KNOWN)
    assert basic is not None
    assert basic.header("GET", "/").startswith("Basic ")
    assert PASSWORD not in repr(KNOWN)
    assert PASSWORD not in repr(basic)


def test_files_of_credentials(tmp_path: Path) -> None:
    path = credentials(tmp_path)
    assert Credentials.read(path) == KNOWN
    path.chmod(0o640)
    with pytest.raises(WrongState, match="others may read"):
        Credentials.read(path)
    path.chmod(0o600)
    for text in (b"", b"alone", b":x", b"\xff:x", b"a\x1b:b", json.dumps("x").encode()):
        path.write_bytes(text)
        with pytest.raises(UsageError, match="USER:PASSWORD"):
            Credentials.read(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(WrongState):
        Credentials.read(link)
