"""haproxy as a reverse proxy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, ClassVar

from provision.network.daemons import command
from provision.network.document import Document
from provision.network.service import ApplyStep, Checker, Question, Service
from provision.network.templating import Word

if TYPE_CHECKING:
    from inventory.errors import Problem
    from inventory.fields import Address, ConfigPath, Lines, Own, Port
    from inventory.model import Farm
    from inventory.places import Places
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow

_HERE = IPv4Address("127.0.0.1")


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

    def steps(self, _farm: Farm, _changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        yield command(self.NAME, self.reload, self.alive)

    def questions(self, farm: Farm, view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        from provision.network import questions

        server = (str(self.address), self.port, self.tls_port)
        yield from questions.proxies(self.NAME, server, farm, view, rows)

    def not_live(self) -> Iterator[str]:
        yield "reloaded for each change; connections go on"
