"""Kea: told over its control sockets, its hosts spread over files that it includes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from host.documents import Malformed, damaged, json_object, json_value
from host.processes import command_line, runs_here
from inventory.errors import DriverFailed, FarmhandError, TimedOut
from provision.network.daemons import Settling, lines
from provision.network.daemons import command as told
from provision.network.document import Document
from provision.network.listeners import taken
from provision.network.service import Apart, ApplyStep, Checker, Service, Unserved
from provision.network.templating import Word, as_json

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.fields import ConfigPath, Interface, Lines
    from inventory.model import Farm
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.service import OtherNames
    from provision.network.view import VmRow

_COMMENT = ("// ", "")
_INCLUDED = re.compile(r'\s*<\?include "([^"]*)"\?>(.*\n?)')
_LIMIT = 30.0
"""Seconds for a command and its answer. A configuration of 10,000 hosts takes 0.15."""
_LONGEST = 2**27  # bytes of an answer
_EMPTY = 3  # its result: the command is understood, and there was nothing


@dataclass(frozen=True, kw_only=True)
class Kea(Service):
    """Kea: DHCPv4, and DHCPv6 where the network has `subnet6`."""

    NAME: ClassVar = "kea"
    NEEDS_SUBNET: ClassVar = True
    FILES: ClassVar = ("config4", "config6")
    TOOLS: ClassVar = {"kea-dhcp4": "kea-dhcp4-server"}
    STRINGS: ClassVar = dict.fromkeys(("kea4", "kea6", "kea4-hosts", "kea6-hosts"), as_json)
    ANSWERS_DHCP: ClassVar = True
    APART: ClassVar = ("config4", "config6", "socket4", "socket6", "leases")

    config4: ConfigPath = "/etc/kea/kea-dhcp4.conf"
    """The configuration of kea-dhcp4."""
    config6: ConfigPath = "/etc/kea/kea-dhcp6.conf"
    """The configuration of kea-dhcp6."""
    hosts: ConfigPath = "/etc/kea/farmhand"
    """A directory of ours, which both include: the hosts."""
    interfaces: tuple[Interface, ...] = ()
    """Where they listen; absent: the network's `bridge`, else all."""
    socket4: ConfigPath = "/run/kea/kea4-ctrl-socket"
    """The control socket of kea-dhcp4."""
    socket6: ConfigPath = "/run/kea/kea6-ctrl-socket"
    """The control socket of kea-dhcp6."""
    leases: ConfigPath = "/var/lib/kea"
    """The directory of the lease files."""
    reload: Lines = ("systemctl", "restart", "kea-dhcp4-server")
    """The command that restarts kea-dhcp4, for when its socket doesn't answer."""
    reload6: Lines = ("systemctl", "restart", "kea-dhcp6-server")
    """The command that restarts kea-dhcp6."""
    lease_commands: ConfigPath | None = None
    """Kea's libdhcp_lease_cmds.so, in Debian /usr/lib/x86_64-linux-gnu/kea/hooks/libdhcp_lease_cmds.so:
    with it the lease of a removed VM is freed; absent: it runs out."""

    @property
    def whole(self) -> tuple[str, ...]:
        return self.APART

    def apart(self, other: OtherNames) -> Apart:
        note = (
            "each Kea reads one file: this farm's is for one of its own, on a bridge of its own, that "
            "the 'reload' commands start, with a directory 'leases' (dhcpd and dnsmasq serve two farms)"
        )
        return Apart(super().apart(other).keys, note)

    def documents(self, r: Renderer) -> Iterator[Document]:
        network = r.farm.network
        interfaces = list(self.interfaces) or [network.bridge or "*"]
        servers = ", ".join(map(str, network.nameservers))
        options = {"routers": str(network.gateway or ""), "domain-name-servers": servers}
        options["domain-name"] = network.domain or ""
        values: dict[str, Any] = {
            **r.dhcp(),
            "interfaces": interfaces,
            "options4": [{"name": name, "data": data} for name, data in options.items() if data],
            "options6": [{"name": "domain-search", "data": network.domain}] if network.domain else [],
        }
        rows = r.view.dhcp
        yield from self._files(r, "4", self.config4, rows, values)
        if network.subnet6:
            rows = tuple(row for row in rows if row.address6)
            yield from self._files(r, "6", self.config6, rows, values)

    def _files(
        self, r: Renderer, kind: str, config: str, rows: tuple[VmRow, ...], values: Mapping[str, Any]
    ) -> Iterator[Document]:
        """The hosts first: a server that reads the configuration finds all that it includes."""
        from provision.network.render import sharded

        begin = self._hosts(r.farm, kind)
        included = {path for path in r.others if path.startswith(begin)}
        for shard, some in sharded(rows):
            path = f"{begin}{shard}.json"
            included.add(path)
            text = r.render(f"kea{kind}-hosts", self, vms=some)
            yield Document(self.NAME, path, text, comment=_COMMENT)
        text = r.render(f"kea{kind}", self, hosts=tuple(map(Word, sorted(included))), **values)
        yield Document(self.NAME, config, text, comment=_COMMENT)

    def _hosts(self, farm: Farm, kind: str) -> str:
        """What the paths of its files of hosts begin with."""
        return f"{self.hosts}/{farm.farm}-dhcp{kind}-"

    def host_files(self, farm: Farm) -> tuple[tuple[str, str], ...]:
        return tuple((self._hosts(farm, kind), ".json") for kind in ("4", "6"))

    @property
    def including(self) -> tuple[str, ...]:
        return self.config4, self.config6

    def refuses_by_itself(self, farm: Farm) -> bool:
        return all(Path(path).is_socket() for path in self.sockets(farm))

    def sockets(self, farm: Farm) -> tuple[str, ...]:
        """Its control sockets, of what it serves."""
        return tuple(path for _, _, path, _ in self._serving(farm))

    def checkers(self, _farm: Farm, documents: Sequence[Document]) -> Iterator[Checker]:
        for program, config in (("kea-dhcp4", self.config4), ("kea-dhcp6", self.config6)):
            if any(document.path == config for document in documents):
                yield Checker((program, "-t", config))

    def _serving(self, farm: Farm) -> tuple[tuple[str, str, str, Lines], ...]:
        return self._servers()[: 2 if farm.network.subnet6 else 1]

    def _servers(self) -> tuple[tuple[str, str, str, Lines], ...]:
        """Each one's kind, configuration, socket, and the command that restarts it."""
        return (
            ("4", self.config4, self.socket4, self.reload),
            ("6", self.config6, self.socket6, self.reload6),
        )

    def missing(
        self, farm: Farm, _files: Sequence[FileChange], runner: Runner
    ) -> Iterator[FarmhandError]:
        for kind, _, socket_path, _ in self._serving(farm):
            if not _is_there(socket_path):  # a restart starts it
                port, at = (67, ()) if kind == "4" else (547, ("[::]",))
                own = (f"kea-dhcp{kind}",)
                for link in self.interfaces or (farm.network.bridge or "",):
                    yield from taken(runner, self.NAME, "udp", port, own=own, at=at, link=link)

    def stopped(self, farm: Farm, _runner: Runner) -> Iterator[Unserved]:
        for kind, config, socket_path, restart in self._serving(farm):
            if not _is_there(socket_path):
                yield Unserved(
                    f"kea-dhcp{kind} doesn't run: nobody answers on {socket_path}",
                    _setting(kind, socket_path, restart, config),
                )

    def unserved(self, farm: Farm, files: Sequence[FileChange], _runner: Runner) -> Iterator[Unserved]:
        paths = {change.path for change in files}
        for kind, config, socket_path, restart in self._serving(farm):
            if config in paths and _is_there(socket_path):
                told = command(socket_path, "config-get")
                if _reserved(told) != _reserved(configuration(Path(config))):
                    step = _setting(kind, socket_path, restart, config)
                    yield Unserved(f"kea-dhcp{kind} has other hosts than {config}", step)

    def is_live(self, _farm: Farm, _runner: Runner) -> bool:
        return any(runs_here(f"kea-dhcp{kind}") or _is_there(at) for kind, _, at, _ in self._servers())

    def steps(self, farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        sets: dict[str, Callable[[Runner], None]] = {}
        frees = []
        for kind, config, socket_path, restart in self._servers():
            hosts = self._hosts(farm, kind)
            its = [c for c in changes if c.path == config or c.path.startswith(hosts)]
            if not its:
                continue
            if any(change.path == config and not change.after for change in its):
                yield told(self.NAME, restart, restarts=True)
                continue
            sets[f"Dhcp{kind}"] = partial(_set, socket_path, restart, config)
            before = {line for change in its for line in lines(change.before)}
            after = {line for change in its for line in lines(change.after)}
            gone = sorted(_addresses(before - after) - _addresses(after - before))
            if gone and self.lease_commands:
                addresses = [address for address, _ in gone]
                frees.append(_free(f"lease{kind}-del", socket_path, addresses))
        if sets:
            text = f"kea: set its {' and '.join(sets)} configuration{'s' * (len(sets) > 1)}"
            yield ApplyStep(self.NAME, text, partial(_at_once, tuple(sets.values())))
        yield from frees

    def not_live(self) -> Iterator[str]:
        if not self.lease_commands:
            yield "a removed VM's lease runs out by itself ('lease_commands' frees it)"
        yield (
            "it reads all hosts again for each change: of 10,000 in about 0.15 s, side by side for IPv6"
        )


def _setting(kind: str, path: str, restart: Sequence[str], config: str) -> ApplyStep:
    text = f"kea: set its Dhcp{kind} configuration"
    return ApplyStep(Kea.NAME, text, partial(_set, path, restart, config))


def _is_there(path: str) -> bool:
    """Whether somebody listens on a control socket."""
    try:
        with _connected(path, time.monotonic() + _LIMIT):
            return True
    except FileNotFoundError:
        return False


def _reserved(tree: object) -> set[tuple[str, ...]]:
    """The hosts in a configuration: of each its MAC, without colons, and addresses."""
    if isinstance(tree, list):
        return {host for one in tree for host in _reserved(one)}
    if not isinstance(tree, dict):
        return set()
    found = {host for key, one in tree.items() if key != "reservations" for host in _reserved(one)}
    for host in tree.get("reservations", ()):
        mac = str(host.get("hw-address", "")).replace(":", "").lower()
        addresses = host.get("ip-addresses") or [host.get("ip-address", "")]
        found.add((mac, *map(str, addresses)))
    return found


def _at_once(tasks: Sequence[Callable[[Runner], None]], runner: Runner) -> None:
    """All to their end; then the first one's error, if there is one."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(tasks)) as pool:
        told = [pool.submit(copy_context().run, task, runner) for task in tasks]
    for task in told:
        task.result()


def _addresses(lines: Iterable[str]) -> set[tuple[str, str]]:
    """Reserved addresses, and who has them, however the MAC is written: of our templates' lines, one a
    host. By one that is not ours, or edited: those leases run out."""
    found = set()
    for line in lines:
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
            host = json.loads(line.strip().removesuffix(","))
            for address in host.get("ip-addresses") or [host["ip-address"]]:
                found.add((address, host["hw-address"].replace(":", "")))
    return found


def _free(order: str, path: str, addresses: Sequence[str]) -> ApplyStep:
    """A lease lives on without its reservation, and keeps the address from the next who has it."""

    def run(_runner: Runner) -> None:
        for address in addresses:
            command(path, order, {"ip-address": address}, ok=(0, _EMPTY))

    count = f"{len(addresses)} address{'es' * (len(addresses) != 1)}"
    return ApplyStep(Kea.NAME, f"kea: free the leases of {count} ({order})", run)


def _set(path: str, restart: Sequence[str], config: str, runner: Runner) -> None:
    """Over its control socket: a configuration it refuses leaves the old one in force. Where nobody
    answers there, by a restart. A file it reads by itself in half the time that the socket takes."""
    try:
        if _file(path) == os.path.realpath(config):
            command(path, "config-reload")
        else:
            command(path, "config-set", configuration(Path(config)))
    except FileNotFoundError:
        runner.change(*restart, timeout=120, patient=True)
        settling = Settling()
        while True:
            try:
                command(path, "version-get")
            except (OSError, DriverFailed) as error:
                if settling.over():
                    why = error.message if isinstance(error, DriverFailed) else error.strerror
                    raise DriverFailed(
                        f"kea: nobody answers on {path} after its restart: {why}", remedy="see its log"
                    ) from error
                time.sleep(0.05)
            else:
                return


def _file(path: str) -> str | None:
    """The configuration file of the server behind a control socket, by its command line: what
    config-reload reads. None: it can't be told."""
    with _connected(path, time.monotonic() + _LIMIT) as channel:
        found = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)  # pid, uid, gid
    pid = int.from_bytes(found[:4], sys.byteorder)
    try:
        words = command_line(pid)
        where = Path(f"/proc/{pid}/cwd").readlink()
        return os.path.realpath(where / words[words.index("-c") + 1])
    except (OSError, ValueError, IndexError):
        return None


