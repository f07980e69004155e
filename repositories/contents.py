"""What two files of one package differ in, member by member."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Literal, TypeAlias

from host.printable import one_line

Aspect: TypeAlias = Literal[
    "only in the first", "only in the second", "value", "content", "kind", "mode", "owner", "device",
    "link", "attributes", "time", "order",
]  # fmt: skip
_SHOWN = 60
"""Characters of what either has."""


@dataclass(frozen=True, slots=True)
class MemberDifference:
    """``name``: of a field (``control: Depends``, ``build host``), of a file that is installed, or of
    one that the package manager has (``control/postinst``). ``before``, ``after``: what the first and
    the second have, where that is short to say; for people."""

    name: str
    aspect: Aspect
    before: str = ""
    after: str = ""

    def said(self) -> str:
        """Without its name."""
        if not self.before and not self.after:
            return self.aspect
        return f"{self.aspect} {self.before or 'none'} -> {self.after or 'none'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFile:
    """A file as a package has it. ``content``: its sum; "" where what it says is compared elsewhere.
    ``attributes``: what else the package says of it. ``time``: seconds since 1970."""

    kind: str = ""
    mode: str = ""
    owner: str = ""
    device: str = ""
    link: str = ""
    content: str = ""
    attributes: str = ""
    time: int = 0


def file_differences(
    before: Mapping[str, PackedFile], after: Mapping[str, PackedFile]
) -> Iterator[MemberDifference]:
    """By names, in their order."""
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        shown = one_line(name, 200)
        if one is None or other is None:
            yield MemberDifference(shown, "only in the first" if one else "only in the second")
        elif one != other:
            for field in fields(PackedFile):
                if (a := getattr(one, field.name)) != (b := getattr(other, field.name)):
                    yield _difference(shown, field.name, a, b)


def value_differences(
    before: Mapping[str, object], after: Mapping[str, object]
) -> Iterator[MemberDifference]:
    """Of fields. What either has is told where both are texts or numbers."""
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if one == other:
            continue
        if one is None or other is None:
            yield MemberDifference(name, "only in the first" if other is None else "only in the second")
        elif isinstance(one, str | int) and isinstance(other, str | int):
            yield MemberDifference(name, "value", _short(one), _short(other))
        else:
            yield MemberDifference(name, "value")


def order_difference(
    what: str, before: Sequence[str], after: Sequence[str]
) -> Iterator[MemberDifference]:
    """Where both have the same, in another order, or so many times."""
    if before != after and set(before) == set(after):
        yield MemberDifference(what, "order")


def names_of(differences: Sequence[MemberDifference]) -> tuple[str, ...]:
    """What differs; files of which the time alone does are one ``times of files``."""
    named = [one for one in differences if one.aspect != "order"]
    plain = {one.name for one in named if one.aspect != "time"}
    timed = any(one.name not in plain for one in named)
    return (*sorted(plain), "times of files") if timed else tuple(sorted(plain))


def _difference(name: str, aspect: str, one: object, other: object) -> MemberDifference:
    found: Aspect = aspect  # type: ignore[assignment]  # the fields are called so
    if aspect in ("content", "attributes"):
        return MemberDifference(name, found)
    if aspect == "time":
        assert isinstance(one, int)
        assert isinstance(other, int)
        return MemberDifference(name, found, _moment(one), _moment(other))
    return MemberDifference(name, found, _short(one), _short(other))


def _short(value: object) -> str:
    return one_line(str(value), _SHOWN)


def _moment(seconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (OverflowError, ValueError, OSError):  # a stranger's number
        return _short(seconds)
