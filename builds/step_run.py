"""One step of a cycle under way: what it works with, its log written as it is made, the class of its
failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from builds.log_text import log_lines
from builds.machines import Machines
from builds.meter import Meter
from builds.record import FileRecord, Flow
from builds.step_kind import StepKind
from host.files import open_to_append
from host.printable import one_line, plain
from inventory.errors import ConnectionLost, FarmhandError, Remedy
from inventory.model import FailureClass
from inventory.sizes import format_duration
from provision.guest.connection import Moved
from provision.site import Site

_TAIL_BYTES = 65536


class StepFailed(Exception):
    """``failure``: the class. ``message``: one line. ``remedy``: that of the error it comes from."""

    def __init__(
        self,
        failure: FailureClass,
        message: str,
        *,
        remedy: Remedy = "",
        exit: int | None = None,
        console: str = "",
    ) -> None:
        super().__init__(message)
        self.failure = failure
        self.remedy = remedy
        self.exit = exit
        self.console = console


class StepLog:
    """A step's log. Raw bytes go to the file, and onwards, as they come. The end is kept in memory.
    ``ours``: the numbers of the lines that are farmhand's own, the file's first being 1. ``told`` gets
    those of them that are to be seen at once."""

    def __init__(
        self,
        path: Path,
        vm: str,
        stream: Callable[[str, bytes], None] | None,
        told: Callable[[str], None] | None = None,
    ) -> None:
        self._file = open_to_append(path, mode=0o644)
        self._vm = vm
        self._stream = stream
        self._told = told
        self._lines = 0  # whole ones
        self.ours: list[int] = []
        self._tail = bytearray()
        self._mark = 0
        self.trouble = ""

    def write(self, data: bytes) -> None:
        """What the VM prints. Never raises: a full disk here must not end what runs in the VM."""
        self._keep(data)
        if self._stream is not None:
            self._stream(self._vm, data)

    def _keep(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.trouble = f"the log is incomplete: {error.strerror}"
        self._lines += data.count(b"\n")
        self._tail += data
        if len(self._tail) > 2 * _TAIL_BYTES:
            cut = len(self._tail) - _TAIL_BYTES
            del self._tail[:cut]
            self._mark = max(self._mark - cut, 0)

    def say(self, text: str) -> None:
        """Write a line of ours, and tell it."""
        self.note(text)
        if self._told is not None:
            self._told(text)

    def note(self, text: str) -> None:
        """Write a line of ours."""
        start = b"\n" if self._tail and not self._tail.endswith(b"\n") else b""
        self._keep(start + f"farmhand: {one_line(text)}\n".encode())
        if not self.trouble:  # else nobody knows which line of the file it is
            self.ours.append(self._lines)

    def mark(self) -> None:
        """What is written from now on is judged."""
        self._mark = len(self._tail)

    def text(self) -> str:
        """The output since the mark as plain text, at most its last 64 KiB."""
        return plain(self._tail[self._mark :][-_TAIL_BYTES:].decode(errors="replace"))

    def last(self, lines: int) -> str:
        """As ``builds.log_text`` shows it."""
        first = self._lines - self._tail.count(b"\n") + 1
        shown = log_lines(self._tail.decode(errors="replace"), frozenset(self.ours), first)
        return "\n".join(shown[-lines:])

    def close(self) -> None:
        self._file.close()


@dataclass(slots=True, kw_only=True)
class StepRun:
    """A step with everything that it works with. ``files``: what it fetched or carried. ``details``:
    what the record says of it. ``exit``: its last exit status."""

    step: StepKind
    site: Site
    machines: Machines
    meter: Meter
    environment: Callable[[str], Mapping[str, str]]
    before_run: Callable[[str, StepLog], Awaitable[None]]
    artifacts: Path
    log: StepLog
    details: dict[str, str] = field(default_factory=dict)
    files: list[FileRecord] = field(default_factory=list)
    exit: int | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def keep(self, file: Moved, *, vm: str, path: str, flow: Flow = "") -> None:
        """Have the record name a file, with the values of ``FileRecord``."""
        self.files.append(
            FileRecord(
                name=file.name, size=file.size, sha256=file.sha256, step=self.step.name,
                vm=vm, path=path, flow=flow,
            )
        )  # fmt: skip

    async def carry_out(self) -> None:
        """Carry the step out. StepFailed, with its class, for everything that can go wrong."""
        step = self.step
        try:
            await self.machines.look()
            async with asyncio.timeout(step.limit):
                await step.carry_out(self)
        except TimeoutError:
            raise StepFailed(
                "time-out",
                f"not done within its limit of {format_duration(step.timeout)}",
                console=self.machines.console(step.changes) if step.RENEWS else "",
            ) from None
        except FarmhandError as error:
            raise await self._judged(error) from error

    async def _judged(self, error: FarmhandError) -> StepFailed:
        """StepFailed for an error of ours, with its class. What a guest's scripts print is judged
        elsewhere."""
        failure = self.step.class_of(error)
        failed = StepFailed(failure, error.message, remedy=error.remedy)
        if failure != "infrastructure":
            return failed
        vm = error.vm if error.vm in self.step.vms else self.step.vms[0]
        if isinstance(error, ConnectionLost):
            state = await asyncio.to_thread(self.machines.state, vm)
            failed.args = (f"{error.message} ({state})",) if state else failed.args
        failed.console = error.detail or self.machines.console(vm)
        return failed
