"""The page of one build of a package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from builds.log_text import log_lines
from builds.packages.record import LOG, PackageRecord
from builds.packages.verified import REBUILDS, verified
from builds.pages.places import PagePlaces, link
from host.html import page_template
from host.program import typed
from inventory.errors import spelled
from inventory.sizes import format_duration

_MOST, _INSTALLED = 50, 3000
"""Shown of a list of lines; of what was installed."""
_TAIL = 2**16  # bytes of an earlier attempt's log


@dataclass(frozen=True, slots=True)
class _ShownAttempt:
    vm: str
    failure: str
    message: str
    seconds: float
    log: str
    tail: str


def render(record: PackageRecord, places: PagePlaces, farm_file: str = "") -> str:
    """The page as text. ``record``: as it is to be shown (``PackageSummaries.settled``). ``farm_file``:
    named in what is to be typed."""
    page = places.build(record.package, record.number)
    again = verified(record.directory)
    again_log = f"{REBUILDS}/{again.rebuild}/{LOG}" if again else ""
    return page_template("package-build.html.j2").render(
        build=record,
        way=[
            (f"Farm {record.farm}", link(page, places.index)),
            (record.package, link(page, places.package(record.package))),
            (f"Build {record.number}", ""),
        ],
        glance=_glance(record),
        log=LOG if (record.directory / LOG).is_file() else "",
        gone={file.path for file in record.outputs if not _is_there(record.directory, file.path)},
        ours=[one for one in record.inputs.installed if one.sha256],
        others=[one for one in record.inputs.installed if not one.sha256],
        attempts=list(_attempts(record)),
        verified=again,
        verified_log=again_log if _is_there(record.directory, again_log) else "",
        spelled=partial(spelled, how=partial(typed, farm=farm_file)),
        most=_MOST,
        most_installed=_INSTALLED,
    )


def _glance(record: PackageRecord) -> str:
    """One sentence, or two."""
    on = f" on {record.builder.vm}" if record.builder.vm else ""
    took = format_duration(record.seconds)
    match record.result:
        case "running":
            return f"Running{on}."
        case "passed":
            count = len(record.packages)
            made_ = f"{count} package{'s' * (count != 1)} came out"
            same = f", the same bytes as in build {record.unchanged}" if record.unchanged else ""
            return f"Passed in {took}{on}: {made_}{same}."
        case _:
            why = f": {record.failure}" if record.failure else ""
            return f"{record.result.capitalize()} after {took}{on}{why}."


def _attempts(record: PackageRecord) -> Iterator[_ShownAttempt]:
    for attempt in record.attempts:
        log = f"{attempt.directory}/{LOG}"
        there = _is_there(record.directory, log)
        yield _ShownAttempt(
            attempt.vm, attempt.failure, attempt.message, attempt.seconds,
            log if there else "", _tail(record.directory / log) if there else "",
        )  # fmt: skip


def _is_there(directory: Path, path: str) -> bool:
    """Whether it is a file of the record's own."""
    return ".." not in Path(path).parts and not Path(path).is_absolute() and (directory / path).is_file()


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL, 0))
            return "\n".join(log_lines(file.read(_TAIL).decode(errors="replace"), ()))
    except OSError as error:
        return f"it can't be read: {error.strerror}"
