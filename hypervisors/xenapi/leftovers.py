"""What killed processes left on a XenAPI server: found by names and marks alone, removed in the order
that loses nothing. See ``temporary_names`` for how a living process' work is told from a dead one's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from hypervisors.api import Leftover, Owner, Power, StepFn
from hypervisors.ownership import FarmIdentity
from hypervisors.xenapi.errors import translated
from hypervisors.xenapi.pool import Pool, PoolMachine
from hypervisors.xenapi.records import Vdi, XenApiVm
from hypervisors.xenapi.temporary_names import is_dead, made_for
from hypervisors.xenapi.wait import look


class XenApiLeftovers:
    def __init__(self, pool: Pool, step: StepFn) -> None:
        self.pool = pool
        self._farm = pool.farm
        self._step = step
        self._nameless: frozenset[str] = frozenset()  # as of the last look for leftovers

    def remove(self, seen: PoolMachine) -> None:
        """Remove the whole machine. From the first call on it isn't there any more, only its remains."""
        self.pool.give_up(seen.vm)
        swept = [s for s in seen.unfinished if made_for(s.name)]
        self.pool.raze([*seen.checkpoints, *swept, seen.vm])

    def leftovers(self) -> Sequence[Leftover]:
        with translated("look for leftovers"):
            noted = self.pool.notes.all()
            if noted:  # a killed process', or a living one's; first, so that all of them can be seen
                self.pool.call("SR.scan", self.pool.sr())
            vms, vdis = self.pool.all_vms(), self.pool.all_vdis()
            self._nameless = noted & self._unknown(vms, vdis)
            if noted and not self.pool.notes.plan:
                self.pool.keep()
                self.pool.notes.drop(noted - self._nameless)
            found = [
                Leftover(
                    kind=kind, ref=f"vm/{vm.uuid}", owner=owner, created=datetime.now(UTC),
                    bytes=0, why=why,
                )
                for vm in vms
                for kind, owner, why in self._why_left(vm, vms)
            ]  # fmt: skip
            found += [
                Leftover(
                    kind="file", ref=f"vdi/{vdi.uuid}", owner=self._vdi_owner(vdi),
                    created=datetime.now(UTC), bytes=vdi.used, why=why,
                )
                for vdi in vdis.values()
                if (why := self._why_vdi_left(vdi))
            ]  # fmt: skip
            return found

    def doubtful(self) -> Sequence[str]:
        """The uuids of disks in our storage that have no name, no marks and no VM, after it was looked
        at anew. After a power cut such a one may be what we were making when nobody knew its uuid yet;
        that can't be proven, so it is never removed."""
        with translated("look at the storage repository"):
            sr = self.pool.sr()
            self.pool.call("SR.scan", sr)
            vdis = {ref: v for ref, v in self.pool.all_vdis().items() if v.record["SR"] == sr}
            return sorted(self._unknown(self.pool.all_vms(), vdis) - self.pool.notes.all())

    @staticmethod
    def _unknown(vms: Sequence[XenApiVm], vdis: Mapping[str, Vdi]) -> frozenset[str]:
        used = {vm.record["suspend_VDI"] for vm in vms}
        named = {vm.disk[0] for vm in vms if vm.disk}
        return frozenset(
            vdi.uuid for ref, vdi in vdis.items()
            if not (vdi.record["name_label"] or vdi.record["VBDs"] or vdi.record["other_config"])
            and ref not in used and vdi.uuid not in named and vdi.record["type"] == "user"
        )  # fmt: skip

    def _why_left(
        self, vm: XenApiVm, vms: Sequence[XenApiVm]
    ) -> Iterator[tuple[str, Owner | None, str]]:
        written = vm.written
        if vm.meant_for != self._farm:
            return
        if vm.kind == "gone":
            yield "file", Owner(self._farm, written["vm"]) if written.get("vm") else None, \
                "its removal was interrupted"  # fmt: skip
        elif vm.kind in ("", "making") and is_dead(vm.name):
            yield "file", _meant_for(vm.name), "it was being made"
        elif vm.kind == "checkpoint" and vm.record["snapshot_of"] not in (v.ref for v in vms):
            yield "checkpoint", vm.owner, "its machine is gone"

    def _vdi_owner(self, vdi: Vdi) -> Owner | None:
        vm = vdi.written.get("vm")
        return Owner(self._farm, vm) if vm else _meant_for(str(vdi.record["name_label"]))

    def _why_vdi_left(self, vdi: Vdi) -> str:
        marks, name = vdi.written, str(vdi.record["name_label"])
        if vdi.uuid in self._nameless:
            return "it was being made when its server lost its power, and its name with it"
        if FarmIdentity.of(marks.get("farm", "")) != self._farm or vdi.record["VBDs"]:
            return ""
        if is_dead(name):
            return "it was being made"
        is_seed = marks.get("kind") == "seed" and not made_for(name)
        return "its machine has another" if is_seed and "vm" in marks else ""

    def discard(self, leftover: Leftover) -> None:
        """Remove a leftover, which is looked up again first: what is none any more stays."""
        kind, _, uuid = leftover.ref.partition("/")
        with translated(f"discard {leftover.ref}"):
            vms = self.pool.all_vms()
            if kind == "vdi":
                vdis = self.pool.all_vdis()
                self._nameless &= self._unknown(vms, vdis)
                for vdi in vdis.values():
                    if vdi.uuid == uuid and self._why_vdi_left(vdi):
                        self._step(f"remove VDI {uuid}")
                        self.pool.destroy_vdi(vdi.ref)
                        self.pool.notes.drop([uuid])
                return
            for vm in vms:
                if vm.uuid == uuid and any(self._why_left(vm, vms)):
                    self._step(f"remove VM {uuid}")
                    self._sweep(vm, vms)

    def _sweep(self, vm: XenApiVm, vms: Sequence[XenApiVm]) -> None:
        """A disk that some machine's mark names by now is that machine's: it is attached there."""
        named = {}
        for other in vms:
            if other.kind == "machine" and other.belongs(self._farm) and other.disk:
                named[other.disk[1]] = other
        refs = look(self.pool.sessions, [f"vbd/{v}" for v in vm.record["VBDs"]]).records \
            if vm.record["VBDs"] else {}  # fmt: skip
        for vbd in refs.values():
            machine = named.get(vbd["VDI"]) if vbd else None
            if machine is not None and machine.power is Power.STOPPED:
                self.pool.settle(self.pool.seen(machine))
        if vm.kind == "gone" and not vm.record["is_a_snapshot"]:
            seen = self.pool.seen(vm)
            swept = [s for s in seen.unfinished if made_for(s.name)]
            self.pool.raze([*seen.checkpoints, *swept, vm], keep=named)
        else:
            self.pool.raze([vm], keep=named)


def _meant_for(name: str) -> Owner | None:
    """Whom the name says it was made for; None if it was no VM in particular, as for a template."""
    owner = made_for(name)
    return owner if owner and owner.vm else None
