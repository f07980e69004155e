"""What a XenAPI server's calls do to disks, and to how VMs have them: VDIs, VBDs, VIFs."""

from __future__ import annotations

import copy
import re
import uuid
from typing import Any

from contents import BLOCK
from database import Database
from model import NULL, Failure, Ref


class Storage(Database):
    def VDI_create(self, args: dict[str, Any]) -> Ref:
        self.get("SR", args["SR"])
        self._room(args["SR"], 0)
        ref = self.add("VDI", **args, managed=True)
        record = self.get("VDI", ref)
        record["location"] = record["uuid"]
        self.contents.create(record["uuid"], args["virtual_size"])
        self.VDI_update(ref)
        return ref

    def _room(self, sr: str, need: int) -> None:
        record = self.record("SR", sr)
        free = record["physical_size"] - record["physical_utilisation"]
        if need + BLOCK > free:
            raise Failure("SR_FULL", str(need + BLOCK), str(free))

    def _attached(self, vdi: str, operation: str) -> None:
        for vbd in self.objects["VBD"].values():
            if vbd["VDI"] == vdi and vbd["currently_attached"]:
                raise Failure("VDI_IN_USE", vdi, operation)

    def _there(self, ref: str) -> dict[str, Any]:
        """Its record; a failure where its file is gone: a power cut took the news of its removal."""
        record = self.get("VDI", ref)
        if not self.contents.path(record["uuid"]).exists():
            why = f"The VDI is not available [opterr={record['uuid']}]"
            raise Failure("SR_BACKEND_FAILURE_46", "", why, "")
        return record

    def SR_scan(self, ref: str) -> None:
        """Records follow the storage: what has no file goes (its VBDs point nowhere then), and unknown
        files become VDIs, without name and marks."""
        self.get("SR", ref)
        with self.changed:
            files = self.contents.uuids()
            for vdi, record in list(self.objects["VDI"].items()):
                if record["SR"] == ref and record["uuid"] not in files:
                    self.drop("VDI", vdi)
            for found in files - {record["uuid"] for record in self.objects["VDI"].values()}:
                self.add(
                    "VDI", uuid=found, location=found, SR=Ref(ref), type="user", managed=True,
                    virtual_size=self.contents.path(found).stat().st_size,
                )  # fmt: skip

    def VDI_destroy(self, ref: str) -> None:
        self._destroyed(ref)

    def _destroyed(self, ref: str, *, for_revert: bool = False) -> None:
        with self.busy(ref):
            record = self._there(ref)
            self._attached(ref, "destroy")
            self.drop("VDI", ref)
            self.contents.remove(record["uuid"])
            dying = getattr(self._dying, "now", False)
            for vbd, found in list(self.objects["VBD"].items()):
                if found["VDI"] == ref:
                    if self.knobs.lazy_vbds or dying:
                        self.change("VBD", vbd, VDI=Ref(NULL))
                    else:
                        self.drop("VBD", vbd)
            for other in self.objects["VDI"].values():
                if other["snapshot_of"] == ref and not for_revert:
                    other["snapshot_of"] = Ref(NULL)

    def VDI_clone(self, ref: str, _parameters: dict[str, str] | None = None) -> Ref:
        with self.busy(ref):
            return self._grown(ref)

    def _grown(self, ref: str, *, sr: str = "", full: bool = False, **fields: Any) -> Ref:
        source = self._there(ref)
        self._room(sr or source["SR"], source["virtual_size"] if full else 0)
        kept = {
            f: copy.deepcopy(source[f]) for f in
            ("SR", "name_label", "name_description", "virtual_size", "type", "sharable", "read_only",
             "other_config", "sm_config", "managed")
        }  # fmt: skip
        if sr:
            kept["SR"] = Ref(sr)
        made = self.add("VDI", **(kept | fields))
        target = self.get("VDI", made)["uuid"]
        (self.contents.copy if full else self.contents.clone)(source["uuid"], target)
        self._told_used[target] = self.contents.used(target)
        self._versions[target] = self._versions.get(source["uuid"], "")
        if source["uuid"] in self._images:
            self._images[target] = self._images[source["uuid"]]
        return made

    def _at(self, vm: str) -> dict[str, str]:
        """By place, what its disks hold."""
        return {
            vbd["userdevice"]: self._versions.get(self.get("VDI", vbd["VDI"])["uuid"], "")
            for vbd in self.objects["VBD"].values()
            if vbd["VM"] == vm and vbd["mode"] == "RW" and vbd["VDI"] in self.objects["VDI"]
        }

    def _guest_writes(self, vm: str) -> None:
        for vbd in self.objects["VBD"].values():
            if vbd["VM"] == vm and vbd["mode"] == "RW" and vbd["VDI"] in self.objects["VDI"]:
                self._versions[self.get("VDI", vbd["VDI"])["uuid"]] = str(uuid.uuid4())

    def VDI_resize(self, ref: str, size: int) -> None:
        """Of the leaf of a chain, which a VM's disk is; its snapshots keep their sizes. A VHD has whole
        blocks. (Read: xapi_vdi.ml, and SM's FileSR and LVHDSR.)"""
        record = self._there(ref)
        self._attached(ref, "resize")
        if size < record["virtual_size"]:
            why = "VDI Invalid size [opterr=shrinking not allowed]"
            raise Failure("SR_BACKEND_FAILURE_79", "", why, "")
        size = -(-size // BLOCK) * BLOCK
        self.contents.resize(record["uuid"], size)
        self.change("VDI", ref, virtual_size=size)

    def VDI_update(self, ref: str) -> None:
        """Only now, and after a clone, is known what a disk takes."""
        uuid_ = self.get("VDI", ref)["uuid"]
        self._told_used[uuid_] = self.contents.used(uuid_)
        self._touch("VDI", ref)

    def VDI_set_name_label(self, ref: str, value: str) -> None:
        self.change("VDI", ref, name_label=value)

    def write(self, ref: str, data: Any, length: int) -> None:
        """PUT /import_raw_vdi."""
        record = self._there(ref)
        self._attached(ref, "import")
        if length > record["virtual_size"]:
            raise Failure("INVALID_VALUE", "Content-Length", str(length))
        self.contents.write(record["uuid"], data, length)
        self._versions[record["uuid"]] = str(uuid.uuid4())
        self.change("VDI", ref)

    # -- VBDs and VIFs ------------------------------------------------------------------------------

    def VBD_create(self, args: dict[str, Any]) -> Ref:
        vm = self.get("VM", args["VM"])
        if not args["empty"]:
            self.get("VDI", args["VDI"])
        device = args["userdevice"]
        if not re.fullmatch(r"\d{1,3}", device):
            raise Failure("INVALID_DEVICE", device)
        for vbd in self.objects["VBD"].values():
            if vbd["VM"] == args["VM"] and vbd["userdevice"] == device:
                raise Failure("DEVICE_ALREADY_EXISTS", device)
        del vm
        return self.add("VBD", **args)

    def VBD_destroy(self, ref: str) -> None:
        if self.get("VBD", ref)["currently_attached"]:
            raise Failure("OPERATION_NOT_ALLOWED", f"VBD '{ref}' still attached to a VM")
        self._drop_device("VBD", ref)

    def _drop_device(self, class_: str, ref: str) -> None:
        vm = self.get(class_, ref)["VM"]
        self.drop(class_, ref)
        if vm in self.objects["VM"]:
            self._touch("VM", vm)

    def VIF_create(self, args: dict[str, Any]) -> Ref:
        self.get("VM", args["VM"])
        self.get("network", args["network"])
        mac = args["MAC"]
        if mac and not re.fullmatch(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", mac):
            raise Failure("MAC_INVALID", mac)
        for vif in self.objects["VIF"].values():
            if vif["VM"] == args["VM"] and vif["device"] == args["device"]:
                raise Failure("DEVICE_ALREADY_EXISTS", args["device"])
        return self.add("VIF", **(args | {"MAC": mac or new_mac(), "MAC_autogenerated": not mac}))

    def VIF_destroy(self, ref: str) -> None:
        if self.get("VIF", ref)["currently_attached"]:
            raise Failure("OPERATION_NOT_ALLOWED", f"VIF '{ref}' still attached to a VM")
        self._drop_device("VIF", ref)


def new_mac() -> str:
    digits = uuid.uuid4().hex
    return ":".join(["02", *(digits[at : at + 2] for at in range(0, 10, 2))])
