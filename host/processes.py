"""Processes of this machine: which is which, whether it still lives, how to end it.

A pid alone does not identify a process: it may have been given to another since, also after a reboot.
The boot, the pid and the start time together do (proc(5), /proc/PID/stat, field 22)."""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import select
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from host.printable import last_line

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Process:
    """``start``: clock ticks since boot; "" if there is no such process. ``boot``: the boot's id
    (random(4), boot_id)."""

    pid: int
    start: str
    boot: str

    @classmethod
    def this(cls) -> Process:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process with this pid now; if there is none, a value that isn't alive."""
        return cls(pid, _stat(pid).start, boot_id())

    @classmethod
    def parse(cls, mark: str) -> Process:
        """The process of a ``mark``; from any other text, a value that isn't alive."""
        boot, _, rest = mark.partition(":")
        pid, _, start = rest.partition(":")
        return cls(int(pid), start, boot) if pid.isascii() and pid.isdigit() else cls(0, "", "")

    @property
    def mark(self) -> str:
        """One word that identifies the process, for marks on what it makes."""
        return f"{self.boot}:{self.pid}:{self.start}"

    def alive(self) -> bool:
        """Whether it lives. A zombie holds nothing any more, and counts as dead."""
        if not self.start or self.boot != boot_id():
            return False
        now = _stat(self.pid)
        return now.start == self.start and now.state not in "ZX"


def account(uid: int) -> str:
    """The name of that uid (passwd(5)), or "uid 1000" if it has none. The environment is not asked."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def boot_id() -> str:
    return BOOT_ID.read_text(encoding="ascii").strip()


def started(pid: int) -> str:
    """When the process with this pid started, in clock ticks since boot; "" if there is none, or it is a
    zombie."""
    now = _stat(pid)
    return "" if now.state in "ZX" else now.start


def began(pid: int) -> float | None:
    """When the process with this pid started, in seconds since the epoch, to a hundredth or so. None: it
    is gone."""
    ticks = started(pid)
    if not ticks:
        return None
    ago = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    return time.time() - ago


def runs_here(program: str) -> bool:
    """Whether a program of that name (proc(5), /proc/PID/comm) is seen to run in this thread's network
    namespace: in a container it isn't."""
    here = Path("/proc/thread-self/ns/net").readlink()
    for pid in pids():
        with contextlib.suppress(OSError):
            named = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
            if named == program and Path(f"/proc/{pid}/ns/net").readlink() == here:
                return True
    return False


def is_there(pid: int) -> bool:
    """Whether any process has this pid, zombies included. For where only the pid is known."""
    return _stat(pid).start != ""


def parent_of(pid: int) -> int:
    """Its parent's pid; 0 if it is gone."""
    return _stat(pid).parent


def command_line(pid: int) -> tuple[str, ...]:
    """Its arguments, as in proc(5); empty for a zombie. OSError if it is gone or not ours to see."""
    text = Path(f"/proc/{pid}/cmdline").read_bytes()
    return tuple(os.fsdecode(text).split("\0")[:-1])


def described(pid: int) -> str:
    """The process in words: its pid, user and command, as far as they can be seen."""
    try:
        whose = account(credentials(pid)[0])
        command = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return f"pid {pid}"
    return f"pid {pid} of {whose} ({last_line(command)})"


def credentials(pid: int) -> tuple[int, frozenset[int]]:
    """Its real user, whatever it runs as, and its groups: proc(5), /proc/PID/status. OSError."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    fields = {line.partition(":")[0]: line.split()[1:] for line in text.splitlines()}
    return int(fields["Uid"][0]), frozenset(map(int, (fields["Gid"][0], *fields["Groups"])))


def lockers(path: Path) -> tuple[int, ...]:
    """The pids of other processes that hold a lock on the file, by proc(5), /proc/locks. Empty if that
    can't be told."""
    try:
        found = path.stat()
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return ()
    dev = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    held = (fields for line in lines if "->" not in (fields := line.split()))  # "->": waits for it
    pids_ = {int(fields[4]) for fields in held if fields[5] == dev}
    return tuple(sorted(pid for pid in pids_ if pid > 0 and pid != os.getpid()))


def pids() -> Iterator[int]:
    """The pids of all processes there are now."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            yield int(place.name)


def worked(session: int) -> int:
    """CPU time that the processes of a session have had, and those of their children that they waited
    for, in ticks."""
    return sum(stat.ticks for pid in pids() if (stat := _stat(pid)).session == session)


def end(handle: int, how: signal.Signals | None, *, timeout: float) -> bool:
    """Send the signal ``how`` to the process of this pidfd (None: send none) and wait at most
    ``timeout`` seconds. Returns whether it is gone. OSError if we may not signal it."""
    if how is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, how)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def may_open(files: int) -> None:
    """Raise this process's limit of open files to so many, as far as its hard limit goes (getrlimit(2)).
    Programs that it starts inherit the limit, and some close all that they may have open: so it is
    raised no further than needed."""
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
    session: int = 0
    ticks: int = 0


def _stat(pid: int) -> _Stat:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _Stat("X", 0, "")
    fields = text[text.rindex(")") + 2 :].split()  # the name before may hold blanks and brackets
    ticks = sum(map(int, fields[11:15]))
    return _Stat(fields[0], int(fields[1]), fields[19], int(fields[3]), ticks)
