"""What we see of a XenAPI server's objects, and our marks on them.

Marks are keys of ``other_config`` that begin with ``farmhand:``. A clone, a copy and a snapshot take
their source's ``other_config`` along, whoever makes them; so each mark names the object that it was
written for (``farmhand:uuid``), and on any other one it counts for nothing but where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypervisors.answers import answer_of
from hypervisors.api import Capacity, Checkpoint, Owner, Power, Template
from hypervisors.marks import DamagedMark, moment, read_fields
from hypervisors.ownership import FarmIdentity
from inventory.errors import DriverFailed

PREFIX = "farmhand:"
NULL = "OpaqueRef:NULL"
NEW = "farmhand new "
"""How the names begin of what is being made. To give it its final name is the one call that makes it
count; until then it is not there."""
DISK = "0"
"""The user device of a machine's disk; its seed's is ``SEED``."""
SEED = "3"

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "machine": ("farm", "vm"),
    "checkpoint": ("farm", "vm", "checkpoint", "created"),
    "template": ("farm", "label", "size", "sha256", "created", "origin", "firstboot"),
    **dict.fromkeys(("making", "gone", "seed"), ("farm",)),
}
"""Of the marks of that kind."""
_WITH_DISK = ("template", "created")
_OF_VMS = {
    **dict.fromkeys(("uuid", "name_label", "power_state"), str),
    **dict.fromkeys(("is_a_template", "is_a_snapshot", "is_control_domain"), bool),
    **dict.fromkeys(("VBDs", "snapshots"), list),
    "other_config": dict,
}
_OF_VDIS = {"uuid": str}

_POWER = {
    "Running": Power.RUNNING,
    "Halted": Power.STOPPED,
    "Paused": Power.PAUSED,
    "Suspended": Power.SUSPENDED,
}


@dataclass(frozen=True, slots=True)
class XenApiVm:
    """A VM, template or snapshot as the server has it. ``written``: our marks, also those inherited from
    elsewhere; empty where they are damaged. ``damaged``: what is wrong with those that were written for
    it; "" where nothing is."""

    ref: str
    record: Mapping[str, Any]
    written: Mapping[str, str] = field(init=False, repr=False, compare=False)
    damaged: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self.record, _OF_VMS, "VM")
        written, damaged = read_marks(self.record)
        mine = self.record["other_config"].get(f"{PREFIX}uuid") == self.uuid
        object.__setattr__(self, "written", written)
        object.__setattr__(self, "damaged", damaged if mine else "")

    @property
    def uuid(self) -> str:
        return str(self.record["uuid"])

    @property
    def name(self) -> str:
        return str(self.record["name_label"])

    @property
    def power(self) -> Power:
        return _POWER.get(self.record["power_state"], Power.UNKNOWN)

    @property
    def is_machine(self) -> bool:
        """No XenAPI template, no snapshot (which says that it is a template, too), no control domain.
        Our own templates are such VMs, too, and known by their ``kind``."""
        return not (
            self.record["is_a_template"]
            or self.record["is_a_snapshot"]
            or self.record["is_control_domain"]
        )

    @property
    def marks(self) -> Mapping[str, str]:
        """Our marks that were written for this very object; empty: it isn't ours."""
        written = self.written
        return written if written.get("uuid") == self.uuid else {}

    @property
    def kind(self) -> str:
        """ "machine", "template", "checkpoint", "gone", or "making"; "" for what isn't ours."""
        kind = self.marks.get("kind", "")
        return "making" if kind and kind != "gone" and self.name.startswith(NEW) else kind

    @property
    def owner(self) -> Owner | None:
        marks = self.marks
        return Owner(FarmIdentity.of(marks["farm"]), marks.get("vm", "")) if "farm" in marks else None

    def belongs(self, farm: FarmIdentity) -> bool:
        return self.owner is not None and self.owner.farm == farm

    @property
    def meant_for(self) -> FarmIdentity:
        """By our marks, also inherited ones: what is being made has its source's."""
        return FarmIdentity.of(self.written.get("farm", ""))

    @property
    def disk(self) -> tuple[str, str] | None:
        """The uuid and the reference of the VDI that is the machine's disk, whatever is attached."""
        uuid, _, ref = self.marks.get("disk", "").partition(" ")
        return (uuid, ref) if ref else None

    def other_config(self, marks: Mapping[str, str]) -> dict[str, str]:
        """The other_config to write for the VM: everybody else's keys as they are, and these marks for
        this very object; a mark with an empty value is left out."""
        config = self.record["other_config"]
        kept = {key: value for key, value in config.items() if not key.startswith(PREFIX)}
        ours = {**marks, "uuid": self.uuid}
        return kept | {PREFIX + key: value for key, value in ours.items() if value}


