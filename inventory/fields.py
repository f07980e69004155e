"""The kinds of values in a farm file: how each is read from text, and what an editor may expect. Only
for validation: what a command does with a farm needs none of it.

Names are hostile input: whatever reaches a config file, a zone, a path or an argument list is checked
here, once. Every check raises ValueError in words for an admin.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated

# Looking for plugins reads every installed package's metadata: milliseconds of every command.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from inventory.base import parse_range, quote
from inventory.sizes import parse_duration, parse_size

# RFC 1123 section 2.1 with RFC 1035's lower case and 63 octets a label.
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_LABEL_ALL = f"^{_LABEL.pattern}$"
_MAC = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
_FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# As BIND, dhcpd, Kea, dnsmasq, nginx, haproxy and the shell of shorewall's params all read it alike,
# unquoted and quoted.
_CONFIG_PATH = re.compile(r"(?:/(?!\.\.?(?:/|$))[A-Za-z0-9_@+.-]+)+")
_INTERFACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")  # IFNAMSIZ of netdevice(7)
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(?:[:=][A-Za-z0-9.+~:-]+)?")  # Debian policy 5.6.1
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@{}^~-]{0,199}")


def _check_label(value: str) -> str:
    if not _LABEL.fullmatch(value):
        raise ValueError(
            f"{quote(value)} is not a host name label: use a-z, 0-9 and '-', at most 63, "
            "not beginning or ending with '-'"
        )
    return value


def _idna(value: str) -> str:
    """As DNS has it (RFC 3490); "" where that can't be, or is no host name."""
    try:
        encoded = value.encode("idna").decode()
    except UnicodeError:
        return ""
    return encoded if all(_LABEL.fullmatch(label) for label in encoded.split(".")) else ""


def _check_hostname(value: str) -> str:
    if len(value) > 253:
        raise ValueError("a host name has at most 253 characters (RFC 1035)")
    labels = value.split(".")
    if not value.isascii() and (encoded := _idna(value)):
        raise ValueError(f"{quote(value)} is not ASCII: write {encoded} (IDNA)")
    for label in labels:
        _check_label(label)
    if labels[-1].isdigit():  # RFC 1123 section 2.1: else it could be read as an address
        raise ValueError(f"{quote(value)} is not a host name: its last part is a number")
    return value


def _check_mac(value: str) -> str:
    value = value.lower()
    if not _MAC.fullmatch(value):
        raise ValueError(
            f"{quote(value)} is not a MAC address: write six pairs, such as 52:54:00:12:34:56"
        )
    if int(value[:2], 16) & 1:
        raise ValueError(f"{value} is a multicast address; a machine's own has an even first pair")
    if value == "00:00:00:00:00:00":
        raise ValueError(f"{value} is nobody's address")
    return value


def _check_filename(value: str) -> str:
    if not _FILENAME.fullmatch(value):
        raise ValueError(
            f"{quote(value)} is not a plain name: letters, digits, '.', '_' and '-', at most 64, "
            "beginning with a letter or digit"
        )
    return value


def _check_package(value: str) -> str:
    if not _PACKAGE.fullmatch(value):
        raise ValueError(f"{quote(value)} is not a Debian package name")
    return value


def _check_revision(value: str) -> str:
    if not _REVISION.fullmatch(value) or ".." in value:
        raise ValueError(
            f"{quote(value)} is not a git revision (gitrevisions(7)): a branch, tag or commit"
        )
    return value


def _check_line(value: str) -> str:
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise ValueError("control characters and line breaks are not allowed here")
    return value


def _check_served(value: str) -> str:
    if len(value) > 255:
        raise ValueError("a name has at most 255 characters")
    if not value.isprintable():
        raise ValueError(f"{quote(value)} has characters that can't be seen, or a line break")
    if value != value.strip():
        raise ValueError(f"{quote(value)} begins or ends with a space")
    return value


def is_plain_name(value: str) -> bool:
    return _FILENAME.fullmatch(value) is not None


def _check_repository(value: str) -> str:
    _check_line(value)
    if value.startswith("-") or "::" in value.split("/", 1)[0]:  # git-remote-ext(1) runs commands
        raise ValueError(f"{quote(value)} is not a git URL or a directory")
    return value


