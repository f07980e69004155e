"""Commands to go on with, as they can be typed: nothing that mattered in the run before is left out.

Where ``--farm`` was given, the face puts it into each command of a remedy (``cli.with_farm``); what is
kept, as the page of a record is, names the farm file itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def command(task: str, *words: str, farm: str = "") -> str:
    """``./invoke TASK --farm FARM WORDS``."""
    return shlex.join(["./invoke", task, *(("--farm", farm) if farm else ()), *words])


def cycle_command(step: str, options: Sequence[str], *, farm: str = "") -> str:
    """A cycle from this step on ("": all of it), with the options of ``cycle_options``."""
    return command("cycle", *(("--from", step) if step else ()), *options, farm=farm)


def cycle_options(*, only: Sequence[str], revision: str | None, keep_going: bool) -> tuple[str, ...]:
    """What a cycle was told beside where to begin."""
    return (
        *(word for step in only for word in ("--only", step)),
        *(("--revision", revision) if revision is not None else ()),
        *(("--keep-going",) if keep_going else ()),
    )
