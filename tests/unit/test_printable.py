"""What guests and tools wrote, fit to be shown."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.printable import as_json, last_line, one_line, plain, printable

_BITS = (
    "\x1b", "[", "31m", "]0;", "]52;c;", "]8;;http://x", "\x07", "\x1b\\", "\r", "\n", "\t", "\x9b",
    "\x9d", "\u202e", "\u2066", "\u200b", "\ufeff", "\u2028", "\x85", "\x0b", "\udc9b", "\x7f", "\x00",
    "a", "é", " ",
)  # fmt: skip
foreign = st.one_of(
    st.text(st.characters()),
    st.lists(st.sampled_from(_BITS), max_size=30).map("".join),
    st.binary(max_size=60).map(lambda data: data.decode(errors="surrogateescape")),
)


def harmless(text: str) -> bool:
    kinds = {unicodedata.category(c) for c in text if c not in "\n\t"}
    return not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize(
    ("wrote", "shown"),
    [
        ("10%\r100%\n\x1b[31mred\x1b[0m\r\n\x1b]0;title\x07end", "100%\nred\nend"),
        ("\x1b[2J\x1b[01;01HSeaBIOS\r\r\n", "SeaBIOS\n"),
        ("a\tb\x00c\x9bd\u202ee", "a\tb\\x00c\\x9bd\\u202ee"),
        ("\x1b[\x1b[0m31mnested", "\\x1b[31mnested"),
        ("\x1b]0;title\nstays\x07", "\\x1b]0;title\nstays\\x07"),  # nothing takes a line away
        ("ünï ✓\n\n", "ünï ✓\n\n"),
        ("", ""),
    ],
)
def test_plain(wrote: str, shown: str) -> None:
    assert plain(wrote) == shown


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        ("\x1b[31mred\r\n\ttab\x7f", "\\x1b[31mred\\r\n\ttab\\x7f"),
        ("\x1b]52;c;cm0=\x07", "\\x1b]52;c;cm0=\\x07"),  # the clipboard
        ("exe\u202egnp.\u200b", "exe\\u202egnp.\\u200b"),
        ("one\u2028two\x85", "one\\u2028two\\x85"),
        (b"caf\xe9".decode(errors="surrogateescape"), "caf\\udce9"),
        ("10\xa0€", "10 €"),
    ],
)
def test_printable(foreign: str, shown: str) -> None:
    assert printable(foreign) == shown


def test_one_line() -> None:
    assert one_line("a\nfarmhand: fetched\tb") == "a\\nfarmhand: fetched\\tb"
    assert one_line("x" * 500, 10) == "x" * 9 + "…"


@given(foreign)
def test_nothing_that_a_terminal_acts_upon_is_left(text: str) -> None:
    for shown in (printable(text), plain(text)):
        assert harmless(shown)
        shown.encode()  # UTF-8 can carry it
    assert harmless(one_line(text))
    assert not {"\n", "\t"} & set(one_line(text))


@given(foreign)
def test_a_second_pass_changes_nothing(text: str) -> None:
    assert printable(printable(text)) == printable(text)
    assert printable(plain(text)) == plain(plain(text)) == plain(text)
    assert one_line(one_line(text)) == one_line(text)
    assert printable(text).count("\n") == plain(text).count("\n") == text.count("\n")


@given(st.lists(foreign, max_size=3))
def test_json_is_harmless_and_loses_nothing(value: list[str]) -> None:
    text = as_json(value, 2)
    assert harmless(text)
    text.encode()
    # JSON has pairs of surrogates for one character: two lone ones side by side are that character
    assert json.loads(text) == [
        item.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass") for item in value
    ]


def test_the_last_line_is_printable_and_short() -> None:
    assert last_line("one\n\x1b[31mtwo\x1b[0m \x07\x1b]0;title\x07\n\n \r\n") == "two \\x07"
    assert last_line("login: \x9b\x00") == "login: \\x9b\\x00"
    assert last_line("x" * 500) == "x" * 59 + "…"
    assert last_line("") == last_line("\n\x1b[2J\n") == ""
