"""Lanes: several pytests side by side over the same tests. A file is run by the lane that is the first
to ask for it: none is idle while there are files that nobody has begun."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

CLAIMS = "FARMHAND_LANE_CLAIMS"
"""In the environment: a directory of this run's alone, where its lanes say what they take and how it
ended."""
_ENDS = ".ends"
_TOLD = ("failed", "passed", "skipped", "xfailed", "xpassed", "error")  # in pytest's order


class Lane:
    """A plugin of pytest's, in each lane."""

    def __init__(self, claims: Path) -> None:
        self._claims = claims

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """As pytest's own, over what is claimed."""
        if session.testsfailed or session.config.option.collectonly:
            return None
        # One ahead: pytest ends a session's fixtures where no test follows.
        last: tuple[pytest.Item | None, ...] = (None,)
        for item, following in itertools.pairwise(itertools.chain(self._taken(session.items), last)):
            assert item
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        return True

    def _taken(self, items: list[pytest.Item]) -> Iterator[pytest.Item]:
        files: dict[str, list[pytest.Item]] = {}
        for item in items:
            files.setdefault(item.nodeid.partition("::")[0], []).append(item)
        for file, tests in files.items():
            if self._claim(file):
                yield from tests

    def _claim(self, file: str) -> bool:
        try:
            (self._claims / file.replace("/", ":")).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        ends = {how: len(found) for how, found in terminalreporter.stats.items() if how in _TOLD}
        (self._claims / f"{os.getpid()}{_ENDS}").write_text(json.dumps(ends))


def lane() -> Lane | None:
    """That of this process, told once; None: it runs all its tests itself."""
    claims = os.environ.pop(CLAIMS, "")  # what a test starts is no lane
    return Lane(Path(claims)) if claims else None


def ends(claims: Path) -> str:
    """How the tests of all lanes ended, in pytest's words."""
    sums: Counter[str] = Counter()
    for file in claims.glob(f"*{_ENDS}"):
        sums.update(json.loads(file.read_text()))
    return "all lanes: " + ", ".join(f"{sums[how]} {how}" for how in _TOLD if sums[how])
