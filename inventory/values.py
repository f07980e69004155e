"""What is taken for the values in a farm file, and how each is read from text: the functions that
``inventory.fields`` names.

Names are hostile input: whatever reaches a config file, a zone, a path or an argument list is checked
here, once. Every check raises ValueError in words for an admin.
"""

from __future__ import annotations

import base64
import binascii
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path

from inventory import kinds
from inventory.base import Model, parse_range, quote
from inventory.sizes import parse_duration, parse_size

# RFC 1123 section 2.1 with RFC 1035's lower case and 63 octets a label.
LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
MAC = r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}"
FILENAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# As all services' formats read it alike, unquoted and quoted, a shell's too.
CONFIG_PATH = r"(?:/(?!\.\.?(?:/|$))[A-Za-z0-9_@+.-]+)+"
INTERFACE = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}"  # IFNAMSIZ of netdevice(7)
PACKAGE = r"[a-z0-9][a-z0-9+.-]+(?:[:=][A-Za-z0-9.+~:-]+)?"  # Debian policy 5.6.1
MAX_TTL = 604800
"""Seconds that a resolver may keep an answer, at most: a week."""
VARIABLE = r"[A-Za-z_][A-Za-z0-9_]{0,127}"
SCP_LIKE = r"[^/]+:"  # git-clone(1): host:path, the colon before any slash
REVISION = r"[A-Za-z0-9_][A-Za-z0-9_./@{}^~-]{0,199}"


def check_label(value: str) -> str:
    if not re.fullmatch(LABEL, value):
        raise ValueError(
            f"{quote(value)} is not a host name label: use a-z, 0-9 and '-', at most 63, "
            "not beginning or ending with '-'"
        )
    return value


def _idna(value: str) -> str:
    """A host name as DNS has it (RFC 3490); "" if it can't be one."""
    try:
        encoded = value.encode("idna").decode()
    except UnicodeError:
        return ""
    return encoded if all(re.fullmatch(LABEL, label) for label in encoded.split(".")) else ""


def check_hostname(value: str) -> str:
    if len(value) > 253:
        raise ValueError("a host name has at most 253 characters (RFC 1035)")
    labels = value.split(".")
    if not value.isascii() and (encoded := _idna(value)):
        raise ValueError(f"{quote(value)} is not ASCII: write {encoded} (IDNA)")
    for label in labels:
        check_label(label)
    if labels[-1].isdigit():  # RFC 1123 section 2.1: else it could be read as an address
        raise ValueError(f"{quote(value)} is not a host name: its last part is a number")
    return value


def check_mac(value: str) -> str:
    value = value.lower()
    if not re.fullmatch(MAC, value):
        raise ValueError(
            f"{quote(value)} is not a MAC address: write six pairs, such as 52:54:00:12:34:56"
        )
    if int(value[:2], 16) & 1:
        raise ValueError(f"{value} is a multicast address; a machine's own has an even first pair")
    if value == "00:00:00:00:00:00":
        raise ValueError(f"{value} is nobody's address")
    return value


def check_filename(value: str) -> str:
    if not re.fullmatch(FILENAME, value):
        raise ValueError(
            f"{quote(value)} is not a plain name: letters, digits, '.', '_' and '-', at most 64, "
            "beginning with a letter or digit"
        )
    return value


def check_package(value: str) -> str:
    if not re.fullmatch(PACKAGE, value):
        raise ValueError(f"{quote(value)} is not a Debian package name")
    return value


def check_revision(value: str) -> str:
    if not re.fullmatch(REVISION, value) or ".." in value:
        raise ValueError(
            f"{quote(value)} is not a git revision (gitrevisions(7)): a branch, tag or commit"
        )
    return value


def check_line(value: str) -> str:
    if any(ord(c) < 32 or ord(c) == 127 for c in value):
        raise ValueError("control characters and line breaks are not allowed here")
    return value


def check_served(value: str) -> str:
    if len(value) > 255:
        raise ValueError("a name has at most 255 characters")
    if not value.isprintable():
        raise ValueError(f"{quote(value)} has characters that can't be seen, or a line break")
    if value != value.strip():
        raise ValueError(f"{quote(value)} begins or ends with a space")
    return value


