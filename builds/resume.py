"""The calls to go on with after a cycle. They repeat all that mattered in the one before."""

from __future__ import annotations

from collections.abc import Sequence

from inventory.errors import Call


def cycle_asked(*, only: Sequence[str], revision: str | None, like: str = "", keep_going: bool) -> Call:
    """The call of a cycle as it was asked for, without where it begins."""
    return Call("cycle", only=only, revision=revision, like=like or None, keep_going=keep_going)


def from_step(asked: Call, step: str) -> Call:
    """The same call, from this step on; "": from the beginning."""
    return Call(asked.task, from_=step or None, **dict(asked.flags))
