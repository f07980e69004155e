"""Results as text: aligned, and readable in a narrow terminal too."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from inventory.sizes import format_size

from cli import Result

if TYPE_CHECKING:
    from hypervisors.api import Template
    from provision.farm import FarmStatus
    from provision.report import Action, Outcome


def outcome(result: Outcome, *, nothing: str = "nothing to do: all is as it should be") -> Result:
    """What was done, or would be, one line an action."""
    if not result.actions:
        return Result(result.as_dict(), nothing)
    width = max(len(action.vm) for action in result.actions)
    lead = "would: " if result.planned else ""
    lines = [f"{lead}{f'{a.vm:<{width}}  ' if width else ''}{a.text}" for a in result.actions]
    return Result(result.as_dict(), "\n".join(lines))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """Aligned columns, empty ones left out; where they don't fit the terminal, one block a row instead."""
    if width is None:
        width = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else 10_000
    used = [i for i in range(len(headings)) if i == 0 or not rows or any(row[i] for row in rows)]
    headings = [headings[i] for i in used]
    rows = [[row[i] for i in used] for row in rows]
    columns = [max(len(str(cell)) for cell in column) for column in zip(headings, *rows, strict=True)]
    if sum(columns) + 2 * (len(columns) - 1) <= width:
        return "\n".join(
            "  ".join(f"{cell:<{w}}" for cell, w in zip(row, columns, strict=True)).rstrip()
            for row in (headings, *rows)
        )
    label = max(len(h) for h in headings[1:])
    blocks = []
    for row in rows:
        blocks.append(row[0])
        blocks += [
            f"  {h.lower():<{label}}  {cell}"
            for h, cell in zip(headings[1:], row[1:], strict=True)
            if cell
        ]
    return "\n".join(blocks)


def plan(verb: str, actions: Sequence[Action]) -> Result:
    """A plan that came without an outcome."""
    from provision.report import Outcome

    return outcome(Outcome(verb, True, tuple(actions)))


def templates(found: Sequence[Template]) -> Result:
    data = {
        "templates": [
            {
                "label": t.label,
                "size": t.size,
                "sha256": t.sha256,
                "created": t.created.isoformat(),
                "origin": t.origin,
                "firstboot": t.firstboot,
            }
            for t in found
        ]
    }
    if not found:
        return Result(data, "no template yet: clone-farm makes what it needs")
    rows = [
        (t.label, format_size(t.size), when(t.created), t.firstboot, t.origin, t.sha256[:12])
        for t in found
    ]
    return Result(data, table(("TEMPLATE", "SIZE", "MADE", "FIRST BOOT", "FROM", "SHA256"), rows))


def when(moment: datetime) -> str:
    """Local time, to the minute."""
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def farm_status(status: FarmStatus) -> Result:
    """One line a VM, then who is at work and what wants a look."""
    head = f"farm {status.farm} ({status.file})"
    hosts = [
        f"host {h.host}: "
        + (h.error or f"{h.driver}{f', {_about(h.free)} free' if h.free is not None else ''}")
        for h in status.hosts
    ]
    rows = [
        (
            vm.vm,
            vm.state,
            _memory(vm.memory, vm.memory_max),
            vm.template,
            f"{vm.checkpoint} ({vm.condition})" if vm.checkpoint and vm.condition else vm.checkpoint,
            "" if vm.disk_used is None else _about(vm.disk_used),
            f"{vm.address}:{vm.port}" if vm.address and vm.port else vm.address,
        )
        for vm in status.vms
    ]
    headings = ("VM", "STATE", "MEMORY", "TEMPLATE", "CHECKPOINT", "DISK", "SSH")
    lines = [head, *hosts, "", table(headings, rows)]
    notes = [f"{vm.vm}: {vm.error}" for vm in status.vms if vm.error]
    notes += [f"{holder.lock}: {holder}" for holder in status.holders]
    notes += [f"{vm.vm}: not in the farm file" for vm in status.vms if not vm.declared]
    notes += [f"left unfinished, the next command recovers it: {text}" for text in status.unfinished]
    notes += list(status.warnings)
    if notes:
        lines += ["", *notes]
    if status.vms and all(vm.state == "not made" for vm in status.vms):
        lines += ["", "nothing is made yet: clone-farm makes it"]
    return Result(status.as_dict(), "\n".join(lines))


def _about(size: int) -> str:
    """For reading, three figures at most."""
    for unit, name in ((2**40, "T"), (2**30, "G"), (2**20, "M"), (2**10, "K")):
        if size >= unit:
            value = size / unit
            return f"{value:.0f}{name}" if value >= 10 or value == int(value) else f"{value:.1f}{name}"
    return f"{size}B"


def _memory(now: int | None, most: int | None) -> str:
    if most is None:
        return "" if now is None else _about(now)
    return _about(most) if now in (None, most) else f"{_about(now or 0)} of {_about(most)}"
