"""Files of ours that hold JSON, and how they are read. Any bytes may be in one: cut off by a full disk,
changed by hand, written by another farmhand. There are two ends: a value whose every field is of its
type, or one error with a short line that says what is wrong. Nothing else is ever raised, and nobody is
waited for.
"""

from __future__ import annotations

import json
import math
import os
import stat
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from host.files import file_error
from host.printable import one_line
from inventory.errors import Remedy, WrongState

T = TypeVar("T")
_MOST = 2**28
"""Bytes of a file: far more than a farm of ten thousand VMs needs."""
_LONGEST = 300  # characters of what is wrong
_WORDS: Mapping[Any, str] = {str: "a text", bool: "true or false", int: "a whole number",
                             float: "a number", datetime: "a time with its zone"}  # fmt: skip
_TOO_LARGE = "a number in it is too large"


class Malformed(ValueError):
    """What was read isn't what it should be; its text says why, in one short line, whatever was read."""

    def __init__(self, why: str) -> None:
        super().__init__(one_line(why, _LONGEST))


def read_file(path: Path) -> bytes:
    """The bytes of a regular file. OSError as open(2) raises it; Malformed for what is no regular file,
    or too large to be one of ours."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # no FIFO's writer is waited for
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise Malformed("it is no regular file")
        if found.st_size > _MOST:
            raise Malformed(f"it has {found.st_size} bytes")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def damaged(path: Path, what: str, why: Exception, remedy: Remedy) -> WrongState:
    """The error for a file that could not be read, by Malformed or OSError. ``what``: what it is to
    farmhand. ``remedy``: what to do, and what is lost by it."""
    if isinstance(why, OSError):
        error = file_error(why, path, f"read {what},")
        return WrongState(error.message, remedy=error.remedy or remedy)
    return WrongState(f"{path}, {what}, is damaged: {why}", remedy=remedy)


def json_object(data: bytes | str) -> dict[str, Any]:
    """The JSON object in it, as ``json_value``."""
    found = json_value(data)
    if not isinstance(found, dict):
        raise Malformed("it is no JSON object")
    return found


def json_value(data: bytes | str) -> object:
    """The JSON in it, in UTF-8. Malformed for anything else, and where a key is there twice: whoever
    wrote that meant both."""
    try:
        text = data if isinstance(data, str) else data.decode()
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise Malformed(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Malformed(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise Malformed("it is nested too deep") from None
    except Malformed:
        raise
    except ValueError:  # more digits than Python takes
        raise Malformed(_TOO_LARGE) from None


def texts(value: object, at: str) -> tuple[str, ...]:
    """A JSON list of texts. Malformed."""
    found: tuple[str, ...] = _value(tuple[str, ...], value, at)
    return found


def moment(value: object, at: str) -> datetime:
    """A time with its zone, from its text. Malformed."""
    found: datetime = _value(datetime, value, at)
    return found


def made(kind: type[T], found: object, **known: object) -> T:
    """A JSON object as a value of the dataclass ``kind``: each field of its type; what has a default may
    be missing, and what the class doesn't know is left out. ``known``: fields that aren't in it.
    Malformed names the field."""
    value: T = _made(kind, found, "", known)
    return value


def _made(kind: Any, found: object, at: str, known: Mapping[str, object]) -> Any:
    if not isinstance(found, dict):
        raise Malformed(f"{at or 'it'} is no JSON object")
    values = dict(known)
    for name, hint, needed in _fields(kind):
        if name in values:
            continue
        place = f"{at}.{name}" if at else name
        if name in found:
            values[name] = _value(hint, found[name], place)
        elif needed:
            raise Malformed(f"{place} is missing")
    return kind(**values)


@cache
def _fields(kind: Any) -> tuple[tuple[str, Any, bool], ...]:
    """Of each field its name, its type, and whether it must be there."""
    hints = get_type_hints(kind)
    return tuple(
        (each.name, hints[each.name], each.default is MISSING and each.default_factory is MISSING)
        for each in fields(kind)
    )


@cache
def _shape(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Its origin, its arguments, whether it is a dataclass."""
    return get_origin(hint), get_args(hint), is_dataclass(hint)


def _value(hint: Any, value: object, at: str) -> Any:
    origin, of, with_fields = _shape(hint)
    if origin is types.UnionType:  # X | None
        one, none = of
        assert none is types.NoneType
        return None if value is None else _value(one, value, at)
    if origin is Literal:
        if value in of:
            return value
        raise Malformed(f"{at} is none of {', '.join(map(repr, of))}")
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_value(of[0], one, f"{at}.{n}") for n, one in enumerate(value))
        raise Malformed(f"{at} is no list")
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, dict):
            return {key: _value(of[1], one, f"{at}.{key}") for key, one in value.items()}
        raise Malformed(f"{at} is no JSON object")
    return _made(hint, value, at, {}) if with_fields else _plain(hint, value, at)


def _plain(hint: Any, value: object, at: str) -> object:
    if hint is datetime and isinstance(value, str):
        try:
            found = datetime.fromisoformat(value)
        except ValueError:
            found = datetime.min
        if found.tzinfo is not None:
            return found
    elif hint is float and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    elif type(value) is hint:
        if hint is int and not -(2**63) <= value < 2**63:  # type: ignore[operator]
            raise Malformed(f"{at} is too large a number")
        return value
    raise Malformed(f"{at} is not {_WORDS[hint]}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Malformed(f"{twice(key for key, _ in pairs)!r} is there twice")
    return found


def twice(values: Iterable[T]) -> T | None:
    """The first that comes a second time; None if each comes once."""
    seen: set[T] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _no_number(word: str) -> float:
    raise Malformed(f"{word} is no number")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise Malformed(_TOO_LARGE)
    return number
