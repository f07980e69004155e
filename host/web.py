"""HTTP to servers of others: certificates that are checked, and a limit to the whole of a call."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import SplitResult

from host.files import file_error
from inventory.errors import UsageError


def trusted(url: str, ca: Path | None) -> ssl.SSLContext | None:
    """What an https URL's certificate is checked by: the CAs in that PEM file, or the system's. None for
    http. Errors: UsageError, WrongState."""
    if not url.startswith("https:"):
        return None
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise UsageError(f"{ca} is not the PEM file of a CA: {error.reason}") from error
    except OSError as error:
        assert ca
        raise file_error(error, ca, "read the CA") from error


class _TlsConnection(HTTPConnection):
    """One whose socket is there to be shut down already while hands are shaken."""

    default_port = 443

    def __init__(self, host: str, port: int | None, timeout: float, context: ssl.SSLContext) -> None:
        super().__init__(host, port, timeout=timeout)
        self._tls = context

    def connect(self) -> None:
        super().connect()
        self.sock = self._tls.wrap_socket(
            self.sock, server_hostname=self.host, do_handshake_on_connect=False
        )
        self.sock.do_handshake()


@contextlib.contextmanager
def calling(
    parts: SplitResult, context: ssl.SSLContext | None, seconds: float
) -> Iterator[HTTPConnection]:
    """A connection for one call, which ends after so many seconds also where each byte comes within the
    socket's own limit. TimeoutError; else what http.client raises. No proxy is asked."""
    host, port = parts.hostname or "", parts.port
    try:
        host.encode("idna")  # as getaddrinfo does
    except UnicodeError as error:
        raise OSError(f"{host} can't be a host name: {error}") from error
    connection = (
        _TlsConnection(host, port, seconds, context)
        if context is not None
        else HTTPConnection(host, port, timeout=seconds)
    )
    over = threading.Event()

    def end() -> None:
        over.set()
        if connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        with contextlib.closing(connection):
            yield connection
    except (OSError, HTTPException) as error:
        if over.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
