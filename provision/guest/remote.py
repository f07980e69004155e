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
from typing import Literal

from host.printable import plain
from hypervisors.console_log import end_of
from inventory.errors import Remedy

CLOCK_LIMIT = 0.5
"""Seconds that a guest's clock may be off after it was given back its memory."""
Reseeded = Literal["vmgenid", "ioctl", "mixed", "no"]


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
class Resumed:
    """What was done in a guest that runs on from the memory of an earlier moment. ``clock_after``: its
    clock minus ours, seconds, as it is now. ``random``: how its random numbers are no longer those of
    the life before: "vmgenid", by the kernel itself; "ioctl", by bytes from here; "mixed", by these, but
    only once the kernel takes them up, within a minute; "no". ``lease``: the DHCP client that was told
    to renew; "" if none was."""

    clock_after: float
    random: Reseeded
    lease: str = ""

    @property
    def troubles(self) -> tuple[str, ...]:
        """What is not as it must be, a line each."""
        found = []
        if abs(self.clock_after) > CLOCK_LIMIT:
            found.append(f"its clock is {self.clock_after:+.1f} s off, and can't be set")
        if self.random in {"mixed", "no"}:
            when = "for up to a minute" if self.random == "mixed" else "until its kernel makes new ones"
            found.append(f"its random numbers are those of its last life {when}")
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Ready:
    """What the guest said of itself. ``uptime`` and ``skew`` in seconds; ``skew`` is its clock minus
    ours, right to half the time of the question's way there and back. ``troubles``: what its cloud-init
    failed at, if it has one. ``resumed``: of one that runs on from its memory."""

    boot_id: str
    uptime: float
    skew: float
    troubles: tuple[str, ...] = ()
    resumed: Resumed | None = None


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
