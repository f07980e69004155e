"""What was found out about the machine we run on, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from inventory.errors import Remedy

Level = Literal["needed", "note"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. ``remedy`` is what to type or do; empty where all is well."""

    name: str
    ok: bool
    level: Level
    text: str
    remedy: Remedy = ""

    def as_dict(self) -> Mapping[str, object]:
        return {
            "name": self.name, "ok": self.ok, "level": self.level, "text": self.text,
            "remedy": self.remedy,
        }  # fmt: skip


def install(packages: str) -> str:
    """A remedy: Debian packages, by name."""
    return f"as root: apt-get install -y --no-install-recommends {packages}"
