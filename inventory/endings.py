"""How a command ends, for scripts: its exit status, and the word for it that ``--json`` has as "class".

docs/commands.md has the same table; a test compares the two."""

from __future__ import annotations

from typing import NamedTuple


class Ending(NamedTuple):
    """``means``: in words, for the documentation."""

    status: int
    word: str
    means: str


DONE = Ending(0, "done", "It was done, or was so already; a look saw all there is to see.")
FAILED = Ending(1, "failed", "It failed in a way that has no status of its own; the message says how.")
USAGE = Ending(
    2,
    "usage",
    "Wrong words on the command line, names that the farm file doesn't have too, or a wrong farm file. "
    "Nothing was done.",
)
BUILD = Ending(3, "build", "A step of the cycle, or a package's build, failed.")
ENVIRONMENT = Ending(
    69,
    "environment",
    "This machine or a host is not as it must be: a tool is missing or fails, a host, its hypervisor or "
    "its daemon can't be reached, refuses or can't do it, or there is no room. (EX_UNAVAILABLE)",
)
DEFECT = Ending(70, "defect", "A defect in farmhand itself; the message names the report. (EX_SOFTWARE)")
UNWRITTEN = Ending(74, "unwritten", "It was done, but its result could not be written. (EX_IOERR)")
BUSY = Ending(75, "busy", "Somebody else holds a lock: try again later, or give --wait. (EX_TEMPFAIL)")
INTERRUPTED = Ending(130, "interrupted", "Ctrl-C; 143 after SIGTERM, 129 after SIGHUP.")

ENDINGS = (DONE, FAILED, USAGE, BUILD, ENVIRONMENT, DEFECT, UNWRITTEN, BUSY, INTERRUPTED)
