"""A XenAPI server's objects and what its calls do to them, from the data model and from what was
measured on a real xapi 23.10 (API 2.20). It knows nothing of who calls.

Measured, and kept to here: a clone of a template stays one until VM.provision; snapshots say that they
are templates, too; VM.revert keeps the VM's reference, uuid and MACs, makes all its VBDs, VIFs and VDIs
anew, destroys the old disks first, and brings name and memory settings back; VM.destroy leaves the VDIs;
VM.checkpoint needs a suspend SR; calls on one object wait for each other, long, and do not fail;
event.from with nothing new answers half a second after its time limit. Not measured: whether VDI.destroy
takes the disk's VBDs along at once (the default here) or they stay a while (``lazy_vbds``).

Not measured either, but read in xapi's source (ocaml/xapi/xapi_vm_snapshot.ml, xapi_xenops.ml,
message_forwarding.ml): VM.revert sets back the VM's fields first of all, from what the snapshot kept of
them; destroys those old disks that the snapshot has one of, and leaves the others unattached; and sets
the power state last. VM.checkpoint suspends, clones, and resumes. VM.resume forgets the image when the
guest runs already; VM.hard_shutdown of a suspended VM destroys it.

A running guest writes to its disks. What they are then is a new version (``versions``); a suspend image
knows the versions that it is of, and one that is resumed on others is told by ``harm``.
"""

from __future__ import annotations

import contextlib
import copy
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contents import BLOCK, Contents
from model import CALLS, CLASSES, NULL, Failure, Ref, empty, on_the_wire

MIB = 2**20
_BACK = {  # which field of whom names which field's owners
    ("VM", "VBDs"): ("VBD", "VM"),
    ("VM", "VIFs"): ("VIF", "VM"),
    ("VM", "snapshots"): ("VM", "snapshot_of"),
    ("VDI", "VBDs"): ("VBD", "VDI"),
    ("VDI", "snapshots"): ("VDI", "snapshot_of"),
    ("SR", "VDIs"): ("VDI", "SR"),
    ("network", "VIFs"): ("VIF", "network"),
}
_STATE = ("objects", "_generation", "_stamps", "_gone", "_moments", "_versions", "_images", "harm")


class Died(Exception):
    """The server's host lost its power in the midst of a call."""


_RESTORED = (
    "name_label", "name_description", "memory_static_min", "memory_static_max", "memory_dynamic_min",
    "memory_dynamic_max", "VCPUs_max", "VCPUs_at_startup", "other_config", "platform",
)  # fmt: skip


@dataclass
class Knobs:
    """How this server is. Seconds, bytes."""

    users: dict[str, str] = field(default_factory=dict)
    sr_size: int = 2**40
    host_memory: int = 2**36
    suspend_sr: bool = False
    agent: bool = True
    obeys: bool = True  # guests give memory away when asked to
    slow: float = 0.0  # what a clone, snapshot or revert takes
    back_off: float = 0.0  # what a call that had to wait for another waits on top
    lazy_vbds: bool = False
    session_life: int = 0  # calls after which a session has expired; 0: never
    slave_of: str = ""  # told to whoever logs in, but for at the address ``master_at``
    master_at: str = ""


