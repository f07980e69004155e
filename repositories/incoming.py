"""A directory that others put packages into: what is complete there, and what is refused.

Nothing in it is trusted. A file counts as complete when who wrote it has closed it or moved it in, as
the kernel tells, or when it has not changed for a while; an upload with a .changes file when all that
this lists is there, by its sums. Files are opened once, no link is followed, and an upload names each by
its SHA-256: who takes it proves that, and can't be given another one.

What is refused is moved to ``REJECTED/NUMBER-NAME/``, with the reason beside it in
``NUMBER-NAME.reason``. What is to be moved or removed is written down first (``.NUMBER-NAME.todo``):
if farmhand is killed, the next one goes on with it. One process at a time: the caller sees to that."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from host.arrivals import Arrivals, DirectoryGone
from host.documents import Malformed, json_object, made, read_file
from host.files import file_error, own_directory, remove, sweep, write_atomic
from host.printable import one_line
from host.run import Runner
from inventory.errors import FarmhandError, Unfit, WrongState, some
from inventory.sizes import format_duration
from repositories.deb.changes import MOST, DebChanges, changes_of, check_source, is_name
from repositories.signing.armour import unsigned
from repositories.signing.proof import prove_clear

_BLOCK = 2**20
_CHANGES = ".changes"
_REASONS = ".reason"
_TODO = ".todo"
_LONGEST = 100  # characters of a directory's name
_REASON = 500  # characters
_OTHER_NOW = (errno.ENOENT, errno.ELOOP, errno.ENXIO)
"""What opening a file says where nothing has its name now, or a link, or a socket."""


@dataclass(frozen=True, slots=True)
class SeenFile:
    """A file in the directory, as it was when it was looked at. ``changed``: its st_ctime in
    nanoseconds, which nobody can set."""

    name: str
    inode: int
    changed: int


@dataclass(frozen=True, slots=True)
class UploadedFile:
    name: str
    path: Path
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Upload:
    """One that is complete. ``name``: of its .changes file, or of the package. ``files``: all but the
    .changes file. ``changes``: None for a package alone. ``signers``: fingerprints of those whose
    signature of the .changes file was proven."""

    name: str
    files: tuple[UploadedFile, ...]
    members: tuple[SeenFile, ...]
    changes: DebChanges | None = None
    signers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejection:
    """``place``: the directory that it was moved to, or below which it would be."""

    name: str
    reason: str
    place: Path


@dataclass(frozen=True, slots=True)
class _Doing:
    """What is written down before it is done. ``directory``: where the files are. ``reason``: ""
    removes them, for they were taken."""

    directory: str
    reason: str
    files: tuple[SeenFile, ...]


class Incoming:
    """A context manager. ``suffix``: of packages' files. ``with_changes``: an upload has a .changes
    file, and packages alone are none. ``keys``: public keys, one of which must have signed it; b"": it
    may be unsigned. ``still``: seconds without a change after which a file counts as complete that
    nobody was seen to close. ``patience``: seconds after which what is incomplete is refused.
    ``on_reject`` hears of each that is refused. ``look``: nothing is moved or removed."""

    def __init__(
        self,
        directory: Path,
        rejected: Path,
        suffix: str,
        runner: Runner,
        *,
        with_changes: bool = False,
        keys: bytes = b"",
        still: float = 60,
        patience: float = 24 * 3600,
        on_reject: Callable[[Rejection], None] = lambda _: None,
        look: bool = False,
    ) -> None:
        if not look:
            own_directory(rejected, mode=0o755)
        self._directory, self._rejected, self._suffix, self._runner = directory, rejected, suffix, runner
        self._with_changes, self._keys = with_changes, keys
        self._still, self._patience, self._on_reject = still, patience, on_reject
        self._look = look
        self._soon = math.inf
        self._arrivals = Arrivals(directory)
        self._claims: Counter[str] = Counter()  # how many .changes files list it
        self._faults: list[FarmhandError] = []  # with what was left to do
        self._handle = -1
        self._number = 0
        try:
            self._handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if not look and os.fstat(self._handle).st_dev != rejected.stat().st_dev:
                raise WrongState(
                    f"{rejected} is on another file system than {directory}: nothing can be moved there",
                    remedy="let both be on the same one",
                )
            if not look:
                self._go_on()
        except OSError as error:
            self.close()
            raise file_error(error, directory, "open") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Incoming:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._arrivals.close()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def fileno(self) -> int:
        """For poll(2), as that of ``Arrivals``."""
        return self._arrivals.fileno()

    def wait(self, timeout: float) -> bool:
        """Until something has arrived, at most so many seconds. Returns whether it has."""
        return self._arrivals.wait(timeout)

    @property
    def soon(self) -> float:
        """Seconds, from the last look, until something may count as complete since it stood still."""
        return self._soon

    def complete(self) -> Iterator[Upload]:
        """The uploads that are complete, in the order in which they came; whoever gets one calls
        ``taken`` or ``reject``, else it is there the next time. What is hostile, damaged or too long
        incomplete is refused on the way. A fault with one of them stops no other: it is raised at the
        end. DirectoryGone."""
        self._arrivals.wait(0)
        self._soon = math.inf
        if not os.fstat(self._handle).st_nlink:
            raise DirectoryGone(f"{self._directory} was removed", remedy="make it, and start again")
        try:
            entries = self._entries()
        except OSError as error:
            raise file_error(error, self._directory, "list") from error
        self._arrivals.closed.intersection_update(entries)
        faults, self._faults = self._faults, []
        self._refuse_hostile(entries, faults)
        look = self._changes if self._with_changes else self._packages
        yield from look(entries, faults)
        if faults:
            raise faults[0]

    def taken(self, upload: Upload) -> None:
        """It is in the repository: its files go, but for what came meanwhile under the same names, and
        what other uploads list, too."""
        if self._look:
            return
        files = self._its_own(upload.members)
        if len(files) < 2:
            self._carry_out(_Doing(str(self._directory), "", files), None)
        else:
            self._do(_Doing(str(self._directory), "", files), upload.name)

    def reject(self, upload: Upload, reason: str) -> Rejection:
        """Move it away."""
        return self._reject(upload.name, upload.members, reason)

    # -- looking -------------------------------------------------------------------------------------

    def _entries(self) -> dict[str, os.stat_result]:
        """By their names, the oldest first."""
        found = {}
        with os.scandir(self._handle) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found[entry.name] = entry.stat(follow_symlinks=False)
        ours = self._rejected.stat().st_ino if self._rejected.exists() else 0  # it may be in there
        kept = [(name, info) for name, info in found.items() if info.st_ino != ours]
        return dict(sorted(kept, key=lambda each: (each[1].st_ctime_ns, each[0])))

    def _quiet(self, name: str, info: os.stat_result) -> bool:
        # Of a clock that was set back, too
        left = self._still - abs(time.time() - info.st_ctime)
        if name in self._arrivals.closed or left <= 0:
            return True
        self._soon = min(self._soon, left)
        return False

    def _late(self, info: os.stat_result) -> bool:
        return abs(time.time() - info.st_ctime) >= self._patience

    def _refuse_hostile(self, entries: dict[str, os.stat_result], faults: list[FarmhandError]) -> None:
        """Take out of ``entries`` what no upload may have."""
        for name, info in tuple(entries.items()):
            why = ""
            if not stat.S_ISREG(info.st_mode) and not stat.S_ISDIR(info.st_mode):
                why = "it is a link, a FIFO or the like, and no file"
            elif stat.S_ISREG(info.st_mode) and self._quiet(name, info):
                if info.st_nlink > 1:
                    why = "it has another name too (a hard link)"
                elif not name.startswith(".") and not is_name(name):
                    why = "no file here may be called so"
            if why or name.startswith(".") or not stat.S_ISREG(info.st_mode):
                del entries[name]
                if not why and self._late(info):
                    why = self._too_late("it is no upload")
            if why:
                self._refuse(name, (_member(name, info),), why, faults)

    def _packages(
        self, entries: Mapping[str, os.stat_result], faults: list[FarmhandError]
    ) -> Iterator[Upload]:
        for name, info in entries.items():
            member = _member(name, info)
            if not name.endswith(self._suffix):
                if self._late(info):
                    why = self._too_late(f"it is no {self._suffix} file")
                    self._refuse(name, (member,), why, faults)
            elif self._quiet(name, info):
                try:
                    _, sha256 = self._sums(member)
                except _Gone:
                    continue
                except OSError as error:
                    faults.append(file_error(error, self._directory / name, "read"))
                    continue
                file = UploadedFile(name, self._directory / name, info.st_size, sha256)
                yield Upload(name, (file,), (member,))

    def _changes(
        self, entries: Mapping[str, os.stat_result], faults: list[FarmhandError]
    ) -> Iterator[Upload]:
        texts = {}
        for name, info in entries.items():
            if _is_changes(name):
                try:
                    texts[name] = self._content(_member(name, info))
                except _Gone:
                    continue
                except OSError as error:
                    faults.append(file_error(error, self._directory / name, "read"))
        self._claims = Counter(name for text in texts.values() for name in _names(text))
        for name, text in texts.items():
            members: tuple[SeenFile, ...] = (_member(name, entries[name]),)
            lacking: list[str] = []
            upload = None
            try:
                listed = changes_of(unsigned(text))
                there = [file.name for file in listed.files if file.name in entries]
                members += tuple(_member(each, entries[each]) for each in there)
                lacking = _lacking(listed, entries)
                if not lacking:
                    upload = self._proven(text, listed, members)
            except _Gone:
                continue
            except Unfit as error:
                if all(self._quiet(m.name, entries[m.name]) for m in members):
                    self._refuse(name, members, error.message, faults)
            except OSError as error:
                faults.append(file_error(error, self._directory / name, "read"))
            except FarmhandError as error:
                faults.append(error)
            if upload:
                yield upload
            elif lacking and all(self._late(entries[m.name]) for m in members):
                why = self._too_late(f"it lacks {some(lacking)}")
                self._refuse(name, members, why, faults)
        for name, info in entries.items():
            if name not in self._claims and not _is_changes(name) and self._late(info):
                why = self._too_late("no .changes file lists it")
                self._refuse(name, (_member(name, info),), why, faults)

    def _too_late(self, why: str) -> str:
        return f"incomplete after {format_duration(self._patience)}: {why}"

    # -- reading -------------------------------------------------------------------------------------

    def _proven(self, text: bytes, listed: DebChanges, members: Sequence[SeenFile]) -> Upload:
        """All is there that is ``listed``. Unfit: it isn't signed as it must be, a file's bytes have
        other sums, or the source package means other files."""
        signers: tuple[str, ...] = ()
        if self._keys:
            proof = prove_clear(text, self._keys, self._runner)
            if not proof.signers:
                raise Unfit(f"it is signed by {some(proof.expired)}, whose time is over")
            if changes_of(proof.text) != listed:
                raise Unfit("it says more than what was signed")
            signers = proof.signers
        changes, *rest = members
        files = []
        for member, file in zip(rest, listed.files, strict=True):
            for kind, found, wanted in zip(
                ("md5", "sha256"), self._sums(member), (file.md5, file.sha256), strict=True
            ):
                if found != wanted:
                    raise Unfit(f"{member.name} is damaged: its {kind} is {found}, not {wanted}")
            if member.name.endswith(".dsc"):
                check_source(unsigned(self._content(member)), listed)
            files.append(UploadedFile(file.name, self._directory / file.name, file.size, file.sha256))
        return Upload(changes.name, tuple(files), tuple(members), listed, signers)

    def _sums(self, member: SeenFile) -> tuple[str, str]:
        """md5, sha256."""
        digests = hashlib.md5(usedforsecurity=False), hashlib.sha256()
        with self._opened(member) as handle:
            while block := os.read(handle, _BLOCK):
                for digest in digests:
                    digest.update(block)
        return digests[0].hexdigest(), digests[1].hexdigest()

    def _content(self, member: SeenFile) -> bytes:
        with self._opened(member) as handle, os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(MOST + 1)

    @contextlib.contextmanager
    def _opened(self, member: SeenFile) -> Iterator[int]:
        """The very file that was looked at. _Gone: it isn't there any more, or another one is."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        if not self._same(member):
            raise _Gone
        try:
            handle = os.open(member.name, flags, dir_fd=self._handle)
        except OSError as error:
            if error.errno in _OTHER_NOW:
                raise _Gone from error
            raise
        try:
            if _member(member.name, os.fstat(handle)) != member:
                raise _Gone
            yield handle
            if _member(member.name, os.fstat(handle)) != member:
                raise _Gone  # it changed while it was read
        finally:
            os.close(handle)

    def _same(self, member: SeenFile) -> bool:
        try:
            info = os.stat(member.name, dir_fd=self._handle, follow_symlinks=False)
        except OSError:
            return False
        return _member(member.name, info) == member

    # -- moving --------------------------------------------------------------------------------------

    def _its_own(self, members: tuple[SeenFile, ...]) -> tuple[SeenFile, ...]:
        """What no other upload lists, which is still to come."""
        own = tuple(member for member in members if self._claims[member.name] < 2)
        self._claims.subtract(member.name for member in members)
        return own

    def _refuse(
        self, name: str, members: tuple[SeenFile, ...], reason: str, faults: list[FarmhandError]
    ) -> None:
        if not any(map(self._same, members)):
            return  # it has gone meanwhile
        try:
            self._reject(name, members, reason)
        except FarmhandError as error:
            faults.append(error)

    def _reject(self, name: str, members: tuple[SeenFile, ...], reason: str) -> Rejection:
        reason = one_line(reason, _REASON) or "no reason was given"
        doing = _Doing(str(self._directory), reason, self._its_own(members))
        place = self._rejected if self._look else self._do(doing, name)
        rejection = Rejection(one_line(name), reason, place)
        self._on_reject(rejection)
        return rejection

    def _do(self, doing: _Doing, name: str) -> Path:
        """Write it down, and do it. Returns the directory that it was moved to."""
        place = self._fresh(name)
        write_atomic(_note(place), json.dumps(asdict(doing)).encode(), mode=0o600)
        self._carry_out(doing, place)
        return place

    def _fresh(self, name: str) -> Path:
        """A directory that nobody had before."""
        try:
            if not self._number:
                numbers = (p.name.lstrip(".").partition("-")[0] for p in self._rejected.iterdir())
                self._number = max(
                    (int(n) for n in numbers if re.fullmatch("[0-9]{1,15}", n)), default=0
                )
            while True:
                self._number += 1
                place = self._rejected / f"{self._number}-{_shown(name)[:_LONGEST]}"
                with contextlib.suppress(FileExistsError):
                    place.mkdir(0o755)
                    place.chmod(0o755)
                    return place
        except OSError as error:
            raise file_error(error, self._rejected / "new", "make the directory") from error

    def _carry_out(self, doing: _Doing, place: Path | None) -> None:
        for member in doing.files:
            self._arrivals.closed.discard(member.name)
            if not self._same(member):
                continue  # done before, or another one came
            try:
                if doing.reason and place:
                    os.rename(member.name, place / _shown(member.name), src_dir_fd=self._handle)
                else:
                    os.unlink(member.name, dir_fd=self._handle)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise file_error(error, self._directory / _shown(member.name), "move away") from error
        if place is None:
            return
        if doing.reason:
            write_atomic(place.with_name(f"{place.name}{_REASONS}"), f"{doing.reason}\n".encode())
        else:
            remove(place)
        remove(_note(place))

    def _go_on(self) -> None:
        """With what a killed process had written down; and remove the directories that it hadn't come to
        fill. OSError."""
        sweep(self._rejected)
        names = {path.name for path in self._rejected.iterdir()}
        for note in sorted(name for name in names if name.startswith(".") and name.endswith(_TODO)):
            place = self._rejected / note.removeprefix(".").removesuffix(_TODO)
            try:
                doing = made(_Doing, json_object(read_file(self._rejected / note)))
            except Malformed:
                remove(_note(place))  # not ours
                continue
            if doing.directory != str(self._directory):
                continue  # of another directory that is refused to the same place
            place.mkdir(0o755, exist_ok=True)
            try:
                self._carry_out(doing, place)
            except FarmhandError as error:
                self._faults.append(error)
        for name in names:
            if name[:1].isdigit() and not name.endswith(_REASONS) and name + _REASONS not in names:
                with contextlib.suppress(OSError):
                    (self._rejected / name).rmdir()


