"""unbound: local data for the VMs, beside all else that it resolves; told over its control channel.

unbound.conf(5), unbound-control(8).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from host.processes import runs_here
from inventory.errors import DriverFailed, WrongState, some
from provision.network.daemons import Settling
from provision.network.document import Document
from provision.network.listeners import taken
from provision.network.service import ApplyStep, Checker, Inclusion, Question, Service, Unserved
from provision.network.templating import Word

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.errors import FarmhandError
    from inventory.fields import Address, Bool, ConfigPath, Lines, Port, TimeToLive
    from inventory.model import Farm
    from provision.network.file_change import FileChange
    from provision.network.renderer import Renderer
    from provision.network.view import View, VmRow

_HERE = IPv4Address("127.0.0.1")
_DATA = re.compile(r'^\s*local-data: "(.*)"$\n?', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Unbound(Service):
    """unbound: the VMs' names and addresses as local data of a resolver."""

    NAME: ClassVar = "unbound"
    TOOLS: ClassVar = {"unbound-checkconf": "unbound", "unbound-control": "unbound"}
    DROP_INS: ClassVar = ("config",)

    config: ConfigPath = "/etc/unbound/unbound.conf.d/farmhand.conf"
    """The file, one that unbound.conf includes with `include-toplevel`."""
    main: ConfigPath = "/etc/unbound/unbound.conf"
    """The server's own configuration, which the check begins with."""
    reverse: Bool = True
    """Whether addresses lead back to names."""
    ttl: TimeToLive = 3600
    """How long answers may be kept."""
    address: Address = _HERE
    """Where network-verify asks it."""
    port: Port = 53
    """Where it answers."""
    control: Lines = ("unbound-control",)
    """The command that tells the server, an argument list; `reload` and so on are added."""

    @property
    def ports(self) -> tuple[str, ...]:
        return ("port",)

    def documents(self, r: Renderer) -> Iterator[Document]:
        from provision.network.view import pointers

        rows = r.view.vms
        names = {
            (name, kind, address): None
            for row in rows
            for name in row.full
            for kind, address in (("A", row.address), ("AAAA", row.address6))
            if address
        }
        back = pointers(rows).items() if self.reverse else ()
        data = [*names, *((name, "PTR", Word(f"{vm}.")) for name, vm in back)]
        yield Document(self.NAME, self.config, r.render("unbound", self, data=data, ttl=int(self.ttl)))

    def checkers(self, _farm: Farm, _documents: Sequence[Document]) -> Iterator[Checker]:
        main = self.main if Path(self.main).exists() else self.config
        yield Checker(("unbound-checkconf", main))

    def inclusion(self) -> Inclusion:
        files = Path(self.config).with_name("*.conf")
        remedy = f"as root: echo 'include-toplevel: \"{files}\"' >> {self.main}"
        return Inclusion(self.config, self.main, Checker(("unbound-checkconf", self.main)), remedy)

    def missing(
        self, _farm: Farm, _files: Sequence[FileChange], runner: Runner
    ) -> Iterator[FarmhandError]:
        if self._there(runner) is None:
            yield WrongState(
                f"unbound doesn't answer on its control channel ({' '.join(self.control)})",
                remedy="start it (systemctl start unbound), with 'control-enable: yes' in its "
                "'remote-control:'",
            )
            at = (str(self.address),)
            yield from taken(runner, self.NAME, "udp", self.port, own=("unbound",), at=at)

    def unserved(self, _farm: Farm, files: Sequence[FileChange], runner: Runner) -> Iterator[Unserved]:
        for change in files:
            wanted = _data(change.after or "")
            there = self._there(runner)
            if there is not None and not there >= wanted:
                names = {_name(one) for one in wanted - there}
                yield Unserved(f"unbound lacks data of {some(sorted(names))}", self._read_again(wanted))

    def _read_again(self, wanted: frozenset[str]) -> ApplyStep:
        text = f"unbound: {' '.join((*self.control, 'reload'))}"
        return ApplyStep(self.NAME, text, partial(self._reload, wanted))

    def is_live(self, _farm: Farm, runner: Runner) -> bool:
        return runs_here(self.NAME) or self._there(runner) is not None

    def steps(self, _farm: Farm, changes: Sequence[FileChange]) -> Iterator[ApplyStep]:
        """By data that go and come, where nothing else differs: a reload empties the cache."""
        for change in changes:
            before, after = change.before, change.after
            if before is None or after is None or _rest(before) != _rest(after):
                yield self._read_again(_data(after or ""))
                continue
            old, new = _data(before), _data(after)
            names = {_name(one) for one in old ^ new}
            text = f"unbound: change the local data of {len(names)} name{'s' * (len(names) != 1)}"
            yield ApplyStep(self.NAME, text, partial(self._change, old, new))

    def _change(self, old: frozenset[str], new: frozenset[str], runner: Runner) -> None:
        """A name loses all its data at once. So if it has others too, by hand, or not ours, then all is
        read again."""
        touched = {_name(one) for one in old - new}
        there = {one for one in self._there(runner) or () if _name(one) in touched}
        if there != {one for one in old if _name(one) in touched}:
            self._reload(new, runner)
            return
        coming = {one for one in new if one not in old or _name(one) in touched}
        for order, lines in (("local_datas_remove", touched), ("local_datas", coming)):
            if lines:
                text = "".join(f"{line}\n" for line in sorted(lines))
                runner.change(*self.control, order, input=text.encode(), timeout=120)
        self._wait(new, runner)

    def _reload(self, wanted: frozenset[str], runner: Runner) -> None:
        runner.change(*self.control, "reload", timeout=120)
        self._wait(wanted, runner)

    def _wait(self, wanted: frozenset[str], runner: Runner) -> None:
        """It answers before it has read its files, and ends if it can't."""
        settling = Settling()
        while (there := self._there(runner)) is None or not there >= wanted:
            if settling.over():
                if there is None:
                    said = "unbound does not answer on its control channel"
                    raise DriverFailed(said, remedy="see its log")
                raise DriverFailed(
                    "unbound does not serve all of the farm's names",
                    remedy=f"include {self.config} in {self.main}; see its log",
                )
            time.sleep(0.05)

    def _there(self, runner: Runner) -> frozenset[str] | None:
        """All local data, other than the farm's too. None: it doesn't answer."""
        result = runner.read(*self.control, "list_local_data", ok=range(256))
        return None if result.status else frozenset(map(_plain, result.stdout.splitlines()))

    def questions(self, _farm: Farm, view: View, rows: Mapping[str, VmRow]) -> Iterator[Question]:
        from provision.network import questions

        of_first = (
            (a, row.fqdn) for row in reversed(view.vms) for a in (row.address, row.address6) if a
        )
        reverse = questions.pointers(of_first) if self.reverse else {}
        yield from questions.names(self.NAME, (str(self.address), self.port), rows, reverse=reverse)


def _data(text: str) -> frozenset[str]:
    """Resource records of a file of ours."""
    return frozenset(_plain(match[1]) for match in _DATA.finditer(text))


def _plain(record: str) -> str:
    """With single spaces, as they are compared."""
    return " ".join(record.split())


def _name(record: str) -> str:
    return record.partition(" ")[0]


def _rest(text: str) -> str:
    """All but records, and the mark in the first line."""
    return _DATA.sub("", text.partition("\n")[2])
