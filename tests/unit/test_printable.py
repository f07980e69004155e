"""What guests and tools wrote, fit to be shown."""

from __future__ import annotations

import pytest

from host.printable import last_line, plain


@pytest.mark.parametrize(
    ("wrote", "shown"),
    [
        ("10%\r100%\n\x1b[31mred\x1b[0m\r\n\x1b]0;title\x07end", "100%\nred\nend"),
        ("\x1b[2J\x1b[01;01HSeaBIOS\r\r\n", "SeaBIOS\n"),
        ("a\tb\x00c\x9bd\u202ee", "a\tb c d e"),
        ("ünï ✓\n\n", "ünï ✓\n\n"),
        ("", ""),
    ],
)
def test_plain(wrote: str, shown: str) -> None:
    assert plain(wrote) == shown


def test_the_last_line_is_printable_and_short() -> None:
    assert last_line("one\n\x1b[31mtwo\x1b[0m \x07\x1b]0;title\x07\n\n \r\n") == "two"
    assert last_line("login: \x9b\x00\u202e") == "login:"
    assert last_line("x" * 500) == "x" * 59 + "…"
    assert last_line("") == last_line("\n\x1b[2J\n") == ""
