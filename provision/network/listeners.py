"""Whether daemons can listen where their files say, and have read them since they were written."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal

from host.ports import PortHolder, holders
from host.processes import began, described, runs_here
from host.run import Runner
from inventory.errors import Conflict, DriverFailed
from provision.network.daemons import Settling

_ANY = ("0.0.0.0", "*")  # noqa: S104 - as ss writes them
_SLACK = 0.5  # seconds that a process may seem older than it is


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
        one.pid
        for one in holders(runner, kind, port) or ()
        if one.program not in own
        if one.address in _ANY or (one.address in at if at else not one.address.startswith("["))
        if not (one.link and link and one.link != link)
    }
    if others:  # the oldest: the others are its workers, most often
        yield Conflict(
            f"{kind.upper()} port {port} is taken: {described(min(others))}",
            of=service,
            remedy="stop that, or give one of them another port",
        )


def older(found: Collection[PortHolder], path: str) -> bool:
    """Whether all of these processes began before the file was last written: what reads its files when
    it starts, or starts new workers that have read them, doesn't know it."""
    changed = Path(path).stat().st_ctime
    times = [start for one in found if (start := began(one.pid)) is not None]
    return bool(times) and max(times) + _SLACK < changed < time.time()


def unread(runner: Runner, program: str, ports: Collection[int], paths: Sequence[str]) -> str | None:
    """Why a program that listens on these ports, once it has read these files, can't have. None: it has
    them, or that can't be told: of one in a container others may hold the ports here."""
    if not runs_here(program):
        return None
    for port in ports:
        found = holders(runner, "tcp", port)
        if found is None:
            return None
        own = [one for one in found if one.program == program]
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
    settling = Settling()
    while (why := unread(runner, program, ports, paths)) is not None:
        if settling.over():
            raise DriverFailed(f"{program} goes on as before: {why}", remedy="see its log")
        time.sleep(0.05)
