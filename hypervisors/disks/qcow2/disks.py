"""Disks as qcow2 files: a template is a sealed image, a VM's disk an overlay over it.

    templates/NAME@N.qcow2, .json     sealed (0400), and what it is; both there, or it isn't a template
    vms/MACHINE/owner.json            our mark: without it the directory is none of ours
                disk.qcow2            what the hypervisor opens
                checkpoint-NAME.qcow2 a former disk.qcow2, frozen (0400)
                next-NAME.qcow2       the disk over that checkpoint, as a running QEMU calls it
                gone.qcow2            the disk, while it is being destroyed with all of its checkpoints
    .farmhand-new-*                   under construction while its .lock is held (flock)
    .lock                             held shared by who adds, exclusively by who removes

Templates, disks and checkpoints belong to QEMU's user, and nobody else may read them: not by a group,
for that of QEMU's user may have ordinary users in it (Debian's is kvm).

Names become real in one rename, and are durable (fsync) before what they replace goes. Backing
files are named relative to the overlay, so the whole directory can move. A disk's base is read from
its own header; ``clean`` has no file of its own, it *is* the template.

A checkpoint is a hard link to the present disk; once a new overlay has taken the disk's name it is
complete. Until then both names are one inode, which is how a half-made one is told.

A checkpoint of a running machine is in between while next-NAME.qcow2, an overlay, is there and
checkpoint-NAME.qcow2 still is the disk's own file. In the pause QEMU moves from the one file to the
other. It opens the former disk again to read only, by the name that it knows of it
(raw_reconfigure_getfd in QEMU's block/file-posix.c). So the disk's name changes after that; next-NAME
stays as another name of the disk while that QEMU runs; and it never means another file: with one name
for all of them, the second overlay's base would be that overlay. Whoever finds things in between asks:
did QEMU move? It did if it has next-NAME open, or wrote to it. Until then the former disk is read-only,
so that no QEMU can be started on what may be a checkpoint.

Several disks are swapped as one in three steps: all fresh overlays are made beside; each takes its
disk's name, while the old file keeps a name of its own; the old ones go. An error gives the old ones
their names back. A kill amid the second step leaves some swapped, and the same call again swaps all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from host.file_lock import FileLock
from host.files import (
    blocks,
    changed,
    file_error,
    make_directory,
    make_file,
    matching,
    reachable,
    sync,
    write_new,
)
from host.run import Runner
from hypervisors.api import (
    CLEAN,
    Callbacks,
    Capacity,
    Checkpoint,
    Directories,
    Disk,
    Foreign,
    Leftover,
    Owner,
    StepFn,
    Template,
    WarnFn,
    check_larger,
    check_one_of,
    check_removable,
    check_template,
    label_taken,
    no_step,
    no_warning,
    not_ours,
    template_in_use,
    too_small,
)
from hypervisors.disks.qcow2.format import LARGEST, Qcow2, empty_overlay, read_header
from hypervisors.disks.qcow2.leftovers import (
    CHECKPOINT,
    GONE,
    NEXT,
    find_leftovers,
    half_made,
    in_between,
    kept_alone,
    leans_on,
    marks,
    moved_to,
)
from hypervisors.disks.qcow2.store import (
    NEW,
    Mark,
    describe,
    read_mark,
    read_template,
    write_durably,
    write_template,
)
from hypervisors.disks.stores import StorePlace
from hypervisors.marks import DamagedMarks
from hypervisors.ownership import FarmIdentity
from inventory.errors import (
    Call,
    Conflict,
    DriverFailed,
    NoSpace,
    NotFound,
    NotOurs,
    UsageError,
    WrongState,
)
from inventory.sizes import format_size

_SEALED = 0o400
_OPEN = 0o600
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Qcow2Disks:
    """Implements ``hypervisors.api.Disks``, ``FarmDisks``, ``GrowableDisks``, ``ChainedDisks``,
    ``LiveDisks`` and ``LostDisks``. Thread-safe; any number of processes may share a root."""

    def __init__(
        self,
        root: Path,
        farm: FarmIdentity,
        runner: Runner,
        *,
        step: StepFn = no_step,
        reader_uid: int | None = None,
        headroom: int = 256 * 2**20,
        warn: WarnFn = no_warning,
    ) -> None:
        """``reader_uid``: who QEMU runs as, if not ourselves: templates and disks are given to it.
        ``headroom``: bytes that must be free before a disk is made."""
        self._root = root.absolute()
        self._farm = farm
        self._runner = runner
        self._step = step
        self._reader = None if reader_uid == os.geteuid() else reader_uid
        self._headroom = headroom
        self._damaged = DamagedMarks(warn).tell
        self._lock = FileLock(self._root / ".lock")

    @classmethod
    def at(
        cls,
        place: StorePlace,
        directories: Directories,
        runner: Runner,
        callbacks: Callbacks,
        reader_uid: int | None,
    ) -> Self:
        """See ``hypervisors.disks.stores.Openable.at``."""
        return cls(
            place.path or directories.farm / "disks", place.farm, runner,
            step=callbacks.step, reader_uid=reader_uid, warn=callbacks.warn,
        )  # fmt: skip

    # -- templates --------------------------------------------------------------------------------

    def seal(self, image: Path, template: Template) -> Template:
        """See ``Disks.seal``. Raw images are converted; hashing takes about a second per GiB.

        UsageError for an image that needs a backing file, or isn't the template's size."""
        label = _plain(template.name) + f"@{template.generation}"
        final = self._templates / f"{label}.qcow2"
        if known := read_template(final):
            if known.farm != self._farm or (image.exists() and not final.samefile(image)):
                raise label_taken(label, known.farm, self._farm)
            image.unlink(missing_ok=True)  # killed right before its last step
            return known
        linked = _same_store(image, self._templates) and self._may_share(image)
        self._need(0 if linked else blocks(image), f"template {label}")
        self._step(f"seal template {label}")
        with self._temporary(self._templates, f"{label}.qcow2") as fresh:
            self._bring(image, fresh)
            header = read_header(fresh)
            if header.backing:
                raise UsageError(
                    f"{image} is an overlay of {header.backing}: it can't stand alone",
                    remedy="flatten it first: qemu-img convert -O qcow2",
                )
            self._give(fresh)
            fresh.chmod(_SEALED)
            sync(fresh)
            with fresh.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            done = replace(template, ref=str(final), sha256=digest, size=header.size, farm=self._farm)
            with self._lock.hold():
                if os.path.lexists(final):  # another was quicker; else its description would be ours
                    there = read_template(final)
                    raise label_taken(label, there.farm if there else None, self._farm)
                write_template(final, done)
                final.hardlink_to(fresh)
                sync(self._templates)
        image.unlink(missing_ok=True)
        return done

    def templates(self) -> Sequence[Template]:
        images = matching(self._templates, "*.qcow2")
        found = (read_template(path, damaged=self._damaged) for path in images)
        return sorted((t for t in found if t), key=lambda t: (t.name, t.generation))

    def remove_template(self, label: str) -> None:
        """See ``Disks.remove_template``; dependents of every farm that shares the store count."""
        path = self._template_path(label)
        with self._lock.hold():
            if not describe(path).exists():
                raise NotFound(f"no template {label}", remedy=(Call("template-list"), " shows them"))
            if known := read_template(path, half=True):
                check_template(label, known.farm, self._farm)
            else:
                raise NotOurs(
                    f"template {label} has a damaged description: whose it is can't be told",
                    remedy=f"set {describe(path)} right, or remove both files by hand",
                )
            damaged: list[Path] = []
            seen = list(marks(self._vms, lambda at, _: damaged.append(Path(at).parent)))
            users = [mark.machine for mark in seen if mark.template == label]
            # Whosever they are, and whatever the mark says: they'd be lost with it.
            homes = (*(self._home(mark.machine) for mark in seen), *damaged)
            users += [home.name for home in homes if leans_on(home, path)]
            if users:
                raise template_in_use(label, users)
            self._step(f"remove template {label}")
            path.unlink(missing_ok=True)
            describe(path).unlink(missing_ok=True)
            sync(self._templates)

    def adopt_template(self, label: str, whose: FarmIdentity) -> None:
        path = self._template_path(label)
        with self._lock.hold():
            known = read_template(path)
            if known is not None and known.farm == whose:
                self._step(f"mark template {label} as ours")
                write_template(path, replace(known, farm=self._farm))
                sync(self._templates)

    # -- disks ------------------------------------------------------------------------------------

    def find(self, machine: str) -> Disk | None:
        """Any farm's: its ``owner`` tells. Reads four small things, starts no process."""
        mark = read_mark(self._home(machine), damaged=self._damaged)
        return self._disk(mark) if mark else None

    def list(self) -> Sequence[Disk]:
        seen = marks(self._vms, self._damaged)
        disks = (self._disk(mark) for mark in seen if mark.owner.farm == self._farm)
        return [disk for disk in disks if disk]

    def others(self) -> Sequence[Foreign]:
        found = (m for m in marks(self._vms) if m.owner.farm.is_namesake(self._farm))
        return [Foreign(mark.machine, mark.owner) for mark in found]

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        """What somebody is still making stays his."""
        home = self._home(machine)
        for place in (*matching(self._vms, f"{NEW}*"), home):
            mark = read_mark(place, moved=place != home)
            if mark is None or (mark.machine, mark.owner.farm) != (machine, whose):
                continue
            if place == home or not FileLock(place.with_name(f"{place.name}.lock")).held():
                self._step(f"mark {place} as ours")
                ours = replace(mark, owner=Owner(self._farm, mark.owner.vm))
                write_durably(place / "owner.json", ours.document())
                sync(place)

    def clone(self, template: Template, machine: str, owner: Owner, size: int) -> Disk:
        home = self._home(machine)
        if size < template.size:
            raise too_small(machine, size, template)
        if size > LARGEST:
            most = format_size(LARGEST)
            raise UsageError(f"a qcow2 disk has at most {most}, and {machine}'s is to have more")
        make_directory(self._vms, mode=0o711)
        if self._reader is not None:
            reachable(self._vms, self._reader)
        self._need(0, f"the disk of {machine}")
        with self._lock.hold(shared=True):
            base = self._template_path(template.label)
            known = read_template(base)
            if known is None:
                raise NotFound(
                    f"no template {template.label}", remedy=(Call("template-list"), " shows them")
                )
            check_template(known.label, known.farm, self._farm)
            self._make_room(home)
            mark = Mark(machine, owner, template.label, -(-size // 512) * 512, datetime.now(UTC))
            self._step(f"clone the disk of {machine} from {template.label}")
            with self._temporary(self._vms, machine) as fresh:
                make_directory(fresh, mode=0o711)
                write_durably(fresh / "owner.json", mark.document())
                self._write_overlay(fresh / "disk.qcow2", mark.size, self._backing(mark, CLEAN))
                sync(fresh)
                try:
                    fresh.rename(home)
                except OSError as error:
                    if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                        raise Conflict(f"{machine} has a disk already") from None
                    raise
                sync(self._vms)
        disk = self._disk(mark)
        assert disk
        return disk

    def checkpoint(self, machine: str, name: str) -> Checkpoint:
        return self.checkpoint_all([machine], name)[machine]

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        """See ``FarmDisks.checkpoint_all``."""
        for machine in machines:
            self.settle_live(machine, None)
        ours = [self._free_name(machine, name) for machine in machines]
        which = ", ".join(machines)
        self._need(0, f"checkpoint {name} of {which}")
        self._step(f"freeze the disk of {which} as {name}")
        frozen = {mark.machine: self._frozen(mark.machine, name) for mark, _ in ours}
        try:
            for mark, disk in ours:
                kept = frozen[mark.machine]
                kept.unlink(missing_ok=True)  # at most a half-made one: the same inode as the disk
                os.utime(disk.path)
                sync(disk.path)  # QEMU may have been told not to: from here on it must last
                kept.hardlink_to(disk.path)
                sync(kept.parent)
            fresh = [(mark, frozen[mark.machine].name) for mark, _ in ours]
            self._swap(fresh, f"give {{}} a fresh disk over {name}")
        except BaseException:
            for kept in frozen.values():
                if half_made(kept):
                    kept.unlink()
            raise
        for kept in frozen.values():
            kept.chmod(_SEALED)
        return {m: _checkpoint(name, kept) for m, kept in frozen.items()}

    def before_live(self, machine: str, name: str) -> None:
        """See ``LiveDisks.before_live``."""
        mark, disk = self._free_name(machine, name)
        if in_between(disk.path.parent):
            raise WrongState(
                f"a checkpoint of {machine} was cut off, and is neither done nor undone",
                remedy="recover it first, or stop the VM",
            )
        self._need(0, f"checkpoint {name} of {machine}")
        self._step(f"make ready to keep the disk of {machine} as {name} while it runs")
        kept, fresh = self._frozen(machine, name), self._next(machine, name)
        try:
            with self._lock.hold(shared=True):
                for path in (kept, fresh):  # what a killed call left: the disk's own file, an empty one
                    path.unlink(missing_ok=True)
                self._write_overlay(fresh, mark.size, kept.name)
                kept.hardlink_to(disk.path)
            sync(disk.path)
            sync(kept.parent)
        except BaseException:
            for path in (kept, fresh):
                path.unlink(missing_ok=True)
            raise

    def checkpoint_live(self, machine: str, name: str, move: Callable[[Path], None]) -> Checkpoint:
        """See ``LiveDisks.checkpoint_live``. Nothing here waits for a disk."""
        self._mark_of(machine)
        kept, fresh = self._frozen(machine, name), self._next(machine, name)
        if in_between(kept.parent) != fresh:
            raise WrongState(f"{machine}: nothing is ready for a checkpoint {name}", remedy="try again")
        kept.chmod(_SEALED)
        move(fresh)
        os.utime(kept)  # QEMU wrote to it last when it closed it
        return _checkpoint(name, kept)

    def settle_live(self, machine: str, opened: Path | None) -> None:
        """See ``LiveDisks.settle_live``."""
        home = self._home(machine)
        mark = read_mark(home)
        if mark is None:
            return
        self._check_farm(mark)
        fresh, disk = in_between(home), home / "disk.qcow2"
        if fresh is not None:
            name = fresh.name.removeprefix(NEXT).removesuffix(".qcow2")
            kept = self._frozen(machine, name)
            if moved_to(fresh, opened):
                self._step(f"let the disk of {machine} grow from {name}")
                sync(kept)  # QEMU may have been told not to: from here on it must last
                with self._lock.hold(shared=True), self._temporary(home, "disk.qcow2") as another:
                    another.hardlink_to(fresh)
                    another.rename(disk)
                    sync(home)
            else:
                self._step(f"undo the checkpoint {name} of {machine}")
                disk.chmod(_OPEN)
                kept.unlink()
                fresh.unlink()
        for path in matching(home, f"{NEXT}*.qcow2") if disk.exists() else ():
            if opened is None or not path.samefile(disk):
                path.unlink(missing_ok=True)

    def restore(self, machine: str, name: str) -> Disk:
        return self.restore_all([machine], name)[0]

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        """See ``FarmDisks.restore_all``. Also for a disk whose file is damaged or gone."""
        ours = [self._mark_of(machine) for machine in machines]
        for machine in machines:
            self.settle_live(machine, None)
        for mark in ours:
            known = [c.name for c in self._checkpoints(mark, self._frozen_files(mark))]
            if name not in known:
                raise NotFound(
                    f"{mark.machine} has no checkpoint {name}", remedy=f"it has: {', '.join(known)}"
                )
            if name == CLEAN and read_template(self._template_path(mark.template)) is None:
                raise NotFound(
                    f"template {mark.template} of {mark.machine} is gone", remedy="clone it anew"
                )
        for mark in ours:
            for path in matching(self._home(mark.machine), f"{CHECKPOINT}*.qcow2"):
                if half_made(path):  # with the disk's name gone it would pass for a whole one
                    path.unlink()
        fresh = [(mark, self._backing(mark, name)) for mark in ours]
        self._swap(fresh, f"swap in a fresh disk of {{}} from {name}")
        disks = [disk for mark in ours if (disk := self._disk(mark))]
        assert len(disks) == len(ours)
        return disks

    def remove_checkpoint(self, machine: str, name: str) -> None:
        """See ``Disks.remove_checkpoint``. Under the lock, for whoever adds holds it, too."""
        with self._lock.hold():
            mark, disk = self._ours(machine)
            frozen = self._frozen(machine, name)
            if in_between(frozen.parent):
                raise WrongState(
                    f"a checkpoint of {machine} was cut off, and is neither done nor undone",
                    remedy="recover it first, or stop the VM",
                )
            check_removable(disk, name, self.grown_from(machine, name))
            self._step(f"remove checkpoint {name} of {mark.machine}")
            frozen.unlink(missing_ok=True)
            sync(frozen.parent)

    def grown_from(self, machine: str, name: str) -> Sequence[str]:
        """See ``ChainedDisks.grown_from``."""
        frozen = self._frozen(machine, name)
        others = (path for path in matching(frozen.parent, f"{CHECKPOINT}*.qcow2") if path != frozen)
        return [
            path.name.removeprefix(CHECKPOINT).removesuffix(".qcow2")
            for path in others
            if Path(read_header(path).backing).name == frozen.name
        ]

    def move(self, machine: str, template: Template) -> Disk:
        """See ``Disks.move``. The mark comes after the disk: until then it is done again."""
        self.settle_live(machine, None)
        mark = self._mark_of(machine)
        known = read_template(self._template_path(template.label))
        if known is None:
            raise NotFound(
                f"no template {template.label}", remedy=(Call("template-list"), " shows them")
            )
        check_template(known.label, known.farm, self._farm)
        if mark.size < known.size:
            raise too_small(machine, mark.size, known)
        self._need(0, f"the disk of {machine}")
        moved = replace(mark, template=known.label, created=datetime.now(UTC))
        backing = self._backing(moved, CLEAN)
        self._swap([(moved, backing)], f"swap in a fresh disk of {{}} from {known.label}")
        self._step(f"note that {machine} is on {known.label}")
        self._remark(moved)
        return self._ours(machine)[1]

    def enlarge(self, machine: str, size: int) -> Disk:
        """See ``GrowableDisks.enlarge``. The mark comes first: a reset after a kill gives it all."""
        self.settle_live(machine, None)
        mark, disk = self._ours(machine)
        size = -(-size // 512) * 512
        check_larger(disk, size)
        if size > LARGEST:
            most = format_size(LARGEST)
            raise UsageError(f"a qcow2 disk has at most {most}, and {machine}'s is to have more")
        self._need(0, f"a larger disk of {machine}")
        larger = replace(mark, size=size)
        self._step(f"make the disk of {machine} {format_size(size)}")
        self._remark(larger)
        header = read_header(disk.path)
        if header.sound and header.empty and header.backing:  # stays provable
            self._swap([(larger, header.backing)], f"swap in a larger disk of {{}} from {disk.base}")
        else:
            self._runner.change("qemu-img", "resize", "-q", "-f", "qcow2", disk.path, str(size))
        return self._ours(machine)[1]

    def rename(self, machine: str, to: str, owner: Owner) -> Disk:
        """See ``Disks.rename``. The directory's new name (rename(2)) is the switch. Until then, and
        until after it, the mark tells both names: so at any time it is the one's disk or the other's."""
        for name in (machine, to):
            self.settle_live(name, None)
        old, new = self._home(machine), self._home(to)
        with self._lock.hold():
            mark, there = read_mark(old), read_mark(new)
            check_one_of(machine, to, both=mark is not None and there is not None)
            if mark is not None:
                self._check_farm(mark)
                if new.exists() and any(new.iterdir()):
                    raise NotOurs(f"{new} holds files that are not farmhand's", remedy="move them away")
                self._step(f"rename the disk of {machine} to {to}")
                both = replace(mark, machine=to, owner=owner, other=(machine, mark.owner.vm))
                write_durably(old / "owner.json", both.document())
                sync(old)
                old.rename(new)
                sync(self._vms)
            found = self._mark_of(to)
            if found.other or found.owner != owner:
                self._step(f"mark the disk of {to} as its alone")
                self._remark(replace(found, owner=owner, other=None))
        return self._ours(to)[1]

    def _remark(self, mark: Mark) -> None:
        home = self._home(mark.machine)
        write_durably(home / "owner.json", mark.document())
        sync(home)

    def pristine(self, machine: str, name: str, *, quick: bool = False) -> bool:
        """See ``Disks.pristine``. The disk's own header proves it: its backing file is that very
        checkpoint, and no cluster of its own is allocated."""
        del quick  # it is anyway
        mark, home = self._mark_of(machine), self._home(machine)
        fresh = in_between(home)
        if fresh is not None and moved_to(fresh, None):
            return False
        try:
            header = read_header(home / "disk.qcow2")
        except FileNotFoundError:
            raise _no_disk(machine) from None
        return header.sound and header.empty and header.backing == self._backing(mark, name)

    def destroy(self, machine: str) -> None:
        """See ``Disks.destroy``. If there is nothing, nothing is done. Files that aren't ours stay, and
        so does their directory."""
        home = self._home(machine)
        mark = read_mark(home)
        if mark is None:
            return
        self._check_farm(mark)
        self._step(f"remove the disk of {machine}")
        try:
            (home / "disk.qcow2").rename(home / GONE)  # from here on it isn't a disk any more
        except FileNotFoundError:
            (home / GONE).touch()
        for path in sorted(home.glob(f"{CHECKPOINT}*.qcow2"), key=changed, reverse=True):
            path.unlink(missing_ok=True)
        for path in (*home.glob(f"{NEXT}*.qcow2"), *home.glob(f"{NEW}*")):
            path.unlink(missing_ok=True)
        (home / GONE).unlink(missing_ok=True)
        (home / "owner.json").unlink(missing_ok=True)  # last: until here a second call goes on
        with contextlib.suppress(OSError):
            home.rmdir()
        sync(self._vms)

    def left(self, machine: str) -> Sequence[Checkpoint]:
        """See ``LostDisks.left``."""
        home = self._home(machine)
        mark = read_mark(home)
        if mark is None or not kept_alone(home):
            return ()
        return self._checkpoints(mark, self._frozen_files(mark))

    def leftovers(self) -> Sequence[Leftover]:
        return find_leftovers(self._root, self._farm)

    def discard(self, leftover: Leftover) -> None:
        """Remove a leftover, which is looked up again first: what is in use by now, or gone, is left
        alone."""
        with self._lock.hold():
            path = Path(leftover.ref)
            if leftover.ref not in (now.ref for now in find_leftovers(self._root, self._farm, at=path)):
                return
            self._step(f"remove the leftover {leftover.ref}")
            if path.is_dir() and path.name.startswith(NEW):
                for file in (path / "disk.qcow2", *path.glob(f"{NEW}*"), path / "owner.json"):
                    file.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.rmdir()
            elif path.is_dir():
                self.destroy(path.name)
            else:
                path.unlink(missing_ok=True)

    def capacity(self) -> Capacity:
        """Size and free space of the store's file system; ``free`` is what an ordinary user may take."""
        place = next(p for p in (self._root, *self._root.parents) if p.exists())
        seen = os.statvfs(place)
        return Capacity(seen.f_blocks * seen.f_frsize, seen.f_bavail * seen.f_frsize)

    # -- places and marks -------------------------------------------------------------------------

    @property
    def _templates(self) -> Path:
        return self._root / "templates"

    @property
    def _vms(self) -> Path:
        return self._root / "vms"

    def _home(self, machine: str) -> Path:
        return self._vms / _plain(machine)

    def _frozen(self, machine: str, name: str) -> Path:
        return self._home(machine) / f"{CHECKPOINT}{_plain(name)}.qcow2"

    def _next(self, machine: str, name: str) -> Path:
        return self._home(machine) / f"{NEXT}{_plain(name)}.qcow2"

    def _template_path(self, label: str) -> Path:
        name, _, generation = label.rpartition("@")
        return self._templates / f"{_plain(name)}@{int(generation)}.qcow2"

    def _mark_of(self, machine: str) -> Mark:
        mark = read_mark(self._home(machine))
        if mark is None:
            raise _no_disk(machine)
        self._check_farm(mark)
        return mark

    def _check_farm(self, mark: Mark) -> None:
        if mark.owner.farm != self._farm:
            raise not_ours(f"the disk of {mark.machine}", mark.owner, self._farm)

    def _ours(self, machine: str) -> tuple[Mark, Disk]:
        mark = self._mark_of(machine)
        disk = self._disk(mark)
        if disk is None:
            raise _no_disk(machine)
        return mark, disk

    def _free_name(self, machine: str, name: str) -> tuple[Mark, Disk]:
        """As ``_ours``. Conflict if it has a checkpoint of that name."""
        mark, disk = self._ours(machine)
        if name == CLEAN or name in (c.name for c in disk.checkpoints):
            raise Conflict(
                f"{machine} has a checkpoint {name} already", remedy="give the new one another name"
            )
        return mark, disk

    def _disk(self, mark: Mark) -> Disk | None:
        home = self._home(mark.machine)
        path = home / "disk.qcow2"
        try:
            header: Qcow2 | None = read_header(path)
        except FileNotFoundError:
            return None
        except DriverFailed:  # damaged by a power cut: still ours to reset or destroy
            header = None
        backing = Path(header.backing).name if header else ""
        base = backing.removeprefix(CHECKPOINT).removesuffix(".qcow2")
        frozen = self._frozen_files(mark)
        return Disk(
            machine=mark.machine,
            owner=mark.owner,
            path=path,
            format="qcow2",
            size=header.size if header else mark.size,
            used=sum(blocks(p) for p in (path, *frozen) if p.exists()),
            template=mark.template,
            base=base if backing.startswith(CHECKPOINT) else CLEAN if header else "",
            checkpoints=self._checkpoints(mark, frozen),
        )

    def _frozen_files(self, mark: Mark) -> Sequence[Path]:
        return matching(self._home(mark.machine), f"{CHECKPOINT}*.qcow2")

    def _checkpoints(self, mark: Mark, frozen: Sequence[Path]) -> tuple[Checkpoint, ...]:
        found = []
        for path in frozen:
            if not half_made(path):
                name = path.name.removeprefix(CHECKPOINT).removesuffix(".qcow2")
                found.append(_checkpoint(name, path))
        found.sort(key=lambda c: (c.created, c.name))
        clean = _checkpoint(CLEAN, self._template_path(mark.template))
        return (replace(clean, created=mark.created), *found)

    def _backing(self, mark: Mark, name: str) -> str:
        """The backing file of a disk that grows from that checkpoint, as the overlay's header has it."""
        if name == CLEAN:
            return f"../../templates/{self._template_path(mark.template).name}"
        return self._frozen(mark.machine, name).name

    # -- changes ----------------------------------------------------------------------------------

    def _swap(self, backings: Sequence[tuple[Mark, str]], step: str) -> None:
        """Put fresh overlays in the disks' places, see the module's head. Old files that have no other
        name are gone then. ``step``: the journal's text, with {} for the machine."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock.hold(shared=True))
            ready: list[tuple[str, Path, Path, Path]] = []
            for mark, backing in backings:
                home = self._home(mark.machine)
                fresh = stack.enter_context(self._temporary(home, "disk.qcow2"))
                self._write_overlay(fresh, mark.size, backing)
                old = fresh
                if len(backings) > 1:
                    old = stack.enter_context(self._temporary(home, "old.qcow2"))
                ready.append((mark.machine, fresh, home / "disk.qcow2", old))
            try:
                for machine, fresh, disk, old in ready:
                    self._step(step.format(machine))
                    if old != fresh:  # one alone needs none: rename(2) is all there is
                        with contextlib.suppress(FileNotFoundError):
                            old.hardlink_to(disk)
                    fresh.rename(disk)
                    sync(disk.parent)
            except BaseException:
                for _, fresh, disk, old in ready:
                    if not fresh.exists() and old.exists():
                        old.rename(disk)
                        sync(disk.parent)
                raise

    def _write_overlay(self, path: Path, size: int, backing: str) -> None:
        try:
            write_new(path, empty_overlay(size, backing), mode=0o600)
            self._give(path)
        except OSError as error:
            raise file_error(error, path, "write") from error

    def _give(self, path: Path) -> None:
        if self._reader is not None:
            os.chown(path, self._reader, -1)

    @contextlib.contextmanager
    def _temporary(self, directory: Path, name: str) -> Iterator[Path]:
        """A path in ``directory`` for something under construction. It is removed at the end, unless it
        was renamed. A lock on its .lock twin tells the living from the dead."""
        make_directory(directory, mode=0o711)
        path = directory / f"{NEW}{secrets.token_hex(4)}-{name}"
        with FileLock(path.with_name(path.name + ".lock")).hold(remove=True):
            try:
                yield path
            finally:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _make_room(self, home: Path) -> None:
        """Make way for a clone: finish a destroy that was killed. Conflict if there is a disk, or
        checkpoints of one; NotOurs if there are somebody else's files."""
        mark = read_mark(home)
        if mark is not None:
            self._check_farm(mark)
            if (home / "disk.qcow2").exists():
                raise Conflict(f"{home.name} has a disk already", remedy="destroy it first")
            if kept_alone(home):
                left = self._checkpoints(mark, self._frozen_files(mark))
                kept = ", ".join(c.name for c in left if c.name != CLEAN)
                raise Conflict(
                    f"{home.name} has no disk, but checkpoints of one: {kept}",
                    remedy="destroy it first: they go with it",
                )
            self.destroy(home.name)
        if home.exists() and any(home.iterdir()):
            raise NotOurs(f"{home} holds files that are not farmhand's", remedy="move them away")

    def _bring(self, image: Path, fresh: Path) -> None:
        """Make ``fresh`` a qcow2 file with the image's content. The image itself stays."""
        with image.open("rb") as file:
            is_qcow2 = file.read(4) == b"QFI\xfb"
        if is_qcow2 and self._may_share(image):
            try:
                fresh.hardlink_to(image)
                return
            except OSError:  # another file system, or one without hard links
                pass
        make_file(fresh)  # closed from the first byte on
        if is_qcow2:
            shutil.copyfile(image, fresh)
        else:
            self._runner.change(
                "qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, fresh, timeout=3600
            )

    def _may_share(self, image: Path) -> bool:
        """Whether the template may be another name of that file: not of one that another store has
        sealed for another user of QEMU's."""
        seen = image.stat()
        owner = os.geteuid() if self._reader is None else self._reader
        return stat.S_IMODE(seen.st_mode) != _SEALED or seen.st_uid == owner

    def _need(self, size: int, what: str) -> None:
        free = self.capacity().free
        if free < size + self._headroom:
            raise NoSpace(
                f"{self._root}: {format_size(free)} free, "
                f"{what} needs {format_size(size + self._headroom)}",
                remedy=("make room there (", Call("gc"), "), or point the host's disks elsewhere"),
            )


def _checkpoint(name: str, kept: Path) -> Checkpoint:
    """A checkpoint by its file, which no one has changed since it was frozen."""
    try:
        made = str(kept.stat().st_mtime_ns)
    except OSError:
        made = ""
    return Checkpoint(name=name, created=changed(kept), id=made)


def _no_disk(machine: str) -> NotFound:
    return NotFound(f"{machine} has no disk here", remedy=(Call("clone-farm"), " makes it"))


def _plain(name: str) -> str:
    """The name, if it is plain, for names get into paths. UsageError if it isn't; the loader checks them
    as well."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a plain name: letters, digits, '.', '_' and '-'")
    return name


def _same_store(image: Path, directory: Path) -> bool:
    place = next(p for p in (directory, *directory.parents) if p.exists())
    try:
        return image.stat().st_dev == place.stat().st_dev
    except FileNotFoundError:
        raise NotFound(f"no image {image}") from None
