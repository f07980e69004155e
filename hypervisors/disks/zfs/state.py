"""What store.lua reports of a store, as values; and the marks by which it is ours.

A mark is a user property (zfsprops(7)) in the namespace ``farmhand:``, set on that very object.

    templates, vms          store=1 (volumes), or files
    a template's volume     state=new, maker (who is writing it)
    ... its @sealed         kind=template, farm, name, generation, size, sha256, created, origin,
                            firstboot
    a VM's volume           machine, farm, vm, template, sha256 (of that), base, size, created (of the
                            VM), maker, token (of the making),
                            grown (its snapshots up to that txg are smaller than it) and
                            state: new (under construction), disk, kept (for its checkpoints), gone
    ... its snapshots       kind: checkpoint, or start (what it was when it became the disk); name
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from host.processes import Process
from hypervisors.answers import answer_of
from hypervisors.api import CLEAN, Checkpoint, Disk, Leftover, Owner, Template
from hypervisors.marks import DamagedMark, moment, read_fields
from hypervisors.ownership import FarmIdentity
from inventory.errors import UsageError

SEALED = "sealed"
EMPTY = 256 * 2**10  # less than this a volume has only its own structure, no data
MARKING = 10  # seconds within which a volume gets its marks, or never
SETTLED = 30  # seconds after which a making that isn't marked yet is a dead one's
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_PLAIN = re.compile(r"[ -~]{0,1024}")
_SAFE = " /:.@=,+-_()"
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "disk": ("machine", "farm", "vm", "template", "base", "size", "created"),
    "template": ("farm", "name", "generation", "size", "sha256", "created", "origin", "firstboot"),
    "checkpoint": ("name",),
}
"""Of the marks with that state or kind."""
_DAMAGED = {"kind": "damaged"}
"""What stands for marks that are: neither a disk's, nor a template's, nor none at all."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``created``, ``guid`` of checkpoints only, ``clones`` of templates only: what isn't needed isn't
    asked."""

    name: str
    marks: Mapping[str, str]
    created: datetime
    txg: int
    clones: tuple[str, ...]
    guid: str  # goes with it wherever it is sent (zfs-send(8))

    @property
    def kind(self) -> str:
        return self.marks.get("kind", "")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A dataset that is a disk, or was: a volume, or one with a file in it. ``newest``: the newest
    snapshot of ours, "" without one. ``written`` since then (since its origin without one); None where
    somebody else's snapshot hides it."""

    name: str
    marks: Mapping[str, str]
    snapshots: tuple[Snapshot, ...]  # by age
    created: datetime  # of a disk: of its VM
    used: int
    written: int | None
    newest: str
    referenced: int = 0  # these two only where there are no marks
    origin: str = ""
    damaged: str = ""  # what is wrong with its marks, or with those of a snapshot of it

    @property
    def stem(self) -> str:
        """MACHINE or NAME, as the volume's own name has it."""
        return self.name.rpartition("/")[2].rpartition(".")[0]

    @property
    def number(self) -> int:
        return int(self.name.rpartition(".")[2])

    @property
    def state(self) -> str:
        """Nothing ("") unless it is marked as a VM's of ours; a copy keeps the marks, not the name."""
        return self.marks.get("state", "") if self.marks.get("machine") == self.stem else ""

    @property
    def owner(self) -> Owner | None:
        if "farm" not in self.marks:
            return None
        return Owner(FarmIdentity.of(self.marks["farm"]), self.marks.get("vm", ""))

    def belongs(self, farm: FarmIdentity) -> bool:
        return self.owner is not None and self.owner.farm == farm

    @property
    def base(self) -> str:
        for snapshot in self.snapshots:
            if snapshot.name == self.newest:
                return snapshot.marks.get("name", "")
        return self.marks.get("base", "")

    def is_smaller(self, snapshot: Snapshot) -> bool:
        """Whether that snapshot of it is of before the disk was made larger."""
        return snapshot.txg <= int(self.marks.get("grown", 0))

    def goes_back_to(self, name: str) -> bool:
        """Whether it becomes that checkpoint by being rolled back: then that is of its newest snapshot,
        and as large."""
        last = self.snapshots[-1] if self.snapshots else None
        newest = last is not None and last.name == self.newest and not self.is_smaller(last)
        return newest and self.base == name

    def checkpoints(self) -> Iterable[Snapshot]:
        return (s for s in self.snapshots if s.kind == "checkpoint")


