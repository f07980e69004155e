"""nginx as a reverse proxy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from provision.network.daemons import command
from provision.network.document import Document
from provision.network.service import ApplyStep, Checker, Question, Service
from provision.network.templating import Unwritable, Word, backslashed

if TYPE_CHECKING:
    from inventory.fields import Address, ConfigPath, Lines, Port
    from inventory.model import Farm
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow

_HERE = IPv4Address("127.0.0.1")


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
        proxies = r.view.proxies
        long_names = len(proxies) > 256 or any(len(proxy.name) > 40 for proxy in proxies)
        yield Document(self.NAME, self.config, r.render("nginx", self, long_names=long_names))

    def checkers(self, farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        proxies = (proxy for vm in farm.vms.values() for proxy in vm.proxy)
        logs = {str(Path(proxy.access_log).parent) for proxy in proxies if proxy.access_log}
        shadow = (self.logs, "/run", *sorted(logs))
        yield Checker(("nginx", "-t", "-q", "-c", self.main), shadow)

    def steps(self, _farm: Farm, _changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        yield command(self.NAME, self.reload, self.alive)

    def questions(self, farm: Farm, view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        from provision.network import questions

        server = (str(self.address), self.port, self.tls_port)
        yield from questions.proxies(self.NAME, server, farm, view, rows)

    def not_live(self) -> Iterator[str]:
        yield "reloaded for each change; connections go on"