def command(path: str, name: str, arguments: object = None, *, ok: Sequence[int] = (0,)) -> object:
    """One command on a control socket; the answer's arguments. FileNotFoundError: nobody is there;
    DriverFailed: it refuses, or what answers isn't Kea; TimedOut: it hangs.
    https://kea.readthedocs.io/en/kea-2.2.0/arm/ctrl-channel.html"""
    order: dict[str, object] = {"command": name}
    if arguments is not None:
        order["arguments"] = arguments
    received = b""
    deadline = time.monotonic() + _LIMIT
    try:
        with _connected(path, deadline) as channel:
            channel.sendall(json.dumps(order).encode())
            channel.shutdown(socket.SHUT_WR)
            while part := channel.recv(65536):
                received += part
                if len(received) > _LONGEST:
                    raise DriverFailed(f"kea: the answer on {path} to {name} has no end")
                channel.settimeout(_left(deadline))
        answer = json_object(received)
        result, text = answer.get("result"), answer.get("text", "no reason given")
    except TimeoutError as error:
        raise _hangs(path) from error
    except (ConnectionError, ValueError, AttributeError) as error:
        raise DriverFailed(
            f"kea: what listens on {path} gives no answer of Kea's to {name}",
            remedy=f"see what that is: ss -xlp src {path}",
            detail=str(error),
        ) from error
    if result not in ok:
        raise DriverFailed(f"kea refuses {name}: {text}")
    return answer.get("arguments")


