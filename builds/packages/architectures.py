"""Debian architectures and their wildcards, as dpkg's own tables have them: dpkg-architecture(1), Debian
Policy 11.1."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path

from host.check import install
from inventory.errors import WrongState

_TABLES = Path("/usr/share/dpkg")

_Tuple = tuple[str, ...]
"""ABI, C library, kernel, CPU."""


@lru_cache(maxsize=4096)
def matches(architecture: str, alias: str) -> bool:
    """Whether an architecture is what ``alias`` names: the same, or a wildcard such as linux-any."""
    if alias in ("any", architecture):
        return True
    real, wanted = _tuples().get(_short(architecture)), _pattern(alias)
    return bool(real and wanted) and all(
        one in ("any", other) for one, other in zip(wanted or (), real or (), strict=True)
    )


def concerned(architecture: str, names: Iterable[str]) -> bool:
    """Whether a list in brackets, such as ``linux-any`` or ``!armhf !i386``, has an architecture. As
    with dpkg the first name that it matches decides; where none does, a list that excludes has it."""
    found = False
    for name in map(str.lower, names):
        excluded = name.startswith("!")
        if matches(architecture, name.removeprefix("!")):
            return not excluded
        found = found or excluded
    return found


def _pattern(alias: str) -> _Tuple | None:
    parts = alias.split("-", 3)
    if "any" not in parts:
        return _tuples().get(_short(alias))
    return ("any",) * 4 if len(parts) == 1 else ("any",) * (4 - len(parts)) + tuple(parts)


def _short(architecture: str) -> str:
    """linux-amd64 is amd64."""
    first, _, rest = architecture.partition("-")
    return rest.partition("-")[0] if first == "linux" and rest else architecture


@cache
def _tuples() -> Mapping[str, _Tuple]:
    """By names. Where two rows give one name or one tuple, the first one counts."""
    cpus = [row[0] for row in _rows("cputable")]
    found: dict[str, _Tuple] = {}
    seen: set[str] = set()
    for of, name, *_ in _rows("tupletable"):
        for cpu in cpus if "<cpu>" in of else [""]:
            one, long = name.replace("<cpu>", cpu), of.replace("<cpu>", cpu)
            if one not in found and long not in seen:
                found[one] = tuple(long.split("-", 3))
                seen.add(long)
    return found


def _rows(table: str) -> Iterator[list[str]]:
    try:
        text = (_TABLES / table).read_text(encoding="utf-8")
    except OSError as error:
        raise WrongState(
            f"{_TABLES / table} can't be read: {error.strerror}", remedy=install("dpkg")
        ) from None
    return (line.split() for line in text.splitlines() if line and not line.startswith("#"))
