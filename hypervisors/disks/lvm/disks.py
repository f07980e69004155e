"""What the two LVM stores have in common: marks, the present disk, swapping, leftovers.

Volumes are ours by their tags alone (see lvm.encode); their names, ``fh.WORDS.RANDOM``, mean nothing and
collide with nobody's. ``fh.kind`` says what one is:

    template     sealed, read-only; of one farm, in labels that all farms of the group share
    disk         what a VM runs on, or ran on until a swap
    checkpoint   sealed, read-only; a state of a VM's disk
    part         being filled; its lock is held while somebody does
    source       a snapshot that a copy is being read from (``fh.live``: or will be, see ``LiveDisks``)

A VM's disk has a stable path: a symbolic link in a directory of ours, LINKS/VG/MACHINE, to the
device of the present volume. A reset makes the new volume beside the old, renames a new link over the
old one (atomic, rename(2)), and removes the old volume last; so the path resolves to the old disk or the
new at any time, and that link is what says which volume is present. If the links are lost, the newest
complete volume of a machine is, for volumes count up (``fh.seq``); ``ready`` makes the link again.

Rejected: two ``lvrename`` (between them the path leads nowhere, a second or so under load); merging a
thin snapshot into the disk (atomic, but only into the snapshot's own origin: a checkpoint would be what
is overwritten); reloading the dm table under a fixed name (atomic, gone after a reboot); a tag of the
group as the pointer (atomic, but QEMU opens a path, so a link would be needed all the same).

QEMU runs as another user: the device of the present volume, and of no other, is given to that user
(chown). udev's "change" events leave that alone; activation anew, as at a reboot, does not, so a driver
calls ``ready`` before each start.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from host.files import blocks, sync
from hypervisors.api import (
    CLEAN,
    Capacity,
    Checkpoint,
    Disk,
    Foreign,
    Leftover,
    Owner,
    Template,
    check_one_of,
    check_removable,
    check_template,
    label_taken,
    not_ours,
    template_in_use,
    too_small,
)
from hypervisors.disks.lvm.command import LogicalVolume, VolumeGroup, retagged
from hypervisors.disks.lvm.state import (
    HeldLock,
    LvmState,
    farm_of,
    id_of,
    kept,
    read_template,
    template_facts,
)
from hypervisors.disks.lvm.volumes import LvmVolumes, plain, when
from hypervisors.disks.qcow2.format import measure
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, Conflict, NotFound, Unsupported, WrongState
from inventory.sizes import format_size


class LvmStore(LvmVolumes, abc.ABC):
    """Implements ``hypervisors.api.Disks``, ``FarmDisks`` and ``LiveDisks`` but for how a volume is made
    from another."""

    # -- what differs -----------------------------------------------------------------------------

    @abc.abstractmethod
    def _blank(self, name: str, size: int, facts: Mapping[str, str]) -> None:
        """Make an empty volume, active."""

    @abc.abstractmethod
    def _seal(self, name: str) -> None:
        """Make it read-only."""

    @abc.abstractmethod
    def _grow(
        self,
        held: HeldLock,
        seen: LvmState,
        source: LogicalVolume,
        facts: dict[str, str],
        *,
        first: bool,
    ) -> str:
        """A new disk with ``source``'s content; returns its name. ``first``: the machine has none yet,
        so ``_point`` before the commit that makes it one. ``held`` has the store's lock."""

    @abc.abstractmethod
    def _freeze(self, held: HeldLock, seen: LvmState, disk: LogicalVolume, facts: dict[str, str]) -> str:
        """A complete sealed checkpoint with the disk's content; returns its name."""

    def _freeze_live(
        self, held: HeldLock, seen: LvmState, disk: LogicalVolume, facts: dict[str, str]
    ) -> None:
        """The same of a disk that a paused machine has open; or what ``_copy_live`` makes it of."""
        self._freeze(held, seen, disk, facts)

    def _copy_live(self, held: HeldLock, seen: LvmState, disk: LogicalVolume) -> LvmState:
        """Make the checkpoint of what ``_freeze_live`` has left for that; returns what is there then."""
        return seen

    @abc.abstractmethod
    def _rebase(
        self, held: HeldLock, seen: LvmState, disk: LogicalVolume, frozen: str, name: str
    ) -> str:
        """The disk (returned by name: the same or a new one) now grows from checkpoint ``name``."""

    @abc.abstractmethod
    def _room(
        self,
        seen: LvmState,
        what: str,
        *,
        copy: int | None,
        source: LogicalVolume | None,
        swap: bool = False,
        beside: int = 0,
    ) -> int:
        """NoSpace unless it fits to the end: ``copy`` bytes written in full, or a snapshot's worth.
        ``swap``: another disk goes in exchange, later. ``beside``: bytes spoken for already. Returns
        those that this will take."""

    @abc.abstractmethod
    def _space(self, seen: LvmState, source: LogicalVolume) -> int:
        """Bytes that a clone of ``source`` takes of the group at once."""

    def _own_base(self, seen: LvmState, source: LogicalVolume, size: int) -> bool:
        """Whether a disk of that size needs a base of its own, made of ``source``."""
        return False

    @abc.abstractmethod
    def _equal(
        self, seen: LvmState, disk: LogicalVolume, base: LogicalVolume, *, quick: bool
    ) -> bool | None: ...

    @abc.abstractmethod
    def _used(self, seen: LvmState, disk: LogicalVolume) -> int: ...

    @abc.abstractmethod
    def _tend(self, disk: LogicalVolume, group: VolumeGroup) -> None:
        """Called before a start: refuse a disk that is lost, see that there is room."""

    def _finish(self, held: HeldLock, disk: LogicalVolume) -> None:
        """Called before a start, of an active disk: finish what was cut off."""

    @abc.abstractmethod
    def capacity(self) -> Capacity: ...

    # -- templates --------------------------------------------------------------------------------

    def seal(self, image: Path, template: Template) -> Template:
        """See ``Disks.seal``. ``sha256`` is of the image file's bytes as they came."""
        label = plain(template.name) + f"@{template.generation}"
        try:
            seen_file = image.stat()
        except FileNotFoundError:
            raise NotFound(f"no image {image}") from None
        identity = f"{seen_file.st_dev}:{seen_file.st_ino}:{seen_file.st_mtime_ns}"
        form, size = measure(image)
        with self._locked() as held:
            seen = self._look()
            if known := seen.templates.get(label):
                farm = farm_of(known)
                if farm != self._farm or known.facts.get("image") != identity:
                    raise label_taken(label, farm, self._farm)  # else killed right before the last step
                image.unlink()
                return read_template(known, self._vg)
            self._room(
                seen, f"template {label}", copy=self._sealed_size(size, blocks(image)), source=None
            )
            self._step(f"seal template {label}")
            with image.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = self._name(template.name, str(template.generation))
            done = replace(template, ref=f"{self._vg}/{name}", sha256=digest, size=size, farm=self._farm)
            facts = {**template_facts(done), "image": identity, "farm": self._farm.mark, "kind": "part"}
            held.keep(self._filling(name))
            try:
                self._blank(name, size, facts)
                with held.released():
                    self._fill(name, image, form)
                self._seal(name)
                if other := self._look().templates.get(label):  # made while the lock was given back
                    raise label_taken(label, farm_of(other), self._farm)
                self._step(f"name it template {label}")
                self._change(name, *retagged(facts, {**facts, "kind": "template"}))
            except BaseException:
                self._drop(name)
                raise
        image.unlink(missing_ok=True)
        return done

    def templates(self) -> Sequence[Template]:
        found = (read_template(v, self._vg) for v in self._glance().templates.values())
        return sorted(found, key=lambda t: (t.name, t.generation))

    def remove_template(self, label: str) -> None:
        """See ``Disks.remove_template``; dependents of every farm in the group count."""
        with self._locked():
            seen = self._look()
            volume = seen.templates.get(label)
            if volume is None:
                raise NotFound(f"no template {label}", remedy=(Call("template-list"), " shows them"))
            check_template(label, farm_of(volume), self._farm)
            users = {v.facts.get("machine", "?") for v in seen.ours if v.facts.get("template") == label}
            if users:
                raise template_in_use(label, users)
            self._unused(volume)
            self._check_dependents(seen, [volume])
            self._step(f"remove template {label}")
            self._lvm.remove([volume.name])

    def adopt_template(self, label: str, whose: FarmIdentity) -> None:
        with self._locked():
            volume = self._look().templates.get(label)
            if volume is not None and farm_of(volume) == whose:
                self._step(f"mark {self._vg}/{volume.name} as ours")
                ours = {**volume.facts, "farm": self._farm.mark}
                self._change(volume.name, *retagged(volume.facts, ours))

    # -- disks ------------------------------------------------------------------------------------

    def find(self, machine: str) -> Disk | None:
        """Any farm's: its ``owner`` tells. One report."""
        plain(machine)
        seen = self._look()
        volume = seen.present(machine)
        return self._disk(seen, volume) if volume else None

    def list(self) -> Sequence[Disk]:
        seen = self._glance()
        present = (seen.present(machine) for machine in seen.machines())
        return [self._disk(seen, v) for v in present if v and farm_of(v) == self._farm]

    def others(self) -> Sequence[Foreign]:
        found: dict[str, Foreign] = {}
        for volume in self._look().ours:
            facts, farm = volume.facts, farm_of(volume)
            if "machine" in facts and farm.is_namesake(self._farm):
                found[facts["machine"]] = Foreign(facts["machine"], Owner(farm, facts.get("vm", "")))
        return [found[machine] for machine in sorted(found)]

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        """What somebody is still filling stays his."""
        plain(machine)
        with self._locked():
            theirs = [v for v in self._look().ours if v.facts.get("machine") == machine]
            for volume in theirs:
                if farm_of(volume) == whose and not self._alive(volume.name):
                    self._step(f"mark {self._vg}/{volume.name} as ours")
                    ours = {**volume.facts, "farm": self._farm.mark}
                    self._change(volume.name, *retagged(volume.facts, ours))

    def clone(self, template: Template, machine: str, owner: Owner, size: int) -> Disk:
        plain(machine)
        if size < template.size:
            raise too_small(machine, size, template)
        with self._locked() as held:
            seen = held.seen
            if seen is None or template.label not in seen.templates or seen.of(machine):
                seen = self._look()
            source = seen.templates.get(template.label)
            if source is None:
                raise NotFound(
                    f"no template {template.label}", remedy=(Call("template-list"), " shows them")
                )
            check_template(template.label, farm_of(source), self._farm)
            if there := seen.present(machine):
                self._check_farm(there)
                raise Conflict(f"{machine} has a disk already", remedy="destroy it first")
            if any("merging" in v.facts for v in seen.of(machine)):
                raise WrongState(
                    f"a merge of the disk of {machine} was cut off",
                    remedy="merge it again, or destroy it",
                )
            if any("moving" in v.facts for v in seen.of(machine)):
                raise WrongState(f"a renaming to {machine} was cut off", remedy=Call("recover"))
            self._room(seen, f"the disk of {machine}", copy=self._copied(source, size), source=source)
            self._step(f"clone the disk of {machine} from {template.label}")
            self._remove(seen, [v for v in seen.of(machine) if v.facts.get("kind") != "part"])
            self._sweep(seen)
            now = datetime.now(UTC).isoformat()
            facts = {
                "kind": "disk", "farm": owner.farm.mark, "vm": owner.vm, "machine": machine,
                "size": str(size), "template": template.label, "base": CLEAN, "seq": "1",
                "created": now, "cloned": now,
            }  # fmt: skip
            try:
                name = self._grow(held, seen, source, facts, first=True)
                self._give(name)
            except BaseException:
                (self._links / machine).unlink(missing_ok=True)
                self._drop_all(machine)
                raise
            if self._copied(source, size) is None:  # else others have had the lock meanwhile
                new = replace(source, name=name, facts=facts)
                self._remember(seen, new, space=self._space(seen, source))
        return self._made(facts, (self._clean(seen, facts),))

    def checkpoint(self, machine: str, name: str) -> Checkpoint:
        return self.checkpoint_all([machine], name)[machine]

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        """See ``FarmDisks.checkpoint_all``: all are frozen, then each disk is made to grow from its own
        checkpoint, old disks go last. Killed in between, some have the checkpoint."""
        plain(name)
        which = ", ".join(machines)
        with self._locked() as held:
            seen = self._look()
            disks = [self._freezable(seen, machine, name) for machine in machines]
            taken = 0
            for disk in disks:
                copy = self._copied(disk, disk.size, frozen=True)
                what = f"checkpoint {name} of {which}"
                taken += self._room(seen, what, copy=copy, source=disk, beside=taken)
            self._step(f"freeze the disk of {which} as {name}")
            for machine in machines:
                self._remove(seen, seen.undone(machine))
            self._sweep(seen)
            now = datetime.now(UTC)
            frozen: list[str] = []
            rebased: list[tuple[LogicalVolume, str]] = []
            try:
                for disk in disks:
                    sync(self._lvm.ready(disk.name))  # QEMU may have been told not to
                    facts = {**_frozen(disk, name, now), "prev": disk.facts["base"]}
                    frozen.append(self._freeze(held, seen, disk, facts))
                for disk, copied in zip(disks, frozen, strict=True):
                    self._step(f"let the disk of {disk.facts['machine']} grow from {name}")
                    rebased.append((disk, self._rebase(held, seen, disk, copied, name)))
            except BaseException:
                for disk, current in rebased:
                    self._unrebase(disk, current, name)
                for copied in frozen:
                    self._drop(copied)
                raise
            self._remove_old([disk.name for disk, current in rebased if current != disk.name])
        made = Checkpoint(name=name, created=now, id=now.isoformat())
        return dict.fromkeys(machines, made)

    def before_live(self, machine: str, name: str) -> None:
        """See ``LiveDisks.before_live``. Its last look will do in the pause if nobody has the lock
        between."""
        plain(name)
        with self._locked():
            seen = self._look()
            disk = self._free_name(seen, machine, name)
            self._tend(disk, seen.group)
            copy, what = self._copied(disk, disk.size, frozen=True), f"checkpoint {name} of {machine}"
            self._room(seen, what, copy=copy, source=disk)
            if left := seen.undone(machine):
                self._step(f"remove what an earlier checkpoint of {machine} left")
                self._remove(seen, left)
            if disk.snapshot:
                size = format_size(disk.size)
                self._warn(f"{machine} stands still while its disk is copied, {size}")
            self._last = (self._stamp(), self._look())
        sync(self._lvm.ready(disk.name))

    def checkpoint_live(self, machine: str, name: str, move: Callable[[Path], None]) -> Checkpoint:
        """See ``LiveDisks.checkpoint_live``. The machine goes on with the same volume."""
        del move
        with self._locked() as held:
            seen = held.seen or self._look()
            disk, now = self._free_name(seen, machine, plain(name)), datetime.now(UTC)
            sync(self._lvm.ready(disk.name))
            self._freeze_live(held, seen, disk, _frozen(disk, name, now))
        return Checkpoint(name=name, created=now, id=now.isoformat())

    def settle_live(self, machine: str, opened: Path | None) -> None:
        """See ``LiveDisks.settle_live``. A disk that is a classic snapshot goes on growing from what it
        is one of."""
        del opened
        plain(machine)
        with self._locked(read=True) as held:
            seen = self._look()
            if (disk := seen.present(machine)) is None:
                return
            self._check_farm(disk)
            seen = self._copy_live(held, seen, disk)
            last = None if disk.snapshot else seen.kept_live(disk)
            if last is not None:
                name = last.facts["name"]
                self._step(f"let the disk of {machine} grow from {name}")
                self._rebase(held, seen, disk, last.name, name)

    def restore(self, machine: str, name: str) -> Disk:
        return self.restore_all([machine], name)[0]

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        """See ``FarmDisks.restore_all``: all fresh disks are made beside, then each link is swapped, old
        disks go last. Killed in between, some are swapped."""
        which = ", ".join(machines)
        with self._locked() as held:
            seen = self._look()
            pairs = [self._way_back(seen, machine, name) for machine in machines]
            taken = 0
            for disk, base in pairs:
                copy = self._copied(base, int(disk.facts["size"]))
                what = f"the disk of {which}"
                taken += self._room(seen, what, copy=copy, source=base, swap=True, beside=taken)
            old: list[LogicalVolume] = []
            for machine in machines:
                old += [*seen.kind("source", machine), *seen.kind("disk", machine)]  # snapshots first
                old += seen.half_made(machine)
            for disk, base in pairs:
                old += self._outgrown(seen, disk.facts["machine"], base, int(disk.facts["size"]))
            self._check_dependents(seen, old)
            self._step(f"make a fresh disk of {which} from {name}")
            self._sweep(seen)
            fresh: list[tuple[LogicalVolume, str, dict[str, str]]] = []
            swapped: list[LogicalVolume] = []
            try:
                for disk, base in pairs:
                    facts = {
                        **disk.facts, "base": name, "seq": str(int(disk.facts["seq"]) + 1),
                        "created": datetime.now(UTC).isoformat(),
                    }  # fmt: skip
                    new = self._grow(held, seen, base, facts, first=False)
                    fresh.append((disk, new, facts))
                    self._give(new)
                for disk, new, facts in fresh:
                    self._step(f"swap in the fresh disk of {facts['machine']}")
                    self._point(facts["machine"], new)
                    swapped.append(disk)
            except BaseException:
                for disk in swapped:
                    self._point(disk.facts["machine"], disk.name)
                for _, new, _ in fresh:
                    self._drop(new)
                raise
            self._remove_old([v.name for v in old])
        return [self._made(facts, self._checkpoints(seen, disk)) for disk, _, facts in fresh]

    def remove_checkpoint(self, machine: str, name: str) -> None:
        """See ``Disks.remove_checkpoint``. Checkpoints don't grow from each other: thin snapshots stand
        alone, and classic ones are copies."""
        plain(name)
        with self._locked():
            seen = self._look()
            disk = self._ours(seen, machine)
            check_removable(self._disk(seen, disk), name)
            kept = [v for v in seen.complete(machine) if v.facts.get("name") == name]
            names = {v.name for v in kept}
            # What a killed reset left may be a snapshot of it
            left = [v for v in seen.kind("disk", machine) if v != disk and v.origin in names]
            self._check_dependents(seen, [*left, *kept])
            self._step(f"remove checkpoint {name} of {machine}")
            self._remove(seen, [*left, *kept])

    def move(self, machine: str, template: Template) -> Disk:
        """See ``Disks.move``. As a reset, to another template. Unsupported for a disk that is larger
        than its template and grows from a copy of that size."""
        with self._locked() as held:
            seen = self._look()
            disk, source = self._ours(seen, machine), seen.templates.get(template.label)
            if source is None:
                raise NotFound(
                    f"no template {template.label}", remedy=(Call("template-list"), " shows them")
                )
            check_template(template.label, farm_of(source), self._farm)
            size, vm = int(disk.facts["size"]), disk.facts["vm"]
            if size < template.size:
                raise too_small(machine, size, template)
            own = self._own_base(seen, source, size)
            if own or any(v.facts.get("name") == CLEAN for v in seen.checkpoints(machine)):
                raise Unsupported(
                    f"{machine}'s disk is larger than its template: here it can't move to another one",
                    remedy=(Call("destroy", vm=vm), ", then ", Call("clone-farm", vm=vm)),
                )
            self._unused(disk)
            self._room(
                seen, f"the disk of {machine}", copy=self._copied(source, size), source=source, swap=True
            )
            old = [*seen.kind("source", machine), *seen.kind("disk", machine)]  # snapshots first
            old += seen.half_made(machine)
            self._check_dependents(seen, old)
            self._step(f"make a fresh disk of {machine} from {template.label}")
            now = datetime.now(UTC).isoformat()
            facts = {
                **disk.facts, "template": template.label, "base": CLEAN, "created": now, "cloned": now,
                "seq": str(int(disk.facts["seq"]) + 1),
            }  # fmt: skip
            new = self._grow(held, seen, source, facts, first=False)
            try:
                self._give(new)
                self._step(f"swap in the fresh disk of {machine}")
                self._point(machine, new)
            except BaseException:
                self._drop(new)
                raise
            self._remove_old([v.name for v in old])
        return self._made(facts, self._checkpoints(seen, replace(disk, facts=facts)))

    def rename(self, machine: str, to: str, owner: Owner) -> Disk:
        """See ``Disks.rename``. By the tags, of the disk in one commit; volumes keep their own names.
        The others are marked as moving meanwhile, for some stand without a disk then."""
        plain(to)
        for name in (machine, to):
            self.settle_live(name, None)
        with self._locked():
            seen = self._look()
            here = seen.of(machine)
            for volume in (*here, *seen.of(to)):
                self._check_farm(volume)
            if any("merging" in volume.facts for volume in here):
                raise WrongState(
                    f"a merge of the disk of {machine} was cut off", remedy="merge it again first"
                )
            disk = seen.present(machine)
            check_one_of(machine, to, both=disk is not None and seen.present(to) is not None)
            if disk is not None:
                self._unused(disk)
                stale = {v.name for v in (*seen.undone(machine), *seen.kind("disk", machine))}
                stale -= {disk.name}
                if stale:
                    self._step(f"remove what swaps of the disk of {machine} left")
                    self._remove(seen, [v for v in here if v.name in stale])
                for volume in here:
                    if volume.name not in stale and volume != disk:
                        self._step(f"mark {self._vg}/{volume.name} as {to}'s")
                        facts = {**volume.facts, "machine": to, "vm": owner.vm, "moving": "1"}
                        self._change(volume.name, *retagged(volume.facts, facts))
                self._step(f"rename the disk of {machine} to {to}")
                self._point(to, disk.name)
                facts = {**disk.facts, "machine": to, "vm": owner.vm}
                self._change(disk.name, *retagged(disk.facts, facts))
                seen = self._look()
            self._ours(seen, to)
            for volume in (*seen.of(machine), *seen.of(to)):  # the first: cut off, and taken back
                facts = {k: v for k, v in volume.facts.items() if k != "moving"}
                facts |= {"machine": to, "vm": owner.vm}
                if facts != volume.facts:
                    self._step(f"mark {self._vg}/{volume.name} as {to}'s alone")
                    self._change(volume.name, *retagged(volume.facts, facts))
            (self._links / machine).unlink(missing_ok=True)
            seen = self._look()
            return self._disk(seen, self._ours(seen, to))

    def pristine(self, machine: str, name: str, *, quick: bool = False) -> bool | None:
        """See the store's own page for what proves it."""
        seen = self._look()
        disk = self._ours(seen, machine)
        base = seen.base(disk, name)
        if base is None or disk.facts.get("base") != name or disk.invalid:
            return False
        if disk.active:
            sync(self._lvm.ready(disk.name))
        return self._equal(seen, disk, base, quick=quick)

    def destroy(self, machine: str) -> None:
        """See ``Disks.destroy``. If there is nothing, nothing is done."""
        plain(machine)
        with self._locked():
            seen = self._look()
            volumes = seen.of(machine)
            for volume in volumes:
                self._check_farm(volume)
            if not volumes:
                return
            for volume in volumes:
                self._unused(volume)
            self._step(f"remove the disk of {machine}")
            self._remove(seen, volumes)
            self._sweep(seen)
            (self._links / machine).unlink(missing_ok=True)

    def ready(self, machine: str) -> Disk:
        """See ``DeviceDisks.ready``. What a reboot takes away is put back (activation, the right of
        QEMU's user), as is a lost link; a disk that is lost itself is refused (DriverFailed)."""
        with self._locked() as held:
            seen = self._look()
            disk = self._ours(seen, machine)
            self._tend(disk, seen.group)
            if not disk.active:
                self._step(f"activate the disk of {machine}")
                self._change(disk.name, "-ay", "-K")
            self._finish(held, disk)
            if self._path(disk) != self._links / machine:
                self._step(f"make the path of the disk of {machine} again")
                self._point(machine, disk.name)
            self._give(disk.name)
            return replace(self._disk(seen, disk), path=self._links / machine)

    def leftovers(self) -> Sequence[Leftover]:
        with self._locked(read=True):
            return tuple(self._left(self._look()))

    def discard(self, leftover: Leftover) -> None:
        """Remove a leftover, which is looked up again first: what is in use by now, or gone, is left
        alone."""
        with self._locked():
            seen = self._look()
            if leftover.ref not in (now.ref for now in self._left(seen)):
                return
            self._step(f"remove the leftover {leftover.ref}")
            if leftover.kind == "file":
                Path(leftover.ref).unlink(missing_ok=True)
                return
            volume = seen.group.get(leftover.ref.partition("/")[2])
            if volume:
                self._remove(seen, [volume])

    # -- parts of the above -----------------------------------------------------------------------

    def _free_name(self, seen: LvmState, machine: str, name: str) -> LogicalVolume:
        """The machine's disk. Conflict if it has a checkpoint of that name."""
        disk = self._ours(seen, machine)
        if name == CLEAN or name in (v.facts.get("name") for v in seen.checkpoints(machine)):
            raise Conflict(
                f"{machine} has a checkpoint {name} already", remedy="give the new one another name"
            )
        return disk

    def _freezable(self, seen: LvmState, machine: str, name: str) -> LogicalVolume:
        disk = self._free_name(seen, machine, name)
        self._unused(disk)
        self._tend(disk, seen.group)
        return disk

    def _unrebase(self, disk: LogicalVolume, current: str, name: str) -> None:
        """Take a ``_rebase`` back."""
        if current == disk.name:
            self._change(disk.name, *retagged({**disk.facts, "base": name}, disk.facts))
        else:
            self._point(disk.facts["machine"], disk.name)
            self._drop(current)

    def _way_back(self, seen: LvmState, machine: str, name: str) -> tuple[LogicalVolume, LogicalVolume]:
        """The machine's disk, and the volume that a fresh one is made of. NotFound for an unknown
        checkpoint."""
        disk = self._ours(seen, machine)
        base = seen.base(disk, name)
        if base is None:
            known = ", ".join(c.name for c in self._checkpoints(seen, disk))
            raise NotFound(f"{machine} has no checkpoint {name}", remedy=f"it has: {known}")
        self._unused(disk)
        return disk, base

    def _outgrown(
        self, seen: LvmState, machine: str, base: LogicalVolume, size: int
    ) -> Sequence[LogicalVolume]:
        """Volumes of checkpoints that nothing needs once a disk of that size has grown from ``base``."""
        last = base.facts["kind"] == "checkpoint" and self._own_base(seen, base, size)
        return [*seen.outgrown(machine), *([base] if last else ())]

    def _copied(self, source: LogicalVolume, size: int, *, frozen: bool = False) -> int | None:
        """Bytes that a clone (``frozen``: a checkpoint) copies in full; None: it is a snapshot."""
        return None

    def _sealed_size(self, size: int, stored: int) -> int:
        return stored

    def _fill(self, name: str, image: Path, form: str) -> None:
        node = self._lvm.ready(name)
        argv = ["qemu-img", "convert", "-n", "-f", form, "-O", "raw", *self._fill_options, str(image)]
        self._runner.change(*argv, node, timeout=3600)
        sync(node)

    _fill_options: tuple[str, ...] = ()

    def _ours(self, seen: LvmState, machine: str) -> LogicalVolume:
        disk = seen.present(plain(machine))
        if disk is None:
            raise NotFound(f"{machine} has no disk here", remedy=(Call("clone-farm"), " makes it"))
        self._check_farm(disk)
        return disk

    def _check_farm(self, volume: LogicalVolume) -> None:
        if (farm := farm_of(volume)) != self._farm:
            owner = Owner(farm, volume.facts.get("vm", ""))
            raise not_ours(f"the disk of {volume.facts.get('machine')}", owner, self._farm)

    def _checkpoints(self, seen: LvmState, disk: LogicalVolume) -> tuple[Checkpoint, ...]:
        rest = [
            Checkpoint(name=v.facts["name"], created=when(v.facts.get("created", "")), id=id_of(v.facts))
            for v in seen.checkpoints(disk.facts["machine"])
            if v.facts.get("name", CLEAN) != CLEAN
        ]
        return (self._clean(seen, disk.facts), *sorted(rest, key=lambda c: c.created))

    @staticmethod
    def _clean(seen: LvmState, facts: Mapping[str, str]) -> Checkpoint:
        """The first checkpoint of a disk with these facts."""
        template = seen.templates.get(facts.get("template", ""))
        sha256 = template.facts["sha256"] if template else ""
        return Checkpoint(name=CLEAN, created=when(facts.get("cloned", "")), id=sha256)

    def _disk(self, seen: LvmState, disk: LogicalVolume) -> Disk:
        made = self._made(disk.facts, self._checkpoints(seen, disk))
        return replace(made, path=self._path(disk), used=self._used(seen, disk))

    def _made(self, facts: Mapping[str, str], checkpoints: Sequence[Checkpoint]) -> Disk:
        return Disk(
            machine=facts["machine"],
            owner=Owner(FarmIdentity.of(facts["farm"]), facts["vm"]),
            path=self._links / facts["machine"],
            format="raw",
            size=int(facts["size"]),
            used=0,
            template=facts["template"],
            base=facts["base"],
            checkpoints=tuple(checkpoints),
        )

    def _left(self, seen: LvmState) -> Iterator[Leftover]:
        origins = {v.origin for v in seen.ours if v.snapshot}
        # Machines whose disk is in parts that only finishing makes one
        parts = {v.facts.get("machine") for v in seen.ours if {"merging", "moving"} & v.facts.keys()}
        # Checkpoints last: a disk may have grown from one
        for volume in sorted(seen.ours, key=lambda v: v.facts.get("kind") == "checkpoint"):
            facts = volume.facts
            if farm_of(volume) != self._farm:
                continue
            machine, kind = facts.get("machine", ""), facts.get("kind", "")
            present = seen.present(machine)
            why = ""
            waits = "live" in facts and present is not None and facts.get("of") == present.name
            if kind in {"part", "source"} and not waits and not self._alive(volume.name):
                why = "under construction when it was killed"
            elif kind == "disk" and volume != present:
                why = "half made, or of a swap that was killed"
            elif kind == "checkpoint" and present is None and machine not in parts:
                why = "half removed: its disk is gone"
            elif kind == "checkpoint" and volume in seen.half_made(machine):
                why = "half made"
            elif volume.name not in origins and volume in seen.outgrown(machine):
                why = "copied to a larger volume"
            if why:
                yield Leftover(
                    kind={"disk": "disk", "checkpoint": "checkpoint"}.get(kind, "volume"),
                    ref=f"{self._vg}/{volume.name}",
                    owner=Owner(self._farm, facts["vm"]) if "vm" in facts else None,
                    created=when(facts.get("created", "")),
                    bytes=volume.space or int(volume.size * volume.data / 100),
                    why=why,
                )
        names = {v.name for v in seen.ours}
        for path in sorted(self._links.glob("[!.]*")):
            if path.is_symlink() and path.readlink().name not in names:
                yield self._left_file(path, "the volume it names is gone")
        for path in self._strays(seen):
            yield self._left_file(path, "of an operation that was killed")

    @staticmethod
    def _left_file(path: Path, why: str) -> Leftover:
        made = datetime.fromtimestamp(path.lstat().st_mtime, UTC)
        return Leftover(kind="file", ref=str(path), owner=None, created=made, bytes=0, why=why)


def _frozen(disk: LogicalVolume, name: str, now: datetime) -> dict[str, str]:
    """The facts of a checkpoint of that disk."""
    return {
        **kept(disk.facts), "kind": "checkpoint", "name": name, "of": disk.name,
        "created": now.isoformat(), "seq": disk.facts["seq"],
    }  # fmt: skip
