"""Sessions with a XenAPI server (XenServer, XCP-ng): connections, certificates, logins, time limits.

The server takes one call at a time per connection, so calls that run side by side have a session each,
kept for the next caller. A call is never sent twice: a connection that breaks says nothing about whether
its call was done, and what changes things must be looked at before it is done again. (Only a session
that the server no longer knows is renewed and its call sent again: that call was refused.)

Contention blocks in the server, 20 s and more, instead of failing; so a call's limit is minutes. A
server that is gone is noticed by TCP's keep-alive long before.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import os
import socket
import ssl
import threading
import time
import xmlrpc.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit
from xml.parsers.expat import ExpatError

from host.file_lock import FileLock
from host.files import file_error, make_directory, read_secret
from host.run import MASK
from hypervisors.xenapi.errors import XenApiError, translate
from inventory.errors import Call, DriverFailed, FarmhandError, TimedOut, UsageError, WrongState

CONNECT_LIMIT = 10.0
"""Seconds until a server must have taken a connection."""
CALL_LIMIT = 600.0
"""Seconds that one call may take. The server's own back-off is part of it."""
_IDLE = 4.0  # seconds after which a kept connection is made anew: the server may have closed it
_ORIGINATOR = "farmhand"
_API = "1.0"  # the version every server speaks; what it offers is in the data model
_CHUNK = 2**20
_CREDENTIALS = 4096  # bytes of a file of them
_IN_TURN = ("VM.clone", "VM.snapshot", "VDI.create", "VDI.destroy", "VDI.resize")
"""One of these that comes while another goes on in the same storage repository is refused inside the
server, and tried again after a random time, up to 19 s (xapi 23.10, measured)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XenApiServer:
    """Where the server is and how it is known to be the right one: by a CA's certificate file, by the
    SHA-256 of its own certificate (64 hexadecimal digits), by the system's CAs; or ``insecure``.
    ``turns``: a file that all who use one storage repository lock for each change of it."""

    url: str
    credentials: Path
    ca: Path | None = None
    fingerprint: str = ""
    insecure: bool = False
    turns: Path | None = None
    connect_limit: float = CONNECT_LIMIT
    call_limit: float = CALL_LIMIT


def read_credentials(file: Path) -> tuple[str, str]:
    """User and password: the first two lines of a file that is ours, and that nobody else may read.
    WrongState, UsageError."""
    lines_wanted = "the user's name on its first line, the password on its second, chmod 600"
    try:
        lines = read_secret(file, "the credentials", _CREDENTIALS).decode().splitlines()
    except WrongState as error:
        error.remedy = error.remedy or lines_wanted
        raise
    except UnicodeDecodeError:
        raise UsageError(f"the credentials {file} are not text", remedy=lines_wanted) from None
    if len(lines) < 2 or not lines[0].strip() or not lines[1]:
        raise UsageError(f"the credentials {file} need two lines", remedy=lines_wanted)
    return lines[0].strip(), lines[1]


class _PinnedConnection(http.client.HTTPSConnection):
    """Nothing is sent to a server whose certificate isn't the pinned one."""

    def __init__(self, host: str, server: XenApiServer, context: ssl.SSLContext) -> None:
        super().__init__(host, timeout=server.connect_limit, context=context)
        self._server = server

    def connect(self) -> None:
        super().connect()
        assert isinstance(self.sock, ssl.SSLSocket)
        if self._server.fingerprint:
            shown = hashlib.sha256(self.sock.getpeercert(binary_form=True) or b"").hexdigest()
            if not hmac.compare_digest(shown, self._server.fingerprint.replace(":", "").lower()):
                self.close()
                raise ssl.SSLCertVerificationError(f"its certificate's SHA-256 is {shown}")
        _keep_alive(self.sock)
        self.sock.settimeout(self._server.call_limit)


class _PlainConnection(http.client.HTTPConnection):
    def __init__(self, host: str, server: XenApiServer) -> None:
        super().__init__(host, timeout=server.connect_limit)
        self._server = server

    def connect(self) -> None:
        super().connect()
        _keep_alive(self.sock)
        self.sock.settimeout(self._server.call_limit)


