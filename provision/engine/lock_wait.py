"""Waiting for what somebody else holds, instead of refusing at once (``--wait``)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from inventory.errors import Busy
from inventory.sizes import format_duration
from provision.engine.report import Reporter

T = TypeVar("T")
_LOOK = 0.5  # seconds


class LockWait:
    """One command's: for all that it waits for together ``seconds``; 0: not at all. Who waits holds
    nothing that others of this kind wait for, so no two wait for each other."""

    def __init__(self, seconds: float, reporter: Reporter) -> None:
        self._seconds = seconds
        self._reporter = reporter
        self._waited = 0.0
        self._told = ""

    def again(self, error: Busy) -> bool:
        """Whether to try again, a moment later; it says who holds it, each once."""
        if self._waited >= self._seconds:
            return False
        if error.message != self._told:
            self._told = error.message
            self._reporter.say(f"waiting: {error.message}")
        self._reporter.working("waiting for who holds it")
        began = time.monotonic()
        time.sleep(min(_LOOK, self._seconds - self._waited))
        self._waited += time.monotonic() - began
        return True

    def until_free(self, begin: Callable[[], T]) -> T:
        """What ``begin`` hands back, as soon as nobody else holds what it needs. Where it raises Busy it
        has changed nothing. Errors: Busy, and its own."""
        while True:
            try:
                found = begin()
            except Busy as error:
                if not self.again(error):
                    raise
            else:
                self.over()
                return found

    def over(self) -> None:
        """It is free now: nothing is waited for any more."""
        if self._told:
            self._told = ""
            self._reporter.say(f"going on, after {format_duration(self._waited)}")
