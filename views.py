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
    from provision.report import Action, Outcome


def outcome(result: Outcome, *, nothing: str = "nothing to do: everything is as it should be") -> Result:
    """What was done, or would be, one line an action."""
    if not result.actions:
        return Result(result.as_dict(), nothing)
    width = max(len(action.vm) for action in result.actions)
    lead = "would: " if result.planned else ""
    lines = [f"{lead}{f'{a.vm:<{width}}  ' if width else ''}{a.text}" for a in result.actions]
    return Result(result.as_dict(), "\n".join(lines))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> str:
    """Aligned columns; where they don't fit the terminal, one block a row instead."""
    if width is None:
        width = shutil.get_terminal_size((200, 24)).columns if sys.stdout.isatty() else 10_000
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
