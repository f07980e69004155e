"""Which of a farm's builds somebody wants to see."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from builds.record import BuildRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class SoughtBuilds:
    """Each that isn't given leaves all in. ``since``: begun then or later. ``revision``: a commit's
    beginning, a branch, a tag, a version. ``vm``: that a step was to use. ``failed``: that did not end
    well."""

    since: datetime | None = None
    revision: str = ""
    vm: str = ""
    failed: bool = False

    @property
    def all(self) -> bool:
        return self == SoughtBuilds()

    def has(self, record: BuildRecord) -> bool:
        if self.since is not None and datetime.fromisoformat(record.started) < self.since:
            return False
        if self.revision and not record.source.is_named(self.revision):
            return False
        if self.vm and not any(self.vm in (step.vm, step.to) for step in record.steps):
            return False
        return not self.failed or record.result in ("failed", "interrupted")
