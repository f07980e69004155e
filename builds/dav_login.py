"""Logins at a web server: Basic (RFC 7617) and Digest (RFC 7616, quality "auth", MD5 and SHA-256)."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from host.files import read_secret
from inventory.errors import UsageError

_MOST = 4096  # bytes of a file of credentials, characters of a challenge
_PART = re.compile(r'(?:([\w-]+)[ \t]+)?([\w-]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_HASHES = {"SHA-256": "sha256", "MD5": "md5"}
"""Algorithms, the better one first."""


@dataclass(frozen=True, slots=True)
class Credentials:
    user: str
    password: str = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> Credentials:
        """Of a file whose first line is ``USER:PASSWORD``, ours, and closed to others. Errors:
        WrongState, UsageError."""
        line = read_secret(path, "the credentials", _MOST).split(b"\n")[0].removesuffix(b"\r")
        try:
            user, colon, password = line.decode().partition(":")
        except UnicodeDecodeError:
            user = colon = password = ""
        if not user or not colon or not (user + password).isprintable():
            raise UsageError(f"{path} holds no credentials: its first line is to be USER:PASSWORD")
        return cls(user, password)


class Login(Protocol):
    def header(self, method: str, target: str) -> str:
        """The value of Authorization for one request."""


@dataclass(frozen=True, slots=True)
class _Basic:
    credentials: Credentials

    def header(self, _method: str, _target: str) -> str:
        both = f"{self.credentials.user}:{self.credentials.password}"
        return f"Basic {base64.b64encode(both.encode()).decode()}"


@dataclass(slots=True)
class Digest:
    """``challenge``: the server's parameters. One nonce serves many requests, each with its count."""

    credentials: Credentials
    challenge: Mapping[str, str]
    count: int = 0

    def header(self, method: str, target: str, cnonce: str = "") -> str:
        self.count += 1
        of, who = self.challenge, self.credentials
        algorithm = of.get("algorithm", "MD5")
        kind, session, _ = algorithm.upper().partition("-SESS")
        count, cnonce = f"{self.count:08x}", cnonce or secrets.token_hex(16)
        nonce = of["nonce"]

        def digest(*texts: str) -> str:
            data = ":".join(texts).encode()
            return hashlib.new(_HASHES[kind], data, usedforsecurity=False).hexdigest()

        first, second = digest(who.user, of["realm"], who.password), digest(method, target)
        if session:
            first = digest(first, nonce, cnonce)
        values = {"username": who.user, "realm": of["realm"], "uri": target, "nonce": nonce}
        plain = {"algorithm": algorithm} if "algorithm" in of else {}
        if "qop" in of:
            values |= {"cnonce": cnonce, "response": digest(first, nonce, count, cnonce, "auth", second)}
            plain |= {"nc": count, "qop": "auth"}
        else:  # RFC 2069
            values["response"] = digest(first, nonce, second)
        if "opaque" in of:
            values["opaque"] = of["opaque"]
        quoted = [f'{name}="{_escaped(value)}"' for name, value in values.items()]
        return "Digest " + ", ".join((*quoted, *(f"{name}={value}" for name, value in plain.items())))


def login_for(asked: Sequence[str], credentials: Credentials) -> Login | None:
    """The best that these WWW-Authenticate headers let us log in by; None: farmhand has none of them."""
    found = list(_challenges(",".join(asked)[:_MOST]))
    for kind in _HASHES:
        for scheme, values in found:
            if scheme == "digest" and _is_digest(values, kind):
                return Digest(credentials, values)
    return _Basic(credentials) if any(scheme == "basic" for scheme, _ in found) else None


def _is_digest(values: Mapping[str, str], kind: str) -> bool:
    algorithm = values.get("algorithm", "MD5").upper().removesuffix("-SESS")
    quality = {word.strip().lower() for word in values.get("qop", "auth").split(",")}
    return algorithm == kind and {"realm", "nonce"} <= values.keys() and "auth" in quality


def _challenges(header: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Schemes with their parameters. What isn't printable is none of a header's."""
    scheme, values = "", dict[str, str]()
    for new, name, quoted, bare in _PART.findall(header if header.isprintable() else ""):
        if new:
            if scheme:
                yield scheme, values
            scheme, values = new.lower(), {}
        values[name.lower()] = bare or re.sub(r"\\(.)", r"\1", quoted)
    if scheme:
        yield scheme, values


def _escaped(value: str) -> str:
    return re.sub(r'(["\\])', r"\\\1", value)
