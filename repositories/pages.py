"""Pages of a repository: what each channel had, and each generation with what changed. They are made
from what is there, and can be made again: no transaction waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, pairwise

from host.files import own_directory, write_atomic
from host.html import page_template
from inventory.errors import FarmhandError
from repositories.difference import Difference, differences
from repositories.generation import Generation, LogEntry
from repositories.repository import Repository

_ENTRIES, _CHANGES, _PACKAGES = 50, 20, 2000
"""Shown of a channel's log, of one entry, of a generation."""


@dataclass(frozen=True, slots=True)
class _ShownEntry:
    """One move of a channel's pointer. ``there``: whether its generation is."""

    sequence: int
    verb: str
    by: str
    note: str
    at: datetime
    there: bool
    changes: tuple[Difference, ...]
    more: int


@dataclass(frozen=True, slots=True)
class _ShownChannel:
    name: str
    head: Generation | None
    log: tuple[_ShownEntry, ...]


def write_pages(repository: Repository) -> int:
    """Write those that are missing, and the index anew. Returns how many generations got one."""
    top, fresh = repository.layout.pages, 0
    own_directory(top, mode=0o755)
    sequences = repository.documents.sequences()
    for path in top.glob("*.html"):
        if not (path.stem.isdigit() and int(path.stem) in sequences):
            path.unlink(missing_ok=True)
    for sequence in sequences:
        path = top / f"{sequence}.html"
        if not path.exists():
            text = _generation(repository, repository.documents.read(sequence))
            write_atomic(path, text.encode(), mode=0o644)
            fresh += 1
    write_atomic(repository.layout.index_page, _index(repository).encode(), mode=0o644)
    return fresh


def _generation(repository: Repository, generation: Generation) -> str:
    packages = list(islice(repository.packages(generation), _PACKAGES))
    changes: tuple[Difference, ...] = ()
    base = _read(repository, generation.base)
    if base:
        changes = differences(repository, base, generation, changelogs=True)
    return page_template("generation.html.j2").render(
        repository=repository,
        generation=generation,
        changes=changes,
        packages=packages,
        more=generation.count - len(packages),
    )


def _index(repository: Repository) -> str:
    channels = [
        _ShownChannel(name, repository.head(name), tuple(_entries(repository, name)))
        for name in repository.settings.channels
    ]
    return page_template("repository.html.j2").render(repository=repository, channels=channels)


def _entries(repository: Repository, channel: str) -> Iterator[_ShownEntry]:
    """The latest first."""
    log: list[LogEntry | None] = [*reversed(repository.documents.log(channel)[-_ENTRIES:]), None]
    for entry, before in pairwise(log):
        assert entry is not None
        now = _read(repository, entry.sequence)
        earlier = _read(repository, before.sequence) if before else None
        changes = differences(repository, earlier, now) if earlier and now else ()
        yield _ShownEntry(
            entry.sequence, entry.verb, entry.by, entry.note, entry.at, now is not None,
            changes[:_CHANGES], max(len(changes) - _CHANGES, 0),
        )  # fmt: skip


def _read(repository: Repository, sequence: int) -> Generation | None:
    """None: it is collected, or there never was one; or nobody can read it."""
    try:
        return repository.documents.read(sequence) if sequence else None
    except FarmhandError:
        return None
