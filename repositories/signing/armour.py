"""OpenPGP's text form of binary data (RFC 9580, 6.2): a block with its base64."""

from __future__ import annotations

import base64
import binascii
import re

from inventory.errors import Unfit

_BLOCK = re.compile(
    rb"-----BEGIN PGP (?P<kind>[A-Z ]+)-----[ \t]*\r?\n"
    rb"(?:[A-Za-z]+: [^\n]*\n)*[ \t]*\r?\n"
    rb"(?P<body>(?:[A-Za-z0-9+/]++={0,2}[ \t]*\r?\n)*+)"
    rb"(?:=(?P<sum>[A-Za-z0-9+/]{4})[ \t\r]*\n)?"
    rb"-----END PGP (?P=kind)-----[ \t]*(?:\r?\n|\Z)"
)
_WIDTH = 64  # characters of a line
_CLEAR = b"-----BEGIN PGP SIGNED MESSAGE-----"
_END = b"-----END PGP SIGNATURE-----"
SIGNATURE = "SIGNATURE"
PUBLIC_KEY = "PUBLIC KEY BLOCK"


def armoured(kind: str, data: bytes) -> bytes:
    """``data`` as a block of that kind."""
    text = base64.b64encode(data)
    lines = [text[at : at + _WIDTH] for at in range(0, len(text), _WIDTH)]
    sum_ = base64.b64encode(_crc24(data).to_bytes(3))
    frame = (f"-----{word} PGP {kind}-----".encode() for word in ("BEGIN", "END"))
    return b"\n".join((next(frame), b"", *lines, b"=" + sum_, next(frame), b""))


def plain(kind: str, text: bytes) -> bytes:
    """What the text's blocks hold, one after the other: they are all of that kind, and nothing else is
    in the text. Unfit."""
    found, at = [], 0
    text = text.strip() + b"\n"
    while at < len(text):
        match = _BLOCK.match(text, at)
        if match is None or match["kind"] != kind.encode():
            raise Unfit(f"it is no armoured PGP {kind.lower()}")
        try:
            data = base64.b64decode(b"".join(match["body"].split()), validate=True)
        except binascii.Error:
            raise Unfit(f"its armoured PGP {kind.lower()} is damaged") from None
        if match["sum"] and base64.b64decode(match["sum"]) != _crc24(data).to_bytes(3):
            raise Unfit(f"its armoured PGP {kind.lower()} is damaged: its checksum is another")
        found.append(data)
        at = match.end()
    return b"".join(found)


def is_clear_signed(text: bytes) -> bool:
    """Whether it is one clear-signed text (RFC 9580, 7). Unfit: there is more around it."""
    if not text.startswith(_CLEAR):
        return False
    if text.count(_CLEAR) != 1 or text.count(_END) != 1 or not text.rstrip().endswith(_END):
        raise Unfit("there is more in it than one signed text")
    return True


def unsigned(text: bytes) -> bytes:
    """What a clear-signed text says, whoever signed it; the text itself where nobody did. Unfit."""
    if not is_clear_signed(text):
        return text
    _, blank, rest = text.replace(b"\r\n", b"\n").partition(b"\n\n")
    body, end, _ = rest.partition(b"\n-----BEGIN PGP SIGNATURE-----\n")
    if not blank or not end:
        raise Unfit("its signature is damaged")
    return b"\n".join(line.removeprefix(b"- ") for line in body.split(b"\n")) + b"\n"


def _crc24(data: bytes) -> int:
    """RFC 9580, 6.1.1."""
    crc = 0xB704CE
    for byte in data:
        crc ^= byte << 16
        for _ in range(8):
            crc <<= 1
            if crc & 0x1000000:
                crc ^= 0x1864CFB
    return crc
