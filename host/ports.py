"""Who listens on a TCP port of this machine's loopback, by sock_diag(7); and all programs that listen on
a port, by ss(8)."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from host.processes import account, described, pids
from host.run import Runner, which

_PLACES = (  # what a connection to 127.0.0.1 finds, the nearest first
    (socket.AF_INET, socket.inet_pton(socket.AF_INET, "127.0.0.1")),
    (socket.AF_INET, bytes(4)),
    (socket.AF_INET6, socket.inet_pton(socket.AF_INET6, "::ffff:127.0.0.1")),
    (socket.AF_INET6, bytes(16)),
)
_TABLES = {socket.AF_INET: "tcp", socket.AF_INET6: "tcp6"}

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h; see sock_diag(7)
_SOCK_DIAG, _BY_FAMILY, _DUMP = 4, 20, 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_HEADER = struct.Struct("=IHHII")
_DONE, _ERROR = 3, 2
_REQUEST = struct.Struct("=BBBxI2s46x")  # struct inet_diag_req_v2: of its id, the port alone
_ANSWER = struct.Struct("=4x2s2x16s28x12xII")  # struct inet_diag_msg
_TCP_LISTEN = 10


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
    found: dict[tuple[int, bytes], Listener] = {}
    for family, table in _TABLES.items():
        try:
            found |= {(family, at): who for at, who in _asked(family, port)}
        except OSError:  # a kernel without sock_diag
            with contextlib.suppress(OSError):  # or without IPv6
                found |= {(family, at): who for at, who in _read(table, port)}
    return next((found[place] for place in _PLACES if place in found), None)


def _asked(family: int, port: int) -> Iterator[tuple[bytes, Listener]]:
    """Listeners with their addresses. The kernel looks at those alone: to read /proc/net/tcp, it goes
    through all connections that there could be, which takes milliseconds. OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, _SOCK_DIAG) as asking:
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << _TCP_LISTEN, port.to_bytes(2, "big"))
        asking.send(_HEADER.pack(_HEADER.size + len(request), _BY_FAMILY, _DUMP, 0, 0) + request)
        while True:
            data = asking.recv(2**16)
            while data:
                size, kind, *_ = _HEADER.unpack_from(data)
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    number = -int.from_bytes(data[16:20], sys.byteorder, signed=True)
                    raise OSError(number, os.strerror(number))
                there, address, uid, inode = _ANSWER.unpack_from(data, _HEADER.size)
                if int.from_bytes(there, "big") == port:
                    yield address[: 4 if family == socket.AF_INET else 16], Listener(uid, str(inode))
                data = data[size + -size % 4 :]


def _read(table: str, port: int) -> Iterator[tuple[bytes, Listener]]:
    """The same, by proc(5), /proc/net/tcp: addresses in words of four bytes, as the machine has them."""
    for line in Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        address, _, there = fields[1].partition(":")
        if fields[3] == f"{_TCP_LISTEN:02X}" and int(there, 16) == port:
            words = (address[at : at + 8] for at in range(0, len(address), 8))
            whole = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
            yield whole, Listener(uid=int(fields[7]), inode=fields[9])


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
