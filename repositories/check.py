"""repo-fsck: every hash, every signature, every reference of a repository."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from host.run import Runner
from inventory.errors import Call, FarmhandError, Remedy, Unfit
from repositories.format import IndexFile, Sum
from repositories.generation import Generation
from repositories.needless import needless
from repositories.package import Package
from repositories.proof import prove_clear, prove_detached
from repositories.render import sum_of
from repositories.repository import Repository

_THREADS = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong. ``where``: below the repository's directory."""

    where: str
    what: str
    remedy: Remedy = ""


@dataclass(frozen=True, slots=True)
class Report:
    """``packages``, ``bytes``: what was read of the pool."""

    generations: int
    packages: int
    bytes: int
    findings: tuple[Finding, ...]


def check(repository: Repository, runner: Runner, working: Callable[[str], None]) -> Report:
    """Read all of it. Changes nothing, and takes no lock."""
    checking = _Check(repository, runner, working)
    findings = tuple(checking.findings())
    return Report(checking.generations, len(checking.packages), checking.bytes, findings)


class _Check:
    def __init__(self, repository: Repository, runner: Runner, working: Callable[[str], None]) -> None:
        self._repository = repository
        self._layout = repository.layout
        self._runner = runner
        self._working = working
        self._known: set[str] = set()
        self.packages: dict[str, Package] = {}
        self.generations = self.bytes = 0

    def findings(self) -> Iterator[Finding]:
        if not self._repository.exists:
            return
        whole: list[Generation] = []
        for sequence in self._repository.documents.sequences():
            self._working(f"generation {sequence}")
            try:
                generation = self._repository.documents.read(sequence)
                for chunk in generation.chunks:
                    if chunk.digest not in self._known:
                        packages = self._repository.chunks.packages(chunk)
                        self.packages |= {package.sha256: package for package in packages}
                        self._known.add(chunk.digest)
            except FarmhandError as error:
                yield Finding(f"generation {sequence}", error.message, error.remedy)
                continue
            self.generations += 1
            whole.append(generation)
            yield from self._tree(generation)
        yield from self._pool()
        for channel in self._repository.all_channels():
            yield from self._channel(channel)
        if len(whole) == len(self._repository.documents.sequences()):
            for path in needless(self._repository, whole):
                yield Finding(self._name(path), "no generation needs it", Call("repo-gc"))

    def _pool(self) -> Iterator[Finding]:
        """Each package once, whoever lists it."""
        done = 0
        with ThreadPoolExecutor(_THREADS) as threads:
            for package, wrong in threads.map(self._package, self.packages.values()):
                done += 1
                if not done % 200:
                    self._working(f"packages; {done} of {len(self.packages)}")
                if wrong:
                    yield Finding(package.place, wrong, "put it back from a backup or a mirror")

    def _package(self, package: Package) -> tuple[Package, str]:
        try:
            found = sum_of(self._layout.file(package))
        except OSError as error:
            return package, f"{package} can't be read: {error.strerror}"
        self.bytes += found.size
        same = found == Sum(package.sha256, package.size)
        return package, "" if same else f"{package} is damaged: its sha256 is {found.sha256}"

    def _tree(self, generation: Generation) -> Iterator[Finding]:
        fmt, tree = self._repository.format, self._layout.tree(generation.sequence)
        release = generation.release(self._repository.name, self._repository.settings.description)
        for index in generation.indexes:
            for name in (fmt.lasting(release, index), *fmt.passing(release, index)):
                if wrong := _index(tree / name, index):
                    yield Finding(self._name(tree / name), wrong, _AGAIN)
        if not (tree / "pool").is_dir():
            yield Finding(self._name(tree / "pool"), "it leads nowhere", _AGAIN)
        yield from self._signatures(tree, fmt.signatures(release))

    def _signatures(self, tree: Path, names: tuple[str, ...]) -> Iterator[Finding]:
        keys = self._repository.public_keys()
        for name in names:
            path = tree / name
            stem, _, ending = name.rpartition(".")
            try:
                if not path.exists():
                    continue
                if not keys:
                    raise Unfit("nobody knows its key any more")
                if ending in ("asc", "gpg"):
                    prove_detached((tree / stem).read_bytes(), path.read_bytes(), keys, self._runner)
                else:
                    prove_clear(path.read_bytes(), keys, self._runner)
            except FarmhandError as error:
                yield Finding(self._name(path), f"its signature is not right: {error.message}", _AGAIN)
            except OSError as error:
                yield Finding(self._name(path), f"it can't be read: {error.strerror}", _AGAIN)

    def _channel(self, channel: str) -> Iterator[Finding]:
        head = self._repository.documents.head(channel)
        if not head:
            return
        place, pointer = self._layout.published(channel, head), self._layout.pointer(channel)
        if not place.is_dir():
            yield Finding(self._name(pointer), f"it leads to {self._name(place)}, which is not there")
            return
        try:
            generation = self._repository.documents.read(head)
        except FarmhandError as error:
            yield Finding(self._name(pointer), f"its generation: {error.message}", error.remedy)
            return
        release = generation.release(self._repository.name, self._repository.settings.description)
        for index in generation.indexes:
            name = self._repository.format.lasting(release, index)
            if wrong := _index(place / name, index):
                yield Finding(self._name(place / name), wrong, _AGAIN)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._layout.top))


_AGAIN = "publish the channel again: roll it back to the generation whose packages it has"


def _index(path: Path, index: IndexFile) -> str:
    """What is wrong with an index file; "": nothing."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"it can't be read: {error.strerror}"
    if Sum(hashlib.sha256(data).hexdigest(), len(data)) != index.packed:
        return "it is damaged: its sha256 is another"
    try:
        plain = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        return f"it can't be unpacked: {error}"
    if Sum(hashlib.sha256(plain).hexdigest(), len(plain)) != index.plain:
        return "what is in it has another sha256"
    return ""
