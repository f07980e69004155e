"""Reading JSON of ours: a value of its type, or one short line."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
import xmlrpc.client
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from xml.parsers.expat import ExpatError

import pytest

from host.documents import Malformed, damaged, json_object, json_value, made, moment, read_file, texts


@dataclass(frozen=True)
class Part:
    name: str
    size: int = 0


@dataclass(frozen=True)
class Whole:
    ok: bool
    seconds: float
    kind: Literal["a", "b"]
    when: datetime
    parts: tuple[Part, ...] = ()
    words: Mapping[str, str] | None = None


GOOD = {
    "ok": True, "seconds": 1, "kind": "a", "when": "2026-01-01T00:00:00+00:00",
    "parts": [{"name": "x"}], "words": {"a": "b"}, "unknown": [[]],
}  # fmt: skip


def test_what_is_right_comes_back() -> None:
    whole = made(Whole, GOOD)
    assert whole == Whole(True, 1.0, "a", datetime(2026, 1, 1, tzinfo=UTC), (Part("x"),), {"a": "b"})
    assert made(Whole, {**GOOD, "words": None}).words is None
    assert made(Part, {}, name="given") == Part("given")


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("ok", 1, "ok is not true or false"),
        ("seconds", "1", "seconds is not a number"),
        ("seconds", True, "seconds is not a number"),
        ("kind", "c", "kind is none of 'a', 'b'"),
        ("kind", [], "kind is none of"),
        ("when", "2026-01-01T00:00:00", "when is not a time with its zone"),
        ("when", "yesterday", "when is not a time"),
        ("parts", {}, "parts is no list"),
        ("parts", [None], "parts.0 is no JSON object"),
        ("parts", [{"name": "x"}, {}], "parts.1.name is missing"),
        ("parts", [{"name": "x", "size": 2**63}], "parts.0.size is too large"),
        ("parts", [{"name": "x", "size": 1.5}], "parts.0.size is not a whole number"),
        ("words", {"a\n\x1b[2J": 1}, r"words.a\n\x1b[2J is not a text"),
        ("words", [], "words is no JSON object"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(key: str, value: object, why: str) -> None:
    with pytest.raises(Malformed) as wrong:
        made(Whole, {**GOOD, key: value})
    assert str(wrong.value).startswith(why)
    missing = {k: v for k, v in GOOD.items() if k != "ok"}
    with pytest.raises(Malformed, match="ok is missing"):
        made(Whole, missing)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "line 1, column 1"),
        (b"{", "line 1, column 2"),
        (b"null", "no JSON object"),
        (b'{"a": 1, "a": 1}', "'a' is there twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": -1e999}', "too large"),
        (b"9" * 5000, "too large"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        ("{}".encode("utf-16"), "byte 0 is not UTF-8"),
        ("{}".encode("utf-8-sig"), "BOM"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    ],
)
def test_bytes_that_are_no_object(data: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        json_object(data)


def test_parts_of_rows() -> None:
    assert texts(json_value('["a"]'), "it") == ("a",)
    for wrong in ("{}", "[1]", "null", '"a"'):
        with pytest.raises(Malformed):
            texts(json_value(wrong), "it")
    for when in (None, 3, "", "2026-01-01"):
        with pytest.raises(Malformed, match="at is not a time"):
            moment(when, "at")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(Malformed, match="no regular file"):
            read_file(path)
    with pytest.raises(FileNotFoundError) as absent:
        read_file(tmp_path / "none")
    error = damaged(tmp_path / "none", "a note", absent.value, "look")
    assert error.message == f"cannot read a note, {tmp_path / 'none'}: No such file or directory"


def test_entities_of_xml_can_t_grow() -> None:
    """Why libvirt's XML and a XenAPI server's answers are read by the standard library: its expat stops
    what would grow without bounds (since 2.4.1)."""
    grown = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 20}">' for n in range(1, 12))
    text = f'<!DOCTYPE d [<!ENTITY e0 "lol">{grown}]><methodResponse>&e11;</methodResponse>'
    with pytest.raises(ET.ParseError, match="amplification"):
        ET.fromstring(text)
    with pytest.raises(ExpatError, match="amplification"):
        xmlrpc.client.loads(text)
