"""A state of a repository's metadata, kept beside it by hard links while it goes on; packages stay where
they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from host.files import file_error
from inventory.errors import NotFound, WrongState
from repositories.needless import files_below
from repositories.repository import Repository

_TRIES = 5


@dataclass(frozen=True, slots=True)
class KeptTree:
    """A tree of a generation, its own or a channel's. By their paths in it: ``entries``: the files of
    its summary; ``passing``: indexes under names that the next one's have, too. All others are indexes
    under the names of their content."""

    path: str
    sequence: int
    entries: frozenset[str]
    passing: frozenset[str]


@dataclass(slots=True)
class RepositorySnapshot:
    """``top``: laid out as the repository's directory. ``heads``: by channel, the generation that its
    pointer leads to."""

    top: Path
    heads: dict[str, int]
    trees: tuple[KeptTree, ...]

    def indexes(self) -> Iterator[str]:
        """Metadata that are read by those alone who have read an entry."""
        for tree in self.trees:
            for name in files_below(self.top / tree.path):
                if name not in tree.entries:
                    yield f"{tree.path}/{name}"

    def entries(self) -> Iterator[str]:
        """What names the indexes, signed or not; and the ways from a tree to the packages."""
        for tree in self.trees:
            yield from (f"{tree.path}/{name}" for name in sorted(tree.entries))
            yield f"{tree.path}/pool"

    def lists(self) -> Iterator[str]:
        """Keys, mirror lists, and pages for people."""
        for pattern in ("key.*", "channels/*.mirrors", "pages/*", "index.html"):
            yield from (str(path.relative_to(self.top)) for path in self.top.glob(pattern))

    def pointers(self) -> Iterator[str]:
        """The channels' links, and those that lead to them."""
        for path in (*self.top.glob("channels/*"), *self.top.glob("dists/*")):
            if path.is_symlink():
                yield str(path.relative_to(self.top))

    def forget_collected(self, repository: Repository) -> None:
        """Leave out what was collected there since: its packages may be gone. WrongState: a channel's
        own was."""
        there = set(repository.documents.sequences())
        for channel, sequence in self.heads.items():
            if sequence not in there:
                raise _moved(repository, channel)
        for tree in self.trees:
            if tree.sequence not in there:
                shutil.rmtree(self.top / tree.path)
        self.trees = tuple(tree for tree in self.trees if tree.sequence in there)


def take_snapshot(repository: Repository, top: Path) -> RepositorySnapshot:
    """``top``: a directory to make, on the repository's file system. WrongState: channels move faster
    than this looks."""
    for _ in range(_TRIES):
        with suppress(_Vanished):
            return _Taking(repository, top).snapshot()
        shutil.rmtree(top, ignore_errors=True)
    raise _moved(repository, "")


class _Vanished(Exception):
    """Something went while it was looked at."""


class _Taking:
    def __init__(self, repository: Repository, top: Path) -> None:
        self._repository, self._layout, self._top = repository, repository.layout, top

    def snapshot(self) -> RepositorySnapshot:
        try:
            for name in ("channels", "published", "generations"):
                (self._top / name).mkdir(parents=True)
            heads = self._pointers()
            # What a list names is a generation by now.
            trees = [*self._generations(heads)]
            own = {tree.sequence: tree for tree in trees}
            for channel, sequence in heads.items():
                published = self._layout.published(channel, sequence)
                path = str(published.relative_to(self._layout.top))
                trees.append(self._keep(replace(own[sequence], path=path)))
        except OSError as error:
            raise file_error(error, self._top, "make a snapshot in") from error
        return RepositorySnapshot(self._top, heads, tuple(trees))

    def _pointers(self) -> dict[str, int]:
        heads = {}
        for channel in self._repository.all_channels():
            sequence = self._repository.documents.head(channel)
            if not sequence:
                continue
            heads[channel] = sequence
            links = {f"channels/{channel}": f"../published/{channel}/{sequence}"}
            links |= self._repository.format.links(channel)
            for name, leads in links.items():
                if (self._layout.top / name).is_symlink():
                    (self._top / name).parent.mkdir(exist_ok=True)
                    (self._top / name).symlink_to(leads)
            self._link(self._layout.mirrors(channel))
        pages = self._layout.pages.glob("*.html")
        for path in (*self._layout.keys, *pages, self._layout.index_page):
            self._link(path)
        return heads

    def _generations(self, heads: dict[str, int]) -> Iterator[KeptTree]:
        documents, fmt = self._repository.documents, self._repository.format
        for sequence in documents.sequences():
            try:
                generation = documents.read(sequence)
                release = generation.release(self._repository.name)
                lasting = {fmt.lasting(release, index) for index in generation.indexes}
                passing = {n for index in generation.indexes for n in fmt.passing(release, index)}
                names = frozenset(files_below(self._layout.tree(sequence)))
                entries = names - lasting - passing
                tree = KeptTree(f"generations/{sequence}", sequence, entries, frozenset(passing))
                yield self._keep(tree)
            except (FileNotFoundError, NotFound, _Vanished):
                if sequence in heads.values():
                    raise _Vanished from None
                shutil.rmtree(self._top / "generations" / str(sequence), ignore_errors=True)

    def _keep(self, tree: KeptTree) -> KeptTree:
        own, kept = self._layout.top / tree.path, self._top / tree.path
        try:
            kept.mkdir(parents=True)
            for name in files_below(own):
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(own / name, kept / name, follow_symlinks=False)
            (kept / "pool").symlink_to((own / "pool").readlink())
        except FileNotFoundError as error:
            raise _Vanished from error
        if any(not (kept / name).exists() for name in tree.entries):
            raise _Vanished
        return tree

    def _link(self, file: Path) -> None:
        kept = self._top / file.relative_to(self._layout.top)
        kept.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            os.link(file, kept, follow_symlinks=False)


def _moved(repository: Repository, channel: str) -> WrongState:
    what = f"channel {channel}" if channel else "channels"
    return WrongState(
        f"{repository.name}: its {what} moved on meanwhile, and what they had is gone",
        remedy="run it again",
    )
