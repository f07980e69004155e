"""LVM2's commands, typed: one report of everything, changes, and their failures in our own words.

Status 5 of an LVM command means "not found" and "failed" alike (lvm(8)), so callers look at a report
first, and what fails after that is told apart by standard error. One report is one process, whatever it
holds; it costs about a third of an ``lvcreate``. LVM's own shell, fed several commands through a pipe,
would save processes, but answers with the last one's status only: which of them failed couldn't be told.

Marks are tags. A tag takes letters, digits and ``_+.-/=!:&#`` and at most 1024 characters (lvm(8)), so
a fact is ``fh.KEY=VALUE`` with every other byte of the value as ``#xx``, continued in ``fh.KEY+1=...``
where it is long. Tags given to ``lvcreate`` are in the very commit that makes the volume.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from host.run import Runner, which
from hypervisors.answers import answer_of
from hypervisors.disks.devices import await_node, holders, passing
from hypervisors.marks import DamagedMark, read_fields
from inventory.errors import (
    Busy,
    Call,
    CommandFailed,
    Conflict,
    DriverFailed,
    FarmhandError,
    NoSpace,
    NotFound,
    UsageError,
)

MARK = "farmhand"
_PREFIX = "fh."
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_+.-/=!:&")
_OF_VM = ("farm", "vm", "machine", "template", "size", "cloned")
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "disk": (*_OF_VM, "base", "seq"),
    "checkpoint": (*_OF_VM, "name"),
    "template": ("farm", "name", "gen", "size", "sha256", "created", "origin", "firstboot"),
}
"""Of the marks of that kind."""
_CHUNK = 900  # of an encoded value; with its key under the 1024 of a tag
_FIELDS = (
    "lv_name,lv_size,origin,origin_size,pool_lv,lv_role,data_percent,metadata_percent,lv_metadata_size,"
    "thin_id,lv_active,lv_device_open,lv_permissions,lv_snapshot_invalid,lv_health_status,lv_tags,"
    "vg_size,vg_free,vg_extent_size"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalVolume:
    """A logical volume. ``size`` is what its device shows; ``space`` what it takes of its group by
    itself (a classic snapshot: its copy-on-write area; a thin volume: nothing)."""

    name: str
    size: int
    space: int
    origin: str
    pool: str
    snapshot: bool  # a classic one, which dies with its origin
    data: float  # percent: of a pool or thin volume mapped, of a classic snapshot filled
    metadata: float  # percent, of a pool
    metadata_size: int
    thin_id: int | None
    active: bool
    open: bool  # as the kernel says; may be udev having a look
    writable: bool
    invalid: bool  # a classic snapshot that overflowed
    health: str
    ours: bool
    facts: Mapping[str, str]
    damaged: str = ""  # what is wrong with a mark; then it isn't ours


@dataclass(frozen=True, slots=True)
class VolumeGroup:
    """A volume group with all its visible volumes, ours and foreign."""

    name: str
    size: int
    free: int
    extent: int
    volumes: tuple[LogicalVolume, ...]

    def get(self, name: str) -> LogicalVolume | None:
        return next((v for v in self.volumes if v.name == name), None)

    def rounded(self, size: int) -> int:
        """A size rounded up to whole extents, in bytes."""
        return -(-size // self.extent) * self.extent


class Lvm:
    """Commands on one volume group."""

    def __init__(self, vg: str, runner: Runner) -> None:
        if not re.fullmatch(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]{0,126}", vg):
            raise UsageError(f"{vg!r} is not the name of a volume group")
        self.vg = vg
        self._runner = runner
        self._lvm = which("lvm") or "lvm"

    def report(self) -> VolumeGroup:
        """What the group holds now. NotFound if there is no such group, DriverFailed if LVM doesn't work
        or isn't permitted."""
        rows = self._rows("lvs", _FIELDS, "lv")
        with answer_of("lvs"):
            volumes = tuple(_volume(row) for row in rows)
        if not rows:  # an empty group has no row to carry its own columns
            rows = self._rows("vgs", "vg_size,vg_free,vg_extent_size", "vg")
        with answer_of("lvs"):
            size, free, extent = (int(rows[0][f"vg_{of}"]) for of in ("size", "free", "extent_size"))
        return VolumeGroup(self.vg, size, free, extent, volumes)

    def change(self, command: str, *arguments: str, timeout: float = 600) -> None:
        """Run one LVM command, for ``timeout`` seconds at most. A failure is raised as ``explain`` has
        it."""
        try:
            self._runner.change(self._lvm, command, "-q", *arguments, timeout=timeout)
        except CommandFailed as error:
            raise self.explain(error) from error

    def remove(self, names: Sequence[str]) -> None:
        """Remove the volumes in that order, in one process. LVM removes a classic origin's snapshots
        with it: check before."""
        if names:
            self.change("lvremove", "-f", *(f"{self.vg}/{name}" for name in names))

    def autoextend(self) -> Mapping[str, int]:
        """lvm.conf's thresholds and steps in percent: ``thin_pool_autoextend_threshold`` (100: off),
        ``thin_pool_autoextend_percent``, and the same of ``snapshot_``; ``monitoring`` 1 or 0."""
        keys = [f"{what}_autoextend_{of}" for what in ("thin_pool", "snapshot") for of in _AUTOEXTEND]
        argv = [self._lvm, "lvmconfig", "--type", "full"]
        argv += [f"activation/{key}" for key in (*keys, "monitoring")]
        lines = self._runner.read(*argv).stdout.splitlines()
        with answer_of("lvmconfig"):
            pairs = (line.split("=", 1) for line in lines)
            return {key.strip(): int(value) for key, value in pairs}

    def node(self, name: str) -> Path:
        return Path("/dev") / self.vg / name

    def ready(self, name: str) -> Path:
        """The volume's device. It waits until udev has made the name; where no udev runs LVM makes
        it."""
        node = self.node(name)
        await_node(node)
        return node

    def explain(self, error: CommandFailed) -> FarmhandError:
        """The error of ours for a failed LVM command, by what LVM wrote."""
        text = error.stderr
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        why = next((line for line in lines if not line.startswith("WARNING")), error.message)
        detail = error.detail
        if re.search(r"Permission denied|not running as.*root|must be run as root", text):
            return DriverFailed(
                f"{self.vg}: LVM is not permitted to this user (uid {os.geteuid()})",
                remedy="run as root", detail=detail,
            )  # fmt: skip
        if "Volume group" in text and "not found" in text and f'"{self.vg}"' in text:
            return NotFound(
                f"there is no volume group {self.vg} on this host",
                remedy="vgs lists them; the host's disks.pool in the farm file names it", detail=detail,
            )  # fmt: skip
        if re.search(
            r"target support|modprobe|not detected in your kernel|Is device-mapper driver", text
        ):
            module = "dm-thin-pool" if "thin" in text else "dm-snapshot" if "snap" in text else "dm-mod"
            return DriverFailed(
                f"{self.vg}: the kernel lacks a device-mapper module: {why}",
                remedy=f"modprobe {module}", detail=detail,
            )  # fmt: skip
        if re.search(
            r"insufficient free space|Insufficient|(?:above|reached) threshold|not enough free|No space",
            text,
        ):
            return NoSpace(
                f"{self.vg}: {why}",
                remedy=(Call("gc"), ", or extend the group or its pool"),
                detail=detail,
            )
        if used := re.search(
            r"ogical volume (?:\S+/)?(\S+) (?:in use|is used by|contains a filesystem)", text
        ):
            return self.busy(used[1])
        if "already exists" in text:
            return Conflict(f"{self.vg}: {why}", detail=detail)
        if "not found" in text or "Failed to find" in text:
            return NotFound(f"{self.vg}: {why}", detail=detail)
        remedy = "" if text else error.remedy  # it never ran
        return DriverFailed(f"{self.vg}: {why}", remedy=remedy, detail=detail or text)

    def busy(self, name: str) -> Busy:
        """The error for a volume that somebody has open; it says who."""
        users = ", ".join(users_of(self.node(name))) or "somebody who can't be seen from here"
        return Busy(
            f"volume {self.vg}/{name} is in use by {users}",
            remedy="stop the VM, or end or unmount what has it, and call again",
        )

    def _rows(self, command: str, fields: str, kind: str) -> list[dict[str, str]]:
        argv = (command, "-o", fields, "--units", "b", "--nosuffix", "--reportformat", "json", self.vg)
        try:
            text = self._runner.read(self._lvm, *argv, timeout=300).stdout  # others' locks
        except CommandFailed as error:
            raise self.explain(error) from error
        with answer_of(command):
            rows = json.loads(text)["report"][0][kind]
            return [{str(name): str(value) for name, value in row.items()} for row in rows]


