"""A XenAPI server's database: objects of the data model's classes, who refers to whom, what changed
when; calls on one object one after the other; and a death in the midst of a call."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from contents import Contents
from model import CLASSES, Failure, Ref, empty

_BACK = {  # which field of whom names which field's owners
    ("VM", "VBDs"): ("VBD", "VM"),
    ("VM", "VIFs"): ("VIF", "VM"),
    ("VM", "snapshots"): ("VM", "snapshot_of"),
    ("VDI", "VBDs"): ("VBD", "VDI"),
    ("VDI", "snapshots"): ("VDI", "snapshot_of"),
    ("SR", "VDIs"): ("VDI", "SR"),
    ("network", "VIFs"): ("VIF", "network"),
}
_WRITTEN = ("objects", "_moments")
"""What the database is; the rest is the storage's, or this process' own."""
_STATE = (
    *_WRITTEN, "_generation", "_stamps", "_gone", "_versions", "_images", "_before", "_stale", "harm",
    "_told_used", "_file",
)  # fmt: skip


class Died(Exception):
    """The server's host lost its power in the midst of a call."""


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
    dmc: bool = True  # the licence has Dynamic Memory Control
    unfit: str = ""  # the error that assert_can_boot_here has, whatever the memory
    late_halt: bool = False  # a shutdown answers with an error, and has worked a moment later
    in_turn: float = 0.2  # a storage change that met another in its SR tries again within this time
    task_time: float = 0.02  # seconds that a task takes at least; it changes all the while
    lag: int = 2  # looks at a machine's memory after a start that tell what it was in the run before
    session_life: int = 0  # calls after which a session has expired; 0: never
    slave_of: str = ""  # told to whoever logs in, but for at the address ``master_at``
    master_at: str = ""


class Database:
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
        self._told_used: dict[str, int] = {}  # by VDI, its use at SM's last look
        self.collisions = 0  # storage changes that met another in their SR
        self._before: dict[str, int] = {}  # by VM_metrics: the memory when it was last switched off
        self._stale: dict[str, tuple[int, int]] = {}  # by VM_metrics: a number, so many looks more
        self.harm: list[str] = []  # images that were resumed on disks which they weren't of
        self._file = b""  # the database on the server's own disk

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

    def sync(self) -> None:
        with self.changed:
            self._file = pickle.dumps({name: getattr(self, name) for name in _WRITTEN})

    def lose_unwritten(self) -> None:
        """As it is read at the server's next start."""
        with self.changed:
            for name, value in pickle.loads(self._file).items():
                setattr(self, name, value)
            self._generation += 1
            stamp = (self._generation, self._generation)
            self._stamps = {(c, ref): stamp for c, found in self.objects.items() for ref in found}
            self._gone, self._stale = [], {}

    def settle(self) -> None:
        """Until all tasks are over, also those that nobody waits for."""
        for task in self._tasks:
            task.join()

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
            told["physical_utilisation"] = self._told_used.get(told["uuid"], 0)
        if class_ == "VM_metrics" and ref in self._stale:
            told["memory_actual"], left = self._stale[ref]
            self._stale[ref] = (told["memory_actual"], left - 1)
            if left <= 1:
                del self._stale[ref]
            self._touch("VM_metrics", ref)  # they are looked at again by themselves
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

    def _half_done(self) -> None:
        if getattr(self._dying, "now", False):
            self._dying.parts -= 1
            if self._dying.parts == 0:
                raise Died


def now() -> str:
    return datetime.now(UTC).strftime("%Y%m%dT%H:%M:%SZ")