def _keep_alive(sock: socket.socket) -> None:
    """A server that vanished is noticed within about a minute, however long the call may take."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def connection(server: XenApiServer, url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme == "http":  # a test's; the farm file takes https only
        return _PlainConnection(parts.netloc, server)
    return _PinnedConnection(parts.netloc, server, _context(server))


def _context(server: XenApiServer) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=server.ca)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"cannot read the CA certificate {server.ca}: {error.strerror or error}",
            remedy="name a PEM file",
        ) from None
    if server.fingerprint or server.insecure:  # the pin is checked once connected
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


class _Transport(xmlrpc.client.Transport):
    """Over one kept connection. xmlrpc's own sends a call again when its connection broke: not here."""

    def __init__(self, server: XenApiServer, url: str) -> None:
        super().__init__(use_builtin_types=False)
        self._server, self._url, self._last = server, url, 0.0

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        if self._connection and self._connection[1] is not None and host == self._connection[0]:
            if time.monotonic() - self._last < _IDLE:
                return self._connection[1]
            self.close()
        made = connection(self._server, self._url)
        self._connection = host, made
        return made

    def request(self, host: Any, handler: str, request_body: Any, verbose: bool = False) -> Any:
        try:
            return self.single_request(host, handler, request_body, verbose)
        finally:
            self._last = time.monotonic()


_ASKING = ("event", "session", "task")  # classes
_UNCHANGING = ("pool.sync_database", "SR.scan", "VDI.update", "VM.assert_can_boot_here")


def is_change(name: str) -> bool:
    """Whether a call of that name may change what others see."""
    class_, _, verb = name.partition(".")
    return not (class_ in _ASKING or verb.startswith("get_") or name in _UNCHANGING)


