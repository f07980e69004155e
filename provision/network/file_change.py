"""A live file of a network service, before and after."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class FileChange:
    """The change of one whole file. ``before`` None: there is none yet; ``after`` None: it goes. Owner
    and mode are the live file's."""

    service: str
    path: str
    before: str | None
    after: str | None
    mode: int
    uid: int = -1
    gid: int = -1
    zone: str = ""

    def inverse(self) -> FileChange:
        return replace(self, before=self.after, after=self.before)
