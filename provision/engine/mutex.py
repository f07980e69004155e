"""A mutex by name, for threads and processes alike: threads of this process wait on a condition,
processes on the farm's locks. It also keeps what threads wait for: VMs that are about to give memory
back."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from inventory.errors import Busy, Call, Interrupted
from provision.engine.locks import Locks

_PATIENCE = 900.0
"""Seconds. Whoever holds the mutex looks, squeezes and starts one VM; many may be in line."""
_LOOK = 0.2


class NamedMutex:
    """One farm's mutexes, as this process sees them. ``interrupted``: when it is set, nobody waits any
    longer."""

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
        """Wait for the mutex ``name``, and hold it. Not to be nested. ``waiting``: told who holds it.
        Errors: Busy after ``_PATIENCE`` seconds, Interrupted."""
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
        """Within it ``size`` bytes count as taken: this process is about to give them to the VM."""
        with self._condition:
            self._reserved[vm] = size
        try:
            yield
        finally:
            with self._condition:
                self._reserved.pop(vm, None)

    def reservations(self) -> dict[str, int]:
        """Bytes reserved by this process, by VM."""
        with self._condition:
            return dict(self._reserved)

    def saw(self, name: str, left: int | None) -> None:
        """Note how much a look found left; None: unbounded. The caller holds the mutex."""
        with self._condition:
            self._left.pop(name, None)
            if left is not None:
                self._left[name] = self._locks.held_since(name), left

    def spend(self, name: str, size: int) -> bool:
        """Take ``size`` bytes off what the last look found left. False: that is less, or another process
        has held the mutex since, so look again. Others may only have given back meanwhile. The caller
        holds the mutex."""
        with self._condition:
            since, left = self._left.get(name, (0, 0))
            if since != self._locks.held_since(name) or left < size:
                return False
            self._left[name] = since, left - size
            return True

    def falls(self, vm: str, host: str) -> None:
        """This process starts the VM, and will balloon it down as soon as it answers."""
        with self._condition:
            self._falling[vm] = host

    def fell(self, vm: str) -> None:
        """The VM was ballooned down, or never will be."""
        with self._condition:
            if self._falling.pop(vm, None) is not None:
                self._fallen += 1
                self._condition.notify_all()

    def falling(self, host: str) -> int | None:
        """The number to give to ``wait_for_fall``; None if no VM on ``host`` is about to be ballooned
        down."""
        with self._condition:
            return self._fallen if host in self._falling.values() else None

    def wait_for_fall(self, since: int) -> None:
        """Wait until one more VM has fallen since ``falling`` gave ``since``, or none is about to any
        more. Interrupted."""
        with self._condition:
            while self._fallen == since and self._falling:
                self._still_wanted()
                self._condition.wait(_LOOK)

    def _still_wanted(self) -> None:
        if self._interrupted.is_set():
            raise Interrupted("interrupted while waiting for memory", remedy=Call("recover"))
