"""Where a build's time went: guests, hypervisors, or this program itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Meter:
    """Counts the time in which at least one guest works; else that in which at least one hypervisor or
    disk store does; the rest is our own. Used from one thread."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self._guests = self._hypervisors = 0
        self._guest_seconds = self._hypervisor_seconds = 0.0

    @contextlib.contextmanager
    def guest(self) -> Iterator[None]:
        self._count()
        self._guests += 1
        try:
            yield
        finally:
            self._count()
            self._guests -= 1

    @contextlib.contextmanager
    def hypervisor(self) -> Iterator[None]:
        self._count()
        self._hypervisors += 1
        try:
            yield
        finally:
            self._count()
            self._hypervisors -= 1

    def _count(self) -> None:
        now = time.monotonic()
        if self._guests:
            self._guest_seconds += now - self._last
        elif self._hypervisors:
            self._hypervisor_seconds += now - self._last
        self._last = now

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def shares(self) -> dict[str, float]:
        """All so far, seconds, by the names the record has."""
        self._count()
        own = self._last - self._began - self._guest_seconds - self._hypervisor_seconds
        return {
            "seconds": round(self._last - self._began, 3),
            "guest_seconds": round(self._guest_seconds, 3),
            "hypervisor_seconds": round(self._hypervisor_seconds, 3),
            "controller_seconds": round(own, 3),
        }
