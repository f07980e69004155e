"""A machine's QEMU process, where it runs on this very host and is ours to end."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

_PATIENCE = 2.0  # seconds until a killed process is gone; milliseconds are usual


def kill_qemu(name: str, uuid: str) -> bool:
    """SIGKILL to the QEMU of this machine, known by the uuid on its command line; False if there is
    none here that we may kill (another host's, another user's). The pidfd is opened before the
    command line is read, so that the signal can't reach a later process of the same number."""
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            if not _is_qemu(place, name, uuid):
                continue
            handle = os.pidfd_open(int(place.name))
        except OSError:
            continue
        try:
            if not _is_qemu(place, name, uuid):
                continue
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            return bool(poll.poll(_PATIENCE * 1000))
        except OSError:
            return False
        finally:
            os.close(handle)
    return False


def _is_qemu(place: Path, name: str, uuid: str) -> bool:
    arguments = (place / "cmdline").read_bytes().split(b"\0")
    if b"-uuid" not in arguments or uuid.encode() not in arguments:
        return False
    return any(a.startswith(f"guest={name},".encode()) for a in arguments)
