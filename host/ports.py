"""Who listens on a TCP port of this machine's loopback, by proc(5), /proc/net/tcp; and all programs that
listen on a port, by ss(8)."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from host.processes import account, described, pids
from host.run import Runner, which

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


_SOCKET = re.compile(r"\S+\s+\d+\s+\d+\s+(\S+):\d+\s+\S+(?:\s+users:\((.*)\))?")
_PROGRAM = re.compile(r'\("([^"]*)",pid=(\d+),')


@dataclass(frozen=True, slots=True)
class PortHolder:
    """A process that listens on a port. ``address``: as ss writes it, "*" of both families. ``link``:
    the only network link that it listens on; "": any."""

    address: str
    link: str
    program: str
    pid: int


def holders(runner: Runner, kind: Literal["tcp", "udp"], port: int) -> tuple[PortHolder, ...] | None:
    """All that are seen: root sees every one of this network namespace. None: there is no ss."""
    if which("ss") is None:
        return None
    said = runner.read("ss", f"-Hnlp{kind[0]}", f"sport = :{port}", ok=range(256)).stdout
    found = []
    for match in map(_SOCKET.match, said.splitlines()):
        if match:
            address, _, link = match[1].partition("%")
            programs = _PROGRAM.findall(match[2] or "")
            found += [PortHolder(address, link, program, int(pid)) for program, pid in programs]
    return tuple(found)
