"""One XenAPI pool as farmhand uses it: objects looked up with few calls, disks grown beside the old ones
and swapped by a mark, things removed in the order that loses nothing.

A machine's disk is the VDI that its mark ``farmhand:disk`` names, whatever is attached at the moment: to
write that mark is one atomic call, which is how disks are swapped (``settle`` then attaches what the
mark names). How a VM of ours is known, and what is not: see ``records``.

A server writes its database to its disk minutes late, and what it does to the storage at once. So a disk
is destroyed only when all that went before is on the server's disk (``keep``, ``destroy_vdi``), whoever
did it: what other processes did is not known to be there, so that looking a machine up counts like a
change. Removals may be lost: what they left is known for what it is, and removed again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hypervisors.api import Power, WarnFn, no_warning
from hypervisors.marks import DamagedMarks
from hypervisors.ownership import FarmIdentity
from hypervisors.xenapi.errors import GONE, XenApiError
from hypervisors.xenapi.notes import Notes
from hypervisors.xenapi.records import DISK, NULL, Vdi, XenApiVm, checkpoint_of
from hypervisors.xenapi.session import Sessions, is_change
from hypervisors.xenapi.wait import Batch, TaskProgressFn, do, look, no_progress, watch
from inventory.errors import Call, DriverFailed, FarmhandError, NotFound

ObjectRecord = Mapping[str, Any]
_HALTING = 10.0
"""Seconds in which a machine is off whose shutdown was answered with an error."""
_REMOVING = (
    "VDI.destroy", "VBD.destroy", "VIF.destroy", "VM.destroy", "VM.hard_shutdown", "VM.start",
)  # fmt: skip
"""What may be lost, for it is done again; without power nothing runs."""


@dataclass(frozen=True, slots=True)
class PoolMachine:
    """A machine with all that belongs to it, as of one moment. ``token``: that moment's, to ask for what
    changed since (``wait.look``)."""

    vm: XenApiVm
    vdi: Vdi | None  # the one the mark names, if it is there
    checkpoints: tuple[XenApiVm, ...]  # our snapshots of it, oldest first
    unfinished: tuple[XenApiVm, ...]  # other snapshots of it
    vbds: Mapping[str, ObjectRecord]
    source: XenApiVm | None  # the template that its mark names, if it is there
    token: str
    others: Mapping[str, ObjectRecord] = field(default_factory=dict)

    @property
    def attached(self) -> tuple[str, str] | None:
        """The references of the VBD and the VDI at the disk's place; None if nothing is attached
        there."""
        for ref, record in self.vbds.items():
            if record["userdevice"] == DISK and record["VDI"] != NULL:
                return ref, str(record["VDI"])
        return None

    @property
    def in_place(self) -> bool:
        """Whether the machine's own disk is the one attached."""
        return bool(self.vdi and self.attached and self.attached[1] == self.vdi.ref)

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        return ("clean", *(vm.marks["checkpoint"] for vm in self.checkpoints))

    def checkpoint(self, name: str) -> XenApiVm | None:
        return next((vm for vm in self.checkpoints if vm.marks["checkpoint"] == name), None)

    def new_checkpoint(self, name: str) -> dict[str, str]:
        """The marks of a checkpoint that is being made of it. Its template is that of the checkpoint
        that the disk grew from, which may be from before a move."""
        assert self.vm.owner
        grown = self.checkpoint(self.base)
        of = {**self.vm.marks, **(grown.marks if grown else {})}
        return {
            "farm": self.vm.owner.farm.mark, "vm": self.vm.owner.vm, "kind": "checkpoint",
            "checkpoint": name, "created": datetime.now(UTC).isoformat(),
            **{key: of[key] for key in ("template", "source") if key in of},
        }  # fmt: skip

    @property
    def base(self) -> str:
        """The checkpoint the present disk grew from. A checkpoint that was cut off is not there; then
        it is the one before."""
        base = self.vm.marks.get("base", "clean")
        return base if base in self.checkpoint_names else self.vm.marks.get("before", "clean")

    def freshness(self, vdi: Vdi | None = None) -> str:
        """See ``freshness``."""
        seen = vdi or self.vdi
        return freshness(seen) if seen else ""


