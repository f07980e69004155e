"""repo-fsck: every hash, every signature, every reference of a repository."""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from host.documents import Malformed, json_object, read_file
from host.file_lock import FileLock
from host.run import Runner
from inventory.errors import Call, FarmhandError, NotFound, Remedy, Unfit
from repositories.chunks import ChunkRef
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
_RUN = 64  # packages, for one of the threads
_MOST = 2**28  # bytes of members that are kept in memory
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
        self._chunks: dict[str, tuple[Package, ...]] = {}
        self._members = _KnownMembers()
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
            there = [self.whole[number] for number in numbers if number in self.whole]
            digests = {chunk.digest for one in there for chunk in one.chunks}
            needed = {package.sha256 for digest in digests for package in self._chunks[digest]}
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
            for chunk in generation.chunks:
                self._read(chunk)
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
        yield from self._tree(generation)

    def _read(self, chunk: ChunkRef) -> None:
        """Each once, whichever generations share it."""
        if chunk.digest not in self._chunks:
            found = self._chunks[chunk.digest] = self._repository.chunks.packages(chunk)
            self.packages |= {package.sha256: package for package in found}

    def _listed(self, generation: Generation, chunk: ChunkRef, section: str) -> set[str]:
        """The sha256 of a chunk's packages that are in a section."""
        sections = self._repository.format.sections
        return {
            package.sha256
            for package in self._chunks[chunk.digest]
            if section in sections(package, generation.architectures)
        }

    def _tree(self, generation: Generation) -> Iterator[Finding]:
        fmt, tree = self._repository.format, self._layout.tree(generation.sequence)
        remedy = self._again(generation)
        if not tree.is_dir():
            yield Finding(self._name(tree), "it is gone", remedy)
            return
        release = generation.release(self._repository.name)
        known: set[str] = set()
        for index in generation.indexes:
            for name in (fmt.lasting(release, index), *fmt.passing(release, index)):
                known.add(name)
                if wrong := self._index(tree / name, index, generation):
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
        done, packages = 0, tuple(self.packages.values())
        runs = [packages[start : start + _RUN] for start in range(0, len(packages), _RUN)]
        with ThreadPoolExecutor(_THREADS) as threads:
            for run in threads.map(self._sums, runs):
                done += len(run)
                self._working(f"packages; {done} of {len(packages)}")
                for package, size, wrong in run:
                    self.bytes += size
                    if wrong:
                        yield package.sha256, Finding(package.place, wrong, _ADD_AGAIN)

    def _sums(self, packages: Sequence[Package]) -> list[tuple[Package, int, str]]:
        return [(package, *self._package(package)) for package in packages]

    def _package(self, package: Package) -> tuple[int, str]:
        """Bytes that were read of it, and what is wrong."""
        try:
            found = sum_of(self._layout.file(package))
        except OSError as error:
            return 0, f"{package} can't be read: {error.strerror}"
        same = found == Sum(package.sha256, package.size)
        return found.size, "" if same else f"{package} is damaged: its sha256 is {found.sha256}"

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

    def _index(self, path: Path, index: IndexFile, generation: Generation) -> str:
        """What is wrong with an index file; "": nothing. A file of several names is read once."""
        try:
            found = path.stat()
            known, wrong = self._indexes.get((found.st_dev, found.st_ino), (None, ""))
            if known != index:
                wrong = self._wrong(path.read_bytes(), index, generation)
                self._indexes[found.st_dev, found.st_ino] = index, wrong
        except OSError as error:
            return f"it can't be read: {error.strerror}"
        return wrong

    def _wrong(self, data: bytes, index: IndexFile, generation: Generation) -> str:
        frame = self._repository.format.frame(index.kind, generation.count)
        parts = [
            (chunk.digest, partial(self._listed, generation, chunk, index.section))
            for chunk in generation.chunks
        ]
        if self._members.right(data, index, frame, parts):
            return ""
        listed = {sha256 for _, its in parts for sha256 in its()}
        return _index(data, index, listed)

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


_ChunkPart = tuple[str, Callable[[], set[str]]]
"""A chunk's digest, and the sha256 of its packages that are in a section."""


class _KnownMembers:
    """Members of indexes (RFC 1952), each a chunk's, with what is in them: generations share nearly
    all, so each is unpacked and looked through once."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str], tuple[bytes, bytes]] = {}
        self._size = 0

    def right(
        self,
        data: bytes,
        index: IndexFile,
        frame: tuple[bytes, bytes],
        parts: Sequence[_ChunkPart],
    ) -> bool:
        """Whether an index is just what it should be. False: it may be so, too."""
        if Sum(hashlib.sha256(data).hexdigest(), len(data)) != index.packed:
            return False
        plain, size, at = hashlib.sha256(), 0, 0
        pieces: list[bytes | _ChunkPart] = [frame[0], *parts, frame[1]]
        for text in pieces:
            if isinstance(text, bytes):
                found = _member(data, at) if text else (b"", b"")
                if not found or found[1] != text:
                    return False
            else:
                digest, listed = text
                found = self._part((index.section, index.kind, digest), data, at, listed)
                if not found:
                    return False
            at += len(found[0])
            plain.update(found[1])
            size += len(found[1])
        return at == len(data) and Sum(plain.hexdigest(), size) == index.plain

    def _part(
        self, key: tuple[str, str, str], data: bytes, at: int, listed: Callable[[], set[str]]
    ) -> tuple[bytes, bytes] | None:
        """A chunk's member, packed and not. None: it isn't there, or has other packages."""
        found = self._known.get(key)
        if found and data.startswith(found[0], at):
            return found
        wanted = listed()
        found = _member(data, at) if wanted else (b"", b"")
        if not found or _lacking(found[1], wanted) or _more(found[1], wanted):
            return None
        if self._size > _MOST:
            self._known, self._size = {}, 0
        self._known[key] = found
        self._size += len(found[0]) + len(found[1])
        return found


def _member(data: bytes, at: int) -> tuple[bytes, bytes] | None:
    """The member that begins there, packed and not; None: there is none whole."""
    stream = zlib.decompressobj(wbits=31)
    try:
        plain = stream.decompress(memoryview(data)[at:])
    except zlib.error:
        return None
    end = len(data) - len(stream.unused_data)
    return (data[at:end], plain) if stream.eof else None


_ADD_AGAIN = "add the same file again: it is put back; or copy it there from a backup"
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
    if lacking := _lacking(plain, listed):
        return f"{len(lacking)} packages of the generation are not in it"
    if more := _more(plain, listed):
        return f"{len(more)} packages that the generation does not have are in it"
    return ""


def _lacking(plain: bytes, listed: set[str]) -> set[str]:
    return listed - {match.decode() for match in _LISTED.findall(plain)}


def _more(plain: bytes, listed: set[str]) -> set[str]:
    return {match.decode() for match in _PLACED.findall(plain)} - listed


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
