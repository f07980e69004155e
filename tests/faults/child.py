"""Runs use cases, each in a process of its own that kills itself at a chosen journal step.

One JSON list a line on standard input: FARM_FILE WHEN NUMBER VERB ARGUMENTS; one back: the wait status
and the step's text. Each request is a fork of this process, which has imported everything and opened
nothing: hundreds of kills would else be mostly hundreds of starts of Python.

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
import traceback
from pathlib import Path
from typing import Any

import provision.golden
import provision.seed  # noqa: F401 - imported for the forks
from inventory.loader import load
from provision import checkpoint, farm, journal
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


def use_case(file: str, when: str, number: int, verb: str, arguments: dict[str, Any]) -> None:
    arm(when, number)
    checkpoint.GRACE = 0.2  # its guests boot nothing: nobody there to shut down
    with Site(load(Path(file)), reporter=QuietReporter()) as site:
        getattr(farm, verb)(site, **arguments)


def serve() -> None:
    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            os.dup2(write, 1)  # what it prints is the step's text
            status = 1
            try:
                use_case(*json.loads(line))
                status = 0
            except BaseException:  # noqa: BLE001 - a child tells all
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        os.close(write)
        with os.fdopen(read) as told:
            text = told.read()
        _, status = os.waitpid(pid, 0)
        print(json.dumps([status, text.strip()]), flush=True)


if __name__ == "__main__":
    serve()
