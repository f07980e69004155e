"""HTTP/1.1 as far as files need it: what a request says, and which part of a file answers it (RFC 9110,
RFC 9112). It opens nothing and sends nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

DETACHED = {"repomd.xml.asc": "repomd.xml", "Release.gpg": "Release"}
"""Signatures, by their names, with the file beside each that it is of."""

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST = re.compile(rf"({_WORD}) ([^\x00-\x20\x7f]+) HTTP/([0-9])\.([0-9])")
_FIELD = re.compile(rf"({_WORD}):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*?)[ \t]*")
_ABSOLUTE = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
_TAG = re.compile(r'(W/)?("[^"]*")')
_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)


class BadRequest(Exception):
    """A request that gets no file. What follows on its connection can't be told: it is closed."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """``target``: as it was sent. ``path``: its components, decoded. ``fields``: by their names in
    lower case. ``persistent``: whether the connection can take another request."""

    method: str
    target: str
    path: tuple[str, ...]
    fields: Mapping[str, str]
    persistent: bool


def parse(head: bytes) -> Request:
    """A request's line and fields, without the empty line that ends them. BadRequest."""
    line, *rest = head.decode("latin-1").split("\r\n")
    match = _REQUEST.fullmatch(line)
    if match is None:
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    method, target, major, minor = match.groups()
    if major != "1":
        raise BadRequest(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
    fields: dict[str, str] = {}
    for text in rest:
        field = _FIELD.fullmatch(text)
        if field is None:
            raise BadRequest(HTTPStatus.BAD_REQUEST)
        name = field[1].lower()
        if name == "host" and name in fields:
            raise BadRequest(HTTPStatus.BAD_REQUEST)
        fields[name] = f"{fields[name]}, {field[2]}" if name in fields else field[2]
    if minor != "0" and "host" not in fields:
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    if method not in ("GET", "HEAD"):
        raise BadRequest(HTTPStatus.METHOD_NOT_ALLOWED)
    path = _ABSOLUTE.sub("", target, count=1).partition("?")[0]
    if not path.startswith("/") and path != "":
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    *directories, name = path.split("/")
    parts = [part for part in directories if part] + [name or "index.html"]
    body = "transfer-encoding" in fields or fields.get("content-length", "0") != "0"
    closing = "close" in (word.strip().lower() for word in fields.get("connection", "").split(","))
    return Request(
        method=method,
        target=target,
        path=tuple(os.fsdecode(unquote_to_bytes(part)) for part in parts),
        fields=fields,
        persistent=minor != "0" and not closing and not body,  # a body is not read
    )


@dataclass(frozen=True, slots=True)
class Resource:
    """What is asked for, as it is now. ``tag``: a word, another one for other bytes. ``modified``: in
    seconds since the epoch. ``lasting``: it never changes. ``now``: the time of the answer."""

    size: int
    tag: str
    modified: float
    lasting: bool
    now: float

    @property
    def etag(self) -> str:
        return f'"{self.tag}"'

    @property
    def second(self) -> int:
        """By what a client's date is judged."""
        return int(self.modified)

    @property
    def last_modified(self) -> int:
        """What is told. What may still change within its very second is said to be older: so nobody
        has a date of this content that the next one could have, too. (The kernel's stamps are up to
        10 ms late.)"""
        return min(self.second, int(self.now if self.lasting else self.now - 1.1))


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer: its status, and which bytes."""

    status: HTTPStatus
    start: int = 0
    length: int = 0


def answer(request: Request, resource: Resource) -> Answered:
    """By the fields that make a request conditional, in their order (RFC 9110, 13.2.2)."""
    fields = request.fields
    if (tags := fields.get("if-match")) is not None:
        if not _matches(tags, resource.etag, strong=True):
            return Answered(HTTPStatus.PRECONDITION_FAILED)
    elif (since := _seconds(fields.get("if-unmodified-since"))) is not None and (
        resource.second > since
    ):
        return Answered(HTTPStatus.PRECONDITION_FAILED)
    if (tags := fields.get("if-none-match")) is not None:
        if _matches(tags, resource.etag, strong=False):
            return Answered(HTTPStatus.NOT_MODIFIED)
    elif (since := _seconds(fields.get("if-modified-since"))) is not None:
        known = resource.second
        # Of what changes the very date is asked for: a clock may have been put back.
        if known <= since if resource.lasting else known == since:
            return Answered(HTTPStatus.NOT_MODIFIED)
    whole = Answered(HTTPStatus.OK, 0, resource.size)
    match = _RANGE.fullmatch(fields.get("range", ""))
    if request.method != "GET" or match is None or not _same(fields.get("if-range"), resource):
        return whole
    return _part(match[1], match[2], resource.size) or whole


def _part(first: str, last: str, size: int) -> Answered | None:
    """None: that is no range, or can't be told as one."""
    if first:
        start, end = int(first), min(int(last) if last else size - 1, size - 1)
        if last and int(last) < start:
            return None
    elif last and (size or not int(last)):
        start, end = max(size - int(last), 0), size - 1
    else:
        return None
    if start >= size:
        return Answered(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
    return Answered(HTTPStatus.PARTIAL_CONTENT, start, end - start + 1)


def _matches(tags: str, etag: str, *, strong: bool) -> bool:
    return tags.strip() == "*" or any(
        tag == etag and not (strong and weak) for weak, tag in _TAG.findall(tags)
    )


def _same(if_range: str | None, resource: Resource) -> bool:
    """Whether the part that a client has is of these bytes."""
    if if_range is None:
        return True
    if '"' in if_range:
        return if_range.strip() == resource.etag
    return _seconds(if_range) == resource.second


def _seconds(date: str | None) -> int | None:
    """None: there is none, or it can't be read; then it isn't looked at."""
    if date is None:
        return None
    try:
        found = parsedate_to_datetime(date)
        return int(found.timestamp())
    except (ValueError, TypeError, OverflowError):
        return None


def http_date(seconds: float) -> str:
    return formatdate(int(seconds), usegmt=True)


_TYPES = {
    "deb": "application/vnd.debian.binary-package",
    "udeb": "application/vnd.debian.binary-package",
    "rpm": "application/x-rpm",
    "xml": "application/xml",
    "gz": "application/gzip",
    "xz": "application/x-xz",
    "zst": "application/zstd",
    "bz2": "application/x-bzip2",
    "json": "application/json",
    "html": "text/html; charset=utf-8",
    "mirrors": "text/plain; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
    "asc": "application/pgp-keys",
    "gpg": "application/pgp-keys",
}


def content_type(name: str) -> str:
    """By a file's name. What is compressed is that, and not a way to send something else."""
    if name in ("Release", "InRelease", "Packages"):
        return "text/plain; charset=utf-8"
    if name in DETACHED:
        return "application/pgp-signature"
    return _TYPES.get(name.rpartition(".")[2].lower(), "application/octet-stream")
