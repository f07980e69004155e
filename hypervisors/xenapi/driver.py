"""Implements ``hypervisors.api.Hypervisor`` on a XenAPI server (XenServer, XCP-ng).

A machine is defined when its marks hold the hash of what it was defined from. It is made on the VM
record that its disk comes with, and gets its name last: until then it isn't there. See ``disks``.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypervisors.api import (
    Capabilities,
    Checkpoint,
    Console,
    Foreign,
    Leftover,
    Machine,
    MachineSpec,
    MemoryUse,
    Owner,
    Power,
    StepFn,
    Template,
    disk_with_data,
    is_fresh,
    marked_address,
    no_step,
    not_ours,
    spec_hash,
)
from hypervisors.libvirt.balloon import Approach
from hypervisors.ownership import FarmIdentity
from hypervisors.xenapi.disks import XenApiDisks, without_disk
from hypervisors.xenapi.errors import XenApiError, translated
from hypervisors.xenapi.pool import Pool
from hypervisors.xenapi.records import NULL, PREFIX, SEED, XenApiVm, started, vdi_path
from hypervisors.xenapi.temporary_names import temporary_name
from hypervisors.xenapi.wait import watch
from hypervisors.xenapi.warm import half_back
from inventory.errors import (
    Call,
    Conflict,
    FarmhandError,
    NotFound,
    TimedOut,
    Unsupported,
    UsageError,
    WrongState,
)
from inventory.sizes import format_size

_FLOOR_PART = 4
"""A machine's static minimum is this part of its memory: what XenServer allows a Linux guest."""
_NEAR = 2**20
"""Bytes a guest may be off its target and still have reached it: xapi counts in pages and rounds."""
_NOT_BEGUN = (
    "HOST_DISABLED", "HOST_NOT_ENOUGH_FREE_MEMORY", "HOST_NOT_LIVE", "LICENCE_RESTRICTION",
    "NO_HOSTS_AVAILABLE", "OPERATION_BLOCKED", "OPERATION_NOT_ALLOWED", "VM_HVM_REQUIRED",
    "VM_INCOMPATIBLE_WITH_THIS_HOST", "VM_REQUIRES_NETWORK", "VM_REQUIRES_SR",
)  # fmt: skip
"""VM.start has done nothing then."""
_LAG = 10.0
"""Seconds after which the server's statistics are up to date: two of its rounds (rrdd, xapi 23.10)."""
_DEAF = ("VM_LACKS_FEATURE", "VM_MISSING_PV_DRIVERS", "VM_FAILED_SHUTDOWN_ACKNOWLEDGMENT")


