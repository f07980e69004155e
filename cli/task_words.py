"""What tasks take besides flags; cli/typed_words.py reads such words."""

from __future__ import annotations

from typing import NamedTuple


class TaskWords(NamedTuple):
    """``bare``: the flag whose values may stand without it; ``many``: whether it is repeatable.
    ``rest``: the flag whose value is a command, which may stand after ``--``. "": none.
    ``changes``: whether it may change something. ``shown``: the words in the usage line; "": by the
    flag's name."""

    bare: str = ""
    many: bool = False
    rest: str = ""
    changes: bool = False
    shown: str = ""


task_words: dict[str, TaskWords] = {}
"""By task."""
