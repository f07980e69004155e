"""How each daemon is told about changed files, live where it can be, and seen to have taken them.

A step is said before it is done, is the same in a plan, and raises if the daemon refuses or dies. The
steps of a change's inverse put the daemon back.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from host.run import Runner, which
from hypervisors.libvirt.network import drop_network, set_network
from inventory.errors import CommandFailed, DriverFailed, FarmhandError, TimedOut
from inventory.model import Farm
from provision.network.changes import FileChange
from provision.network.render import kea_path
from provision.network.serial import serial_of

SETTLE = 5.0
"""Seconds a daemon may take to come up with what it was told."""
_BLINK = 1.0
_STEADY = 0.3  # for so long it must stay up: one that forks first dies a moment later

_INCLUDED = re.compile(r'\s*<\?include "([^"]*)"\?>(.*\n?)')
_KEA_EMPTY = 3  # Kea's result: the command is understood, and there was nothing

_ELEMENTS = re.compile(r"^\t\telements = \{\n(.*?)^\t\t\}\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Step:
    """``text``: what is done, for plan, journal and screen."""

    service: str
    text: str
    run: Callable[[Runner], None]


def steps(farm: Farm, changes: Sequence[FileChange]) -> tuple[Step, ...]:
    """What to tell whom, after these changes. BIND last: its serial numbers can't go back, so nothing
    may fail after it."""
    found: dict[str, list[FileChange]] = {}
    for change in changes:
        found.setdefault(change.service, []).append(change)
    used = farm.services.used
    order = sorted(found, key=lambda name: (name == "bind", used.index(name) if name in used else -1))
    return tuple(
        step
        for name in order
        if name in used and name in _TELLERS
        for step in _TELLERS[name](farm, found[name])
    )


def running(runner: Runner, argv: Sequence[str]) -> bool:
    """Whether the command that succeeds while a daemon runs does."""
    return runner.read(*argv, timeout=10, ok=range(256)).status == 0


def _command(service: str, argv: Sequence[str], alive: Sequence[str] = ()) -> Step:
    def run(runner: Runner) -> None:
        runner.change(*argv, timeout=120)
        if alive:
            _stays_up(runner, service, alive)

    return Step(service, f"{service}: {' '.join(argv)}", run)


def _stays_up(runner: Runner, service: str, alive: Sequence[str]) -> None:
    """One that was seen and is gone has a moment: haproxy, for one, empties its pid file and writes it
    again when it is told to reload."""
    limit = deadline = time.monotonic() + SETTLE
    since = None
    while True:
        now = time.monotonic()
        if running(runner, alive):
            since = now if since is None else since
            deadline = min(limit, now + _BLINK)
            if now - since >= _STEADY:
                return
        else:
            since = None
            if now > deadline:
                raise DriverFailed(
                    f"{service} doesn't run with its new configuration ({runner.show(alive)} says so)",
                    remedy="see its log",
                )
        time.sleep(0.05)


# ---- BIND


def _bind(farm: Farm, changes: Sequence[FileChange]) -> Iterator[Step]:
    bind = farm.services.bind
    assert bind is not None
    if any(change.path == bind.config for change in changes):
        yield _command("bind", (*bind.rndc, "reconfig"))
    for change in changes:
        if change.zone and change.after is not None:
            yield _zone(bind.rndc, change, reload=change.before is not None)


def _zone(rndc: Sequence[str], change: FileChange, *, reload: bool) -> Step:
    """Loaded is what counts: rndc answers before it is, and doesn't say if a zone won't load."""
    serial = serial_of(change.after or "")

    def run(runner: Runner) -> None:
        # A file may be new and its zone not: somebody lost it.
        if reload or loaded_serial(runner, rndc, change.zone) not in (None, serial):
            runner.change(*rndc, "reload", change.zone)
        deadline = time.monotonic() + SETTLE
        while True:
            loaded = loaded_serial(runner, rndc, change.zone)
            if loaded == serial:
                return
            if time.monotonic() > deadline:
                raise _not_loaded(change, loaded)
            time.sleep(0.05)

    return Step("bind", f"bind: {'reload' if reload else 'load'} {change.zone}", run)


def loaded_serial(runner: Runner, rndc: Sequence[str], zone: str) -> int | None:
    """The serial number the server answers with. None: it serves no such zone."""
    result = runner.read(*rndc, "zonestatus", zone, ok=range(256))
    match = re.search(r"^serial: (\d+)$", result.stdout, re.MULTILINE)
    return int(match[1]) if match else None


def _not_loaded(change: FileChange, loaded: int | None) -> FarmhandError:
    if loaded is None:
        return DriverFailed(
            f"BIND does not serve {change.zone}",
            remedy="include 'services.bind.config' in named.conf.local; see its log",
        )
    return DriverFailed(
        f"BIND did not load {change.path}: it still answers with the serial number {loaded}",
        remedy="see its log",
    )


# ---- DHCP


def _dhcpd(farm: Farm, _changes: Sequence[FileChange]) -> Iterator[Step]:
    service = farm.services.dhcpd
    assert service is not None
    yield _command("dhcpd", service.reload, service.alive)


def _kea(farm: Farm, changes: Sequence[FileChange]) -> Iterator[Step]:
    service = farm.services.kea
    assert service is not None
    sets: dict[str, Callable[[Runner], None]] = {}
    frees = []
    for kind, config, socket_path, restart in (
        ("4", service.config4, service.socket4, service.reload),
        ("6", service.config6, service.socket6, service.reload6),
    ):
        hosts = kea_path(farm, kind)
        its = [change for change in changes if change.path == config or change.path.startswith(hosts)]
        if not its or any(change.path == config and change.after is None for change in its):
            continue
        sets[f"Dhcp{kind}"] = partial(_kea_set, socket_path, restart, config)
        before = {line for change in its for line in _lines(change.before)}
        after = {line for change in its for line in _lines(change.after)}
        gone = sorted(_kea_addresses(before - after) - _kea_addresses(after - before))
        if gone and service.lease_commands:
            addresses = [address for address, _ in gone]
            frees.append(_kea_free(f"lease{kind}-del", socket_path, addresses))
    if sets:
        text = f"kea: set its {' and '.join(sets)} configuration{'s' * (len(sets) > 1)}"
        yield Step("kea", text, partial(_at_once, tuple(sets.values())))
    yield from frees


def _at_once(tasks: Sequence[Callable[[Runner], None]], runner: Runner) -> None:
    """All to their end; then the first one's error, if there is one."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        told = [pool.submit(copy_context().run, task, runner) for task in tasks]
    for task in told:
        task.result()


