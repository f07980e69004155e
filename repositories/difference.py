"""What differs between two generations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from inventory.errors import FarmhandError
from repositories.chunks import ChunkRef
from repositories.format import newest_first
from repositories.generation import Generation
from repositories.package import Change, Package
from repositories.repository import Repository

_MOST = 20
"""Entries of a changelog that are told of one package."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one package, by name, architecture and component. ``before``, ``after``: its versions; None:
    there was, or is, none. ``changes``: its changelog's entries between, newest first."""

    before: Package | None
    after: Package | None
    changes: tuple[Change, ...] = ()

    @property
    def what(self) -> str:
        if self.before is None or self.after is None:
            return "added" if self.before is None else "removed"
        return "changed"

    @property
    def one(self) -> Package:
        """Whichever there is, the later one first."""
        one = self.after or self.before
        assert one is not None
        return one

    def __str__(self) -> str:
        versions = " -> ".join(p.version for p in (self.before, self.after) if p)
        return f"{self.one.name} {versions} {self.one.architecture}"


def differences(
    repository: Repository, one: Generation, other: Generation, *, changelogs: bool = False
) -> tuple[Difference, ...]:
    """From ``one`` to ``other``, by name. Only chunks that they don't share are read."""
    before, after = _only(repository, one, other), _only(repository, other, one)
    same = before & after
    gone, come = _by_kind(repository, before - same), _by_kind(repository, after - same)
    found: list[Difference] = []
    for kind in sorted(gone.keys() | come.keys()):
        was, now = gone.get(kind, []), come.get(kind, [])
        # The newest of either belong together; what is left over came or went.
        for old, new in zip(was, now, strict=False):
            changes = tuple(_between(repository, old, new)) if changelogs else ()
            found.append(Difference(old, new, changes))
        found += (Difference(old, None) for old in was[len(now) :])
        found += (Difference(None, new) for new in now[len(was) :])
    return tuple(found)


def _only(repository: Repository, one: Generation, other: Generation) -> set[Package]:
    theirs = {chunk.digest for chunk in other.chunks}
    chunks: list[ChunkRef] = [chunk for chunk in one.chunks if chunk.digest not in theirs]
    return set(repository.chunks.all(chunks))


def _by_kind(
    repository: Repository, packages: set[Package]
) -> dict[tuple[str, str, str], list[Package]]:
    """The newest of each first."""
    found: dict[tuple[str, str, str], list[Package]] = {}
    for package in newest_first(repository.format, packages):
        found.setdefault((package.name, package.architecture, package.component), []).append(package)
    return found


def _between(repository: Repository, old: Package, new: Package) -> Iterator[Change]:
    """The newer one's entries above the older one's version. None where its changelog can't be read, or
    where the older one follows."""
    compare = repository.format.compare
    if compare(new.version, old.version) <= 0:
        return
    try:
        entries = repository.format.changelog(repository.layout.file(new))
    except (FarmhandError, OSError):
        return
    for entry in entries[:_MOST]:
        if compare(*map(_without_epoch, (entry.version, old.version))) <= 0:
            return
        yield entry


def _without_epoch(version: str) -> str:
    """rpm's changelogs have none."""
    return version.partition(":")[2] or version
