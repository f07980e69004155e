"""What a report of LVM's means to us: our volumes by their marks, and which disk is the present one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType

from host.file_lock import FileLock
from hypervisors.api import CLEAN, Template
from hypervisors.disks.lvm.command import LogicalVolume, VolumeGroup
from hypervisors.ownership import FarmIdentity


class LvmState:
    """What a volume group holds at one moment: one report, read by our marks."""

    def __init__(self, group: VolumeGroup, links: Path, when: float = 0.0) -> None:
        """``when`` the report was made, by time.monotonic(); 0: now."""
        self.when = when or time.monotonic()
        self.group = group
        self.links = links
        self.ours = tuple(v for v in group.volumes if v.ours)
        self.templates = {label_of(v): v for v in self.kind("template")}

    def kind(self, kind: str, machine: str | None = None) -> list[LogicalVolume]:
        """Our volumes of that kind, of one machine or of all, oldest first."""
        found = [v for v in self.ours if v.facts.get("kind") == kind]
        if machine is not None:
            found = [v for v in found if v.facts.get("machine") == machine]
        return sorted(found, key=lambda v: (int(v.facts.get("seq", 0)), v.facts.get("created", "")))

    def machines(self) -> list[str]:
        return sorted({v.facts["machine"] for v in self.kind("disk") if "machine" in v.facts})

    def of(self, machine: str) -> list[LogicalVolume]:
        """All volumes of the machine, in the order to remove them: what depends comes before what it
        depends on."""
        return [
            v for k in ("disk", "source", "part", "checkpoint") for v in reversed(self.kind(k, machine))
        ]

    def present(self, machine: str) -> LogicalVolume | None:
        """The volume that is the machine's disk: the complete one that its link names, else the newest
        complete one. None if it has no disk."""
        whole = [v for v in self.kind("disk", machine) if v.size >= int(v.facts.get("size", 0))]
        with contextlib.suppress(OSError):
            name = (self.links / machine).readlink().name
            for volume in whole:
                if volume.name == name:
                    return volume
        return whole[-1] if whole else None

    def checkpoints(self, machine: str) -> list[LogicalVolume]:
        """The machine's complete checkpoints, oldest first; ``clean`` among them where it has a base of
        its own. Where one was copied to a larger volume, that."""
        largest: dict[str, LogicalVolume] = {}
        for volume in self.complete(machine):
            name = volume.facts.get("name", "")
            if name not in largest or largest[name].size < volume.size:
                largest[name] = volume
        return list(largest.values())

    def complete(self, machine: str) -> list[LogicalVolume]:
        """All volumes of the machine's complete checkpoints, the smaller ones too."""
        half = self.half_made(machine)
        return [v for v in self.kind("checkpoint", machine) if v not in half]

    def outgrown(self, machine: str) -> list[LogicalVolume]:
        """Volumes of checkpoints that have a larger one by now. A disk may yet be a snapshot of one."""
        whole = self.checkpoints(machine)
        return [v for v in self.complete(machine) if v not in whole]

    def half_made(self, machine: str) -> list[LogicalVolume]:
        """Checkpoints that were cut off before the disk was made to grow from them: the disk is still
        the one that they were taken of, on the base that it had then."""
        disk = self.present(machine)
        return [
            v for v in self.kind("checkpoint", machine)
            if disk and v.facts.get("of") == disk.name and v.facts.get("prev") == disk.facts.get("base")
        ]  # fmt: skip

    def kept_live(self, disk: LogicalVolume) -> LogicalVolume | None:
        """The checkpoint that was taken of the disk last, if that was while its machine ran, and the
        disk isn't said to grow from it yet."""
        of = [v for v in self.checkpoints(disk.facts["machine"]) if v.facts.get("of") == disk.name]
        last = of[-1] if of else None
        done = last is None or "prev" in last.facts or last.facts["name"] == disk.facts["base"]
        return None if done else last

    def undone(self, machine: str) -> list[LogicalVolume]:
        """What a checkpoint that was cut off has left, in the order to remove it: disks that grew from
        half-made checkpoints but never became present, those checkpoints, what they were read from."""
        half = self.half_made(machine)
        names = {v.name for v in half}
        grown = [v for v in self.kind("disk", machine) if v.snapshot and v.origin in names]
        return [*grown, *half, *self.kind("source", machine)]

    def base(self, disk: LogicalVolume, name: str) -> LogicalVolume | None:
        """The sealed volume behind a checkpoint's name; None if there is no such checkpoint."""
        for volume in self.checkpoints(disk.facts["machine"]):
            if volume.facts.get("name") == name:
                return volume
        return self.templates.get(disk.facts.get("template", "")) if name == CLEAN else None


class HeldLock:
    """The store's lock while it is held, and the locks of parts that go with it. None: no lock.
    ``seen``: an earlier look, if it still holds good."""

    def __init__(self, lock: FileLock | None) -> None:
        self.seen: LvmState | None = None
        self._lock = lock
        self._own = contextlib.ExitStack()
        self._kept = contextlib.ExitStack()

    def __enter__(self) -> HeldLock:
        if self._lock:
            self._own.enter_context(self._lock.hold())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._kept.close()
        self._own.close()

    def keep(self, other: contextlib.AbstractContextManager[None]) -> None:
        """Hold another lock as well, until the store's lock is given back for good."""
        self._kept.enter_context(other)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Give the store's lock back within the ``with``, so that others may work during long copies."""
        self._own.close()
        try:
            yield
        finally:
            self.__enter__()


def id_of(facts: Mapping[str, str]) -> str:
    """What tells a checkpoint with these facts from another one of its name."""
    return " ".join(facts[key] for key in ("created", "merged") if key in facts)


def kept(facts: Mapping[str, str]) -> dict[str, str]:
    """Those of a volume's facts that all disks and checkpoints of a machine share."""
    return {key: facts[key] for key in ("farm", "vm", "machine", "template", "size", "cloned")}


def farm_of(volume: LogicalVolume) -> FarmIdentity:
    """By its mark."""
    return FarmIdentity.of(volume.facts.get("farm", ""))


def label_of(volume: LogicalVolume) -> str:
    return f"{volume.facts.get('name', '')}@{volume.facts.get('gen', '')}"


def template_facts(template: Template) -> dict[str, str]:
    return {
        "name": template.name,
        "gen": str(template.generation),
        "size": str(template.size),
        "sha256": template.sha256,
        "created": template.created.isoformat(),
        "origin": template.origin,
        "firstboot": template.firstboot,
    }


def read_template(volume: LogicalVolume, vg: str) -> Template:
    facts = volume.facts
    return Template(
        name=facts["name"],
        generation=int(facts["gen"]),
        ref=f"{vg}/{volume.name}",
        size=int(facts["size"]),
        sha256=facts["sha256"],
        created=datetime.fromisoformat(facts["created"]),
        origin=facts["origin"],
        firstboot=facts["firstboot"],
        farm=farm_of(volume),
    )
