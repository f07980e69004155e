"""Sizes and durations as people write them. Sizes are binary: ``1G`` is 2**30 bytes (as in lvm(8)
and qemu-img(1)), so is ``1GiB``."""

from __future__ import annotations

import re
from functools import cache

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# At most 15 digits, ASCII ones: more is never meant, and would overflow what computes with them.
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
_SIZE = re.compile(rf"({_NUMBER})\s*([KMGT]?)(?:iB|B)?", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(rf"(?:{_NUMBER}[smhd]\s*)+|{_NUMBER}")
_LARGEST = 2**60


@cache
def parse_size(text: str) -> int:
    """Bytes of a size such as ``512M`` or ``1.5G``. ValueError, in words for an admin, if it isn't a
    size."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(
            f"{text[:60]!r} is not a size: write a number with K, M, G or T, such as 512M or 4G"
        )
    whole, _, part = match[1].partition(".")
    size, rest = divmod(int(whole + part) * _UNITS[match[2].upper()], int("1" + "0" * len(part)))
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    if size > _LARGEST:
        raise ValueError(f"{text!r} is more than any machine has")
    return size


def about(size: int) -> str:
    """A size for reading, where exact bytes say nothing: ``6.4G``, ``812M``."""
    return f"{size / 2**30:.1f}G" if size >= 2**30 else format_size(size // 2**20 * 2**20)


def rounded(size: int) -> str:
    """For reading, three figures at most."""
    for unit, name in ((2**40, "T"), (2**30, "G"), (2**20, "M"), (2**10, "K")):
        if size >= unit:
            value = size / unit
            return f"{value:.0f}{name}" if value >= 10 or value == int(value) else f"{value:.1f}{name}"
    return f"{size}B"


def brief(size: int) -> str:
    """A size as ``about`` has it, but whole ones without a fraction: ``4G``."""
    return about(size) if size % 2**30 else format_size(size)


def format_size(size: int) -> str:
    """A size exactly, where that is short (``512M``), else with two digits (``1.3G``)."""
    if size == 0:
        return "0"
    for unit in ("T", "G", "M", "K"):
        if size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    for unit in ("T", "G", "M", "K"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.1f}{unit}"
    return f"{size}B"


def parse_duration(text: str) -> float:
    """Seconds of a duration: ``90``, ``90s``, ``5m``, ``1h30m``. ValueError, in words for an admin, if
    it isn't one."""
    text = text.strip()
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is not a duration: write 90s, 5m or 1h30m")
    return sum(float(n) * _SECONDS[u] for n, u in re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", text))


def format_duration(seconds: float) -> str:
    """Seconds as people read them: ``0.4s``, ``12s``, ``3m05s``, ``5m``, ``2h07m``, ``1h``."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s".removesuffix("00s")
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m".removesuffix("00m")
