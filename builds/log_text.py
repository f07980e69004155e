"""A step's log as it is shown. In the file are the bytes as they came; wherever it is shown, what the VM
printed has ``GUEST`` in front, and only farmhand's own lines have not: nothing printed in a VM can pass
for one."""

from __future__ import annotations

from collections.abc import Container

from host.printable import plain

GUEST = "| "


def log_lines(text: str, ours: Container[int], first: int = 1) -> list[str]:
    """Fit for a terminal. ``ours``: the numbers of farmhand's lines, of which ``first`` is that of the
    text's first."""
    lines = plain(text).removesuffix("\n").split("\n") if text else []
    return [line if n in ours else f"{GUEST}{line}" for n, line in enumerate(lines, first)]
