"""Whether the very process that wrote something down still lives. A pid alone doesn't tell: it may
have been given to another since, also after a reboot."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """``start`` is in clock ticks since boot (proc(5), /proc/PID/stat, field 22)."""

    pid: int
    start: str
    boot: str

    @classmethod
    def this(cls) -> Process:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process:
        """The one that has this pid now; where none has, one that isn't alive."""
        return cls(pid, _stat(pid)[1], _boot())

    def alive(self) -> bool:
        """A zombie holds nothing any more: it counts as dead."""
        if self.boot != _boot():
            return False
        state, start = _stat(self.pid)
        return bool(start) and start == self.start and state not in "ZX"


def may_open(files: int) -> None:
    """Let this process have so many files open at once, as far as its hard limit goes (getrlimit(2)).
    Those it starts may have as many; no more than is needed, for some close all that they may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files if hard == resource.RLIM_INFINITY else min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _stat(pid: int) -> tuple[str, str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "X", ""
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold blanks and brackets
    return fields[0], fields[19]
