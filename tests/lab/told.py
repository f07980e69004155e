"""Which tests a lab has been through, told on its console as they end: the console outlives the lab's
kernel, and says between which tests the kernel said what.

In the lab ``tell`` writes a line for each test; outside ``read`` finds them. A lab that goes on where
another one's kernel died gets the list of what had passed, in the file that ``LIST`` names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

LIST = "FARMHAND_PASSED"  # in the environment: a file, a node id of pytest's a line
_LINE = re.compile(r"^lab: (passed|failed) (\S.*)\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Told:
    """pytest's node ids, in the order of their ends."""

    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def tell(nodeid: str, *, ok: bool) -> None:
    with Path("/dev/console").open("w", encoding="utf-8") as console:
        console.write(f"lab: {'passed' if ok else 'failed'} {nodeid}\n")


def read(console: Path) -> Told:
    """Without what a kernel's message garbled: such a test counts as not run."""
    lines = console.read_text(errors="replace").replace("\r", "")
    found: dict[str, list[str]] = {"passed": [], "failed": []}
    for how, nodeid in _LINE.findall(lines):
        found[how].append(nodeid)
    return Told(tuple(found["passed"]), tuple(found["failed"]))


def passed_before() -> frozenset[str]:
    """In a lab that goes on: what had passed in the one before."""
    place = os.environ.get(LIST)
    return frozenset(Path(place).read_text().splitlines()) if place else frozenset()
