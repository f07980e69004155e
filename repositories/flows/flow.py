"""Flows: what each experimental flow is, as a document of ours. How one is changed is in
``repositories.flows.change``."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Literal

from host.documents import Malformed, damaged, json_object, made, read_file
from host.files import write_atomic
from host.printable import one_line
from inventory.errors import Call, NotFound, UsageError, WrongState, some
from repositories.flows.bisection import Bisection
from repositories.generation import Generation
from repositories.layout import Layout
from repositories.leases import give_back, leases
from repositories.package import Package

State = Literal["open", "passed", "failed"]
_HOLDER = "flow "
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_KEPT = re.compile(rf"{_NAME.pattern}(?:@[0-9]{{1,18}})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRun:
    """A test of one of its generations. ``build``: the record of the build that tested it, ``vms`` its
    VMs; "" and none where somebody said so by hand."""

    generation: int
    passed: bool
    at: datetime
    by: str
    build: str = ""
    vms: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Packages on their way to a channel. ``candidate``: the generation of ``base`` and ``packages``.
    ``bisection``: how far it is with finding out which of them fail; ``trial`` then is the generation
    that is to be tested next. ``out``: those found so, and left out since. ``result``: the generation
    that the channel got of it. 0: none."""

    name: str
    channel: str
    base: int
    candidate: int
    packages: tuple[Package, ...]
    state: State = "open"
    by: str
    began: datetime
    ended: datetime | None = None
    note: str = ""
    runs: tuple[FlowRun, ...] = ()
    bisection: Bisection | None = None
    trial: int = 0
    out: tuple[Package, ...] = ()
    result: int = 0

    @property
    def holder(self) -> str:
        """Of its leases."""
        return f"{_HOLDER}{self.name}"

    @property
    def to_test(self) -> int:
        """The generation that is to be tested now."""
        return self.trial or self.candidate

    @property
    def needs(self) -> frozenset[int]:
        """The generations that it has leases of."""
        if self.state != "open":
            return frozenset()
        return frozenset({self.base, self.candidate, self.trial} - {0})

    @property
    def had(self) -> frozenset[int]:
        """The generations that are, or were, its own."""
        return frozenset({self.candidate, self.trial, *(run.generation for run in self.runs)} - {0})

    def of_unit(self, *units: str) -> tuple[Package, ...]:
        """Its packages that belong to these units."""
        return tuple(package for package in self.packages if unit(package) in units)

    @property
    def units(self) -> tuple[str, ...]:
        """What is tested as one: packages of one source name each other by their exact version."""
        return tuple(dict.fromkeys(map(unit, self.packages)))

    def passed_as(self, result: Generation) -> Flow:
        """Over, as the generation that its channel got."""
        return replace(self, state="passed", ended=result.made, result=result.sequence)


def unit(package: Package) -> str:
    return package.source or package.name


class Flows:
    """The documents of a repository's flows. One that is over gives its name to the next of that name,
    and is kept as ``NAME@CANDIDATE``."""

    def __init__(self, layout: Layout, repository: str) -> None:
        self._layout = layout
        self._repository = repository

    def find(self, name: str) -> Flow | None:
        """The present, or last, one of that name. WrongState: its document is damaged."""
        check_name(name, _KEPT)
        path = self._layout.flow(name)
        try:
            return made(Flow, json_object(read_file(path)))
        except FileNotFoundError:
            return None
        except (OSError, Malformed, ValueError) as error:
            remedy = f"put it back from a backup, or remove it: flow {name} is lost then, no package is"
            raise damaged(path, f"the document of flow {name}", error, remedy) from error

    def read(self, name: str) -> Flow:
        """NotFound, WrongState."""
        found = self.find(name)
        if found is None:
            have = [flow.name for flow in self.all() if flow.state == "open"]
            raise NotFound(
                f"{self._repository} has no flow {name}: it has {some(have) if have else 'none'}",
                remedy=Call("flow-list", repo=self._repository),
            )
        return found

    def open(self, name: str) -> Flow:
        """NotFound, WrongState: it is over."""
        found = self.read(name)
        if found.state != "open":
            end = f" as generation {found.result}" if found.result else ""
            raise WrongState(
                f"{self._repository}: flow {name} is over: it {found.state}{end}",
                remedy=("begin another: ", Call("flow-begin", flow=name, repo=self._repository)),
            )
        return found

    def all(self) -> Iterator[Flow]:
        """Also those that are over, by their names and in the order in which they began."""
        names = (path.name[:-5] for path in self._layout.flows.glob("*.json"))
        found = {(flow.name, flow.began): flow for name in names if (flow := self.find(name))}
        return iter(flow for _, flow in sorted(found.items(), key=lambda one: one[0]))

    def write(self, flow: Flow) -> None:
        """Durably. The lock is held."""
        self._write(flow.name, flow)

    def _write(self, name: str, flow: Flow) -> None:
        data = json.dumps(asdict(flow), default=_text).encode() + b"\n"
        write_atomic(self._layout.flow(name), data, mode=0o600)

    def set_aside(self, flow: Flow) -> None:
        """Keep it by another name, before its own one is given to another."""
        self._write(f"{flow.name}@{flow.candidate}", flow)

    # -- after a kill --------------------------------------------------------------------------------

    def knows(self, name: str, sequence: int) -> bool:
        """Whether a flow of that name has, or had, that generation; or may have: its document is
        damaged."""
        try:
            found = self.find(name) if name else None
        except WrongState:
            return True
        return found is not None and sequence in found.had

    def end(self, result: Generation) -> None:
        """Note that a flow passed as that published generation, unless that is noted."""
        with contextlib.suppress(WrongState):  # its document is damaged: whoever asks for it is told
            found = self.find(result.flow)
            if found is not None and found.state == "open" and found.candidate < result.sequence:
                self.write(found.passed_as(result))
                give_back(self._layout, found.holder)

    def give_back_leases(self) -> None:
        """Those of generations that their flows no longer need. WrongState: a lease is damaged."""
        for holder in {lease.holder for lease in leases(self._layout)}:
            if not holder.startswith(_HOLDER):
                continue
            with contextlib.suppress(WrongState):  # its document is damaged: its generations stay
                found = self.find(holder.removeprefix(_HOLDER))
                give_back(self._layout, holder, but=found.needs if found else ())


def check_name(name: str, names: re.Pattern[str] = _NAME) -> None:
    """UsageError: no flow is called so."""
    if not names.fullmatch(name):
        raise UsageError(
            f"{one_line(name, 80)!r} is no name of a flow",
            remedy="use a-z, 0-9 and '-', at most 63, not beginning or ending with '-'",
        )


def _text(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()
