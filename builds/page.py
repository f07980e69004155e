"""A build record as one page: no script, no request for anything elsewhere, light and dark."""

from __future__ import annotations

from builds.record import BuildRecord


def write(record: BuildRecord) -> None:
    _ = record
