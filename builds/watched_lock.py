"""The lock that others share, watched for a build while it runs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from inventory.errors import FarmhandError

if TYPE_CHECKING:
    from builds.webdav_lock import RemoteLock


async def watch(lock: RemoteLock, build: str, note: Callable[[str], None]) -> None:
    """Have it say which build it is for. ``note``: told, within this event loop, when it is lost."""
    loop = asyncio.get_running_loop()

    def lost(why: str) -> None:
        text = f"lock lost: {why}; the build goes on to its end, and publishes nothing"
        with contextlib.suppress(RuntimeError):  # the build is over
            loop.call_soon_threadsafe(note, text)

    lock.watch(lost)
    try:
        await asyncio.to_thread(lock.tell_build, build)
    except FarmhandError as error:
        note(f"the lock {lock.url} can't say which build it is for: {error.message}")
