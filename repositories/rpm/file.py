"""An rpm package's file: a lead, the signature header, the header, the payload (rpm.org, "RPM V4 Package
format"). It is read without rpm's library, to which no package gets before it is proven whole."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from host.files import file_error
from inventory.errors import Unfit

_LEAD = bytes.fromhex("edabeedb")
_LEAD_SIZE = 96
_HEADER = bytes.fromhex("8eade801")
_ENTRIES = 0xFFFF
_BLOCK = 2**20
_BYTES = 64 * 2**20
"""Of a header. rpm takes 256 MiB; the largest that distributions have are a tenth of this."""
_WIDTHS = {0: 0, 1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 1, 9: 1}
"""By type, the least that one value takes: null, char, numbers of 8 to 64 bits, text, bytes, two kinds
of lists of texts; each text has its zero byte."""
_NUMBERS = {1: "B", 2: "B", 3: "H", 4: "I", 5: "Q"}
_TEXTS = (6, 8, 9)

_SHA1, _SHA256, _LONG_SIZE = 269, 273, 270  # of the signature header
_SIZE, _MD5 = 1000, 1004
_SIGNATURES = (268, 267, 1002, 1005)  # RSA and DSA, of the header, and of header and payload
_OPENPGP = 278  # base64; rpm 4.20 and later
_PAYLOAD, _PAYLOAD_ALGORITHM = 5092, 5093
_ALGORITHMS = {
    1: "md5",
    2: "sha1",
    8: "sha256",
    9: "sha384",
    10: "sha512",
    11: "sha224",
}  # RFC 9580, 9.5


@dataclass(frozen=True, slots=True)
class RpmHeader:
    """``blob``: its bytes, without padding. ``entries``: by tag: type, offset of its value in the blob,
    count; each lies within the blob."""

    blob: bytes
    entries: Mapping[int, tuple[int, int, int]]

    def texts(self, tag: int) -> tuple[str, ...]:
        """Empty if it has none. Bytes that are no UTF-8 are replaced."""
        kind, start, count = self.entries.get(tag, (0, 0, 0))
        if kind not in _TEXTS:
            return ()
        if count == 1:  # nearly all: the rest isn't copied
            end = self.blob.find(b"\0", start)
            parts = [self.blob[start : end if end >= 0 else None]]
        else:
            parts = self.blob[start:].split(b"\0", count)[:count]
        return tuple(part.decode(errors="replace") for part in parts)

    def text(self, tag: int) -> str:
        """The first of its texts; "" if it has none."""
        return next(iter(self.texts(tag)), "")

    def numbers(self, tag: int) -> tuple[int, ...]:
        """Empty if it has none."""
        kind, start, count = self.entries.get(tag, (0, 0, 0))
        letter = _NUMBERS.get(kind)
        return struct.unpack_from(f">{count}{letter}", self.blob, start) if letter else ()

    def data(self, tag: int) -> bytes:
        kind, start, count = self.entries.get(tag, (0, 0, 0))
        return self.blob[start : start + count] if kind == 7 else b""

    def value(self, tag: int) -> tuple[object, ...]:
        """Whatever it is, to be compared."""
        return self.texts(tag) or self.numbers(tag) or (self.data(tag),)


@dataclass(frozen=True, slots=True)
class RpmFile:
    """``head``: all bytes before the payload, of which the header is the last ``len(header.blob)``."""

    head: bytes
    signature: RpmHeader
    header: RpmHeader

    @property
    def signers(self) -> tuple[str, ...]:
        """The fingerprints, or where a signature has none the long ids, of the keys that signed it, in
        upper case hex; whether they really did isn't asked."""
        blocks = [self.signature.data(tag) for tag in _SIGNATURES]
        for text in self.signature.texts(_OPENPGP):
            try:
                blocks.append(base64.b64decode(text))
            except binascii.Error:
                continue
        return tuple(dict.fromkeys(issuer for block in blocks for issuer in issuers(block)))


def read_rpm(path: Path, name: str, *, whole: bool = True) -> RpmFile:
    """The package in ``path``, called ``name`` where it is spoken of, proven whole: its header, and its
    payload unless ``whole`` is False, have the digests that it says. So does rpmkeys(8) --checksig
    --nosignature, which takes ten times as long for a small one. Unfit."""
    try:
        with path.open("rb") as file:
            return _read(file, name, whole=whole)
    except OSError as error:
        raise file_error(error, path, "read") from error