class Sessions:
    """Sessions with one pool, shared by threads. Nothing is connected before the first call."""

    def __init__(self, server: XenApiServer, *, count: Callable[[str], None] | None = None) -> None:
        self._server = server
        self._url = server.url.rstrip("/")
        self._idle: list[Any] = []
        self._guard = threading.Lock()
        self._count = count or (lambda _name: None)
        self.guards: list[Callable[[], None]] = []
        """Called before each change of anything but the pool itself; what they raise abandons it."""
        self.renewed = 0
        """So many times the server had forgotten a session within a call, and it was logged in anew: it
        expired, or the server was started again."""

    @property
    def url(self) -> str:
        """The URL of the pool's master, once that is known."""
        return self._url

    def call(self, name: str, *arguments: object) -> Any:
        """``name`` such as "VM.clone"; the session is put first. XenApiError with the server's words;
        TimedOut and DriverFailed where it can't be known whether the call was done."""
        with self._session() as session, self._turn(name):
            if is_change(name) and not name.startswith("pool."):
                self._check()
            self._count(name)
            handle = session.handle
            try:
                return self._doing(name, lambda: session.xenapi_request(name, arguments))
            finally:
                if session.handle != handle:
                    with self._guard:
                        self.renewed += 1

    def _check(self) -> None:
        for guard in tuple(self.guards):
            guard()

    @contextlib.contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        path = self._server.turns
        with contextlib.ExitStack() as held:
            if path is not None and name in _IN_TURN:
                make_directory(path.parent, mode=0o711)
                try:
                    held.enter_context(FileLock(path).hold())
                except OSError as error:
                    raise file_error(error, path, "lock") from error
            yield

    def put(self, vdi: str, image: Path, size: int) -> None:
        """Write a raw image into a new VDI of ``size`` bytes (PUT /import_raw_vdi): up to where the
        file's last data end, for beyond that both are zeros."""
        size = min(size, _data_end(image))
        if not size:
            return
        with self._session() as session, image.open("rb") as file:
            self._check()
            self._count("PUT /import_raw_vdi")
            query = urlencode({"session_id": session.handle, "vdi": vdi, "format": "raw"})
            link = connection(self._server, self._url)
            with contextlib.closing(link):
                self._doing("import_raw_vdi", lambda: self._put(link, query, file, size))

    def _put(self, link: http.client.HTTPConnection, query: str, file: Any, size: int) -> None:
        link.putrequest("PUT", f"/import_raw_vdi?{query}")
        link.putheader("Content-Length", str(size))
        link.endheaders()
        left = size
        cut_off: OSError | None = None
        try:
            while left:
                piece = file.read(min(_CHUNK, left)) or bytes(min(_CHUNK, left))
                link.send(piece)
                left -= len(piece)
        except OSError as error:
            cut_off = error  # it may have said why before it hung up
        try:
            answer = link.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise cut_off or error from None
        answer.read()
        if answer.status != 200:
            raise DriverFailed(
                f"{self._url}: the disk's content was refused: HTTP {answer.status} {answer.reason}",
                remedy="see /var/log/xensource.log on the server",
            )
        if cut_off:  # it can't have all of it, whatever it says
            raise cut_off

    def close(self) -> None:
        with self._guard:
            idle, self._idle = self._idle, []
        for session in idle:
            with contextlib.suppress(Exception):  # of a server that is gone, or has forgotten it
                session.xenapi_request("session.logout", ())
            session.transport.close()

    @contextlib.contextmanager
    def _session(self) -> Iterator[Any]:
        with self._guard:
            session = self._idle.pop() if self._idle else None
        if session is None:
            session = self._log_in()
        try:
            yield session
        except XenApiError:
            self._keep(session)
            raise
        except BaseException:
            session.transport.close()  # an answer may still come: not to the next call
            self._keep(session)
            raise
        self._keep(session)

    def _keep(self, session: Any) -> None:
        with self._guard:
            self._idle.append(session)

    def _log_in(self) -> Any:
        """At the pool's master: a slave says who that is (HOST_IS_SLAVE). Its certificate is checked in
        the same way, and the credentials go nowhere before."""
        who = read_credentials(self._server.credentials)
        for _ in range(2):
            session = self._open()
            self._count("session.login_with_password")
            try:
                log_in = partial(session.login_with_password, *who, _API, _ORIGINATOR)
                self._doing("log in", log_in, secret=who[1])
            except XenApiError as error:
                session.transport.close()
                if error.code == "HOST_IS_SLAVE" and len(error.parameters) == 1:
                    self._url = _at(self._url, error.parameters[0])
                    continue
                told = XenApiError([_masked(part, who[1]) for part in (error.code, *error.parameters)])
                raise translate(told, f"log in at {self._url} as {who[0]}") from None
            except FarmhandError:
                session.transport.close()
                raise
            return session
        raise DriverFailed(
            f"{self._server.url}: the host it names as the pool's master says it is none",
            remedy="see xe pool-list params=master on the pool",
        )

    def _open(self) -> Any:
        try:
            import XenAPI
        except ImportError:
            raise DriverFailed(
                "the Python package XenAPI is missing", remedy="requirements.in names it"
            ) from None
        return XenAPI.Session(self._url, transport=_Transport(self._server, self._url))

    def _doing(self, what: str, call: Callable[[], Any], *, secret: str = "") -> Any:
        """``secret``: what it is told, and may say again in its errors: shown to nobody."""
        from XenAPI import Failure

        try:
            return call()
        except Failure as failure:
            raise XenApiError([str(part) for part in failure.details]) from None
        except ssl.SSLCertVerificationError as error:
            raise DriverFailed(
                f"{self._url} is not trusted: {getattr(error, 'verify_message', '') or error}",
                remedy="give the host its 'ca' file, or its certificate's SHA-256 as 'fingerprint', "
                "in the farm file, once you have compared it on the server",
            ) from None
        except TimeoutError:
            raise TimedOut(
                f"{self._url}: {what}: no answer within the time limit",
                remedy=("the server may still do it: look with xe task-list, then ", Call("recover")),
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise DriverFailed(
                f"{self._url}: {what}: {_masked(str(error), secret) or type(error).__name__}",
                remedy=("is the server up, and xapi running there? ", Call("recover"), " goes on"),
            ) from None
        except (xmlrpc.client.Error, ExpatError, ValueError, TypeError, LookupError) as error:
            said = _masked(str(error), secret)[:200]
            raise DriverFailed(
                f"{self._url}: {what}: it answers like no XenAPI server: {said}",
                remedy="check the URL",
            ) from None


def _masked(text: str, secret: str) -> str:
    """Also as Python's errors quote it."""
    for form in (secret, repr(secret)[1:-1]):
        text = text.replace(form, MASK) if form else text
    return text


def _data_end(image: Path) -> int:
    """Where the last data of a sparse file end (lseek(2)), in bytes, in whole MiB."""
    with image.open("rb") as file:
        size, end = os.fstat(file.fileno()).st_size, 0
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing but a hole from here on
                break
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
    return -(-end // _CHUNK) * _CHUNK


def _at(url: str, address: str) -> str:
    """The same scheme and port at another address."""
    parts = urlsplit(url)
    host = f"[{address}]" if ":" in address else address
    if "." not in address and ":" not in address:
        host = address
    return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}"
