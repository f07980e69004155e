"""Logging in to a VM: a connection with exactly the expected peer, or the reason why not (yet)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextvars import copy_context
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import asyncssh

from host.files import make_directory, open_to_append
from host.printable import last_line, one_line
from host.progress import Progress
from inventory.errors import (
    Call,
    Conflict,
    ConnectionLost,
    DriverFailed,
    FarmhandError,
    NotFound,
    TimedOut,
    WrongState,
)
from provision.guest.remote import Clue, Endpoint, Ready
from provision.guest.shell import ask

T = TypeVar("T")

KEEPALIVE_SECONDS = 10.0
KEEPALIVE_MISSED = 4
"""A guest that stops answering is noticed within about 50 s, whatever TCP thinks."""
LOGIN_SECONDS = 60.0
"""Emulated guests on a busy host have taken over 10 s for key exchange and login."""
CLOCK_SLACK = 5.0
"""Seconds by which a machine's uptime may exceed the time since its start: clocks run unevenly, and the
kernel counts from before the first instruction of ours."""

_RSA = {"rsa-sha2-512": "ssh-rsa", "rsa-sha2-256": "ssh-rsa"}
"""Signatures of the key that is called ssh-rsa (RFC 8332)."""
_HOST_KEYS = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    *_RSA,
    "ssh-rsa",
)
"""As ssh(1) has them: RSA last, which a Dropbear without such a key offers all the same, and dies."""

_FACTS = "cat /proc/sys/kernel/random/boot_id /proc/uptime; date +%s.%N"
_CLOUD_INIT = """
cd /run/cloud-init 2>/dev/null && [ ! -e disabled ] || exit 0
for n in 0 1 2 3 4; do
    if [ -e result.json ]; then cat result.json; exit 0; fi
    case $n$(systemctl is-system-running 2>/dev/null) in 0running | 0degraded) echo none; exit 0;; esac
    sleep 1
done
echo working
"""
"""How far cloud-init is in this boot: nothing where there is none. It writes its result when all is done
that it does (cloudinit.readthedocs.io, "Failure states"); none comes where the system is through with
its start and its last part was not. Five seconds at most, for each question is a login."""
_ERRORS = 5  # of cloud-init, that are told

_ANSWER = re.compile(
    r"([0-9a-f-]{36})\n"
    r"([0-9]{1,12}(?:\.[0-9]{1,9})?) [^\n]*\n"
    r"([0-9]{1,12})(?:\.(?:([0-9]{1,9})|[^0-9\n]*))?\n"
)


class NotYet(Exception):
    """Nothing wrong so far, only not there: the text says how far it came."""


class _NothingThere(NotYet):
    """Nothing answers at its address: it has none, or another, or isn't that far."""


