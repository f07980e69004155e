"""Where a host keeps its machines' memory. All that a look at machines without any has to know: the rest
of this room is imported when there is some."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hypervisors.ownership import FarmIdentity


@dataclass(frozen=True, slots=True)
class MemoryPlace:
    """``root``: see images.py. ``reader``: who QEMU runs as, if not ourselves."""

    root: Path
    farm: FarmIdentity
    reader: int | None

    def may_have(self, machine: str) -> bool:
        """Whether anything of the machine's memory may be there."""
        return (self.root / machine).exists()
