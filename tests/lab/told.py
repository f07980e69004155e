"""Which tests a lab has been through, told on its console as they begin and end: the console outlives
the lab's kernel, and says in which test the kernel said what.

In the lab ``tell`` writes the lines; outside ``read`` finds them. A lab that goes on where
another one's kernel died gets the list of what had passed, in the file that ``LIST`` names."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LIST = "FARMHAND_PASSED"  # in the environment: a file, a node id of pytest's a line
_LINE = re.compile(r"^lab: (begins|passed|failed) (\S.*)\n", re.MULTILINE)
_DIED = re.compile(r"^lab: died (\S+)\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Told:
    """pytest's node ids, in the order of their ends. ``under_way``: one that began and didn't end, else
    empty. ``died``: programs that a signal ended with a core, in their order (tests/lab/files/died)."""

    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    under_way: str = ""
    died: tuple[str, ...] = ()


def tell(nodeid: str, how: Literal["begins", "passed", "failed"]) -> None:
    with Path("/dev/console").open("w", encoding="utf-8") as console:
        console.write(f"lab: {how} {nodeid}\n")


def read(console: Path) -> Told:
    """Without what a kernel's message garbled: such a test counts as not run."""
    lines = console.read_text(errors="replace").replace("\r", "")
    found: dict[str, list[str]] = {"passed": [], "failed": []}
    under_way = ""
    for how, nodeid in _LINE.findall(lines):
        if how == "begins":
            under_way = nodeid
            continue
        found[how].append(nodeid)
        under_way = ""
    return Told(tuple(found["passed"]), tuple(found["failed"]), under_way, tuple(_DIED.findall(lines)))


def passed_before() -> frozenset[str]:
    """In a lab that goes on: what had passed in the one before."""
    place = os.environ.get(LIST)
    return frozenset(Path(place).read_text().splitlines()) if place else frozenset()
