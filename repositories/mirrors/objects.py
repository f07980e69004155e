"""A repository as plain files without links, as an object store has them: what any web server serves, or
any tool uploads.

For deb the directory is the base URL: dists/CHANNEL/ and pool/. For rpm each channel has one, as the
repository itself has: channels/CHANNEL/ with repodata/ and pool/. Each holds the channel's present
state, and what those still read who read the last ones a moment ago."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from host.files import file_error, make_directory, remove, same_place, sync
from host.leases import FileLeases
from host.processes import described
from inventory.errors import NotFound, NotOurs, UsageError
from repositories.mirrors.snapshot import KeptTree, RepositorySnapshot, take_snapshot
from repositories.repository import Repository

_MARK = ".repository-objects"
_DETACHED = (".asc", ".gpg")


@dataclass(frozen=True, slots=True)
class LaidOut:
    """``files``: how many there are; ``written``: how many of them are new, or other ones than before;
    ``removed``: how many were there, and are no longer needed."""

    files: int
    written: int
    removed: int


def lay_out_objects(repository: Repository, target: Path) -> LaidOut:
    """Bring ``target`` to the present state: hard links where that is on the repository's file system,
    else copies; what hasn't changed stays. What names others comes after them, and what is no longer
    named goes last: so whoever reads indexes by the names of their content, as apt and dnf do, finds the
    old state or the new one. NotOurs: there is something else in ``target``. Busy, WrongState,
    NoSpace."""
    if not repository.exists:
        raise NotFound(f"there is nothing in repository {repository.name} yet")
    layout = repository.layout
    target = target.absolute()
    if any(same_place(layout.top, p) for p in (target, *target.parents)) or any(
        same_place(target, p) for p in layout.top.parents
    ):
        raise UsageError(
            f"{target} and the repository {layout.top} are within each other",
            remedy="lay it out in a directory of its own",
        )
    with (
        FileLeases(layout.syncs).hold((f"the layout in {target}",), described(os.getpid())),
        repository.staging() as staging,
    ):
        snapshot = take_snapshot(repository, staging.directory / "objects")
        steps = _steps(repository, snapshot)
        try:
            _check(target, repository)
            written = sum(_put(step, target) for step in steps)
            wanted = {_MARK, *(name for step in steps for name in step)}
            removed = _remove_others(target, wanted)
        except OSError as error:
            raise file_error(error, target, "lay out a repository in") from error
    return LaidOut(len(wanted) - 1, written, removed)


def _steps(repository: Repository, snapshot: RepositorySnapshot) -> tuple[dict[str, Path], ...]:
    """By its place in the target, each file; what is in one step needs what is in those before.
    Signatures come before what they sign: a channel's new one is good for its last summary, too."""
    pool: dict[str, Path] = {}
    lasting: dict[str, Path] = {}
    passing: dict[str, Path] = {}
    signatures: dict[str, Path] = {}
    summaries: dict[str, Path] = {}
    for channel, tree in _channels(repository, snapshot):
        base = "" if repository.settings.format == "deb" else f"channels/{channel}/"
        for place in _packages(repository, channel, tree.sequence):
            pool[base + place] = repository.layout.top / place
        for name, path in _files(snapshot.top / tree.path):
            if name in tree.entries:
                kind = signatures if name.endswith(_DETACHED) else summaries
            else:
                kind = passing if name in tree.passing else lasting
            kind[base + name] = path
    keys = {path.name: path for path in snapshot.top.glob("key.*")}
    return pool, lasting | keys, passing | signatures, summaries


def _channels(repository: Repository, snapshot: RepositorySnapshot) -> Iterator[tuple[str, KeptTree]]:
    trees: Mapping[str, KeptTree] = {tree.path: tree for tree in snapshot.trees}
    for channel, sequence in snapshot.heads.items():
        path = repository.layout.published(channel, sequence).relative_to(repository.layout.top)
        yield channel, trees[str(path)]


def _packages(repository: Repository, channel: str, head: int) -> Iterator[str]:
    """Of the present generation, and of those whose indexes are still served."""
    settings, documents = repository.settings, repository.documents
    before = (entry.before for entry in documents.log(channel) if entry.sequence == head)
    earlier = documents.superseded(channel, settings.grace, datetime.now(UTC))
    for sequence in dict.fromkeys((head, *before, *earlier)):
        with suppress(NotFound):  # a superseded one that is collected
            for package in repository.packages(documents.read(sequence)):
                yield package.place


def _files(top: Path) -> Iterator[tuple[str, Path]]:
    for directory, _, names in os.walk(top):
        for path in (Path(directory, name) for name in names):
            if not path.is_symlink():
                yield str(path.relative_to(top)), path


def _check(target: Path, repository: Repository) -> None:
    """It is empty, not there yet, or has our mark."""
    make_directory(target, mode=0o755)
    mark, ours = target / _MARK, f"{repository.layout.top}\n"
    if not mark.exists():
        found = sorted(path.name for path in target.iterdir())
        if found:
            raise NotOurs(
                f"{target} is no layout of {repository.name}: it has {found[0]}",
                remedy="name a directory that is empty, or isn't there yet",
            )
        mark.write_text(ours)
    elif mark.read_text(errors="replace") != ours:
        raise NotOurs(
            f"{target} is laid out from {mark.read_text(errors='replace').strip()}",
            remedy=f"give {repository.name} another directory",
        )


def _put(files: Mapping[str, Path], target: Path) -> int:
    """Put what isn't there yet, durably. Returns how many."""
    written, directories = 0, set()
    for name, source in files.items():
        path = target / name
        if _is_there(path, source):
            continue
        parents = [p for p in path.parents if p.is_relative_to(target)]
        for directory in reversed(parents):  # all of them for all to read
            make_directory(directory, mode=0o755)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.unlink(missing_ok=True)
        try:
            os.link(source, fresh)
        except OSError:  # another file system, or one without hard links
            shutil.copy2(source, fresh)
            fresh.chmod(0o644)
            sync(fresh)
        fresh.replace(path)
        directories.update(parents)
        written += 1
    for directory in directories:
        sync(directory)
    return written


def _is_there(path: Path, source: Path) -> bool:
    try:
        found, wanted = path.lstat(), source.stat()
    except FileNotFoundError:
        return False
    if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
        return True
    same = found.st_size == wanted.st_size and found.st_mtime_ns // 1000 == wanted.st_mtime_ns // 1000
    return same and (path.parts[-4] == "pool" or filecmp.cmp(path, source, shallow=False))


def _remove_others(target: Path, wanted: Iterable[str]) -> int:
    """What nothing names any more, and directories that are empty then."""
    kept, removed = set(wanted), 0
    for directory, _, names in os.walk(target, topdown=False):
        for path in (Path(directory, name) for name in names):
            if str(path.relative_to(target)) not in kept:
                removed += remove(path)
        if Path(directory) != target:
            with suppress(OSError):
                Path(directory).rmdir()
    return removed
