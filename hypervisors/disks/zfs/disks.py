"""Disks on ZFS: a template is a sealed snapshot, a VM's disk a clone of it: a volume, or a dataset with
one raw file (``dataset_kinds``). Both are "volumes" below.

    POOL/DATASET/templates/NAME.N           a generation's volume, read-only, no device
                          NAME.N@sealed     the template: marked and held (zfs-hold(8)), so that a
                                            ``zfs destroy -R`` fails instead of taking all VMs
    POOL/DATASET/vms/MACHINE.K              the disk: of the machine's volumes in state "disk" the one
                                            with the highest K
                    MACHINE.K@_start        what it was when it became the disk, or was first put back
                    MACHINE.K@CHECKPOINT    a checkpoint; former disks stay for these

What a volume is, is in properties set on it (``state``). They are given with ``zfs clone``, in one
system call, so a process killed anywhere leaves a marked volume, or none; only a power cut can swallow
the marks of a volume made in that second, which then is known by being empty.

**A clone** is that one command, and complete. Nothing is written to it unless by its user, not even by
the kernel when it makes the device: templates are written with ``sync=disabled``, so their snapshots
have no log (ZIL) that would be wiped in each clone. So ``written`` is 0 until somebody writes. A larger
clone is under construction ("new") until it has its size, and a snapshot to count from.

**Going back.** Where the checkpoint is the newest snapshot, the volume is rolled back: one process, one
transaction, the same device. Else the checkpoint is cloned beside and marked the disk, while the former
disk becomes a mere carrier of its checkpoints, or goes: again one transaction (store.lua). No
checkpoint moves, so none can be lost. The disk's path then ends in another number; it always was the old
or the new, and ``ready`` says which right before a start.

**A larger disk.** An untouched one is cloned again, larger, and swapped in as above. Of another one the
marks say first how large it is, and which snapshots are smaller (``grown``); then the volume, or the
file, is made larger; killed between, by ``ready``. A snapshot keeps the size it had, and a volume that
is rolled back has that again: so from a smaller one a larger clone is made, as of a template.

**Several at once.** A channel program (zfs-program(8)) checks all and then changes all within one
transaction group, be it checkpoints or resets: ``checkpoint_all``, ``restore_all``.

**While a machine runs.** A snapshot is taken beneath whoever has the volume, or the file, open, and he
goes on with it: so a checkpoint of a paused machine is the same one transaction. A snapshot of a file's
dataset has what was written to the file, for ZFS keeps no page cache of files that are written to
(mmap(2) apart).

Rejected:
- *Renames* (old aside, new in its place): two steps, and between them the name leads nowhere; the links
  below /dev/zvol lag behind even then.
- *Promote*: moves snapshots between volumes, collides on equal names, and doesn't move the name.
- *``zfs rollback``*: works beneath a running guest, silently. The program's rollback answers EBUSY.
- *A dataset per VM, with a property that names its present volume*: one more transaction a clone, and
  two truths.
- *pyzfs, or its C library*: calls within this process, which a pool that is suspended would hang for
  good; a command can be given up. And ``zfs program`` is as atomic and can be pasted.
- *A snapshot of each clone to count from*: one more process and transaction a clone.
- *Going back to a smaller snapshot, then setting ``volsize``*: that counts as written.

``written`` counts in steps of transaction groups, so the proof of a pristine disk first syncs.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

from host.run import Runner
from hypervisors.answers import answer_of
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
    Template,
    check_larger,
    check_one_of,
    check_removable,
    check_template,
    not_ours,
    too_small,
)
from hypervisors.disks.stores import StorePlace
from hypervisors.disks.zfs import state
from hypervisors.disks.zfs.state import SEALED, ZfsState, plain
from hypervisors.disks.zfs.store import ZfsStore
from hypervisors.ownership import FarmIdentity
from inventory.errors import Busy, Call, Conflict, NotFound
from inventory.sizes import format_size

_MAKING = 300.0  # seconds after which nobody waits any more for whoever makes a disk


class ZfsDisks(ZfsStore):
    """Implements ``hypervisors.api.Disks``, ``FarmDisks``, ``ChainedDisks``, ``GrowableDisks``,
    ``LiveDisks`` and ``DeviceDisks``. Thread-safe; any number of processes and farms may share a
    dataset. Needs root: channel programs do."""

    # -- disks ------------------------------------------------------------------------------------

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
            place.pool, place.dataset or "farmhand", place.farm, runner,
            step=callbacks.step, reader_uid=reader_uid, warn=callbacks.warn,
            files=directories.state / "zfs" if place.store == "zfs-files" else None,
        )  # fmt: skip

    def find(self, machine: str) -> Disk | None:
        """Any farm's: its ``owner`` tells."""
        return state.read_disk(self._look(plain(machine)), machine, self._kind.path)

    def list(self) -> Sequence[Disk]:
        look = self._look()
        disks = (state.read_disk(look, machine, self._kind.path) for machine in look.machines())
        return [disk for disk in disks if disk and disk.owner.farm == self._farm]

    def others(self) -> Sequence[Foreign]:
        found: dict[str, Foreign] = {}
        for volume in self._look().volumes:
            if volume.state and volume.owner and volume.owner.farm.is_namesake(self._farm):
                found[volume.stem] = Foreign(volume.stem, volume.owner)
        return [found[machine] for machine in sorted(found)]

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        """What somebody is still making stays his."""
        volumes = self._look(plain(machine)).of(machine)
        theirs = [v.name for v in volumes if v.belongs(whose) and not state.being_made(v)]
        if theirs:
            self._step(f"mark {', '.join(theirs)} as ours")
            self._zfs.change("set", f"farmhand:farm={self._farm.mark}", *theirs)

    def ready(self, machine: str) -> Disk:
        """See ``DeviceDisks.ready``. A disk that isn't as large as its marks say is made so."""
        look = self._look(plain(machine))
        disk, volume = self._disk(look, machine), look.disk(machine)
        assert volume
        self._kind.open_up(volume.name)
        self._kind.enlarge(volume.name, disk.size)
        return disk

    def clone(self, template: Template, machine: str, owner: Owner, size: int) -> Disk:
        """One process for a volume of the template's size, where nothing hints at an earlier disk."""
        plain(machine)
        if template.farm is not None:  # else it isn't sealed; a look would be a process more
            check_template(template.label, template.farm, self._farm)
        if size < template.size:
            raise too_small(machine, size, template)
        source = f"{self._templates}/{plain(template.name)}.{template.generation}@{SEALED}"
        target = f"{self._vms}/{machine}.1"
        # A machine's first volume goes when it is put back to an older checkpoint, so its name being
        # free proves nothing.
        if self._kind.may_exist(f"{self._vms}/{machine}"):
            target = self._make_way(machine)
        self._need(0, f"the disk of {machine}")
        self._step(f"clone the disk of {machine} from {template.label}")
        size = self._kind.rounded(size)
        larger = size if size > template.size else 0
        marks = state.disk_marks(machine, owner, template.label, template.sha256, CLEAN, size)
        marks["state"] = "new" if larger else "disk"
        while True:
            try:
                self._clone(source, target, marks, larger)
                break
            except NotFound:
                raise NotFound(
                    f"no template {template.label} in {self._root}",
                    remedy=(Call("template-list"), " shows them"),
                ) from None
            except Conflict:  # a volume whose device isn't there: not ours, or just being made
                other = self._make_way(machine)
                if other == target:
                    raise
                target = other
        with self._dropped_on_failure(target, marks):
            self._kind.open_up(target, larger)
            if larger:
                self._zfs.program("switch", f"first:{target}")
        return Disk(
            machine=machine, owner=owner, path=self._kind.path(target), format="raw",
            size=size, used=0, template=template.label, base=CLEAN, checkpoints=(state.clean(marks),),
        )  # fmt: skip

    def checkpoint(self, machine: str, name: str) -> Checkpoint:
        return self.checkpoint_all([machine], name)[machine]

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        """See ``FarmDisks.checkpoint_all``."""
        plain(name)
        for machine in machines:
            if name == CLEAN:
                raise _taken(machine, name)
            self._flush(machine)
        self._need(0, f"checkpoint {name} of {', '.join(machines)}")
        self._step(f"freeze the disk of {', '.join(machines)} as {name}")
        return self._freeze(machines, name)

    def before_live(self, machine: str, name: str) -> None:
        """See ``LiveDisks.before_live``. What was written until now is in the pool when this returns, so
        little is left for the pause."""
        plain(name)
        self._flush(plain(machine))
        disk = self._disk(self._look(machine, synced=True), machine)
        if name in (c.name for c in disk.checkpoints):
            raise _taken(machine, name)
        self._need(0, f"checkpoint {name} of {machine}")

    def checkpoint_live(self, machine: str, name: str, move: Callable[[Path], None]) -> Checkpoint:
        """See ``LiveDisks.checkpoint_live``. The machine goes on with the same volume, or file."""
        del move
        self._flush(machine)
        return self._freeze([machine], name)[machine]

    def settle_live(self, machine: str, opened: Path | None) -> None:
        """See ``LiveDisks.settle_live``: there is nothing in between."""
        del machine, opened

    def restore(self, machine: str, name: str) -> Disk:
        plain(machine)
        self._step(f"put the disk of {machine} back to {name}")
        self._shut([machine])
        answer = self._zfs.program("restore", machine, name)
        look = state.read_state(answer)
        if answer.get("done"):
            return self._disk(look, machine)
        return self._grow([machine], name, look)[0]

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        """See ``FarmDisks.restore_all``."""
        self._step(f"put the disks of {', '.join(machines)} back to {name}")
        self._shut(machines)
        return self._grow(machines, name, self._look())

    def remove_checkpoint(self, machine: str, name: str) -> None:
        """See ``Disks.remove_checkpoint``."""
        look = self._look(plain(machine))
        check_removable(self._disk(look, machine), name, _grown_from(look, machine, name))
        self._step(f"remove checkpoint {name} of {machine}")
        for half in look.of(machine):  # what a killed reset left may be a clone of it
            if half.state == "new" and not state.being_made(half):
                self._kind.shut([half.name])
                self._zfs.program("drop", half.name, "state=new")
        self._zfs.program("forget", machine, name)

    def grown_from(self, machine: str, name: str) -> Sequence[str]:
        """See ``ChainedDisks.grown_from``."""
        return _grown_from(self._look(plain(machine)), machine, name)

    def move(self, machine: str, template: Template) -> Disk:
        """See ``Disks.move``. As a reset that makes a fresh clone, of another template."""
        look = self._look(plain(machine))
        disk = self._disk(look, machine)
        if template.farm is not None:  # else it isn't sealed
            check_template(template.label, template.farm, self._farm)
        if disk.size < template.size:
            raise too_small(machine, disk.size, template)
        self._need(0, f"the disk of {machine}")
        self._shut([machine])
        target = self._next_name(look, machine)
        marks = state.disk_marks(machine, disk.owner, template.label, template.sha256, CLEAN, disk.size)
        marks["state"] = "new"
        try:
            self._clone(self._template_snapshot(template.label), target, marks, disk.size)
        except NotFound:
            raise NotFound(
                f"no template {template.label} in {self._root}",
                remedy=(Call("template-list"), " shows them"),
            ) from None
        with self._dropped_on_failure(target, marks):
            self._kind.open_up(target, disk.size)
            self._step(f"swap in a fresh disk of {machine} from {template.label}")
            self._zfs.program("switch", target)
        return self._disk(self._look(machine), machine)

    def enlarge(self, machine: str, size: int) -> Disk:
        """See ``GrowableDisks.enlarge``. Untouched, it is so afterwards, too."""
        disk = self._disk(self._look(plain(machine)), machine)
        size = self._kind.rounded(size)
        check_larger(disk, size)
        self._need(0, f"a larger disk of {machine}")
        untouched = bool(disk.base) and self.pristine(machine, disk.base)
        look = self._look(machine)
        disk, volume = self._disk(look, machine), look.disk(machine)
        assert volume
        if untouched and size > disk.size:
            self._shut([machine])
            with contextlib.ExitStack() as undo:
                target = self._fresh(look, machine, replace(disk, size=size), disk.base, undo)
                self._step(f"swap in a larger disk of {machine} from {disk.base}")
                self._zfs.program("switch", target)
            return self._disk(self._look(machine), machine)
        self._kind.open_up(volume.name)
        self._step(f"make the disk of {machine} {format_size(size)}")
        if size > disk.size:
            last = volume.snapshots[-1].txg if volume.snapshots else 0
            self._zfs.change("set", f"farmhand:size={size}", f"farmhand:grown={last}", volume.name)
        self._kind.enlarge(volume.name, size)
        return replace(disk, size=size)

    def rename(self, machine: str, to: str, owner: Owner) -> Disk:
        """See ``Disks.rename``. Volumes that carry checkpoints come first, then the disk, then all
        marks, the disk's first: one whose mark speaks of another name is nobody's, and left alone."""
        look, there = self._look(plain(machine)), self._look(plain(to))
        check_one_of(machine, to, both=bool(look.disk(machine) and there.disk(to)))
        names = (machine, to)
        every = [v for v in (*look.volumes, *there.volumes) if v.marks.get("machine") in names]
        mine = sorted(every, key=lambda v: (v.marks.get("state") == "disk", v.number))
        for volume in mine:
            if not volume.belongs(self._farm):
                raise not_ours(f"the disk of {volume.marks['machine']}", volume.owner, self._farm)
        moving = [v for v in mine if v.stem == machine]
        taken = {v.number for v in there.volumes} & {v.number for v in moving}
        if taken:
            raise Conflict(
                f"{self._vms}/{to}.{min(taken)} exists, and is in the way", remedy="rename or remove it"
            )
        self._shut(names)
        for volume in moving:
            target = f"{self._vms}/{to}.{volume.number}"
            self._kind.await_gone(target)
            self._step(f"rename {volume.name} to {target}")
            self._zfs.change("rename", volume.name, target)
        marks = (f"farmhand:machine={to}", f"farmhand:vm={plain(owner.vm)}")
        wrong = [v for v in mine if (v.marks["machine"], v.marks.get("vm")) != (to, owner.vm)]
        for volume in reversed(wrong):
            target = f"{self._vms}/{to}.{volume.number}"
            self._step(f"mark {target} as {to}'s")
            self._zfs.change("set", *marks, target)
        now = self._look(to)
        disk, renamed = self._disk(now, to), now.disk(to)
        assert renamed
        self._kind.open_up(renamed.name)
        return disk

    def pristine(self, machine: str, name: str, *, quick: bool = False) -> bool:
        """See ``Disks.pristine``. The disk has grown from that checkpoint, and its ``written``
        (zfsprops(7)) is exactly 0."""
        del quick  # it is, but for the sync of a pool that is being written to
        path = self._disk(self._look(plain(machine)), machine).path
        if path.exists():
            self._zfs.flush(path)  # what a writer that still has it open put into the page cache
        look = self._look(machine, synced=True)
        volume = look.disk(machine)
        return bool(volume and volume.base == name and volume.written == 0)

    def destroy(self, machine: str) -> None:
        """See ``Disks.destroy``. All volumes of the machine go in one transaction. If there is nothing,
        nothing is done."""
        look = self._look(plain(machine))
        if not look.of(machine):
            return
        self._check_farm(look, machine)
        self._step(f"remove the disk of {machine}")
        self._shut([machine])
        self._zfs.program("destroy", machine)

    def leftovers(self) -> Sequence[Leftover]:
        return state.find_leftovers(self._look(), self._farm)

    def discard(self, leftover: Leftover) -> None:
        """Remove a leftover, which is looked up again first: what is in use by now, or gone, is left
        alone."""
        if leftover.ref not in (now.ref for now in self.leftovers()):
            return
        self._step(f"remove the leftover {leftover.ref}")
        if leftover.kind in ("disk", "checkpoint"):  # all of a machine's
            machine = leftover.ref.rpartition("/")[2]
            self._shut([machine])
            self._zfs.program("destroy", machine)
        else:
            self._kind.shut([leftover.ref])
            self._zfs.program("drop", leftover.ref)

    def capacity(self) -> Capacity:
        """Size and free space of the dataset; quotas, reservations and what ZFS keeps for itself are
        taken off. Clones and templates are sparse: none reserves anything."""
        used, free = self._zfs.space()
        self._room = (time.monotonic(), free)
        return Capacity(used + free, free)

    # -- parts of these ---------------------------------------------------------------------------

    def _flush(self, machine: str) -> None:
        """QEMU may have been told not to."""
        for path in self._kind.paths(f"{self._vms}/{plain(machine)}"):
            self._zfs.flush(path)

    def _freeze(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        made = self._zfs.program("checkpoint", name, *machines)
        with answer_of("zfs program"):
            kept = {m: made["made"][m] for m in machines}
            return {
                m: Checkpoint(name=name, created=state.when(seen["created"]), id=str(seen["guid"]))
                for m, seen in kept.items()
            }

    def _make_way(self, machine: str) -> str:
        """The name of a machine's next volume, after finishing a destroy that was killed. Conflict where
        it has a disk."""
        look = self._look(machine)
        limit = time.monotonic() + _MAKING
        while making := [v for v in look.volumes if v.stem == machine and state.being_made(v)]:
            if time.monotonic() > limit:
                raise Busy(
                    f"{making[0].name} has been under construction for {_MAKING:g} s, by its marks",
                    remedy=f"see who makes it: zfs get all {making[0].name}; then again",
                )
            time.sleep(0.2)
            look = self._look(machine)
        if look.disk(machine):
            self._check_farm(look, machine)
            raise Conflict(f"{machine} has a disk already", remedy="destroy it first")
        if any(v.state != "new" for v in look.of(machine)):
            self._check_farm(look, machine)
            self.destroy(machine)
            look = self._look(machine)
        return self._next_name(look, machine)

    def _next_name(self, look: ZfsState, machine: str) -> str:
        """The name of the machine's next volume; no name of a disk that was removed, as long as
        something is left of it."""
        stem = f"{self._vms}/{machine}"
        number = int(look.next_name(self._vms, machine).rpartition(".")[2])
        return f"{stem}.{max(number, self._kind.free_from(stem))}"

    def _clone(self, source: str, target: str, marks: Mapping[str, str], size: int) -> None:
        """Make a clone of ``size`` bytes; 0: as large as its source. Conflict if the name is taken."""
        resized = self._kind.resized(size) if size else []
        self._create(target, marks, "clone", *resized, source)

    def _shut(self, machines: Sequence[str]) -> None:
        self._kind.shut([v for m in machines for v in self._kind.opened(f"{self._vms}/{plain(m)}")])

    def _grow(self, machines: Sequence[str], name: str, look: ZfsState) -> Sequence[Disk]:
        """Put machines' disks back: fresh clones, or rolled back where that will do, all in one
        transaction. The disks as they then are."""
        items: list[str] = []
        disks: list[Disk] = []
        with contextlib.ExitStack() as undo:
            for machine in machines:
                disk, volume = self._disk(look, machine), look.disk(machine)
                assert volume
                known = [c.name for c in disk.checkpoints]
                if name not in known:
                    raise NotFound(
                        f"{machine} has no checkpoint {name}", remedy=f"it has: {', '.join(known)}"
                    )
                if volume.goes_back_to(name):
                    items.append(f"{volume.name}@{volume.newest}")
                    disks.append(disk)
                    continue
                if volume.base == name and not volume.snapshots and volume.written == 0:
                    items.append(f"same:{volume.name}")
                    disks.append(disk)
                    continue
                self._need(0, f"the disk of {machine}")
                target = self._fresh(look, machine, disk, name, undo)
                items.append(target)
                disks.append(replace(disk, path=self._kind.path(target), base=name))
            self._step(f"swap in the disk of {', '.join(machines)} from {name}")
            self._zfs.program("switch", *items)
        return disks

    def _fresh(
        self, look: ZfsState, machine: str, disk: Disk, name: str, undo: contextlib.ExitStack
    ) -> str:
        """A clone of that checkpoint, to be switched to: as large as ``disk``, which it is to replace.
        An error within ``undo`` removes it."""
        volume = look.disk(machine)
        assert volume
        target = self._next_name(look, machine)
        sha256 = volume.marks.get("sha256", "")
        marks = state.disk_marks(machine, disk.owner, disk.template, sha256, name, disk.size)
        marks |= {"created": disk.checkpoints[0].created.isoformat(), "state": "new"}
        source, size = self._source(look, machine, disk, name)
        self._clone(source, target, marks, size)
        undo.enter_context(self._dropped_on_failure(target, marks))
        self._kind.open_up(target, size)
        return target

    def _source(self, look: ZfsState, machine: str, disk: Disk, name: str) -> tuple[str, int]:
        """The snapshot that a checkpoint is, and what a clone's size has to be set to; 0: it has it."""
        if name == CLEAN:
            return self._template_snapshot(disk.template), disk.size
        for volume in look.of(machine):
            for kept in volume.checkpoints():
                if kept.marks.get("name") == name:
                    was = int(volume.marks.get("size", 0))
                    grows = volume.is_smaller(kept) or was < disk.size
                    return f"{volume.name}@{kept.name}", disk.size if grows else 0
        raise NotFound(f"{machine} has no checkpoint {name}")


def _grown_from(look: ZfsState, machine: str, name: str) -> Sequence[str]:
    """See ``ChainedDisks.grown_from``. Snapshots of one volume don't grow from each other; a volume that
    was cloned from one does."""
    holder = next(
        (v for v in look.of(machine) for s in v.checkpoints() if s.marks.get("name") == name), None
    )
    return [
        kept.marks["name"]
        for volume in look.of(machine)
        if volume != holder and volume.marks.get("base") == name
        for kept in volume.checkpoints()
    ]


def _taken(machine: str, name: str) -> Conflict:
    return Conflict(f"{machine} has a checkpoint {name} already", remedy="give the new one another name")
