"""The side that asks: one agent on another machine, started when it is first needed, and anew when a
call finds it gone."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypervisors.api import Callbacks, StepFn, no_step
from hypervisors.far.frames import CHUNK
from hypervisors.far.line import AgentLine
from hypervisors.far.parcel import COMMAND
from hypervisors.libvirt.opening import Place
from inventory.errors import Busy, FarmhandError, LeaseLost


@dataclass(eq=False, slots=True)
class _LinkLease:
    """Names that this side holds over there; ``number``: what that is called on ``line``."""

    names: Sequence[str]
    note: str
    line: AgentLine | None = None
    number: int = 0

    def take(self, line: AgentLine) -> None:
        self.number = line.ask("leases", "take", (list(self.names), self.note))
        self.line = line

    def give_back(self) -> None:
        if self.line is not None and not self.line.lost:  # else they ended with it
            with contextlib.suppress(FarmhandError):
                self.line.ask("leases", "give_back", (self.number,))


class Link:
    """Any number of threads may call. ``name``: of the machine, for messages. ``argv``: makes a command
    one that runs there. ``login``: ssh to it, as one types it."""

    def __init__(
        self,
        name: str,
        argv: Callable[[Sequence[str]], tuple[str, ...]],
        place: Place,
        callbacks: Callbacks,
        *,
        plan: bool = False,
        login: str = "",
    ) -> None:
        self.name = name
        self.place = place
        self._argv = argv
        self._login = login or f"ssh {name}"
        self._callbacks = callbacks
        self._plan = plan
        self._opening = threading.Lock()
        self._line: AgentLine | None = None
        self._leases: list[_LinkLease] = []
        self._known: dict[tuple[str, str], Any] = {}

    def known(self, of: str, method: str) -> Any:
        """As ``call``, of what doesn't change while an agent lives: asked once."""
        known, key = self._known, (of, method)
        if key not in known:
            known[key] = self.call(of, method)
        return known[key]

    def forget(self) -> None:
        """What was ``known``."""
        self._known = {}

    def call(
        self, of: str, method: str, *args: object, step: StepFn = no_step, **options: object
    ) -> Any:
        """The errors of the method itself, naming the machine, and DriverFailed where that can't be
        reached, or the connection is lost on the way. What ``step`` raises abandons the change."""
        return self._open().ask(of, method, args, options, step)

    @contextlib.contextmanager
    def holding(self, names: Sequence[str], note: str) -> Iterator[None]:
        """Hold these leases there. A lost connection ends them; whoever calls next takes them again
        first, and goes no further (LeaseLost) where somebody else has one of them by then."""
        lease = _LinkLease(names, note)
        with self._opening:
            lease.take(self._connected())
            self._leases.append(lease)
        try:
            yield
        finally:
            with self._opening:
                self._leases.remove(lease)
            lease.give_back()

    def send(self, file: Path, name: str) -> Path:
        """A copy there, durable, under a name of its own. NoSpace and the like."""
        line, sent, said = self._open(), 0, time.monotonic()
        with file.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            there: Path = line.ask("host", "new_file", (name,))
            while chunk := source.read(CHUNK):
                line.send({"file": str(there)}, chunk)
                sent += len(chunk)
                if time.monotonic() > said + 1:
                    said = time.monotonic()
                    self._callbacks.working(
                        f"sending {file.name} to {self.name}; {sent * 100 // size} %"
                    )
            line.ask("host", "end_file", (there,))
        return there

    def close(self) -> None:
        with self._opening:
            if self._line:
                self._line.close()
            self._line = None

    def _open(self) -> AgentLine:
        with self._opening:
            line = self._connected()
            for lease in self._leases:
                if lease.line is not line:
                    try:
                        lease.take(line)
                    except Busy as error:
                        raise LeaseLost(
                            f"the connection was lost, and with it the lease; by now {error.message}: "
                            "nothing more is changed",
                            remedy="when that has ended, run the command again: what was cut off is "
                            "finished, or undone, first",
                        ) from None
            return line

    def _connected(self) -> AgentLine:
        if self._line is None or self._line.lost:
            if self._line:
                self._line.close()
            self.forget()
            self._line = AgentLine(self.name, self._login, self._argv(COMMAND), self._callbacks)
            self._line.open(self.place, plan=self._plan)
        return self._line