def _check_key(value: str) -> str:
    _check_line(value)
    if value.startswith("-----BEGIN"):
        raise ValueError("this is not a public key: never put a private key into a farm file")
    if is_public_key(value):
        try:
            blob = base64.b64decode(value.split()[1], validate=True)
        except (IndexError, binascii.Error):
            blob = b""
        kind = value.split(maxsplit=1)[0].encode()
        if blob[4 : 4 + len(kind)] != kind:  # RFC 4253 section 6.6: the type is in the key again
            raise ValueError(f"{quote(value)} is a damaged public key")
    return value


def is_public_key(value: str) -> bool:
    """Whether an entry of ``authorized_keys`` or ``users`` is a key itself; else it names a file."""
    return value.startswith(("ssh-", "ecdsa-sha2-", "sk-")) and " " in value


def _check_path(value: object) -> object:
    if isinstance(value, str):
        if not value:
            raise ValueError("an empty path")
        _check_line(value)
    return value


def _check_config_path(value: str) -> str:
    if not _CONFIG_PATH.fullmatch(value) or len(value) > 1024:
        raise ValueError(
            f"{quote(value)} is not an absolute path as taken here: begin with '/', use letters, digits "
            "and '_', '@', '+', '.', '-', and no '..'"
        )
    return value


def _check_interface(value: str) -> str:
    if not _INTERFACE.fullmatch(value):
        raise ValueError(f"{quote(value)} is not the name of a network interface")
    return value


def _check_range(value: str) -> str:
    parse_range(value)
    return value


def _to_bool(value: object) -> object:
    if isinstance(value, str):
        if value.lower() in ("true", "yes", "on"):
            return True
        if value.lower() in ("false", "no", "off"):
            return False
        raise ValueError(f"{quote(value)} is not yes or no")
    return value


def _to_int(value: object) -> object:
    if isinstance(value, str):
        if not re.fullmatch(r"0|[1-9][0-9]{0,17}", value):
            raise ValueError(f"{quote(value)} is not a whole number (write it in plain digits)")
        return int(value)
    return value


def _to_address(value: object) -> object:
    if isinstance(value, str):
        try:
            return IPv4Address(value)
        except ValueError:
            raise ValueError(f"{quote(value)} is not an IPv4 address such as 10.10.60.6") from None
    return value


def _to_subnet(value: object) -> object:
    if isinstance(value, str):
        try:
            if "/" not in value:
                raise ValueError
            return IPv4Network(value)
        except ValueError:
            raise ValueError(
                f"{quote(value)} is not a subnet such as 10.10.60.0/24 (no host bits set)"
            ) from None
    return value


def _to_address6(value: object) -> object:
    if isinstance(value, str):
        try:
            if "%" in value:
                raise ValueError
            return IPv6Address(value)
        except ValueError:
            raise ValueError(f"{quote(value)} is not an IPv6 address such as fd00:10:60::6") from None
    return value


def _to_subnet6(value: object) -> object:
    if isinstance(value, str):
        try:
            if "/" not in value:
                raise ValueError
            subnet = IPv6Network(value)
        except ValueError:
            raise ValueError(
                f"{quote(value)} is not a subnet such as fd00:10:60::/64 (no host bits set)"
            ) from None
        if subnet.prefixlen % 4 or not 16 <= subnet.prefixlen <= 120:
            raise ValueError(f"{subnet}: a length from 16 to 120 that 4 divides, for the reverse zone")
        return subnet
    return value


