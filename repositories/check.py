"""repo-fsck: every hash, every signature, every reference of a repository."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from host.documents import Malformed, json_object, read_file
from host.file_lock import FileLock
from host.run import Runner
from inventory.errors import Call, FarmhandError, NotFound, Remedy, Unfit
from repositories.format import IndexFile, Sum
from repositories.generation import Generation
from repositories.leases import leases
from repositories.needless import (
    files_below,
    needless,
    not_published,
    temporary,
    without_document,
)
from repositories.package import Package
from repositories.render import sum_of
from repositories.repository import Repository
from repositories.signing.proof import ProvenText, prove_clear, prove_detached
from repositories.staging import dead

_THREADS = 2
_LISTED = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_PLACED = re.compile(rb"pool/[0-9a-f]{2}/([0-9a-f]{64})/")
_NEXT = "the next change of the repository puts it right"


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
    """Read all of it. Changes nothing; who publishes waits only while the channels are looked at. What
    is collected meanwhile isn't told of."""
    checking = _RepositoryCheck(repository, runner, working)
    findings = tuple(checking.findings())
    return Report(len(checking.whole), len(checking.packages), checking.bytes, findings)


class _RepositoryCheck:
    def __init__(self, repository: Repository, runner: Runner, working: Callable[[str], None]) -> None:
        self._repository = repository
        self._layout = repository.layout
        self._runner = runner
        self._working = working
        self._indexes: dict[tuple[int, int], tuple[IndexFile, str]] = {}
        self.whole: dict[int, Generation] = {}
        self.packages: dict[str, Package] = {}
        self.bytes = 0

    def findings(self) -> Iterator[Finding]:
        if not self._repository.exists:
            return
        documents = self._repository.documents
        found = {number: tuple(self._generation(number)) for number in documents.sequences()}
        pool = dict(self._pool())
        with FileLock(self._layout.lock).hold(shared=True):
            numbers = documents.sequences()
            yield from self._description()
            for number in numbers:
                yield from found[number] if number in found else self._generation(number)
            needed = {package.sha256 for one in self.whole.values() for package in self._listed(one)}
            yield from (finding for sha256, finding in pool.items() if sha256 in needed)
            for channel in self._repository.all_channels():
                try:
                    yield from self._channel(channel)
                except FarmhandError as error:
                    yield Finding(f"channels/{channel}", error.message, error.remedy)
            yield from self._users()
            stray = [*without_document(self._repository), *temporary(self._layout)]
            if all(number in self.whole for number in numbers):
                stray += needless(self._repository, [self.whole[number] for number in numbers])
            gc = Call("repo-gc", repo=self._repository.name)
            for path in stray:
                yield Finding(self._name(path), "no generation needs it", gc)
            for path in dead(self._layout.staging):
                yield Finding(self._name(path), "a command left it that was killed", gc)

    def _users(self) -> Iterator[Finding]:
        """Of generations: what else could be collected nobody could tell."""
        for what in (partial(leases, self._layout), self._repository.flows.all):
            try:
                for _ in what():
                    pass
            except FarmhandError as error:
                yield Finding(self._name(self._layout.private), error.message, error.remedy)

    def _description(self) -> Iterator[Finding]:
        where = self._layout.description
        try:
            json_object(read_file(where))
        except FileNotFoundError:
            if self._repository.documents.sequences():  # else it was never made
                yield Finding(self._name(where), "it is gone", _NEXT)
        except (OSError, Malformed) as error:
            why = error.strerror if isinstance(error, OSError) else error
            yield Finding(self._name(where), f"it can't be read: {why}", "remove it: it is made anew")

    # -- generations ---------------------------------------------------------------------------------

    def _generation(self, number: int) -> Iterator[Finding]:
        self._working(f"generation {number}")
        try:
            generation = self._repository.documents.read(number)
            packages = self._listed(generation)
        except NotFound:  # collected meanwhile
            return
        except FarmhandError as error:
            yield Finding(f"generation {number}", error.message, error.remedy)
            return
        if generation.sequence != number:
            where = self._layout.document(number)
            yield Finding(self._name(where), f"it is generation {generation.sequence}'s", _BACKUP)
            return
        self.whole[number] = generation
        yield from self._tree(generation, packages)

    def _listed(self, generation: Generation) -> tuple[Package, ...]:
        found = tuple(self._repository.chunks.all(generation.chunks))
        self.packages |= {package.sha256: package for package in found}
        return found

    def _tree(self, generation: Generation, packages: tuple[Package, ...]) -> Iterator[Finding]:
        fmt, tree = self._repository.format, self._layout.tree(generation.sequence)
        remedy = self._again(generation)
        if not tree.is_dir():
            yield Finding(self._name(tree), "it is gone", remedy)
            return
        release = generation.release(self._repository.name)
        known: set[str] = set()
        for index in generation.indexes:
            listed = {
                package.sha256
                for package in packages
                if index.section in fmt.sections(package, generation.architectures)
            }
            for name in (fmt.lasting(release, index), *fmt.passing(release, index)):
                known.add(name)
                if wrong := self._index(tree / name, index, listed):
                    yield Finding(self._name(tree / name), wrong, remedy)
        summary = fmt.summary(release, generation.indexes)
        for name, data in fmt.entries(release, summary, None).items():
            known.add(name)
            if wrong := _other(tree / name, data):
                yield Finding(self._name(tree / name), wrong, remedy)
        if not _leads(tree / "pool", "../../pool"):
            yield Finding(self._name(tree / "pool"), "it does not lead to the packages", remedy)
        if generation.keys:
            names = fmt.signatures(release)
            known.update((*names, self._layout.key(generation.sequence).name))
            yield from self._signatures(generation, tree, names, summary)
        for name in sorted(set(files_below(tree)) - known):
            yield Finding(self._name(tree / name), "it is none of the generation's files", "remove it")

    def _signatures(
        self, generation: Generation, tree: Path, names: tuple[str, ...], summary: bytes
    ) -> Iterator[Finding]:
        remedy = self._again(generation)
        try:
            keys = self._repository.signing_keys(generation)
        except FarmhandError as error:
            yield Finding(f"generation {generation.sequence}", error.message, error.remedy)
            return
        assert keys
        key = self._layout.key(generation.sequence)
        if wrong := _other(key, keys):
            yield Finding(self._name(key), wrong, remedy)
        for name in names:
            path = tree / name
            try:
                data = path.read_bytes()
                if name.endswith((".asc", ".gpg")):
                    proof = prove_detached(summary, data, keys, self._runner)
                else:
                    proof = _proven(data, summary, keys, self._runner)
            except Unfit as error:
                yield Finding(self._name(path), f"its signature is not right: {error.message}", remedy)
            except OSError as error:
                yield Finding(self._name(path), f"it can't be read: {error.strerror}", remedy)
            else:
                if not proof.signers and self._is_head(generation):
                    what = "it is signed by keys whose time is over: clients refuse it"
                    yield Finding(self._name(path), what, remedy)

    def _is_head(self, generation: Generation) -> bool:
        try:
            return self._repository.documents.head(generation.channel) == generation.sequence
        except FarmhandError:  # it is told of where the channels are
            return False

    # -- packages ------------------------------------------------------------------------------------

    def _pool(self) -> Iterator[tuple[str, Finding]]:
        """Each package once, whoever lists it; what is wrong, by its hash."""
        done = 0
        with ThreadPoolExecutor(_THREADS) as threads:
            for package, wrong in threads.map(self._package, tuple(self.packages.values())):
                done += 1
                if not done % 200:
                    self._working(f"packages; {done} of {len(self.packages)}")
                if wrong:
                    remedy = "add the same file again: it is put back; or copy it there from a backup"
                    yield package.sha256, Finding(package.place, wrong, remedy)

    def _package(self, package: Package) -> tuple[Package, str]:
        try:
            found = sum_of(self._layout.file(package))
        except OSError as error:
            return package, f"{package} can't be read: {error.strerror}"
        self.bytes += found.size
        same = found == Sum(package.sha256, package.size)
        return package, "" if same else f"{package} is damaged: its sha256 is {found.sha256}"

    # -- channels ------------------------------------------------------------------------------------

    def _channel(self, channel: str) -> Iterator[Finding]:
        repository, layout = self._repository, self._layout
        documents = repository.documents
        pointer, log = layout.pointer(channel), documents.log(channel)
        head = documents.head(channel)
        if head != (log[-1].sequence if log else 0):
            what = f"its log ends with another generation than {head}" if head else "it is gone"
            yield Finding(self._name(pointer), what, _NEXT)
        for path in not_published(repository, channel):
            yield Finding(self._name(path), "no client reads it any more", _NEXT)
        if not head:
            return
        if head not in self.whole:
            documents.read(head)  # says why; it is told of with the generation, if it is there
            return
        generation, place = self.whole[head], layout.published(channel, head)
        remedy = self._again(generation)
        if not place.is_dir():
            yield Finding(self._name(pointer), f"{self._name(place)} is gone", remedy)
            return
        own = layout.tree(head)
        for name in sorted(files_below(own)):
            if wrong := self._published(own / name, place / name):
                yield Finding(self._name(place / name), wrong, remedy)
        if not _leads(place / "pool", "../../../pool"):
            yield Finding(self._name(place / "pool"), "it does not lead to the packages", remedy)
        yield from self._followers(channel, generation)

    def _followers(self, channel: str, generation: Generation) -> Iterator[Finding]:
        """What follows from the pointer."""
        layout, url = self._layout, self._repository.settings.url
        mirrors = layout.mirrors(channel)
        if url:
            if wrong := _other(mirrors, f"{url}/generations/{generation.sequence}/\n".encode()):
                yield Finding(self._name(mirrors), wrong, _NEXT)
        elif mirrors.exists():
            yield Finding(self._name(mirrors), "nobody said the URL that it should have", _NEXT)
        for link, leads in self._repository.format.links(channel).items():
            if not _leads(layout.top / link, leads):
                yield Finding(link, f"it does not lead to {leads}", _NEXT)
        if generation.keys:
            sets = [path.read_bytes() for path in layout.known_keys.glob("*.gpg")]
            armoured, keyring = layout.keys
            if not (keyring.exists() and armoured.exists() and keyring.read_bytes() in sets):
                what = "it has not the keys that channels are signed by"
                yield Finding(keyring.name, what, self._again(generation))

    def _published(self, own: Path, path: Path) -> str:
        try:
            if path.samefile(own):
                return ""
            data, its = path.read_bytes(), own.read_bytes()
        except OSError as error:
            return f"it can't be read: {error.strerror}"
        return "" if data == its else "it is another file than its generation's"

    # -- files ---------------------------------------------------------------------------------------

    def _index(self, path: Path, index: IndexFile, listed: set[str]) -> str:
        """What is wrong with an index file; "": nothing. A file of several names is read once."""
        try:
            found = path.stat()
            known, wrong = self._indexes.get((found.st_dev, found.st_ino), (None, ""))
            if known != index:
                wrong = _index(path.read_bytes(), index, listed)
                self._indexes[found.st_dev, found.st_ino] = index, wrong
        except OSError as error:
            return f"it can't be read: {error.strerror}"
        return wrong

    def _again(self, generation: Generation) -> Remedy:
        call = Call(
            "repo-rollback",
            repo=self._repository.name,
            channel=generation.channel,
            to=str(generation.sequence),
        )
        return "publish its packages anew: ", call

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._layout.top))


