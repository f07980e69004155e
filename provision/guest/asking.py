"""What running guests say when all are asked at once: whether they answer, and what is full in them.

No guest is waited for longer than the others. One that hangs, or is busy, costs the limit and no more,
and what wasn't told within it isn't known. Nothing is written anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from hypervisors.api import FileSystem
from inventory.errors import FarmhandError
from inventory.sizes import rounded

if TYPE_CHECKING:
    from provision.guest.remote import Endpoint

PATIENCE = 1.4
"""Seconds for all guests together. A greeting takes milliseconds, a login a few tenths of a second;
emulated guests are slower."""
_LOGINS = 8
"""At once: each costs this machine some CPU time, and a busy one would answer none in time."""
_ROOM = 16 * 2**20
"""Bytes that are left, and yet it is full: what a package's installation fails by."""
_PLACES = 20
_NUMBER = re.compile(r"[0-9]{1,15}")

_QUESTION = "df -kP; cat /proc/mounts"
"""In the words of any shell, and plainly run: an emulated guest takes a second longer for a program that
is sent to it. df(1) of POSIX tells size, used and left in KiB."""
_MOST = 2**16  # bytes of an answer


_NOTHING: Mapping[str, Sequence[FileSystem]] = {}


@dataclass(frozen=True, slots=True)
class GuestAnswer:
    """``answers``: its ssh server greeted in time. ``full``: its file systems that are full, in words;
    None where it didn't tell in time."""

    answers: bool
    full: tuple[str, ...] | None = None


def ask_guests(
    endpoints: Sequence[Endpoint],
    patience: float = PATIENCE,
    *,
    told: Mapping[str, Sequence[FileSystem]] = _NOTHING,
) -> Sequence[GuestAnswer]:
    """Ask all of them, side by side, for so many seconds. In their order. ``told``: what is known
    already of VMs' file systems; those aren't logged in to, nor those whose host key isn't known."""
    return asyncio.run(_ask_all(endpoints, patience, told)) if endpoints else ()


async def _ask_all(
    endpoints: Sequence[Endpoint], patience: float, told: Mapping[str, Sequence[FileSystem]]
) -> list[GuestAnswer]:
    found = [
        GuestAnswer(answers=False, full=full_of(told[one.vm]) if one.vm in told else None)
        for one in endpoints
    ]
    logged_in = [one.vm not in told and bool(one.host_key) for one in endpoints]
    loaded = asyncio.create_task(asyncio.to_thread(_load)) if any(logged_in) else None
    logins = asyncio.Semaphore(_LOGINS)

    async def one(n: int) -> None:
        with contextlib.ExitStack() as stack:
            sock = await _greeted(endpoints[n])
            if sock is None:
                return
            stack.callback(sock.close)
            found[n] = replace(found[n], answers=True)
            if loaded and logged_in[n]:
                await asyncio.shield(loaded)
                async with logins:
                    found[n] = GuestAnswer(answers=True, full=await _full(endpoints[n], sock))

    tasks = [asyncio.create_task(one(n)) for n in range(len(endpoints))]
    _, late = await asyncio.wait(tasks, timeout=patience)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return found


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _greeted(endpoint: Endpoint) -> socket.socket | None:
    """A connected socket on which an ssh server's greeting waits to be read. In user mode QEMU itself
    takes every connection, so only the greeting tells."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_INET6 if ":" in endpoint.host else socket.AF_INET)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, (endpoint.host, endpoint.port))
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(sock, _settle, ready)
        try:
            await ready
        finally:
            loop.remove_reader(sock)
        if sock.recv(4, socket.MSG_PEEK) == b"SSH-":
            return sock
    except OSError:
        pass
    except BaseException:
        sock.close()
        raise
    sock.close()
    return None


def _load() -> None:
    """What it takes to log in: some tenths of a second, in which greetings come in."""
    import provision.guest.ssh_connection  # noqa: F401


async def _full(endpoint: Endpoint, sock: socket.socket) -> tuple[str, ...] | None:
    import asyncssh

    from provision.guest.ssh_connection import dial

    told = b""
    try:
        connection = await dial(endpoint, sock=sock.dup())
        try:
            process = await connection.create_process(
                _QUESTION, stdin=asyncssh.DEVNULL, stderr=asyncssh.DEVNULL, encoding=None
            )
            while len(told) < _MOST and (part := await process.stdout.read(_MOST)):
                told += part
        finally:
            connection.abort()
    except (FarmhandError, asyncssh.Error, OSError):
        return None
    return full_places(told.decode(errors="replace"))


def full_of(found: Iterable[FileSystem]) -> tuple[str, ...]:
    """Those that are full, in words."""
    full = [one for one in found if one.size and one.left < min(_ROOM, one.size // 20)]
    words = (f"{one.place} ({rounded(one.left)} of {rounded(one.size)} left)" for one in full)
    return tuple(islice(words, _PLACES))


def full_places(told: str) -> tuple[str, ...] | None:
    """Of what a guest says: its file systems that are full, those on disks that it may write to. None
    where it says nothing of the kind."""
    lines = [line.split(None, 5) for line in told.splitlines()]
    # of proc(5): device, place, kind, options
    writable = {words[1] for words in lines if len(words) == 6 and words[3].split(",")[0] == "rw"}
    found: list[FileSystem] = []
    understood = False
    for words in lines:
        if len(words) < 6 or not all(map(_NUMBER.fullmatch, words[1:4])):
            continue
        understood = True
        size, left, place = int(words[1]) * 1024, int(words[3]) * 1024, words[5]
        if not (words[0].startswith("/dev/") or place == "/") or place not in writable:
            continue
        found.append(FileSystem(place, size, left))
    return full_of(found) if understood else None