def _kea_addresses(lines: Iterable[str]) -> set[tuple[str, str]]:
    """Reserved addresses, and who has them, however the MAC is written: of our templates' lines, one a
    host. By one that is not ours, or edited: those leases run out."""
    found = set()
    for line in lines:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            host = json.loads(line.strip().removesuffix(","))
            for address in host.get("ip-addresses") or [host["ip-address"]]:
                found.add((address, host["hw-address"].replace(":", "")))
    return found


def _kea_free(command: str, path: str, addresses: Sequence[str]) -> Step:
    """A lease lives on without its reservation, and keeps the address from the next who has it."""

    def run(_runner: Runner) -> None:
        for address in addresses:
            kea_command(path, command, {"ip-address": address}, ok=(0, _KEA_EMPTY))

    count = f"{len(addresses)} address{'es' * (len(addresses) != 1)}"
    return Step("kea", f"kea: free the leases of {count} ({command})", run)


def kea_sockets(farm: Farm) -> tuple[str, ...]:
    """Its control sockets, of what it serves."""
    service = farm.services.kea
    assert service is not None
    return (service.socket4, service.socket6) if farm.network.subnet6 else (service.socket4,)


def _kea_set(path: str, restart: Sequence[str], config: str, runner: Runner) -> None:
    """Over its control socket: a configuration it refuses leaves the old one in force. Where nobody
    answers there, by a restart. A file it reads by itself in half the time that the socket takes."""
    try:
        if _kea_file(path) == os.path.realpath(config):
            kea_command(path, "config-reload")
        else:
            kea_command(path, "config-set", kea_configuration(Path(config)))
    except FileNotFoundError:
        runner.change(*restart, timeout=120)
        deadline = time.monotonic() + SETTLE
        while True:
            try:
                kea_command(path, "version-get")
            except OSError as error:
                if time.monotonic() > deadline:
                    raise DriverFailed(
                        f"kea: nobody answers on {path} after its restart: {error.strerror}",
                        remedy="see its log",
                    ) from error
                time.sleep(0.05)
            else:
                return


