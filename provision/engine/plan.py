"""What is going to be done: the lines that ``--plan`` shows are those of the very jobs that a run
carries out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from inventory.errors import Text
from provision.engine.report import Action, R_co


@dataclass(frozen=True, slots=True)
class Job:
    """One part of a plan: its lines, and what carries them out (None: they are only said). What ``run``
    returns, if anything, are the lines of what it did, in place of those announced."""

    actions: tuple[Action, ...]
    run: Callable[[], Sequence[Action] | None] | None = None


Stages = Sequence[Mapping[str, Sequence[Job]]]
"""One after the other. In each, the jobs of every VM ("" : the farm) in their order, the VMs side by
side."""


@dataclass(frozen=True, slots=True)
class Plan(Generic[R_co]):
    """``result``: what the operation hands back, asked for when its jobs are done; where it is only
    planned, as much as is known."""

    stages: Stages
    result: Callable[[], R_co]


def job(verb: str, vm: str, text: Text, run: Callable[[], object] | None = None) -> Job:
    """A job of one line. What ``run`` returns is dropped."""
    if run is None:
        return Job((Action(verb, vm, text),))
    do = run

    def go() -> None:
        do()

    return Job((Action(verb, vm, text),), go)


def foretold(*actions: Action) -> Job:
    """A job of lines that a later job carries out, and reports when it has."""
    return Job(actions, lambda: None)


def alone(*jobs: Job) -> Mapping[str, Sequence[Job]]:
    """A stage of these jobs, one after the other."""
    return {"": jobs}
