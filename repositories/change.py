"""How a repository is changed.

All that changes it holds its lock, and goes in numbered steps (``Change.commit``, ``Change.publish``).
One of them, a rename(2), makes the difference to its readers. Before each change ``tidy`` takes away, or
finishes, what a killed one left."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cmp_to_key
from pathlib import Path

from host.file_lock import FileLock
from host.files import (
    file_error,
    make_directory,
    own_directory,
    remove,
    sync,
    write_atomic,
    write_new,
)
from inventory.errors import Conflict, FarmhandError, Unfit, UsageError, some
from repositories.chunks import ChunkRef, key_of
from repositories.format import IndexFile, PackageFormat, Release, Signer
from repositories.generation import Generation, LogEntry, Verb, later_than, sync_directory
from repositories.needless import files_below, sweep
from repositories.package import Package
from repositories.repository import Repository
from repositories.staging import Staged, dead, keep_reading

_DETACHED = (".asc", ".gpg")
_MANY = 64
"""Files, above which the whole file system is synced rather than each of them."""


@contextlib.contextmanager
def changing(repository: Repository, signer: Signer | None = None) -> Iterator[Change]:
    """Hold the repository's lock, tidied up. Waits for whoever changes it now. ``signer``: for new
    generations; None: they are not signed."""
    repository.make()
    with FileLock(repository.layout.lock).hold():
        change = Change(repository, signer)
        change.tidy()
        yield change


def recover(repository: Repository) -> None:
    """Finish, or take away, what a killed command left."""
    if repository.exists:
        with changing(repository):
            pass


class Change:
    """A repository whose lock we hold."""

    def __init__(self, repository: Repository, signer: Signer | None) -> None:
        self._repository = repository
        self._signer = signer
        self._layout = repository.layout
        self._documents = repository.documents
        self._format = repository.format

    # -- generations ---------------------------------------------------------------------------------

    def commit(
        self,
        channel: str,
        verb: Verb,
        *,
        by: str,
        base: Generation | None,
        origin: Generation | None = None,
        add: Sequence[Staged] = (),
        take: Sequence[Package] = (),
        remove: Sequence[Package] = (),
        flow: str = "",
        note: str = "",
    ) -> Generation:
        """A new generation: the packages of ``origin`` (else of ``base``), without some, with those that
        come in, and some ``take``n from another. Whole, durable, signed; nobody reads it yet. Conflict:
        another file has a package's identity."""
        settings = self._repository.settings
        source = origin or base
        chunks = source.chunks if source else ()
        staged = {item.package.sha256: item for item in add}
        for item in staged.values():
            self._check(item)
            self._check_identity(item.package, item.path, chunks)
        for package in take:
            self._check_identity(package, self._layout.file(package), chunks)
        fresh = [*take, *(item.package for item in staged.values())]
        gone = [*remove, *self._outdated(chunks, fresh)]
        # 1. The packages, each under the name of its content.
        self._pool(staged.values())
        # 2. Its lists of packages. What they share with others is there.
        fresh = [package for package in fresh if package not in gone]
        chunks = self._repository.chunks.changed(chunks, fresh, gone)
        # 3. Its number, and its tree, built aside.
        latest = self._documents.head(channel)
        before = self._documents.read(latest) if latest else None
        architectures = self._architectures(source, fresh)
        components = settings.components if settings.format == "deb" else ()
        generation = Generation(
            sequence=self._documents.next_sequence(), channel=channel, verb=verb,
            made=datetime.now(UTC), by=by, base=base.sequence if base else 0,
            origin=origin.sequence if origin else 0, flow=flow, note=note, chunks=chunks,
            components=components, architectures=architectures,
            date=later_than(before.date if before else None),
        )  # fmt: skip
        with self._repository.staging() as staging:
            aside = staging.directory / "tree"
            generation = self._build(generation, aside)
            # 4. The tree under its number.
            aside.rename(self._layout.tree(generation.sequence))
        sync_directory(self._layout.trees)
        # 5. Its document: from here on there is such a generation.
        self._documents.write(generation)
        return generation

    def publish(
        self, generation: Generation, *, expected: int, verb: Verb, by: str, note: str = ""
    ) -> None:
        """Let the channel point to it, if it still points to ``expected``. Conflict: it does not."""
        channel = generation.channel
        head = self._documents.head(channel)
        if head != expected:
            raise Conflict(
                f"{self._repository.name}'s channel {channel} moved meanwhile: it has generation "
                f"{head or 'none'}, and {expected or 'none'} was expected",
                remedy="look at it, and do it again: it goes on from what is there",
            )
        entry = LogEntry(
            at=datetime.now(UTC), sequence=generation.sequence, before=head, verb=verb, by=by, note=note
        )
        # 1. What plain clients read: its metadata, and for a while those of the ones before; the keys.
        self._lay_out(generation, entry.at)
        if self._signer:
            self._keep_keys(self._signer)
        # 2. The pointer: from here on readers see it.
        self._point(channel, generation.sequence)
        # 3. What follows from it, and may as well be made later.
        self._documents.append(channel, entry)
        self._follow(channel)

    # -- steps ---------------------------------------------------------------------------------------

    def _check(self, item: Staged) -> None:
        """Unfit, UsageError: the repository is for other packages."""
        package, repository = item.package, self._repository
        settings = repository.settings
        if settings.signed_packages and not item.reading.signers:
            raise Unfit(
                f"{package.file} is not signed, and {repository.name} takes signed packages only"
            )
        if settings.format == "deb" and package.component not in settings.components:
            raise UsageError(
                f"{repository.name} has no component {package.component}: it has "
                f"{some(settings.components)}"
            )
        if settings.architectures and not self._format.sections(package, settings.architectures):
            raise Unfit(
                f"{package.file} is for {package.architecture}, and {repository.name} has "
                f"{some(settings.architectures)}"
            )

    def _check_identity(self, package: Package, path: Path, chunks: Sequence[ChunkRef]) -> None:
        """Conflict: what it comes to, or a channel, has another file under its identity."""
        repository = self._repository
        heads = (repository.head(channel) for channel in repository.settings.channels)
        for known in (chunks, *(head.chunks for head in heads if head)):
            for other in repository.chunks.named(known, package.name):
                if other.identity == package.identity and other.sha256 != package.sha256:
                    raise self._contradiction(package, path, other)

    def _contradiction(self, package: Package, path: Path, other: Package) -> Conflict:
        differing: tuple[str, ...] = ()
        with contextlib.suppress(FarmhandError, OSError):
            differing = self._format.differing(self._layout.file(other), path)
        where = f"they differ in {some(differing)}" if differing else "they are packed differently"
        return Conflict(
            f"{package.file}: there is another {package} in {self._repository.name} already: {where}",
            remedy="give what is new a version of its own: a client that has one takes the other for it",
        )

    def _outdated(self, chunks: Sequence[ChunkRef], added: Sequence[Package]) -> list[Package]:
        """Older versions than a new generation lists, of the packages that it gets."""
        most = self._repository.settings.versions
        if most is None:
            return []
        gone: list[Package] = []
        for kind in {(p.name, p.architecture, p.component) for p in added}:
            known = self._repository.chunks.named(chunks, kind[0])
            found = {key_of(p): p for p in (*known, *added)}.values()
            same = [p for p in found if (p.name, p.architecture, p.component) == kind]
            gone += newest_first(self._format, same)[most:]
        return gone

    def _architectures(self, source: Generation | None, fresh: Sequence[Package]) -> tuple[str, ...]:
        """Those declared, or else all that were ever seen."""
        if self._repository.settings.architectures:
            return self._repository.settings.architectures
        seen = {*(source.architectures if source else ()), *(p.architecture for p in fresh)}
        return tuple(sorted(seen - {"all", "noarch", "src"}))

    def _pool(self, items: Iterable[Staged]) -> None:
        fresh = [item for item in items if not self._layout.file(item.package).exists()]
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

    def _build(self, generation: Generation, path: Path) -> Generation:
        """Its tree, durable but for its name. Returns it with its indexes."""
        fmt, release = self._format, self._release(generation)
        tree = _Tree(path, generation.date)
        renderer = self._repository.renderer(generation.architectures)
        indexes: list[IndexFile] = []
        for section in fmt.all_sections(generation.components, generation.architectures):
            for kind in fmt.KINDS:
                aside = path.parent / "index"
                index = renderer.index(section, kind, generation.chunks, aside)
                indexes.append(index)
                for name in (fmt.lasting(release, index), *fmt.passing(release, index)):
                    with contextlib.suppress(FileExistsError):  # another section has the same content
                        tree.link(aside, name)
                sync(aside)
                aside.unlink()
        summary = fmt.summary(release, indexes)
        for name, data in fmt.entries(release, summary, self._signer).items():
            tree.replace(name, data)
        path.joinpath("pool").symlink_to("../../pool")
        tree.sync()
        return replace(generation, indexes=tuple(indexes))

    def _lay_out(self, generation: Generation, now: datetime) -> None:
        """The published tree, durable: hard links to the generation's own, and to the indexes of those
        that it supersedes, under the names of their content."""
        channel, place = (
            generation.channel,
            self._layout.published(generation.channel, generation.sequence),
        )
        own_directory(place.parent, mode=0o755)
        head = self._documents.head(channel)
        earlier = self._documents.superseded(channel, self._repository.settings.grace, now)
        superseded = [*([head] if head else []), *(n for n in earlier if n != generation.sequence)]
        with self._repository.staging() as staging:
            tree = _Tree(staging.directory / "tree", generation.date)
            own = self._layout.tree(generation.sequence)
            for file in files_below(own):
                tree.link(own / file, file)
            signatures = self._carry(superseded, tree)
            release = self._release(generation)
            for name in self._format.signatures(release):
                if name.endswith(_DETACHED) and (own / name).exists():
                    signature = (own / name).read_bytes()
                    standing = self._format.standing(signature, signatures.get(name, ()))
                    if standing != signature:
                        tree.replace(name, standing)
            tree.path.joinpath("pool").symlink_to("../../../pool")
            tree.sync()
            remove(place)  # of a publish that a kill cut off
            tree.path.rename(place)
        sync_directory(place.parent)

    def _carry(self, superseded: Iterable[int], tree: _Tree) -> Mapping[str, Sequence[bytes]]:
        """Link what their clients may still ask for. Returns their detached signatures, by names."""
        signatures: dict[str, list[bytes]] = {}
        for number in superseded:
            try:
                generation = self._documents.read(number)
            except FarmhandError:  # collected, or damaged: fsck tells
                continue
            own, release = self._layout.tree(number), self._release(generation)
            for index in generation.indexes:
                name = self._format.lasting(release, index)
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    tree.link(own / name, name)
            for name in self._format.signatures(release):
                if name.endswith(_DETACHED):
                    with contextlib.suppress(FileNotFoundError):
                        signatures.setdefault(name, []).append((own / name).read_bytes())
        return signatures

    def _keep_keys(self, signer: Signer) -> None:
        public, binary = signer.public(), signer.public_binary()
        armoured, keyring = self._layout.keys
        known = self._layout.known_keys / f"{hashlib.sha256(binary).hexdigest()}.gpg"
        for path, data, mode in (
            (armoured, public, 0o644),
            (keyring, binary, 0o644),
            (known, binary, 0o600),
        ):
            if not path.exists() or path.read_bytes() != data:
                write_atomic(path, data, mode=mode)

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
        trees but the present one and the one before."""
        head, url = self._documents.head(channel), self._repository.settings.url
        mirrors = self._layout.mirrors(channel)
        text = f"{url}/generations/{head}/\n".encode() if url and head else b""
        if not text:
            mirrors.unlink(missing_ok=True)
        elif not mirrors.exists() or mirrors.read_bytes() != text:
            write_atomic(mirrors, text, mode=0o644)
        for link, leads in self._format.links(channel).items():
            path = self._layout.top / link
            if head and not path.is_symlink():
                own_directory(path.parent, mode=0o755)
                path.symlink_to(leads)
        kept = {str(entry.sequence) for entry in self._documents.log(channel)[-2:]} | {str(head)}
        place = self._layout.published(channel, 0).parent
        for path in place.iterdir() if place.is_dir() else ():
            if path.name not in kept:
                remove(path)

    # -- after a kill --------------------------------------------------------------------------------

    def tidy(self) -> None:
        """Bring to an end what killed commands left: what a pointer leads to was published, what none
        leads to never was."""
        killed = tuple(dead(self._layout.staging))
        for path in (*killed, *self._layout.trash.iterdir()):
            remove(path)
        logged: set[int] = set()
        for channel in self._repository.all_channels():
            head, log = self._documents.head(channel), self._documents.log(channel)
            if head and (not log or log[-1].sequence != head):
                generation = self._documents.read(head)
                before = log[-1].sequence if log else 0
                entry = LogEntry(
                    at=datetime.now(UTC), sequence=head, before=before, verb=generation.verb,
                    by=generation.by, note=generation.note,
                )  # fmt: skip
                self._documents.append(channel, entry)
                self._follow(channel)
            logged |= {head, *(entry.sequence for entry in log)}
        known = self._documents.sequences()
        if known and known[-1] not in logged:  # of a command that was killed before it published
            last = self._documents.read(known[-1])
            if not last.flow:
                self.collect(last)
        for tree in self._layout.trees.iterdir():
            if not (tree.name.isdigit() and self._layout.document(int(tree.name)).exists()):
                self._discard(tree)
        if killed:
            sweep(self._repository)

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
        return generation.release(self._repository.name, self._repository.settings.description)


class _Tree:
    """A tree of metadata being made, for all to read. ``date``: the time of its signed files. Clients
    ask by that, in whole seconds, whether there is something newer; of two that were made within one
    second, they would never fetch the second."""

    def __init__(self, path: Path, date: datetime) -> None:
        self.path = path
        self._time = date.timestamp()
        path.mkdir(0o755)
        self._directories = {path}

    def place(self, name: str) -> Path:
        """Where a file of that name goes; its directories are made."""
        path = self.path / name
        missing = [d for d in path.parents if d.is_relative_to(self.path) and d not in self._directories]
        for directory in reversed(missing):
            directory.mkdir(0o755)
            self._directories.add(directory)
        return path

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


def newest_first(fmt: PackageFormat, packages: Iterable[Package]) -> list[Package]:
    def order(one: Package, other: Package) -> int:
        return fmt.compare(one.version, other.version)

    return sorted(packages, key=cmp_to_key(order), reverse=True)
