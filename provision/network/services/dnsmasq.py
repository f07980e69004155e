"""dnsmasq: DHCP and DNS, its hosts in files that it reads by itself."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from inventory.errors import TimedOut
from provision.network.daemons import command, in_turn, lines, runs
from provision.network.document import Document
from provision.network.listeners import taken
from provision.network.service import (
    Apart,
    ApplyStep,
    Checker,
    Inclusion,
    Question,
    Service,
    Unserved,
)

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.errors import FarmhandError
    from inventory.fields import Address, Bool, ConfigPath, Interface, Lines, Port
    from inventory.model import Farm
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.service import OtherNames
    from provision.network.view import View, VmRow

_VERSION = b"fh\1\0\0\1\0\0\0\0\0\0\7version\4bind\0\0\x10\0\3"  # TXT, class CHAOS (RFC 1035, 4.1)
_DNS = 53
_TRIES, _PATIENCE = 3, 5.0  # seconds each
_HERE = IPv4Address("127.0.0.1")


@dataclass(frozen=True, kw_only=True)
class Dnsmasq(Service):
    """dnsmasq: DHCP (IPv4, and IPv6 where the network has `subnet6`) and DNS in one."""

    NAME: ClassVar = "dnsmasq"
    NEEDS_SUBNET: ClassVar = True
    TOOLS: ClassVar = {"dnsmasq": "dnsmasq-base", "dhcp_release": "dnsmasq-utils"}
    ANSWERS_DHCP: ClassVar = True
    DROP_INS: ClassVar = ("config",)
    READS_BY_ITSELF: ClassVar = True
    APART: ClassVar = ("config", "hosts")

    config: ConfigPath = "/etc/dnsmasq.d/farmhand.conf"
    """Its configuration."""
    main: ConfigPath = "/etc/dnsmasq.conf"
    """The server's own configuration, which the check begins with."""
    hosts: ConfigPath = "/var/lib/farmhand-dnsmasq"
    """A directory of ours, that it watches: dhcp/ and dns/ in it."""
    interface: Interface | None = None
    """Where it listens; absent: the network's `bridge`, else all."""
    dns: Bool = True
    """Whether it answers DNS too."""
    port: Port = 53
    """Where it answers DNS."""
    address: Address = _HERE
    """Where network-verify asks it."""
    restart: Lines = ("systemctl", "restart", "dnsmasq")
    """The command for a changed configuration."""
    reload: Lines = ("systemctl", "reload", "dnsmasq")
    """The command that sends it SIGHUP, so that removed hosts are forgotten."""
    alive: Lines = ("systemctl", "is-active", "--quiet", "dnsmasq")
    """The command that succeeds while it runs."""

    @property
    def ports(self) -> tuple[str, ...]:
        return ("port",) if self.dns else ()

    @property
    def whole(self) -> tuple[str, ...]:
        """A directory of hosts that two configurations name is read twice."""
        return "config", "hosts"

    def apart(self, other: OtherNames) -> Apart:
        note = ""
        if self.port != _DNS or not self.dns:
            note = (
                "one dnsmasq takes its port once, and the first farm's file has it: this farm's is for "
                "one of its own ('main', 'restart', 'reload', 'alive')"
            )
        return Apart(super().apart(other).keys, note)

    def documents(self, r: Renderer) -> Iterator[Document]:
        from provision.network.render import sharded

        interface = self.interface or r.farm.network.bridge or ""
        yield Document(
            self.NAME, self.config, r.render("dnsmasq", self, interface=interface, **r.dhcp())
        )
        kinds = [("dhcp", r.view.dhcp)]
        if self.dns:
            kinds.append(("dns", tuple(row for row in r.view.vms if row.address)))
        for kind, rows in kinds:
            for shard, some in sharded(rows):
                path = f"{self.hosts}/{kind}/{r.view.farm}-{shard}"
                yield Document(self.NAME, path, r.render(f"dnsmasq-{kind}", self, vms=some))

    def host_files(self, farm: Farm) -> tuple[tuple[str, str], ...]:
        return tuple((f"{self.hosts}/{kind}/{farm.farm}-", "") for kind in ("dhcp", "dns"))

    def refuses_by_itself(self, _farm: Farm) -> bool:
        """No checker reads hosts."""
        return True

    def checkers(self, _farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        yield Checker(("dnsmasq", "--test", "-C", self.config))
        if Path(self.main).exists():
            yield Checker(("dnsmasq", "--test", "-C", self.main))

    def inclusion(self) -> Inclusion | None:
        """Debian names its directory on the daemon's command line."""
        if Path(self.config).parent == Path("/etc/dnsmasq.d"):
            return None
        checker = Checker(("dnsmasq", "--test", "-C", self.main))
        remedy = f"as root: echo conf-file={self.config} >> {self.main}"
        return Inclusion(self.config, self.main, checker, remedy)

    def missing(
        self, farm: Farm, _files: Sequence[FileChange], runner: Runner
    ) -> Iterator[FarmhandError]:
        if runs(runner, self.alive):
            return
        link = self.interface or farm.network.bridge or ""  # a restart starts it
        wanted = [(67, link), *([(self.port, link)] if self.dns else [])]
        for port, where in wanted:
            yield from taken(runner, self.NAME, "udp", port, own=("dnsmasq",), link=where)

    def stopped(self, _farm: Farm, runner: Runner) -> Iterator[Unserved]:
        if not runs(runner, self.alive):
            yield Unserved(
                "dnsmasq doesn't run", command(self.NAME, self.restart, self.alive, restarts=True)
            )

    def is_live(self, _farm: Farm, runner: Runner) -> bool:
        return runs(runner, self.alive)

    def steps(self, farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        if any(change.path == self.config for change in changes):
            yield command(self.NAME, self.restart, self.alive, restarts=True)
            return
        gone = [line for c in changes for line in sorted(lines(c.before) - lines(c.after))]
        if not gone:
            text = "dnsmasq: it reads the new hosts by itself"
            yield ApplyStep(self.NAME, text, in_turn(self._start, self._check_answers))
            return
        told = command(self.NAME, self.reload, self.alive)

        yield ApplyStep(self.NAME, told.text, in_turn(told.run, self._check_answers))
        interface = self.interface or farm.network.bridge
        leases = [line for line in gone if re.match(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2},", line)]
        if interface and leases:
            yield _release(interface, leases)

    def _start(self, runner: Runner) -> None:
        """One that is stopped reads nothing by itself."""
        if not runs(runner, self.alive):
            command(self.NAME, self.restart, self.alive).run(runner)

    def _check_answers(self, _runner: Runner) -> None:
        """TimedOut where it takes a question and never answers: a signal, or a new file, then tells it
        nothing. One that doesn't listen there is for ``alive`` to tell. It is asked for its version
        (dnsmasq(8))."""
        if not self.dns:
            return
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(_PATIENCE)
            with contextlib.suppress(OSError):
                for _ in range(_TRIES):  # a datagram may be lost
                    with contextlib.suppress(TimeoutError):
                        asking.connect((str(self.address), self.port))
                        asking.send(_VERSION)
                        asking.recv(1)
                        return
                raise TimedOut(
                    f"dnsmasq: it hangs: no answer on {self.address} port {self.port} "
                    f"in {_TRIES * _PATIENCE:g} s",
                    remedy="see its log, and whether it is stopped (ps -eo stat,args); restart it",
                )

    def questions(self, _farm: Farm, _view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        if not self.dns:
            return
        from provision.network import questions

        named = ((row.address, row.fqdn) for row in rows.values() if row.address)
        server = (str(self.address), self.port)
        yield from questions.names(self.NAME, server, rows, reverse=questions.pointers(named))

    def not_live(self) -> Iterator[str]:
        yield "new hosts are read live; for a removed one it reads all of them again (SIGHUP)"


def _release(interface: str, lines: Sequence[str]) -> ApplyStep:
    """A removed host's lease would live on, and its name with it."""

    def run(runner: Runner) -> None:
        from host.run import which

        if which("dhcp_release") is None:
            return
        for line in lines:
            mac, address = line.split(",")[:2]
            runner.change("dhcp_release", interface, address, mac, ok=range(256))

    return ApplyStep(Dnsmasq.NAME, f"dnsmasq: release {len(lines)} lease{'s' * (len(lines) != 1)}", run)
