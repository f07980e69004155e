"""What a XenAPI server's calls do to VMs, templates and snapshots; what was measured and what was read
of it is told in world.py."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from database import Died, now
from model import NEVER, NULL, Failure, Ref
from storage import Storage, new_mac

_RESTORED = (
    "name_label", "name_description", "memory_static_min", "memory_static_max", "memory_dynamic_min",
    "memory_dynamic_max", "VCPUs_max", "VCPUs_at_startup", "other_config", "platform",
)  # fmt: skip

_NOT_KEPT = (
    "blocked_operations", "protection_policy", "is_snapshot_from_vmpp", "snapshot_schedule",
    "is_vmss_snapshot",
)  # fmt: skip
"""What VM.create takes, and drops without a word (xapi_vm.ml, v23.10.0)."""


class Machines(Storage):
    def _state(self, ref: str, *expected: str) -> dict[str, Any]:
        record = self.get("VM", ref)
        if record["power_state"] not in expected:
            wanted = expected[0].lower()
            raise Failure("VM_BAD_POWER_STATE", ref, wanted, record["power_state"].lower())
        return record

    @contextlib.contextmanager
    def in_turn(self, call: str, arguments: list[Any]) -> Iterator[None]:
        """Storage changes of one SR: who meets another tries again after a random time, as xapi does,
        whether or not that one has long ended."""
        if call not in ("VM.clone", "VM.snapshot", "VDI.create", "VDI.destroy", "VDI.resize"):
            yield
            return
        lock = self._busy.setdefault(self._sr_of(call, arguments[0]), threading.Lock())
        while not lock.acquire(blocking=False):
            self.collisions += 1
            time.sleep(random.uniform(0, self.knobs.in_turn))
        try:
            yield
        finally:
            lock.release()

    def _sr_of(self, call: str, subject: Any) -> str:
        with self.changed:
            if call == "VDI.create":
                return str(subject["SR"])
            if call.startswith("VM."):
                vbds = (v for v in self.objects["VBD"].values() if v["VM"] == subject)
                subject = next((v["VDI"] for v in vbds if v["VDI"] != NULL), "")
            return str(self.objects["VDI"].get(subject, {}).get("SR", ""))

    def VM_create(self, args: dict[str, Any]) -> Ref:
        self._ordered(args)
        ref = self.add("VM", **{key: value for key, value in args.items() if key not in _NOT_KEPT})
        self.change("VM", ref, metrics=self.add("VM_metrics"))
        return ref

    def VM_clone(self, ref: str, name: str) -> Ref:
        with self.busy(ref):
            self._state(ref, "Halted", "Suspended")
            return self._doubled(ref, name)

    def VM_copy(self, ref: str, name: str, sr: str) -> Ref:
        with self.busy(ref):
            self._state(ref, "Halted", "Suspended")
            if sr != NULL:
                self.get("SR", sr)
            return self._doubled(ref, name, sr=sr if sr != NULL else "", full=True)

    def _doubled(self, ref: str, name: str, *, sr: str = "", full: bool = False) -> Ref:
        source = self.get("VM", ref)
        kept = {
            f: copy.deepcopy(value) for f, value in source.items()
            if f not in ("uuid", "metrics", "guest_metrics", "snapshot_of", "snapshot_time", "domid",
                         "resident_on", "is_default_template", "current_operations", "suspend_VDI")
        }  # fmt: skip
        kept["other_config"]["mac_seed"] = str(uuid.uuid4())
        kept |= {"name_label": name, "is_a_snapshot": False, "power_state": "Halted",
                 "blocked_operations": {}}  # fmt: skip
        vbds = [v for v in self.objects["VBD"].values() if v["VM"] == ref]
        vdis: dict[str, Ref] = {}
        try:
            for vbd in vbds:
                if vbd["VDI"] != NULL and vbd["type"] != "CD":
                    vdis[vbd["VDI"]] = self._grown(vbd["VDI"], sr=sr, full=full)
        except Failure:
            for vdi in vdis.values():
                self.VDI_destroy(vdi)
            raise
        self._half_done()
        made = self.add("VM", **kept, metrics=self.add("VM_metrics"))
        self._devices(ref, made, vdis, macs=False)
        return made

    def _devices(
        self, source: str, target: str, vdis: dict[str, Ref], *, macs: bool, attached: bool = False
    ) -> None:
        for vbd in [v for v in self.objects["VBD"].values() if v["VM"] == source]:
            if vbd["VDI"] in vdis or vbd["VDI"] == NULL or vbd["type"] == "CD":
                new = {"uuid": str(uuid.uuid4()), "VM": Ref(target), "currently_attached": attached,
                       "VDI": vdis.get(vbd["VDI"], vbd["VDI"])}  # fmt: skip
                self.add("VBD", **(copy.deepcopy(vbd) | new))
        for vif in [v for v in self.objects["VIF"].values() if v["VM"] == source]:
            new = {"uuid": str(uuid.uuid4()), "VM": Ref(target), "currently_attached": False,
                   "MAC": vif["MAC"] if macs else new_mac()}  # fmt: skip
            self.add("VIF", **(copy.deepcopy(vif) | new))

    def VM_snapshot(self, ref: str, name: str, ignore: list[str] | None = None) -> Ref:
        with self.busy(ref):
            self._state(ref, "Halted", "Running", "Suspended", "Paused")
            return self._snapshot(ref, name, ignore or [])

    def _snapshot(self, ref: str, name: str, ignore: list[str], *, warm: bool = False) -> Ref:
        source = self.get("VM", ref)
        stamp = now()
        vdis: dict[str, Ref] = {}
        for vbd in [v for v in self.objects["VBD"].values() if v["VM"] == ref]:
            vdi = vbd["VDI"]
            if vdi != NULL and vdi not in ignore and vbd["type"] != "CD":
                vdis[vdi] = self._grown(
                    vdi, is_a_snapshot=True, snapshot_of=Ref(vdi), snapshot_time=stamp
                )
                self.contents.leaf(self.get("VDI", vdi)["uuid"])
                self._touch("VDI", vdi)
        self._half_done()
        kept = {f: copy.deepcopy(v) for f, v in source.items() if f not in ("uuid", "guest_metrics")}
        made = self.add("VM", **(kept | {
            "name_label": name, "is_a_snapshot": True, "is_a_template": True, "snapshot_of": Ref(ref),
            "snapshot_time": stamp, "power_state": "Halted", "metrics": self.add("VM_metrics"),
            "snapshot_metadata": source["name_label"], "suspend_VDI": Ref(NULL),
            "blocked_operations": {},
        }))  # fmt: skip
        self._moments[made] = {f: copy.deepcopy(source[f]) for f in _RESTORED}
        self._devices(ref, made, vdis, macs=True, attached=warm)
        return made

    def VM_checkpoint(self, ref: str, name: str) -> Ref:
        with self.busy(ref):
            record = self._state(ref, "Running", "Halted", "Suspended", "Paused")
            (pool,) = self.objects["pool"].values()
            if pool["suspend_image_SR"] == NULL:
                raise Failure("VM_NO_SUSPEND_SR", ref)
            runs = record["power_state"] == "Running"
            if runs and not self.knobs.agent:
                raise Failure("VM_LACKS_FEATURE_SUSPEND", ref)
            if runs:
                self._suspended(ref, pool["suspend_image_SR"])
                self._half_done()
            made = self._snapshot(ref, name, [], warm=runs)
            if record["suspend_VDI"] != NULL:
                image = self._grown(record["suspend_VDI"], is_a_snapshot=True)
                self.change("VM", made, power_state="Suspended", suspend_VDI=image)
            self._half_done()
            if runs:
                self._resumed(ref, paused=False)
            return made

    def _suspended(self, ref: str, sr: str) -> None:
        """Its memory as it is now is an image; the guest wrote until now."""
        size = self.get("VM", ref)["memory_static_max"] * 126 // 100 + 100 * 2**20
        self._room(sr, size)
        self._guest_writes(ref)
        vdi = self.add("VDI", SR=Ref(sr), name_label="Suspend image", type="suspend", virtual_size=size,
                       managed=True)  # fmt: skip
        image = self.get("VDI", vdi)["uuid"]
        self.contents.create(image, size)
        self._images[image] = self._at(ref)
        self._off(ref, "Suspended")
        self.change("VM", ref, suspend_VDI=vdi)

    def VM_suspend(self, ref: str) -> None:
        with self.busy(ref):
            self._state(ref, "Running")
            (pool,) = self.objects["pool"].values()
            if pool["suspend_image_SR"] == NULL:
                raise Failure("VM_NO_SUSPEND_SR", ref)
            self._suspended(ref, pool["suspend_image_SR"])

    def VM_revert(self, ref: str) -> None:
        snapshot = self.get("VM", ref)
        if not snapshot["is_a_snapshot"]:
            raise Failure("OPERATION_NOT_ALLOWED", "it is no snapshot")
        vm = snapshot["snapshot_of"]
        with self.busy(vm, ref):
            self._powerless(vm)
            self.change("VM", vm, **copy.deepcopy(self._moments[ref]))
            self._half_done()
            kept = [
                v["VDI"] for v in self.objects["VBD"].values() if v["VM"] == ref and v["VDI"] != NULL
            ]
            of_kept = {vdi: self.get("VDI", vdi)["snapshot_of"] for vdi in kept}
            disks = [v["VDI"] for v in self.objects["VBD"].values() if v["VM"] == vm]
            for vbd in [v for v, r in self.objects["VBD"].items() if r["VM"] == vm]:
                self._drop_device("VBD", vbd)
            self._half_done()
            for vdi in disks:
                if vdi in of_kept.values():
                    with contextlib.suppress(Failure):  # it is tried, and said in the log
                        self._destroyed(vdi, for_revert=True)  # its clone takes its place
            self._half_done()
            vdis = {vdi: self._grown(vdi) for vdi in kept}
            for vdi, of in of_kept.items():
                for other in self.objects["VDI"].values():
                    if other["is_a_snapshot"] and of != NULL and other["snapshot_of"] == of:
                        other["snapshot_of"] = vdis[vdi]
            image = snapshot["suspend_VDI"]
            image = self._grown(image) if image != NULL else Ref(NULL)
            self._half_done()
            for vif in [v for v, r in self.objects["VIF"].items() if r["VM"] == vm]:
                self._drop_device("VIF", vif)
            self._devices(ref, vm, vdis, macs=True)
            self.change("VM", vm, suspend_VDI=image)
            self._half_done()
            self.change("VM", vm, power_state=snapshot["power_state"])

    def VM_provision(self, ref: str) -> None:
        self._state(ref, "Halted")
        self.change("VM", ref, is_a_template=False)

    def VM_destroy(self, ref: str) -> None:
        with self.busy(ref):
            record = self.get("VM", ref)
            if record["is_default_template"] or record["is_control_domain"]:
                raise Failure("OPERATION_NOT_ALLOWED", "it is the server's own")
            if not record["is_a_snapshot"]:
                self._state(ref, "Halted")
            for class_ in ("VBD", "VIF"):
                for device in [d for d, r in self.objects[class_].items() if r["VM"] == ref]:
                    self.drop(class_, device)
            self._half_done()
            for snapshot in self.objects["VM"].values():
                if snapshot["snapshot_of"] == ref:
                    snapshot["snapshot_of"] = Ref(NULL)
            self.drop("VM_metrics", record["metrics"])
            self.drop("VM_guest_metrics", record["guest_metrics"])
            self.drop("VM", ref)

    def VM_start(self, ref: str, paused: bool, _force: bool) -> None:
        with self.busy(ref):
            record = self.get("VM", ref)
            if record["is_a_snapshot"]:
                raise Failure("VM_IS_SNAPSHOT", ref, "start")
            if record["is_a_template"]:
                raise Failure("VM_IS_TEMPLATE", ref)
            if "start" in record["blocked_operations"]:
                raise Failure("OPERATION_BLOCKED", ref, record["blocked_operations"]["start"])
            self._state(ref, "Halted")
            self._runs(ref, paused)

    def VM_assert_can_boot_here(self, ref: str, host: str) -> None:
        self.get("host", host)
        if why := self._why_not(ref):
            raise Failure(*why)

    def _why_not(self, ref: str) -> tuple[str, ...]:
        """Why the host can't run it."""
        (host,) = self.objects["host"]
        match self.knobs.unfit:
            case "VM_HVM_REQUIRED":
                return self.knobs.unfit, ref
            case "VM_INCOMPATIBLE_WITH_THIS_HOST":
                return (
                    self.knobs.unfit,
                    ref,
                    host,
                    "VM last booted on a CPU with features this host lacks",
                )
        taken = sum(
            self.get("VM_metrics", vm["metrics"])["memory_actual"]
            for vm in self.objects["VM"].values() if vm["power_state"] == "Running"
        )  # fmt: skip
        free, need = self.knobs.host_memory - taken, self.get("VM", ref)["memory_dynamic_min"]
        return ("HOST_NOT_ENOUGH_FREE_MEMORY", str(need), str(free)) if need > free else ()

    def _runs(self, ref: str, paused: bool) -> None:
        record = self.get("VM", ref)
        if self._why_not(ref):
            raise Failure("NO_HOSTS_AVAILABLE")  # whatever the reason
        mine = [(r, v) for r, v in self.objects["VBD"].items() if v["VM"] == ref]
        for _, vbd in mine:
            if vbd["VDI"] != NULL:
                self._there(vbd["VDI"])
            if vbd["mode"] == "RW" and vbd["VDI"] != NULL:
                self._attached(vbd["VDI"], "attach")
        for device, vbd in mine:  # its name in the guest stays, also when that is off
            name = "xvd" + "abcdefgh"[int(vbd["userdevice"])]
            self.change("VBD", device, currently_attached=True, device=name)
        self._half_done()
        for device in [r for r, v in self.objects["VIF"].items() if v["VM"] == ref]:
            self.change("VIF", device, currently_attached=True)
        before = self._before.get(record["metrics"], 0)
        if self.knobs.lag:
            self._stale[record["metrics"]] = (before, self.knobs.lag)
        self.change("VM_metrics", record["metrics"], start_time=now(),
                    memory_actual=record["memory_dynamic_max"])  # fmt: skip
        guest = self.add("VM_guest_metrics", PV_drivers_detected=self.knobs.agent)
        self.change("VM", ref, power_state="Paused" if paused else "Running", guest_metrics=guest)
        self._guest_writes(ref)

    def VM_resume(self, ref: str, paused: bool, _force: bool) -> None:
        with self.busy(ref):
            if self._state(ref, "Suspended")["suspend_VDI"] == NULL:
                raise Failure("VM_HAS_NO_SUSPEND_VDI", ref)
            self._resumed(ref, paused)

    def _resumed(self, ref: str, paused: bool) -> None:
        vdi = self.get("VM", ref)["suspend_VDI"]
        if self._images.get(self.get("VDI", vdi)["uuid"]) != self._at(ref):
            self.harm.append(f"{self.get('VM', ref)['name_label']}: memory resumed on another disk")
        try:
            self._runs(ref, paused)
        except Died:  # the guest has written, and nobody knows yet that it runs
            self._guest_writes(ref)
            raise
        self._half_done()
        self.change("VM", ref, suspend_VDI=Ref(NULL))
        self.VDI_destroy(vdi)

    def _off(self, ref: str, power: str = "Halted") -> None:
        for class_ in ("VBD", "VIF"):
            for device in [r for r, v in self.objects[class_].items() if v["VM"] == ref]:
                self.change(class_, device, currently_attached=False)
        record = self.get("VM", ref)
        self.drop("VM_guest_metrics", record["guest_metrics"])
        metrics = record["metrics"]
        self._before[metrics] = self.get("VM_metrics", metrics)["memory_actual"] or \
            self._before.get(metrics, 0)  # fmt: skip
        self._stale.pop(metrics, None)
        halted = {"start_time": NEVER} if power == "Halted" else {}
        self.change("VM_metrics", metrics, memory_actual=0, **halted)
        self.change("VM", ref, power_state=power, guest_metrics=Ref(NULL))

    def VM_hard_shutdown(self, ref: str) -> None:
        with self.busy(ref):
            self._state(ref, "Running", "Paused", "Suspended")
            self._ended(ref, self._powerless)

    def _ended(self, ref: str, end: Callable[[str], None]) -> None:
        """As xapi is now and then: it answers before its event thread has seen to all."""
        if not self.knobs.late_halt:
            end(ref)
            return

        def later() -> None:
            time.sleep(0.1)
            with self.changed, contextlib.suppress(Failure):
                end(ref)

        threading.Thread(target=later, daemon=True).start()
        gone = f"VM and id {self.get('VM', ref)['uuid']}/vbd.xvda does not exist in xenopsd"
        raise Failure("INTERNAL_ERROR", f"Object with type {gone}")

    def _powerless(self, ref: str) -> None:
        image = self.get("VM", ref)["suspend_VDI"]
        if image != NULL:
            self.change("VM", ref, suspend_VDI=Ref(NULL))
            if image in self.objects["VDI"]:
                with contextlib.suppress(Failure):
                    self.VDI_destroy(image)
        self._off(ref)

    def VM_clean_shutdown(self, ref: str) -> None:
        with self.busy(ref):
            self._state(ref, "Running")
            if not self.knobs.agent:
                raise Failure("VM_LACKS_FEATURE", ref)
            self._ended(ref, self._off)

    # -- memory and CPUs ------------------------------------------------------------------------------

    @staticmethod
    def _ordered(record: dict[str, Any]) -> None:
        low, high = record["memory_static_min"], record["memory_static_max"]
        if not low <= record["memory_dynamic_min"] <= record["memory_dynamic_max"] <= high:
            raise Failure("MEMORY_CONSTRAINT_VIOLATION_ORDER")

    def VM_set_memory_limits(self, ref: str, low: int, high: int, least: int, most: int) -> None:
        self._state(ref, "Halted")
        wanted = {"memory_static_min": low, "memory_static_max": high, "memory_dynamic_min": least,
                  "memory_dynamic_max": most}  # fmt: skip
        self._ordered(wanted)
        self.change("VM", ref, **wanted)

    def VM_set_memory_dynamic_range(self, ref: str, least: int, most: int) -> None:
        record = self.get("VM", ref)
        wanted = {"memory_dynamic_min": least, "memory_dynamic_max": most}
        self._ordered(record | wanted)
        if not self.knobs.dmc and not least == most == record["memory_static_max"]:
            raise Failure("MEMORY_CONSTRAINT_VIOLATION_MAXPIN", "DMC disabled")
        self.change("VM", ref, **wanted)
        if record["power_state"] == "Running" and self.knobs.obeys:
            threading.Thread(target=self._balloon, args=(ref, most), daemon=True).start()

    def _balloon(self, ref: str, target: int) -> None:
        """The guest gets there in steps."""
        for _ in range(4):
            time.sleep(0.02)
            with self.changed, contextlib.suppress(Failure):
                metrics = self.get("VM", ref)["metrics"]
                actual = self.get("VM_metrics", metrics)["memory_actual"]
                if not actual:  # it was switched off
                    return
                self.change("VM_metrics", metrics, memory_actual=(actual + target) // 2)
        with self.changed, contextlib.suppress(Failure):
            self.change("VM_metrics", self.get("VM", ref)["metrics"], memory_actual=target)

    def VM_set_VCPUs_max(self, ref: str, value: int) -> None:
        record = self._state(ref, "Halted")
        if value < record["VCPUs_at_startup"]:
            raise Failure("INVALID_VALUE", "VCPU values must satisfy: 0 < VCPUs_at_startup", str(value))
        self.change("VM", ref, VCPUs_max=value)

    def VM_set_VCPUs_at_startup(self, ref: str, value: int) -> None:
        record = self._state(ref, "Halted")
        if not 0 < value <= record["VCPUs_max"]:
            raise Failure("INVALID_VALUE", "VCPU values must satisfy: 0 < VCPUs_at_startup", str(value))
        self.change("VM", ref, VCPUs_at_startup=value)
