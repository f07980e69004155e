"""Whether a build's outputs came out the same when it was done again: a small file beside its record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from builds.record import replace_file
from host.documents import Malformed, json_object, made, read_file
from host.printable import as_json

REBUILDS = "rebuilds"
"""Beside a record: a directory for each."""
_FILE = "verified.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The last time that the outputs were compared. ``rebuild``: its number, of ``rebuilds/N/`` beside
    the record; ``at``: ISO 8601, UTC; ``differences``: a line each, none where ``identical``; ``notes``:
    what was otherwise in the builder."""

    rebuild: int
    at: str
    identical: bool
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def save(self, record: Path) -> None:
        """``record``: the record's directory. NoSpace, WrongState if the disk refuses."""
        data = {"format": _FORMAT, **dataclasses.asdict(self)}
        replace_file(record / _FILE, as_json(data, indent=1) + "\n", durable=True)


def verified(record: Path) -> Verified | None:
    """Of the record in that directory; None: it never was, or nobody can tell."""
    try:
        data = json_object(read_file(record / _FILE))
        return made(Verified, data) if data.get("format") == _FORMAT else None
    except (OSError, Malformed):
        return None
