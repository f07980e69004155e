"""Files that no generation needs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from host.files import remove
from repositories.generation import Generation
from repositories.repository import Repository


def needless(repository: Repository, stay: Iterable[Generation]) -> Iterator[Path]:
    """Files and directories that no generation needs."""
    digests: set[str] = set()
    packages: set[str] = set()
    for generation in stay:
        fresh = [chunk for chunk in generation.chunks if chunk.digest not in digests]
        digests.update(chunk.digest for chunk in fresh)
        packages.update(package.sha256 for package in repository.chunks.all(fresh))
    layout = repository.layout
    for directory in _below(layout.pool):
        if directory.name not in packages:
            yield directory
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
    for directory in sorted(top.iterdir()):
        yield from sorted(directory.iterdir())


def sweep(repository: Repository) -> None:
    """Remove what no generation needs; the lock is held."""
    discard(tuple(needless(repository, repository.documents.all())))


def discard(paths: Iterable[Path]) -> None:
    """Remove them, and directories of a prefix that are empty then."""
    for path in paths:
        remove(path)
        with contextlib.suppress(OSError):
            path.parent.rmdir()


def files_below(top: Path) -> Iterator[str]:
    """Regular files, by their paths below it."""
    for directory, _, names in os.walk(top):
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink():
                yield str(path.relative_to(top))
