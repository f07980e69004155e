"""What guests and tools wrote, made fit to be shown on a terminal, in a record, or in a message."""

from __future__ import annotations

import re

_ESCAPES = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])"
"""Of a terminal: colours, cursor movements, titles (ECMA-48)."""


def plain(text: str) -> str:
    """The text without colours and cursor movements. Of a line rewritten by carriage returns the last
    state stays. Other control characters, which must not reach a terminal, become blanks."""
    if "\x1b" in text:
        text = re.sub(_ESCAPES, "", text)
    return "\n".join(map(_line, text.split("\n")))


def _line(text: str) -> str:
    text = text.rstrip("\r").rpartition("\r")[2]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else " " for c in text)


def last_line(text: str, most: int = 60) -> str:
    """The last line that isn't empty, cut to that many characters; "" if there is none."""
    shown = next(filter(None, map(str.strip, reversed(plain(text).split("\n")))), "")
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"
