"""Records that a service's server takes one by one, instead of files: names with their addresses, and
addresses with their names, in zones.

A pointer is removed before its name and added after it. So no pointer ever leads nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from provision.network.view import View

BATCH = 400
"""Names an update holds: a message has 64 KiB at most, a name of ours takes up to 160 bytes of it."""

Records = tuple[tuple[str, str], ...]
"""Type and value of each, sorted; of A, AAAA and PTR."""
Zones = Mapping[str, Mapping[str, Records]]
"""By zone and name, both without the last dot; a server's mark of ours is not among them."""


@dataclass(frozen=True, slots=True)
class RecordChange:
    """The change of one name in one zone, from ``old`` to ``new``; either may be empty. ``shared``: the
    name is also in use for something else, which stays. ``marked``: it has our mark already."""

    zone: str
    name: str
    old: Records
    new: Records
    shared: bool = False
    marked: bool = True

    def inverse(self) -> RecordChange:
        return RecordChange(self.zone, self.name, self.new, self.old, self.shared)


@dataclass(frozen=True, slots=True)
class LiveRecords:
    """What a zone has at one name."""

    records: Records
    marked: bool
    other: bool  # records of other types, or other texts


def owners(view: View, zones: Zones) -> dict[tuple[str, str], str]:
    """Which VM each zone's name belongs to."""
    vms = {str(name): str(row.vm) for row in view.vms for name in row.full}
    found = {}
    for zone, names in zones.items():
        for name, records in names.items():
            owner = vms.get(name) or vms.get(records[0][1].removesuffix("."), "")
            found[zone, name] = owner
    return found


def compare(known: Zones, wanted: Zones) -> list[RecordChange]:
    """The changes since what was applied last; the server is not asked."""
    ops = []
    for zone, names in wanted.items():
        before = known.get(zone, {})
        for name in {**before, **names}:
            old, new = tuple(before.get(name, ())), names.get(name, ())
            if old != new:
                ops.append(RecordChange(zone, name, old, new, marked=bool(old)))
    return ordered(ops)


def ordered(ops: Iterable[RecordChange]) -> list[RecordChange]:
    """The changes in their order: pointers that go, names, pointers that come or change."""

    def rank(op: RecordChange) -> tuple[int, str]:
        pointer = op.zone.endswith(".arpa")
        return (1 if not pointer else 0 if not op.new else 2, op.zone)

    return sorted(ops, key=rank)


class RecordServer(Protocol):
    """A server with such records."""

    def judge(
        self, known: Zones | None, wanted: Zones, *, force: bool
    ) -> tuple[list[RecordChange], list[str]]:
        """What to update, by what the server has; and, in words, what was made by hand and is in the
        way. With ``force`` that is overwritten. ``known``: what was applied last."""
        ...

    def update(self, ops: Sequence[RecordChange], step: Callable[[str], None]) -> None:
        """Carry the changes out in their order. ``step`` is called before each batch. Conflict if the
        server has something else than we think. If one batch fails, those before it are undone."""
        ...

    def revert(self, ops: Sequence[RecordChange]) -> None:
        """Undo those of the changes that were made, after an update that was killed."""
        ...


def batches(ops: Sequence[RecordChange]) -> list[list[RecordChange]]:
    found: list[list[RecordChange]] = []
    for op in ops:
        if not found or found[-1][0].zone != op.zone or len(found[-1]) == BATCH:
            found.append([])
        found[-1].append(op)
    return found


def difference(ops: Sequence[RecordChange]) -> str:
    """A line for each record that goes or comes, as in a diff of files."""
    lines = []
    for zone in dict.fromkeys(op.zone for op in ops):
        lines.append(f"--- zone {zone}\n+++ zone {zone}\n")
        for op in ops:
            if op.zone == zone:
                lines += [f"-{op.name}. {k} {v}\n" for k, v in op.old if (k, v) not in op.new]
                lines += [f"+{op.name}. {k} {v}\n" for k, v in op.new if (k, v) not in op.old]
    return "".join(lines)


def summary(ops: Sequence[RecordChange], service: str) -> list[str]:
    """One line a zone."""
    zones = dict.fromkeys(op.zone for op in ops)
    return [f"{service}: update {zone}: {counted([o for o in ops if o.zone == zone])}" for zone in zones]


def counted(ops: Sequence[RecordChange]) -> str:
    counts = {
        "add": sum(1 for op in ops if not op.old),
        "change": sum(1 for op in ops if op.old and op.new and op.old != op.new),
        "mark": sum(1 for op in ops if op.old and op.old == op.new),
        "remove": sum(1 for op in ops if not op.new),
    }
    return ", ".join(f"{verb} {count}" for verb, count in counts.items() if count)
