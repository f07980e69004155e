"""Warm checkpoints: a running machine's memory and disk, of one moment, and the way back to it.

A warm checkpoint is a snapshot that has a suspend image beside its disk (VM.checkpoint); its memory
comes back by VM.revert alone. An image that is resumed on any other disk content than the one it was
taken with destroys the guest's file system. So an image is resumed once, and only with the disk it came
with.

Back to one (``back``), the machine being stopped:

1. The intent is marked on the *snapshot*: ``revert``, with the disk that the machine has now. On the
   machine it would not last: VM.revert first of all sets back its fields, our marks among them. Nothing
   is changed yet; from here on the machine can't be started before it got there, or elsewhere.
2. Its disks get names of what nobody needs any more: VM.revert destroys those it has a snapshot of, and
   leaves the others unattached. The server writes its database to its disk.
3. VM.revert: the old disks go, disk and image are cloned from the snapshot, the machine is Suspended.
   This is the destructive step, and the server's own; cut off within, it is done again from the start.
4. The machine's marks, which are those of the checkpoint's moment, are written: its disk is the new one.
   That makes it whole: it is back, once that is on the server's disk. Cut off before, step 3 is done
   again.
5. What is left of the old disks, and the intent, are removed.

Running on (``resume``): the image is marked as used up, on the server's disk, before VM.resume. A
server that died within has perhaps let the guest write already; then the image is never resumed again,
but taken anew by ``back``.

What is half done is told from what is whole by marks alone (``half_back``): an intent counts as long as
the machine's mark names the disk of before it, or the one of the checkpoint's moment. Whatever call of a
dead client lands late, a disk that step 4 has named is neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from hypervisors.api import Checkpoint, Disk, Power, StepFn
from hypervisors.xenapi.errors import GONE, XenApiError
from hypervisors.xenapi.pool import Pool, PoolMachine
from hypervisors.xenapi.records import (
    DISK,
    NULL,
    Vdi,
    XenApiVm,
    capacity_of,
    checkpoint_of,
    vdi_path,
    when,
)
from hypervisors.xenapi.temporary_names import temporary_name
from hypervisors.xenapi.wait import look
from inventory.errors import (
    Call,
    Conflict,
    DriverFailed,
    FarmhandError,
    NoSpace,
    NotFound,
    Unsupported,
    WrongState,
)
from inventory.sizes import format_size

_ANY = "*"
"""In the mark ``resume``: no image of this machine is to be trusted, for VM.checkpoint is at work."""
_IMAGE_MORE = (126, 100, 100 * 2**20)
"""A suspend image takes static_max x 126 / 100 and so many bytes more (measured, xapi 23.10)."""
_NO_MEMORY = ("NO_HOSTS_AVAILABLE", "HOST_NOT_ENOUGH_FREE_MEMORY", "VM_INCOMPATIBLE_WITH_THIS_HOST")
"""VM.resume has not begun."""


def half_back(vm: XenApiVm, snapshots: Iterable[XenApiVm]) -> str:
    """The warm checkpoint that the machine is on its way back to and has to be put back to once more
    before it may run; "" for one that is whole, or runs. ``snapshots``: our checkpoints of it."""
    if vm.power not in (Power.STOPPED, Power.SUSPENDED):
        return ""
    warm = [kept for kept in snapshots if kept.marks.get("warm")]
    disk = vm.disk[0] if vm.disk else ""
    for kept in warm:
        if kept.marks.get("revert") and disk in (kept.marks["revert"], kept.marks["moment"]):
            return kept.marks["checkpoint"]
    image, base = vm.record["suspend_VDI"], vm.marks.get("base", "")
    if image not in (NULL, "") and vm.marks.get("resume") == image:
        return base if base in (kept.marks["checkpoint"] for kept in warm) else ""
    return ""


class WarmCheckpoints:
    """Warm checkpoints of machines. Its callers translate the server's errors."""

    def __init__(self, pool: Pool, step: StepFn, headroom: int) -> None:
        self.pool = pool
        self._step = step
        self._headroom = headroom

    def why_not(self) -> str:
        """Why this server can't keep memory; "" if it can."""
        return "" if self._suspend_sr() else "the pool has no suspend image SR: no warm checkpoints"

    def _suspend_sr(self) -> Mapping[str, Any] | None:
        """The pool may name one that is no more."""
        records = look(self.pool.sessions, ["pool", "sr"]).records
        named = (r["suspend_image_SR"] for r in records.values() if r and "suspend_image_SR" in r)
        return records.get(next(named, NULL))

    # -- there ------------------------------------------------------------------------------------

    def checkpoint(self, seen: PoolMachine, name: str) -> Checkpoint:
        """Of a running machine, which runs on. Complete, or not there.

        The machine's marks say meanwhile that no image of it is to be trusted: the server suspends and
        resumes it, and may die within."""
        vm, call = seen.vm, self.pool.call
        if vm.power is not Power.RUNNING:
            raise WrongState(
                f"{vm.name} is {vm.power}: a warm checkpoint is one of a running machine",
                remedy="start it first, or make a cold one",
            )
        if seen.checkpoint(name) or name == "clean":
            raise Conflict(f"{vm.name} has a checkpoint {name}", remedy="choose another name")
        if seen.vdi is None or not seen.in_place:
            raise WrongState(f"{vm.name} runs on another disk than its own", remedy="reset it")
        self._has_room(int(vm.record["memory_static_max"]))
        assert vm.owner
        self._step(f"keep {vm.name}, disk and memory, as {name}")
        during = {**vm.marks, "before": seen.base, "base": name, "fresh": "", "resume": _ANY}
        with temporary_name(vm.owner) as label:
            call("VM.set_other_config", vm.ref, vm.other_config(during))
            ref = ""
            try:
                ref = self.pool.do("VM.checkpoint", vm.ref, label)
                call("VM.set_other_config", vm.ref, vm.other_config({**during, "resume": ""}))
                batch = look(self.pool.sessions, [f"vm/{ref}", "vbd", "vdi"], seen.token)
                snapshot = XenApiVm(ref, batch.records.get(ref) or call("VM.get_record", ref))
                self.pool.note_of(ref, batch)
                if snapshot.record["suspend_VDI"] == NULL:
                    raise DriverFailed(
                        f"{vm.name}: the server kept its disk without its memory",
                        remedy="see /var/log/xensource.log on the server",
                    )
                marks = {**seen.new_checkpoint(name), "warm": "yes", "moment": seen.vdi.uuid}
                config = snapshot.other_config(marks)
                call("VM.set_other_config", ref, config)
                call("VM.set_name_label", ref, f"{vm.name} {name}")
            except BaseException as error:
                if ref:
                    self.pool.undo(ref)
                if ref or isinstance(error, XenApiError):  # else the server may be at it yet
                    self._as_it_was(vm)
                raise
        self.pool.keep()
        return checkpoint_of(XenApiVm(ref, {**snapshot.record, "other_config": config}))

    def _has_room(self, memory: int) -> None:
        record = self._suspend_sr()
        if record is None:
            raise Unsupported(
                f"{self.pool.sessions.url}: the pool has no suspend image SR for a machine's memory",
                remedy="xe pool-param-set suspend-image-SR=... gives it one; or make a cold checkpoint",
            )
        free = capacity_of(record).free
        part, whole, more = _IMAGE_MORE
        image = memory * part // whole + more
        if free < image:
            raise NoSpace(
                f"the suspend image SR has {format_size(free)} free; the memory takes "
                f"{format_size(image)}",
                remedy="make room there, or make a cold checkpoint",
            )

    def _as_it_was(self, vm: XenApiVm) -> None:
        """Put the machine's marks back, if it runs. If it doesn't, its image may be one that has run on
        already, and the marks stay."""
        with contextlib.suppress(XenApiError, FarmhandError):
            now = XenApiVm(vm.ref, self.pool.call("VM.get_record", vm.ref))
            if now.power is Power.RUNNING:
                marks = {**vm.marks, "fresh": ""}
                self.pool.call("VM.set_other_config", vm.ref, vm.other_config(marks))

    # -- and back ---------------------------------------------------------------------------------

    def back(self, seen: PoolMachine, name: str) -> None:
        """Put a stopped machine back to a warm checkpoint; it is then suspended. See the module's head.
        An error leaves it as it was, or half back. May be called again, and for another checkpoint."""
        vm, kept = seen.vm, seen.checkpoint(name)
        assert vm.owner and kept
        if vm.power is not Power.STOPPED:
            raise WrongState(f"{vm.name} is not stopped", remedy=Call("stop", vm=vm.owner.vm))
        if self._disk_of(kept) is None or not self._is_there(kept.record["suspend_VDI"]):
            raise WrongState(
                f"{vm.name}: disk or memory of checkpoint {name} is gone",
                remedy="reset it to another one",
            )
        if not half_back(vm, seen.checkpoints):
            if vm.disk is None:
                raise NotFound(
                    f"{vm.name} has no disk", remedy=("destroy it, then ", Call("clone-farm"))
                )
            self.pool.settle(seen)  # nothing, where its own is gone
        if capacity_of(self.pool.call("SR.get_record", self.pool.sr())).free < self._headroom:
            raise NoSpace(
                f"the storage repository has less than {format_size(self._headroom)} free",
                remedy=(Call("gc"), " shows what can go"),
            )
        with temporary_name(vm.owner) as label:
            self._revert(seen, kept, label)
        self._whole(seen, kept)

    def _disk_of(self, kept: XenApiVm) -> Vdi | None:
        """The disk of a snapshot; None if it is gone."""
        vbds = look(self.pool.sessions, [f"vbd/{ref}" for ref in kept.record["VBDs"]]).records
        for vbd in vbds.values():
            if vbd and vbd["userdevice"] == DISK and self._is_there(vbd["VDI"]):
                return Vdi(vbd["VDI"], self.pool.call("VDI.get_record", vbd["VDI"]))
        return None

    def _is_there(self, vdi: str) -> bool:
        return vdi != NULL and look(self.pool.sessions, [f"vdi/{vdi}"]).records.get(vdi) is not None

    def _revert(self, seen: PoolMachine, kept: XenApiVm, label: str) -> None:
        vm, call = seen.vm, self.pool.call
        name = kept.marks["checkpoint"]
        self._step(f"mark that {vm.name} goes back to {name}")
        intent = {**kept.marks, "revert": vm.disk[0] if vm.disk else kept.marks["moment"]}
        call("VM.set_other_config", kept.ref, kept.other_config(intent))
        disks = look(self.pool.sessions, [f"vdi/{ref}" for ref in _disks(seen)]).records
        for vdi in disks:
            call("VDI.set_name_label", vdi, label)
        self._step(f"revert {vm.name} to {name}, disk and memory")
        self.pool.keep()
        try:
            self.pool.do("VM.revert", kept.ref)
        except XenApiError:
            names = {ref: record["name_label"] for ref, record in disks.items() if record}
            self._unless_begun(seen, kept, names)
            raise

    def _unless_begun(self, seen: PoolMachine, kept: XenApiVm, names: Mapping[str, str]) -> None:
        """Take everything back after a refusal, if the server has not begun: it begins with the marks. A
        machine that was half back before stays so."""
        if half_back(seen.vm, seen.checkpoints):
            return
        with contextlib.suppress(XenApiError, FarmhandError):
            now = self.pool.seen(XenApiVm(seen.vm.ref, self.pool.call("VM.get_record", seen.vm.ref)))
            untouched = now.vm.record["other_config"] == seen.vm.record["other_config"]
            if untouched and set(_disks(now)) == set(names):
                for vdi, name in names.items():
                    self.pool.call("VDI.set_name_label", vdi, name)
                self.pool.call("VM.set_other_config", kept.ref, kept.other_config(kept.marks))

    def _whole(self, before: PoolMachine, kept: XenApiVm) -> None:
        """Steps 4 and 5, see the module's head. The marks of the checkpoint's moment tell the definition
        that the machine has now."""
        call, name = self.pool.call, kept.marks["checkpoint"]
        seen = self.pool.seen(XenApiVm(before.vm.ref, call("VM.get_record", before.vm.ref)))
        vm, attached = seen.vm, seen.attached
        if vm.power is not Power.SUSPENDED or attached is None or vm.record["suspend_VDI"] == NULL:
            raise DriverFailed(
                f"{vm.name} was reverted to {name}, and isn't suspended with its disk",
                remedy="reset it again",
            )
        vdi = Vdi(attached[1], call("VDI.get_record", attached[1]))
        self.pool.note([vdi])
        marks = {
            **(vm.marks or before.vm.marks), "disk": f"{vdi.uuid} {vdi.ref}", "base": name,
            "before": "", "fresh": "", "resume": "",
        }  # fmt: skip
        call("VM.set_other_config", vm.ref, vm.other_config(marks))
        self.pool.keep()
        for old in _disks(before):
            self.pool.remove_vdi(old, ())
        call("VM.set_other_config", kept.ref, kept.other_config({**kept.marks, "revert": ""}))

    def resume(self, seen: PoolMachine, doing: str) -> None:
        """Have a suspended machine run on, on the disk that its memory belongs to."""
        vm, image = seen.vm, str(seen.vm.record["suspend_VDI"])
        name, call = vm.name, self.pool.call
        self.refuse_half(seen)
        assert vm.owner
        stale = vm.marks.get("resume") == _ANY and vm.disk and seen.vdi and vm.disk[0] == seen.vdi.uuid
        used = vm.marks.get("resume") == image
        if stale or used or not seen.in_place:
            why = "another disk is attached"
            if stale or used:
                why = f"its server went down while it was {'kept' if stale else 'resumed'}"
            raise WrongState(
                f"{name} is suspended, and its memory may not be that of its disk: {why}",
                remedy=(Call("stop", vm=vm.owner.vm), " gives the memory up; or reset it"),
            )
        assert seen.vdi
        self._step(doing)
        marks = {
            **vm.marks, "disk": f"{seen.vdi.uuid} {seen.vdi.ref}", "fresh": "", "resume": image,
        }  # fmt: skip
        call("VM.set_other_config", vm.ref, vm.other_config(marks))
        self.pool.keep()
        try:
            self.pool.do("VM.resume", vm.ref, False, False)
            self.pool.keep()  # else a power cut makes void what it writes: its image was used once
        except XenApiError as error:
            gone = error.code in GONE and not self._is_there(image)
            if gone or error.code.startswith("SR_BACKEND_FAILURE"):
                raise WrongState(
                    f"{name} is suspended, and its memory can't be had: {error}",
                    remedy=(Call("stop", vm=vm.owner.vm), " gives the memory up; or reset it"),
                ) from error
            if error.code in _NO_MEMORY:
                again = {**marks, "resume": ""}
                call("VM.set_other_config", vm.ref, vm.other_config(again))
            raise

    def refuse_half(self, seen: PoolMachine) -> None:
        """WrongState if the machine must not run before it is put back once more."""
        name = half_back(seen.vm, seen.checkpoints)
        if name and seen.vm.owner:
            raise WrongState(
                f"{seen.vm.name} is half way back to {name}: it can't be used before it is there",
                remedy=(Call("reset", vm=seen.vm.owner.vm, to=name), " goes on with it"),
            )

    def lost_disk(self, seen: PoolMachine) -> Disk | None:
        """The disk of a machine that is half back, as far as the checkpoint's tells; its own may be
        gone. None if that is gone too."""
        kept = seen.checkpoint(half_back(seen.vm, seen.checkpoints))
        vdi = self._disk_of(kept) if kept else None
        if kept is None or vdi is None or not seen.vm.disk or not seen.vm.owner:
            return None
        clean = Checkpoint(name="clean", created=when(seen.vm.marks["created"]))
        return Disk(
            machine=seen.vm.name, owner=seen.vm.owner, path=vdi_path(seen.vm.disk[0]), format="raw",
            size=vdi.size, used=0, template=seen.vm.marks["template"],
            base=kept.marks["checkpoint"],
            checkpoints=(clean, *(checkpoint_of(vm) for vm in seen.checkpoints)),
        )  # fmt: skip


def _disks(seen: PoolMachine) -> list[str]:
    """References of all disks attached to it: its own, its seed."""
    vbds: Iterable[Mapping[str, Any]] = seen.vbds.values()
    return [vbd["VDI"] for vbd in vbds if vbd["VDI"] != NULL and vbd["type"] == "Disk"]