def _kea_file(path: str) -> str | None:
    """The configuration file of the server behind a control socket, by its command line: what
    config-reload reads. None: it can't be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        try:
            channel.connect(path)
        except ConnectionRefusedError as error:
            raise FileNotFoundError(error.errno, error.strerror, path) from error
        found = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # pid, uid, gid
    pid = int.from_bytes(found[:4], sys.byteorder)
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")
        where = Path(f"/proc/{pid}/cwd").readlink()
        return os.path.realpath(where / words[words.index("-c") + 1])
    except (OSError, ValueError, IndexError):
        return None


def kea_command(
    path: str, command: str, arguments: object = None, *, ok: Sequence[int] = (0,)
) -> object:
    """One command on a control socket; the answer's arguments. FileNotFoundError: nobody is there;
    DriverFailed: it refuses. https://kea.readthedocs.io/en/kea-2.2.0/arm/ctrl-channel.html"""
    order: dict[str, object] = {"command": command}
    if arguments is not None:
        order["arguments"] = arguments
    received = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(60)
        try:
            channel.connect(path)
        except ConnectionRefusedError as error:  # the socket of one that died
            raise FileNotFoundError(error.errno, error.strerror, path) from error
        channel.sendall(json.dumps(order).encode())
        channel.shutdown(socket.SHUT_WR)
        try:
            while part := channel.recv(65536):
                received += part
        except TimeoutError as error:
            raise TimedOut(f"kea: no answer on {path} to {command}") from error
    answer = json.loads(received or b"{}")
    if answer.get("result") not in ok:
        raise DriverFailed(f"kea refuses {command}: {answer.get('text', 'no reason given')}")
    return answer.get("arguments")


def kea_configuration(path: Path) -> object:
    """Kea's JSON as JSON: with what it includes, and without comments, each on lines of their own, which
    is what our templates write. OSError: a file can't be read."""
    return json.loads("".join(_kea_lines(path)))


def _kea_lines(path: Path) -> Iterator[str]:
    for line in path.read_text(errors="surrogateescape").splitlines(keepends=True):
        if included := _INCLUDED.fullmatch(line):
            yield from _kea_lines(Path(included[1]))
            yield included[2]
        elif not line.lstrip().startswith(("//", "#")):
            yield line


