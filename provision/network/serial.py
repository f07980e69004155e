"""Zone serial numbers: RFC 1982 arithmetic, and where one stands in a zone's file."""

from __future__ import annotations

import re
from datetime import date

_MODULUS = 2**32
_SOA = re.compile(
    r"""^(?P<head>[^;"\n]*?\bSOA\b\s+\S+\s+\S+\s*(?:\(\s*)?(?:;[^\n]*\n\s*(?:\(\s*)?)*)(?P<serial>\d{1,10})\b""",
    re.IGNORECASE | re.MULTILINE,
)
_DATES = (1970010100, 2099123199)


def later(one: int, other: int) -> bool:
    """Whether ``one`` comes after ``other`` (RFC 1982 section 3.2)."""
    return one != other and (one - other) % _MODULUS < _MODULUS // 2


def following(known: list[int], today: date) -> int:
    """The next one after all that are known: today's date and 00, where serials are dates and that comes
    after them; else one more. So the 101st change of a day takes tomorrow's first, and tomorrow goes on
    from there."""
    dated = int(f"{today:%Y%m%d}") * 100
    if not known:
        return dated
    newest = known[0]
    for serial in known[1:]:
        newest = serial if later(serial, newest) else newest
    if _DATES[0] <= newest <= _DATES[1] and later(dated, newest):
        return dated
    return (newest + 1) % _MODULUS or 1


def serial_of(text: str) -> int | None:
    """Of a zone's file. None: there is no SOA record in it."""
    match = _SOA.search(text)
    return int(match["serial"]) if match else None


def with_serial(text: str, serial: int) -> str:
    """The same file with another serial number, nothing else changed."""
    return _SOA.sub(lambda match: f"{match['head']}{serial}", text, count=1)
