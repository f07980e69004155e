"""One run of one task: what the flags that all tasks have said, and what it ends with."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.words import Words
from host.program import ROOT
from inventory.endings import FAILED, Ending
from inventory.errors import FarmhandError, Remedy, Text, UnknownName

if TYPE_CHECKING:
    from cli.screen import Screen
    from provision.engine.report import Outcome
    from provision.site import Site


def _may_be(path: Path) -> bool:
    """Whether it is a file, or can't be seen: who reads it says why."""
    try:
        return path.is_file()
    except PermissionError:
        return True


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a task prints: ``data`` with --json, else ``text``. Without ``ok`` it ends as
    ``ending`` says; ``problem`` and ``remedy`` then go to stderr, as an error's do."""

    data: Mapping[str, object]
    text: Text
    ok: bool = True
    problem: str = ""
    remedy: Remedy = ""
    ending: Ending = FAILED


@dataclass(slots=True)
class TaskRun:
    """``does``: names of the operations that the task may carry out; without any it changes nothing.
    ``resume``: what to do after an interruption. ``wait``: for locks that others hold, a number of
    seconds as text, or True: as long as it takes."""

    task: str
    farm: str
    json: bool
    plan: bool
    does: tuple[str, ...] = ()
    resume: Remedy = ""
    quiet: bool = False
    wait: str | bool = ""
    _screen: Screen | None = field(default=None)

    @property
    def screen(self) -> Screen:
        """The reporter: a live line on a terminal, dated lines elsewhere; always on stderr."""
        if self._screen is None:
            from cli.screen import open_screen

            self._screen = open_screen(sys.stderr, self.words.text, quiet=self.quiet)
        return self._screen

    @property
    def words(self) -> Words:
        """They name the farm file where, without it, the same words would be about another farm."""
        try:
            path = self.farm_file()
            named = bool(self.farm) and path != replace(self, farm="").farm_file()
        except FarmhandError:  # there is no such farm: nothing is to be typed about it
            named = False
        return Words(str(path) if named else "")

    def farm_file(self) -> Path:
        """The farm file meant. UnknownName, saying where the name came from."""
        set_in = os.environ.get("FARMHAND_FARM", "")
        for text, source in ((self.farm, "--farm"), (set_in, "$FARMHAND_FARM")):
            if text:
                path = Path(text).expanduser()
                if not _may_be(path):
                    raise UnknownName(
                        f"{source}: no farm file {path}", remedy="give the path of a farm file"
                    )
                return path.absolute()
        here = Path.cwd() / "farm.yaml"
        return here if _may_be(here) else ROOT / "inventory" / "default.yaml"

    def site(self, *, plan: bool = False, adopting: bool = False) -> Site:
        """The farm, opened, with ``plan`` for looking only, ``adopting`` also where its state is another
        farm's. A context manager."""
        from provision.engine.requester import Requester
        from provision.site import open_site

        patience = self._patience()
        return open_site(
            self.farm_file(),
            reporter=self.screen,
            plan=plan or self.plan,
            requester=Requester.of_process(),
            adopting=adopting,
            patience=patience,
        )

    def _patience(self) -> float:
        """Seconds."""
        if self.wait is True:
            return math.inf
        if not self.wait:
            return 0
        from cli.options import count

        return count("--wait", str(self.wait), least=0)

    def perform(self, site: Site, name: str, /, **request: object) -> Outcome[Any]:
        """Carry out, or plan, one of the task's operations. ``request``: its fields."""
        from provision.engine.registry import operation
        from provision.engine.runner import perform

        assert name in self.does, f"{self.task}: {name} is not among its operations"
        return perform(site, operation(name)(**request))

    @property
    def acts(self) -> bool:
        """Whether it is to change anything."""
        return bool(self.does) and not self.plan

    def close(self) -> None:
        if self._screen is not None:
            self._screen.close()
            self._screen = None
