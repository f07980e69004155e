"""The mark that a build leaves in a VM before it does anything there: whose work the VM holds from then
on. It is a file in the login's home."""

from __future__ import annotations

import re

_FILE = "$HOME/.farmhand-build"
# Emptied first: on a full disk there is no mark then, rather than the one of a build before.
WRITE = f'printf "%s %s\\n" "$FARM" "$BUILD_ID" > "{_FILE}"'
"""A script for the VM: from now on it holds $BUILD_ID's work."""
READ = f'[ ! -s "{_FILE}" ] || dd if="{_FILE}" bs=200 count=1 2>/dev/null'
"""A script for the VM, which prints its mark; nothing, where there is none."""
_MARK = re.compile(r"([a-z0-9-]{1,63}) ([0-9A-Za-z.-]{1,80})")


def parse(printed: str) -> tuple[str, str] | None:
    """Farm and build of what ``READ`` printed; None: that is no mark."""
    found = _MARK.fullmatch(printed.strip())
    return (found[1], found[2]) if found else None
