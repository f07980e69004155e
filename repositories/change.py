"""How a repository is changed.

All that changes it holds its lock, and goes in numbered steps (``RepositoryChange.commit`` and
``publish``). One of them, a rename(2), makes the difference to its readers. Before each change ``tidy``
takes away, or finishes, what a killed one left."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from host.file_lock import FileLock
from host.files import (
    file_error,
    make_directory,
    open_new,
    own_directory,
    remove,
    sync,
    write_atomic,
    write_new,
)
from inventory.errors import Conflict, FarmhandError, NotFound, Unfit, UsageError, some
from repositories.chunks import ChunkRef, key_of
from repositories.format import IndexFile, Release, Signer, Sum, newest_first
from repositories.generation import Generation, LogEntry, Reason, later_than, sync_directory
from repositories.layout import Layout
from repositories.needless import files_below, not_published, sweep, without_document
from repositories.package import Package
from repositories.render import sum_of
from repositories.repository import Repository
from repositories.staging import Staged, dead, keep_reading

_MANY = 64
"""Files, above which the whole file system is synced rather than each of them."""


@contextlib.contextmanager
def changing(repository: Repository, signer: Signer | None = None) -> Iterator[RepositoryChange]:
    """Hold the repository's lock, tidied up. Waits for whoever changes it now. ``signer``: for new
    generations; None: they are not signed."""
    repository.make()
    with (
        FileLock(repository.layout.lock).hold(),
        # Where its directory is left, its process was killed in a change.
        repository.staging() as staging,
    ):
        change = RepositoryChange(repository, signer, staging.directory)
        change.tidy()
        try:
            yield change
        except BaseException:
            with contextlib.suppress(Exception):  # the next change does it, and says so
                change.tidy(failed=True)
            raise


def recover(repository: Repository) -> None:
    """Finish, or take away, what a killed command left."""
    if repository.exists:
        with changing(repository):
            pass


@dataclass(frozen=True, slots=True)
class GenerationContent:
    """What a new generation is made of: the packages of ``origin``, else of ``base``, whose place it is
    to take; with those that come in, with some ``take``n from other generations, without some."""

    base: Generation | None
    origin: Generation | None = None
    add: Sequence[Staged] = ()
    take: Sequence[Package] = ()
    remove: Sequence[Package] = ()


class RepositoryChange:
    """A repository whose lock we hold."""

    def __init__(self, repository: Repository, signer: Signer | None, aside: Path) -> None:
        """``aside``: an empty directory, for what is being made."""
        self._repository = repository
        self._aside = aside
        self._signer = signer
        self._layout = repository.layout
        self._documents = repository.documents
        self._format = repository.format

    # -- generations ---------------------------------------------------------------------------------

    def commit(self, channel: str, content: GenerationContent, reason: Reason) -> Generation:
        """A new generation for a channel. Whole, durable, signed; nobody reads it yet. Conflict: another
        file has a package's identity."""
        with _disk_errors(self._layout.top):
            return self._commit(channel, content, reason)

    def _commit(self, channel: str, content: GenerationContent, reason: Reason) -> Generation:
        settings = self._repository.settings
        base, origin, add, take = content.base, content.origin, content.add, content.take
        source = origin or base
        chunks = source.chunks if source else ()
        if origin and not self._layout.document(origin.sequence).exists():
            raise NotFound(f"generation {origin.sequence} of {self._repository.name} was just collected")
        for package in take:
            if not self._layout.file(package).exists():
                raise NotFound(f"{package} was just collected from {self._repository.name}")
        check_fit(self._repository, chunks, add, take)
        fresh = [*take, *(item.package for item in add)]
        gone = [*content.remove, *outdated(self._repository, chunks, fresh)]
        fresh = [package for package in fresh if package not in gone]
        # 1. The packages, each under the name of its content; and the keys.
        self._pool([item for item in add if item.package in fresh])
        keys = self._keep_keys(self._signer) if self._signer else ""
        # 2. Its lists of packages. What they share with others is there.
        chunks = self._repository.chunks.changed(chunks, fresh, gone)
        # 3. Its number, and its tree, built aside.
        latest = self._documents.head(channel)
        before = self._documents.read(latest) if latest else None
        architectures = self._architectures(source, fresh)
        components = settings.components if settings.format == "deb" else ()
        generation = Generation(
            sequence=self._documents.next_sequence(), channel=channel, verb=reason.verb,
            made=datetime.now(UTC), by=reason.by, base=base.sequence if base else 0,
            origin=origin.sequence if origin else 0, flow=reason.flow, note=reason.note, chunks=chunks,
            components=components, architectures=architectures, description=settings.description,
            keys=keys, date=later_than(before.date if before else None),
        )  # fmt: skip
        aside = self._aside / "generation"
        generation = self._build(generation, source, aside)
        # 4. The tree under its number.
        aside.rename(self._layout.tree(generation.sequence))
        sync_directory(self._layout.trees)
        # 5. Its document: from here on there is such a generation.
        self._documents.write(generation)
        return generation

    def publish(self, generation: Generation, reason: Reason, *, expected: int) -> None:
        """Let the channel point to it, if it still points to ``expected``. Conflict: it does not."""
        channel = generation.channel
        head = self._documents.head(channel)
        if head != expected:
            raise Conflict(
                f"{self._repository.name}'s channel {channel} moved meanwhile: it has generation "
                f"{head or 'none'}, and {expected or 'none'} was expected",
                remedy="look at it, and do it again: it goes on from what is there",
            )
        now = datetime.now(UTC)
        entry = LogEntry.of(generation, head, now, reason, self._lasting(generation))
        with _disk_errors(self._layout.top):
            # 1. What plain clients read: its metadata, for a while those of the ones before; the keys.
            self._lay_out(generation, now)
            self._show_keys(generation)
            # 2. The pointer: from here on readers see it.
            self._point(channel, generation.sequence)
        # 3. What follows from it, and may as well be made later.
        try:
            with _disk_errors(self._layout.top):
                self._documents.append(channel, entry)
                self._follow(channel)
        except FarmhandError as error:
            error.message = (
                f"{channel} is generation {generation.sequence} now, as it should be; but what follows "
                f"from that is left to the next change: {error.message}"
            )
            raise

    def drop(self, channel: str, by: str) -> None:
        """Take a channel away. What it had stays until it is collected."""
        head, pointer = self._documents.head(channel), self._layout.pointer(channel)
        entry = LogEntry(at=datetime.now(UTC), sequence=0, before=head, verb="drop", by=by)
        with _disk_errors(self._layout.top):
            # 1. The pointer: from here on readers find none.
            pointer.unlink(missing_ok=True)
            sync_directory(pointer.parent)
            # 2. Its log says so: else the next change would put it back.
            self._documents.append(channel, entry)
            # 3. What followed from it.
            self._follow(channel)

    # -- steps ---------------------------------------------------------------------------------------

    def _architectures(self, source: Generation | None, fresh: Sequence[Package]) -> tuple[str, ...]:
        """Those declared, or else all that were ever seen."""
        if self._repository.settings.architectures:
            return self._repository.settings.architectures
        seen = {*(source.architectures if source else ()), *(p.architecture for p in fresh)}
        real = seen - {"all", "noarch", "src"}
        return tuple(sorted(real or seen & {"all"}))  # what fits all is listed somewhere, too

    def mend(self, items: Sequence[Staged]) -> None:
        """Put packages' files in the place of damaged ones in the pool: the same bytes as they had."""
        with _disk_errors(self._layout.top):
            self._pool(items)

    def _pool(self, items: Iterable[Staged]) -> None:
        fresh = [item for item in items if not whole(self._layout, item.package)]
        directories = set()
        for item in fresh:
            path = self._layout.file(item.package)
            try:
                make_directory(path.parent.parent, mode=0o755)
                make_directory(path.parent, mode=0o755)
                if len(fresh) <= _MANY:
                    sync(item.path)
                item.path.replace(path)
            except OSError as error:
                raise file_error(error, path, "write") from error
            keep_reading(self._layout, item.package, item.reading)
            directories |= {path.parent, path.parent.parent}
        if len(fresh) > _MANY:
            os.sync()
        elif fresh:
            for directory in (*directories, self._layout.pool):
                sync_directory(directory)

    def _build(self, generation: Generation, source: Generation | None, path: Path) -> Generation:
        """Its tree, durable but for its name. Returns it with its indexes. ``source``: the generation
        that it has most of its packages from."""
        fmt, release = self._format, self._release(generation)
        tree = _Tree(path, generation.date)
        before = source.chunks if source else ()
        renderer = self._repository.renderer(generation.architectures, before)
        same = self._same_indexes(generation, source) if source else {}
        indexes: list[IndexFile] = []
        for section in fmt.all_sections(generation.components, generation.architectures):
            for kind in fmt.KINDS:
                aside = path.parent / "index"
                index, there = same.get((section, kind), (None, None))
                if not (index and there and _copied(there, aside, index.packed)):
                    index = renderer.index(section, kind, generation.chunks, aside)
                indexes.append(index)
                for name in (fmt.lasting(release, index), *fmt.passing(release, index)):
                    with contextlib.suppress(FileExistsError):  # another section has the same content
                        tree.link(aside, name)
                aside.unlink()
        summary = fmt.summary(release, indexes)
        for name, data in fmt.entries(release, summary, self._signer).items():
            tree.replace(name, data)
        if self._signer:
            tree.replace(self._layout.key(generation.sequence).name, self._signer.public())
        path.joinpath("pool").symlink_to("../../pool")
        tree.sync()
        return replace(generation, indexes=tuple(indexes))

    def _same_indexes(
        self, generation: Generation, source: Generation
    ) -> Mapping[tuple[str, str], tuple[IndexFile, Path]]:
        """The indexes of ``source``, by section and kind, and where they are, if the other has the same
        packages; none where what it was signed as doesn't say so of them: then they are made again."""
        if (generation.chunks, generation.architectures) != (source.chunks, source.architectures):
            return {}
        fmt, release, tree = self._format, self._release(source), self._layout.tree(source.sequence)
        entries = fmt.entries(release, fmt.summary(release, source.indexes), None)
        try:
            if any((tree / name).read_bytes() != data for name, data in entries.items()):
                return {}
        except OSError:
            return {}
        return {(i.section, i.kind): (i, tree / fmt.lasting(release, i)) for i in source.indexes}

    def _lay_out(self, generation: Generation, now: datetime) -> None:
        """The published tree, durable: hard links to the generation's own, and to the indexes of those
        that it supersedes, under the names of their content."""
        channel = generation.channel
        place = self._layout.published(channel, generation.sequence)
        own_directory(place.parent, mode=0o755)
        sync_directory(place.parent.parent)
        head = self._documents.head(channel)
        earlier = self._documents.superseded(channel, self._repository.settings.grace, now)
        superseded = [*([head] if head else []), *(n for n in earlier if n != generation.sequence)]
        remove(self._aside / "published")
        tree = _Tree(self._aside / "published", generation.date)
        own = self._layout.tree(generation.sequence)
        for file in files_below(own):
            tree.link(own / file, file)
        self._carry(channel, superseded, tree)
        tree.path.joinpath("pool").symlink_to("../../../pool")
        tree.sync()
        remove(place)  # of a publish that was cut off
        tree.path.rename(place)
        sync_directory(place.parent)

    def _carry(self, channel: str, superseded: Iterable[int], tree: _Tree) -> None:
        """Link what their clients may still ask for; of those that are collected nothing is left."""
        known = {entry.sequence: entry.indexes for entry in self._documents.moves(channel)}
        for number in superseded:
            own = self._layout.tree(number)
            for name in known.get(number, ()):
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    tree.link(own / name, name)

    def _lasting(self, generation: Generation) -> tuple[str, ...]:
        release = self._release(generation)
        return tuple(self._format.lasting(release, index) for index in generation.indexes)

    def _keep_keys(self, signer: Signer) -> str:
        """For as long as a generation is signed by them. Returns their digest."""
        binary = signer.public_binary()
        digest = hashlib.sha256(binary).hexdigest()
        armoured, plain = self._layout.known_key(digest)
        _write_if_other(armoured, signer.public(), 0o600)
        _write_if_other(plain, binary, 0o600)
        return digest

    def _show_keys(self, generation: Generation) -> None:
        """For clients: those of the latest that is signed."""
        if generation.keys:
            kept = self._layout.known_key(generation.keys)
            for path, known in zip(self._layout.keys, kept, strict=True):
                _write_if_other(path, known.read_bytes(), 0o644)

    def _point(self, channel: str, sequence: int) -> None:
        pointer = self._layout.pointer(channel)
        fresh = pointer.with_name(f".{channel}")
        try:
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(f"../published/{channel}/{sequence}")
            fresh.rename(pointer)
            sync_directory(pointer.parent)
        except OSError as error:
            raise file_error(error, pointer, "set the link") from error

    def _follow(self, channel: str) -> None:
        """What follows from the pointer: the mirror list, the classical name of a suite, no published
        trees but the present one and the one before. Without a pointer there is none of them."""
        head, url = self._documents.head(channel), self._repository.settings.url
        text = f"{url}/generations/{head}/\n".encode() if url and head else b""
        if text:
            _write_if_other(self._layout.mirrors(channel), text, 0o644)
        else:
            self._layout.mirrors(channel).unlink(missing_ok=True)
        for link, leads in self._format.links(channel).items():
            path = self._layout.top / link
            if head and not path.is_symlink():
                own_directory(path.parent, mode=0o755)
                path.symlink_to(leads)
            elif not head and path.is_symlink():
                path.unlink()
        for path in tuple(not_published(self._repository, channel)):
            remove(path)
        if not head:
            remove(self._layout.published(channel, 0).parent)

    # -- after a kill --------------------------------------------------------------------------------

    def tidy(self, *, failed: bool = False) -> None:
        """Bring to an end what killed commands left: what a pointer leads to was published, what none
        leads to never was. ``failed``: this one goes no further, and leaves as much."""
        layout, documents = self._layout, self._documents
        killed = tuple(dead(layout.staging))
        for path in layout.trash.iterdir():
            remove(path)
        with contextlib.suppress(FarmhandError):  # one is damaged: whoever looks at them is told
            self._repository.flows.give_back_leases()
        logged: set[int] = set()
        for channel in self._repository.all_channels():
            self._finish(channel)
        for channel in documents.channels():
            logged |= {entry.sequence for entry in documents.moves(channel)}
        known = documents.sequences()
        if known and known[-1] not in logged:  # of a command that ended before it published
            last = documents.read(known[-1])
            if not self._repository.flows.knows(last.flow, last.sequence):
                self.collect(last)
        elif known and (last := documents.read(known[-1])).verb == "pass":
            self._repository.flows.end(last)
        for tree in without_document(self._repository):
            self._discard(tree)
        if killed or failed:
            with contextlib.suppress(FarmhandError):  # who can't tell what is needed removes nothing
                sweep(self._repository)
        for path in killed:  # last: until here the next one does it again
            remove(path)

    def _finish(self, channel: str) -> None:
        """Let the log and what follows agree with the pointer."""
        documents = self._documents
        head, log = documents.head(channel), documents.log(channel)
        logged = log[-1].sequence if log else 0
        if logged and not head:  # somebody removed it
            if not self._layout.published(channel, logged).is_dir():
                self._lay_out(documents.read(logged), datetime.now(UTC))
            self._point(channel, logged)
        elif head != logged:
            generation = documents.read(head)
            reason = Reason(generation.verb, generation.by, generation.note)
            lasting = self._lasting(generation)
            entry = LogEntry.of(generation, logged, datetime.now(UTC), reason, lasting)
            documents.append(channel, entry)
        self._layout.pointer(channel).with_name(f".{channel}").unlink(missing_ok=True)
        self._follow(channel)

    def collect(self, generation: Generation) -> None:
        """Remove a generation that nobody needs. What it alone had is for ``collect.py``."""
        # 1. Its document: from here on there is no such generation.
        self._documents.remove(generation.sequence)
        # 2. Its tree, out of the way at once.
        self._discard(self._layout.tree(generation.sequence))

    def _discard(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            away = self._layout.trash / path.name
            remove(away)
            path.rename(away)
            remove(away)

    def _release(self, generation: Generation) -> Release:
        return generation.release(self._repository.name)


class _Tree:
    """A tree of metadata being made, for all to read. ``date``: the time of its signed files. Clients
    ask by that, in whole seconds, whether there is something newer; of two that were made within one
    second, they would never fetch the second."""

    def __init__(self, path: Path, date: datetime) -> None:
        self.path = path
        self._time = date.timestamp()
        self._directories: set[Path] = set()
        self._make(path)

    def place(self, name: str) -> Path:
        """Where a file of that name goes; its directories are made."""
        path = self.path / name
        if path.parent in self._directories:
            return path
        missing = [d for d in path.parents if d.is_relative_to(self.path) and d not in self._directories]
        for directory in reversed(missing):
            self._make(directory)
        return path

    def _make(self, directory: Path) -> None:
        directory.mkdir(0o755)
        directory.chmod(0o755)  # whatever the umask is
        self._directories.add(directory)

    def link(self, file: Path, name: str) -> None:
        """OSError, such as FileExistsError."""
        os.link(file, self.place(name), follow_symlinks=False)

    def replace(self, name: str, data: bytes) -> None:
        path = self.place(name)
        path.unlink(missing_ok=True)
        write_new(path, data, mode=0o444)
        os.utime(path, (self._time, self._time))

    def sync(self) -> None:
        for directory in self._directories:
            sync_directory(directory)


def _copied(file: Path, to: Path, sum_: Sum) -> bool:
    """Copy a file that must have this sum, for all to read. Its bytes are on the disk then. False: it
    has another sum, or is gone."""
    try:
        data = file.read_bytes()
    except OSError:
        return False
    if Sum(hashlib.sha256(data).hexdigest(), len(data)) != sum_:
        return False
    with open_new(to, mode=0o444) as target:
        target.write(data)
        target.flush()
        os.fsync(target.fileno())
    return True


def whole(layout: Layout, package: Package) -> bool:
    """Whether its file is in the pool, with the bytes that it should have."""
    try:
        return sum_of(layout.file(package)) == Sum(package.sha256, package.size)
    except OSError:
        return False


def check_fit(
    repository: Repository,
    chunks: Sequence[ChunkRef],
    add: Sequence[Staged],
    take: Sequence[Package] = (),
) -> None:
    """See that packages may come to those of ``chunks``. Unfit, UsageError: the repository is for other
    ones. Conflict: another file has the identity of one, among them, here or in a channel."""
    heads = [repository.head(channel) for channel in repository.settings.channels]
    known = [chunks, *(head.chunks for head in heads if head)]
    coming: dict[tuple[str, str, str], tuple[Package, Path]] = {}
    found = [(package, repository.layout.file(package)) for package in take]
    for item in add:
        _check_kind(repository, item)
        found.append((item.package, item.path))
    for package, path in found:
        for each in known:
            for other in repository.chunks.named(each, package.name):
                if other.identity == package.identity and other.sha256 != package.sha256:
                    there = f"there is another {package} in {repository.name} already"
                    raise _contradiction(repository, package, path, repository.layout.file(other), there)
        other, its = coming.setdefault(package.identity, (package, path))
        if other.sha256 != package.sha256:
            raise _contradiction(repository, package, path, its, f"another {package} comes with it")


def _check_kind(repository: Repository, item: Staged) -> None:
    package, settings = item.package, repository.settings
    if settings.signed_packages and not item.reading.signers:
        raise Unfit(f"{package.file} is not signed, and {repository.name} takes signed packages only")
    if package.component not in (settings.components or ("",)):
        raise UsageError(
            f"{repository.name} has no component {package.component}: it has "
            f"{some(settings.components) or 'none, for it has rpm packages'}"
        )
    if settings.architectures and not repository.format.sections(package, settings.architectures):
        raise Unfit(
            f"{package.file} is for {package.architecture}, and {repository.name} has "
            f"{some(settings.architectures)}"
        )


def _contradiction(
    repository: Repository, package: Package, one: Path, other: Path, what: str
) -> Conflict:
    differing: tuple[str, ...] = ()
    with contextlib.suppress(FarmhandError, OSError):
        differing = repository.format.differing(other, one)
    where = f"they differ in {some(differing)}" if differing else "they are packed differently"
    return Conflict(
        f"{package.file}: {what}: {where}",
        remedy="give what is new a version of its own: a client that has one takes the other for it",
    )


def outdated(
    repository: Repository, chunks: Sequence[ChunkRef], added: Sequence[Package]
) -> list[Package]:
    """Older versions than a new generation lists, of the packages that it gets."""
    most = repository.settings.versions
    if most is None:
        return []
    gone: list[Package] = []
    for kind in {(p.name, p.architecture, p.component) for p in added}:
        known = repository.chunks.named(chunks, kind[0])
        found = {key_of(p): p for p in (*known, *added)}.values()
        same = [p for p in found if (p.name, p.architecture, p.component) == kind]
        gone += newest_first(repository.format, same)[most:]
    return gone


def _write_if_other(path: Path, data: bytes, mode: int) -> None:
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return
    write_atomic(path, data, mode=mode)


@contextlib.contextmanager
def _disk_errors(top: Path) -> Iterator[None]:
    """What the file system refuses, as an error to show."""
    try:
        yield
    except OSError as error:
        path = error.filename2 or error.filename
        raise file_error(error, Path(os.fsdecode(path)) if path else top, "write") from error