def _to_size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _to_duration(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _text(words: str, **more: object) -> WithJsonSchema:
    """What editors see: in YAML a name such as ``007`` is a number to them, here it is text."""
    return WithJsonSchema({"title": words, "type": ["string", "number"], **more})


_Line = Annotated[str, AfterValidator(_check_line), Field(min_length=1, max_length=4096)]
_KeyLine = Annotated[str, AfterValidator(_check_key), Field(min_length=1, max_length=16384)]

Label = Annotated[
    str, AfterValidator(_check_label), _text("name of a-z, 0-9 and '-', at most 63", pattern=_LABEL_ALL)
]
Hostname = Annotated[str, AfterValidator(_check_hostname), _text("host name (RFC 1123)")]
Mac = Annotated[
    str,
    AfterValidator(_check_mac),
    _text("MAC address", pattern="^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$"),
]
Name = Annotated[
    str, AfterValidator(_check_filename), _text("plain name", pattern=f"^{_FILENAME.pattern}$")
]
ServedName = Annotated[
    str,
    AfterValidator(_check_served),
    Field(min_length=1),
    _text("name as the server has it", minLength=1, maxLength=255),
]
ConfigPath = Annotated[
    str, AfterValidator(_check_config_path), _text("absolute path", pattern=f"^{_CONFIG_PATH.pattern}$")
]
Interface = Annotated[
    str, AfterValidator(_check_interface), _text("interface", pattern=f"^{_INTERFACE.pattern}$")
]
Line = Annotated[_Line, _text("text on one line", minLength=1)]
Key = Annotated[_KeyLine, _text("public key, or a file of them", minLength=1)]
FilePath = Annotated[Path, BeforeValidator(_check_path), _text("path", minLength=1)]
Address = Annotated[
    IPv4Address,
    BeforeValidator(_to_address),
    WithJsonSchema({"title": "IPv4 address", "type": "string"}),
]
Subnet = Annotated[
    IPv4Network,
    BeforeValidator(_to_subnet),
    WithJsonSchema({"title": "subnet such as 10.10.60.0/24", "type": "string"}),
]
Address6 = Annotated[
    IPv6Address,
    BeforeValidator(_to_address6),
    WithJsonSchema({"title": "IPv6 address", "type": "string"}),
]
Subnet6 = Annotated[
    IPv6Network,
    BeforeValidator(_to_subnet6),
    WithJsonSchema({"title": "subnet such as fd00:10:60::/64", "type": "string"}),
]
Range = Annotated[
    str,
    AfterValidator(_check_range),
    WithJsonSchema({"title": "address, or range of two joined by '-'", "type": "string"}),
]
Revision = Annotated[str, AfterValidator(_check_revision), _text("git revision")]
Repository = Annotated[
    str,
    AfterValidator(_check_repository),
    Field(min_length=1, max_length=4096),
    _text("git URL or directory", minLength=1),
]
Package = Annotated[str, AfterValidator(_check_package), _text("Debian package name")]
Bool = Annotated[
    bool,
    BeforeValidator(_to_bool),
    WithJsonSchema({"title": "yes or no", "enum": [True, False, "yes", "no", "on", "off"]}),
]
Count = Annotated[
    int,
    BeforeValidator(_to_int),
    Field(ge=1, le=2**31),
    WithJsonSchema({"title": "whole number from 1", "type": ["integer", "string"], "minimum": 1}),
]
Cpus = Annotated[
    int,
    BeforeValidator(_to_int),
    Field(ge=1, le=512),
    WithJsonSchema(
        {
            "title": "whole number from 1 to 512",
            "type": ["integer", "string"],
            "minimum": 1,
            "maximum": 512,
        }
    ),
]
Port = Annotated[
    int,
    BeforeValidator(_to_int),
    Field(ge=1, le=65535),
    WithJsonSchema(
        {"title": "port from 1 to 65535", "type": ["integer", "string"], "minimum": 1, "maximum": 65535}
    ),
]
Size = Annotated[
    int,
    BeforeValidator(_to_size),
    Field(gt=0),
    WithJsonSchema({"title": "size such as 512M or 4G", "type": ["string", "integer"]}),
]
Seconds = Annotated[
    float,
    BeforeValidator(_to_duration),
    Field(gt=0),
    WithJsonSchema({"title": "duration such as 90s, 5m or 1h30m", "type": ["string", "number"]}),
]
Script = Annotated[str, Field(min_length=1), _text("shell script", minLength=1)]


# One will do where there could be a list of them.
Scripts = Annotated[tuple[Script, ...], Field(min_length=1), BeforeValidator(_one_or_many)]
Lines = Annotated[tuple[Line, ...], BeforeValidator(_one_or_many)]
SomeLines = Annotated[tuple[Line, ...], Field(min_length=1), BeforeValidator(_one_or_many)]
Keys = Annotated[tuple[Key, ...], BeforeValidator(_one_or_many)]
Hostnames = Annotated[tuple[Hostname, ...], BeforeValidator(_one_or_many)]
Addresses = Annotated[tuple[Address, ...], BeforeValidator(_one_or_many)]
Ranges = Annotated[tuple[Range, ...], BeforeValidator(_one_or_many)]
Packages = Annotated[tuple[Package, ...], BeforeValidator(_one_or_many)]
