"""Memory images: the files of warm checkpoints, their seals, and the working copy that QEMU maps.

    ROOT/MACHINE/NAME/        complete, or it has another name
        memory                the guest's memory, sparse; sealed (0400)
        state                 its devices, as QEMU's incoming migration; sealed
        saved                 instead of these two where memory can't be mapped: libvirt's save image
        machine.xml           the definition it ran with; sealed
        seal.json             what they are: whose, of which disk's checkpoint, sizes and sums
        face                  a copy of ``memory`` for QEMU to map; face.json: as it was made
    ROOT/MACHINE/.farmhand-new-*, .farmhand-gone-*   under construction while its .lock is held, or going

Why a copy: QEMU (7.2, and later ones unless the file is opened for reading only, from 8.2) opens the
file for writing although it maps it privately, and when the guest gives memory back by its balloon QEMU
punches holes into the file (ram_block_discard_range() in softmmu/physmem.c). So a guest could change
what it is put back to. The copy's inode, size, times and blocks tell whether that happened; then it is
made anew. Nobody but us may even read the sealed files.

A seal is checked whole once, when it is made, and then by the files' inode, size, mtime and ctime, which
nobody can set back (inode(7)). Where these differ, as after a restore from a backup, the files are read
whole again, once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from host.documents import Malformed, json_object, made, read_file
from host.file_lock import FileLock
from host.files import blocks, changed, file_error, make_directory, matching, sync, write_atomic
from host.processes import boot_id
from hypervisors.api import KeptMemory, Leftover, Owner, StepFn
from hypervisors.libvirt.warm.place import MemoryPlace
from hypervisors.ownership import FarmIdentity
from inventory.errors import DriverFailed, NoSpace, WrongState
from inventory.sizes import format_size

_FORMAT = 1
_NEW, _GONE = ".farmhand-new-", ".farmhand-gone-"
_SEAL, _UNSEALED, _FACE_NOTE = "seal.json", "unsealed.json", "face.json"
MEMORY, STATE, DEFINITION, FACE = "memory", "state", "machine.xml", "face"
SAVED = "saved"
"""libvirt's save image: memory and devices in one, where memory is read back."""
ONLY, APART = "only", "apart"
"""Beside such an image: its machine is off, or about to be, and has its memory nowhere else; it could
not be given back then, and by now the disk may be another."""
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
        """As ``WarmMachines.memories`` has it, by a quick look."""
        seal = self.seal
        return KeptMemory(
            checkpoint=seal.checkpoint, created=seal.created, how=seal.how, size=seal.size,
            used=sum(blocks(self.place / name) for name in (*_SEALED, FACE)),
            pause=seal.pause, frozen=seal.frozen, quiesced=seal.quiesced, seal=seal.sha256,
            trouble=self._trouble(),
        )  # fmt: skip

    def _trouble(self) -> str:
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

    def check(self) -> None:
        """DriverFailed unless the files are those that were sealed."""
        if trouble := self._trouble():
            raise _unusable(trouble)
        found = {name: FileFacts.of(self.place / name) for name in self.seal.files}
        if all(found[name] == sealed.facts for name, sealed in self.seal.files.items()):
            return
        for name, sealed in self.seal.files.items():
            if _sum(self.place / name) != sealed.sha256:
                raise _unusable(f"{self.place / name} is not what was sealed (by its sha256)")
        fresh = {name: replace(one, facts=found[name]) for name, one in self.seal.files.items()}
        _write(self.place / _SEAL, replace(self.seal, files=fresh))

    def face(self, reader: int | None) -> Path:
        """The working copy of its memory, for QEMU to map; made, or made anew, where it isn't as it was
        made. ``reader``: who QEMU runs as, if not ourselves. The caller has checked the image, and no
        machine runs with it. NoSpace, WrongState."""
        face, note = self.place / FACE, self.place / _FACE_NOTE
        with contextlib.suppress(OSError, Malformed):
            if made(_FaceNote, json_object(read_file(note))) == _FaceNote.of(face):
                return face
        need(self.place, blocks(self.place / MEMORY), f"the working copy of {self.place / MEMORY}")
        fresh = self.place / f"{_NEW}{FACE}"
        try:
            fresh.unlink(missing_ok=True)
            _copy_sparse(self.place / MEMORY, fresh)
            if reader is not None:
                os.chown(fresh, reader, -1)
            fresh.replace(face)
            write_atomic(note, json.dumps(asdict(_FaceNote.of(face))).encode(), mode=0o600)
        except OSError as error:
            raise file_error(error, face, "write") from error
        return face


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
            if seal is None or seal.owner.farm != self._farm:
                continue
            if (seal.machine, seal.checkpoint) == (machine, place.name):
                found[place.name] = MemoryImage(place, seal)
        return found

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
        it whole. ``seal``: all of it but the files. OSError."""
        files: dict[str, SealedFile] = {}
        for path in (place / name for name in _SEALED if (place / name).exists()):
            path.chmod(0o400)
            sync(path)
            files[path.name] = SealedFile(facts=FileFacts.of(path), sha256=_sum(path))
        final = self._root / seal.machine / seal.checkpoint
        sealed = replace(seal, files=files)
        _write(place / _SEAL, sealed)
        if MEMORY in files:
            MemoryImage(place, sealed).face(self.reader)
        for mark in (_UNSEALED, HELD, FROZEN):
            (place / mark).unlink(missing_ok=True)
        sync(place)
        place.rename(final)
        sync(final.parent)
        return MemoryImage(final, sealed)

    def note_unsealed(self, place: Path, seal: Seal) -> None:
        """Note that all of an image is there, but for its sums."""
        _write(place / _UNSEALED, seal)

    def finish_unsealed(self, place: Path, disks: Mapping[str, str]) -> str:
        """Finish an image that was noted so and that nobody works on any more, if the disk's checkpoint
        that it belongs to is there (``disks``: ids by name). Returns its name; "": it can't be."""
        seal = _read(place / _UNSEALED)
        if seal is None or disks.get(seal.checkpoint) != seal.disk:
            return ""
        if (self._root / seal.machine / seal.checkpoint).exists():
            return ""
        self.finish(place, seal)
        return seal.checkpoint

    def remove(self, machine: str, name: str | None = None) -> None:
        """One, or all of the machine's with what is left of others. Nothing is done if there is none."""
        home = self._root / machine
        for place in matching(home, "[!.]*") if name is None else [home / name]:
            if place.is_dir():
                gone = home / f"{_GONE}{secrets.token_hex(4)}-{place.name}"
                place.rename(gone)
        self.sweep(machine, all_=name is None)

    def sweep(self, machine: str, *, all_: bool = False) -> None:
        """Remove what nobody works on any more; with ``all_`` also what may be only there."""
        home = self._root / machine
        half = [place for place in self.half_made(machine) if all_ or not is_only(place)]
        for gone in (*matching(home, f"{_GONE}*"), *half):
            shutil.rmtree(gone, ignore_errors=True)
        for lock in matching(home, f"{_NEW}*.lock"):
            if not lock.with_suffix("").exists() and not FileLock(lock).held():
                lock.unlink(missing_ok=True)
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

    def leftovers(self, disks: Mapping[str, Mapping[str, str]]) -> Iterator[Leftover]:
        """Those that belong to nothing. ``disks``: the ids of the checkpoints of each machine that has a
        disk, by name."""
        for home in matching(self._root, "[!.]*"):
            for place in (*matching(home, f"{_GONE}*"), *self.half_made(home.name)):
                why = "its VM's memory" if is_only(place) else "under construction, or going"
                yield _left(place, None, f"{why}, when it was killed")
            for name, image in self.of(home.name).items():
                kept = disks.get(home.name)
                if kept is None or kept.get(name) != image.seal.disk:
                    why = (
                        "its VM has no disk"
                        if kept is None
                        else f"its disk has no such checkpoint {name}"
                    )
                    yield _left(image.place, image.seal.owner, why)

    def discard(self, leftover: Leftover, disks: Mapping[str, Mapping[str, str]]) -> None:
        """Looked up again first."""
        if any(leftover.ref == one.ref for one in self.leftovers(disks)):
            place = Path(leftover.ref)
            shutil.rmtree(place, ignore_errors=True)
            _lock_of(place).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                place.parent.rmdir()


def name_of(place: Path) -> str:
    """The checkpoint's, of one under construction."""
    return place.name.removeprefix(_NEW).partition("-")[2]


def is_only(place: Path) -> bool:
    """Whether a machine that is off may have had its memory nowhere else."""
    return (place / ONLY).exists() or (place / APART).exists()


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


def _lock_of(place: Path) -> Path:
    return place.with_name(f"{place.name}.lock")


def _unusable(trouble: str) -> WrongState:
    return WrongState(f"its memory can't be used: {trouble}", remedy="")


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


def _write(path: Path, seal: Seal) -> None:
    facts = asdict(seal) | {"farmhand": _FORMAT, "created": seal.created.isoformat()}
    write_atomic(path, json.dumps(facts, indent=1).encode(), mode=0o600)


def _read(path: Path) -> Seal | None:
    """None if there is none, or a damaged one, or another farmhand's."""
    try:
        found = json_object(read_file(path))
        return made(Seal, found) if found.get("farmhand") == _FORMAT else None
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
