"""ISC dhcpd, which reads its file at its start alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from host.ports import holders
from host.processes import runs_here
from inventory.errors import CommandFailed
from provision.network.daemons import command, runs
from provision.network.document import Document
from provision.network.listeners import older, taken
from provision.network.service import Apart, ApplyStep, Checker, Service, Unserved, one_file
from provision.network.templating import Word

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.errors import FarmhandError
    from inventory.fields import ConfigPath, Lines, Own
    from inventory.model import Farm
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.service import OtherNames


def _string(text: str) -> Word:
    """dhcpd.conf(5): octal escapes."""
    return Word(
        '"'
        + "".join(
            f"\\{chr(byte)}" if byte in b'"\\' else chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}"
            for byte in text.encode()
        )
        + '"'
    )


@dataclass(frozen=True, kw_only=True)
class Dhcpd(Service):
    """ISC dhcpd (DHCPv4)."""

    NAME: ClassVar = "dhcpd"
    NEEDS_SUBNET: ClassVar = True
    TOOLS: ClassVar = {"dhcpd": "isc-dhcp-server"}
    STRINGS: ClassVar = {"dhcpd": _string}
    CAN_SHARE: ClassVar = ("config",)
    ANSWERS_DHCP: ClassVar = True

    config: ConfigPath = "/etc/dhcp/dhcpd.conf"
    """Its configuration."""
    own: Own = "file"
    """`file`: all of it is ours. `block`: a marked block of host statements in the admin's own."""
    reload: Lines = ("systemctl", "restart", "isc-dhcp-server")
    """The command that makes it read its file: it can only be restarted."""
    alive: Lines = ("systemctl", "is-active", "--quiet", "isc-dhcp-server")
    """The command that succeeds while it runs."""

    def apart(self, _other: OtherNames) -> Apart:
        """One dhcpd reads one file, and answers for all of a bridge."""
        return Apart({"own": "block"}, one_file(self.config)) if not self.own_block else Apart({})

    def documents(self, r: Renderer) -> Iterator[Document]:
        yield Document(self.NAME, self.config, r.render("dhcpd", self, **r.dhcp()), own=self.own)

    def checkers(self, _farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        yield Checker(("dhcpd", "-t", "-4", "-cf", self.config))

    def missing(
        self, farm: Farm, _files: Sequence[FileChange], runner: Runner
    ) -> Iterator[FarmhandError]:
        if not runs(runner, self.alive):  # a restart starts it
            link = farm.network.bridge or ""
            yield from taken(runner, self.NAME, "udp", 67, own=(), link=link)

    def stopped(self, _farm: Farm, runner: Runner) -> Iterator[Unserved]:
        if not runs(runner, self.alive):
            yield Unserved(
                "dhcpd doesn't run", command(self.NAME, self.reload, self.alive, restarts=True)
            )

    def unserved(self, _farm: Farm, files: Sequence[FileChange], runner: Runner) -> Iterator[Unserved]:
        found = [one for one in holders(runner, "udp", 67) or () if one.program == "dhcpd"]
        for change in files:
            if older(found, change.path):
                text = f"dhcpd runs since before {change.path} was written"
                yield Unserved(text, command(self.NAME, self.reload, self.alive, restarts=True))

    def is_live(self, _farm: Farm, runner: Runner) -> bool:
        return self._runs(runner)

    def _runs(self, runner: Runner) -> bool:
        return runs_here(self.NAME) or runs(runner, self.alive)

    def steps(self, _farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        if any(change.after for change in changes):
            yield command(self.NAME, self.reload, self.alive, restarts=True)
            return
        told = command(self.NAME, self.reload, restarts=True)
        yield replace(told, run=partial(self._ends, told.run))

    def _ends(self, restart: Callable[[Runner], None], runner: Runner) -> None:
        """Without its file it isn't started again, and whoever restarts it may call that a failure."""
        try:
            restart(runner)
        except CommandFailed:
            if self._runs(runner):
                raise

    def not_live(self) -> Iterator[str]:
        yield "it reads its file at start only: each change restarts it, in about a second"
