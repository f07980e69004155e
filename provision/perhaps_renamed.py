"""A made VM that got another name in the farm file looks like two: one that is not made, and one that is
declared no more."""

from __future__ import annotations

from collections.abc import Sequence

from inventory.errors import Call, Text


def perhaps_renamed(unmade: Sequence[str], undeclared: Sequence[str]) -> Text:
    """What to do if the two are one; "" unless there is one of each."""
    if len(unmade) != 1 or len(undeclared) != 1:
        return ""
    return (f"if it is {unmade[0]} by now: ", Call("rename", vm=unmade[0], was=undeclared[0]))
