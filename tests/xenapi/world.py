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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from database import Died, Knobs, now
from machines import Machines
from model import CALLS, CLASSES, NULL, Failure, Ref, on_the_wire

NETWORK = "Pool-wide network associated with eth0"
"""As a server calls its own."""


class World(Machines):
    def __init__(self, directory: Path, knobs: Knobs) -> None:
        super().__init__(directory, knobs)
        host = self.add("host", name_label="xen", enabled=True, hostname="xen")
        sr = self.add(
            "SR", name_label="Local storage", type="ext", content_type="user",
            physical_size=knobs.sr_size, shared=False,
        )  # fmt: skip
        self.add("SR", name_label="Other storage", type="ext", content_type="user",
                 physical_size=knobs.sr_size)  # fmt: skip
        self.add("network", name_label=NETWORK, bridge="xenbr0", MTU=1500)
        self.add("network", name_label="other", bridge="xenbr1", MTU=1500)
        self.add("pool", name_label="", master=host, default_SR=sr)
        dom0 = self.add("VM", name_label="Control domain on host: xen", is_control_domain=True,
                        power_state="Running", memory_static_max=2**31)  # fmt: skip
        self.objects["VM"][dom0]["metrics"] = self.add("VM_metrics")
        default = self.add("VM", name_label="Other install media", is_a_template=True,
                           is_default_template=True)  # fmt: skip
        self.objects["VM"][default]["metrics"] = self.add("VM_metrics")
        self._set_suspend_sr()
        self.sync()

    def _set_suspend_sr(self) -> None:
        (pool,) = self.objects["pool"].values()
        pool["suspend_image_SR"] = pool["default_SR"] if self.knobs.suspend_sr else Ref(NULL)
        pool["restrictions"] = {"restrict_dmc": "false" if self.knobs.dmc else "true"}

    def turn(self, **knobs: Any) -> None:
        for name, value in knobs.items():
            assert hasattr(self.knobs, name), name
            setattr(self.knobs, name, value)
        self._follow_knobs()

    def _follow_knobs(self) -> None:
        with self.changed:
            self._set_suspend_sr()
            for sr in self.objects["SR"].values():
                sr["physical_size"] = self.knobs.sr_size

    def pool_sync_database(self) -> None:
        self.sync()

    def call_and_die(self, call: Callable[[], Any], parts: int = 1, *, lost: bool = False) -> None:
        """So many parts of the call are done, where it has parts, else all; then nothing runs any more,
        nobody is logged in, and no task goes on. What is in the database and in the storage is what
        stays; ``lost``: of the database only what was written to the server's disk."""
        self._dying.now, self._dying.parts = True, parts
        with contextlib.suppress(Died, Failure):
            call()
        self._dying.now = False
        with self.changed:
            if lost:
                self.lose_unwritten()
                self._follow_knobs()
            for ref, vm in list(self.objects["VM"].items()):
                if not (vm["is_control_domain"] or vm["is_a_template"]):
                    self._off(ref, vm["power_state"] if vm["power_state"] == "Suspended" else "Halted")
            for class_ in ("session", "task"):
                for ref in list(self.objects[class_]):
                    self.drop(class_, ref)
            self.sync()

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
            now = self._generation  # to look at something may change it: statistics that lag
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

    def _changing(self, task: str) -> None:
        """A task changes often: who may cancel it, what it does, how far it is."""
        for part in range(6):
            with self.changed, contextlib.suppress(Failure):
                if self.get("task", task)["status"] == "pending":
                    self.change("task", task, progress=part / 10)
            time.sleep(self.knobs.task_time / 6)

    def run_task(self, name: str, call: Callable[[], Any]) -> Ref:
        """Async.NAME: at once a task; what it comes to is in its record."""
        kind = CALLS[name]["result"]
        ref = self.add("task", name_label=f"Async.{name}", status="pending", created=now())

        def run() -> None:
            self._changing(ref)
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
