"""Memory images: the files of warm checkpoints, their seals, and the working copy that QEMU maps.

    ROOT/MACHINE/NAME/        complete, or it has another name
        memory                the guest's memory, sparse; sealed (0400)
        state                 its devices, as QEMU's incoming migration; sealed
        saved                 instead of these two where memory can't be mapped: libvirt's save image
        machine.xml           the definition it ran with; sealed
        seal.json             what they are: whose, of which disk's checkpoint, sizes and sums
        face                  a copy of ``memory`` for QEMU to map; face.json: as it was made
    ROOT/MACHINE/.kept-NAME   that there is one, and of which of the disk's checkpoints: outlasts it
    ROOT/MACHINE/.farmhand-new-*, .farmhand-gone-*   under construction while its .lock is held, or going

Why a copy: QEMU (7.2, and later ones unless the file is opened for reading only, from 8.2) opens the
file for writing although it maps it privately, and when the guest gives memory back by its balloon QEMU
punches holes into the file (ram_block_discard_range() in softmmu/physmem.c). So a guest could change
what it is put back to. The copy's inode, size, times and blocks tell whether that happened; then it is
made anew. Nobody but us may even read the sealed files.

A seal is checked whole once, when it is made, and then by the files' inode, size, mtime and ctime, which
nobody can set back (inode(7)). Where these differ, as after a restore from a backup, the files are read
whole again, once. One whose seal can't be read any more, or that is gone, is a memory that can't be
used, as long as the disk has its checkpoint: else that would be a cold one without a word.

What is under construction isn't synced: after a power cut its files may have holes that nobody made, and
the disk may lack what it had. So all that a kill leaves tells in which boot it was made, and is used in
that one alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from host.documents import Malformed, damaged, json_object, made, read_file
from host.file_lock import FileLock
from host.files import blocks, changed, file_error, make_directory, matching, sync, write_atomic
from host.processes import boot_id
from hypervisors.api import Checkpoint, Disk, KeptMemory, Leftover, Owner, StepFn
from hypervisors.libvirt.warm.place import MemoryPlace
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, DriverFailed, FarmhandError, NoSpace, WrongState
from inventory.sizes import format_size

_FORMAT = 1
_NEW, _GONE, _KEPT = ".farmhand-new-", ".farmhand-gone-", ".kept-"
_SEAL, _UNSEALED, _FACE_NOTE = "seal.json", "unsealed.json", "face.json"
MEMORY, STATE, DEFINITION, FACE = "memory", "state", "machine.xml", "face"
SAVED = "saved"
"""libvirt's save image: memory and devices in one, where memory is read back."""
ONLY, APART = "only", "apart"
"""Beside such an image: its machine is off, or about to be, and has its memory nowhere else (the file
tells the boot in which that was so); it could not be given back then, and by now the disk may be
another."""
HELD, FROZEN = "held", "frozen"
"""Beside an image under construction: its machine may stand still for it, or its disk be in between; its
guest's agent was asked to freeze its file systems. Recovery looks after it."""
_STAYS = (_UNSEALED, ONLY, HELD)
_SEALED = (MEMORY, STATE, SAVED, DEFINITION)
_PART = 2**20  # bytes that are looked at, and summed, at a time
_ZEROS = bytes(_PART)
_SPARE = 256 * 2**20
"""Bytes that are left free beside an image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """A file as stat(2) has it. No program can set ``changed`` back."""

    inode: int
    size: int
    blocks: int
    modified: int  # ns
    changed: int  # ns

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """OSError."""
        seen = path.lstat()
        return cls(
            inode=seen.st_ino, size=seen.st_size, blocks=seen.st_blocks,
            modified=seen.st_mtime_ns, changed=seen.st_ctime_ns,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _FaceNote:
    """A working copy as it was made. It was not synced: another boot may have lost some of it."""

    facts: FileFacts
    boot: str

    @classmethod
    def of(cls, face: Path) -> _FaceNote:
        """OSError."""
        return cls(facts=FileFacts.of(face), boot=boot_id())


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedFile:
    facts: FileFacts
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """What an image is. ``disk``: the id of the disk's checkpoint that it belongs to. ``runs_on``: what
    must be the same where it is to run on, such as QEMU's version, by its name."""

    farm: str
    vm: str
    machine: str
    checkpoint: str
    disk: str
    created: datetime
    how: str
    size: int
    pause: float
    frozen: float
    quiesced: bool
    runs_on: Mapping[str, str]
    files: Mapping[str, SealedFile]

    @property
    def owner(self) -> Owner:
        return Owner(FarmIdentity.of(self.farm), self.vm)

    @property
    def sha256(self) -> str:
        """Of all of it."""
        sums = [f"{name} {self.files[name].sha256}" for name in sorted(self.files)]
        return hashlib.sha256("\n".join([self.checkpoint, self.disk, *sums]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class MemoryImage:
    """A complete one."""

    place: Path
    seal: Seal

    def kept(self) -> KeptMemory:
        """As ``WarmMachines.memories`` has it, by a quick look; but for what its definition tells."""
        seal = self.seal
        return KeptMemory(
            checkpoint=seal.checkpoint, created=seal.created, how=seal.how, size=seal.size,
            vcpus=0, used=sum(blocks(self.place / name) for name in (*_SEALED, FACE)),
            pause=seal.pause, frozen=seal.frozen, quiesced=seal.quiesced, seal=seal.sha256,
            trouble=self._quick_trouble(),
        )  # fmt: skip

    def _quick_trouble(self) -> str:
        """Why it can't be used, as far as a quick look tells; "": nothing is seen."""
        for name, sealed in self.seal.files.items():
            try:
                size = (self.place / name).lstat().st_size
            except OSError as error:
                return f"{self.place / name}: {error.strerror}"
            if size != sealed.facts.size:
                return (
                    f"{self.place / name} has {size} bytes, not the {sealed.facts.size} that were sealed"
                )
        return ""

    def definition(self) -> str:
        """The definition that its machine ran with. WrongState."""
        path = self.place / DEFINITION
        try:
            text = path.read_text(encoding="utf-8")
            ET.fromstring(text)  # noqa: S314 - only whether it can be read
        except (OSError, UnicodeDecodeError, ET.ParseError) as error:
            raise damaged(path, "the definition of its machine", error, "") from error
        return text

    def trouble(self, *, notes: bool = True) -> str:
        """Why it can't be used, by a whole look: whether its files are those that were sealed, and
        whether there is room for its working copy; "": it can be. ``notes``: files that were read whole
        and are right are noted to be so."""
        if trouble := self._quick_trouble():
            return trouble
        try:
            found = {name: FileFacts.of(self.place / name) for name in self.seal.files}
            if any(found[name] != sealed.facts for name, sealed in self.seal.files.items()):
                for name, sealed in self.seal.files.items():
                    if _sum(self.place / name) != sealed.sha256:
                        return f"{self.place / name} is not what was sealed (by its sha256)"
                if notes:
                    self._note(found)
            if MEMORY in self.seal.files and not self._has_face():
                self._need_face(but=blocks(self.place / FACE))
        except OSError as error:
            return file_error(error, self.place, "read").message
        except FarmhandError as error:
            return error.message
        return ""

    def _note(self, found: Mapping[str, FileFacts]) -> None:
        """Note that files with these facts are what was sealed. That spares the next look their sums, no
        more: where it can't be written they are made again."""
        fresh = {name: replace(one, facts=found[name]) for name, one in self.seal.files.items()}
        with contextlib.suppress(FarmhandError):
            if _read(self.place / _SEAL) == self.seal:  # nobody has marked it as another's meanwhile
                _write(self.place / _SEAL, replace(self.seal, files=fresh))

    def face(self, reader: int | None) -> Path:
        """The working copy of its memory, for QEMU to map; made, or made anew, where it isn't as it was
        made. ``reader``: who QEMU runs as, if not ourselves. The caller has checked the image, and no
        machine runs with it. NoSpace, WrongState."""
        face = self.place / FACE
        if self._has_face():
            return face
        fresh = self.place / f"{_NEW}{FACE}"
        try:
            for stale in (fresh, face):  # it may take the very room that the new one needs
                stale.unlink(missing_ok=True)
            self._need_face()
            _copy_sparse(self.place / MEMORY, fresh)
            if reader is not None:
                os.chown(fresh, reader, -1)
            fresh.replace(face)
            note = json.dumps(asdict(_FaceNote.of(face))).encode()
            write_atomic(self.place / _FACE_NOTE, note, mode=0o600)
        except OSError as error:
            raise file_error(error, face, "write") from error
        return face

    def _has_face(self) -> bool:
        """Whether its working copy is as it was made."""
        with contextlib.suppress(OSError, Malformed):
            note = made(_FaceNote, json_object(read_file(self.place / _FACE_NOTE)))
            return note == _FaceNote.of(self.place / FACE)
        return False

    def _need_face(self, but: int = 0) -> None:
        """NoSpace unless there is room for its working copy. ``but``: bytes that are free by then."""
        memory = self.place / MEMORY
        need(self.place, max(0, blocks(memory) - but), f"the working copy of {memory}")


@dataclass(frozen=True, slots=True)
class LostImage:
    """One that was kept with a checkpoint, and isn't there any more, or can't be told from any other
    files."""

    place: Path
    checkpoint: Checkpoint
    why: str

    def kept(self) -> KeptMemory:
        """As ``WarmMachines.memories`` has it."""
        return KeptMemory(
            checkpoint=self.checkpoint.name, created=self.checkpoint.created,
            how="read" if (self.place / SAVED).exists() else "mapped", size=0, vcpus=0,
            used=sum(blocks(path) for path in matching(self.place, "*")),
            pause=0.0, quiesced=False, seal="", trouble=self.why,
        )  # fmt: skip


class MemoryImages:
    """The images of one farm's machines. Any number of processes may hold one of these. Who changes a
    machine's images holds its lock."""

    def __init__(self, place: MemoryPlace) -> None:
        self._root = place.root
        self._farm = place.farm
        self.reader = place.reader

    def of(self, machine: str) -> Mapping[str, MemoryImage]:
        """By checkpoint; the complete ones of this farm."""
        found: dict[str, MemoryImage] = {}
        for place in matching(self._root / machine, "[!.]*"):
            seal = _read(place / _SEAL)
            if seal is not None and self._is_ours(place, seal):
                found[place.name] = MemoryImage(place, seal)
        return found

    def _is_ours(self, place: Path, seal: Seal) -> bool:
        here = (self._farm, place.parent.name, place.name)
        return (seal.owner.farm, seal.machine, seal.checkpoint) == here

    def place_of(self, machine: str, name: str) -> Path:
        """Where a complete one is, if there is one."""
        return self._root / machine / name

    def has_any(self, machine: str) -> bool:
        """Whether there are any, or were; a quick look."""
        home = self._root / machine
        return bool(matching(home, "[!.]*") or matching(home, f"{_KEPT}*"))

    def kept_with(self, disk: Disk, checkpoint: Checkpoint) -> MemoryImage | LostImage | None:
        """The one that was kept with that checkpoint of the disk; None: none was."""
        place = self.place_of(disk.machine, checkpoint.name)
        seal = _read(place / _SEAL)
        if seal is not None:
            its = seal.disk == checkpoint.id and self._is_ours(place, seal)
            return MemoryImage(place, seal) if its else None
        known = self._noted(disk.machine, checkpoint.name)
        if known not in ("", checkpoint.id):
            return None
        if place.is_dir():
            return LostImage(place, checkpoint, f"its seal can't be read: {place / _SEAL}")
        return LostImage(place, checkpoint, f"it is gone from {place}") if known else None

    def need(self, sizes: Mapping[str, int]) -> None:
        """NoSpace unless images of so many bytes of these machines fit, all together."""
        make_directory(self._root, mode=0o711)
        need(self._root, sum(sizes.values()), f"the memory of {', '.join(sizes)}")

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Within it what the file system refuses is an error of ours."""
        try:
            yield
        except OSError as error:
            raise file_error(error, Path(error.filename or self._root), "write") from error

    @contextlib.contextmanager
    def new(self, machine: str, name: str) -> Iterator[Path]:
        """A directory for an image under construction. It is removed at the end, unless ``finish`` gave
        it its name, all of it is noted to be there (``note_unsealed``), a machine has its memory nowhere
        else (``ONLY``), or isn't certain to run (``HELD``)."""
        home = self._root / machine
        make_directory(home, mode=0o711)
        place = home / f"{_NEW}{secrets.token_hex(4)}-{name}"
        with FileLock(place.with_name(f"{place.name}.lock")).hold(remove=True):
            try:
                make_directory(place, mode=0o711)
                yield place
            finally:
                if place.exists() and not any((place / name).exists() for name in _STAYS):
                    shutil.rmtree(place, ignore_errors=True)

    def finish(self, place: Path, seal: Seal) -> MemoryImage:
        """Seal what is there and give it its name; then it is complete, also after a power cut. Reads
        it whole. ``seal``: all of it but the files. NoSpace, WrongState."""
        final = self.place_of(seal.machine, seal.checkpoint)
        try:
            files: dict[str, SealedFile] = {}
            for path in (place / name for name in _SEALED if (place / name).exists()):
                path.chmod(0o400)
                sync(path)
                files[path.name] = SealedFile(facts=FileFacts.of(path), sha256=_sum(path))
            sealed = replace(seal, files=files)
            _write(place / _SEAL, sealed)
            if MEMORY in files:
                MemoryImage(place, sealed).face(self.reader)
            for mark in (_UNSEALED, HELD, FROZEN):
                (place / mark).unlink(missing_ok=True)
            sync(place)
            place.rename(final)
            sync(final.parent)
        except OSError as error:
            raise file_error(error, final, "seal") from error
        write_atomic(self._note_of(seal.machine, seal.checkpoint), seal.disk.encode(), mode=0o600)
        return MemoryImage(final, sealed)

    def note_unsealed(self, place: Path, seal: Seal) -> None:
        """Note that all of an image is there, but for its sums. It isn't synced: see the module's
        docstring. NoSpace, WrongState."""
        _write(place / _UNSEALED, seal, boot=boot_id())

    def finish_unsealed(self, place: Path, disks: Mapping[str, str]) -> str:
        """Finish an image that was noted so in this boot and that nobody works on any more, if the
        disk's checkpoint that it belongs to is there (``disks``: ids by name). Returns its name; "": it
        can't be."""
        seal = _read(place / _UNSEALED, boot=boot_id())
        if seal is None or disks.get(seal.checkpoint) != seal.disk:
            return ""
        if self.place_of(seal.machine, seal.checkpoint).exists():
            return ""
        self.finish(place, seal)
        return seal.checkpoint

    def remove(self, machine: str, name: str | None = None) -> None:
        """One, or all of the machine's with what is left of others. Nothing is done if there is none."""
        home = self._root / machine
        try:
            for note in matching(home, f"{_KEPT}*") if name is None else [self._note_of(machine, name)]:
                note.unlink(missing_ok=True)
            for place in matching(home, "[!.]*") if name is None else [home / name]:
                if place.is_dir():
                    gone = home / f"{_GONE}{secrets.token_hex(4)}-{place.name}"
                    place.rename(gone)
        except OSError as error:
            raise file_error(error, home, "remove what is in") from error
        if name is None:
            self.sweep(machine, all_=True)
        else:  # what is under construction beside it is for recovery
            self._sweep_gone(home)

    def sweep(self, machine: str, *, all_: bool = False) -> None:
        """Remove what nobody works on any more; with ``all_`` also what may be only there."""
        home = self._root / machine
        half = [place for place in self.half_made(machine) if all_ or not is_only(place)]
        for place in half:
            shutil.rmtree(place, ignore_errors=True)
        self._sweep_gone(home)
        for lock in matching(home, f"{_NEW}*.lock"):
            if not lock.with_suffix("").exists() and not FileLock(lock).held():
                lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            home.rmdir()

    @staticmethod
    def _sweep_gone(home: Path) -> None:
        for gone in matching(home, f"{_GONE}*"):
            shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            home.rmdir()

    def half_made(self, machine: str) -> tuple[Path, ...]:
        """Those under construction that nobody works on any more."""
        places = matching(self._root / machine, f"{_NEW}*")
        return tuple(p for p in places if p.is_dir() and not FileLock(_lock_of(p)).held())

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        for place in matching(self._root / machine, "[!.]*"):
            seal = _read(place / _SEAL)
            if seal and seal.machine == machine and seal.owner.farm == whose:
                _write(place / _SEAL, replace(seal, farm=self._farm.mark))

    def rename(self, machine: str, to: str, owner: Owner, step: StepFn) -> None:
        """Give all of a machine's to another name, which has none. Safe to do again. Between the two
        steps they are nobody's."""
        home, new = self._root / machine, self._root / to
        for place in self.half_made(machine):
            if any((place / mark).exists() for mark in _STAYS):
                raise WrongState(
                    f"a memory of {machine} is under construction, and not recovered yet: {place}",
                    remedy=Call("recover"),
                )
        if home.is_dir():
            self.sweep(machine)
        if home.is_dir():
            step(f"give the memory of {machine} to {to}")
            try:
                home.rename(new)
            except OSError as error:
                raise file_error(error, new, "write") from error
            sync(self._root)
        for place in matching(new, "[!.]*"):
            seal = _read(place / _SEAL)
            if seal and seal.owner.farm == self._farm and (seal.machine, seal.vm) != (to, owner.vm):
                step(f"mark {place} as {to}'s")
                _write(place / _SEAL, replace(seal, machine=to, vm=owner.vm))

    def machines(self) -> Sequence[str]:
        """Those of this farm that have any, or had."""
        homes = matching(self._root, "[!.]*")
        return [home.name for home in homes if self.of(home.name) or matching(home, f"{_KEPT}*")]

    def leftovers(
        self, disks: Mapping[str, Mapping[str, str]], missed: Collection[str] = ()
    ) -> Iterator[Leftover]:
        """Those that belong to nothing. ``disks``: the ids of the checkpoints of each machine that has a
        disk, by name. ``missed``: the machines whose disks may be away, if they have none."""
        for home in matching(self._root, "[!.]*"):
            for place in (*matching(home, f"{_GONE}*"), *self.half_made(home.name)):
                why = "its VM's memory" if is_only(place) else "under construction, or going"
                yield _left(place, None, f"{why}, when it was killed")
            kept, whole = disks.get(home.name), self.of(home.name)
            for place in matching(home, "[!.]*"):
                image = whole.get(place.name)
                known = image.seal.disk if image else self._noted(home.name, place.name)
                if image is None and not (place.is_dir() and (known or _has_seal(place))):
                    continue  # not ours
                if image is None and _read(place / _SEAL):  # another's
                    continue
                if kept is None and home.name in missed:
                    continue
                disk = kept.get(place.name) if kept else None
                if disk is None or disk != (known or disk):
                    why = f"its disk has no such checkpoint {place.name}"
                    if kept is None:
                        why = "its VM has no disk"
                    yield _left(place, image.seal.owner if image else None, why)

    def discard(
        self, leftover: Leftover, disks: Mapping[str, Mapping[str, str]], missed: Collection[str] = ()
    ) -> None:
        """Looked up again first."""
        if any(leftover.ref == one.ref for one in self.leftovers(disks, missed)):
            place = Path(leftover.ref)
            shutil.rmtree(place, ignore_errors=True)
            for beside in (_lock_of(place), self._note_of(place.parent.name, place.name)):
                beside.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                place.parent.rmdir()

    def _note_of(self, machine: str, name: str) -> Path:
        return self._root / machine / f"{_KEPT}{name}"

    def _noted(self, machine: str, name: str) -> str:
        """The id of the disk's checkpoint that it was kept with; "": nobody knows."""
        try:
            return read_file(self._note_of(machine, name)).decode(errors="replace")
        except (OSError, Malformed):
            return ""


def name_of(place: Path) -> str:
    """The checkpoint's, of one under construction."""
    return place.name.removeprefix(_NEW).partition("-")[2]


def is_only(place: Path) -> bool:
    """Whether a machine that is off may have had its memory nowhere else."""
    return (place / ONLY).exists() or (place / APART).exists()


def note_only(place: Path) -> None:
    """Note, before its machine goes off, that its memory will be nowhere else. NoSpace, WrongState."""
    write_atomic(place / ONLY, boot_id().encode(), mode=0o600)


def is_of_this_boot(place: Path) -> bool:
    """Whether that was noted since this machine booted: else what wasn't synced may be lost."""
    try:
        return read_file(place / ONLY).decode(errors="replace") == boot_id()
    except (OSError, Malformed):
        return False


def set_apart(place: Path) -> None:
    """What can't be given back. WrongState."""
    try:
        (place / ONLY).replace(place / APART)
        (place / HELD).unlink(missing_ok=True)
    except OSError as error:
        raise file_error(error, place, "set apart") from error


def need(place: Path, size: int, what: str) -> None:
    """NoSpace unless so many bytes fit on the file system there, and leave some free."""
    free = shutil.disk_usage(place).free
    if free < size + _SPARE:
        raise NoSpace(
            f"{place}: {format_size(free)} free, {what} needs {format_size(size + _SPARE)}",
            remedy=f"make room on the file system of {place}",
        )


def _left(place: Path, owner: Owner | None, why: str) -> Leftover:
    used = sum(blocks(path) for path in matching(place, "*"))
    return Leftover(
        kind="memory", ref=str(place), owner=owner, created=changed(place), bytes=used, why=why
    )


def _has_seal(place: Path) -> bool:
    """Whether there is one, be it damaged."""
    return os.path.lexists(place / _SEAL)


def _lock_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.lock")


def _sum(path: Path) -> str:
    """The sha256 of its size and of each part of it that isn't all zeros, with its place. Holes, of
    which a guest's memory is full, are not read; where a backup filled them the sum is the same."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(f"{size}\n".encode())
        done = 0
        for start, end in _extents(file.fileno()):
            for place in range(max(done, start - start % _PART), end, _PART):
                part = os.pread(file.fileno(), _PART, place)
                if part != _ZEROS[: len(part)]:
                    digest.update(f"{place} {len(part)}\n".encode())
                    digest.update(part)
                done = place + _PART
        return digest.hexdigest()


def _extents(file: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each part that is no hole (lseek(2), SEEK_DATA)."""
    end = 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data any more
                return
            raise
        end = os.lseek(file, start, os.SEEK_HOLE)
        yield start, end


def _write(path: Path, seal: Seal, **besides: str) -> None:
    facts = asdict(seal) | {"farmhand": _FORMAT, "created": seal.created.isoformat(), **besides}
    write_atomic(path, json.dumps(facts, indent=1).encode(), mode=0o600)


def _read(path: Path, **besides: str) -> Seal | None:
    """None if there is none, or a damaged one, or another farmhand's, or without what was written
    ``besides``."""
    try:
        found = json_object(read_file(path))
        wanted = {"farmhand": _FORMAT, **besides}
        return made(Seal, found) if found | wanted == found else None
    except (OSError, Malformed):
        return None


def _copy_sparse(source: Path, target: Path) -> None:
    """Holes stay holes. Where the file system can, both share their blocks (copy_file_range(2))."""
    with source.open("rb") as old, target.open("xb") as new:
        os.fchmod(new.fileno(), 0o600)
        size = os.fstat(old.fileno()).st_size
        os.ftruncate(new.fileno(), size)
        for begin, end in _extents(old.fileno()):
            start = begin
            while start < end:
                copied = os.copy_file_range(old.fileno(), new.fileno(), end - start, start, start)
                if copied == 0:
                    raise DriverFailed(f"{source} became shorter while it was copied")
                start += copied
