"""One file on a WebDAV server of others (RFC 4918): calls, and what the answers say of its locks.

Whatever the server sends is bounded, and nobody waits for it longer than ``LIMIT``. Redirects are not
followed: the login is for the server that the farm file names."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse, responses
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers.expat import ExpatError, ParserCreate

from builds.dav_login import Credentials, Login, login_for
from host.printable import one_line
from host.web import calling
from inventory.errors import ConnectionLost, UsageError, WrongState

LIMIT = 10.0
"""Seconds for a whole call."""
_MOST = 2**16  # bytes of an answer
_DAV = "{DAV:}"
_TOKEN = re.compile(r"[!#-;=?-~]{1,500}")
_SECONDS = re.compile(r"second-(\d{1,10})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DavAnswer:
    """``headers``: by their names in small letters. What it holds is the server's own."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def good(self) -> bool:
        return 200 <= self.status < 300

    @property
    def token(self) -> str:
        """Of a new lock; "" if it says none."""
        found = self.headers.get("lock-token", "").strip()
        return _token(found[1:-1]) if found[:1] + found[-1:] == "<>" else ""

    def seconds_since_change(self) -> float | None:
        """Between the file's last change and now, by the server's own clock."""
        try:
            now, then = (parsedate_to_datetime(self.headers[k]) for k in ("date", "last-modified"))
            return max((now - then).total_seconds(), 0.0)
        except (KeyError, ValueError, TypeError, OverflowError):
            return None


@dataclass(frozen=True, slots=True)
class ActiveLock:
    """A lock as its server shows it. ``token``, ``owner``: "" where it keeps that to itself. ``left``:
    seconds until it ends; None: it has no end, or doesn't say."""

    token: str
    owner: str
    left: float | None


def active_locks(data: bytes) -> list[ActiveLock]:
    """The locks that a lockdiscovery names; none in what is no XML, or has a DTD."""
    return [
        ActiveLock(
            _token(_text(one, "locktoken")), one_line(_text(one, "owner"), 500),
            _seconds(_text(one, "timeout")),
        )
        for one in _tree(data).iter(f"{_DAV}activelock")
    ]  # fmt: skip


class Dav:
    """Calls to one file, for one thread at a time. ``context``: None for http."""

    def __init__(
        self, url: str, credentials: Credentials | None, context: ssl.SSLContext | None
    ) -> None:
        self.url = url
        self._parts = urlsplit(url)
        self._credentials = credentials
        self._context = context
        self._login: Login | None = None

    @property
    def path(self) -> str:
        return self._parts.path

    def ask(self, method: str, body: str = "", **headers: str) -> DavAnswer:
        """``headers``: Lock_Token is Lock-Token. Errors: ConnectionLost (no answer, or none that ends or
        can be read: what was asked may have been done), UsageError (the login isn't taken), WrongState
        (a redirect)."""
        answer = self._ask(method, body, headers)
        if answer.status == 401 and self._credentials is not None:
            asked = answer.headers.get("www-authenticate", "")
            self._login = login_for([asked], self._credentials)
            if self._login is None:
                schemes = one_line(asked, 100) or "nothing"
                raise UsageError(
                    f"{self.url} asks for a login by {schemes}; farmhand has Basic and Digest"
                )
            answer = self._ask(method, body, headers)
        if answer.status == 401:
            who = f"the login of {self._credentials.user}" if self._credentials else "no login"
            raise UsageError(
                f"{self.url} doesn't take {one_line(who, 100)} (401)",
                remedy="see 'credentials' of the cycle's 'lock' in the farm file",
            )
        if 300 <= answer.status < 400:
            to = one_line(answer.headers.get("location", "elsewhere"), 200)
            raise WrongState(
                f"{self.url} redirects to {to}: that is not followed",
                remedy="if that is the place, write it into the farm file",
            )
        return answer

    def _ask(self, method: str, body: str, headers: Mapping[str, str]) -> DavAnswer:
        target, data = self.path, body.encode()
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        sent |= {"User-Agent": "farmhand", "Connection": "close", "Content-Length": str(len(data))}
        if self._login is not None:
            sent["Authorization"] = self._login.header(method, target)
        try:
            with calling(self._parts, self._context, LIMIT) as connection:
                connection.request(method, target, data, {k: v.encode() for k, v in sent.items()})
                return _read(connection.getresponse())
        except TimeoutError:
            raise ConnectionLost(f"{self.url} gave no answer within {LIMIT:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise ConnectionLost(
                f"{self.url}: its certificate isn't trusted: {error.verify_message}",
                remedy="if it is of a CA of your own: 'ca' of the cycle's 'lock' in the farm file",
            ) from error
        except (HTTPException, ValueError) as error:  # its words are the other side's
            raise ConnectionLost(f"{self.url} gave no answer as of an HTTP server") from error
        except OSError as error:
            raise ConnectionLost(f"{self.url} can't be reached: {error.strerror or error}") from error


def refused(url: str, what: str, answer: DavAnswer) -> WrongState:
    """The error for an answer that says no. ``what``: what was asked for."""
    words = responses.get(answer.status, "")
    remedy = {
        403: "see what its server lets this login do",
        404: f"make the collection {url.rpartition('/')[0]}/ first",
        409: f"make the collection {url.rpartition('/')[0]}/ first",
        507: "make room on its server",
    }.get(answer.status, "")
    return WrongState(f"{url}: {what} was refused: {answer.status} {words}".rstrip(), remedy=remedy)


def _read(response: HTTPResponse) -> DavAnswer:
    body = response.read(_MOST + 1)
    if len(body) > _MOST:
        raise HTTPException("too much")
    if response.length:  # http.client doesn't tell where it asked for a part
        raise HTTPException("cut off")
    headers: dict[str, str] = {}
    for name, value in response.getheaders():
        known = headers.get(name.lower())
        headers[name.lower()] = f"{known}, {value}" if known else value
    return DavAnswer(response.status, headers, body)


def _tree(data: bytes) -> Element:
    """An empty one for what is no XML. A DTD, with which little becomes much, is refused."""
    builder = TreeBuilder()
    parser = ParserCreate(namespace_separator="}")

    def refuse(*_what: object) -> None:
        raise ExpatError("a DTD")

    def start(name: str, _attributes: object) -> None:
        builder.start(f"{{{name}", {})  # as ElementTree has it

    def end(name: str) -> None:
        builder.end(f"{{{name}")

    def text(found: str) -> None:
        builder.data(found)

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text
    try:
        parser.Parse(data, True)
        return builder.close()
    except (ExpatError, ValueError, LookupError, AssertionError):
        return Element("none")


def _text(lock: Element, name: str) -> str:
    found = lock.find(f"{_DAV}{name}")
    return " ".join("".join(found.itertext()).split()) if found is not None else ""


def _token(found: str) -> str:
    return found if _TOKEN.fullmatch(found) else ""


def _seconds(timeout: str) -> float | None:
    match = _SECONDS.match(timeout)
    return float(match[1]) if match else None
