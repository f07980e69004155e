"""Waiting for a XenAPI server by its events (event.from), never by asking again and again."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypervisors.answers import answer_of
from hypervisors.xenapi.errors import XenApiError
from hypervisors.xenapi.session import Sessions
from inventory.errors import Call, FarmhandError, TimedOut

PATIENCE = 3600.0
"""Seconds that a task, such as a full copy, may take."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
"""Seconds before the first looks at a task, each five times the one before: one that is soon over is
looked at once, and one that changes all the time (4 to 9 times a second, xapi 23.10) not each time."""
_ROUND = 30.0  # seconds that one event.from waits at most: well within what a proxy lets stand

TaskProgressFn = Callable[[str, float], None]
"""Told what goes on and how far it is, 0 to 1."""


def no_progress(_what: str, _part: float) -> None:
    """The TaskProgressFn of callers that show none."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one event.from brought: records by reference (None: it is gone), and where to go on."""

    records: Mapping[str, Mapping[str, Any] | None]
    token: str


def look(sessions: Sessions, classes: Sequence[str], token: str = "", timeout: float = 0.0) -> Batch:
    """All objects of these classes ("vm"), or these ("vm/OpaqueRef:..."), in one call: as they are
    (``token`` empty), or those that changed since. ``timeout``, in seconds: for a first change."""
    answer = sessions.call("event.from", list(classes), token, float(timeout))
    records: dict[str, Mapping[str, Any] | None] = {}
    with answer_of("xapi", sessions.url):
        for event in answer["events"]:
            records[event["ref"]] = event.get("snapshot") if event["operation"] != "del" else None
        return Batch(records, answer["token"])


def watch(
    sessions: Sessions, object_: str, limit: float, *, pause: float = 0.0
) -> Iterator[Mapping[str, Any] | None]:
    """Its record now, and after each change (None: it is gone), until ``limit`` seconds are over. A
    server that was started again meanwhile is asked anew: it tells nothing of what it has lost.
    ``pause``: seconds before the first look, and ever more before the others."""
    end, token, renewed = time.monotonic() + limit, "", sessions.renewed
    while True:
        if pause:
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
            pause = min(5 * pause, _LONGEST_PAUSE)
        batch = look(sessions, [object_], token, min(_ROUND, max(0.0, end - time.monotonic())))
        again = sessions.renewed != renewed
        if not batch.records and not token:
            yield None
        yield from batch.records.values()
        token, renewed = "" if again else batch.token, sessions.renewed
        if time.monotonic() >= end:
            return


def do(
    sessions: Sessions,
    name: str,
    *arguments: object,
    progress: TaskProgressFn = no_progress,
    limit: float = PATIENCE,
) -> str:
    """Do a call that takes long, as a task of the server's. Returns what the call returned, as text. A
    task that is over its limit is cancelled: TimedOut. XenApiError as the call itself would raise it."""
    task = str(sessions.call(f"Async.{name}", *arguments))
    try:
        for record in watch(sessions, f"task/{task}", limit, pause=_FIRST_PAUSE):
            if record is None:
                raise XenApiError(["TASK_CANCELLED", task])
            progress(name, float(record["progress"]))
            match record["status"]:
                case "success":
                    found = re.fullmatch(r"(?:<value>)?(.*?)(?:</value>)?", str(record["result"]), re.S)
                    return found[1] if found else ""
                case "failure":
                    raise XenApiError([str(part) for part in record["error_info"]])
                case "cancelled":
                    raise XenApiError(["TASK_CANCELLED", task])
        with contextlib.suppress(XenApiError):  # one that can't be cancelled goes on by itself
            sessions.call("task.cancel", task)
        raise TimedOut(
            f"{sessions.url}: {name} took more than {limit:.0f} s and was cancelled",
            remedy=("look at the server's load (xe task-list), then ", Call("recover")),
        )
    finally:
        with contextlib.suppress(XenApiError, FarmhandError):  # xapi removes it after a day
            sessions.call("task.destroy", task)
