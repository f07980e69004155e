"""Disks as classic LVM volumes and snapshots, for groups without a thin pool.

``linked``: a VM runs on a writable snapshot of a sealed volume; a reset swaps in a fresh snapshot.
What the guest writes goes to the snapshot's copy-on-write area (``share`` of the disk); when that is
full the kernel drops the snapshot, and the disk is lost: ``ready`` extends it from ``WARN_AT`` percent
on, warns where the group has no room, and refuses to start a lost one. ``full``: a VM runs on a volume
of its own, copied at idle I/O priority (``copy``): full speed, no area to overflow; a reset is a copy.

Classic LVM has no snapshot of a snapshot and can't make a snapshot larger than its origin (lvextend(8)
extends its copy-on-write area alone), so these are copies in ``linked`` stores too, with progress and
going on after a kill:

- a checkpoint: the disk's content in a sealed volume of its own, from which a fresh snapshot is then
  swapped in. That costs time and the disk's size, once; every reset to it is instant. The alternative,
  to refuse checkpoints other than ``clean``, would leave those hosts without half of the tool.
- a clone larger than its template: the machine gets a sealed base of its own, of that size.
- a checkpoint that a larger disk is put back to: it is copied to a volume of that size, which takes its
  place.
- a disk made larger, if it was written to: it is a volume of its own until it is put back to a
  checkpoint.

A disk that is a volume of its own is extended. What its new extents held before is somebody's: a mark
(``fh.wipe``) says first from where on, and goes when that is wiped, at the latest by ``ready``. So no
guest sees it, and nothing that a guest wrote is ever wiped.

A copy of a ``full`` disk is read from a snapshot of it (removed afterwards), so that a VM started by
somebody else meanwhile can't tear it; a linked disk can't have one, and the caller has stopped its VM.
So of a running machine's ``full`` disk only the snapshot is made in the pause, and copied while the
machine runs on. With a linked one the machine stands still for the whole copy, and then goes on over
what it grew from before; the checkpoint is another volume.

``merge`` (linked) writes the disk's changes back into its base checkpoint (``lvconvert --merge``),
for who updates a checkpoint in place without room or patience for another copy. Never into a template.

Sealed volumes stay active: LVM can't make an active snapshot of an inactive classic origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from host.files import sync
from host.run import Runner
from hypervisors.answers import answer_of
from hypervisors.api import (
    CLEAN,
    Callbacks,
    Capacity,
    Directories,
    Disk,
    StepFn,
    WarnFn,
    check_larger,
    no_step,
    no_warning,
)
from hypervisors.disks.lvm.command import LogicalVolume, VolumeGroup, marked, retagged
from hypervisors.disks.lvm.copy import (
    CopyProgressFn,
    copy_idle,
    empty_from,
    no_progress,
    same_content,
    wipe_idle,
)
from hypervisors.disks.lvm.disks import LvmStore
from hypervisors.disks.lvm.state import HeldLock, LvmState, farm_of, kept
from hypervisors.disks.qcow2.format import measure
from hypervisors.disks.stores import StorePlace
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, DriverFailed, NoSpace, Unsupported, WrongState
from inventory.sizes import format_size

WARN_AT = 70.0
_SMALLEST = 32 * 2**20
_CHUNK = 4096  # of a snapshot: LVM's default, given explicitly so that sizes can be computed


class LvmClassicDisks(LvmStore):
    """Implements ``hypervisors.api.Disks``, ``FarmDisks``, ``LiveDisks``, ``DeviceDisks``,
    ``GrowableDisks``, ``WatchedDisks`` and ``MergingDisks``. Thread-safe; any number of processes may
    share a group."""

    def __init__(
        self,
        vg: str,
        farm: FarmIdentity,
        runner: Runner,
        *,
        links: Path,
        copy: Literal["linked", "full"] = "linked",
        share: float = 0.25,
        step: StepFn = no_step,
        reader_uid: int | None = None,
        headroom: int = 256 * 2**20,
        warn: WarnFn = no_warning,
        progress: CopyProgressFn = no_progress,
    ) -> None:
        """``share``: a snapshot's copy-on-write area, as a part of the disk's size."""
        super().__init__(
            vg, farm, runner, links=links, step=step, reader_uid=reader_uid, headroom=headroom, warn=warn
        )
        self._copy = copy
        self._share = share
        self._progress = progress

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
            place.pool, place.farm, runner, links=directories.state / "lvm", copy=place.copy,
            step=callbacks.step, reader_uid=reader_uid, warn=callbacks.warn,
            progress=lambda what, done, total: callbacks.working(f"{what}: {done * 100 // total} %"),
        )  # fmt: skip

    def capacity(self) -> Capacity:
        """Size and free space of the volume group, which others may use too."""
        group = self._lvm.report()
        return Capacity(group.size, group.free)

    def notes(self) -> tuple[str, ...]:
        """See ``WatchedDisks.notes``: snapshots that fill up, and what lvm.conf does about it."""
        seen, config = self._look(), self._lvm.autoextend()
        threshold = config["snapshot_autoextend_threshold"]
        does = (
            f"lvm.conf extends it at {threshold} %" if threshold < 100 else "lvm.conf does not extend it"
        )
        return tuple(
            f"the disk of {v.facts.get('machine')} is lost: its snapshot {self._vg}/{v.name} overflowed"
            if _lost(v)
            else f"snapshot {v.name} of {v.facts.get('machine')}: {v.data:.0f} % full ({does})"
            for v in seen.kind("disk")
            if v.snapshot and farm_of(v) == self._farm and (_lost(v) or v.data >= WARN_AT)
        )

    def merge(self, machine: str) -> None:
        """The disk's changes go into the checkpoint it grew from, which then is what the disk is now.
        The caller has stopped the VM. Takes as long as the changes are many.

        LVM goes on with a merge that was cut off when the volume is next activated. Until this method
        is called again, the checkpoint is marked as merging: nothing is removed and nothing is cloned
        over it. Errors: Unsupported for ``clean`` and for full copies."""
        with self._locked() as held:
            seen = self._look()
            base = next((v for v in seen.kind("checkpoint", machine) if "merging" in v.facts), None)
            if base is None or seen.present(machine):
                disk = self._ours(seen, machine)
                base = self._mergeable(seen, disk)
                self._step(f"merge the disk of {machine} into its checkpoint {disk.facts['base']}")
                sync(self._lvm.ready(disk.name))
                merged = datetime.now(UTC).isoformat()  # from here on it isn't what it was
                merging = {**base.facts, "merging": str(int(disk.facts["seq"]) + 1), "merged": merged}
                self._change(base.name, *retagged(base.facts, merging))
                if not base.writable:
                    self._change(base.name, "-prw")
                self._lvm.change("lvconvert", "--merge", f"{self._vg}/{disk.name}", timeout=24 * 3600)
                seen = self._look()
                base = seen.group.get(base.name) or base
            self._check_farm(base)
            facts = {
                **kept(base.facts), "kind": "disk", "base": base.facts["name"],
                "seq": base.facts["merging"],
                "created": datetime.now(UTC).isoformat(),
            }  # fmt: skip
            self._give(self._grow(held, seen, base, facts, first=True))
            self._change(base.name, "-pr")
            plain = {key: value for key, value in base.facts.items() if key != "merging"}
            self._change(base.name, *retagged(base.facts, plain))

    def enlarge(self, machine: str, size: int) -> Disk:
        """See ``GrowableDisks.enlarge``. A snapshot is replaced by a larger disk made beside it; a
        volume is extended. The mark comes last: a disk smaller than its mark is none."""
        self.settle_live(machine, None)
        with self._locked() as held:
            seen = self._look()
            volume = self._ours(seen, machine)
            check_larger(self._disk(seen, volume), size)
            self._unused(volume)
            self._tend(volume, seen.group)
            if not volume.active:
                self._change(volume.name, "-ay", "-K")
            if volume.snapshot and size > int(volume.facts["size"]):
                self._replaced(held, seen, volume, size)
            elif not volume.snapshot:
                self._extended(held, seen, volume, size)
            seen = self._look()
            return self._disk(seen, self._ours(seen, machine))

    def _replaced(self, held: HeldLock, seen: LvmState, volume: LogicalVolume, size: int) -> None:
        """By a snapshot of its base, made larger, if it is untouched; else by a copy."""
        machine, text = volume.facts["machine"], format_size(size)
        sync(self._lvm.ready(volume.name))
        base = seen.base(volume, volume.facts["base"])
        if base is not None and not self._equal(seen, volume, base, quick=True):
            base = None
        self._room(seen, f"the disk of {machine} with {text}", copy=size, source=base)
        self._step(f"make a larger disk of {machine}, {text}")
        facts = {
            **volume.facts, "size": str(size), "seq": str(int(volume.facts["seq"]) + 1),
            "created": datetime.now(UTC).isoformat(),
        }  # fmt: skip
        if base is not None:
            new = self._grow(held, seen, base, facts, first=False)
        else:
            new = self._copied_to(held, seen, volume, facts, f"disk of {machine}")
        try:
            self._give(new)
            self._step(f"swap in the larger disk of {machine}")
            self._point(machine, new)
        except BaseException:
            self._drop(new)
            raise
        old = seen.kind("disk", machine)
        old += self._outgrown(seen, machine, base, size) if base else ()
        self._remove_old([v.name for v in old])

    def _extended(self, held: HeldLock, seen: LvmState, volume: LogicalVolume, size: int) -> None:
        machine, wanted = volume.facts["machine"], seen.group.rounded(size)
        text = format_size(size)
        if others := [v.name for v in seen.group.volumes if v.snapshot and v.origin == volume.name]:
            raise WrongState(
                f"{machine}'s disk can't become larger: {', '.join(others)} in {self._vg} are snapshots "
                "of it, and LVM extends no active volume that has some",
                remedy="remove them, if nobody needs them (lvremove), then again",
            )
        if (more := wanted - volume.size) > 0:
            self._room(seen, f"the disk of {machine} with {text}", copy=more, source=None)
        self._step(f"make the disk of {machine} {text}")
        if more > 0:
            if "wipe" not in volume.facts:
                marked_ = {**volume.facts, "wipe": str(volume.size)}
                self._change(volume.name, *retagged(volume.facts, marked_))
                volume = replace(volume, facts=marked_)
            self._lvm.change("lvextend", "-L", f"{wanted}b", f"{self._vg}/{volume.name}")
        facts = self._wiped(held, volume)
        self._change(volume.name, *retagged(facts, {**facts, "size": str(size)}))

    def _finish(self, held: HeldLock, disk: LogicalVolume) -> None:
        self._wiped(held, disk)

    def _wiped(self, held: HeldLock, volume: LogicalVolume) -> Mapping[str, str]:
        """Wipe what a disk was extended by, unless that is done. Returns its facts as they then are."""
        if "wipe" not in volume.facts:
            return volume.facts
        machine, start = volume.facts["machine"], int(volume.facts["wipe"])
        self._step(f"wipe the new end of the disk of {machine}")
        held.keep(self._filling(volume.name))
        node = self._lvm.ready(volume.name)
        with held.released():
            wipe_idle(self._runner, node, start, f"disk of {machine}", self._progress)
        facts = {key: value for key, value in volume.facts.items() if key != "wipe"}
        self._change(volume.name, *retagged(volume.facts, facts))
        return facts

    def _mergeable(self, seen: LvmState, disk: LogicalVolume) -> LogicalVolume:
        """The disk's base, if it may take the disk's content."""
        machine, name = disk.facts["machine"], disk.facts["base"]
        base = seen.base(disk, name)
        if not disk.snapshot or base is None or name == CLEAN:
            raise Unsupported(
                f"{machine}: its disk grew from {name}, which can't take the changes",
                remedy="make a checkpoint: what comes after it can be merged into it",
            )
        self._unused(disk)
        self._tend(disk, seen.group)
        self._check_dependents(seen, [base, disk])
        self._room(seen, f"the disk of {machine}", copy=None, source=base)
        return base

    # -- what LvmStore asks for -------------------------------------------------------------------

    def _sealed_size(self, size: int, stored: int) -> int:
        return size

    def _copied(self, source: LogicalVolume, size: int, *, frozen: bool = False) -> int | None:
        return size if frozen or self._copy == "full" or size > source.size else None

    def _own_base(self, seen: LvmState, source: LogicalVolume, size: int) -> bool:
        return self._copy == "linked" and seen.group.rounded(size) > source.size

    def _blank(self, name: str, size: int, facts: Mapping[str, str]) -> None:
        self._lvm.change(
            "lvcreate", "-y", "-L", f"{size}b", "-n", name, "-kn", "-ay", *marked(facts), self._vg
        )

    def _fill(self, name: str, image: Path, form: str) -> None:
        """What its last extent held before, beyond the image's end, is no guest's to read."""
        super()._fill(name, image, form)
        _, size = measure(image)
        wipe_idle(self._runner, self._lvm.ready(name), size, f"end of {name}", no_progress)

    def _seal(self, name: str) -> None:
        self._change(name, "-pr")

    def _grow(
        self,
        held: HeldLock,
        seen: LvmState,
        source: LogicalVolume,
        facts: dict[str, str],
        *,
        first: bool,
    ) -> str:
        machine, size = facts["machine"], int(facts["size"])
        facts = {key: value for key, value in facts.items() if key != "wipe"}  # of the disk before
        if self._copy == "full":
            return self._copied_to(held, seen, source, facts, f"disk of {machine}", point=first)
        if self._own_base(seen, source, size):
            own = {**facts, "kind": "checkpoint", "name": facts["base"]}
            if source.facts["kind"] == "checkpoint":  # it stays the one that it is
                own = {**source.facts, "size": str(size)}
            copied = self._copied_to(held, seen, source, own, f"base of {machine}")
            source = self._look().group.get(copied) or source
        name = self._name(machine)
        if first:
            self._point(machine, name)
        try:
            self._snapshot(source, name, facts)
        except BaseException:
            self._drop(name)
            raise
        return name

    def _freeze(self, held: HeldLock, seen: LvmState, disk: LogicalVolume, facts: dict[str, str]) -> str:
        what = f"checkpoint {facts['name']} of {facts['machine']}"
        if disk.snapshot:
            return self._copied_to(held, seen, disk, facts, what)
        name = self._name(facts["machine"], "source")
        frozen = {**facts, "kind": "source"}
        held.keep(self._filling(name))
        try:
            self._snapshot(disk, name, frozen)
            return self._copied_to(held, seen, disk, facts, what, read=name)
        finally:
            self._drop(name)

    def _freeze_live(
        self, held: HeldLock, seen: LvmState, disk: LogicalVolume, facts: dict[str, str]
    ) -> None:
        if disk.snapshot:
            self._freeze(held, seen, disk, facts)
        else:
            name = self._name(facts["machine"], "source")
            self._snapshot(disk, name, {**facts, "kind": "source", "live": "1"})

    def _copy_live(self, held: HeldLock, seen: LvmState, disk: LogicalVolume) -> LvmState:
        for source in seen.kind("source", disk.facts["machine"]):
            if "live" not in source.facts or source.facts.get("of") != disk.name:
                continue
            facts = {key: value for key, value in source.facts.items() if key != "live"}
            what = f"checkpoint {facts['name']} of {facts['machine']}"
            self._step(f"copy {what}")
            held.keep(self._filling(source.name))
            try:
                facts["kind"] = "checkpoint"
                self._copied_to(held, seen, disk, facts, what, read=source.name)
            finally:
                self._drop(source.name)
            seen = self._look()
        return seen

    def _rebase(
        self, held: HeldLock, seen: LvmState, disk: LogicalVolume, frozen: str, name: str
    ) -> str:
        facts = {**disk.facts, "base": name, "seq": str(int(disk.facts["seq"]) + 1)}
        if not disk.snapshot:
            self._change(disk.name, *retagged(disk.facts, {**disk.facts, "base": name}))
            return disk.name
        source = self._look().group.get(frozen)
        assert source
        new = self._grow(held, seen, source, facts, first=False)
        try:
            self._give(new)
            self._point(facts["machine"], new)
        except BaseException:
            self._drop(new)
            raise
        return new

    def _area(self, size: int) -> int:
        """Bytes of a copy-on-write area; all of the disk and its table of exceptions at most."""
        area = min(max(int(size * self._share), _SMALLEST), size + size // 128 + 2**22)
        return -(-area // 512) * 512  # lvcreate takes no other

    def _snapshot(self, source: LogicalVolume, name: str, facts: Mapping[str, str]) -> None:
        self._lvm.change(
            "lvcreate", "-y", "-s", "-c", f"{_CHUNK}b", "-prw", "-kn", "-ay",
            "-L", f"{self._area(source.size)}b", "-n", name, *marked(facts), f"{self._vg}/{source.name}",
        )  # fmt: skip

    def _copied_to(
        self,
        held: HeldLock,
        seen: LvmState,
        source: LogicalVolume,
        facts: dict[str, str],
        what: str,
        *,
        read: str = "",
        point: bool = False,
    ) -> str:
        """A volume with these facts and ``source``'s content (read from volume ``read`` if given). A
        part that a killed call left for the same purpose is gone on with."""
        part = {**facts, "kind": "part", "for": what, "from": source.name}
        sealed = facts["kind"] == "checkpoint"
        left = [
            v for v in seen.kind("part", facts["machine"])
            if (v.facts.get("for"), v.facts.get("from")) == (what, source.name)
            and v.size >= int(facts["size"]) and not self._alive(v.name)
        ]  # fmt: skip
        name = left[0].name if left else self._name(facts["machine"])
        held.keep(self._filling(name))
        try:
            if left:
                if not left[0].writable:  # killed after it was sealed, before it was named
                    self._change(name, "-prw")
                if not left[0].active:
                    self._change(name, "-ay", "-K")
                self._change(name, *retagged(left[0].facts, part))
            else:
                self._blank(name, int(facts["size"]), part)
            origin, target = self._lvm.ready(read or source.name), self._lvm.ready(name)
            with held.released():
                # All that a guest can have written to: its disk has whole extents
                size = min(source.size, seen.group.rounded(int(facts["size"])))
                copy_idle(self._runner, origin, target, size, self._record(name), what, self._progress)
            if sealed:
                self._seal(name)
            if point:
                self._point(facts["machine"], name)
            self._change(name, *retagged(part, facts))
        except BaseException:
            self._drop(name)
            raise
        self._record(name).unlink(missing_ok=True)
        return name

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
        linked = self._copy == "linked" and source is not None
        need = seen.group.rounded(copy or 0)
        if source is not None and (linked or "checkpoint" in what):
            need += seen.group.rounded(self._area(max(source.size, copy or 0)))
        if seen.group.free < beside + need + self._headroom:
            raise NoSpace(
                f"{self._vg}: {format_size(seen.group.free)} free, "
                f"{what} needs {format_size(beside + need + self._headroom)}",
                remedy=(Call("gc"), ", or vgextend the group"),
            )
        return need

    def _space(self, seen: LvmState, source: LogicalVolume) -> int:
        return seen.group.rounded(self._area(source.size))

    def _tend(self, disk: LogicalVolume, group: VolumeGroup) -> None:
        if not disk.snapshot:
            return
        machine = disk.facts.get("machine")
        if _lost(disk):
            raise DriverFailed(
                f"the disk of {machine} is lost: its snapshot {self._vg}/{disk.name} "
                f"({format_size(disk.space)}) was full, and the kernel dropped it",
                remedy="reset the VM; give its disk a larger part of the group if that happens again",
            )
        most = disk.size + disk.size // 128 + 2**22
        if disk.data < WARN_AT or disk.space >= most:
            return
        more = min(group.rounded(self._area(disk.size)), group.free, group.rounded(most - disk.space))
        if more:
            self._step(f"extend the snapshot under the disk of {machine}")
            self._lvm.change("lvextend", "-L", f"+{more}b", f"{self._vg}/{disk.name}")
        else:
            self._warn(
                f"the snapshot under the disk of {machine} is {disk.data:.0f} % full and "
                f"{self._vg} has nothing free: when it is full the disk is lost"
            )

    def _used(self, seen: LvmState, disk: LogicalVolume) -> int:
        return disk.space + sum(v.space for v in seen.checkpoints(disk.facts["machine"]))

    def _equal(
        self, seen: LvmState, disk: LogicalVolume, base: LogicalVolume, *, quick: bool
    ) -> bool | None:
        """Whether the disk is its base. A snapshot is, if it is one of that very volume and its area
        holds nothing but its own table, by the kernel's count (dm-snapshot: allocated = metadata
        sectors). A full copy is read and compared."""
        if disk.snapshot:
            if disk.origin != base.name or not disk.active:
                return False
            device = f"{self._vg.replace('-', '--')}-{disk.name.replace('-', '--')}"
            words = self._runner.read("dmsetup", "status", device).stdout.split()
            with answer_of("dmsetup"):
                used, slash, _ = words[3].partition("/")  # else "Invalid", "Overflow"
                return words[2] == "snapshot" and slash == "/" and used == words[-1]
        if quick:
            return None
        node, other = self._lvm.ready(disk.name), self._lvm.ready(base.name)
        return same_content(node, other, min(disk.size, base.size)) and empty_from(node, base.size)


def _lost(disk: LogicalVolume) -> bool:
    return disk.invalid or disk.data >= 100
