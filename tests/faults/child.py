"""Runs one use case and kills its own process at a chosen journal step.

    child.py FARM_FILE WHEN NUMBER COMMAND...

WHEN "written": right after step NUMBER was written, its change not begun. "done": at the first thing
written after that, so its change was made. Product code has no hook for this: the journal's own
methods are wrapped here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from inventory.loader import load
from provision import farm, journal, reset
from provision.report import QuietReporter
from provision.site import Site


def arm(when: str, number: int) -> None:
    real_step, real_write = journal.Operation.step, journal.Journal.write
    guard = threading.Lock()
    seen = 0
    armed = False

    def step(self: journal.Operation, text: str) -> None:
        nonlocal seen, armed
        real_step(self, text)
        with guard:
            seen += 1
            if seen == number:
                print(text, flush=True)
                if when == "written":
                    os.kill(os.getpid(), signal.SIGKILL)
                armed = True

    def write(self: journal.Journal, sql: str, arguments: tuple[object, ...]) -> int:
        if armed:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_write(self, sql, arguments)

    journal.Operation.step = step  # type: ignore[method-assign]
    journal.Journal.write = write  # type: ignore[method-assign]


def main(file: str, when: str, number: str, command: str) -> None:
    arm(when, int(number))
    reset.CHECKPOINT_GRACE = 0.2  # its guests boot nothing: nobody there to shut down
    verb, arguments = json.loads(command)
    with Site(load(Path(file)), reporter=QuietReporter()) as site:
        getattr(farm, verb)(site, **arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
