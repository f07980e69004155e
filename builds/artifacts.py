"""What a build made, copied to a directory of the admin's: all of it or nothing, and nothing that is
there is overwritten."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from builds.record import FileRecord, find_record
from host.files import check_room, file_error, open_new, part_of, sync
from host.paths import FarmPaths
from inventory.errors import Call, Conflict, NotFound, WrongState, some

_HOME = "artifacts"
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class MadeFiles:
    """``build``: its id. ``directory``: of its record, to which the files' paths are relative."""

    build: str
    result: str
    directory: Path
    files: Sequence[FileRecord]

    def files_as_data(self) -> list[dict[str, object]]:
        return [{**asdict(file), "place": str(self.directory / file.path)} for file in self.files]

    def named(self) -> Iterator[tuple[str, FileRecord]]:
        """Each by its path in the directory that they are copied to: its name, or where several steps
        made one of that name as the record keeps them apart. WrongState for a record that leads
        elsewhere."""
        for file in self.files:
            parts = PurePosixPath(file.path).parts
            if parts[:1] != (_HOME,) or len(parts) < 2 or ".." in parts:
                raise WrongState(
                    f"build {self.build}: its record says that {file.name} is in {file.path!r}, where "
                    "no artifact is",
                    remedy=f"look into {self.directory}",
                )
            yield "/".join(parts[1:]), file


@dataclass(frozen=True, slots=True)
class CopiedFiles:
    """By their paths below the directory. ``same``: they were there, with the very bytes."""

    copied: tuple[str, ...]
    same: tuple[str, ...]


def made_by(paths: FarmPaths, build: str, *, package: bool) -> MadeFiles:
    """``build``: as ``find_record`` takes it; a ``package``'s build, such as hello/7. NotFound,
    WrongState."""
    if package:
        from builds.packages.record import PackageRecords

        of_package = PackageRecords(paths).find(build)
        return MadeFiles(
            of_package.id, of_package.result, of_package.directory, of_package.outputs
        )  # fmt: skip
    record = find_record(paths, build)
    return MadeFiles(record.id, record.verdict, record.directory, record.outputs)


def copies_wanted(made: MadeFiles, target: Path) -> CopiedFiles:
    """What ``copy_artifacts`` would copy. NotFound: it made nothing. Conflict: other files have these
    names. WrongState: one can't be read."""
    if not made.files:
        raise NotFound(
            f"build {made.build} ({made.result}) made no files", remedy=("builds: ", Call("history"))
        )
    if target.exists() and not target.is_dir():
        raise Conflict(f"{target} is no directory", remedy="name another")
    same, others, wanted = [], [], []
    for name, file in made.named():
        place = target / name
        if not os.path.lexists(place):
            wanted.append(name)
        elif _is(place, file):
            same.append(name)
        else:
            others.append(name)
    if others:
        raise Conflict(
            f"{target} has others by these names: {some(others)}; nothing was copied",
            remedy="move them away, or name another directory",
        )
    return CopiedFiles(tuple(wanted), tuple(same))


def copy_artifacts(made: MadeFiles, target: Path) -> CopiedFiles:
    """Copy all into ``target``, each with the bytes that the record has. A directory that isn't there
    yet appears with all of them in it. NotFound, Conflict, WrongState, NoSpace: nothing was copied."""
    done = copies_wanted(made, target)
    files = {name: file for name, file in made.named() if name in done.copied}
    fresh = not target.exists()
    home = target.parent if fresh else target
    try:
        home.mkdir(parents=True, exist_ok=True)
        with part_of(target.name, home) as part:
            check_room(part, sum(file.size for file in files.values()))
            for name, file in files.items():
                _copy(made, file, part / name)
            if fresh:
                part.chmod(0o755)
                part.rename(target)
            else:
                _place(part, target, done.copied)
        sync(target)
    except OSError as error:
        raise file_error(error, target, "write in") from error
    return done


def _copy(made: MadeFiles, file: FileRecord, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    source = made.directory / file.path
    digest = hashlib.sha256()
    try:
        handle = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise file_error(error, source, "read") from error
    with os.fdopen(handle, "rb") as opened, open_new(to, mode=0o644) as out:
        while data := opened.read(_BLOCK):
            digest.update(data)
            out.write(data)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != file.sha256:
        raise WrongState(
            f"{source} has other bytes than its record says (sha256 {file.sha256[:12]}...); nothing was "
            "copied",
            remedy="it was changed, or the disk is bad; build it again",
        )


def _place(part: Path, target: Path, names: Sequence[str]) -> None:
    """Give them their names, where nobody has them. What was given is taken back where one can't be."""
    with contextlib.ExitStack() as undo:
        for name in names:
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                _link(part / name, place)
            except FileExistsError:
                raise Conflict(
                    f"{place} was just made by somebody else; nothing was copied", remedy="look at it"
                ) from None
            undo.callback(place.unlink, missing_ok=True)
        undo.pop_all()


def _link(file: Path, place: Path) -> None:
    """FileExistsError."""
    try:
        os.link(file, place)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))  # vfat has no second names
        file.replace(place)


def _is(place: Path, file: FileRecord) -> bool:
    try:
        found = place.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size != file.size:
            return False
        with place.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == file.sha256
    except OSError as error:
        if isinstance(error, FileNotFoundError):  # a link to nothing
            return False
        raise file_error(error, place, "read") from error
