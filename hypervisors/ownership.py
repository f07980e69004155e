"""Whose something is: a farm's identity, as the marks on its disks and machines carry it.

A farm's name proves nothing: any two farm files may have the same one. What proves it is a number made
once, at random, and kept in the state of the controller that made the farm. The rest is for people.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import quote, unquote

from host.printable import one_line

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_MARK = re.compile(rf"({_NAME}):([0-9a-f]{{32}}):([^:]*):([^:]*)")
_LEGIBLE = " /.@=,+-_()"
_CONTROLLER, _FILE = 160, 480  # bytes, quoted, that are kept: of a path its end


@dataclass(frozen=True, slots=True)
class FarmIdentity:
    """``id``: 32 hexadecimal digits; "" of what was marked without one. ``file``: the farm file's path,
    and ``controller``: user@host, both as of the time of the mark."""

    name: str
    id: str
    file: str = field(default="", compare=False)
    controller: str = field(default="", compare=False)

    @property
    def mark(self) -> str:
        """As marks have it: one line of plain ASCII, without quotes, at most 810 characters."""
        if not self.id:
            return self.name
        controller, file = _quoted(self.controller, _CONTROLLER), _quoted(self.file, _FILE)
        return f"{self.name}:{self.id}:{controller}:{file}"

    @classmethod
    def of(cls, mark: str) -> FarmIdentity:
        """What a mark says. One that isn't ours to read is somebody else's, whatever name it has."""
        found = _MARK.fullmatch(mark)
        if found is None:
            return cls(mark if re.fullmatch(_NAME, mark) else "", "")
        name, number, controller, file = found.groups()
        return cls(name, number, unquote(file), unquote(controller))

    def is_namesake(self, other: FarmIdentity) -> bool:
        """Whether that is another farm of the same name."""
        return self.name == other.name and self != other

    @property
    def short(self) -> str:
        """Enough of the number to tell it from others."""
        return self.id[:8]

    def __str__(self) -> str:
        """For people, and safe to print, whoever wrote it."""
        if not self.id:
            return f"{one_line(self.name)} (without an identity)"
        where = f", {self.file}" if self.file else ""
        who = f" of {self.controller}" if self.controller else ""
        return one_line(f"{self.name} ({self.short}{where}{who})")


def _quoted(text: str, most: int) -> str:
    """Its end, where it is too long."""
    text = text[-most:]
    while len(quoted := quote(text, safe=_LEGIBLE, errors="surrogateescape")) > most:
        text = text[1:]
    return quoted
