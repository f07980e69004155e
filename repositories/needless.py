"""Files that no generation needs."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from host.files import matching, remove
from repositories.generation import Generation
from repositories.layout import Layout
from repositories.repository import Repository

_TEMPORARY = re.compile(r"\..+\.\d+\.\d+")
"""As ``host.files.write_atomic`` calls them."""


def needless(repository: Repository, stay: Iterable[Generation]) -> Iterator[Path]:
    """Files and directories that no generation needs."""
    digests: set[str] = set()
    packages: set[str] = set()
    keys: set[str] = set()
    for generation in stay:
        keys.add(generation.keys)
        fresh = [chunk for chunk in generation.chunks if chunk.digest not in digests]
        digests.update(chunk.digest for chunk in fresh)
        packages.update(package.sha256 for package in repository.chunks.all(fresh))
    layout = repository.layout
    for directory in _below(layout.pool):
        if directory.name not in packages:
            yield directory
    for path in matching(layout.known_keys, "[!.]*"):
        if path.stem not in keys:
            yield path
    for path in _below(layout.readings):
        if path.stem not in packages:
            yield path
    for path in _below(layout.chunks):
        if path.name not in digests:
            yield path
    for path in _below(layout.all_rendered):
        if path.name.partition("-")[0] not in digests:
            yield path


def _below(top: Path) -> Iterator[Path]:
    for directory in matching(top, "*"):
        if directory.is_dir() and not directory.is_symlink():
            yield from matching(directory, "*")
        else:
            yield directory


def temporary(layout: Layout) -> Iterator[Path]:
    """Files that were being written when their process was killed; the lock is held."""
    for directory in layout.shared:
        yield from (path for path in directory.glob(".*") if _TEMPORARY.fullmatch(path.name))


def without_document(repository: Repository) -> Iterator[Path]:
    """Trees that were, or were to be, of a generation."""
    known = set(map(str, repository.documents.sequences()))
    for path in matching(repository.layout.trees, "*"):
        if path.name not in known and path.name.isascii() and path.name.isdecimal():
            yield path


def not_published(repository: Repository, channel: str) -> Iterator[Path]:
    """Trees that were published in a channel, and that no client reads any more: all but the present one
    and the one before."""
    documents, place = repository.documents, repository.layout.published(channel, 0).parent
    kept = {str(entry.sequence) for entry in documents.log(channel)[-2:]}
    kept.add(str(documents.head(channel)))
    if place.is_dir():
        yield from (path for path in place.iterdir() if path.name not in kept)


def sweep(repository: Repository) -> None:
    """Remove what no generation needs; the lock is held. WrongState: what they need can't be read."""
    discard(temporary(repository.layout))
    discard(tuple(needless(repository, repository.documents.all())))


def discard(paths: Iterable[Path]) -> None:
    """Remove them, and directories of a prefix that are empty then."""
    for path in paths:
        remove(path)
        if len(path.parent.name) == 2:
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def files_below(top: Path) -> Iterator[str]:
    """Regular files, by their paths below it."""
    for directory, _, names in os.walk(top):
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink():
                yield str(path.relative_to(top))
