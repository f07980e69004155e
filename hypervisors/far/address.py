"""A libvirt URI of another machine, taken apart (https://libvirt.org/uri.html): how ssh gets there, and
what libvirt is called by there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, urlsplit

from host.ssh_options import path_option
from inventory.errors import UsageError

_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.:-]*[A-Za-z0-9_])?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_OPTIONS = {"keyfile", "known_hosts", "socket"}
_ALIVE = ("ServerAliveInterval=5", "ServerAliveCountMax=3", "ConnectTimeout=15")


@dataclass(frozen=True, slots=True, kw_only=True)
class Far:
    """A machine that is worked on over ssh. ``name``: USER@HOST or HOST, for messages. ``uri``:
    libvirt's, over there."""

    name: str
    uri: str
    ssh: tuple[str, ...]
    """ssh with its options, but without a command."""
    login: str
    """The same, as one types it."""

    def argv(self, command: Sequence[str]) -> tuple[str, ...]:
        """The ssh command that runs ``command`` there. It never asks, for without a terminal nobody
        could answer. All else is as in the user's own ssh configuration."""
        return (*self.ssh[:1], "-o", "BatchMode=yes", "-T", *self.ssh[1:], shlex.join(command))

    def terminal(self, command: Sequence[str]) -> tuple[str, ...]:
        return (*self.ssh[:1], "-t", *self.ssh[1:], shlex.join(command))


def is_far(uri: str) -> bool:
    """Whether a libvirt URI is another machine's: qemu+ssh://HOST/..., but not "private", qemu:///system
    or qemu+unix:///system?socket=..."""
    return urlsplit(uri).hostname not in (None, "", "localhost")


def far(uri: str) -> Far:
    """UsageError for what isn't DRIVER+ssh://[USER@]HOST[:PORT]/PATH, with ``keyfile`` and
    ``known_hosts`` (files here), and ``socket`` (libvirtd's, there)."""
    parts = urlsplit(uri)
    driver, _, transport = parts.scheme.partition("+")
    try:
        port = parts.port
    except ValueError:
        raise UsageError(f"{uri}: that is no port", remedy="such as root@dom0:2222") from None
    if transport != "ssh":
        raise UsageError(
            f"{uri}: another machine's libvirt is reached by ssh alone, for its disks are made there",
            remedy=f"uri: {driver}+ssh://root@{parts.hostname}/system",
        )
    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    for name in options.keys() - _OPTIONS:
        raise UsageError(
            f"{uri}: '{name}' is not understood here",
            remedy=f"say it to ssh itself: 'Host {parts.hostname}' in ~/.ssh/config",
        )
    host, user = parts.hostname or "", parts.username or ""
    if not _HOST.fullmatch(host) or (user and not _USER.fullmatch(user)):
        raise UsageError(f"{uri}: no user and host for ssh", remedy="such as xen+ssh://root@dom0/system")
    argv: list[str] = []
    if port:
        argv += ["-p", str(port)]
    if user:
        argv += ["-l", user]
    if "keyfile" in options:
        argv += path_option("IdentityFile", options["keyfile"])
    if "known_hosts" in options:
        argv += path_option("UserKnownHostsFile", options["known_hosts"])
    here = f"{driver}://{parts.path or '/'}"
    if "socket" in options:
        here = f"{driver}+unix://{parts.path or '/'}?socket={quote(options['socket'])}"
    alive = (part for option in _ALIVE for part in ("-o", option))
    return Far(
        name=f"{user}@{host}" if user else host, uri=here, ssh=("ssh", *alive, *argv, "--", host),
        login=shlex.join(("ssh", *argv, host)),
    )  # fmt: skip
