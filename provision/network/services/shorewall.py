"""shorewall, whose rules are compiled."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from inventory.errors import FarmhandError
from provision.network.daemons import command, runs
from provision.network.document import Document
from provision.network.service import ApplyStep, Checker, NotAsked, Question, Service, Unserved
from provision.network.templating import Word

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.fields import Address, ConfigPath, Lines, Name
    from inventory.model import Farm
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow


def _string(text: str) -> Word:
    return Word(shlex.quote(text))


def _variable(farm: Farm, vm: str) -> Word:
    """The shell variable of its address, in params."""
    return Word(f"VM_{vm}_{farm.farm}".upper().replace("-", "_"))


@dataclass(frozen=True, kw_only=True)
class Shorewall(Service):
    """shorewall: marked blocks in rules and params, as the XiVO farm has them."""

    NAME: ClassVar = "shorewall"
    FILES: ClassVar = ()
    APART: ClassVar = ()
    TOOLS: ClassVar = {"shorewall": "shorewall"}
    STRINGS: ClassVar = {"shorewall-params": _string}

    directory: ConfigPath = "/etc/shorewall"
    """Where rules and params are."""
    source: Name = "net"
    """The zone that connections come from."""
    zone: Name = "loc"
    """The zone that the VMs are in."""
    address: Address | None = None
    """The address they are for; absent: any."""
    reload: Lines = ("shorewall", "reload")
    """The command that makes it read its files, and starts it."""
    alive: Lines = ("shorewall", "status")
    """The command that succeeds while its rules are loaded."""

    def documents(self, r: Renderer) -> Iterator[Document]:
        for name in ("params", "rules"):
            text = r.render(
                f"shorewall-{name}",
                self,
                address=Word(self.address or ""),
                variable=partial(_variable, r.farm),
            )
            yield Document(self.NAME, f"{self.directory}/{name}", text, 0o640, "block")

    def variables(self, farm: Farm) -> Iterator[tuple[str, str]]:
        return ((name, _variable(farm, name)) for name, vm in farm.vms.items() if vm.nat_port)

    def checkers(self, _farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        yield Checker(("shorewall", "check", self.directory), ("/var/lib/shorewall",))

    def stopped(self, _farm: Farm, runner: Runner) -> Iterator[Unserved]:
        if not runs(runner, self.alive):
            told = command(self.NAME, self.reload, self.alive)
            yield Unserved("shorewall's rules aren't loaded", told)

    def is_live(self, _farm: Farm, runner: Runner) -> bool:
        return runs(runner, self.alive)

    def steps(self, _farm: Farm, _changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        yield command(self.NAME, self.reload)

    def questions(self, _farm: Farm, view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        from provision.network import questions

        outside = self.address is not None and not _ours(str(self.address))
        for row in view.nat:
            if row.vm in rows:
                yield questions.nat(str(self.address), row, self.NAME) if outside else _rule(row)

    def not_live(self) -> Iterator[str]:
        yield "its rules are compiled and loaded anew for each change, in seconds"


def _ours(address: str) -> bool:
    """Whether this machine has the address."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _rule(row: VmRow) -> Question:
    """From this machine itself a rule for the outside can't be tried: the kernel is asked for it."""
    target = f"{row.address}:{row.port}"

    def ask() -> str:
        from host.run import Runner

        try:
            rules = Runner().read("iptables", "-w", "-t", "nat", "-S").stdout
        except FarmhandError as error:
            raise NotAsked(f"could not be asked: {error.message}") from None
        match = re.search(rf"--dport {row.nat_port} .*--to-destination (\S+)", rules)
        return match[1] if match else "no rule"

    text = f"the kernel's rule for port {row.nat_port}, expect {target}"
    return Question(Shorewall.NAME, row.vm, text, partial(str, target), ask)