def is_plain_name(value: str) -> bool:
    return re.fullmatch(FILENAME, value) is not None


def check_repository(value: str) -> str:
    check_line(value)
    if value.startswith("-") or "::" in value.split("/", 1)[0]:  # git-remote-ext(1) runs commands
        raise ValueError(f"{quote(value)} is not a git URL or a directory")
    return value


def is_directory(repository: str) -> bool:
    """Whether a source is a directory of this machine; else it is a URL that the VM reaches."""
    if repository.startswith("file://"):
        return True
    return "://" not in repository and not re.match(SCP_LIKE, repository)


def check_key(value: str) -> str:
    check_line(value)
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


def to_path(value: object) -> object:
    if isinstance(value, str):
        if not value:
            raise ValueError("an empty path")
        return Path(check_line(value))
    return value


def check_config_path(value: str) -> str:
    if not re.fullmatch(CONFIG_PATH, value) or len(value) > 1024:
        raise ValueError(
            f"{quote(value)} is not an absolute path as taken here: begin with '/', use letters, digits "
            "and '_', '@', '+', '.', '-', and no '..'"
        )
    return value


def check_interface(value: str) -> str:
    if not re.fullmatch(INTERFACE, value):
        raise ValueError(f"{quote(value)} is not the name of a network interface")
    return value


def check_variable(value: str) -> str:
    if not re.fullmatch(VARIABLE, value):
        raise ValueError(f"{quote(value)} is not the name of an environment variable")
    return value


def check_web_address(value: str) -> str:
    """An https URL, or an http one of this very machine. Errors don't repeat it: it may hold a
    secret."""
    from urllib.parse import urlsplit

    if not re.fullmatch(r"[!-~]{1,2048}", value):
        raise ValueError("this is not a URL: ASCII without spaces, at most 2048 characters")
    try:
        parts = urlsplit(value)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        raise ValueError("this is not a URL such as https://chat.example/hooks/1") from None
    if parts.scheme not in ("https", "http") or not host or port == 0:
        raise ValueError("this is not a URL such as https://chat.example/hooks/1")
    if any(not 1 <= len(label) <= 63 for label in host.removesuffix(".").split(".")):
        raise ValueError("each part of its host name has 1 to 63 characters (RFC 1035)")
    if "@" in parts.netloc or parts.fragment:
        raise ValueError("a URL without a login and without '#' is expected here")
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError("only an address of this very machine may do without TLS: write https://")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_range(value: str) -> str:
    parse_range(value)
    return value


def to_bool(value: object) -> object:
    if isinstance(value, str):
        if value.lower() in ("true", "yes", "on"):
            return True
        if value.lower() in ("false", "no", "off"):
            return False
        raise ValueError(f"{quote(value)} is not yes or no")
    return value


def to_int(value: object) -> object:
    if isinstance(value, str):
        if not re.fullmatch(r"0|[1-9][0-9]{0,17}", value):
            raise ValueError(f"{quote(value)} is not a whole number (write it in plain digits)")
        return int(value)
    return value


def to_address(value: object) -> object:
    if isinstance(value, str):
        try:
            return IPv4Address(value)
        except ValueError:
            raise ValueError(f"{quote(value)} is not an IPv4 address such as 10.10.60.6") from None
    return value


def to_subnet(value: object) -> object:
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


def to_address6(value: object) -> object:
    if isinstance(value, str):
        try:
            if "%" in value:
                raise ValueError
            return IPv6Address(value)
        except ValueError:
            raise ValueError(f"{quote(value)} is not an IPv6 address such as fd00:10:60::6") from None
    return value


def to_subnet6(value: object) -> object:
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


def to_size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def to_duration(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


def one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def step_kind(value: object) -> str | None:
    """The kind of a step's section, or of what a file has in its place: the one key that names a kind.
    None: it has no such key, or several."""
    if isinstance(value, Model):
        return getattr(value, "KIND", None)
    if not isinstance(value, dict):
        return None
    found = [kind for kind in kinds.steps if kind in value]
    return found[0] if len(found) == 1 else None
