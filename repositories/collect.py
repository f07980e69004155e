"""What nobody needs any more: which generations, why the others stay, and what goes with them.

A generation stays while anything needs it: a channel points to it or did a moment ago, it is among the
last of a channel or young, somebody uses it (a lease), or somebody above pins it, such as the record of
a build that is kept. What is below them (packages, lists, caches) stays while one of them needs it."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from host.files import blocks
from repositories.change import RepositoryChange
from repositories.generation import Generation
from repositories.leases import leases
from repositories.needless import discard, files_below, needless, temporary, without_document
from repositories.repository import Repository
from repositories.staging import dead


@dataclass(frozen=True, slots=True)
class Retention:
    """``last``: how many of each channel stay. ``age``: seconds for which each one stays."""

    last: int = 10
    age: float = 30 * 86400


@dataclass(frozen=True, slots=True)
class GenerationSurvey:
    """``kept``: by number, why each stays. ``gone``: those that don't. ``bytes``: what they alone take,
    and what is left over (``orphans``: files, by their paths in the repository)."""

    kept: Mapping[int, tuple[str, ...]]
    gone: tuple[Generation, ...]
    orphans: tuple[Path, ...]
    bytes: int


def survey(
    repository: Repository,
    retention: Retention,
    now: datetime,
    pinned: Mapping[int, str],
    dropped: Collection[str] = (),
) -> GenerationSurvey:
    """Changes nothing. ``pinned``: why somebody above needs a generation, by its number. ``dropped``:
    channels that are to go."""
    if not repository.exists:
        return GenerationSurvey({}, (), (), 0)
    kept = _kept(repository, retention, now, pinned, dropped)
    generations = tuple(repository.documents.all())
    gone = tuple(one for one in generations if one.sequence not in kept)
    stay = [one for one in generations if one.sequence in kept]
    left = (
        *needless(repository, stay),
        *without_document(repository),
        *temporary(repository.layout),
        *dead(repository.layout.staging),
    )
    own = [
        repository.layout.tree(one.sequence) / file
        for one in gone
        for file in files_below(repository.layout.tree(one.sequence))
    ]
    return GenerationSurvey(kept, gone, left, _alone(own) + sum(map(_size, left)))


def collect(change: RepositoryChange, found: GenerationSurvey) -> None:
    """Remove what the survey says isn't needed; the lock is held since before it was made."""
    # 1. The generations: from here on nobody may begin to use them.
    for generation in found.gone:
        change.collect(generation)
    # 2. What only they had.
    discard(found.orphans)


def _kept(
    repository: Repository,
    retention: Retention,
    now: datetime,
    pinned: Mapping[int, str],
    dropped: Collection[str],
) -> dict[int, tuple[str, ...]]:
    why: dict[int, list[str]] = defaultdict(list)
    for channel in repository.all_channels():
        head = repository.documents.head(channel)
        if channel in dropped:
            why[head].append(f"{channel}'s clients may still read it")
            continue
        if head:
            known = channel in repository.settings.channels
            more = "" if known else ", which the farm file doesn't name"
            why[head].append(f"{channel} points to it{more}")
        numbers = dict.fromkeys(entry.sequence for entry in reversed(repository.documents.log(channel)))
        for number in tuple(numbers)[: retention.last]:
            why[number].append(f"one of {channel}'s last {retention.last}")
    for channel in repository.documents.channels():
        for number in repository.documents.superseded(channel, repository.settings.grace, now):
            why[number].append(f"{channel}'s clients may still read it")
    for generation in repository.documents.all():
        if (now - generation.made).total_seconds() < retention.age:
            why[generation.sequence].append("young")
    for lease in leases(repository.layout):
        why[lease.generation].append(f"{lease.holder} uses it")
    for number, reason in pinned.items():
        why[number].append(reason)
    have = set(repository.documents.sequences())
    return {number: tuple(reasons) for number, reasons in why.items() if number in have}


def _alone(paths: Iterable[Path]) -> int:
    """Bytes of files that have no other names than these."""
    names: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for path in paths:
        with contextlib.suppress(OSError):
            found = path.stat()
            names[found.st_dev, found.st_ino].append(path)
    own = (same[0] for same in names.values() if same[0].stat().st_nlink == len(same))
    return sum(map(blocks, own))


def _size(path: Path) -> int:
    return sum(blocks(path / file) for file in files_below(path)) if path.is_dir() else blocks(path)