def freshness(vdi: Vdi) -> str:
    """A text that changes when a disk is written to, as far as its record tells: its own bytes in the
    storage, as of VDI.update, and the snapshots of it. ``Pool.never_ran`` tells whether a machine ran
    with it."""
    return f"{vdi.uuid} {vdi.used} {len(vdi.record['snapshots'])}"


class _Mine(threading.local):
    """What concerns one thread's calls; each thread does one thing at a time."""

    doubts = True
    """Something was changed, by whomever, that the server's disk may not have."""
    renewed: int | None = None
    """``Sessions.renewed`` as of the first change of its own that isn't kept; None: there is none."""
    lost = False
    """The server was started again since that: nothing is destroyed before it was looked at anew."""
    failed = False
    """A call was cut off, or not answered, since all was looked at."""


class Pool:
    def __init__(
        self,
        sessions: Sessions,
        farm: FarmIdentity,
        *,
        sr: str = "",
        copy: bool = False,
        progress: TaskProgressFn = no_progress,
        notes: Notes | None = None,
        warn: WarnFn = no_warning,
    ) -> None:
        """``notes``: where what was made for us is noted, on this machine's disk."""
        self.sessions, self.farm, self.copy = sessions, farm, copy
        self.notes = notes or Notes()
        self._damaged = DamagedMarks(warn)
        self._sr_name, self._sr = sr, ""
        self._progress = progress
        self._guard = threading.Lock()
        self._refs: dict[str, str] = {}  # of machines of ours, by name, where they were last seen
        self._changes = self._kept = 0  # so many were made, and so many of them are surely kept
        self._mine = _Mine()
        self._noted: list[str] = []

    def call(self, name: str, *arguments: object) -> Any:
        return self._counted(name, lambda: self.sessions.call(name, *arguments))

    def do(self, name: str, *arguments: object) -> str:
        """A task; see ``wait.do``."""
        return str(
            self._counted(name, lambda: do(self.sessions, name, *arguments, progress=self._progress))
        )

    def _counted(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except FarmhandError:
            self._mine.failed = True
            raise
        finally:
            self._count(name)

    def _looks(self) -> None:
        """Begin a new look at what there is. What failed before has been told. Notes of what was made
        stay, for whoever sweeps up."""
        self._mine.doubts, self._mine.lost = True, False
        if self._mine.failed:
            self._mine.failed, self._mine.renewed = False, None
            with self._guard:
                self._noted = []

    # -- what outlives the server's power ---------------------------------------------------------

    def _count(self, name: str) -> None:
        """Count a change that was made. A ``keep`` that has begun already may not have it."""
        if not is_change(name):
            return
        with self._guard:
            self._changes += 1
        if name not in _REMOVING:
            self._mine.doubts = True
            if self._mine.renewed is None:
                self._mine.renewed = self.sessions.renewed

    def keep(self) -> None:
        """Have all that was changed until now on the server's disk. DriverFailed if the server was
        started again since this thread's first change: it may have lost that."""
        with self._guard:
            changes, noted = self._changes, list(self._noted)
        if not self._mine.lost:
            self.sessions.call("pool.sync_database")
            mine, self._mine.renewed = self._mine.renewed, None
            self._mine.lost = mine is not None and mine != self.sessions.renewed
        if self._mine.lost:
            self._mine.doubts = True
            with self._guard:
                self._noted = []  # the notes themselves stay, for whoever sweeps up
            raise DriverFailed(
                f"{self.sessions.url}: the server was started again meanwhile, and may have lost what "
                "was just changed",
                remedy=(Call("recover"), ", then do it again"),
            )
        self._mine.doubts = False
        with self._guard:
            self._kept = max(self._kept, changes)
            self._noted = [uuid for uuid in self._noted if uuid not in noted]
        self.notes.drop(noted)

    def keep_first(self) -> None:
        """Called before something is destroyed: keep what was changed, unless all is kept."""
        if self._mine.doubts:
            self.keep()

    def keep_rest(self) -> None:
        """Called at the end of a command: keep what was changed, unless all is kept."""
        if self._changes > self._kept:
            self.keep()

    def note(self, vdis: Iterable[Vdi]) -> None:
        """Note that these were made for us: see ``notes``."""
        uuids = [vdi.uuid for vdi in vdis]
        self.notes.add(uuids)
        with self._guard:
            self._noted += uuids

    def note_of(self, ref: str, batch: Batch) -> None:
        """Note the VM's disks among what a look has brought; never anybody else's."""
        found = batch.records
        refs = {r["VDI"] for r in found.values() if r and r.get("VM") == ref and "userdevice" in r}
        refs.add((found.get(ref) or {}).get("suspend_VDI", NULL))
        self.note([Vdi(vdi, record) for vdi in refs if (record := found.get(vdi))])

    def destroy_vdi(self, ref: str) -> None:
        """Destroy a disk for good. One whose file went before, in a power cut that took the news of it,
        goes once the server has looked at its storage."""
        self.keep_first()
        try:
            self.call("VDI.destroy", ref)
        except XenApiError as error:
            if error.code in GONE:
                return
            if not error.code.startswith("SR_BACKEND_FAILURE"):
                raise
            self.call("SR.scan", self.call("VDI.get_SR", ref))
            if look(self.sessions, [f"vdi/{ref}"]).records.get(ref) is not None:
                raise

    # -- what there is ----------------------------------------------------------------------------

    def machine(self, name: str) -> XenApiVm | None:
        """A machine of that name: ours, if one is, else anybody's. Names are not unique on a server."""
        self._looks()
        known = self._refs.get(name)
        if known is not None:
            with contextlib.suppress(XenApiError):
                vm = XenApiVm(known, self.call("VM.get_record", known))
                if vm.name == name and self._is_ours(vm):
                    return vm
        found = []
        for ref in self.call("VM.get_by_name_label", name):
            try:
                vm = XenApiVm(ref, self.call("VM.get_record", ref))
            except XenApiError as error:
                if error.code in GONE:  # it went between the two
                    continue
                raise
            self._tell(vm)
            if vm.is_machine and vm.kind != "gone":
                found.append(vm)
        best = max(
            found,
            key=lambda vm: (vm.kind == "machine", vm.belongs(self.farm)),
            default=None,
        )
        if best is not None and self._is_ours(best):
            self._refs[name] = best.ref
        return best

    def know(self, name: str, ref: str) -> None:
        """Remember the reference of a machine of ours that was just made: it is then looked up with one
        call less."""
        self._refs[name] = ref

    def _is_ours(self, vm: XenApiVm) -> bool:
        return vm.is_machine and vm.kind == "machine" and vm.belongs(self.farm)

    def seen(self, vm: XenApiVm) -> PoolMachine:
        wanted = [f"vm/{ref}" for ref in vm.record["snapshots"]]
        wanted += [f"vbd/{ref}" for ref in vm.record["VBDs"]]
        _, _, template = vm.marks.get("source", "").partition(" ")
        if template:
            wanted.append(f"vm/{template}")
        if vm.disk:
            wanted.append(f"vdi/{vm.disk[1]}")
        batch = look(self.sessions, wanted)
        records = {ref: record for ref, record in batch.records.items() if record is not None}
        snapshots = [XenApiVm(ref, records[ref]) for ref in vm.record["snapshots"] if ref in records]
        ours = [s for s in snapshots if s.kind == "checkpoint" and vm.owner and s.belongs(vm.owner.farm)]
        return PoolMachine(
            vm=vm,
            vdi=self._disk(vm, records),
            checkpoints=tuple(sorted(ours, key=lambda s: checkpoint_of(s).created)),
            unfinished=tuple(s for s in snapshots if s not in ours),
            vbds={ref: records[ref] for ref in vm.record["VBDs"] if ref in records},
            source=XenApiVm(template, records[template]) if template in records else None,
            token=batch.token,
        )

    def _disk(self, vm: XenApiVm, records: Mapping[str, ObjectRecord]) -> Vdi | None:
        """The machine's disk, by its mark's uuid; its reference may have changed, as when storage was
        moved. If that disk is gone and another one is attached, a switch landed late: whoever asked for
        it had been killed or given up, and the fresh disk was removed. The attached one is then the
        machine's, as it was."""
        if vm.disk is None:
            return None
        uuid, ref = vm.disk
        if ref in records and records[ref]["uuid"] == uuid:
            return Vdi(ref, records[ref])
        try:
            ref = self.call("VDI.get_by_uuid", uuid)
            return Vdi(ref, self.call("VDI.get_record", ref))
        except XenApiError as error:
            if error.code not in GONE:
                raise
        for vbd in (records[v] for v in vm.record["VBDs"] if v in records):
            if vbd["userdevice"] == DISK and vbd["VDI"] != NULL:
                with contextlib.suppress(XenApiError):
                    return Vdi(vbd["VDI"], self.call("VDI.get_record", vbd["VDI"]))
        return None

    @staticmethod
    def disk_among(vm: XenApiVm, vdis: Iterable[Vdi]) -> Vdi | None:
        """The machine's disk, found as by ``_disk``, in a list of all disks."""
        if vm.disk is None:
            return None
        found = None
        for vdi in vdis:
            if vdi.uuid == vm.disk[0]:
                return vdi
            is_seed = vdi.written.get("kind") == "seed"
            if not is_seed and set(vdi.record["VBDs"]) & set(vm.record["VBDs"]):
                found = vdi
        return found

    def all_vms(self) -> list[XenApiVm]:
        self._looks()
        vms = [XenApiVm(ref, record) for ref, record in self.call("VM.get_all_records").items()]
        for vm in vms:
            self._tell(vm)
        return vms

    def _tell(self, vm: XenApiVm) -> None:
        if damaged := vm.damaged:
            self._damaged.tell(f"VM {vm.name} ({vm.uuid})", damaged)

    def all_vdis(self) -> dict[str, Vdi]:
        records = self.call("VDI.get_all_records")
        return {ref: Vdi(ref, record) for ref, record in records.items()}

    def sr(self) -> str:
        """The storage repository's reference; looked up once."""
        if not self._sr:
            if self._sr_name:
                found = self.call("SR.get_by_name_label", self._sr_name)
                if len(found) != 1:
                    many = "several" if found else "no"
                    raise NotFound(
                        f"{self.sessions.url}: there is {many} storage repository {self._sr_name!r}",
                        remedy="xe sr-list shows them; name one in the host's 'sr'",
                    )
                self._sr = str(found[0])
            else:
                (pool,) = self.call("pool.get_all_records").values()
                self._sr = str(pool["default_SR"])
                if self._sr == NULL:
                    raise NotFound(
                        f"{self.sessions.url}: the pool has no default storage repository",
                        remedy="name one in the host's 'sr'",
                    )
        return self._sr

    # -- whether a disk was used -------------------------------------------------------------------

    def update(self, vdi: Vdi) -> None:
        """Have the disk's record say what its storage says of it now; before, it has what the storage
        said once."""
        try:
            self.call("VDI.update", vdi.ref)
        except XenApiError as error:
            if error.code != "SR_OPERATION_NOT_SUPPORTED":  # then it is always up to date
                raise

    def never_ran(self, vdi: Vdi, vbds: Mapping[str, ObjectRecord]) -> bool:
        """Whether no machine ever ran with it, whoever started it. A VBD gets its device's name in the
        guest when it is first plugged, and keeps it as long as it is there; a start and a halt leave
        nothing else that lasts (read in xapi's xapi_xenops.ml, update_vbd). ``vbds``: those known
        already. A disk that no VBD has tells nothing: False."""
        refs = vdi.record["VBDs"]
        more = [ref for ref in refs if ref not in vbds]
        known = {**vbds, **(look(self.sessions, [f"vbd/{ref}" for ref in more]).records if more else {})}
        records = [known.get(ref) for ref in refs]
        return bool(records) and all(record and not record["device"] for record in records)

    def shut_off(self, name: str, vm: XenApiVm, *, limit: float = 0.0) -> None:
        """VM.clean_shutdown (a task of so many seconds at most) or VM.hard_shutdown. Now and then xapi
        answers with INTERNAL_ERROR although the machine is off a moment later: its own event thread
        removes a device's record that is still wanted (measured, 23.10)."""
        try:
            if limit:
                do(self.sessions, name, vm.ref, limit=limit)
            else:
                self.call(name, vm.ref)
        except XenApiError as error:
            if error.code != "INTERNAL_ERROR" or "does not exist in xenopsd" not in str(error):
                raise
            for record in watch(self.sessions, f"vm/{vm.ref}", _HALTING):
                if record is not None and record["power_state"] == "Halted":
                    return
            raise

    # -- making disks ---------------------------------------------------------------------------------

    def new_vdi(self, name: str, size: int, config: Mapping[str, str]) -> str:
        ref = str(
            self.call(
                "VDI.create",
                {
                    "name_label": name, "name_description": "", "SR": self.sr(),
                    "virtual_size": str(size), "type": "user", "sharable": False,
                    "read_only": False, "other_config": dict(config),
                },
            )
        )  # fmt: skip
        self.note([Vdi(ref, {"uuid": self.call("VDI.get_uuid", ref)})])
        return ref

    def attach(self, vm: str, vdi: str, device: str, *, read_only: bool) -> None:
        self.call(
            "VBD.create",
            {
                "VM": vm, "VDI": vdi, "userdevice": device, "bootable": not read_only,
                "mode": "RO" if read_only else "RW", "type": "Disk", "empty": False,
                "unpluggable": True, "other_config": {}, "qos_algorithm_type": "",
                "qos_algorithm_params": {},
            },
        )  # fmt: skip

    # -- growing and swapping ---------------------------------------------------------------------

    def grow(self, source: XenApiVm, name: str, token: str) -> tuple[XenApiVm, Vdi]:
        """Make a new VM ``name`` with a disk of its own, grown from that of ``source``, a template or a
        snapshot. ``token``: of a look before that."""
        if self.copy:
            ref = self.do("VM.copy", source.ref, name, self.sr())
        else:
            ref = self.call("VM.clone", source.ref, name)
        try:
            batch = look(self.sessions, [f"vm/{ref}", "vbd", "vdi"], token)
            found = self._disk_at(ref, batch)
            if found is None:  # as where the server dropped events
                vm = XenApiVm(ref, self.call("VM.get_record", ref))
                attached = look(self.sessions, [f"vbd/{vbd}" for vbd in vm.record["VBDs"]])
                refs = [r["VDI"] for r in attached.records.values() if r and r["userdevice"] == DISK]
                if not refs:
                    raise DriverFailed(
                        f"{source.name} has no disk at place {DISK}",
                        remedy="a template of ours has one: was it changed by hand?",
                    )
                found = vm, Vdi(refs[0], self.call("VDI.get_record", refs[0]))
            self.note([found[1]])
            return found
        except BaseException:
            self.undo(ref)
            raise

    @staticmethod
    def _disk_at(ref: str, batch: Batch) -> tuple[XenApiVm, Vdi] | None:
        record = batch.records.get(ref)
        for seen in batch.records.values():
            if seen and seen.get("VM") == ref and seen.get("userdevice") == DISK:
                vdi = batch.records.get(seen["VDI"])
                if record and vdi:
                    return XenApiVm(ref, record), Vdi(seen["VDI"], vdi)
        return None

    def settle(self, seen: PoolMachine, vdi: Vdi | None = None) -> None:
        """Attach the disk that the machine's mark names. Another one in its place is an old disk of the
        machine, and is removed. ``vdi``: the mark's disk, if the mark was just written."""
        wanted = vdi or seen.vdi
        if wanted is None or (seen.attached and seen.attached[1] == wanted.ref):
            return
        if seen.attached:
            vbd, old = seen.attached
            record = seen.vdi.record if seen.vdi and seen.vdi.ref == old else None
            self.remove_vdi(old, {vbd}, record)
        try:
            self.attach(seen.vm.ref, wanted.ref, DISK, read_only=False)
        except XenApiError as error:
            stale = [v for v, r in seen.vbds.items() if (r["userdevice"], r["type"]) == (DISK, "Disk")]
            if error.code != "DEVICE_ALREADY_EXISTS" or not stale:
                raise
            for vbd in stale:  # the old disk's: not yet swept up, or never, by a server that died
                self.ignoring_gone("VBD.destroy", vbd)
            self.attach(seen.vm.ref, wanted.ref, DISK, read_only=False)

    # -- removing ---------------------------------------------------------------------------------

    def ignoring_gone(self, name: str, *arguments: object) -> None:
        try:
            self.call(name, *arguments)
        except XenApiError as error:
            if error.code not in GONE:
                raise

    def remove_vdi(self, ref: str, vbds: Iterable[str], record: ObjectRecord | None = None) -> None:
        """Destroy a disk, unless somebody attached it elsewhere than by these VBDs: then it is theirs
        too."""
        if record is None:
            try:
                record = self.call("VDI.get_record", ref)
            except XenApiError as error:
                if error.code in GONE:
                    return
                raise
        if set(record["VBDs"]) <= set(vbds):
            self.destroy_vdi(ref)

    def raze(self, vms: Sequence[XenApiVm], *, keep: Iterable[str] = ()) -> None:
        """Remove VMs, templates and snapshots with their disks, in that order; of each the disks first,
        so that none is left that nothing refers to. ``keep``: VDIs of others. A snapshot with memory is
        shut down first, which gives its memory up: till then it holds its disks as a running machine
        does."""
        wanted = [f"vbd/{ref}" for vm in vms for ref in vm.record["VBDs"]]
        vbds = look(self.sessions, wanted).records if wanted else {}
        disks: dict[str, list[str]] = {
            vm.ref: [r["VDI"] for v in vm.record["VBDs"] if (r := vbds.get(v)) and r["VDI"] != NULL]
            for vm in vms
        }
        kept = set(keep)
        refs = {ref for found in disks.values() for ref in found} - kept
        records = look(self.sessions, [f"vdi/{ref}" for ref in refs]).records if refs else {}
        for vm in vms:
            with_memory = vm.record["is_a_snapshot"] and vm.power is Power.SUSPENDED
            if with_memory:
                self._shut_down(vm)
            for ref in disks[vm.ref]:
                record = records.get(ref)
                if ref not in kept and record is not None:
                    self.remove_vdi(ref, vbds, record)
            if vm.record["suspend_VDI"] != NULL and not with_memory:
                self.destroy_vdi(vm.record["suspend_VDI"])
            self.ignoring_gone("VM.destroy", vm.ref)

    def _shut_down(self, snapshot: XenApiVm) -> None:
        self.keep_first()  # its memory is destroyed with it
        try:
            self.call("VM.hard_shutdown", snapshot.ref)
        except XenApiError as error:
            if error.code not in (*GONE, "VM_BAD_POWER_STATE"):
                raise

    def give_up(self, vm: XenApiVm) -> None:
        """Mark a machine that is about to be removed: from now on it isn't there any more, only its
        remains."""
        marks = {key: vm.marks.get(key, "") for key in ("farm", "vm", "label")} | {"kind": "gone"}
        self.call("VM.set_other_config", vm.ref, vm.other_config(marks))

    def undo(self, ref: str, *, keep: Iterable[str] = ()) -> None:
        """Remove what was just being made. What can't be removed now is found later, as a leftover."""
        with contextlib.suppress(XenApiError, FarmhandError):
            self.raze([XenApiVm(ref, self.call("VM.get_record", ref))], keep=keep)
