"""What was found out about the machine we run on, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["needed", "note"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. ``remedy`` is what to type or do; empty where all is well."""

    name: str
    ok: bool
    level: Level
    text: str
    remedy: str = ""

    def as_dict(self) -> Mapping[str, object]:
        return asdict(self)


def install(packages: str) -> str:
    """A remedy: Debian packages, by name."""
    return f"as root: apt-get install -y --no-install-recommends {packages}"