class XenApiHypervisor:
    def __init__(self, disks: XenApiDisks, *, step: StepFn = no_step) -> None:
        self._disks = disks
        self._pool: Pool = disks.pool
        self._farm = disks.pool.farm
        self._step = step
        self._networks: dict[str, str] = {}
        self._dmc: bool | None = None

    def capabilities(self) -> Capabilities:
        with translated("ask the server what it can"):
            why_not, balloons = self._disks.warm.why_not(), self._has_dmc()
        notes = [why_not] if why_not else []
        if not balloons:
            notes.append(
                "the licence has no Dynamic Memory Control: a running VM's memory can't be changed"
            )
        notes.append("guests without xe-guest-utilities can't be asked to shut down: they are cut off")
        return Capabilities(
            driver="xenapi",
            accelerated=True,
            live_balloon=balloons,
            warm_checkpoints=not why_not,
            notes=tuple(notes),
            why_not_warm=why_not,
        )

    def _has_dmc(self) -> bool:
        """Whether the licence lets a running VM have another amount of memory; asked once."""
        if self._dmc is None:
            (pool,) = self._pool.call("pool.get_all_records").values()
            self._dmc = pool["restrictions"].get("restrict_dmc") != "true"
        return self._dmc

    # -- looking ----------------------------------------------------------------------------------

    def find(self, name: str) -> Machine | None:
        with translated(f"look for {name}"):
            vm = self._pool.machine(name)
            if vm is None or (vm.owner and not vm.marks.get("spec")):
                return None
            return self._machine(vm, self._metrics(vm))

    def list(self) -> Sequence[Machine]:
        with translated("list the machines"):
            found = [
                vm for vm in self._pool.all_vms()
                if vm.kind == "machine" and vm.belongs(self._farm) and vm.marks.get("spec")
            ]  # fmt: skip
            running = any(_is_on(vm) for vm in found)
            metrics = self._pool.call("VM_metrics.get_all_records") if running else {}
            machines = [self._machine(vm, metrics.get(vm.record["metrics"])) for vm in found]
            return sorted(machines, key=lambda machine: machine.name)

    def others(self) -> Sequence[Foreign]:
        return self._disks.others()

    def adopt(self, machine: str, whose: FarmIdentity) -> None:
        self._disks.adopt(machine, whose)

    def _metrics(self, vm: XenApiVm) -> Mapping[str, Any] | None:
        """Of one that runs: else they say nothing that the record doesn't."""
        if not _is_on(vm) or vm.record["metrics"] == NULL:
            return None
        record: Mapping[str, Any] = self._pool.call("VM_metrics.get_record", vm.record["metrics"])
        return record

    def _machine(self, vm: XenApiVm, metrics: Mapping[str, Any] | None) -> Machine:
        marks, record = vm.marks, vm.record
        on = _is_on(vm) and metrics is not None
        memory = int(record["memory_static_max"])
        return Machine(
            name=vm.name,
            owner=vm.owner,
            power=vm.power,
            memory=memory,
            current=_current(record, metrics) if on and metrics else memory,
            vcpus=int(record["VCPUs_max"]),
            mac=marks.get("mac", ""),
            disk=vdi_path(vm.disk[0]) if vm.disk else None,
            spec_hash=marks.get("spec", ""),
            template=marks.get("template", ""),
            address=marked_address(marks.get("address", "")),
            started=started(metrics) if on and metrics else None,
        )

    # -- defining ---------------------------------------------------------------------------------

    def define(self, spec: MachineSpec, template: Template) -> Machine:
        with translated(f"define {spec.name}"):
            vm = self._pool.machine(spec.name)
            if vm is not None:
                self._check(vm, spec.name)
                if vm.marks.get("spec"):
                    raise Conflict(f"{spec.name} exists already", remedy="destroy it first")
                if self._taken_up(spec, template):
                    return self._redefined(spec, f"define {spec.name}")
            return self._made(spec, template)

    def _taken_up(self, spec: MachineSpec, template: Template) -> bool:
        """Whether the untouched disk that a killed ``define`` left is the one that is wanted."""
        disk = self._disks.find(spec.name)
        if disk is None:
            return False
        if not is_fresh(self._disks, disk):
            raise disk_with_data(disk)
        if (disk.template, disk.size, disk.owner) == (template.label, spec.disk_size, spec.owner):
            return True
        self._disks.destroy(spec.name)
        return False

    def _made(self, spec: MachineSpec, template: Template) -> Machine:
        call = self._pool.call
        with self._disks.growing(template, spec.owner, spec.disk_size) as (vm, vdi, grown):
            self._disks.named(vdi, spec.name)
            marks = grown | self._configure(vm, spec, {}, set())
            self._step(f"define {spec.name}")
            config = vm.other_config(marks)
            call("VM.set_other_config", vm.ref, config)
            call("VM.set_name_label", vm.ref, spec.name)
        self._pool.know(spec.name, vm.ref)
        return self._as_set(vm, spec, config)

    def redefine(self, spec: MachineSpec) -> Machine:
        with translated(f"redefine {spec.name}"):
            vm = self._ours(spec.name)
            if vm.power is not Power.STOPPED:
                raise WrongState(f"{spec.name} is {vm.power}", remedy=Call("stop", vm=spec.owner.vm))
            return self._redefined(spec, f"redefine {spec.name}")

    def rename(self, name: str, spec: MachineSpec) -> Machine:
        self._disks.rename(name, spec.name, spec.owner)
        with translated(f"rename {name} to {spec.name}"):
            self._ours(spec.name)
            return self._redefined(spec, f"define {spec.name}")

    def _redefined(self, spec: MachineSpec, doing: str) -> Machine:
        seen = self._disks.ours(spec.name)
        self._step(doing)
        old: set[str] = set()
        marks = {**seen.vm.marks, **self._configure(seen.vm, spec, seen.vbds, old)}
        config = seen.vm.other_config(marks)
        self._pool.call("VM.set_other_config", seen.vm.ref, config)
        for vdi in old:
            self._pool.remove_vdi(vdi, ())
        return self._as_set(seen.vm, spec, config)

    def _as_set(self, vm: XenApiVm, spec: MachineSpec, config: Mapping[str, str]) -> Machine:
        record = {
            **vm.record, "name_label": spec.name, "other_config": config, "power_state": "Halted",
            "memory_static_max": spec.memory, "VCPUs_max": spec.vcpus, "is_a_template": False,
        }  # fmt: skip
        return self._machine(XenApiVm(vm.ref, record), None)

    def _configure(
        self, vm: XenApiVm, spec: MachineSpec, vbds: Mapping[str, Mapping[str, Any]], old: set[str]
    ) -> dict[str, str]:
        """All that the definition says, but for the disk; the marks that note it. May be done again. The
        memory comes last: until then no host can run a clone (see ``templates``).
        To ``old`` go VDIs that are to be removed when the marks are written.
        Unsupported for what a XenAPI server doesn't have."""
        if spec.nic.mode == "user":
            raise Unsupported(
                f"{spec.name}: a XenAPI server has no user-mode network",
                remedy="give the farm's network 'mode: network' or 'mode: bridge'",
            )
        if spec.kernel:
            raise Unsupported(f"{spec.name}: a XenAPI server boots from the disk, not a kernel of ours")
        call, record, marks = self._pool.call, vm.record, vm.marks
        now, vcpus = int(record["VCPUs_max"]), str(spec.vcpus)
        order = ["VM.set_VCPUs_max", "VM.set_VCPUs_at_startup"]  # never more at start than at most
        if now != spec.vcpus:
            for name in order if now < spec.vcpus else reversed(order):
                call(name, vm.ref, vcpus)
        wired = f"{spec.nic.mac} {spec.nic.mode} {spec.nic.target}"
        if marks.get("wired") != wired or not record["VIFs"]:
            for vif in record["VIFs"]:
                self._pool.ignoring_gone("VIF.destroy", vif)
            self._plug(vm.ref, spec)
        noted = {"spec": spec_hash(spec), "mac": spec.nic.mac, "wired": wired}
        noted["address"] = str(spec.address or "")
        if spec.console_log:
            noted["log"] = str(spec.console_log)
        noted |= self._seeded(vm, spec.owner, str(spec.seed or ""), vbds, old)
        least, most = str(spec.memory // _FLOOR_PART), str(spec.memory)
        wanted = (least, most, most, most)
        limits = ("static_min", "static_max", "dynamic_min", "dynamic_max")
        if tuple(str(record[f"memory_{limit}"]) for limit in limits) != wanted:
            call("VM.set_memory_limits", vm.ref, *wanted)
        return noted

    def _plug(self, vm: str, spec: MachineSpec) -> None:
        self._pool.call(
            "VIF.create",
            {
                "device": "0", "network": self._network(spec), "VM": vm, "MAC": spec.nic.mac,
                "MTU": "1500", "other_config": {}, "qos_algorithm_type": "",
                "qos_algorithm_params": {},
            },
        )  # fmt: skip

    def _network(self, spec: MachineSpec) -> str:
        """The reference of the network with that name, or with that bridge. All networks are looked up
        once. NotFound if there is none."""
        key = "bridge" if spec.nic.mode == "bridge" else "name_label"
        if spec.nic.target not in self._networks:
            for ref, record in self._pool.call("network.get_all_records").items():
                self._networks.setdefault(str(record[key]), ref)
        if spec.nic.target not in self._networks:
            raise NotFound(
                f"{self._pool.sessions.url}: there is no network with {key} {spec.nic.target!r}",
                remedy="xe network-list shows them",
            )
        return self._networks[spec.nic.target]

    # -- the seed: first-boot data as a small disk of its own -----------------------------------------

    def _seeded(
        self,
        vm: XenApiVm,
        owner: Owner,
        path: str,
        vbds: Mapping[str, Mapping[str, Any]],
        old: set[str],
    ) -> dict[str, str]:
        """The file's present content is attached; what was there before is left over (``old``). Nothing
        is done where it is there already, or where there is no such file."""
        file = Path(path)
        if not path or not file.is_file():
            return {"seed": path}
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        before = {ref: vbd["VDI"] for ref, vbd in vbds.items() if vbd["userdevice"] == SEED}
        if vm.marks.get("seedsum") == digest and any(vdi != NULL for vdi in before.values()):
            return {"seed": path, "seedsum": digest}
        size = -(-file.stat().st_size // 2**20) * 2**20
        marks = {"farm": self._farm.mark, "vm": owner.vm, "kind": "seed"}
        with temporary_name(owner) as name:
            vdi = self._pool.new_vdi(name, size, {PREFIX + k: v for k, v in marks.items()})
            try:
                self._pool.sessions.put(vdi, file, size)
                for ref in before:
                    self._pool.ignoring_gone("VBD.destroy", ref)
                self._pool.attach(vm.ref, vdi, SEED, read_only=True)
                self._pool.call("VDI.set_name_label", vdi, f"{owner.farm.name}-{owner.vm} seed")
            except BaseException:
                with contextlib.suppress(Exception):  # found later, by its name
                    self._pool.destroy_vdi(vdi)
                raise
        old |= set(before.values()) - {NULL}
        return {"seed": path, "seedsum": digest}

    # -- power ------------------------------------------------------------------------------------

    def start(self, name: str, *, cold: bool = False) -> None:
        doing = f"start {name}"
        with translated(doing):
            seen = self._disks.ours(name)
            self._defined(seen.vm, name)
            if seen.vm.power is Power.SUSPENDED and cold:
                self.stop(name, grace=0)
                seen = self._disks.ours(name)
            if seen.vm.power is Power.SUSPENDED:
                with self._reasons(seen.vm):
                    self._disks.warm.resume(seen, doing)
                return
            if seen.vm.power is not Power.STOPPED:
                raise WrongState(
                    f"{name} is running already", remedy="stop it first, or use it as it is"
                )
            self._disks.warm.refuse_half(seen)
            if seen.vdi is None:
                raise NotFound(f"{name} has no disk", remedy=without_disk(seen))
            self._step(doing)
            self._pool.settle(seen)
            vm = seen.vm
            assert vm.owner
            old: set[str] = set()
            seeded = self._seeded(vm, vm.owner, vm.marks.get("seed", ""), seen.vbds, old)
            marks = {**vm.marks, **seeded, "fresh": "", "resume": ""}  # now it may be written to
            if marks != {**vm.marks}:
                self._pool.call("VM.set_other_config", vm.ref, vm.other_config(marks))
            for vdi in old:
                self._pool.remove_vdi(vdi, ())
            self._pool.keep_first()  # else, after a power cut, what it wrote to looks pristine again
            most = str(vm.record["memory_static_max"])
            if str(vm.record["memory_dynamic_min"]) != most:  # as it was ballooned to when it last ran
                self._pool.call("VM.set_memory_dynamic_range", vm.ref, most, most)
            try:
                with self._reasons(vm):
                    self._pool.call("VM.start", vm.ref, False, False)
            except XenApiError as error:
                if error.code in _NOT_BEGUN:  # nobody wrote to it
                    with contextlib.suppress(XenApiError, FarmhandError):
                        before = vm.other_config({**marks, "fresh": vm.marks.get("fresh", "")})
                        self._pool.call("VM.set_other_config", vm.ref, before)
                raise

    @contextlib.contextmanager
    def _reasons(self, vm: XenApiVm) -> Iterator[None]:
        """NO_HOSTS_AVAILABLE, which is told whatever the reason, becomes what each host says: with the
        code of the first one's, which tells what to do."""
        try:
            yield
        except XenApiError as error:
            if error.code != "NO_HOSTS_AVAILABLE":
                raise
            found: list[tuple[str, XenApiError]] = []
            with contextlib.suppress(XenApiError, FarmhandError):
                for ref, host in self._pool.call("host.get_all_records").items():
                    try:
                        self._pool.call("VM.assert_can_boot_here", vm.ref, ref)
                    except XenApiError as why:
                        found.append((str(host["name_label"]), why))
            if not found:
                raise
            hosts = "; ".join(f"{name}: {_brief(why)}" for name, why in found)
            raise XenApiError([found[0][1].code, f"{error.code}, {hosts}"]) from error

    def stop(self, name: str, *, grace: float) -> None:
        with translated(f"stop {name}"):
            vm = self._ours(name)
            if vm.power is Power.STOPPED:
                return
            if grace > 0 and vm.power is Power.RUNNING:
                self._step(f"ask {name} to shut down")
                try:
                    self._pool.shut_off("VM.clean_shutdown", vm, limit=grace)
                    return
                except TimedOut:
                    pass
                except XenApiError as error:
                    if error.code not in _DEAF and not _halted(error):
                        raise
            self._cut(vm, name)

    def _cut(self, vm: XenApiVm, name: str) -> None:
        if vm.power is Power.STOPPED:
            return
        self._step(f"cut the power of {name}")
        try:
            self._pool.shut_off("VM.hard_shutdown", vm)
        except XenApiError as error:
            if not _halted(error):  # it just ended
                raise

    def checkpoint(self, name: str, checkpoint: str, *, warm: bool = False) -> Checkpoint:
        with translated(f"checkpoint {name}"):
            vm = self._ours(name)
            if warm:
                return self._disks.warm.checkpoint(self._pool.seen(vm), checkpoint)
            if vm.power is not Power.STOPPED:
                raise WrongState(
                    f"{name} is {vm.power}: this checkpoint is cold", remedy="stop it first"
                )
        return self._disks.checkpoint(name, checkpoint)

    def reset(self, name: str, checkpoint: str) -> None:
        with translated(f"reset {name}"):
            seen = self._disks.ours(name)
            self._defined(seen.vm, name)
            half = half_back(seen.vm, seen.checkpoints)
            if seen.vm.disk is None and not half:
                raise NotFound(f"{name} has no disk", remedy=("destroy it, then ", Call("clone-farm")))
            if checkpoint not in seen.checkpoint_names:  # before its power is cut
                raise NotFound(
                    f"{name} has no checkpoint {checkpoint}",
                    remedy=f"it has: {', '.join(seen.checkpoint_names)}",
                )
            self._cut(seen.vm, name)
            kept = seen.checkpoint(checkpoint)
            whole = seen.in_place and not half
            if whole and not (kept and kept.marks.get("warm")):
                self._disks.restore_seen([seen], checkpoint)
            else:  # warm; or a killed reset's
                self._disks.restore(name, checkpoint)

    def balloon(self, name: str, target: int, *, timeout: float) -> int:
        """VM.set_memory_dynamic_range to just this size, inside the static limits; then VM_metrics'
        memory_actual is watched until the guest got there."""
        with translated(f"balloon {name}"):
            vm = self._ours(name)
            if vm.power is not Power.RUNNING:
                raise _stopped(name)
            least, most = (int(vm.record[f"memory_static_{end}"]) for end in ("min", "max"))
            if target > most:
                raise UsageError(
                    f"{name} can't have {format_size(target)}: its maximum is {format_size(most)}"
                )
            if target < least:
                raise UsageError(
                    f"{name} can't go down to {format_size(target)}: it needs {format_size(least)}"
                )
            if target != most and not self._has_dmc():
                raise Unsupported(
                    f"{name} can't be ballooned: the server's licence has no Dynamic Memory Control",
                    remedy="set 'memory' in the farm file instead",
                )
            self._step(f"set the memory of {name} to {format_size(target)}")
            self._pool.call("VM.set_memory_dynamic_range", vm.ref, str(target), str(target))
            reached, approach = 0, Approach(target, timeout)
            metrics = f"vm_metrics/{vm.record['metrics']}"
            had = {int(vm.record[f"memory_dynamic_{end}"]) for end in ("min", "max")}
            sure = had == {target}  # else what is told first may be of the run before
            while (left := approach.left()) > 0:
                for record in watch(self._pool.sessions, metrics, left if sure else min(left, _LAG)):
                    if record is None:
                        raise WrongState(f"{name} ended meanwhile", remedy=Call("status"))
                    reached = int(record["memory_actual"])
                    if sure and abs(reached - target) <= _NEAR:
                        return reached
                    sure = True
                    approach.saw(reached)
            kept = str(min(max(reached, least), most))  # it is not pressed, nor fed, any further
            self._pool.call("VM.set_memory_dynamic_range", vm.ref, kept, kept)
            raise TimedOut(
                f"{name} reached {format_size(reached)} instead of {format_size(target)} in "
                f"{timeout:.0f} s",
                remedy="the guest needs its balloon driver, and memory that it can give away",
            )

    def memory(self, name: str) -> MemoryUse:
        """The least is the static minimum: servers no longer tell what a guest uses
        (VM_guest_metrics.memory is there, and empty); without the licence for more, all that it has."""
        with translated(f"ask for the memory of {name}"):
            vm = self._ours(name)
            metrics = self._metrics(vm)
            if vm.power is not Power.RUNNING or metrics is None:
                raise _stopped(name)
            least, most = (int(vm.record[f"memory_static_{end}"]) for end in ("min", "max"))
            least = least if self._has_dmc() else most
            return MemoryUse(actual=_current(vm.record, metrics), maximum=most, least=least)

    def console(self, name: str) -> Console:
        """A console without a command and without a log: XenAPI's are for a browser or a VNC client,
        through the server."""
        with translated(f"console of {name}"):
            self._ours(name)
        return Console(argv=(), log=None)

    def pulse(self, name: str) -> None:
        """None: servers keep no log of a console, and no count of what a guest read and wrote."""

    # -- removing ---------------------------------------------------------------------------------

    def destroy(self, name: str) -> None:
        with translated(f"destroy {name}"):
            vm = self._pool.machine(name)
            if vm is None:
                return
            self._check(vm, name)
            self._cut(vm, name)
            seen = self._pool.seen(vm)
            self._step(f"remove {name} and its disk")
            self._disks.remove(seen)

    def leftovers(self) -> Sequence[Leftover]:
        found = list(self._disks.leftovers())
        with translated("look for leftovers"):
            vdis, vms = self._pool.all_vdis().values(), self._pool.all_vms()
            ours = [vm for vm in vms if vm.kind == "machine" and vm.belongs(self._farm)]
        for vm in sorted(ours, key=lambda vm: vm.name):
            lost = vm.marks.get("spec") and self._pool.disk_among(vm, vdis) is None
            of_it = (s for s in vms if s.kind == "checkpoint" and s.record["snapshot_of"] == vm.ref)
            if lost and not (vm.disk and any(of_it)):  # with these it can be put back
                found.append(_orphan("domain", vm, 0, "its disk is gone"))
        for vm in sorted(ours, key=lambda vm: vm.name):
            if not vm.marks.get("spec"):
                disk = self._pool.disk_among(vm, vdis)
                found.append(_orphan("disk", vm, disk.used if disk else 0, "no machine has it"))
        return found

    def discard(self, leftover: Leftover) -> None:
        if leftover.kind not in {"domain", "disk"} or "/" in leftover.ref:
            self._disks.discard(leftover)
        elif leftover.ref in (now.ref for now in self.leftovers()):
            self.destroy(leftover.ref)

    def doubtful(self) -> Sequence[str]:
        return self._disks.doubtful()

    def close(self) -> None:
        with contextlib.suppress(XenApiError, FarmhandError):  # who needed it sooner has done it
            self._pool.keep_rest()
        self._pool.sessions.close()

    # -- whose it is --------------------------------------------------------------------------------

    def _ours(self, name: str) -> XenApiVm:
        vm = self._pool.machine(name)
        if vm is None:
            raise NotFound(f"there is no machine {name}", remedy=(Call("clone-farm"), " makes it"))
        self._check(vm, name)
        return self._defined(vm, name)

    def _defined(self, vm: XenApiVm, name: str) -> XenApiVm:
        if not vm.marks.get("spec"):
            raise NotFound(
                f"{name} is a disk without a machine", remedy=(Call("clone-farm"), " makes it")
            )
        return vm

    def _check(self, vm: XenApiVm, name: str) -> None:
        if vm.owner is None or vm.owner.farm != self._farm:
            raise not_ours(name, vm.owner, self._farm)


def _current(record: Mapping[str, Any], metrics: Mapping[str, Any]) -> int:
    """A running machine's memory, in bytes: what it has, or what it was given and may take at any
    moment. The server's statistics lag: for some seconds after a start they tell of the run before, or
    0; so they alone would give memory away twice."""
    return max(int(metrics["memory_actual"]), int(record["memory_dynamic_max"]))


def _is_on(vm: XenApiVm) -> bool:
    return vm.power not in (Power.STOPPED, Power.SUSPENDED)


def _halted(error: XenApiError) -> bool:
    return error.code == "VM_BAD_POWER_STATE" and error.parameters[-1].lower() == "halted"


def _brief(error: XenApiError) -> str:
    """The error's words without references, which tell nobody anything."""
    return " ".join((error.code, *(p for p in error.parameters if not p.startswith("OpaqueRef:"))))


def _stopped(name: str) -> WrongState:
    return WrongState(f"{name} is stopped: only a running guest's memory can change")


def _orphan(kind: str, vm: XenApiVm, size: int, why: str) -> Leftover:
    return Leftover(
        kind=kind, ref=vm.name, owner=vm.owner, created=datetime.now(UTC), bytes=size, why=why
    )
