"""Reaching a VM over ssh: where it answers, and when it really does.

Exactly one host key is accepted for a VM: the one it was given at cloning, or was seen to have at its
first start where nobody gave it one. No agent, no password, no
``~/.ssh/config``: what works for one admin works for the next. What happens on the wire is in
ssh_connection.py, the connection that carries commands and files in connection.py; both
need asyncssh and are imported late, for most commands never get that far.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from host.printable import plain
from hypervisors.console_log import end_of
from inventory.errors import Remedy


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a VM's ssh answers, and as whom. ``host_key`` is "ssh-ed25519 AAAA...". Empty, for machines
    nobody gave one: the first key seen is kept in ``known_hosts`` and is the only one from then on;
    ``pinned`` is told so, in a line. ``alias``: its name there, as ssh_config(5)'s HostKeyAlias. There
    is no endpoint that accepts any key without a word."""

    vm: str
    host: str
    port: int
    user: str
    key: Path
    host_key: str
    known_hosts: Path | None = None  # absent: "known_hosts" beside the key
    alias: str = ""  # absent: its host, with its port
    pinned: Callable[[str], None] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.host_key and self.pinned is None:
            raise ValueError(f"{self.vm}: no host key, and nobody to tell of the first one seen")

    @property
    def place(self) -> str:
        """HOST:PORT, as messages name it."""
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Ready:
    """What the guest said of itself. ``uptime`` and ``skew`` in seconds; ``skew`` is its clock minus
    ours, right to half the time of the question's way there and back. ``troubles``: what its cloud-init
    failed at, if it has one."""

    boot_id: str
    uptime: float
    skew: float
    troubles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Clue:
    """What is seen to be in the way of a guest's answer: a line, and what to do about it."""

    text: str
    remedy: Remedy


def tail_of(path: Path | None, *, lines: int = 30, limit: int = 65536) -> str:
    """The last lines of a log that may be growing, safe for a terminal; "" if there are none, or it
    can't be read."""
    if path is None:
        return ""
    with contextlib.suppress(OSError):
        text = plain(end_of(path, limit).decode(errors="replace"))
        return "\n".join(text.rstrip().splitlines()[-lines:])
    return ""
