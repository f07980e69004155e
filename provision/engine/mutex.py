"""One at a time through a name: the threads of this process by a condition, processes by the farm's
locks. And what threads wait for: others' VMs that are about to give memory back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from inventory.errors import Busy, Call, Interrupted
from provision.engine.locks import Locks

_PATIENCE = 900.0
"""Seconds. Whoever has the turn looks, squeezes and starts one VM; many may be in line."""
_LOOK = 0.2


class NamedMutex:
    """One farm's, as one process sees them. ``interrupted``: nobody waits any longer."""

    def __init__(self, locks: Locks, interrupted: threading.Event) -> None:
        self._locks = locks
        self._interrupted = interrupted
        self._condition = threading.Condition()
        self._taken: set[str] = set()
        self._reserved: dict[str, int] = {}  # by VM, bytes
        self._left: dict[str, tuple[int, int]] = {}  # by name: since when it holds, bytes
        self._falling: dict[str, str] = {}  # by VM, its host
        self._fallen = 0

    @contextlib.contextmanager
    def take(self, name: str, *, doing: str, waiting: Callable[[str], None]) -> Iterator[None]:
        """Wait for the turn, and have it. Not to be nested. ``waiting`` is told for whom. Busy when
        that takes longer than anything honest does, Interrupted."""
        end = time.monotonic() + _PATIENCE
        with self._condition:
            while name in self._taken:
                self._still_wanted()
                if time.monotonic() > end:
                    raise Busy(f"{doing}: {name} is busy in this very command", remedy="try again")
                self._condition.wait(_LOOK)
            self._taken.add(name)
        try:
            with contextlib.ExitStack() as stack:
                while True:
                    self._still_wanted()
                    try:
                        stack.enter_context(self._locks.hold(name, doing=doing))
                        break
                    except Busy as error:
                        if time.monotonic() > end:
                            raise
                        waiting(error.message)
                yield
        finally:
            with self._condition:
                self._taken.discard(name)
                self._condition.notify_all()

    @contextlib.contextmanager
    def reserved(self, vm: str, size: int) -> Iterator[None]:
        """What this process is about to give a VM."""
        with self._condition:
            self._reserved[vm] = size
        try:
            yield
        finally:
            with self._condition:
                self._reserved.pop(vm, None)

    def reservations(self) -> dict[str, int]:
        """All of this process's, by VM."""
        with self._condition:
            return dict(self._reserved)

    def saw(self, name: str, left: int | None) -> None:
        """With the turn: what a look found that is left, of what only who has the turn may take."""
        with self._condition:
            self._left.pop(name, None)
            if left is not None:
                self._left[name] = self._locks.held_since(name), left

    def spend(self, name: str, size: int) -> bool:
        """With the turn: whether that much was left at the last look and is still, for this process has
        held on to the turn since; it is taken off. Others may only have given back since."""
        with self._condition:
            since, left = self._left.get(name, (0, 0))
            if since != self._locks.held_since(name) or left < size:
                return False
            self._left[name] = since, left - size
            return True

    def falls(self, vm: str, host: str) -> None:
        """This process starts it, and will balloon it down as soon as it answers."""
        with self._condition:
            self._falling[vm] = host

    def fell(self, vm: str) -> None:
        """... and it did, or never will."""
        with self._condition:
            if self._falling.pop(vm, None) is not None:
                self._fallen += 1
                self._condition.notify_all()

    def falling(self, host: str) -> int | None:
        """Whether any is about to; what to give to ``wait_for_fall``."""
        with self._condition:
            return self._fallen if host in self._falling.values() else None

    def wait_for_fall(self, since: int) -> None:
        """Until one more fell than when ``falling`` said so."""
        with self._condition:
            while self._fallen == since and self._falling:
                self._still_wanted()
                self._condition.wait(_LOOK)

    def _still_wanted(self) -> None:
        if self._interrupted.is_set():
            raise Interrupted("interrupted while waiting for memory", remedy=Call("recover"))