_AUTOEXTEND = ("threshold", "percent")


def _volume(row: Mapping[str, str]) -> LogicalVolume:
    tags = row["lv_tags"].split(",")
    snapshot = "thicksnapshot" in row["lv_role"].split(",")
    size = int(row["lv_size"])
    facts, damaged = _marks(tags)
    return LogicalVolume(
        name=row["lv_name"],
        size=int(row["origin_size"]) if snapshot else size,
        space=0 if row["pool_lv"] else size,
        origin=row["origin"],
        pool=row["pool_lv"],
        snapshot=snapshot,
        data=float(row["data_percent"] or 0),
        metadata=float(row["metadata_percent"] or 0),
        metadata_size=int(row["lv_metadata_size"] or 0),
        thin_id=int(row["thin_id"]) if row["thin_id"] else None,
        active=row["lv_active"] == "active",
        open=row["lv_device_open"] == "open",
        writable=row["lv_permissions"] != "read-only",
        invalid="invalid" in row["lv_snapshot_invalid"],
        health=row["lv_health_status"],
        ours=MARK in tags and not damaged,
        facts=facts,
        damaged=damaged,
    )


def _marks(tags: Sequence[str]) -> tuple[Mapping[str, str], str]:
    """The facts, and what is wrong with them."""
    if MARK not in tags:
        return {}, ""
    facts = decode(tags)
    try:
        return read_fields(facts, _NEEDED.get(facts.get("kind", ""), ())), ""
    except DamagedMark as error:
        return {}, str(error)


