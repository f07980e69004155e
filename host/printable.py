"""What guests and tools wrote, fit to be shown: on a terminal, in a record, within a message."""

from __future__ import annotations

import re

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""Of a terminal: colours, cursor movements, titles (ECMA-48)."""


def plain(text: str) -> str:
    """Its lines without colours and cursor movements; of one that was rewritten by carriage returns, its
    last state. Other control characters, which must not reach anybody's terminal, are blanks."""
    return "\n".join(map(_line, _ESCAPES.sub("", text).split("\n")))


def _line(text: str) -> str:
    text = text.rstrip("\r").rpartition("\r")[2]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else " " for c in text)


def last_line(text: str, most: int = 60) -> str:
    """The last line with anything in it, of so many characters at most; or ""."""
    shown = next(filter(None, map(str.strip, reversed(plain(text).split("\n")))), "")
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"