class World:
    def __init__(self, directory: Path, knobs: Knobs) -> None:
        self.knobs = knobs
        self.contents = Contents(directory)
        self.objects: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in CLASSES}
        self.changed = threading.Condition(threading.RLock())
        self._generation = 1
        self._stamps: dict[tuple[str, str], tuple[int, int]] = {}  # made, changed
        self._gone: list[tuple[int, str, str]] = []
        self._busy: dict[str, threading.Lock] = {}
        self._sessions: dict[str, int] = {}
        self._dying = threading.local()
        self._tasks: list[threading.Thread] = []
        self._moments: dict[str, dict[str, Any]] = {}  # by snapshot, its VM's fields then
        self._versions: dict[str, str] = {}  # by VDI, what it holds
        self._images: dict[str, dict[str, str]] = {}  # by suspend image: by place, what the disks held
        self.harm: list[str] = []  # images that were resumed on disks which they weren't of
        host = self.add("host", name_label="xen", enabled=True, hostname="xen")
        sr = self.add(
            "SR", name_label="Local storage", type="ext", content_type="user",
            physical_size=knobs.sr_size, shared=False,
        )  # fmt: skip
        self.add("SR", name_label="Other storage", type="ext", content_type="user",
                 physical_size=knobs.sr_size)  # fmt: skip
        self.add("network", name_label="build", bridge="xenbr0", MTU=1500)
        self.add("network", name_label="other", bridge="xenbr1", MTU=1500)
        self.add("pool", name_label="", master=host, default_SR=sr)
        dom0 = self.add("VM", name_label="Control domain on host: xen", is_control_domain=True,
                        power_state="Running", memory_static_max=2**31)  # fmt: skip
        self.objects["VM"][dom0]["metrics"] = self.add("VM_metrics")
        default = self.add("VM", name_label="Other install media", is_a_template=True,
                           is_default_template=True)  # fmt: skip
        self.objects["VM"][default]["metrics"] = self.add("VM_metrics")
        self._set_suspend_sr()

    def _set_suspend_sr(self) -> None:
        (pool,) = self.objects["pool"].values()
        pool["suspend_image_SR"] = pool["default_SR"] if self.knobs.suspend_sr else Ref(NULL)

    def turn(self, **knobs: Any) -> None:
        for name, value in knobs.items():
            assert hasattr(self.knobs, name), name
            setattr(self.knobs, name, value)
        with self.changed:
            self._set_suspend_sr()
            for sr in self.objects["SR"].values():
                sr["physical_size"] = self.knobs.sr_size

    def kept(self) -> dict[str, Any]:
        """All that it holds, disks too: for ``put_back``."""
        with self.changed:
            self.contents.keep()
            return copy.deepcopy({name: getattr(self, name) for name in _STATE})

    def put_back(self, kept: dict[str, Any]) -> None:
        self.settle()
        with self.changed:
            self.contents.put_back()
            for name, value in copy.deepcopy(kept).items():
                setattr(self, name, value)

    def settle(self) -> None:
        """Until all tasks are over, also those that nobody waits for."""
        for task in self._tasks:
            task.join()

    # -- objects ----------------------------------------------------------------------------------

    def add(self, class_: str, **fields: Any) -> Ref:
        ref = Ref(f"OpaqueRef:{uuid.uuid4()}")
        with self.changed:
            self.objects[class_][ref] = empty(class_) | {"uuid": str(uuid.uuid4())} | fields
            self._touch(class_, ref, made=True)
        return ref

    def get(self, class_: str, ref: str) -> dict[str, Any]:
        found = self.objects[class_].get(ref)
        if found is None:
            raise Failure("HANDLE_INVALID", class_, ref)
        return found

    def drop(self, class_: str, ref: str) -> None:
        with self.changed:
            if self.objects[class_].pop(ref, None) is not None:
                self._generation += 1
                self._stamps.pop((class_, ref), None)
                self._gone.append((self._generation, class_, ref))
                self.changed.notify_all()

    def change(self, class_: str, ref: str, **fields: Any) -> None:
        with self.changed:
            self.get(class_, ref).update(fields)
            self._touch(class_, ref)

    def _touch(self, class_: str, ref: str, *, made: bool = False) -> None:
        """Those that list it have changed with it."""
        with self.changed:
            self._generation += 1
            first = self._generation if made else self._stamps.get((class_, ref), (1, 1))[0]
            self._stamps[class_, ref] = (first, self._generation)
            for (owner, _), (lister, by) in _BACK.items():
                other = self.objects[class_][ref].get(by) if lister == class_ else None
                if other in self.objects[owner]:
                    made_at = self._stamps.get((owner, other), (1, 1))[0]
                    self._stamps[owner, other] = (made_at, self._generation)
            self.changed.notify_all()

    def record(self, class_: str, ref: str) -> dict[str, Any]:
        """As it is told: with the lists of those that refer to it, and what is computed."""
        told = dict(self.get(class_, ref))
        for (owner, name), (lister, by) in _BACK.items():
            if owner == class_:
                told[name] = [r for r, other in self.objects[lister].items() if other[by] == ref]
        if class_ == "VDI":
            told["physical_utilisation"] = self.contents.used(told["uuid"])
        if class_ == "SR":
            mine = [v for v in self.objects["VDI"].values() if v["SR"] == ref]
            told["physical_utilisation"] = sum(self.contents.used(v["uuid"]) for v in mine)
            told["virtual_allocation"] = sum(v["virtual_size"] for v in mine)
        return told

    def told(self) -> list[str]:
        """All there is but its own, a line each."""
        vms, found = self.objects["VM"], []
        for ref, vm in vms.items():
            if vm["is_control_domain"] or vm["is_default_template"]:
                continue
            kind = "snapshot" if vm["is_a_snapshot"] else "template" if vm["is_a_template"] else "VM"
            marks = vm["other_config"].get("farmhand:kind", "")
            found.append(f"{kind} {vm['name_label']} {marks}")
            for class_ in ("VBD", "VIF"):
                for device in self.objects[class_].values():
                    if device["VM"] == ref:
                        at = device.get("userdevice") or device["device"]
                        found.append(f"{class_} {at} of {kind} {vm['name_label']}")
        for vdi in self.objects["VDI"].values():
            found.append(f"VDI {vdi['name_label']} snapshot {vdi['is_a_snapshot']}")
        return sorted(found)

    @contextlib.contextmanager
    def busy(self, *refs: str) -> Iterator[None]:
        """Calls on one object one after the other; who had to wait backs off on top of it."""
        locks = [self._busy.setdefault(ref, threading.Lock()) for ref in sorted(refs)]
        waited = False
        for lock in locks:
            if not lock.acquire(blocking=False):
                waited = True
                lock.acquire()
        try:
            if waited and self.knobs.back_off:
                time.sleep(self.knobs.back_off)
            if self.knobs.slow:
                time.sleep(self.knobs.slow)
            with self.changed:
                yield
        finally:
            for lock in locks:
                lock.release()

    # -- dying ------------------------------------------------------------------------------------

    def call_and_die(self, call: Callable[[], Any], parts: int = 1) -> None:
        """So many parts of the call are done, where it has parts, else all; then nothing runs any more,
        nobody is logged in, and no task goes on. What is in the database and in the storage is what
        stays."""
        self._dying.now, self._dying.parts = True, parts
        with contextlib.suppress(Died, Failure):
            call()
        self._dying.now = False
        with self.changed:
            for ref, vm in list(self.objects["VM"].items()):
                if not (vm["is_control_domain"] or vm["is_a_template"]):
                    self._off(ref, vm["power_state"] if vm["power_state"] == "Suspended" else "Halted")
            for class_ in ("session", "task"):
                for ref in list(self.objects[class_]):
                    self.drop(class_, ref)

    def _half_done(self) -> None:
        if getattr(self._dying, "now", False):
            self._dying.parts -= 1
            if self._dying.parts == 0:
                raise Died

    # -- calls ------------------------------------------------------------------------------------

    def session_of(self, handle: str) -> None:
        if handle not in self.objects["session"]:
            raise Failure("SESSION_INVALID", handle)
        if self.knobs.session_life:
            self._sessions[handle] = self._sessions.get(handle, 0) + 1
            if self._sessions[handle] > self.knobs.session_life:
                self.drop("session", handle)
                raise Failure("SESSION_INVALID", handle)

    def handler(self, name: str) -> Callable[..., Any] | None:
        """Takes the arguments without the session, typed; returns what the model says."""
        own = getattr(self, name.replace(".", "_"), None)
        if own is not None or not CALLS[name]["implicit"]:
            return own
        class_, _, method = name.partition(".")
        fixed = {
            "get_all": lambda: list(self.objects[class_]),
            "get_all_records": lambda: {r: self.record(class_, r) for r in self.objects[class_]},
            "get_record": lambda ref: self.record(class_, ref),
            "get_by_uuid": lambda value: self._by_uuid(class_, value),
            "get_by_name_label": lambda label: [
                r for r, o in self.objects[class_].items() if o["name_label"] == label
            ],
        }
        if method in fixed:
            return fixed[method]
        for verb in ("add_to_", "remove_from_", "get_", "set_"):
            if method.startswith(verb) and method.removeprefix(verb) in CLASSES[class_]:
                return self._field(class_, verb, method.removeprefix(verb))
        return None

    def _by_uuid(self, class_: str, value: str) -> str:
        for ref, found in self.objects[class_].items():
            if found["uuid"] == value:
                return ref
        raise Failure("UUID_INVALID", class_, value)

    def _field(self, class_: str, verb: str, name: str) -> Callable[..., Any]:
        def get(ref: str) -> Any:
            return self.record(class_, ref)[name]

        def set_(ref: str, value: Any) -> None:
            self.change(class_, ref, **{name: value})

        def add(ref: str, key: str, value: Any) -> None:
            found = self.get(class_, ref)[name]
            if isinstance(found, dict):
                if key in found:
                    uuid_ = self.get(class_, ref)["uuid"]
                    raise Failure("MAP_DUPLICATE_KEY", class_, name, uuid_, key)
                self.change(class_, ref, **{name: found | {key: value}})

        def remove(ref: str, key: str) -> None:
            found = self.get(class_, ref)[name]
            self.change(class_, ref, **{name: {k: v for k, v in found.items() if k != key}})

        return {"get_": get, "set_": set_, "add_to_": add, "remove_from_": remove}[verb]

    # -- session, events, tasks ---------------------------------------------------------------------

    def session_login_with_password(self, user: str, password: str, *_: str) -> str:
        if self.knobs.users.get(user) != password:
            raise Failure("SESSION_AUTHENTICATION_FAILED")
        return self.add("session", auth_user_name=user, pool=True)

    def logout(self, handle: str) -> None:
        self.drop("session", handle)

    def event_from(self, classes: list[str], token: str, timeout: float) -> dict[str, Any]:
        match = re.fullmatch(r"(\d+),(\d+)|", token)
        if match is None:
            raise Failure("EVENT_FROM_TOKEN_PARSE_FAILURE", token)
        since, wanted = int(match[1] or 0), [c.lower() for c in classes]
        end = time.monotonic() + timeout
        with self.changed:
            while not (events := self._events(wanted, classes, since)) and time.monotonic() < end:
                self.changed.wait(min(end - time.monotonic(), 1.0))
            now = self._generation
        if not events:
            time.sleep(0.5)
        counts = {name.lower(): len(found) for name, found in self.objects.items()}
        return {"events": events, "token": f"{now:020},{0:020}", "valid_ref_counts": counts}

    def _events(self, wanted: list[str], classes: list[str], since: int) -> list[dict[str, Any]]:
        def told(class_: str, ref: str) -> bool:
            return "*" in wanted or class_.lower() in wanted or f"{class_}/{ref}".lower() in wanted

        found = []
        for (class_, ref), (made, last) in self._stamps.items():
            if last > since and class_ != "session" and told(class_, ref):
                found.append((last, class_, ref, "add" if made > since else "mod"))
        if since:
            found += [(at, c, ref, "del") for at, c, ref in self._gone if at > since and told(c, ref)]
        events = []
        for at, class_, ref, operation in sorted(found):
            event = {"id": str(at), "timestamp": "0.0", "class": class_.lower(), "operation": operation,
                     "ref": str(ref)}  # fmt: skip
            if operation != "del":
                event["snapshot"] = (class_, copy.deepcopy(self.record(class_, ref)))
            events.append(event)
        return events

    def task_cancel(self, ref: str) -> None:
        if self.get("task", ref)["status"] != "pending":
            raise Failure("OPERATION_NOT_ALLOWED", "the task is over")
        self.change("task", ref, status="cancelled")

    def task_destroy(self, ref: str) -> None:
        self.get("task", ref)
        self.drop("task", ref)

    def run_task(self, name: str, call: Callable[[], Any]) -> Ref:
        """Async.NAME: at once a task; what it comes to is in its record."""
        kind = CALLS[name]["result"]
        ref = self.add("task", name_label=f"Async.{name}", status="pending", created=now())

        def run() -> None:
            try:
                value = on_the_wire(kind, call())
            except Failure as failure:
                end = {"status": "failure", "error_info": failure.description}
            else:
                end = {"status": "success", "progress": 1.0,
                       "result": f"<value>{value}</value>" if value else ""}  # fmt: skip
            with self.changed, contextlib.suppress(Failure):  # destroyed, or cancelled, meanwhile
                if self.get("task", ref)["status"] == "pending":
                    self.change("task", ref, finished=now(), **end)

        thread = threading.Thread(target=run, daemon=True)
        self._tasks = [task for task in self._tasks if task.is_alive()] + [thread]
        thread.start()
        return ref

    # -- VDIs ---------------------------------------------------------------------------------------

    def VDI_create(self, args: dict[str, Any]) -> Ref:
        self.get("SR", args["SR"])
        self._room(args["SR"], 0)
        ref = self.add("VDI", **args, managed=True)
        record = self.get("VDI", ref)
        record["location"] = record["uuid"]
        self.contents.create(record["uuid"], args["virtual_size"])
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

    def VDI_destroy(self, ref: str) -> None:
        self._destroyed(ref)

    def _destroyed(self, ref: str, *, for_revert: bool = False) -> None:
        with self.busy(ref):
            record = self.get("VDI", ref)
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
        source = self.get("VDI", ref)
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
        self._versions[target] = self._versions.get(source["uuid"], "")
        if source["uuid"] in self._images:
            self._images[target] = self._images[source["uuid"]]
        return made

    def _at(self, vm: str) -> dict[str, str]:
        """By place, what its disks hold."""
        return {
            vbd["userdevice"]: self._versions.get(self.get("VDI", vbd["VDI"])["uuid"], "")
            for vbd in self.objects["VBD"].values()
            if vbd["VM"] == vm and vbd["mode"] == "RW" and vbd["VDI"] != NULL
        }

    def _guest_writes(self, vm: str) -> None:
        for vbd in self.objects["VBD"].values():
            if vbd["VM"] == vm and vbd["mode"] == "RW" and vbd["VDI"] != NULL:
                self._versions[self.get("VDI", vbd["VDI"])["uuid"]] = str(uuid.uuid4())

    def VDI_resize(self, ref: str, size: int) -> None:
        record = self.get("VDI", ref)
        self._attached(ref, "resize")
        if size < record["virtual_size"]:
            raise Failure("INVALID_VALUE", "size", str(size))
        self.contents.resize(record["uuid"], size)
        self.change("VDI", ref, virtual_size=size)

    def VDI_update(self, ref: str) -> None:
        self.get("VDI", ref)

    def VDI_set_name_label(self, ref: str, value: str) -> None:
        self.change("VDI", ref, name_label=value)

    def write(self, ref: str, data: Any, length: int) -> None:
        """PUT /import_raw_vdi."""
        record = self.get("VDI", ref)
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

    # -- VMs ----------------------------------------------------------------------------------------

    def _state(self, ref: str, *expected: str) -> dict[str, Any]:
        record = self.get("VM", ref)
        if record["power_state"] not in expected:
            wanted = expected[0].lower()
            raise Failure("VM_BAD_POWER_STATE", ref, wanted, record["power_state"].lower())
        return record

    def VM_create(self, args: dict[str, Any]) -> Ref:
        self._ordered(args)
        ref = self.add("VM", **args)
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
        kept |= {"name_label": name, "is_a_snapshot": False, "power_state": "Halted"}
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

    def _devices(self, source: str, target: str, vdis: dict[str, Ref], *, macs: bool) -> None:
        for vbd in [v for v in self.objects["VBD"].values() if v["VM"] == source]:
            if vbd["VDI"] in vdis or vbd["VDI"] == NULL or vbd["type"] == "CD":
                new = {"uuid": str(uuid.uuid4()), "VM": Ref(target), "currently_attached": False,
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

    def _snapshot(self, ref: str, name: str, ignore: list[str]) -> Ref:
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
        }))  # fmt: skip
        self._moments[made] = {f: copy.deepcopy(source[f]) for f in _RESTORED}
        self._devices(ref, made, vdis, macs=True)
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
            made = self._snapshot(ref, name, [])
            if record["suspend_VDI"] != NULL:
                image = self._grown(record["suspend_VDI"])
                self.change("VM", made, power_state="Suspended", suspend_VDI=image)
            self._half_done()
            if runs:
                self._resumed(ref, paused=False)
            return made

    def _suspended(self, ref: str, sr: str) -> None:
        """Its memory as it is now is an image; the guest wrote until now."""
        size = self.get("VM", ref)["memory_static_max"]
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
            self._state(ref, "Halted")
            self._runs(ref, paused)

    def _runs(self, ref: str, paused: bool) -> None:
        record = self.get("VM", ref)
        taken = sum(
            self.get("VM_metrics", vm["metrics"])["memory_actual"]
            for vm in self.objects["VM"].values() if vm["power_state"] == "Running"
        )  # fmt: skip
        if taken + record["memory_dynamic_min"] > self.knobs.host_memory:
            raise Failure("NO_HOSTS_AVAILABLE")
        mine = [(r, v) for r, v in self.objects["VBD"].items() if v["VM"] == ref]
        for _, vbd in mine:
            if vbd["mode"] == "RW" and vbd["VDI"] != NULL:
                self._attached(vbd["VDI"], "attach")
        for device, _ in mine:
            self.change("VBD", device, currently_attached=True)
        self._half_done()
        for device in [r for r, v in self.objects["VIF"].items() if v["VM"] == ref]:
            self.change("VIF", device, currently_attached=True)
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
        self.change("VM_metrics", record["metrics"], memory_actual=0)
        self.change("VM", ref, power_state=power, guest_metrics=Ref(NULL))

    def VM_hard_shutdown(self, ref: str) -> None:
        with self.busy(ref):
            self._state(ref, "Running", "Paused", "Suspended")
            self._powerless(ref)

    def _powerless(self, ref: str) -> None:
        image = self.get("VM", ref)["suspend_VDI"]
        if image != NULL:
            self.change("VM", ref, suspend_VDI=Ref(NULL))
            if image in self.objects["VDI"]:
                self.VDI_destroy(image)
        self._off(ref)

    def VM_clean_shutdown(self, ref: str) -> None:
        with self.busy(ref):
            self._state(ref, "Running")
            if not self.knobs.agent:
                raise Failure("VM_LACKS_FEATURE", ref)
            self._off(ref)

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


def new_mac() -> str:
    digits = uuid.uuid4().hex
    return ":".join(["02", *(digits[at : at + 2] for at in range(0, 10, 2))])


def now() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H:%M:%SZ")
