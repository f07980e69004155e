"""Patience by progress: a wait for a guest lasts as long as the guest is seen to go on.

What counts is what a guest does outside: its console grows, its disks are read or written. CPU time
tells nothing, for a guest that hangs spins. Disks count by the megabyte, so that a system at rest, which
writes a page now and then, doesn't count as going on. What goes on without end (a guest that boots,
fails and boots again) ends at a larger limit.

A command goes on while its log grows, or, where it is quiet, while it works: one that hangs waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from host.printable import last_line
from inventory.errors import FarmhandError
from inventory.sizes import about, format_duration

IN_ALL = 6
"""The limit for all is so many times the one for no progress."""
_ASK = 1.0  # seconds between looks
_DISK = 2**20  # bytes, together, that are worth waiting for


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What a running machine has done since its start, as seen from outside. Bytes; None: that can't be
    seen. It goes on when one of them changes."""

    console: int | None = None  # written on its console
    said: str = ""  # the end of that, as it came
    read: int | None = None  # from its disks
    written: int | None = None  # to them
    worked: int | None = None  # CPU time of a command, in ticks: no guest's

    @property
    def disk(self) -> int:
        return (self.read or 0) + (self.written or 0)


class Progress:
    """One wait, for one thread at a time. ``pulse``: returns what the guest has done by now; None:
    nobody sees it, and then only the clock counts. ``patience``: seconds without progress."""

    def __init__(
        self,
        pulse: Callable[[], Pulse | None],
        patience: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pulse = pulse
        self._clock = clock
        self.patience = patience
        self._began = self._moved = self._quiet = self._spoke = self._worked = clock()
        self._again = self._began
        self._last: Pulse | None = None
        self._counted = 0  # bytes of the disks when they last were progress

    def look(self) -> None:
        """Look at the guest, at most once a second, however often this is called."""
        now = self._clock()
        if now < self._again:
            return
        self._again = now + _ASK
        try:
            pulse = self._pulse()
        except FarmhandError:  # a daemon that is away for a moment: whoever waits finds out
            return
        if pulse is None:
            return
        last = self._last or Pulse()
        if pulse.console != last.console:  # it may shrink: logs are turned over
            self._moved = self._quiet = self._spoke = now
        if pulse.worked != last.worked:
            self._moved = now
        if pulse.disk != last.disk:
            self._quiet = self._worked = now
            if abs(pulse.disk - self._counted) >= _DISK:
                self._moved, self._counted = now, pulse.disk
        self._last = pulse

    def left(self) -> float:
        """Seconds left; 0 or less: give up."""
        return min(self._moved + self.patience, self._began + self.patience * IN_ALL) - self._clock()

    def lifeless(self, seconds: float) -> bool:
        """Whether it has done nothing at all: no byte on its console, none written to a disk, and for
        ``seconds`` none read from a disk, which is what boot loaders do. False where nobody sees
        both."""
        seen = self._last
        if seen is None or seen.console is None or seen.read is None or seen.written is None:
            return False
        return not seen.console and not seen.written and self._clock() - self._quiet >= seconds

    def verdict(self) -> str:
        """Why the wait is given up, as the end of a sentence."""
        patience = _whole(self.patience)
        if self._last is None:
            return f"within {patience}"
        if self._began + self.patience * IN_ALL <= self._clock():
            return f"within {_whole(self.patience * IN_ALL)}, though it goes on ({self})"
        return f"and nothing has gone on in it for {patience} ({self})"

    def __str__(self) -> str:
        """What was seen, such as ``console 12s ago: 'Starting udevd', disk 3s ago: 120M``; "" if nothing
        was."""
        seen, now, parts = self._last, self._clock(), []
        if seen is None:
            return ""
        if seen.console is not None:
            ago = _whole(now - self._spoke)
            line = last_line(seen.said)
            said = f": '{line}'" if line else ""
            parts.append(f"console {ago} ago{said}" if seen.console else "nothing on its console")
        if seen.disk:
            much = about(seen.disk) if seen.disk >= _DISK else "hardly anything"
            parts.append(f"disk {_whole(now - self._worked)} ago: {much}")
        return ", ".join(parts)


def _whole(seconds: float) -> str:
    return f"{seconds:.0f}s" if seconds < 60 else format_duration(seconds)