def _read(file: BufferedReader, name: str, *, whole: bool) -> RpmFile:
    total = os.fstat(file.fileno()).st_size
    lead = file.read(_LEAD_SIZE)
    if not lead.startswith(_LEAD):
        raise Unfit(f"{name} is no rpm package", remedy="see what made it: file(1) tells what it is")
    signature = _header(file, name, "signature header")
    padding = file.read(-len(signature.blob) % 8)
    start = file.tell()
    header = _header(file, name, "header")
    said = signature.numbers(_LONG_SIZE) or signature.numbers(_SIZE)
    if said and said[0] != total - start:
        raise _damaged(name, f"it has {total} bytes, and says that it has {start + said[0]}")
    digests = [("sha256", signature.text(_SHA256)), ("sha1", signature.text(_SHA1))]
    if not any(digest for _, digest in digests):
        raise _damaged(name, "it has no digest of its header")
    for algorithm, digest in digests:
        if digest and hashlib.new(algorithm, header.blob, usedforsecurity=False).hexdigest() != digest:
            raise _damaged(name, "its header's digest is another")
    if whole:
        _check_payload(file, name, signature, header)
    return RpmFile(lead + signature.blob + padding + header.blob, signature, header)


def _check_payload(file: BufferedReader, name: str, signature: RpmHeader, header: RpmHeader) -> None:
    """By all digests that it has, as rpm does when it installs."""
    checks = []
    if digest := header.text(_PAYLOAD):
        number = next(iter(header.numbers(_PAYLOAD_ALGORITHM)), 0)
        if number not in _ALGORITHMS:
            raise Unfit(f"{name}: its payload's digest is of a kind that isn't known: {number}")
        checks.append((hashlib.new(_ALGORITHMS[number], usedforsecurity=False), digest))
    if digest := signature.data(_MD5).hex():  # of header and payload; all that there is before rpm 4.14
        checks.append((hashlib.md5(header.blob, usedforsecurity=False), digest))
    if not checks:
        raise _damaged(name, "it has no digest of its payload")
    while block := file.read(_BLOCK):
        for found, _ in checks:
            found.update(block)
    if any(found.hexdigest() != digest for found, digest in checks):
        raise _damaged(name, "its payload's digest is another")


def _header(file: BufferedReader, name: str, what: str) -> RpmHeader:
    intro = file.read(16)
    if len(intro) < 16 or not intro.startswith(_HEADER):
        raise _damaged(name, f"it has no {what}")
    count, size = struct.unpack_from(">II", intro, 8)
    if not 0 < count <= _ENTRIES or size > _BYTES:
        raise _damaged(name, f"its {what} would have {count} entries, {size} bytes")
    index, store = file.read(count * 16), file.read(size)
    if len(index) < count * 16 or len(store) < size:
        raise _damaged(name, f"it ends within its {what}")
    begin = 16 + count * 16
    entries: dict[int, tuple[int, int, int]] = {}
    for tag, kind, offset, values in struct.iter_unpack(">IIII", index):
        width = _WIDTHS.get(kind)
        if width is None or offset + values * width > size:
            raise _damaged(name, f"its {what}'s entry {tag} is not within it")
        entries.setdefault(tag, (kind, begin + offset, values))
    return RpmHeader(intro + index + store, entries)


def _damaged(name: str, why: str) -> Unfit:
    return Unfit(f"{name} is damaged: {why}", remedy="build it, or fetch it, again")


def issuers(data: bytes) -> Iterator[str]:
    """The keys that made the signatures in OpenPGP packets (RFC 9580, 4.2, 5.2): of each its fingerprint
    or its long id. What can't be read names nobody."""
    try:
        for kind, body, _ in packets(data):
            if kind == 2 and (issuer := _issuer(body)):
                yield issuer.hex().upper()
    except (IndexError, struct.error):
        return


def packets(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """The type and the body of each OpenPGP packet, and where the next one begins. IndexError,
    struct.error: they can't be read."""
    at = 0
    while at < len(data):
        first = data[at]
        if first & 0x40:
            kind = first & 0x3F
            length, at = _length(data, at + 1)
        else:
            kind, width = first >> 2 & 0x0F, 1 << (first & 3)
            length = int.from_bytes(data[at + 1 : at + 1 + width]) if width < 8 else len(data)
            at += 1 + width % 8
        body, at = data[at : at + length], at + length
        yield kind, body, at


def _length(data: bytes, at: int) -> tuple[int, int]:
    if (first := data[at]) < 192:
        return first, at + 1
    if first < 255:
        return ((first - 192) << 8) + data[at + 1] + 192, at + 2
    return struct.unpack_from(">I", data, at + 1)[0], at + 5


def _issuer(body: bytes) -> bytes:
    if body[0] == 3:
        return body[7:15]
    width = ">H" if body[0] == 4 else ">I"
    at, found = 4, b""
    for _ in ("hashed", "not hashed"):
        (length,) = struct.unpack_from(width, body, at)
        at += struct.calcsize(width)
        end = at + length
        while at < end:
            size, at = _length(body, at)
            kind, value, at = body[at] & 0x7F, body[at + 1 : at + size], at + size
            if kind == 33:
                return value[1:]
            if kind == 16:
                found = value
    return found
