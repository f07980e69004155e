"""A machine's QEMU process, where it runs on this very host and is ours to end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from host.processes import command_line, end, pids

_PIDFD_GETFD = 438  # of every architecture (asm-generic/unistd.h); Python has no call for it
_PATIENCE = 2.0  # seconds until a killed process is gone; milliseconds are usual


def kill_qemu(name: str, uuid: str) -> bool:
    """SIGKILL to the QEMU of this machine, known by the uuid on its command line; False if there is
    none here that we may kill (another host's, another user's). The pidfd is opened before the
    command line is read, so that the signal can't reach a later process of the same number."""
    for pid in pids():
        try:
            if not _is_qemu(pid, name, uuid):
                continue
            handle = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            if _is_qemu(pid, name, uuid):
                with _kept_open(pid, handle):
                    return end(handle, signal.SIGKILL, timeout=_PATIENCE)
        except OSError:
            return False
        finally:
            os.close(handle)
    return False


def memory_of(name: str, uuid: str) -> tuple[int, int] | None:
    """Bytes of this host's memory that the machine's QEMU has in common with others, such as the page
    cache, and to itself (proc_pid_smaps(5)). None if it isn't here, or another user's."""
    for pid in pids():
        with contextlib.suppress(OSError):
            if _is_qemu(pid, name, uuid):
                rows = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                sizes = [(row.partition("_")[0], int(row.split()[1]) * 1024) for row in rows
                         if row.startswith(("Shared_", "Private_"))]  # fmt: skip
                found = {kind: sum(size for of, size in sizes if of == kind) for kind, _ in sizes}
                return found.get("Shared", 0), found.get("Private", 0)
    return None


@contextlib.contextmanager
def _kept_open(pid: int, handle: int) -> Iterator[None]:
    """Meanwhile its sockets stay open, where we may have them (pidfd_getfd(2)). libvirt learns of the
    end from its monitor, which closes a moment before the process is gone: then libvirt sleeps for
    0.2 s (virProcessKillPainfullyDelay())."""
    import ctypes  # late: only who cuts a machine's power needs it

    libc = ctypes.CDLL(None)
    ours: list[int] = []
    try:
        with contextlib.suppress(OSError):  # of another user's
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if str(link.readlink()).startswith("socket:"):
                    ours.append(libc.syscall(_PIDFD_GETFD, handle, int(link.name), 0))
        yield
    finally:
        for number in ours:
            if number >= 0:  # else we may not
                os.close(number)


def _is_qemu(pid: int, name: str, uuid: str) -> bool:
    arguments = command_line(pid)
    if "-uuid" not in arguments or uuid not in arguments:
        return False
    return any(a.startswith(f"guest={name},") for a in arguments)