_BACKUP = "put it back from a backup or a mirror"


def _proven(data: bytes, summary: bytes, keys: bytes, runner: Runner) -> ProvenText:
    proof = prove_clear(data, keys, runner)
    if proof.text.strip() != summary.strip():
        raise Unfit("it is of another text than the one beside it")
    return proof


def _index(data: bytes, index: IndexFile, listed: set[str]) -> str:
    if Sum(hashlib.sha256(data).hexdigest(), len(data)) != index.packed:
        return "it is damaged: its sha256 is another"
    try:
        plain = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        return f"it can't be unpacked: {error}"
    if Sum(hashlib.sha256(plain).hexdigest(), len(plain)) != index.plain:
        return "what is in it has another sha256"
    if lacking := listed - {match.decode() for match in _LISTED.findall(plain)}:
        return f"{len(lacking)} packages of the generation are not in it"
    if more := {match.decode() for match in _PLACED.findall(plain)} - listed:
        return f"{len(more)} packages that the generation does not have are in it"
    return ""


def _other(path: Path, data: bytes) -> str:
    """What is wrong with a file that should have these bytes; "": nothing."""
    try:
        return "" if path.read_bytes() == data else "it is damaged: it should have another text"
    except OSError as error:
        return f"it can't be read: {error.strerror}"


def _leads(path: Path, to: str) -> bool:
    try:
        return str(path.readlink()) == to
    except OSError:
        return False
