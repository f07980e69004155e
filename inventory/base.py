"""What every section of a farm file is, and the words for what is wrong with one.

The sections are plain dataclasses. What their fields take is said by their annotations, which only
``inventory.annotations`` has evaluated: a farm that was validated before (``inventory.plain``) needs
neither pydantic nor the checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import ClassVar

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A section: its subclasses are frozen dataclasses with keywords only, the names in their
    annotations those of ``inventory.fields``. What concerns several keys is checked by
    ``__post_init__``, with ``at_key``."""

    KEYS: ClassVar[Mapping[str, str]] = {}
    """Keys of the file that are called otherwise here: by the field's name."""
    __pydantic_config__: ClassVar[Mapping[str, object]]

    def __init_subclass__(cls) -> None:
        cls.__pydantic_config__ = {"extra": "forbid", "alias_generator": cls.key_of}

    @classmethod
    def key_of(cls, field: str) -> str:
        """The file's key of a field."""
        return cls.KEYS.get(field, field)


class KeyProblem(ValueError):
    """What is wrong with a whole section, and which of its keys must answer for it."""

    def __init__(self, text: str, key: str, others: tuple[str, ...]) -> None:
        super().__init__(text)
        self.key = key
        self.keys = (key, *others)


def at_key(key: str, text: str, *others: str) -> KeyProblem:
    """An error of a whole section that one of its keys must answer for: the loader points there. It
    isn't told where that key or one of the others has been refused already."""
    return KeyProblem(text, key, others)


def quote(value: str) -> str:
    """The value as Python quotes it, on one line and at most 60 characters of it: for messages."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def parse_range(value: str) -> tuple[IPv4Address, IPv4Address]:
    """First and last address of an entry of ``reserved``; the same twice for a single address.
    ValueError if it is neither."""
    first, dash, last = (part.strip() for part in value.partition("-"))
    try:
        low, high = IPv4Address(first), IPv4Address(last if dash else first)
    except ValueError:
        raise ValueError(
            f"{quote(value)} is not an address or a range such as 10.10.60.200-10.10.60.254"
        ) from None
    if high < low:
        raise ValueError(f"{quote(value)} ends before it begins")
    return low, high
