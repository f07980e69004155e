"""Ctrl-C while a build runs: it ends in good order, and what is left to be put right still is."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Coroutine, Iterator

from provision.site import Site


class Interrupts:
    """Of one build, within its event loop. A second Ctrl-C, while the first is being dealt with, cancels
    what puts things right, too."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._under_way: asyncio.Future[None] | None = None
        self.count = 0

    async def until_interrupted(self, work: Coroutine[None, None, None]) -> None:
        """Run it to its end, or until a signal cancels it."""
        self._under_way = asyncio.ensure_future(work)
        try:
            await self._under_way
        except asyncio.CancelledError:
            if not self.count:
                raise
        finally:
            self._under_way = None
            self._site.journal.interrupted.clear()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the build in good order; one that is ignored (``&`` in a script) stays
        so. Only a main thread is told of signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: how for number, how in known.items() if how is not signal.SIG_IGN}
        for number in before:
            loop.add_signal_handler(number, self._interrupt)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def _interrupt(self) -> None:
        self.count += 1
        self._site.reporter.warn("interrupted: ending what runs in the VMs")
        self._site.journal.interrupted.set()
        if self._under_way is not None:
            self._under_way.cancel()
