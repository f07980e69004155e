"""An activity as the journal keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from host.processes import Process
from inventory.errors import Text
from provision.engine.requester import NOBODY, Requester


@dataclass(frozen=True, slots=True)
class Record:
    """An activity as the journal has it. Times are UTC. ``verb``: the activity's name. ``vms``: the VMs
    it is about, in the farm file's order; empty: the whole farm, or no VM. ``outcome``: "done",
    "failed", "interrupted", "recovered", or "" if it never ended. ``in_its_way``: why its last recovery
    failed; "" if none did."""

    id: int
    verb: str
    vms: tuple[str, ...]
    facts: Mapping[str, object]
    process: Process
    started: datetime
    ended: datetime | None
    outcome: str
    error: str
    in_its_way: Text
    settled: bool
    requester: Requester = NOBODY
    steps: tuple[tuple[datetime, str], ...] = ()

    @property
    def state(self) -> str:
        """Its outcome; while it has none "running", or "interrupted" where its process is gone."""
        return self.outcome or ("running" if self.process.alive() else "interrupted")

    @property
    def vm(self) -> str:
        """The one VM that it is about; "" if there are several, or none."""
        return self.vms[0] if len(self.vms) == 1 else ""

    def as_dict(self) -> dict[str, object]:
        return {
            "id": self.id,
            "verb": self.verb,
            "vm": self.vm,
            "vms": list(self.vms),
            "facts": dict(self.facts),
            "pid": self.process.pid,
            "started": self.started.isoformat(),
            "ended": self.ended.isoformat() if self.ended else None,
            "outcome": self.outcome,
            "error": self.error,
            "requester": self.requester.as_dict(),
            "steps": [{"at": at.isoformat(), "text": text} for at, text in self.steps],
        }
