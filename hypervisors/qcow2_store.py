"""The files beside the qcow2 images: marks, templates' descriptions, locks; and writing them durably."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from hypervisors.api import Owner, Template
from hypervisors.devices import open_node
from inventory.errors import DriverFailed

NEW = ".farmhand-new-"
CLEAN = "clean"


@dataclass(frozen=True, slots=True)
class Mark:
    """``owner.json``: that this directory holds a disk of ours, and what a reset needs to know."""

    machine: str
    owner: Owner
    template: str
    size: int
    created: datetime

    def document(self) -> bytes:
        return _document(
            {
                "machine": self.machine,
                "farm": self.owner.farm,
                "vm": self.owner.vm,
                "template": self.template,
                "size": self.size,
                "created": self.created.isoformat(),
            }
        )


def read_mark(home: Path, *, moved: bool = False) -> Mark | None:
    """None where there is none, or one that speaks of another directory (a copy somebody made).
    ``moved``: the directory has a temporary name."""
    seen = _read(home / "owner.json")
    if seen is None:
        return None
    try:
        mark = Mark(
            machine=str(seen["machine"]),
            owner=Owner(str(seen["farm"]), str(seen["vm"])),
            template=str(seen["template"]),
            size=int(str(seen["size"])),
            created=datetime.fromisoformat(str(seen["created"])),
        )
    except (KeyError, ValueError):
        return None
    return mark if moved or mark.machine == home.name else None


def write_template(image: Path, template: Template) -> None:
    """The description beside ``image``. ``ref`` is where it is, so it isn't written."""
    facts = asdict(template)
    del facts["ref"]
    write_durably(describe(image), _document({**facts, "created": template.created.isoformat()}))


def describe(image: Path) -> Path:
    """Where the description of that template image is. Not with_suffix: names have dots."""
    return image.with_name(image.name.removesuffix(".qcow2") + ".json")


def read_template(image: Path, *, half: bool = False) -> Template | None:
    """None unless both the image and our description are there (``half``: the description will do)."""
    seen = _read(describe(image))
    if seen is None or not (half or image.exists()):
        return None
    try:
        return Template(
            name=str(seen["name"]),
            generation=int(str(seen["generation"])),
            ref=str(image),
            size=int(str(seen["size"])),
            sha256=str(seen["sha256"]),
            created=datetime.fromisoformat(str(seen["created"])),
            origin=str(seen["origin"]),
            firstboot=str(seen["firstboot"]),
        )
    except (KeyError, ValueError):
        return None


def _document(facts: dict[str, object]) -> bytes:
    return (json.dumps({"farmhand": 1, **facts}, indent=1) + "\n").encode()


def _read(path: Path) -> dict[str, object] | None:
    try:
        seen = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return seen if isinstance(seen, dict) and seen.get("farmhand") == 1 else None


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Complete under its name or not there, also after a power cut (once the directory is synced)."""
    fresh = path.with_name(f"{NEW}{os.getpid()}-{path.name}")
    write_new(fresh, data, mode=mode)
    fresh.replace(path)


def write_new(path: Path, data: bytes, *, mode: int) -> None:
    """A new file whose bytes are on the disk when this returns; its name isn't yet."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.fchmod(handle, mode)
        left = memoryview(data)
        while left:
            left = left[os.write(handle, left) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """fsync(2) a file's or a device's bytes, or a directory's names."""
    handle = open_node(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def blocks(path: Path) -> int:
    """Bytes it takes on its file system; 0 if it is gone."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def matching(directory: Path, pattern: str) -> list[Path]:
    """Sorted. Empty also where the directory goes while it is read: another thread or process may be
    destroying that machine, and a look at all machines must not fail for it."""
    try:
        return sorted(directory.glob(pattern))
    except (FileNotFoundError, NotADirectoryError):
        return []


def changed(path: Path) -> datetime:
    """Its modification time; now, if it is gone."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:
        return datetime.now(UTC)


def reachable(directory: Path, uid: int) -> None:
    """DriverFailed unless that user may pass through to ``directory``: else QEMU would fail later,
    with "permission denied" on a file that is plainly its own."""
    for place in (directory, *directory.parents):
        try:
            seen = place.stat()
        except FileNotFoundError:  # to be made
            continue
        needed = stat.S_IXUSR if seen.st_uid == uid else stat.S_IXOTH
        if not seen.st_mode & needed:
            raise DriverFailed(
                f"{place}: QEMU's user (uid {uid}) may not pass through to its disks below",
                remedy=f"chmod o+x {shlex.quote(str(place))}, "
                "or keep the farm's state elsewhere (FARMHAND_STATE_DIR)",
            )


class FileLock:
    """flock(2) on a file: ends with its holder, however that ends. One object may be used by many
    threads: each use opens the file anew."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def hold(self, *, shared: bool = False, remove: bool = False) -> Iterator[None]:
        """Waits for it. ``remove``: the file goes when it is given back."""
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield
        finally:
            if remove:
                self._path.unlink(missing_ok=True)
            os.close(handle)

    def held(self) -> bool:
        """Whether somebody holds it now."""
        try:
            handle = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False
