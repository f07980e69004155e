"""Who listens on this machine's ports, by ss(8) and proc(5)."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from host.run import Runner, which
from inventory.errors import Conflict, DriverFailed
from provision.network.daemons import SETTLE

_LINE = re.compile(r"\S+\s+\d+\s+\d+\s+(\S+):\d+\s+\S+(?:\s+users:\((.*)\))?")
_PROGRAM = re.compile(r'\("([^"]*)",pid=(\d+),')
_ANY = ("0.0.0.0", "*")  # noqa: S104 - as ss writes them
_SLACK = 0.5  # seconds that a process may seem older than it is


@dataclass(frozen=True, slots=True)
class Listener:
    """A program on a port. ``address``: as ss writes it. ``link``: the only network link that it listens
    on; "": any."""

    address: str
    link: str
    program: str
    pid: int


def listeners(runner: Runner, kind: Literal["tcp", "udp"], port: int) -> tuple[Listener, ...]:
    """Those whose program may be known: root sees all. None without ss."""
    if which("ss") is None:
        return ()
    options = f"-Hnlp{kind[0]}"
    said = runner.read("ss", options, f"sport = :{port}", ok=range(256)).stdout
    found = []
    for match in map(_LINE.match, said.splitlines()):
        if match:
            address, _, link = match[1].partition("%")
            found += [
                Listener(address, link, name, int(p)) for name, p in _PROGRAM.findall(match[2] or "")
            ]
    return tuple(found)


def taken(
    runner: Runner,
    service: str,
    kind: Literal["tcp", "udp"],
    port: int,
    *,
    own: Collection[str],
    at: Collection[str] = (),
    link: str = "",
) -> Iterator[Conflict]:
    """If programs other than ``own`` listen where a service is to. ``at``: the addresses that it wants;
    none: any of IPv4. ``link``: the only one it wants."""
    others = {
        one.pid: one.program
        for one in listeners(runner, kind, port)
        if one.program not in own
        if one.address in _ANY or (one.address in at if at else not one.address.startswith("["))
        if not (one.link and link and one.link != link)
    }
    for pid, program in sorted(others.items())[:1]:  # the others are its workers, most often
        yield Conflict(
            f"{service}: {kind.upper()} port {port} is taken by {program} (process {pid})",
            remedy=f"stop {program}, or give one of them another port",
        )


def is_here(program: str) -> bool:
    """Whether such a program is seen to run in this network namespace; in a container it isn't, and what
    listens on its ports here may be its container's."""
    here = Path("/proc/thread-self/ns/net").readlink()
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text().strip() == program and (comm.parent / "ns/net").readlink() == here:
                return True
    return False


def unread(runner: Runner, program: str, ports: Collection[int], paths: Sequence[str]) -> str | None:
    """Why a program that listens on these ports, once it has read these files, can't have. None: it has
    them, or that can't be told."""
    if which("ss") is None or not is_here(program):
        return None
    for port in ports:
        own = [one for one in listeners(runner, "tcp", port) if one.program == program]
        if not own:
            return f"{program} doesn't listen on port {port}"
        for path in paths:
            if older(own, path):
                return f"{program} hasn't read {path} since it was written"
    return None


def wait_until_read(
    runner: Runner, *, program: str, ports: Collection[int], paths: Sequence[str]
) -> None:
    """DriverFailed: a program that was told to read its files goes on without them."""
    deadline = time.monotonic() + SETTLE
    while (why := unread(runner, program, ports, paths)) is not None:
        if time.monotonic() > deadline:
            raise DriverFailed(f"{program} goes on as before: {why}", remedy="see its log")
        time.sleep(0.05)


def older(found: Collection[Listener], path: str) -> bool:
    """Whether all of these processes began before the file was last written: what reads its files when
    it starts, or starts new workers that have read them, doesn't know it."""
    changed = Path(path).stat().st_ctime
    begun = [began for one in found if (began := _began(one.pid)) is not None]
    return bool(begun) and max(begun) + _SLACK < changed < time.time()


def _began(pid: int) -> float | None:
    """When a process began, in seconds since the epoch. None: it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ago = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - ago
    return None
