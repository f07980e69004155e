"""A machine's QEMU process, where it runs on this very host and is ours to end."""

from __future__ import annotations

import os
import signal

from host.processes import command_line, end, pids

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
                return end(handle, signal.SIGKILL, timeout=_PATIENCE)
        except OSError:
            return False
        finally:
            os.close(handle)
    return False


def _is_qemu(pid: int, name: str, uuid: str) -> bool:
    arguments = command_line(pid)
    if "-uuid" not in arguments or uuid not in arguments:
        return False
    return any(a.startswith(f"guest={name},") for a in arguments)
