"""nftables: a table of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from inventory.errors import CommandFailed
from provision.network.daemons import command
from provision.network.document import Document
from provision.network.service import ApplyStep, Checker, Question, Service
from provision.network.templating import Unwritable, Word

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.fields import Address, ConfigPath, Interface, Lines
    from inventory.model import Farm
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow

_ELEMENTS = re.compile(r"^\t\telements = \{\n(.*?)^\t\t\}\n", re.MULTILINE | re.DOTALL)


def _string(text: str) -> Word:
    if '"' in text:
        raise Unwritable("nft has no way to write a '\"' in a string")
    return Word(f'"{text}"')


@dataclass(frozen=True, kw_only=True)
class Nftables(Service):
    """nftables: a table of ours that leads `nat_port` of this machine to the VMs."""

    NAME: ClassVar = "nftables"
    TOOLS: ClassVar = {"nft": "nftables"}
    STRINGS: ClassVar = {"nftables": _string}

    config: ConfigPath = "/etc/nftables.d/farmhand.nft"
    """The file, to `include` from nftables.conf."""
    interface: Interface | None = None
    """Where connections come in; absent: anywhere."""
    address: Address | None = None
    """The address they are for; absent: any of this machine's."""
    nft: Lines = ("nft",)
    """The command, an argument list."""

    def documents(self, r: Renderer) -> Iterator[Document]:
        text = r.render("nftables", self, address=Word(self.address or ""))
        yield Document(self.NAME, self.config, text)

    def checkers(self, _farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        yield Checker((*self.nft, "-c", "-f", self.config))

    def steps(self, farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        table = f"farmhand_{farm.farm.replace('-', '_')}"
        for change in changes:
            if change.after is None:
                script = f"table ip {table}\ndelete table ip {table}\n"
                yield _nft(self.nft, "take the table away", script)
                continue
            moves = _element_changes(change.before, change.after, table)
            if moves is None:
                yield command(self.NAME, (*self.nft, "-f", change.path))
            else:
                yield _nft(self.nft, "change the map's elements", moves, otherwise=change.path)

    def questions(self, farm: Farm, view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        from provision.network import questions

        address = str(self.address or farm.network.gateway or "")
        for row in view.nat:
            if row.vm in rows:
                yield questions.nat(address, row, self.NAME)


def _element_changes(before: str | None, after: str, table: str) -> str | None:
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


def _nft(nft: Sequence[str], text: str, script: str, *, otherwise: str = "") -> ApplyStep:
    def run(runner: Runner) -> None:
        try:
            runner.change(*nft, "-f", "-", input=script.encode())
        except CommandFailed:
            if not otherwise:
                raise
            runner.change(*nft, "-f", otherwise)  # the kernel's table isn't what our file said

    return ApplyStep(Nftables.NAME, f"nftables: {text}", run)