def encode(facts: Mapping[str, str]) -> tuple[str, ...]:
    """The tags that hold these facts, without the mark itself."""
    tags = []
    for key, value in facts.items():
        text = "".join(
            c if c in _PLAIN else "".join(f"#{b:02x}" for b in c.encode(errors="replace")) for c in value
        )
        parts = [text[at : at + _CHUNK] for at in range(0, max(len(text), 1), _CHUNK)]
        tags += [f"{_PREFIX}{key}{f'+{n}' if n else ''}={part}" for n, part in enumerate(parts)]
    return tuple(tags)


def decode(tags: Sequence[str]) -> dict[str, str]:
    """What ``encode`` put in; tags of another kind are left out."""
    parts: dict[str, dict[int, str]] = {}
    for tag in tags:
        if tag.startswith(_PREFIX) and "=" in tag:
            key, _, text = tag.removeprefix(_PREFIX).partition("=")
            key, _, number = key.partition("+")
            if number.isdecimal() or not number:
                parts.setdefault(key, {})[int(number or 0)] = text
    return {key: _plain("".join(t for _, t in sorted(found.items()))) for key, found in parts.items()}


def _plain(text: str) -> str:
    return re.sub(
        rb"#([0-9a-f]{2})", lambda m: bytes.fromhex(m[1].decode()), text.encode()
    ).decode(errors="replace")  # fmt: skip


def marked(facts: Mapping[str, str]) -> list[str]:
    """``--addtag`` arguments: the mark and the facts."""
    return [word for tag in (MARK, *encode(facts)) for word in ("--addtag", tag)]


def retagged(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Arguments of one ``lvchange`` (one commit) that turn the facts ``old`` into ``new``."""
    before, after = encode(old), encode(new)
    gone = [word for tag in before if tag not in after for word in ("--deltag", tag)]
    return gone + [word for tag in after if tag not in before for word in ("--addtag", tag)]


def users_of(node: Path) -> list[str]:
    """Who has a block device open: processes, mounts, devices on top of it. Not udev, which looks at a
    new or changed device and is done in a moment."""
    try:
        number = node.stat().st_rdev
    except OSError:
        return []
    found = [f"{name} (pid {pid})" for pid, name in holders(node) if not passing(((pid, name),))]
    pair = f"{os.major(number)}:{os.minor(number)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if words[2] == pair:
            found.append(f"the mount on {words[4]}")
    for holder in Path(f"/sys/dev/block/{pair}/holders").glob("*"):
        name_file = holder / "dm" / "name"
        name = name_file.read_text().strip() if name_file.exists() else holder.name
        found.append(f"device {name}")
    return found
