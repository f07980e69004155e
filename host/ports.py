"""Who listens on a TCP port of this machine's loopback: proc(5), /proc/net/tcp."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from host.processes import account, described, pids

_LISTENS = " 00000000:0000 0A "  # any peer; TCP_LISTEN
_LISTENS6 = f" {'0' * 32}:0000 0A "
_PLACES = (  # what a connection to 127.0.0.1 finds, the nearest first; words of four bytes, byte by byte
    ("tcp", "0100007F", _LISTENS),
    ("tcp", "00000000", _LISTENS),
    ("tcp6", "0000000000000000FFFF00000100007F", _LISTENS6),
    ("tcp6", "0" * 32, _LISTENS6),
)


@dataclass(frozen=True, slots=True)
class Listener:
    """``inode``: of its socket."""

    uid: int
    inode: str

    def __str__(self) -> str:
        """With its pid and command, where we may see them."""
        for pid in pids():
            with contextlib.suppress(OSError):
                for file in Path(f"/proc/{pid}/fd").iterdir():
                    if str(file.readlink()) == f"socket:[{self.inode}]":
                        return described(pid)
        return f"a program of {account(self.uid)}"


def listener(port: int) -> Listener | None:
    """Who takes connections to that port of 127.0.0.1; None: nobody."""
    for table, address, state in _PLACES:
        with contextlib.suppress(OSError):  # a kernel without IPv6
            text = Path("/proc/net", table).read_text(encoding="ascii")
            _, found, rest = text.partition(f" {address}:{port:04X}{state}")
            if found:
                fields = rest.partition("\n")[0].split()  # queues, timer, retransmits, uid, ...
                return Listener(uid=int(fields[3]), inode=fields[5])
    return None
