"""What lies in a store of qcow2 files: whose it is, what killed operations left, what isn't ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from host.file_lock import FileLock
from host.files import blocks, changed, matching
from hypervisors.api import Leftover, Owner
from hypervisors.disks.qcow2.format import read_header
from hypervisors.disks.qcow2.store import NEW, Mark, ToldFn, describe, read_mark, read_template
from hypervisors.ownership import FarmIdentity
from inventory.errors import DriverFailed

CHECKPOINT = "checkpoint-"
NEXT = "next-"
GONE = "gone.qcow2"


def marks(vms: Path, damaged: ToldFn | None = None) -> Iterator[Mark]:
    """The marks of all VMs in the store, whichever farm's they are. ``damaged``: told of those that
    are."""
    for home in matching(vms, "*"):
        if not home.name.startswith(".") and (mark := read_mark(home, damaged=damaged)):
            yield mark


def leans_on(home: Path, template: Path) -> bool:
    """Whether an image in that directory has the template below it, whatever its mark says."""
    for image in matching(home, "*.qcow2"):
        with contextlib.suppress(DriverFailed, OSError):  # no image of ours
            backing = read_header(image).backing
            if backing and (home / backing).resolve() == template.resolve():
                return True
    return False


def half_made(frozen: Path) -> bool:
    """Whether a checkpoint was cut off: its file is still the same as the disk's."""
    try:
        return frozen.samefile(frozen.parent / "disk.qcow2")
    except FileNotFoundError:
        return False


def in_between(home: Path) -> Path | None:
    """The file that a running machine was to move to, or has moved to, for a checkpoint that is neither
    there nor not there; None: there is no such checkpoint."""
    for path in matching(home, f"{NEXT}*.qcow2"):
        if half_made(home / path.name.replace(NEXT, CHECKPOINT, 1)):
            return path
    return None


def moved_to(fresh: Path, opened: Path | None) -> bool:
    """Whether the machine has moved to that file, or may have. ``opened``: what it has open, if it
    runs."""
    from hypervisors.disks.images import written_by_qemu

    with contextlib.suppress(FileNotFoundError):
        if opened is not None and opened.samefile(fresh):
            return True
    try:
        if not read_header(fresh).empty:
            return True
    except DriverFailed:  # it was whole when it was made: somebody wrote to it
        return True
    with fresh.open("rb") as file:
        return written_by_qemu(file)


def kept_alone(home: Path) -> bool:
    """Whether somebody removed the disk and its checkpoints are still there. That is no leftover of a
    destroy."""
    if (home / "disk.qcow2").exists() or (home / GONE).exists():
        return False
    return bool(matching(home, f"{CHECKPOINT}*.qcow2"))


def find_leftovers(root: Path, farm: FarmIdentity, *, at: Path | None = None) -> list[Leftover]:
    """That farm's leftovers, and those of processes that died before they could mark them. ``at``: look
    at this VM's directory only, or at the one that holds it."""
    homes = [home for home in (at, at.parent) if home.parent == root / "vms"] if at else []
    seen = (mark for home in homes if (mark := read_mark(home))) if at else marks(root / "vms")
    mine = [mark for mark in seen if mark.owner.farm == farm]
    return [*_dead_temporaries(root, mine, farm), *_half_templates(root, farm), *_half_disks(root, mine)]


def strangers(root: Path, farm: FarmIdentity) -> list[Path]:
    """Files and links below ``root`` that are no template's and no disk's of this farm, and no lock or
    temporary name of ours."""
    return [
        path
        for path in sorted(root.rglob("*"))
        if (path.is_symlink() or not path.is_dir()) and not _of_ours(root, path, farm)
    ]


def _of_ours(root: Path, path: Path, farm: FarmIdentity) -> bool:
    if path.name == ".lock" or any(part.startswith(NEW) for part in path.relative_to(root).parts):
        return True
    if path.parent == root / "templates":
        image = path.with_name(path.name.removesuffix(".json") + ".qcow2")
        image = path if path.suffix == ".qcow2" else image
        template = read_template(image, half=True)
        return path in (image, describe(image)) and template is not None and template.farm == farm
    mark = read_mark(path.parent) if path.parent.parent == root / "vms" else None
    if mark is None or mark.owner.farm != farm:
        return False
    named = any(path.match(f"{kind}*.qcow2") for kind in (CHECKPOINT, NEXT))
    return named or path.name in ("owner.json", "disk.qcow2", GONE)


def _dead_temporaries(root: Path, mine: list[Mark], farm: FarmIdentity) -> Iterator[Leftover]:
    places = [root / "templates", root / "vms", *(root / "vms" / mark.machine for mark in mine)]
    for path in (p for place in places for p in matching(place, f"{NEW}*")):
        twin = path if path.suffix == ".lock" else path.with_name(path.name + ".lock")
        if FileLock(twin).held() or (path.suffix != ".lock" and not path.exists()):
            continue
        if path.is_symlink():  # we make none: what it leads to is somebody's
            continue
        mark = read_mark(path, moved=True) if path.is_dir() else None
        if mark and mark.owner.farm != farm:
            continue
        owner = mark.owner if mark else None
        yield _leftover("file", path, owner, "under construction when it was killed")


def _half_templates(root: Path, farm: FarmIdentity) -> Iterator[Leftover]:
    for path in matching(root / "templates", "*.json"):
        image = path.with_name(path.name.removesuffix(".json") + ".qcow2")
        half = None if image.exists() else read_template(image, half=True)
        if half and half.farm == farm:
            yield _leftover("template", path, None, "its image is gone")


def _half_disks(root: Path, mine: list[Mark]) -> Iterator[Leftover]:
    for mark in mine:
        home = root / "vms" / mark.machine
        if not (home / "disk.qcow2").exists():
            if not kept_alone(home):
                yield _leftover("disk", home, mark.owner, "half removed")
            continue
        between = in_between(home)
        for path in matching(home, f"{CHECKPOINT}*.qcow2"):
            if half_made(path) and between != home / path.name.replace(CHECKPOINT, NEXT, 1):
                yield _leftover("checkpoint", path, mark.owner, "half made")
        for path in matching(home, f"{NEXT}*.qcow2"):
            with contextlib.suppress(FileNotFoundError):  # with another name it is a disk, or was one
                if path != between and path.stat().st_nlink == 1:
                    yield _leftover("file", path, mark.owner, "under construction when it was killed")


def _leftover(kind: str, path: Path, owner: Owner | None, why: str) -> Leftover:
    return Leftover(
        kind=kind,
        ref=str(path),
        owner=owner,
        created=changed(path),
        bytes=sum(map(blocks, [path, *matching(path, "*")])),
        why=why,
    )