async def in_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a thread, this context with it. Cancelled, it is waited for all the same:
    nothing of ours goes on behind our back."""
    future = asyncio.get_running_loop().run_in_executor(None, copy_context().run, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        future.exception()
        raise


async def wait_ready(
    endpoint: Endpoint,
    *,
    since: float,
    progress: Progress,
    running: Callable[[], bool],
    tail: Callable[[], str],
    working: Callable[[str], None],
    clue: Callable[[], Clue | None] = lambda: None,
    earlier: bool = True,
    asleep: bool = False,
    leased: bool = False,
) -> Ready:
    """Wait until the VM answers on ssh as itself since this very start, and its cloud-init, if it has
    one, is through with all that it does.

    ``since``: ``time.monotonic()`` just before the start. ``earlier``: the boot from before may still
    answer, as of a machine that a command resets: a guest that has been up for longer is that one, and
    is waited out. Its uptime tells nothing else: a clock that an emulated kernel measured wrong on a
    busy host has been half a minute ahead. ``asleep``: it runs on from its memory of an earlier
    moment: it is brought to the present (see ``resume``), whatever its uptime; it was through with its
    cloud-init before. ``leased``: what it was given by DHCP is renewed then. ``progress``: how long it
    is waited for. ``running`` is asked once a second, in a thread, and may raise what ends the wait.
    ``clue``: what else may be in the way, if anything is known.

    Raises Conflict at once where somebody else answers (another host key), WrongState when the VM
    stops meanwhile, TimedOut with the console's tail. It can be cancelled.
    """
    pause, patience, looked, why, last = 0.2, 1.0, time.monotonic(), "", ""
    hint: Clue | None = None
    nothing_there = False
    while True:
        try:
            login = min(LOGIN_SECONDS, max(progress.patience, 1.0))
            sock = await _banner(endpoint, patience)
            if asleep:
                return await _wake(endpoint, sock, since, login, leased=leased)
            return await _ask(endpoint, sock, since if earlier else float("-inf"), login)
        except NotYet as reason:
            why, nothing_there = str(reason), isinstance(reason, _NothingThere)
        now = time.monotonic()
        if now - looked >= 1:
            looked = now
            if not await asyncio.to_thread(running):
                raise WrongState(
                    f"{endpoint.vm} stopped {now - since:.0f} s after its start, before ssh answered",
                    remedy=("see ", Call("console", vm=endpoint.vm)),
                    detail=tail(),
                )
            await asyncio.to_thread(progress.look)
            hint = clue()
        # what the guest does first: a narrow terminal cuts off the end
        if hint is not None:
            why = f"{why}; {hint.text}"
        if (text := "; ".join(filter(None, ("waiting for ssh", str(progress), why)))) != last:
            last = text
            working(text)
        left = progress.left()
        if left <= 0:
            raise TimedOut(
                f"ssh at {endpoint.place} was not ready {progress.verdict()}: {why}",
                vm=endpoint.vm,
                remedy=hint.remedy
                if hint is not None
                else (
                    "see whether it has that address: " if nothing_there else "look at ",
                    Call("console", vm=endpoint.vm),
                    "; a slow machine needs a longer ssh: ready_timeout",
                ),
                detail=tail(),
            )
        await asyncio.sleep(min(pause, left))
        pause, patience = min(pause * 1.4, 1.0), min(patience + 1, 6.0)


async def _ask(endpoint: Endpoint, sock: socket.socket, since: float, login: float) -> Ready:
    """Log in once and ask for the facts. NotYet, or Conflict for a wrong host key."""
    async with _login(endpoint, sock, login) as connection:
        async with asyncio.timeout(login):
            ready = await facts(connection)
        if ready.uptime > time.monotonic() - since + CLOCK_SLACK:
            raise NotYet(f"it has been up for {ready.uptime:.0f} s: still the boot from before")
        return replace(ready, troubles=await _first_boot(connection))


async def _wake(
    endpoint: Endpoint, sock: socket.socket, since: float, login: float, *, leased: bool
) -> Ready:
    """As ``_ask``, of a guest that is brought to the present."""
    from provision.guest.resume import resume

    async with _login(endpoint, sock, login) as connection:
        try:
            return await resume(connection, lived=time.monotonic() - since, leased=leased)
        except (asyncssh.Error, OSError) as error:
            raise NotYet(f"lost while it was told the time: {_words(error)}") from None


@contextlib.asynccontextmanager
async def _login(
    endpoint: Endpoint, sock: socket.socket, login: float
) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """A connection that is dropped at the end. What may pass by itself is NotYet."""
    try:
        async with asyncio.timeout(login):
            connection = await dial(endpoint, sock=sock)
        try:
            yield connection
        finally:
            connection.abort()
    except TimeoutError:
        raise NotYet("it took too long to log in") from None
    except DriverFailed as error:
        raise NotYet(error.message) from None


async def _banner(endpoint: Endpoint, patience: float) -> socket.socket:
    """A connected socket on which an ssh server's greeting waits to be read.

    QEMU's port forward accepts every connection at once, so connecting says nothing; and a full
    handshake with a guest that isn't up costs both sides. So: peek, and log in on the same socket.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NotFound(
            f"the address {endpoint.host!r} can't be resolved: {error.strerror}",
            vm=endpoint.vm,
            remedy="give the VM an 'address' in the farm file, or put its name into DNS or /etc/hosts",
        ) from None
    family, kind, proto, _, address = found[0]
    sock = socket.socket(family, kind, proto)
    connected = False
    try:
        sock.setblocking(False)
        async with asyncio.timeout(patience):
            await loop.sock_connect(sock, address)
            connected = True
            await _readable(loop, sock)
        if not sock.recv(4, socket.MSG_PEEK).startswith(b"SSH-"):
            raise NotYet("the port is open, but no ssh server behind it yet")
    except TimeoutError as error:  # our own patience, or the kernel's (ETIMEDOUT)
        sock.close()
        if connected and error.errno is None:
            raise NotYet("the port is open, but nothing speaks there yet") from None
        raise _NothingThere("nothing answers at that address yet") from None
    except OSError as error:
        sock.close()
        # asyncio's own strerror is "Connect call failed", with the address
        why = os.strerror(error.errno) if error.errno else str(error)
        if error.errno == errno.EHOSTUNREACH:  # nobody answered ARP, or a router says so
            raise _NothingThere(f"nothing answers at that address yet ({why})") from None
        if _is_own(family, address):
            why += "; that address is this machine's own"
        raise NotYet(f"no connection ({why})") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _is_own(family: int, address: tuple[Any, ...]) -> bool:
    """Whether the address is one of this machine's, other than its loopback: packets to it leave from
    it."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        own = str(probe.getsockname()[0])
        return own == address[0] and not ip_address(own).is_loopback
    return False


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock, _settle, ready)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


async def dial(endpoint: Endpoint, *, sock: socket.socket | None = None) -> asyncssh.SSHClientConnection:
    """An authenticated ssh connection. Conflict for a wrong host key, NotFound without a key file,
    DriverFailed for all that may pass by itself."""
    learn = not endpoint.host_key and not _known(endpoint)
    seen: list[str] = []

    class Client(asyncssh.SSHClient):
        def validate_host_public_key(
            self, host: str, addr: str, port: int, key: asyncssh.SSHKey
        ) -> bool:
            del host, addr, port
            seen.append(key.export_public_key("openssh").decode().strip())
            return learn

    if not endpoint.key.is_file():
        raise NotFound(f"there is no private key at {endpoint.key}", vm=endpoint.vm)
    options: dict[str, object] = {
        "username": endpoint.user,
        "client_factory": Client,
        "client_keys": [str(endpoint.key)],
        "known_hosts": _trusted(endpoint),
        "server_host_key_algs": _kinds(_trusted(endpoint)[0]),
        "config": None,
        "agent_path": None,
        "preferred_auth": "publickey",
        "disable_trivial_auth": True,
        "gss_host": None,
        "x509_trusted_certs": None,
        "compression_algs": None,
        "keepalive_interval": KEEPALIVE_SECONDS,
        "keepalive_count_max": KEEPALIVE_MISSED,
        "login_timeout": LOGIN_SECONDS,
        "connect_timeout": LOGIN_SECONDS,
    }
    if sock is not None:
        options["sock"] = sock
    try:
        connection = await asyncssh.connect(endpoint.host, endpoint.port, **options)
    except asyncssh.HostKeyNotVerifiable:
        raise _stranger(endpoint, seen) from None
    except asyncssh.PermissionDenied:
        raise DriverFailed(
            f"{endpoint.place} refuses the key {endpoint.key} for {endpoint.user}", vm=endpoint.vm
        ) from None
    except (asyncssh.Error, OSError) as error:
        raise ConnectionLost(
            f"no ssh at {endpoint.place}: {_words(error)}",
            vm=endpoint.vm,
            remedy=("is it running? ", Call("status"), "; ", Call("console", vm=endpoint.vm)),
        ) from None
    except (asyncssh.KeyImportError, ValueError) as error:
        raise FarmhandError(f"{endpoint.key} is not a usable private key: {error}") from None
    if learn and seen:
        _remember(endpoint, seen[0])
        assert endpoint.pinned, "an endpoint without a host key has it"
        endpoint.pinned(
            f"{_name(endpoint)} was not known: its host key ({_fingerprint(seen[0])}) is in "
            f"{_known_hosts(endpoint)} now, and no other one is accepted"
        )
    return connection


def _stranger(endpoint: Endpoint, seen: list[str]) -> Conflict:
    from_there = f" ({_fingerprint(seen[0])})" if seen else ""
    was = "was given" if endpoint.host_key else "had before"
    return Conflict(
        f"somebody else answers at {endpoint.place}: "
        f"its host key{from_there} is not the one {endpoint.vm} {was}",
        vm=endpoint.vm,
        remedy=(
            "another machine has this address or port; if the VM was made anew by other hands, ",
            Call("destroy", vm=endpoint.vm),
            " and ",
            Call("clone-farm"),
        )
        if endpoint.host_key
        else f"if that machine was set up anew, remove its line from {_known_hosts(endpoint)}",
    )


def _fingerprint(key: str) -> str:
    return asyncssh.import_public_key(key).get_fingerprint()


def _known_hosts(endpoint: Endpoint) -> Path:
    return endpoint.known_hosts or endpoint.key.parent / "known_hosts"


def _name(endpoint: Endpoint) -> str:
    """A host with its port as known_hosts has it (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""
    if endpoint.alias:
        return endpoint.alias
    return endpoint.host if endpoint.port == 22 else f"[{endpoint.host}]:{endpoint.port}"


def _known(endpoint: Endpoint) -> list[asyncssh.SSHKey]:
    """The host's keys in a known_hosts file, also under hashed names (ssh_config(5), HashKnownHosts)."""
    path = _known_hosts(endpoint)
    try:
        hosts = asyncssh.read_known_hosts(str(path))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise FarmhandError(f"cannot use {path}: {error}", remedy="put its lines right") from None
    return list(hosts.match(_name(endpoint), "", None)[0])


def _trusted(
    endpoint: Endpoint,
) -> tuple[list[asyncssh.SSHKey], list[asyncssh.SSHKey], list[asyncssh.SSHKey]]:
    if endpoint.host_key:
        return [asyncssh.import_public_key(endpoint.host_key)], [], []
    return _known(endpoint), [], []


def _kinds(known: list[asyncssh.SSHKey]) -> list[str]:
    """Host key algorithms in the order of our liking. The known key's kind comes first: a server may
    have keys of several. The others are asked for, too, so that a stranger's is seen as such."""
    own = {key.get_algorithm() for key in known}
    return sorted(_HOST_KEYS, key=lambda name: _RSA.get(name, name) not in own)


def _remember(endpoint: Endpoint, key: str) -> None:
    """Append the key to known_hosts. It is one write, so that the lines of two processes don't mix."""
    path = _known_hosts(endpoint)
    make_directory(path.parent, mode=0o700)
    with open_to_append(path) as file:
        file.write(f"{_name(endpoint)} {' '.join(key.split()[:2])}\n".encode())


async def facts(connection: asyncssh.SSHClientConnection) -> Ready:
    """Boot id, uptime and clock of the guest, asked in one command. ConnectionLost, or DriverFailed
    where the guest does not tell them."""
    try:
        answer = await ask(connection, _FACTS)
    except (asyncssh.Error, OSError) as error:
        raise ConnectionLost(f"lost while asking for its boot id: {_words(error)}") from None
    if found := _ANSWER.fullmatch(answer.text):
        boot_id, uptime, seconds, part = found.groups()
        # of a date(1) without %N the middle of its second
        now = float(seconds) + (float(f"0.{part}") if part else 0.5)
        return Ready(boot_id, float(uptime), now - (answer.asked + answer.answered) / 2)
    said = answer.said or last_line(answer.text, 300) or "nothing"
    raise DriverFailed(f"its boot id and clock can't be read: {said}")


async def _first_boot(connection: asyncssh.SSHClientConnection) -> tuple[str, ...]:
    """What went wrong in the guest's cloud-init. NotYet while it is at work."""
    try:
        said = (await ask(connection, _CLOUD_INIT)).text.strip()
    except (asyncssh.Error, OSError) as error:
        raise NotYet(f"lost while asking for its cloud-init: {_words(error)}") from None
    if said == "working":
        raise NotYet("cloud-init is still at work there")
    if said == "none":
        return ("it did not come to its end; see /var/log/cloud-init.log there",)
    try:
        errors = json.loads(said)["v1"]["errors"] if said else []
        found = [one_line(str(error), 300) for error in errors]
    except (ValueError, LookupError, TypeError, RecursionError):
        return (f"its result can't be read: {last_line(said, 300)}",)
    more = [f"and {len(found) - _ERRORS} more"] if len(found) > _ERRORS else []
    return (*found[:_ERRORS], *more)


def _words(error: Exception) -> str:
    text = getattr(error, "reason", "") or getattr(error, "strerror", "") or str(error)
    return str(text).strip() or type(error).__name__
