"""Disks as LVM thin volumes: a template is a sealed thin volume, a VM's disk a thin snapshot of it.

A clone is one ``lvcreate -s``, with its tags, in one commit of LVM's; made larger than its source it is
one ``lvextend`` more, and counts as a disk only then (its ``fh.size`` says how large it must be). Sealed
volumes are read-only, inactive and flagged to stay so (``-ky``); disks are not flagged (``-kn``), so the
host activates them at boot.

A running machine's disk is kept in one commit, too, and its volume stays the same: that it grows from
the checkpoint now is a mark of its own, set after the pause. Until then it is said to grow from what it
did before, which is also true.

Pristine is proved by the pool's own metadata: a metadata snapshot (kernel:
admin-guide/device-mapper/thin-provisioning, ``reserve_metadata_snap``) and thin_delta(8) of the disk and
its base: not one block mapped, unmapped or remapped. The number of mapped sectors would not do, as
overwriting a block doesn't change it. A pool has one metadata snapshot at a time: where somebody else
holds it, or thin_delta isn't installed, both volumes are read and compared.
"""

from __future__ import annotations

import contextlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from host.files import sync
from host.run import Runner, which
from hypervisors.answers import answer_of
from hypervisors.api import (
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
from hypervisors.disks.lvm.command import LogicalVolume, marked, retagged
from hypervisors.disks.lvm.copy import empty_from, same_content
from hypervisors.disks.lvm.disks import LvmStore
from hypervisors.disks.lvm.state import HeldLock, LvmState
from hypervisors.disks.stores import StorePlace
from hypervisors.ownership import FarmIdentity
from inventory.errors import Call, CommandFailed, DriverFailed, NoSpace, NotFound, UsageError
from inventory.sizes import format_size

_METADATA_LIMIT = 90.0  # percent: beyond it nothing new is made
_WARN = 80.0


class LvmThinDisks(LvmStore):
    """Implements ``hypervisors.api.Disks``, ``FarmDisks``, ``LiveDisks``, ``DeviceDisks``,
    ``GrowableDisks`` and ``WatchedDisks``. Thread-safe; any number of processes may share a pool."""

    def __init__(
        self,
        vg: str,
        pool: str,
        farm: FarmIdentity,
        runner: Runner,
        *,
        links: Path,
        step: StepFn = no_step,
        reader_uid: int | None = None,
        headroom: int = 256 * 2**20,
        warn: WarnFn = no_warning,
    ) -> None:
        super().__init__(
            vg, farm, runner, links=links, step=step, reader_uid=reader_uid, headroom=headroom, warn=warn
        )
        if not re.fullmatch(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}", pool):
            raise UsageError(f"{pool!r} is not the name of a thin pool")
        self._pool_name = pool

    _fill_options = ("--target-is-zero",)  # a thin volume's unmapped blocks are

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
            place.pool, place.dataset, place.farm, runner, links=directories.state / "lvm",
            step=callbacks.step, reader_uid=reader_uid, warn=callbacks.warn,
        )  # fmt: skip

    def capacity(self) -> Capacity:
        """Size and free space of the pool's data. What autoextend may add is not counted: it may never
        come."""
        pool = self._pool(self._look())
        return Capacity(pool.size, int(pool.size * (100 - pool.data) / 100))

    def notes(self) -> tuple[str, ...]:
        """See ``WatchedDisks.notes``: how full the pool is, and what lvm.conf does about it."""
        seen = self._look()
        pool, config = self._pool(seen), self._lvm.autoextend()
        place, threshold = f"{self._vg}/{pool.name}", config["thin_pool_autoextend_threshold"]
        notes = [
            f"{place}: {what} {percent:.0f} % full"
            for what, percent in (("data", pool.data), ("metadata", pool.metadata))
            if percent >= _WARN
        ]
        if threshold >= 100:
            notes.append(f"{place}: lvm.conf does not extend it (thin_pool_autoextend_threshold = 100)")
        elif not config["monitoring"]:
            notes.append(
                f"{place}: lvm.conf's monitoring is off, so it is not extended at {threshold} %"
            )
        elif not seen.group.free:
            notes.append(f"{place}: to be extended at {threshold} %, but {self._vg} has nothing free")
        return tuple(notes)

    def enlarge(self, machine: str, size: int) -> Disk:
        """See ``GrowableDisks.enlarge``. The mark comes last: a disk smaller than its mark is none."""
        with self._locked():
            seen = self._look()
            volume = self._ours(seen, machine)
            check_larger(self._disk(seen, volume), size)
            self._unused(volume)
            self._room(seen, f"a larger disk of {machine}", copy=None, source=None)
            self._step(f"make the disk of {machine} {format_size(size)}")
            if seen.group.rounded(size) > volume.size:
                self._lvm.change("lvextend", "-L", f"{size}b", f"{self._vg}/{volume.name}")
            self._change(volume.name, *retagged(volume.facts, {**volume.facts, "size": str(size)}))
            seen = self._look()
            return self._disk(seen, self._ours(seen, machine))

    # -- what LvmStore asks for -------------------------------------------------------------------

    def _blank(self, name: str, size: int, facts: Mapping[str, str]) -> None:
        self._lvm.change(
            "lvcreate", "-V", f"{size}b", "-n", name, "-kn", "-ay", *marked(facts),
            "--thinpool", self._pool_name, self._vg,
        )  # fmt: skip

    def _seal(self, name: str) -> None:
        self._change(name, "-an")
        self._change(name, "-pr", "-ky")

    def _grow(
        self,
        held: HeldLock,
        seen: LvmState,
        source: LogicalVolume,
        facts: dict[str, str],
        *,
        first: bool,
    ) -> str:
        name, machine = self._name(facts["machine"]), facts["machine"]
        if first:
            self._point(machine, name)
        try:
            self._snapshot(source.name, name, facts, "-prw", "-kn", "-ay")
            if seen.group.rounded(int(facts["size"])) > source.size:
                self._lvm.change("lvextend", "-L", f"{facts['size']}b", f"{self._vg}/{name}")
        except BaseException:
            self._drop(name)
            raise
        return name

    def _freeze(self, held: HeldLock, seen: LvmState, disk: LogicalVolume, facts: dict[str, str]) -> str:
        name = self._name(facts["machine"], facts["name"])
        self._snapshot(disk.name, name, facts, "-pr", "-ky")
        return name

    def _rebase(
        self, held: HeldLock, seen: LvmState, disk: LogicalVolume, frozen: str, name: str
    ) -> str:
        self._change(disk.name, *retagged(disk.facts, {**disk.facts, "base": name}))
        return disk.name

    def _snapshot(self, source: str, name: str, facts: Mapping[str, str], *options: str) -> None:
        self._lvm.change("lvcreate", "-s", *options, "-n", name, *marked(facts), f"{self._vg}/{source}")

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
        pool = self._pool(seen)
        place = f"{self._vg}/{pool.name}"
        free, need = int(pool.size * (100 - pool.data) / 100), (copy or 0) + beside + self._headroom
        if not swap and (pool.health == "out_of_data" or free < need):  # a swap frees more than it takes
            self._full(
                seen, f"{place}: {format_size(free)} of data free, {what} needs", need, need - free
            )
        if pool.metadata >= _METADATA_LIMIT:
            short = pool.metadata_size // 4
            self._full(seen, f"{place}: metadata {pool.metadata:.0f} % full, {what} needs", short, short)
        return copy or 0

    def _full(self, seen: LvmState, text: str, need: int, missing: int) -> None:
        """NoSpace, unless LVM is set to extend the pool and the group has what is missing."""
        config = self._lvm.autoextend()
        threshold = config["thin_pool_autoextend_threshold"]
        on = threshold < 100 and config["monitoring"]
        metadata = "metadata" in text
        if on and seen.group.free >= missing > 0 and self._pool(seen).health != "out_of_data":
            self._warn(f"{text} {format_size(need)}: LVM is set to extend it at {threshold} %")
            return
        how = (
            f"on at {threshold} %, with {format_size(seen.group.free)} free in the group"
            if on
            else "off"
        )
        option = "--poolmetadatasize" if metadata else "-L"
        raise NoSpace(
            f"{text} {format_size(need)} (autoextend is {how})",
            remedy=(Call("gc"), f", or lvextend {option} +SIZE {self._vg}/{self._pool_name}"),
        )

    def _space(self, _seen: LvmState, _source: LogicalVolume) -> int:
        return 0

    def _pool(self, seen: LvmState) -> LogicalVolume:
        pool = seen.group.get(self._pool_name)
        if pool is None or pool.metadata_size == 0:
            raise NotFound(
                f"{self._vg} has no thin pool {self._pool_name}",
                remedy=f"lvcreate --type thin-pool -L SIZE -n {self._pool_name} {self._vg}; or name "
                "another as the host's disks.dataset",
            )
        if pool.health in {"failed", "metadata_read_only"}:
            raise DriverFailed(
                f"thin pool {self._vg}/{pool.name} takes no changes any more: {pool.health}",
                remedy=f"deactivate its volumes, then lvconvert --repair {self._vg}/{pool.name}",
            )
        return pool

    def _tend(self, disk: LogicalVolume, group: object) -> None:
        """Nothing to do: a full pool refuses by itself, and was looked at when the disk was made."""

    def _used(self, seen: LvmState, disk: LogicalVolume) -> int:
        """Bytes that the disk takes at least: those mapped beyond what its base maps. Blocks overwritten
        since are no longer shared, but only the whole metadata could tell how many."""
        base = seen.base(disk, disk.facts.get("base", ""))
        mapped = disk.size * disk.data / 100
        return max(0, int(mapped - (base.size * base.data / 100 if base else 0)))

    # -- pristine ---------------------------------------------------------------------------------

    def _equal(
        self, seen: LvmState, disk: LogicalVolume, base: LogicalVolume, *, quick: bool
    ) -> bool | None:
        if quick and self._lock.held():
            return None
        if which("thin_delta"):
            with self._locked(), self._metadata_snapshot() as metadata:
                if metadata:
                    return self._no_difference(disk, base, metadata)
        if quick:
            return None
        with self._locked(), self._readable(base) as other, self._readable(disk) as one:
            return same_content(one, other, min(disk.size, base.size)) and empty_from(one, base.size)

    def _no_difference(self, disk: LogicalVolume, base: LogicalVolume, metadata: str) -> bool:
        ids = ("--thin1", str(base.thin_id), "--thin2", str(disk.thin_id))
        try:
            text = self._runner.read("thin_delta", "-m", *ids, metadata, timeout=600).stdout
        except CommandFailed as error:
            raise DriverFailed(
                f"comparing {self._vg}/{disk.name} with its base failed: {error.message}",
                remedy="reset the VM",
            ) from error
        with answer_of("thin_delta"):
            diff = ET.fromstring(text).find("diff")  # noqa: S314 - thin_delta's own numbers
        return diff is not None and all(child.tag == "same" for child in diff)

    @contextlib.contextmanager
    def _metadata_snapshot(self) -> Iterator[str]:
        """The metadata device with a snapshot reserved; "" where somebody else has one. Ours, of a
        process that was killed, is known by a file that is there while we hold one. Nothing that lasts
        is changed, so a plan may do it too."""
        pool = f"{self._vg.replace('-', '--')}-{self._pool_name.replace('-', '--')}"
        device, ours = f"{pool}-tpool", self._links / f".{self._pool_name}.metadata-snapshot"
        words = self._runner.read("dmsetup", "status", device).stdout.split()
        if len(words) < 7:  # "thin-pool Fail", or "Error"
            raise DriverFailed(
                f"thin pool {self._vg}/{self._pool_name} has failed",
                remedy=f"deactivate its volumes, then lvconvert --repair {self._vg}/{self._pool_name}",
            )
        held = words[6] != "-"
        if held and not ours.exists():
            yield ""
            return
        ours.touch(mode=0o600)
        sync(self._links)
        if held:
            self._runner.read("dmsetup", "message", device, "0", "release_metadata_snap")
        self._runner.read("dmsetup", "message", device, "0", "reserve_metadata_snap")
        try:
            yield f"/dev/mapper/{pool}_tmeta"
        finally:
            self._runner.read("dmsetup", "message", device, "0", "release_metadata_snap")
            ours.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _readable(self, volume: LogicalVolume) -> Iterator[Path]:
        """Active for as long as it is read."""
        if volume.active:
            yield self._lvm.ready(volume.name)
            return
        self._change(volume.name, "-ay", "-K")
        try:
            yield self._lvm.ready(volume.name)
        finally:
            self._change(volume.name, "-an")