class _Gone(Exception):
    """The file is no longer the one that was looked at."""


def _is_changes(name: str) -> bool:
    return name.endswith(_CHANGES)


def _names(text: bytes) -> tuple[str, ...]:
    """Files that a .changes file lists, whoever signed it; none if it is none."""
    try:
        return tuple(file.name for file in changes_of(unsigned(text)).files)
    except Unfit:
        return ()


def _lacking(changes: DebChanges, entries: Mapping[str, os.stat_result]) -> list[str]:
    """Files that aren't there yet, or not yet whole. Unfit: one is larger than it should be."""
    lacking = []
    for file in changes.files:
        size = entries[file.name].st_size if file.name in entries else -1
        if size > file.size:
            raise Unfit(f"{file.name} has {size} bytes, not {file.size}")
        if size < file.size:
            lacking.append(file.name)
    return lacking


def _member(name: str, info: os.stat_result) -> SeenFile:
    return SeenFile(name, info.st_ino, info.st_ctime_ns)


def _note(place: Path) -> Path:
    return place.with_name(f".{place.name}{_TODO}")


def _shown(name: str) -> str:
    """A name that may be anything, as a file's name that needs no quoting. What an upload may be made of
    keeps its own."""
    return name if is_name(name) else re.sub(r"[^A-Za-z0-9_.+~-]", "_", name).lstrip(".-") or "upload"