def _dnsmasq(farm: Farm, changes: Sequence[FileChange]) -> Iterator[Step]:
    service = farm.services.dnsmasq
    assert service is not None
    if any(change.path == service.config for change in changes):
        yield _command("dnsmasq", service.restart, service.alive)
        return
    gone = [line for change in changes for line in sorted(_lines(change.before) - _lines(change.after))]
    if not gone:
        yield Step("dnsmasq", "dnsmasq: it reads the new hosts by itself", lambda _runner: None)
        return
    yield _command("dnsmasq", service.reload, service.alive)
    interface = service.interface or farm.network.bridge
    leases = [line for line in gone if re.match(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2},", line)]
    if interface and leases:
        yield _release(interface, leases)


def _release(interface: str, lines: Sequence[str]) -> Step:
    """A removed host's lease would live on, and its name with it."""

    def run(runner: Runner) -> None:
        if which("dhcp_release") is None:
            return
        for line in lines:
            mac, address = line.split(",")[:2]
            runner.change("dhcp_release", interface, address, mac, ok=range(256))

    return Step("dnsmasq", f"dnsmasq: release {len(lines)} lease{'s' * (len(lines) != 1)}", run)


def _lines(text: str | None) -> set[str]:
    return {line for line in (text or "").splitlines() if not line.startswith("#")}


# ---- Proxies and NAT


def _nginx(farm: Farm, _changes: Sequence[FileChange]) -> Iterator[Step]:
    service = farm.services.nginx
    assert service is not None
    yield _command("nginx", service.reload, service.alive)


def _haproxy(farm: Farm, _changes: Sequence[FileChange]) -> Iterator[Step]:
    service = farm.services.haproxy
    assert service is not None
    yield _command("haproxy", service.reload, service.alive)


def _nftables(farm: Farm, changes: Sequence[FileChange]) -> Iterator[Step]:
    service = farm.services.nftables
    assert service is not None
    table = f"farmhand_{farm.farm.replace('-', '_')}"
    for change in changes:
        if change.after is None:
            script = f"table ip {table}\ndelete table ip {table}\n"
            yield _nft(service.nft, "take the table away", script)
            continue
        moves = element_changes(change.before, change.after, table)
        if moves is None:
            yield _command("nftables", (*service.nft, "-f", change.path))
        else:
            yield _nft(service.nft, "change the map's elements", moves, otherwise=change.path)


def element_changes(before: str | None, after: str, table: str) -> str | None:
    """nft(8) commands that make one file's map the other's, in one transaction. None where something
    else differs too."""
    if before is None:
        return None
    known = [_ELEMENTS.search(text) for text in (before, after)]
    rest = [_ELEMENTS.sub("", text).partition("\n")[2] for text in (before, after)]
    if rest[0] != rest[1]:
        return None
    old, new = (set(match[1].split("\n")) - {""} if match else set() for match in known)
    script = ""
    for verb, lines in (("delete", old - new), ("add", new - old)):
        elements = sorted(line.strip().rstrip(",") for line in lines)
        if elements:
            script += f"{verb} element ip {table} ssh {{ {', '.join(elements)} }}\n"
    return script


def _nft(nft: Sequence[str], text: str, script: str, *, otherwise: str = "") -> Step:
    def run(runner: Runner) -> None:
        try:
            runner.change(*nft, "-f", "-", input=script.encode())
        except CommandFailed:
            if not otherwise:
                raise
            runner.change(*nft, "-f", otherwise)  # the kernel's table isn't what our file said

    return Step("nftables", f"nftables: {text}", run)


def _shorewall(farm: Farm, _changes: Sequence[FileChange]) -> Iterator[Step]:
    service = farm.services.shorewall
    assert service is not None
    yield _command("shorewall", service.reload)


def _libvirt(farm: Farm, changes: Sequence[FileChange]) -> Iterator[Step]:
    service = farm.services.libvirt
    assert service is not None
    name, uri = farm.network.network or "", service.uri
    for change in changes:
        if change.after is None:
            yield Step(
                "libvirt", f"libvirt: remove the network {name}", lambda _: drop_network(uri, name)
            )
        else:
            done = partial(_libvirt_set, uri, change.after)
            yield Step("libvirt", f"libvirt: define the network {name}, and change it live", done)


def _libvirt_set(uri: str, text: str, _runner: Runner) -> None:
    set_network(uri, text)


_TELLERS: Mapping[str, Callable[[Farm, Sequence[FileChange]], Iterator[Step]]] = {
    "bind": _bind,
    "dhcpd": _dhcpd,
    "kea": _kea,
    "dnsmasq": _dnsmasq,
    "nginx": _nginx,
    "haproxy": _haproxy,
    "nftables": _nftables,
    "shorewall": _shorewall,
    "libvirt": _libvirt,
}


def not_live(farm: Farm) -> Iterator[tuple[str, str]]:
    """Services of the farm that can't take one VM more without a reload or restart, and why: for
    doctor."""
    bind, services = farm.services.bind, farm.services
    if services.dhcpd:
        yield "dhcpd", "it reads its file at start only: each change restarts it, in about a second"
    if services.kea and not services.kea.lease_commands:
        yield "kea", "a removed VM's lease runs out by itself ('lease_commands' frees it)"
    if bind and not bind.dynamic:
        yield "bind", "its zones are reloaded, one by one ('dynamic: yes' changes records instead)"
    for name in ("nginx", "haproxy"):
        if getattr(services, name):
            yield name, "reloaded for each change; connections go on"
    if services.kea:
        yield (
            "kea",
            "it reads all hosts again for each change: of 10,000 in about 0.15 s, side by side for IPv6",
        )
    if services.shorewall:
        yield "shorewall", "its rules are compiled and loaded anew for each change, in seconds"
    if services.dnsmasq:
        yield "dnsmasq", "new hosts are read live; for a removed one it reads all of them again (SIGHUP)"
    if services.libvirt:
        yield "libvirt", "hosts are changed live; what else changes, at the network's next start"
