"""This machine's memory."""

from __future__ import annotations

import os
from pathlib import Path


def memory_available() -> int:
    """Bytes that the kernel could still give away: MemAvailable of proc(5)."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
