"""A package, as the repositories know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Package:
    """A package in a generation. ``file``: its name, one path component. ``size`` in bytes.
    ``component``: deb's, such as main; "" elsewhere. ``source``: the source package's name. ``build``:
    the record of the build that it came from; "" if none did."""

    name: str
    version: str
    architecture: str
    sha256: str
    size: int
    file: str
    component: str = ""
    source: str = ""
    build: str = ""

    @property
    def identity(self) -> tuple[str, str, str]:
        """Of two files with one identity, a client takes either for the other."""
        return self.name, self.version, self.architecture

    @property
    def place(self) -> str:
        """Its file, relative to the repository's directory, and to that of each generation."""
        return place(self.sha256, self.file)

    def __str__(self) -> str:
        return f"{self.name} {self.version} {self.architecture}"


def place(sha256: str, file: str) -> str:
    return f"pool/{sha256[:2]}/{sha256}/{file}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What a package's file says of itself. ``texts``: by kind of index, its part of that index, whole
    lines. ``signers``: the long ids or fingerprints of the keys that signed the file itself, verified
    or not; for rpm."""

    name: str
    version: str
    architecture: str
    source: str
    texts: Mapping[str, str]
    signers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """An entry of a package's changelog. ``when``: None where it can't be read."""

    version: str
    author: str
    when: datetime | None
    lines: tuple[str, ...]
