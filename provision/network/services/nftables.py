"""nftables: a table of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inventory.errors import CommandFailed, FarmhandError, NotOurs, some
from provision.network.document import Document
from provision.network.service import ApplyStep, Checker, Inclusion, Question, Service, Unserved
from provision.network.templating import Unwritable, Word

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.fields import Address, ConfigPath, Interface, Lines
    from inventory.model import Farm
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow

_CHAINS = ("prerouting", "output")
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
    main: ConfigPath = "/etc/nftables.conf"
    """What a boot loads: it is looked at whether it includes ours."""
    at_boot: Lines = ("systemctl", "is-enabled", "--quiet", "nftables")
    """The command that succeeds if a boot loads it."""
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

    def inclusion(self) -> Inclusion:
        """By a pattern: where no file fits one, as when ours is gone, that is no error."""
        path = Path(self.config)
        files = path.with_name(f"*{path.suffix}") if path.suffix else f"{path}*"
        remedy = f"as root: echo 'include \"{files}\"' >> {self.main}"
        checker = Checker((*self.nft, "-c", "-f", self.main))
        return Inclusion(self.config, self.main, checker, remedy, self.at_boot)

    def missing(
        self, farm: Farm, files: Sequence[FileChange], runner: Runner
    ) -> Iterator[FarmhandError]:
        for change in files:
            if change.after is None or change.before == change.after:
                continue
            if _element_changes(change.before, change.after, _table(farm)) is None:
                self._live(farm, change).check(runner)
        yield from ()

    def unserved(self, farm: Farm, files: Sequence[FileChange], runner: Runner) -> Iterator[Unserved]:
        for change in files:
            live = self._live(farm, change)
            if (lacks := live.lacks(runner)) is not None:
                yield Unserved(lacks, self._load(live, change))

    def is_live(self, farm: Farm, runner: Runner) -> bool:
        return _Live(self.nft, _table(farm)).is_there(runner)

    def steps(self, farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        for change in changes:
            live = self._live(farm, change)
            if not change.after:
                yield _step("take the table away", live.remove)
                continue
            moves = _element_changes(change.before, change.after, live.table)
            load = self._load(live, change)
            if moves is None:
                yield load
            else:
                yield _step("change the map's elements", partial(live.move, moves, otherwise=load.run))

    def _live(self, farm: Farm, change: FileChange) -> _Live:
        if change.before is change.after is None:
            return _Live(self.nft, _table(farm))
        return _Live(self.nft, _table(farm), _elements(change.before) | _elements(change.after))

    def _load(self, live: _Live, change: FileChange) -> ApplyStep:
        return _step(f"{' '.join(self.nft)} -f {change.path}", partial(live.load, change.path))

    def questions(self, farm: Farm, view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        from provision.network import questions

        address = str(self.address or farm.network.gateway or "")
        for row in view.nat:
            if row.vm in rows:
                yield questions.nat(address, row, self.NAME)


def _table(farm: Farm) -> str:
    return f"farmhand_{farm.farm.replace('-', '_')}"


def _elements(text: str | None) -> set[str]:
    match = _ELEMENTS.search(text or "")
    return {line.strip().rstrip(",") for line in match[1].splitlines()} if match else set()


def _element_changes(before: str | None, after: str, table: str) -> str | None:
    """nft(8) commands that make one file's map the other's, in one transaction. None where something
    else differs too."""
    if before is None:
        return None
    rest = [_ELEMENTS.sub("", text).partition("\n")[2] for text in (before, after)]
    if rest[0] != rest[1]:
        return None
    old, new = _elements(before), _elements(after)
    script = ""
    for verb, elements in (("delete", old - new), ("add", new - old)):
        if elements:
            script += f"{verb} element ip {table} ssh {{ {', '.join(sorted(elements))} }}\n"
    return script


@dataclass(frozen=True, slots=True)
class _Live:
    """The kernel's table. ``elements``: of its map, those that are ours, before or after; None: all.
    What else is in a table of our name is somebody's, and is never flushed: NotOurs."""

    nft: Sequence[str]
    table: str
    elements: set[str] | None = None

    def load(self, path: str, runner: Runner) -> None:
        self.check(runner)
        runner.change(*self.nft, "-f", path, timeout=120)

    def remove(self, runner: Runner) -> None:
        """Where others use the table, what is of the map goes, and leads nowhere any more."""
        try:
            self.check(runner)
        except NotOurs:
            for element in sorted(self.elements or ()):
                script = f"delete element ip {self.table} ssh {{ {element} }}\n"
                runner.change(*self.nft, "-f", "-", input=script.encode(), ok=range(256))
            raise
        script = f"table ip {self.table}\ndelete table ip {self.table}\n"
        runner.change(*self.nft, "-f", "-", input=script.encode(), timeout=120)

    def move(self, moves: str, runner: Runner, *, otherwise: Callable[[Runner], None]) -> None:
        """``otherwise``: for when the kernel's table isn't what our file said."""
        try:
            runner.change(*self.nft, "-f", "-", input=moves.encode(), timeout=120)
        except CommandFailed:
            otherwise(runner)

    def lacks(self, runner: Runner) -> str | None:
        """What the kernel hasn't of ours: the table, elements of its map, rules."""
        listed = self._list(runner)
        if listed is None:
            return f"the kernel has no table ip {self.table}"
        kinds = [next(iter(entry.items())) for entry in json.loads(listed)["nftables"]]
        there = {one for kind, found in kinds if kind == "map" for one in _written(found)}
        rules = {found["chain"] for kind, found in kinds if kind == "rule"}
        lost = sorted((self.elements or set()) - there)
        gone = [*lost, *(name for name in _CHAINS if name not in rules)]
        return f"table ip {self.table} of the kernel lacks {some(gone)}" if gone else None

    def is_there(self, runner: Runner) -> bool:
        return self._list(runner) is not None

    def check(self, runner: Runner) -> None:
        """NotOurs: others have something in it."""
        listed = self._list(runner)
        theirs = list(self._theirs(listed)) if listed is not None else []
        if theirs:
            raise NotOurs(
                f"nftables: in table ip {self.table} is what farmhand didn't put there: {some(theirs)}; "
                "it is left as it is",
                remedy=f"move that to another table, or: nft delete table ip {self.table}",
            )

    def _list(self, runner: Runner) -> str | None:
        """The table, see libnftables-json(5). None: there is none. CommandFailed: it can't be seen."""
        argv = (*self.nft, "-j", "list", "table", "ip", self.table)
        listed = runner.read(*argv, ok=range(256))
        if listed.status != 0 and "No such file" not in listed.stderr:
            runner.read(*argv)
        return listed.stdout if listed.status == 0 else None

    def _theirs(self, listed: str) -> Iterator[str]:
        rules = dict.fromkeys(_CHAINS, 0)
        for entry in json.loads(listed)["nftables"]:
            [(kind, found)] = entry.items()
            called = found.get("name", "")
            if kind == "rule":
                chain, text = found["chain"], json.dumps(found["expr"])
                if chain in rules:
                    rules[chain] += 1
                    if rules[chain] > 1 or '"dnat"' not in text or '"@ssh"' not in text:
                        yield f"a rule in {chain}"
            elif kind == "map" and called == "ssh":
                yield from sorted(_written(found) - self.elements) if self.elements is not None else ()
            elif kind not in {"metainfo", "table"} and not (kind == "chain" and called in rules):
                yield f"{kind} {called}".rstrip()


def _written(ssh: Mapping[str, Any]) -> set[str]:
    """The map's elements as our file has them."""
    found = set()
    for key, value in ssh.get("elem", ()):
        address, port = value["concat"]
        found.add(f"{key} : {address} . {port}")
    return found


def _step(text: str, run: Callable[[Runner], None]) -> ApplyStep:
    return ApplyStep(Nftables.NAME, f"nftables: {text}", run)
