"""Templates on a XenAPI server: a halted VM each, with one disk that was imported once and never
changes.

It is no XenAPI template: a clone of one would be a template, too, and take a VM.provision to be a
machine. So it is kept from running otherwise. From its first moment on it has more memory than any
host, which VM.clone copies: thus no host can run a clone before it gets a machine's memory, which it
gets last. And its start is blocked, which VM.clone does not copy (read in xapi's xapi_vm_clone.ml), by
a call of its own, for VM.create drops the blocked operations that it is given (xapi_vm.ml).

What a killed import leaves has a name that says so, see ``temporary_names``; what a killed removal
leaves was marked as gone first of all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from host.run import Runner
from hypervisors.api import Owner, StepFn, Template, check_template, label_taken, template_in_use
from hypervisors.ownership import FarmIdentity
from hypervisors.xenapi.errors import XenApiError, translated
from hypervisors.xenapi.pool import Pool
from hypervisors.xenapi.records import DISK, NULL, PREFIX, XenApiVm, template_of
from hypervisors.xenapi.temporary_names import temporary_name
from inventory.errors import FarmhandError, NotFound

_LEAST_MEMORY = 2**24
_TOO_MUCH_MEMORY = 2**46
"""More than any host has: VM.start finds none (NO_HOSTS_AVAILABLE, measured)."""
_BLOCKED = dict.fromkeys(("start", "start_on"), "farmhand's golden disk never runs")

_HVM = {
    "user_version": "1", "is_a_template": False, "affinity": NULL, "memory_target": "0",
    "VCPUs_params": {}, "VCPUs_max": "1", "VCPUs_at_startup": "1",
    "actions_after_shutdown": "destroy", "actions_after_reboot": "restart",
    "actions_after_crash": "destroy", "PV_bootloader": "", "PV_kernel": "", "PV_ramdisk": "",
    "PV_args": "", "PV_bootloader_args": "", "PV_legacy_args": "", "HVM_boot_policy": "BIOS order",
    "HVM_boot_params": {"order": "c"}, "PCI_bus": "", "recommendations": "", "domain_type": "hvm",
    "platform": {"acpi": "1", "apic": "true", "pae": "true", "nx": "true", "viridian": "false"},
}  # fmt: skip
"""A machine that boots from its disk as a PC does; the fields VM.create wants (data model 2.20)."""


class TemplateImages:
    def __init__(self, pool: Pool, runner: Runner, step: StepFn) -> None:
        self.pool = pool
        self._farm = pool.farm
        self._runner = runner
        self._step = step

    def seal(self, image: Path, template: Template) -> Template:
        from hypervisors.disks.images import sha256_file

        with translated(f"seal {template.label}"):
            if any(t.label == template.label and t.farm == self._farm for t in self.list()):
                raise label_taken(template.label, self._farm, self._farm)
            digest = sha256_file(image)
            with self._raw(image) as (raw, size):
                self._step(f"import {template.label}")
                ready = replace(template, sha256=digest, size=size, farm=self._farm)
                sealed = self._import(raw, ready)
            image.unlink()
            return sealed

    @contextlib.contextmanager
    def _raw(self, image: Path) -> Iterator[tuple[Path, int]]:
        """The image's content as a raw file, and its virtual size; the file is sparse."""
        from hypervisors.disks.images import image_info

        with image.open("rb") as file:
            qcow2 = file.read(4) == b"QFI\xfb"
        if not qcow2:
            yield image, image.stat().st_size
            return
        size = image_info(self._runner, image).size
        raw = image.with_name(f".{image.name}.{os.getpid()}.raw")
        try:
            self._runner.change(
                "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw, timeout=3600
            )
            yield raw, size
        finally:
            raw.unlink(missing_ok=True)

    def _import(self, raw: Path, template: Template) -> Template:
        call = self.pool.call
        marks = {"farm": self._farm.mark, "kind": "making"}
        config = {PREFIX + key: value for key, value in marks.items()}
        with temporary_name(Owner(self._farm, "")) as name:
            vdi, vm = "", ""
            try:
                vdi = self.pool.new_vdi(name, template.size, config)
                self.pool.sessions.put(vdi, raw, template.size)
                memory = str(_TOO_MUCH_MEMORY)
                vm = call(
                    "VM.create",
                    _HVM | {
                        "name_label": name,
                        "name_description": f"farmhand's golden disk {template.label}, "
                        f"farm {self._farm.name}: {template.origin}",
                        "memory_static_min": str(_LEAST_MEMORY), "memory_static_max": memory,
                        "memory_dynamic_min": memory, "memory_dynamic_max": memory,
                        "other_config": config,
                    },
                )  # fmt: skip
                call("VM.set_blocked_operations", vm, _BLOCKED)
                self.pool.attach(vm, vdi, DISK, read_only=False)
                label = f"{self._farm.name} {template.label}"
                call("VDI.set_name_label", vdi, label)
                made = XenApiVm(vm, call("VM.get_record", vm))
                sealed = {
                    "farm": self._farm.mark, "kind": "template", "label": template.label,
                    "size": str(template.size), "sha256": template.sha256,
                    "created": template.created.isoformat(), "origin": template.origin,
                    "firstboot": template.firstboot,
                }  # fmt: skip
                call("VM.set_other_config", vm, made.other_config(sealed))
                call("VM.set_name_label", vm, label)
            except BaseException:
                if vm:
                    self.pool.undo(vm)
                if vdi:
                    with contextlib.suppress(XenApiError, FarmhandError):
                        self.pool.destroy_vdi(vdi)
                raise
        self.pool.keep()
        return replace(template, ref=f"{made.uuid} {vm}")

    def list(self) -> Sequence[Template]:
        with translated("list the templates"):
            found = [template_of(vm) for vm in self.pool.all_vms() if vm.kind == "template"]
            return sorted(found, key=lambda t: (t.name, t.generation, t.farm != self._farm))

    @staticmethod
    def among(vms: Sequence[XenApiVm], label: str, farm: FarmIdentity) -> Sequence[XenApiVm]:
        """That farm's template of that label among these VMs. Each farm has labels of its own."""
        return [
            vm for vm in vms
            if vm.kind == "template" and vm.marks["label"] == label and vm.belongs(farm)
        ]  # fmt: skip

    def remove(self, label: str) -> None:
        with translated(f"remove template {label}"):
            vms = self.pool.all_vms()
            found = self.among(vms, label, self._farm)
            if not found:
                for vm in vms:
                    if vm.kind == "template" and vm.marks["label"] == label:
                        check_template(label, template_of(vm).farm, self._farm)
                raise NotFound(f"there is no template {label}")
            sources = {f"{vm.uuid} {vm.ref}" for vm in found}
            users = [
                vm.name for vm in vms
                if vm.kind in ("machine", "checkpoint") and (
                    vm.marks.get("source") in sources
                    or (vm.marks.get("template") == label and vm.belongs(self._farm))
                )
            ]  # fmt: skip
            if users:
                raise template_in_use(label, users)
            self._step(f"remove template {label}")
            for vm in found:
                self.pool.give_up(vm)
                self.pool.raze([vm])

    def adopt(self, label: str, whose: FarmIdentity) -> None:
        with translated(f"adopt template {label}"):
            for vm in self.among(self.pool.all_vms(), label, whose):
                self._step(f"mark {vm.name} as ours")
                ours = vm.other_config({**vm.marks, "farm": self._farm.mark})
                self.pool.call("VM.set_other_config", vm.ref, ours)
            self.pool.keep()
