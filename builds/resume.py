"""Calls to go on with: nothing that mattered in the run before is left out."""

from __future__ import annotations

from collections.abc import Sequence

from inventory.errors import Call


def cycle_asked(*, only: Sequence[str], revision: str | None, keep_going: bool) -> Call:
    """A cycle as it was asked for, beside where to begin."""
    return Call("cycle", only=only, revision=revision, keep_going=keep_going)


def from_step(asked: Call, step: str) -> Call:
    """The same from this step on; "": all of it."""
    return Call(asked.task, from_=step or None, **dict(asked.flags))
