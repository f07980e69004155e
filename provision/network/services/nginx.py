"""nginx as a reverse proxy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from zlib import crc32

from host.processes import runs_here
from provision.network.daemons import command, in_turn, stopped
from provision.network.document import Document
from provision.network.listeners import taken, unread, wait_until_read
from provision.network.service import ApplyStep, Checker, Inclusion, Question, Service, Unserved
from provision.network.templating import Unwritable, Word, backslashed

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.errors import FarmhandError
    from inventory.fields import Address, ConfigPath, Lines, Port
    from inventory.model import Farm
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow

_HERE = IPv4Address("127.0.0.1")
_LONG = 40
"""Longer names don't fit nginx's hash of names as it is by itself. A pattern isn't in it: a directive
for a larger one would be refused where the admin has it too."""
_LISTEN = re.compile(r"^\s*listen (\d+)\b", re.MULTILINE)


def _ports(files: Sequence[FileChange]) -> tuple[int, ...]:
    """Where it is to listen."""
    found = (port for change in files for port in _LISTEN.findall(change.after or ""))
    return tuple(map(int, dict.fromkeys(found)))


def _string(text: str) -> Word:
    if "$" in text:
        raise Unwritable("nginx has no way to write '$' itself: it begins a variable")
    return backslashed(text)


@dataclass(frozen=True, kw_only=True)
class Nginx(Service):
    """nginx: the VMs' `proxy` names as virtual hosts."""

    NAME: ClassVar = "nginx"
    TOOLS: ClassVar = {"nginx": "nginx-light"}
    STRINGS: ClassVar = {"nginx": _string}
    DROP_INS: ClassVar = ("config",)

    config: ConfigPath = "/etc/nginx/sites-enabled/farmhand"
    """The file, one that nginx.conf includes within http."""
    main: ConfigPath = "/etc/nginx/nginx.conf"
    """The server's own configuration, which the check begins with."""
    logs: ConfigPath = "/var/log/nginx"
    """The directory of the access logs, NAME.access.log each."""
    address: Address = _HERE
    """Where network-verify asks it."""
    port: Port = 80
    """The port of plain HTTP."""
    tls_port: Port = 443
    """The port of names with a certificate."""
    reload: Lines = ("systemctl", "reload", "nginx")
    """The command that makes it read its files."""
    alive: Lines = ("systemctl", "is-active", "--quiet", "nginx")
    """The command that succeeds while it runs."""

    @property
    def ports(self) -> tuple[str, ...]:
        return "port", "tls_port"

    def documents(self, r: Renderer) -> Iterator[Document]:
        upgrade = Word(f"farmhand_{crc32(r.farm.farm.encode()):08x}_upgrade")  # short, for its hash
        text = r.render("nginx", self, long=_LONG, pattern=_pattern, upgrade=upgrade)
        yield Document(self.NAME, self.config, text)

    def checkers(self, farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        proxies = (proxy for vm in farm.vms.values() for proxy in vm.proxy)
        logs = {str(Path(proxy.access_log).parent) for proxy in proxies if proxy.access_log}
        shadow = (self.logs, "/run", *sorted(logs))
        yield Checker(("nginx", "-t", "-q", "-c", self.main), shadow)

    def inclusion(self) -> Inclusion:
        checker = Checker(("nginx", "-t", "-q", "-c", self.main), (self.logs, "/run"))
        remedy = f"within http {{ }} of {self.main}: include {self.config};"
        return Inclusion(self.config, self.main, checker, remedy)

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

    def steps(self, _farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        yield self._reload(changes)

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


def _pattern(name: str) -> Word:
    """A server_name that is the name alone."""
    return Word('"~^' + name.replace(".", r"\.") + '$"')
