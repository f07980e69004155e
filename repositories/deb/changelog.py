"""Debian changelogs, deb-changelog(5), as packages have them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from repositories.deb.file import TarMember
from repositories.package import Change
from repositories.packed import unpacked

_MOST = 4 * 1024 * 1024
_ENTRIES = 1000
_HEAD = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.-]* \(([^()\s]{1,200})\)(?: [^;]*)?;.*")
# Dpkg::Changelog::Entry::Debian, $regex_header
_HEADING = re.compile(
    r"([A-Za-z0-9_][-+0-9a-z.]*) \(([^() \t]+)\)((?:\s+[-+0-9a-z.]+)+);(.*?)\s*",
    re.IGNORECASE | re.ASCII,
)
_FOOT = re.compile(r" -- (.*?)(?:  (.*))?")
# In the order of preference: a binNMU's own, the packager's, that of packages made by Debian itself.
_NAMES = re.compile(r"usr/share/doc/([^/]+)/changelog(\.Debian\.(?!gz$)[a-z0-9-]+|\.Debian|)(\.gz)?")


def changes(members: Iterable[TarMember], package: str) -> tuple[Change, ...]:
    """Of a package's files, those in its changelog, newest first. Empty: there is none, or it is too
    large, or upstream's own in a form of its own. Damaged."""
    found: dict[str, bytes] = {}
    for member in members:
        match = _NAMES.fullmatch(member.name)
        if match and match[1] == package and member.header.size <= _MOST:
            data = member.read(_MOST)
            found[match[2]] = b"".join(unpacked(iter((data,)), match[3] or "", _MOST))
            if match[2] == ".Debian":
                break  # names stand sorted: a binNMU's came before
    own = [name for name in sorted(found, key=len, reverse=True) if name.startswith(".Debian")]
    return tuple(change for name in own or found for change in parsed(found[name]))


def parsed(data: bytes) -> Iterator[Change]:
    """Its entries; of anything else, none."""
    version, lines, count = "", list[str](), 0
    for line in data.decode(errors="replace").split("\n"):
        if head := _HEAD.fullmatch(line):
            version, lines = head[1], []
        elif version and (foot := _FOOT.fullmatch(line)):
            while lines and not lines[-1]:
                lines.pop()
            yield Change(version, foot[1], _moment(foot[2] or ""), tuple(lines))
            version, count = "", count + 1
            if count == _ENTRIES:
                return
        elif version and (lines or line.strip()):
            lines.append(line.rstrip())


@dataclass(frozen=True, slots=True)
class NewestEntry:
    """A changelog's first entry. ``distributions``: as they stand there. ``author``: "NAME <ADDRESS>",
    ``when``: empty and None in one that nobody has finished."""

    source: str
    version: str
    distributions: str
    urgency: str
    author: str
    when: datetime | None


def newest(data: bytes) -> NewestEntry | None:
    """As dpkg-parsechangelog(1) finds it; None: there is none."""
    found = None
    for line in data[:_MOST].decode(errors="replace").split("\n"):
        if heading := _HEADING.fullmatch(line):
            if found:
                break
            keys = (pair.partition("=") for pair in heading[4].split(","))
            known = {key.strip().lower(): value.strip() for key, _, value in keys}
            distributions, urgency = heading[3].strip(), known.get("urgency", "medium").split()
            urgent = urgency[0].lower() if urgency else "medium"
            found = NewestEntry(heading[1], heading[2], distributions, urgent, "", None)
        elif found and (foot := _FOOT.fullmatch(line)):
            return replace(found, author=foot[1], when=_moment(foot[2] or ""))
    return found


def _moment(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text.strip())
    except (ValueError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