@contextlib.contextmanager
def _connected(path: str, deadline: float) -> Iterator[socket.socket]:
    """FileNotFoundError: nobody listens. TimedOut: whoever does takes no more connections (unix(7):
    EAGAIN where its queue is full). DriverFailed: it can't be connected to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        while True:
            try:
                channel.settimeout(_left(deadline))
                channel.connect(path)
                break
            except FileNotFoundError:
                raise
            except ConnectionRefusedError as error:  # the socket of one that died
                raise FileNotFoundError(error.errno, error.strerror, path) from error
            except BlockingIOError:
                time.sleep(0.05)
            except TimeoutError as error:
                raise _hangs(path) from error
            except OSError as error:
                raise DriverFailed(f"kea: {path} can't be connected to: {error}") from error
        yield channel


def _hangs(path: str) -> TimedOut:
    return TimedOut(
        f"kea: it hangs: no answer on its control socket {path} in {_LIMIT:g} s",
        remedy="see its log, and whether it is stopped (ps -eo stat,args); restart it",
    )


def _left(deadline: float) -> float:
    """Seconds until then. TimeoutError: none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def configuration(path: Path) -> object:
    """Kea's JSON as JSON: with what it includes, and without comments, each on lines of their own, which
    is what our templates write. OSError: a file can't be read. WrongState: it isn't such."""
    try:
        return json_value("".join(_lines(path)))
    except Malformed as error:
        remedy = "see what else writes it, or one that it includes; network-apply writes ours anew"
        raise damaged(path, "Kea's configuration", error, remedy) from error


def _lines(path: Path) -> Iterator[str]:
    for line in path.read_text(errors="surrogateescape").splitlines(keepends=True):
        if included := _INCLUDED.fullmatch(line):
            yield from _lines(Path(included[1]))
            yield included[2]
        elif not line.lstrip().startswith(("//", "#")):
            yield line