@dataclass(frozen=True, slots=True)
class ZfsState:
    """What the store holds, or what of it belongs to one machine. ``total``, ``free``: bytes."""

    volumes: tuple[Dataset, ...]
    templates: tuple[Dataset, ...]
    total: int
    free: int

    def of(self, machine: str) -> tuple[Dataset, ...]:
        return tuple(v for v in self.volumes if v.stem == machine and v.state)

    def disk(self, machine: str) -> Dataset | None:
        disks = [v for v in self.of(machine) if v.state == "disk"]
        return max(disks, key=lambda v: v.number, default=None)

    def machines(self) -> tuple[str, ...]:
        return tuple(sorted({v.stem for v in self.volumes if v.state}))

    def next_name(self, vms: str, machine: str) -> str:
        """A name for the machine's next volume. There is no volume of that name or a later one, of ours
        or others."""
        numbers = [v.number for v in self.volumes if v.stem == machine]
        return f"{vms}/{machine}.{max(numbers, default=0) + 1}"


def read_state(answer: Mapping[str, Any]) -> ZfsState:
    with answer_of("zfs program"):
        return _state(answer)


def _state(answer: Mapping[str, Any]) -> ZfsState:
    space = answer.get("space") or {}
    return ZfsState(
        volumes=_volumes(answer.get("volumes") or {}),
        templates=_volumes(answer.get("templates") or {}),
        total=int(space.get("used", 0)) + int(space.get("available", 0)),
        free=int(space.get("available", 0)),
    )


def _volumes(seen: Mapping[str, Any]) -> tuple[Dataset, ...]:
    volumes = (_volume(name, facts) for name, facts in seen.items())
    return tuple(sorted(volumes, key=lambda v: (v.stem, v.number)))


def _volume(name: str, facts: Mapping[str, Any]) -> Dataset:
    marks, damaged = _read(facts["marks"])
    snapshots = []
    for short, s in facts["snapshots"].items():
        read, why = _read(s["marks"])
        clones = tuple(map(str, s.get("clones", ())))
        guid = str(s.get("guid", ""))
        snapshots.append(Snapshot(short, read, when(s.get("created", 0)), int(s["txg"]), clones, guid))
        if why:  # what depends on it can't be told: all of it is left alone
            marks, damaged = _DAMAGED, f"@{short}: {why}"
    written = facts.get("written")
    return Dataset(
        name=str(name),
        marks=marks,
        snapshots=tuple(sorted(snapshots, key=lambda s: s.txg)),
        created=when(facts["created"]) if "created" in facts else _date(marks),
        used=int(facts["used"]),
        written=int(written) if written is not None else None,
        newest=str(facts.get("newest") or ""),
        referenced=int(facts.get("referenced", 0)),
        origin=str(facts.get("origin") or ""),
        damaged=damaged,
    )


def _read(marks: Mapping[str, object]) -> tuple[Mapping[str, str], str]:
    """The marks, and what is wrong with them."""
    try:
        found = dict(marks)
        kind = str(found.get("kind") or found.get("state"))
        return read_fields(found, _NEEDED.get(kind, ())), ""
    except DamagedMark as error:
        return _DAMAGED, str(error)


def _date(marks: Mapping[str, str]) -> datetime:
    return moment(marks["created"]) if "created" in marks else when(0)


def when(seconds: int | str) -> datetime:
    return datetime.fromtimestamp(int(seconds), UTC)


def plain(name: str) -> str:
    """The name, if it is plain, for names get into dataset names. UsageError if it isn't; the loader
    checks them as well."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a plain name: letters, digits, '.', '_' and '-'")
    return name


def options(marks: Mapping[str, str]) -> list[str]:
    """The arguments that set our properties: ``-o farmhand:KEY=VALUE`` each."""
    found = []
    for key, text in marks.items():
        if not _PLAIN.fullmatch(text):
            raise UsageError(f"{text[:60]!r} can't be a property's value")
        found += ["-o", f"farmhand:{key}={text}"]
    return found


def disk_marks(
    machine: str, owner: Owner, template: str, sha256: str, base: str, size: int
) -> dict[str, str]:
    """``template``: its label; ``sha256``: the template's."""
    return {
        "machine": plain(machine),
        "farm": owner.farm.mark,
        "vm": plain(owner.vm),
        "template": template,
        "sha256": sha256,
        "base": base,
        "size": str(size),
        "created": datetime.now(UTC).isoformat(),
        "maker": Process.this().mark,
        "token": secrets.token_hex(8),
    }


def template_marks(template: Template, image: str) -> dict[str, str]:
    """The marks of a farm's template. ``image``: which file it was made of, to know it again after a
    kill."""
    assert template.farm
    return {
        "kind": "template",
        "farm": template.farm.mark,
        "name": template.name,
        "generation": str(template.generation),
        "size": str(template.size),
        "sha256": template.sha256,
        "created": template.created.isoformat(),
        "origin": quote(template.origin, safe=_SAFE)[:1024],
        "firstboot": plain(template.firstboot),
        "image": image,
    }


