"""One step of a cycle under way: what it works with, its log written as it is made, how it may fail."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from builds.log_text import log_lines
from builds.machines import Machines
from builds.meter import Meter
from builds.record import Direction, FileRecord
from builds.repositories import BuildRepositories
from host.files import open_to_append
from host.printable import one_line, plain
from inventory.errors import Remedy
from inventory.model import FailureClass, Limits
from provision.guest.connection import Moved
from provision.site import Site

_TAIL_BYTES = 65536
_LINE_MAX = 2000  # characters of a line that is judged, or shown in the record


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
    ``limit``: bytes of it that a guest may fill; whoever writes for one looks at ``room``. ``ours``: the
    numbers of the lines that are farmhand's own, the file's first being 1. ``told`` gets those of them
    that are to be seen at once."""

    def __init__(
        self,
        path: Path,
        vm: str,
        stream: Callable[[str, bytes], None] | None,
        limit: int = Limits.log_size,
        told: Callable[[str], None] | None = None,
    ) -> None:
        self._file = open_to_append(path, mode=0o644)
        self._left = limit
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
        self._left -= len(data)
        self._lines += data.count(b"\n")
        self._tail += data
        if len(self._tail) > 2 * _TAIL_BYTES:
            cut = len(self._tail) - _TAIL_BYTES
            del self._tail[:cut]
            self._mark = max(self._mark - cut, 0)

    @property
    def room(self) -> int:
        """Bytes that a guest may write to it by now."""
        return max(self._left, 0)

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
        seen = plain(self._tail[self._mark :][-_TAIL_BYTES:].decode(errors="replace"))
        return "\n".join(map(_cut, seen.split("\n")))

    def last(self, lines: int) -> str:
        """As ``builds.log_text`` shows it."""
        first = self._lines - self._tail.count(b"\n") + 1
        shown = log_lines(self._tail.decode(errors="replace"), frozenset(self.ours), first)
        return "\n".join(map(_cut, shown[-lines:]))

    def close(self) -> None:
        self._file.close()


def _cut(line: str) -> str:
    """Of a line without an end its beginning: whoever looks for patterns in it must not take for
    ever."""
    return line if len(line) <= _LINE_MAX else f"{line[:_LINE_MAX]}…"


async def _nothing() -> None:
    """Nobody shares a lock."""


@dataclass(slots=True, kw_only=True)
class StepRun:
    """What the step of that name works with. ``made``: what the steps before it fetched. ``failed``: the
    first of them that failed; "": none did. ``files``: what it fetched or carried. ``details``: what the
    record says of it. ``exit``: its last exit status. ``before_publishing``: to be awaited before what
    can't be taken back: LeaseLost where the lock that the cycle shares with others is lost.
    ``remembers``: its scripts leave word of where they failed (``builds.debugging``)."""

    name: str
    site: Site
    machines: Machines
    repositories: BuildRepositories
    meter: Meter
    environment: Callable[[str], Mapping[str, str]]
    before_run: Callable[[str, StepLog], Awaitable[None]]
    artifacts: Path
    log: StepLog
    limits: Limits = field(default_factory=Limits)
    made: Sequence[FileRecord] = ()
    failed: str = ""
    before_publishing: Callable[[], Awaitable[None]] = _nothing
    remembers: bool = False
    details: dict[str, str] = field(default_factory=dict)
    files: list[FileRecord] = field(default_factory=list)
    exit: int | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def keep(self, file: Moved, *, vm: str, path: str, flow: Direction = "") -> None:
        """Have the record name a file, with the values of ``FileRecord``."""
        self.files.append(
            FileRecord(
                name=file.name, size=file.size, sha256=file.sha256, step=self.name,
                vm=vm, path=path, flow=flow,
            )
        )  # fmt: skip
