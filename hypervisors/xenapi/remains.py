"""What killed processes left on a XenAPI server: found by names and marks alone, removed in the order
that loses nothing. See ``making`` for how a living process' work is told from a dead one's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from hypervisors.api import Leftover, Owner, Power, StepFn
from hypervisors.xenapi.errors import translated
from hypervisors.xenapi.making import is_dead, made_for
from hypervisors.xenapi.pool import Pool, Seen
from hypervisors.xenapi.records import PREFIX, Vdi, Vm
from hypervisors.xenapi.wait import look


class Remains:
    def __init__(self, pool: Pool, step: StepFn) -> None:
        self.pool = pool
        self._farm = pool.farm
        self._step = step

    def remove(self, seen: Seen) -> None:
        """The whole machine. From the first call on it isn't there any more, only its remains."""
        self.pool.give_up(seen.vm)
        swept = [s for s in seen.unfinished if made_for(s.name)]
        self.pool.raze([*seen.checkpoints, *swept, seen.vm])

    def leftovers(self) -> Sequence[Leftover]:
        with translated("look for leftovers"):
            vms, vdis = self.pool.all_vms(), self.pool.all_vdis()
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
                    kind="file", ref=f"vdi/{vdi.uuid}", owner=_meant_for(vdi.record["name_label"]),
                    created=datetime.now(UTC), bytes=vdi.used, why="it was being made",
                )
                for vdi in vdis.values()
                if self._is_left(vdi)
            ]  # fmt: skip
            return found

    def _why_left(self, vm: Vm, vms: Sequence[Vm]) -> Iterator[tuple[str, Owner | None, str]]:
        written = vm.written
        if written.get("farm") != self._farm:
            return
        if vm.kind == "gone":
            yield "file", Owner(self._farm, written["vm"]) if written.get("vm") else None, \
                "its removal was interrupted"  # fmt: skip
        elif vm.kind in ("", "making") and is_dead(vm.name):
            yield "file", _meant_for(vm.name), "it was being made"
        elif vm.kind == "checkpoint" and vm.record["snapshot_of"] not in (v.ref for v in vms):
            yield "checkpoint", vm.owner, "its machine is gone"

    def _is_left(self, vdi: Vdi) -> bool:
        config = vdi.record["other_config"]
        name = str(vdi.record["name_label"])
        return config.get(PREFIX + "farm") == self._farm and not vdi.record["VBDs"] and is_dead(name)

    def discard(self, leftover: Leftover) -> None:
        """Looked at once more: what is no leftover any more stays."""
        kind, _, uuid = leftover.ref.partition("/")
        with translated(f"discard {leftover.ref}"):
            vms = self.pool.all_vms()
            if kind == "vdi":
                for vdi in self.pool.all_vdis().values():
                    if vdi.uuid == uuid and self._is_left(vdi):
                        self._step(f"remove VDI {uuid}")
                        self.pool.ignoring_gone("VDI.destroy", vdi.ref)
                return
            for vm in vms:
                if vm.uuid == uuid and any(self._why_left(vm, vms)):
                    self._step(f"remove VM {uuid}")
                    self._sweep(vm, vms)

    def _sweep(self, vm: Vm, vms: Sequence[Vm]) -> None:
        """A disk that some machine's mark names by now is that machine's: it is attached there."""
        named = {}
        for other in vms:
            if other.kind == "machine" and other.marks["farm"] == self._farm and other.disk:
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
    """None where it was for no VM in particular, as a template."""
    owner = made_for(name)
    return owner if owner and owner.vm else None