def read_template(volume: Dataset) -> Template | None:
    """The template that a dataset is; None unless it is sealed and its marks say what it is."""
    seals = [s for s in volume.snapshots if s.name == SEALED and s.kind == "template"]
    if not seals:
        return None
    marks = seals[0].marks
    try:
        template = Template(
            name=marks["name"],
            generation=int(marks["generation"]),
            ref=f"{volume.name}@{SEALED}",
            size=int(marks["size"]),
            sha256=marks["sha256"],
            created=moment(marks["created"]),
            origin=unquote(marks["origin"]),
            firstboot=marks["firstboot"],
            farm=FarmIdentity.of(marks["farm"]),
        )
    except (KeyError, ValueError):
        return None
    named = (template.name, template.generation) == (volume.stem, volume.number)
    return template if named else None  # else a copy somebody made


def read_disk(look: ZfsState, machine: str, path: Callable[[str], Path]) -> Disk | None:
    """The disk that a dataset is. ``path``: makes a volume's path of its name."""
    volume = look.disk(machine)
    if volume is None or volume.owner is None:
        return None
    return Disk(
        machine=machine,
        owner=volume.owner,
        path=path(volume.name),
        format="raw",
        size=int(volume.marks.get("size", 0)),
        used=sum(v.used for v in look.of(machine)),
        template=volume.marks.get("template", ""),
        base=volume.base,
        checkpoints=checkpoints(look, machine, volume),
    )


def clean(marks: Mapping[str, str]) -> Checkpoint:
    """The first checkpoint of a disk with these marks."""
    return Checkpoint(name=CLEAN, created=_date(marks), id=marks.get("sha256", ""))


def checkpoints(look: ZfsState, machine: str, volume: Dataset) -> tuple[Checkpoint, ...]:
    kept = [s for v in look.of(machine) if v.state != "new" for s in v.checkpoints()]
    kept.sort(key=lambda s: (s.txg, s.name))
    return (
        clean(volume.marks),
        *(Checkpoint(name=s.marks.get("name", s.name), created=s.created, id=s.guid) for s in kept),
    )


def find_leftovers(look: ZfsState, farm: FarmIdentity) -> list[Leftover]:
    """What is left over, newest volumes first, for they grew from older ones."""
    found = []
    now = datetime.now(UTC)
    for volume in look.templates:
        if any(s.name == SEALED and s.kind for s in volume.snapshots):
            continue
        if (volume.marks.get("state") == "new" and not made_now(volume)) or _unborn(volume, look, now):
            found.append(_leftover("template", volume, "under construction when it was killed"))
    for volume in sorted(look.volumes, key=lambda v: -v.number):
        if not volume.state:
            if _unborn(volume, look, now):
                found.append(_leftover("volume", volume, "killed before it could be marked"))
            continue
        disk = look.disk(volume.stem)
        if not volume.belongs(farm) or volume is disk:
            continue
        if volume.state == "new":
            if not made_now(volume):
                found.append(_leftover("volume", volume, "under construction when it was killed"))
        elif disk is not None and not any(volume.checkpoints()):
            found.append(_leftover("volume", volume, "another disk has taken its place"))
    for machine in look.machines():
        dead = [v for v in look.of(machine) if v.state != "new" and v.belongs(farm)]
        if dead and look.disk(machine) is None:
            half = any(v.state == "gone" for v in dead)  # else somebody removed the disk alone
            kind, why = ("disk", "half removed") if half else ("checkpoint", "its disk is gone")
            one = _leftover(kind, dead[-1], why)
            ref = f"{dead[-1].name.rpartition('/')[0]}/{machine}"
            found.append(replace(one, ref=ref, bytes=sum(v.used for v in dead)))
    return found


def made_now(volume: Dataset) -> bool:
    """Whether the process that makes it still lives."""
    return Process.parse(volume.marks.get("maker", "")).alive()


def being_made(volume: Dataset) -> bool:
    """Whether a process that lives makes it, or may make it: marks come a moment after the volume."""
    if volume.marks:
        return volume.state == "new" and made_now(volume)
    return (datetime.now(UTC) - volume.created).total_seconds() < MARKING


def _unborn(volume: Dataset, look: ZfsState, now: datetime) -> bool:
    """Whether it is a volume of ours whose marks a power cut swallowed: it is where only ours are made,
    holds no data, and is empty or a clone of one of our snapshots. So nothing of anybody's can be lost
    with it."""
    if volume.marks or volume.snapshots or (now - volume.created).total_seconds() < SETTLED:
        return False
    if not volume.origin:
        return volume in look.templates and volume.referenced < EMPTY
    ours = {
        f"{v.name}@{s.name}" for v in (*look.templates, *look.volumes) for s in v.snapshots if s.kind
    }
    return volume.origin in ours and volume.written is not None and volume.written < EMPTY


def _leftover(kind: str, volume: Dataset, why: str) -> Leftover:
    return Leftover(
        kind=kind,
        ref=volume.name,
        owner=volume.owner,
        created=volume.created,
        bytes=volume.used,
        why=why,
    )
