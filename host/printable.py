"""What guests, tools, other hosts and files' names say, made safe to be shown: the one place for it.

Whatever a terminal or a browser could act upon, hide, or show in another order is written as its escape
(``\\x1b``, ``\\u202e``) and not left out: what is made by two parts when the one between them goes is
nothing that anybody looked at. So one pass does, and a second one changes nothing. Where colours are
left out (``plain``), escaping comes after that. The raw bytes are in the log files alone.
"""

from __future__ import annotations

import json
import re
from unicodedata import category

_DRAWN = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][0-9A-Z]|[@-OQ-WYZ\\])"
"""How programs draw on a terminal: colours, cursor movements, titles (ECMA-48)."""


class _Escapes(dict[int, str]):
    """How characters are shown, by their numbers, as str.translate asks for them."""

    def __missing__(self, number: int) -> str:
        character = chr(number)
        if category(character) == "Zs":
            shown = " "
        elif character.isprintable() or character in "\n\t":
            shown = character
        else:
            shown = character.encode("unicode_escape").decode("ascii")
        self[number] = shown
        return shown


_ESCAPES = _Escapes()


def printable(text: str) -> str:
    """The text with each character escaped that is not to be seen as it is: controls other than newline
    and tab, marks of direction and of no width, lone surrogates (bytes that are no text), and what
    Unicode doesn't have yet. Blanks of all kinds are blanks."""
    return text if text.isprintable() else text.translate(_ESCAPES)


def one_line(text: str, most: int = 0) -> str:
    """As ``printable``, its newlines and tabs escaped too; cut to ``most`` characters (0: not)."""
    if not text.isprintable():
        text = printable(text).replace("\n", r"\n").replace("\t", r"\t")
    return text if not most or len(text) <= most else f"{text[: most - 1]}…"


def plain(text: str) -> str:
    """What programs drew on a terminal, as it would stand there: without colours and cursor movements
    (each within its line: nothing takes a line away), and of a line rewritten by carriage returns its
    last state. All else as ``printable``."""
    return printable("\n".join(map(_stands, text.split("\n"))))


def last_line(text: str, most: int = 60) -> str:
    """The last line that isn't empty, cut to that many characters; "" if there is none."""
    shown = next(filter(None, map(str.strip, reversed(plain(text).split("\n")))), "")
    return one_line(shown, most)


def as_json(value: object, indent: int, encoding: str = "utf-8") -> str:
    """JSON that can be read on a terminal, too: its strings' own escapes (``\\u009b``) stand where
    ``printable`` would escape, and nothing is lost. All but ASCII is escaped where the encoding doesn't
    have it."""
    text = json.dumps(value, indent=indent, default=str, ensure_ascii=False)
    if not text.replace("\n", "").isprintable():
        text = "".join(c if c.isprintable() or c == "\n" else _in_json(c) for c in text)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(c if c.isascii() else _in_json(c) for c in text)
    return text


def _in_json(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 128 else json.dumps(character)[1:-1]


def _stands(line: str) -> str:
    return re.sub(_DRAWN, "", line).rstrip("\r").rpartition("\r")[2]
