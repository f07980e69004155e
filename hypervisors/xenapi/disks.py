"""Implements ``hypervisors.api.Disks``, ``FarmDisks`` and ``GrowableDisks`` on a XenAPI server, which
owns its storage.

A template is a halted VM with one disk, see ``templates``; a machine's disk is the VDI that the
machine's mark names; a checkpoint is a snapshot of the machine (VM.snapshot). A disk without a machine
is a VM record all the same, only that nobody has defined it yet.

Reset does not use VM.revert: the server may destroy the old disks before it has cloned the new ones
(it does on storage that can't revert by itself), so that a server killed in between has neither.
Instead:

1. grow: VM.clone of the checkpoint, under a name that is plainly temporary: a fresh disk.
2. switch: the machine's marks are written, in one call; they name the fresh disk from then on; and the
   server writes its database to its disk.
3. settle: the old disk is destroyed, the fresh one attached, the temporary VM record removed.

Killed before 2 it is the old state, after it the new, also where the server loses what it had not
written; ``leftovers`` knows what 1 and 3 leave.
Warm checkpoints can't go this way: see ``warm``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from host.run import Runner
from hypervisors.api import (
    Capacity,
    Checkpoint,
    Disk,
    Foreign,
    Leftover,
    Owner,
    Power,
    StepFn,
    Template,
    check_larger,
    check_one_of,
    check_removable,
    check_template,
    no_step,
    not_ours,
)
from hypervisors.ownership import FarmIdentity
from hypervisors.xenapi.errors import XenApiError, translated
from hypervisors.xenapi.leftovers import XenApiLeftovers
from hypervisors.xenapi.pool import Pool, PoolMachine, freshness
from hypervisors.xenapi.records import (
    DISK,
    NULL,
    PREFIX,
    Vdi,
    XenApiVm,
    capacity_of,
    checkpoint_of,
    when,
)
from hypervisors.xenapi.templates import TemplateImages
from hypervisors.xenapi.temporary_names import temporary_name
from hypervisors.xenapi.wait import look
from hypervisors.xenapi.warm import WarmCheckpoints, half_back
from inventory.errors import (
    Call,
    Conflict,
    FarmhandError,
    NoSpace,
    NotFound,
    Remedy,
    Unsupported,
    UsageError,
    WrongState,
)
from inventory.sizes import format_size

_HEADROOM = 2**28
"""Bytes that must be free for a linked clone to begin its work."""


@dataclass(frozen=True, slots=True)
class _Swap:
    """A fresh disk that is ready to be switched to."""

    seen: PoolMachine
    temporary: XenApiVm
    vdi: Vdi
    marks: Mapping[str, str]


class XenApiDisks:
    def __init__(
        self,
        pool: Pool,
        runner: Runner,
        *,
        step: StepFn = no_step,
        headroom: int = _HEADROOM,
    ) -> None:
        self.pool = pool
        self._farm = pool.farm
        self._runner = runner
        self._step = step
        self._headroom = headroom
        self._sealed = TemplateImages(pool, runner, step)
        self._remains = XenApiLeftovers(pool, step)
        self.warm = WarmCheckpoints(pool, step, headroom)

    # -- templates --------------------------------------------------------------------------------

    def seal(self, image: Path, template: Template) -> Template:
        return self._sealed.seal(image, template)

    def templates(self) -> Sequence[Template]:
        return self._sealed.list()

    def remove_template(self, label: str) -> None:
        self._sealed.remove(label)

    def adopt_template(self, label: str, whose: FarmIdentity) -> None:
        self._sealed.adopt(label, whose)

    # -- looking ----------------------------------------------------------------------------------

    def find(self, machine: str) -> Disk | None:
        with translated(f"look for the disk of {machine}"):
            vm = self.pool.machine(machine)
            if vm is None or vm.kind != "machine" or vm.disk is None:
                return None
            seen = self.pool.seen(vm)
            return self.disk(seen) if seen.vdi else self.warm.lost_disk(seen)

    def left(self, machine: str) -> Sequence[Checkpoint]:
        """See ``LostDisks.left``: of a machine of ours that has lost its disk, to somebody or its
        storage."""
        with translated(f"look for what is left of the disk of {machine}"):
            vm = self.pool.machine(machine)
            if vm is None or vm.kind != "machine" or vm.disk is None:
                return []
            seen = self.pool.seen(vm)
            if seen.vdi or half_back(vm, seen.checkpoints):
                return []
            clean = Checkpoint(name="clean", created=when(vm.marks["created"]))
            return [clean, *(checkpoint_of(kept) for kept in seen.checkpoints)]

    def disk(self, seen: PoolMachine) -> Disk:
        assert seen.vdi and seen.vm.owner
        marks = seen.vm.marks
        clean = Checkpoint(name="clean", created=when(marks["created"]))
        return Disk(
            machine=seen.vm.name,
            owner=seen.vm.owner,
            path=seen.vdi.path,
            format="raw",
            size=seen.vdi.size,
            used=seen.vdi.used,
            template=marks["template"],
            base=seen.base,
            checkpoints=(clean, *(checkpoint_of(vm) for vm in seen.checkpoints)),
        )

    def list(self) -> Sequence[Disk]:
        with translated("list the disks"):
            vms, vdis = self.pool.all_vms(), self.pool.all_vdis()
            found = []
            for vm in vms:
                if vm.kind != "machine" or not vm.belongs(self._farm) or vm.disk is None:
                    continue
                vdi = self.pool.disk_among(vm, vdis.values())
                if vdi is not None:
                    found.append(self.disk(_from_lists(vm, vdi, vms)))
            return sorted(found, key=lambda disk: disk.machine)

    def others(self) -> Sequence[Foreign]:
        with translated("list the machines"):
            found = {
                vm.name: Foreign(vm.name, vm.owner) for vm in self.pool.all_vms()
                if vm.kind == "machine" and vm.owner and vm.owner.farm.is_namesake(self._farm)
            }  # fmt: skip
            return [found[name] for name in sorted(found)]

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        """The machine comes last: until then all of it is found again."""
        with translated(f"adopt {machine}"):
            vms = [vm for vm in self.pool.all_vms() if vm.belongs(whose)]
            machines = [vm for vm in vms if vm.kind == "machine" and vm.name == machine]
            refs, roles = {vm.ref for vm in machines}, {vm.marks.get("vm") for vm in machines}
            parts = [vm for vm in vms if vm.kind == "checkpoint" and vm.record["snapshot_of"] in refs]
            if not machines:
                return
            for vdi in self.pool.all_vdis().values():
                config = vdi.record["other_config"]
                farm, vm_ = (str(config.get(PREFIX + key, "")) for key in ("farm", "vm"))
                if vm_ in roles and FarmIdentity.of(farm) == whose:
                    self._step(f"mark VDI {vdi.uuid} as ours")
                    ours = {**config, f"{PREFIX}farm": self._farm.mark}
                    self.pool.call("VDI.set_other_config", vdi.ref, ours)
            for vm in (*parts, *machines):
                self._step(f"mark {vm.name} as ours")
                ours = vm.other_config({**vm.marks, "farm": self._farm.mark})
                self.pool.call("VM.set_other_config", vm.ref, ours)
            self.pool.keep()

    def capacity(self) -> Capacity:
        with translated("look at the storage repository"):
            return capacity_of(self.pool.call("SR.get_record", self.pool.sr()))

    def pristine(self, machine: str, name: str, *, quick: bool = False) -> bool:
        """See ``Disks.pristine``. What the store says of the disk since it was swapped in
        (``freshness``) proves it, if no machine ran with it (``Pool.never_ran``). Our own start takes
        the proof away before. What can't be looked at is not proven."""
        with translated(f"look at the disk of {machine}"):
            seen = self.ours(machine)
            fresh, vdi = seen.vm.marks.get("fresh"), seen.vdi
            if not (fresh and vdi and seen.base == name and seen.vm.power is Power.STOPPED):
                return False
            try:
                if not quick:
                    self.pool.update(vdi)
                    vdi = Vdi(vdi.ref, self.pool.call("VDI.get_record", vdi.ref))
                return fresh == freshness(vdi) and self.pool.never_ran(vdi, seen.vbds)
            except XenApiError:
                return False

    # -- changing ---------------------------------------------------------------------------------

    def clone(self, template: Template, machine: str, owner: Owner, size: int) -> Disk:
        with translated(f"clone {machine}"):
            self.check_name(machine)
            with self.growing(template, owner, size) as (vm, vdi, marks):
                self._step(f"clone the disk of {machine} from {template.label}")
                self.named(vdi, machine)
                self.pool.call("VM.set_other_config", vm.ref, vm.other_config(marks))
                self.pool.call("VM.set_name_label", vm.ref, machine)
            made = dict(vm.record) | {"name_label": machine, "other_config": vm.other_config(marks)}
            return self.disk(PoolMachine(XenApiVm(vm.ref, made), vdi, (), (), {}, None, ""))

    def named(self, vdi: Vdi, machine: str) -> None:
        """Name a disk after its machine. One grown from a checkpoint has that name already."""
        if vdi.record["name_label"] != machine:
            self.pool.call("VDI.set_name_label", vdi.ref, machine)

    def check_name(self, machine: str) -> None:
        """Conflict if a machine of that name has a disk; NotOurs if it is somebody else's."""
        vm = self.pool.machine(machine)
        if vm is None:
            return
        if vm.owner is None or vm.owner.farm != self._farm:
            raise not_ours(machine, vm.owner, self._farm)
        raise Conflict(f"{machine} has a disk already", remedy="destroy it first")

    @contextlib.contextmanager
    def growing(
        self, template: Template, owner: Owner, size: int
    ) -> Iterator[tuple[XenApiVm, Vdi, dict[str, str]]]:
        """A VM with a disk of its own, and the marks that make it one of ours, to be written last; an
        error within takes it away again."""
        source, record, token = self._source(template, size)
        self._check_room(capacity_of(record), size)
        with temporary_name(owner) as name:
            vm, vdi = self.pool.grow(source, name, token)
            try:
                vdi = self._sized(vdi, size)
                yield vm, vdi, {
                    "farm": owner.farm.mark, "vm": owner.vm, "kind": "machine",
                    "disk": f"{vdi.uuid} {vdi.ref}", "size": str(vdi.size),
                    "template": template.label, "base": "clean",
                    "source": template.ref, "created": datetime.now(UTC).isoformat(),
                    "fresh": freshness(vdi),
                }  # fmt: skip
            except BaseException:
                self.pool.undo(vm.ref)
                raise

    def _check_room(self, capacity: Capacity, size: int) -> None:
        """NoSpace unless so many bytes more of disks can begin their work."""
        need = max(self._headroom, size if self.pool.copy else 0)
        if capacity.free < need:
            raise NoSpace(
                f"the storage repository has {format_size(capacity.free)} free; this takes "
                f"{format_size(need)} at least",
                remedy=(Call("gc"), " shows what can go"),
            )

    def _source(self, template: Template, size: int) -> tuple[XenApiVm, Mapping[str, Any], str]:
        """The template's VM and the storage repository's record, in one call."""
        _, _, ref = template.ref.partition(" ")
        sr = self.pool.sr()
        batch = look(self.pool.sessions, [f"vm/{ref}", f"sr/{sr}"])
        record, room = batch.records.get(ref), batch.records.get(sr)
        source = XenApiVm(ref, record) if record else None
        if source is None or source.marks.get("label") != template.label:
            raise NotFound(
                f"there is no template {template.label}", remedy=(Call("template-list"), " shows them")
            )
        check_template(template.label, source.owner.farm if source.owner else None, self._farm)
        if room is None:
            raise NotFound("the storage repository is gone", remedy="xe sr-list shows them")
        if size < int(source.marks["size"]):
            raise UsageError(
                f"a disk of {format_size(size)} is smaller than {template.label}, "
                f"{format_size(int(source.marks['size']))}"
            )
        return source, room, batch.token

    def _sized(self, vdi: Vdi, size: int) -> Vdi:
        if vdi.size >= size:
            return vdi
        self.pool.call("VDI.resize", vdi.ref, str(size))
        return Vdi(vdi.ref, self.pool.call("VDI.get_record", vdi.ref))

    def enlarge(self, machine: str, size: int) -> Disk:
        """See ``GrowableDisks.enlarge``. Snapshots stay as large as they were; what is grown from one is
        made as large as the disk. A proof that it is pristine stays one."""
        with translated(f"make the disk of {machine} {format_size(size)}"):
            seen = self._ready(machine)
            assert seen.vdi
            check_larger(self.disk(seen), size)
            self._check_room(self.capacity(), size - seen.vdi.size)
            proven = self.pristine(machine, seen.base)
            self._step(f"make the disk of {machine} {format_size(size)}")
            self._sized(seen.vdi, size)
            self.pool.update(seen.vdi)
            vdi = Vdi(seen.vdi.ref, self.pool.call("VDI.get_record", seen.vdi.ref))
            marks = {**seen.vm.marks, "size": str(vdi.size), "fresh": freshness(vdi) if proven else ""}
            config = seen.vm.other_config(marks)
            self.pool.call("VM.set_other_config", seen.vm.ref, config)
            self.pool.keep()
            vm = XenApiVm(seen.vm.ref, {**seen.vm.record, "other_config": config})
            return self.disk(replace(seen, vm=vm, vdi=vdi))

    def checkpoint(self, machine: str, name: str) -> Checkpoint:
        return self.checkpoint_all([machine], name)[machine]

    def checkpoint_all(self, machines: Sequence[str], name: str) -> Mapping[str, Checkpoint]:
        """The marks say first that what the disk grew from is no longer known for sure, then that it is
        the new checkpoint; this counts only once that one is complete (``PoolMachine.base``)."""
        with translated(f"checkpoint {', '.join(machines)}"), contextlib.ExitStack() as names:
            everyone = [self._ready(machine) for machine in machines]
            for seen in everyone:
                if seen.checkpoint(name) or name == "clean":
                    raise Conflict(
                        f"{seen.vm.name} has a checkpoint {name}", remedy="choose another name"
                    )
            self._step(f"checkpoint {', '.join(machines)} as {name}")
            done = {}
            with contextlib.ExitStack() as undo:
                made = []
                for seen in everyone:
                    label = names.enter_context(temporary_name(_owner(seen)))
                    made.append(self._snapshot(seen, name, label, undo))
                for machine, snapshot in zip(machines, made, strict=True):
                    self.pool.call("VM.set_name_label", snapshot.ref, f"{machine} {name}")
                    done[machine] = checkpoint_of(snapshot)
                undo.pop_all()
            self.pool.keep()
            return done

    def _snapshot(
        self, seen: PoolMachine, name: str, label: str, undo: contextlib.ExitStack
    ) -> XenApiVm:
        """Make a checkpoint that is complete but for its name."""
        assert seen.vdi
        vm, call = seen.vm, self.pool.call
        before = {**vm.marks, "before": seen.base, "base": name, "fresh": ""}
        # whether it was pristine is no longer known then: a snapshot begins a new leaf
        undo.callback(self._remark, vm, {**vm.marks, "fresh": ""})
        call("VM.set_other_config", vm.ref, vm.other_config(before))
        if vm.marks.get("fresh"):  # the snapshot outlives a power cut, and its leaf looks unwritten
            self.pool.keep()
        seeds = [r["VDI"] for r in seen.vbds.values() if r["userdevice"] != DISK and r["VDI"] != NULL]
        self._attached_anew(seen)
        ref = call("VM.snapshot", vm.ref, label, seeds)
        undo.callback(self.pool.undo, ref)
        self.pool.update(seen.vdi)  # what it took is its parent's now, and the server may not tell yet
        batch = look(self.pool.sessions, [f"vm/{ref}", f"vdi/{seen.vdi.ref}", "vbd", "vdi"], seen.token)
        record = batch.records.get(ref) or call("VM.get_record", ref)
        vdi = batch.records.get(seen.vdi.ref) or call("VDI.get_record", seen.vdi.ref)
        self.pool.note_of(ref, batch)
        fresh = seen.freshness(Vdi(seen.vdi.ref, vdi))
        call("VM.set_other_config", vm.ref, vm.other_config({**before, "fresh": fresh}))
        snapshot = XenApiVm(ref, record)
        config = snapshot.other_config(seen.new_checkpoint(name))
        call("VM.set_other_config", ref, config)
        return XenApiVm(ref, {**record, "other_config": config})

    def _attached_anew(self, seen: PoolMachine) -> None:
        """Attach the machine's disk anew, so that its VBD tells of starts since the checkpoint, not of
        those before."""
        assert seen.vdi and seen.attached
        vbd, vdi = seen.attached
        if seen.vbds[vbd]["device"]:
            self.pool.ignoring_gone("VBD.destroy", vbd)
            self.pool.attach(seen.vm.ref, vdi, DISK, read_only=False)

    def _remark(self, vm: XenApiVm, marks: Mapping[str, str]) -> None:
        with contextlib.suppress(XenApiError, FarmhandError):
            self.pool.call("VM.set_other_config", vm.ref, vm.other_config(marks))

    def restore(self, machine: str, name: str) -> Disk:
        return self.restore_all([machine], name)[0]

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        with translated(f"put {', '.join(machines)} back to {name}"):
            everyone = [self.ours(machine) for machine in machines]
            warm = [
                seen for seen in everyone if (kept := seen.checkpoint(name)) and kept.marks.get("warm")
            ]
            if not warm:
                return self.restore_seen([self._restorable(seen) for seen in everyone], name)
            if len(everyone) > 1:
                raise Unsupported(
                    f"{warm[0].vm.name}'s checkpoint {name} is warm: it can't be put back with others",
                    remedy="reset each by itself",
                )
            self.warm.back(warm[0], name)
            disk = self.find(machines[0])
            assert disk, "it was just put back"
            return [disk]

    def remove_checkpoint(self, machine: str, name: str) -> None:
        """See ``Disks.remove_checkpoint``. A warm one goes with its memory. The storage keeps what
        others have in common with it. A proof that the disk is pristine stays one."""
        with translated(f"remove checkpoint {name} of {machine}"):
            seen = self.ours(machine)
            if seen.vdi is None:
                raise NotFound(f"{machine} has no disk", remedy=without_disk(seen))
            check_removable(self.disk(seen), name)
            kept, marks = seen.checkpoint(name), seen.vm.marks
            assert kept
            if half_back(seen.vm, seen.checkpoints) == name:
                raise WrongState(
                    f"{machine} is half way back to {name}",
                    remedy=Call("reset", vm=_owner(seen).vm, to=name),
                )
            proven = bool(marks.get("fresh")) and marks["fresh"] == seen.freshness()
            self._step(f"remove checkpoint {name} of {machine}")
            self.pool.raze([kept])
            if proven:  # its snapshots are counted in it
                vdi = Vdi(seen.vdi.ref, self.pool.call("VDI.get_record", seen.vdi.ref))
                self._remark(seen.vm, {**marks, "fresh": freshness(vdi)})
            self.pool.keep()

    def move(self, machine: str, template: Template) -> Disk:
        """See ``Disks.move``. As a reset, of another template."""
        with translated(f"move {machine} to {template.label}"), contextlib.ExitStack() as stack:
            seen = self._restorable(self.ours(machine))
            vm, size = seen.vm, seen.vdi.size if seen.vdi else int(seen.vm.marks.get("size", "0"))
            source, _, _ = self._source(template, size)
            label = stack.enter_context(temporary_name(_owner(seen)))
            with contextlib.ExitStack() as undo:
                self._step(f"grow a fresh disk for {machine} from {template.label}")
                swap = self._fresh(seen, "clean", source, label, undo)
                marks = {
                    **swap.marks, "template": template.label, "source": template.ref,
                    "created": datetime.now(UTC).isoformat(),
                }  # fmt: skip
                self._step(f"switch {machine} to it")
                undo.callback(self._remark, vm, dict(vm.marks))
                self.pool.call("VM.set_other_config", vm.ref, vm.other_config(marks))
                undo.pop_all()
            return self._settled(replace(swap, marks=marks))

    def rename(self, machine: str, to: str, owner: Owner) -> Disk:
        """See ``Disks.rename``. The machine's own name comes last: until then all of it is found again.
        Unsupported with warm checkpoints: VM.revert would bring the old name and marks back."""
        with translated(f"rename {machine} to {to}"):
            there = [vm for name in (machine, to) if (vm := self.pool.machine(name))]
            check_one_of(machine, to, both=len(there) > 1)
            seen = self.ours(there[0].name if there else to)
            vm, call = seen.vm, self.pool.call
            if vm.power is not Power.STOPPED:
                raise WrongState(f"{vm.name} is not stopped", remedy="stop it first")
            if warm := [kept.marks["checkpoint"] for kept in seen.checkpoints if kept.marks.get("warm")]:
                raise Unsupported(
                    f"{vm.name} has warm checkpoints ({', '.join(warm)}), which hold its name",
                    remedy=("remove them first: ", Call("checkpoint-remove", vm=vm.marks["vm"])),
                )
            if seen.vdi is None:
                raise NotFound(f"{vm.name} has no disk", remedy=without_disk(seen))
            self._step(f"mark the parts of {vm.name} as {to}'s")
            self.named(seen.vdi, to)
            for vbd in seen.vbds.values():
                if vbd["VDI"] in (NULL, seen.vdi.ref):
                    continue
                seed = Vdi(vbd["VDI"], call("VDI.get_record", vbd["VDI"]))
                if seed.written.get("kind") == "seed":
                    config = {**seed.record["other_config"], f"{PREFIX}vm": owner.vm}
                    call("VDI.set_other_config", seed.ref, config)
                    call("VDI.set_name_label", seed.ref, f"{owner.farm.name}-{owner.vm} seed")
            for kept in seen.checkpoints:
                config = kept.other_config({**kept.marks, "vm": owner.vm})
                call("VM.set_other_config", kept.ref, config)
                call("VM.set_name_label", kept.ref, f"{to} {kept.marks['checkpoint']}")
            self._step(f"rename {machine} to {to}")
            call("VM.set_other_config", vm.ref, vm.other_config({**vm.marks, "vm": owner.vm}))
            call("VM.set_name_label", vm.ref, to)
            self.pool.know(to, vm.ref)
            self.pool.keep()
            return self.disk(self.ours(to))

    def half_back(self, machine: str) -> str:
        with translated(f"look at {machine}"):
            seen = self.ours(machine)
            return half_back(seen.vm, seen.checkpoints)

    def restore_seen(self, everyone: Sequence[PoolMachine], name: str) -> Sequence[Disk]:
        """Put machines back that were just looked at and are stopped. NotFound for an unknown
        checkpoint."""
        machines = ", ".join(seen.vm.name for seen in everyone)
        for seen in everyone:
            if name not in seen.checkpoint_names:
                raise NotFound(
                    f"{seen.vm.name} has no checkpoint {name}",
                    remedy=f"it has: {', '.join(seen.checkpoint_names)}",
                )
        sources = [self._checkpoint_source(seen, name) for seen in everyone]
        with contextlib.ExitStack() as names, contextlib.ExitStack() as undo:
            labels = [names.enter_context(temporary_name(_owner(seen))) for seen in everyone]
            self._step(f"grow a fresh disk for {machines} from {name}")
            swaps = [
                self._fresh(seen, name, source, label, undo)
                for seen, source, label in zip(everyone, sources, labels, strict=True)
            ]
            self._step(f"switch {machines} to it")
            for swap in swaps:
                vm = swap.seen.vm
                undo.callback(self._remark, vm, dict(vm.marks))
                self.pool.call("VM.set_other_config", vm.ref, vm.other_config(swap.marks))
            undo.pop_all()
            return [self._settled(swap) for swap in swaps]

    def _fresh(
        self, seen: PoolMachine, name: str, source: XenApiVm, label: str, undo: contextlib.ExitStack
    ) -> _Swap:
        temporary, vdi = self.pool.grow(source, label, seen.token)
        undo.callback(self._unmake, seen.vm, temporary, vdi)
        vdi = self._sized(vdi, seen.vdi.size if seen.vdi else int(seen.vm.marks.get("size", "0")))
        self.named(vdi, seen.vm.name)
        marks = {
            **seen.vm.marks, "disk": f"{vdi.uuid} {vdi.ref}", "base": name, "before": "",
            "fresh": seen.freshness(vdi),
        }  # fmt: skip
        return _Swap(seen, temporary, vdi, marks)

    def _unmake(self, vm: XenApiVm, temporary: XenApiVm, vdi: Vdi) -> None:
        """Not what the machine's marks name: a switch may be done and its answer lost."""
        with contextlib.suppress(XenApiError, FarmhandError):
            now = XenApiVm(vm.ref, self.pool.call("VM.get_record", vm.ref))
            if now.disk is None or now.disk[0] != vdi.uuid:
                self.pool.undo(temporary.ref)

    def _settled(self, swap: _Swap) -> Disk:
        self.pool.settle(swap.seen, swap.vdi)
        self.pool.ignoring_gone("VM.destroy", swap.temporary.ref)  # the disk is the machine's
        vm = swap.seen.vm
        record = dict(vm.record) | {"other_config": vm.other_config(swap.marks)}
        return self.disk(replace(swap.seen, vm=XenApiVm(vm.ref, record), vdi=swap.vdi))

    def _checkpoint_source(self, seen: PoolMachine, name: str) -> XenApiVm:
        kept = seen.checkpoint(name)
        if kept is not None:
            return kept
        label, source = seen.vm.marks["template"], seen.source
        if source and source.kind == "template" and source.marks["label"] == label:
            return source
        found = self._sealed.among(self.pool.all_vms(), label, self._farm)
        if not found:
            raise NotFound(
                f"{label}, the template of {seen.vm.name}, is gone: clean can't be made again",
                remedy="clone the VM again from another template",
            )
        return found[0]

    def _ready(self, machine: str) -> PoolMachine:
        """A stopped machine of ours, its disk attached as its marks say."""
        return self._readied(self.ours(machine))

    def _readied(self, seen: PoolMachine) -> PoolMachine:
        """One that is half way back to a warm checkpoint is brought there first, for it has no disk."""
        machine = seen.vm.name
        if seen.vm.power is not Power.STOPPED:
            raise WrongState(f"{machine} is not stopped", remedy=Call("stop", vm=seen.vm.marks["vm"]))
        half = half_back(seen.vm, seen.checkpoints)
        if half:
            self.warm.back(seen, half)
            self._step(f"give up the memory of {machine}")
            self.pool.call("VM.hard_shutdown", seen.vm.ref)
            seen = self.ours(machine)
        if seen.vdi is None:
            raise NotFound(f"{machine} has no disk", remedy=without_disk(seen))
        if not seen.in_place:
            self.pool.settle(seen)
            seen = self.ours(machine)
        return seen

    def _restorable(self, seen: PoolMachine) -> PoolMachine:
        """One whose own disk is gone is restored as any other."""
        if seen.vm.disk and seen.vdi is None and not half_back(seen.vm, seen.checkpoints):
            if seen.vm.power is not Power.STOPPED:
                raise WrongState(f"{seen.vm.name} is not stopped", remedy="stop it first")
            return seen
        return self._readied(seen)

    def ours(self, machine: str) -> PoolMachine:
        vm = self.pool.machine(machine)
        if vm is None:
            raise NotFound(f"{machine} has no disk here", remedy=(Call("clone-farm"), " makes it"))
        if vm.owner is None or vm.owner.farm != self._farm:
            raise not_ours(machine, vm.owner, self._farm)
        return self.pool.seen(vm)

    # -- removing ---------------------------------------------------------------------------------

    def destroy(self, machine: str) -> None:
        """See ``Disks.destroy``. The whole VM goes if no machine was defined of it; else the definition
        stays, without a disk."""
        with translated(f"destroy the disk of {machine}"):
            vm = self.pool.machine(machine)
            if vm is None:
                return
            seen = self.ours(machine)
            self._step(f"remove the disk of {machine}")
            if not seen.vm.marks.get("spec"):
                self.remove(seen)
                return
            bare = {k: v for k, v in seen.vm.marks.items() if k in ("farm", "vm", "kind", "spec", "mac")}
            self.pool.call("VM.set_other_config", vm.ref, vm.other_config(bare))
            self.pool.raze(seen.checkpoints)
            for vbd in seen.vbds.values():
                if vbd["VDI"] != NULL:
                    self.pool.remove_vdi(vbd["VDI"], seen.vbds)

    def remove(self, seen: PoolMachine) -> None:
        self._remains.remove(seen)

    def leftovers(self) -> Sequence[Leftover]:
        return self._remains.leftovers()

    def doubtful(self) -> Sequence[str]:
        return self._remains.doubtful()

    def discard(self, leftover: Leftover) -> None:
        self._remains.discard(leftover)


def without_disk(seen: PoolMachine) -> Remedy:
    """What to do about a machine that has no disk."""
    if seen.vm.disk is None:
        return ("destroy it, then ", Call("clone-farm"))
    last, vm = seen.checkpoint_names[-1], seen.vm.marks["vm"]
    return ("its storage has lost it: ", Call("reset", vm=vm, to=last), " gives it a new one")


def _from_lists(vm: XenApiVm, vdi: Vdi, vms: Sequence[XenApiVm]) -> PoolMachine:
    ours = [
        s for s in vms
        if s.kind == "checkpoint" and s.record["snapshot_of"] == vm.ref
        and vm.owner and s.belongs(vm.owner.farm)
    ]  # fmt: skip
    ours.sort(key=lambda s: checkpoint_of(s).created)
    return PoolMachine(vm, vdi, tuple(ours), (), {}, None, "")


def _owner(seen: PoolMachine) -> Owner:
    assert seen.vm.owner, "it was looked at as one of ours"
    return seen.vm.owner
