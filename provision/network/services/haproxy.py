"""haproxy as a reverse proxy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, ClassVar

from host.processes import runs_here
from inventory.errors import DriverFailed
from provision.network.daemons import command, in_turn, runs, stopped
from provision.network.document import Document
from provision.network.listeners import taken, unread, wait_until_read
from provision.network.service import (
    Apart,
    ApplyStep,
    Checker,
    Question,
    Service,
    Unserved,
    one_file,
)
from provision.network.templating import Word

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.errors import FarmhandError, Problem
    from inventory.fields import Address, ConfigPath, Lines, Own, Port
    from inventory.model import Farm
    from inventory.places import Places
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.service import OtherNames
    from provision.network.view import View, VmRow

_HERE = IPv4Address("127.0.0.1")


_BIND = re.compile(r"^\tbind \*:(\d+)\b", re.MULTILINE)


def _ports(files: Sequence[FileChange]) -> tuple[int, ...]:
    """Where it is to listen."""
    found = (port for change in files for port in _BIND.findall(change.after or ""))
    return tuple(map(int, dict.fromkeys(found)))


def _string(text: str) -> Word:
    """Strong quotes: nothing in them is special (haproxy's configuration manual, 2.2)."""
    return Word("'" + text.replace("'", "'\\''") + "'")


@dataclass(frozen=True, kw_only=True)
class Haproxy(Service):
    """haproxy: the VMs' `proxy` names as virtual hosts."""

    NAME: ClassVar = "haproxy"
    FILES: ClassVar = ("config", "map")
    TOOLS: ClassVar = {"haproxy": "haproxy"}
    STRINGS: ClassVar = {"haproxy": _string}
    CAN_SHARE: ClassVar = ("config",)
    APART: ClassVar = ("config", "own", "map", "port", "tls_port")

    config: ConfigPath = "/etc/haproxy/haproxy.cfg"
    """Its configuration."""
    own: Own = "file"
    """`file`: all of it is ours. `block`: a marked block with a frontend and backends of ours."""
    map: ConfigPath = "/etc/haproxy/farmhand.map"
    """A file of ours: which name leads to which backend."""
    address: Address = _HERE
    """Where network-verify asks it."""
    port: Port = 80
    """The port of plain HTTP."""
    tls_port: Port = 443
    """The port of names with a certificate."""
    reload: Lines = ("systemctl", "reload", "haproxy")
    """The command that makes it read its files."""
    alive: Lines = ("systemctl", "is-active", "--quiet", "haproxy")
    """The command that succeeds while it runs."""

    @property
    def ports(self) -> tuple[str, ...]:
        return "port", "tls_port"

    @property
    def whole(self) -> tuple[str, ...]:
        """Two frontends that listen on one port each get some of its connections."""
        return *super().whole, "port", "tls_port"

    def apart(self, other: OtherNames) -> Apart:
        keys = {"map": other.path(self.map)}
        keys |= {key: other.port(getattr(self, key)) for key in ("port", "tls_port")}
        note = f"its names are served on port {keys['port']}, and {keys['tls_port']} with TLS"
        if self.own_block:
            return Apart(keys, note)
        return Apart({**keys, "own": "block"}, f"{one_file(self.config)}; {note}")

    def problems(self, farm: Farm, places: Places) -> Iterator[Problem]:
        for name, vm in farm.vms.items():
            for number, proxy in enumerate(vm.proxy):
                if proxy.key is not None:
                    yield places.problem(
                        ("vms", name, "proxy", number, "key"),
                        "haproxy reads the key from the certificate's file: put it there, leave 'key' "
                        "out",
                    )

    def documents(self, r: Renderer) -> Iterator[Document]:
        certificates = tuple(dict.fromkeys(p.certificate for p in r.view.proxies if p.certificate))
        yield Document(self.NAME, self.map, r.render("haproxy-map", self))
        text = r.render("haproxy", self, certificates=certificates)
        yield Document(self.NAME, self.config, text, own=self.own)

    def checkers(self, _farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        yield Checker(("haproxy", "-c", "-q", "-f", self.config))

    def missing(
        self, _farm: Farm, files: Sequence[FileChange], runner: Runner
    ) -> Iterator[FarmhandError]:
        down = tuple(stopped(runner, self.NAME, self.alive, self.reload))
        yield from down
        for port in _ports(files) if down or runs_here(self.NAME) else ():
            yield from taken(runner, self.NAME, "tcp", port, own=(self.NAME,))

    def unserved(self, _farm: Farm, files: Sequence[FileChange], runner: Runner) -> Iterator[Unserved]:
        if (why := unread(runner, self.NAME, _ports(files), [c.path for c in files])) is not None:
            yield Unserved(why, self._reload(files))

    def is_live(self, _farm: Farm, runner: Runner) -> bool:
        return runs_here(self.NAME) or runs(runner, self.alive)

    def steps(self, _farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        told = self._reload(changes)
        if any(change.path == self.config and not change.after for change in changes):
            told = replace(told, run=self._ends)
        yield told

    def _ends(self, runner: Runner) -> None:
        """Without a configuration it can't be told anything: it goes on with what it had."""
        if runs(runner, self.alive):
            raise DriverFailed(
                f"{self.config} is gone, and it runs on with what it had", remedy="stop it"
            )

    def _reload(self, files: Sequence[FileChange]) -> ApplyStep:
        """It goes on with its old configuration where it can't take the new one, and says nothing."""
        told = command(self.NAME, self.reload, self.alive)
        paths = [change.path for change in files if change.after is not None]
        seen = partial(wait_until_read, program=self.NAME, ports=_ports(files), paths=paths)
        return replace(told, run=in_turn(told.run, seen))

    def questions(self, farm: Farm, view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        from provision.network import questions

        server = (str(self.address), self.port, self.tls_port)
        yield from questions.proxies(self.NAME, server, farm, view, rows)

    def not_live(self) -> Iterator[str]:
        yield "reloaded for each change; connections go on"