@dataclass(frozen=True, slots=True)
class Vdi:
    ref: str
    record: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check(self.record, _OF_VDIS, "VDI")

    @property
    def uuid(self) -> str:
        return str(self.record["uuid"])

    @property
    def written(self) -> Mapping[str, str]:
        """Our marks; empty where they are damaged."""
        return read_marks(self.record)[0]

    @property
    def size(self) -> int:
        return int(self.record["virtual_size"])

    @property
    def used(self) -> int:
        return int(self.record["physical_utilisation"])

    @property
    def path(self) -> Path:
        return vdi_path(self.uuid)


def read_marks(record: Mapping[str, Any]) -> tuple[Mapping[str, str], str]:
    """The marks in an object's ``other_config``, and what is wrong with them."""
    config = record["other_config"]
    marks = {k.removeprefix(PREFIX): v for k, v in config.items() if k.startswith(PREFIX)}
    needed = _NEEDED.get(str(marks.get("kind")), ())
    try:
        return read_fields(marks, (*needed, *(_WITH_DISK if "disk" in marks else ()))), ""
    except DamagedMark as error:
        return {}, str(error)


def _check(record: Mapping[str, Any], fields: Mapping[str, type], what: str) -> None:
    """DriverFailed for a record of another shape than every XenAPI server's."""
    for key, kind in fields.items():
        if not isinstance(record.get(key), kind):
            raise DriverFailed(
                f"the XenAPI server gave a record of a {what} that can't be read: "
                f"its {key} is {type(record.get(key)).__name__}, not {kind.__name__}",
                remedy="see its version, and what `xe vm-param-list` or `xe vdi-param-list` shows there",
            )


def vdi_path(uuid: str) -> Path:
    """A name, not a file of this host: the disk is in the server's storage."""
    return Path("/xenapi/vdi", uuid)


def checkpoint_of(vm: XenApiVm) -> Checkpoint:
    marks = vm.marks
    return Checkpoint(
        name=marks["checkpoint"], created=when(marks["created"]), warm=marks.get("warm") == "yes"
    )


def template_of(vm: XenApiVm) -> Template:
    """Of one of that kind."""
    marks = vm.marks
    name, _, generation = marks["label"].rpartition("@")
    return Template(
        name=name, generation=int(generation), ref=f"{vm.uuid} {vm.ref}", size=int(marks["size"]),
        sha256=marks["sha256"], created=when(marks["created"]), origin=marks["origin"],
        firstboot=marks["firstboot"], farm=FarmIdentity.of(marks["farm"]),
    )  # fmt: skip


def when(text: str) -> datetime:
    return moment(text)


def started(metrics: Mapping[str, Any]) -> datetime:
    """VM_metrics.start_time: XML-RPC's dateTime, in UTC; 1970 for what doesn't run."""
    with answer_of("xapi", "the XenAPI server"):
        text = str(metrics["start_time"]).rstrip("Z").replace("-", "")
        return datetime.strptime(text, "%Y%m%dT%H:%M:%S").replace(tzinfo=UTC)


def capacity_of(sr: Mapping[str, Any]) -> Capacity:
    """The capacity that a storage repository's record tells."""
    with answer_of("xapi", "the XenAPI server"):
        total = int(sr["physical_size"])
        return Capacity(total, max(0, total - int(sr["physical_utilisation"])))
