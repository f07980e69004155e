"""Processes of this machine: which is which, whether it still lives, and how one is ended.

A pid alone doesn't tell: it may have been given to another since, also after a reboot. What tells is
the boot, the pid and when it started (proc(5), /proc/PID/stat, field 22).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Process:
    """``start`` is in clock ticks since boot; "" of one that isn't there. ``boot`` is the boot's id
    (random(4), boot_id)."""

    pid: int
    start: str
    boot: str

    @classmethod
    def this(cls) -> Process:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process:
        """The one that has this pid now; where none has, one that isn't alive."""
        return cls(pid, _stat(pid).start, boot_id())

    @classmethod
    def parse(cls, mark: str) -> Process:
        """From ``mark``; of anything else, one that isn't alive."""
        boot, _, rest = mark.partition(":")
        pid, _, start = rest.partition(":")
        return cls(int(pid), start, boot) if pid.isascii() and pid.isdigit() else cls(0, "", "")

    @property
    def mark(self) -> str:
        """In one word, for marks on what it makes."""
        return f"{self.boot}:{self.pid}:{self.start}"

    def alive(self) -> bool:
        """A zombie holds nothing any more: it counts as dead."""
        if not self.start or self.boot != boot_id():
            return False
        now = _stat(self.pid)
        return now.start == self.start and now.state not in "ZX"


def account(uid: int) -> str:
    """Its name (passwd(5)); "uid 1000" where it has none. Never by what the environment says."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def boot_id() -> str:
    return BOOT_ID.read_text(encoding="ascii").strip()


def started(pid: int) -> str:
    """When the process that has this pid started, in clock ticks since boot; "" if none has it, or only
    its corpse."""
    now = _stat(pid)
    return "" if now.state in "ZX" else now.start


def is_there(pid: int) -> bool:
    """Whether any process has this pid, dead ones that nobody waited for included. Only where nothing
    but the pid is known."""
    return _stat(pid).start != ""


def parent_of(pid: int) -> int:
    """Its parent's pid; 0 if it is gone."""
    return _stat(pid).parent


def command_line(pid: int) -> tuple[str, ...]:
    """Its arguments, as proc(5) has them; none of a zombie. OSError if it is gone or not ours to see."""
    text = Path(f"/proc/{pid}/cmdline").read_bytes()
    return tuple(os.fsdecode(text).split("\0")[:-1])


def pids() -> Iterator[int]:
    """Of all processes there are now."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            yield int(place.name)


def end(handle: int, how: signal.Signals | None, *, timeout: float) -> bool:
    """Signal the process of this pidfd (None: don't) and wait so many seconds; whether it is gone.
    OSError where it isn't ours to signal."""
    if how is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, how)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def may_open(files: int) -> None:
    """Let this process have so many files open at once, as far as its hard limit goes (getrlimit(2)).
    Those it starts may have as many; no more than is needed, for some close all that they may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files if hard == resource.RLIM_INFINITY else min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    parent: int
    start: str


def _stat(pid: int) -> _Stat:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _Stat("X", 0, "")
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold blanks and brackets
    return _Stat(fields[0], int(fields[1]), fields[19])
