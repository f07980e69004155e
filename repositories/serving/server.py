"""The embedded server: a repository over HTTP/1.1, where there is no nginx for it.

One thread, in which each client is a task. What a client can take is bounded: connections, the size of
a request, the time until it is whole, the time that a piece of an answer takes. More clients than that
wait in the kernel's queue, and idle ones make room for them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from types import TracebackType

from host.files import file_error, out_of_files
from host.ports import holders
from host.printable import one_line
from host.processes import described
from host.run import Runner
from inventory.errors import Conflict, FarmhandError, NotFound, UsageError, WrongState
from repositories.serving.files import ServedFile, open_served
from repositories.serving.http import (
    Answered,
    BadRequest,
    Request,
    Resource,
    answer,
    content_type,
    http_date,
    parse,
)
from repositories.serving.pairs import Asker, Pairs

_PIECE = 2**20
_YEAR = 365 * 24 * 3600
_SPARE_FILES = 64
_GONE = (ConnectionError, TimeoutError, asyncio.IncompleteReadError, ssl.SSLError)
"""What a client does that goes away, or that ends nothing: it is not told of."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """``clients``: connections at once. ``head``: bytes of a request. Seconds: ``request``, from one
    answer until the next request is whole; ``piece``, for each MiB of an answer; ``end``, for what is
    under way when the server ends."""

    clients: int = 512
    head: int = 16 * 2**10
    request: float = 30
    piece: float = 300
    end: float = 5


class Server:
    """Serves a repository's directory, from ``with Server(...) as server`` until the block's end, in a
    thread of its own. It listens when it is made: so ``url`` is known. ``port`` 0: any free one.
    ``key``: absent, it is in the certificate's file. ``access`` is told of each request, in a line.

    NotFound: there is no such directory; Conflict: the port is taken; UsageError, WrongState: what is
    wrong with address, certificate or key."""

    def __init__(
        self,
        top: Path,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        certificate: Path | None = None,
        key: Path | None = None,
        access: Callable[[str], None] | None = None,
        limits: ServerLimits = ServerLimits(),
    ) -> None:
        if certificate is None and key is not None:
            raise UsageError("a key for TLS, and no certificate", remedy="give both, or none")
        self._tls = _tls(certificate, key or certificate) if certificate else None
        self._limits, self._access = limits, access
        self._slots = asyncio.Semaphore(min(limits.clients, _room_for_clients()))
        self._clients: dict[asyncio.Task[None], _Visitor] = {}
        self._pairs = Pairs()
        self._ending = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self._top = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"there is no directory {top} to serve") from error
        except OSError as error:
            raise file_error(error, top, "open") from error
        try:
            self._listening = _listen(address, port)
        except BaseException:
            os.close(self._top)
            raise
        host, self.port, *_ = self._listening.getsockname()
        scheme, host = "https" if self._tls else "http", f"[{host}]" if ":" in host else host
        self.url = f"{scheme}://{host}:{self.port}"

    def close(self) -> None:
        self._listening.close()
        os.close(self._top)

    # ---- In a thread

    def __enter__(self) -> Server:
        ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self.run(ready.set)), name="repository server", daemon=True
        )
        self._thread.start()
        ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self.end)
        self._thread.join()
        self.close()

    # ---- In an event loop

    def end(self) -> None:
        """Within the loop: take no more, and end when what is under way is done, or at the second
        call."""
        if self._ending.is_set():
            for task in self._clients:
                task.cancel()
        self._ending.set()

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_unhandled)
        accepting = asyncio.create_task(self._accept())
        ready()
        try:
            await self._ending.wait()
        finally:
            accepting.cancel()
            self._listening.close()  # later ones are refused, not kept waiting
            for task, client in self._clients.items():
                if client.idle:
                    task.cancel()
            if self._clients:
                _, late = await asyncio.wait(self._clients, timeout=self._limits.end)
                for task in late:
                    task.cancel()
                await asyncio.gather(accepting, *late, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if self._slots.locked():
                self._make_room()
            await self._slots.acquire()
            try:
                connection, peer = await loop.sock_accept(self._listening)
            except OSError:  # no files left, or the client has gone again
                self._slots.release()
                await asyncio.sleep(0.1)
                continue
            except BaseException:
                self._slots.release()
                raise
            client = _Visitor(peer[0])
            task = asyncio.create_task(self._talk(connection, client))
            self._clients[task] = client
            task.add_done_callback(self._left)

    def _make_room(self) -> None:
        """For somebody who may be waiting: the first of those goes that are idle after an answer."""
        for task, client in self._clients.items():
            if client.idle and client.served:
                task.cancel()
                break

    def _left(self, task: asyncio.Task[None]) -> None:
        del self._clients[task]
        self._slots.release()
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error  # a defect of ours: the loop's handler shows it

    async def _talk(self, connection: socket.socket, client: _Visitor) -> None:
        """Answer one client until it goes."""
        loop = asyncio.get_running_loop()
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = asyncio.StreamReader(limit=self._limits.head, loop=loop)
            transport, protocol = await loop.connect_accepted_socket(
                lambda: asyncio.StreamReaderProtocol(reader),
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=self._limits.request if self._tls else None,
                ssl_shutdown_timeout=self._limits.end if self._tls else None,
            )
        except (*_GONE, OSError):
            connection.close()
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            while not self._ending.is_set() and await self._next(reader, writer, client):
                client.idle = True
            async with asyncio.timeout(self._limits.end):
                await _hang_up(reader, writer, self._ending)
        except (*_GONE, OSError):
            pass
        finally:
            transport.abort()

    async def _next(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: _Visitor
    ) -> bool:
        """Take a request, and answer it. Returns whether there may be another."""
        try:
            async with asyncio.timeout(self._limits.request):
                head = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            return False
        except asyncio.LimitOverrunError:
            await self._refuse(writer, client, None, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return False
        client.idle, client.served = False, True
        if not (head := head.strip(b"\r\n")):
            return True  # empty lines between requests are passed over: RFC 9112, 2.2
        try:
            request = parse(head)
        except BadRequest as error:
            await self._refuse(writer, client, None, error.status)
            return False
        # The last places are for those who wait: who is served now may come again.
        keep = request.persistent and self._slots_left()
        try:
            found = self._open(client, request)
        except OSError as error:
            await self._refuse(writer, client, request, _status(error), keep=keep)
            return keep
        try:
            return await self._send(writer, client, request, found, keep=keep)
        finally:
            os.close(found.handle)

    def _open(self, client: _Visitor, request: Request) -> ServedFile:
        """OSError, as ``open_served``."""
        asker = Asker.of(client.address, request.fields)
        if (given := self._pairs.signature(asker, request.path)) is not None:
            with contextlib.suppress(FileNotFoundError):  # collected since
                found = open_served(self._top, given.place)
                return replace(found, modified=given.modified, lasting=False)
        found = open_served(self._top, request.path)
        if request.method == "GET":
            self._pairs.note(asker, request.path, found)
        return found

    def _slots_left(self) -> bool:
        return not self._ending.is_set() and not self._slots.locked()

    async def _send(
        self,
        writer: asyncio.StreamWriter,
        client: _Visitor,
        request: Request,
        found: ServedFile,
        *,
        keep: bool,
    ) -> bool:
        now = time.time()
        it = Resource(found.size, found.tag, found.modified, found.lasting, now)
        part = answer(request, it)
        cache = f"public, max-age={_YEAR}, immutable" if found.lasting else "no-cache"
        fields = [
            ("ETag", it.etag),
            ("Last-Modified", http_date(it.last_modified)),
            ("Cache-Control", cache),
            ("Accept-Ranges", "bytes"),
        ]
        if part.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            fields += [
                ("Content-Type", content_type(request.path[-1])),
                ("Content-Length", str(part.length)),
            ]
        elif part.status != HTTPStatus.NOT_MODIFIED:
            fields.append(("Content-Length", "0"))
        if part.status == HTTPStatus.PARTIAL_CONTENT:
            last = part.start + part.length - 1
            fields.append(("Content-Range", f"bytes {part.start}-{last}/{it.size}"))
        elif part.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            fields.append(("Content-Range", f"bytes */{it.size}"))
        self._note(client, request, part.status, part.length)
        writer.write(_head(part.status, fields, now, keep=keep))
        if request.method == "GET" and not await self._body(writer, found.handle, part):
            return False
        await self._drain(writer)
        return keep

    async def _body(self, writer: asyncio.StreamWriter, handle: int, part: Answered) -> bool:
        """Whether all of it was sent: a file that was cut off meanwhile can't be."""
        loop, start, end = asyncio.get_running_loop(), part.start, part.start + part.length
        with os.fdopen(os.dup(handle), "rb") as file:
            while start < end:
                async with asyncio.timeout(self._limits.piece):
                    piece = min(_PIECE, end - start)
                    sent = await loop.sendfile(writer.transport, file, start, piece)
                if sent == 0:
                    writer.transport.abort()
                    return False
                start += sent
        return True

    async def _refuse(
        self,
        writer: asyncio.StreamWriter,
        client: _Visitor,
        request: Request | None,
        status: HTTPStatus,
        *,
        keep: bool = False,
    ) -> None:
        text = f"{status.value} {status.phrase}\n".encode()
        fields = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(text))),
            ("Cache-Control", "no-store"),  # what isn't there may come
        ]
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            fields.append(("Allow", "GET, HEAD"))
        self._note(client, request, status, len(text))
        writer.write(_head(status, fields, time.time(), keep=keep))
        if request is None or request.method != "HEAD":
            writer.write(text)
        await self._drain(writer)

    async def _drain(self, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(self._limits.piece):
            await writer.drain()

    def _note(self, client: _Visitor, request: Request | None, status: HTTPStatus, size: int) -> None:
        if self._access is not None:
            asked = f"{request.method} {one_line(request.target, 500)}" if request else "-"
            self._access(f'{client.address} "{asked}" {status.value} {size}')


@dataclass(slots=True)
class _Visitor:
    """``idle``: all that it asked for is answered. ``served``: it has asked for something."""

    address: str
    idle: bool = True
    served: bool = False


async def _hang_up(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ending: asyncio.Event
) -> None:
    """Say that no more comes, and pass over what the client still sends: it would lose the last answer
    to a reset (RFC 9112, 9.6)."""
    if writer.can_write_eof() and not ending.is_set():
        writer.write_eof()
        while await reader.read(_PIECE):
            pass
    writer.close()
    await writer.wait_closed()


def serve(
    top: Path,
    *,
    address: str,
    port: int,
    certificate: Path | None = None,
    key: Path | None = None,
    say: Callable[[str], None],
    access: Callable[[str], None] | None = None,
) -> None:
    """Serve a repository until SIGINT, SIGTERM or SIGHUP: then what is under way has some seconds to
    end; a second one ends it at once. As ``Server``; in the main thread only."""
    server = Server(
        top, address=address, port=port, certificate=certificate, key=key, access=access
    )  # fmt: skip
    try:
        asyncio.run(_until_signal(server, lambda: say(f"serving {top} at {server.url}/")))
    finally:
        server.close()


async def _until_signal(server: Server, ready: Callable[[], None]) -> None:
    with _handling(server.end, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        await server.run(ready)


@contextlib.contextmanager
def _handling(what: Callable[[], None], *numbers: signal.Signals) -> Iterator[None]:
    """Handle signals within the running loop; those that are ignored stay so (nohup)."""
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in numbers}
    wanted = [number for number in numbers if before[number] is not signal.SIG_IGN]
    for number in wanted:
        loop.add_signal_handler(number, what)
    try:
        yield
    finally:
        for number in wanted:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


def _room_for_clients() -> int:
    """Each has a connection and a file open; directories are for a moment."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if files == resource.RLIM_INFINITY else max((files - _SPARE_FILES) // 2, 1)


def _tls(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    for path in (certificate, key):
        try:
            path.read_bytes()  # ssl's own errors don't name the file
        except OSError as error:
            raise file_error(error, path, "read") from error
    try:
        context.load_cert_chain(certificate, key, _no_passphrase)
    except ssl.SSLError as error:
        raise UsageError(
            f"{certificate} and {key} are no certificate with its key ({error.reason or error})",
            remedy="give two PEM files, the certificate first with the chain that signed it",
        ) from error
    return context


def _no_passphrase() -> str:
    raise UsageError(
        "the key of the certificate is encrypted, and nobody is asked for its passphrase",
        remedy="give one without: openssl pkey -in KEY -out NEW, with a mode of 0600",
    )


def _listen(address: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"{one_line(address, 100)} is no address to listen at",
            remedy="such as 127.0.0.1, :: or 0.0.0.0",
        ) from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # "::" is all addresses, of both families
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(place)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise _unheard(error, address, port) from error
    return listening


def _unheard(error: OSError, address: str, port: int) -> FarmhandError:
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    if error.errno == errno.EADDRINUSE:
        pids = sorted({one.pid for one in holders(Runner(), "tcp", port) or ()})
        who = f": {described(pids[0])}" if pids else ""
        return Conflict(f"{where} is taken{who}", remedy="stop that, or serve at another port")
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"{address} is no address of this machine", remedy="see: ip address")
    if error.errno == errno.EACCES:
        return WrongState(
            f"cannot listen at {where}: {error.strerror}", remedy="serve at a port from 1024"
        )
    return WrongState(f"cannot listen at {where}: {error.strerror}")


def _head(status: HTTPStatus, fields: list[tuple[str, str]], now: float, *, keep: bool) -> bytes:
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", f"Date: {http_date(now)}"]
    lines += (f"{name}: {value}" for name, value in fields)
    lines.append("X-Content-Type-Options: nosniff")
    if not keep:
        lines.append("Connection: close")
    return "\r\n".join((*lines, "", "")).encode("latin-1")


def _status(error: OSError) -> HTTPStatus:
    if isinstance(error, FileNotFoundError):
        return HTTPStatus.NOT_FOUND
    if isinstance(error, PermissionError):
        return HTTPStatus.FORBIDDEN
    if out_of_files(error, "serve") is not None:
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.INTERNAL_SERVER_ERROR


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
    """What asyncio found in a task or transport: of clients that went away nobody is told."""
    if not isinstance(context.get("exception"), (*_GONE, OSError)):
        loop.default_exception_handler(context)
