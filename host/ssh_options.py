"""Options of the OpenSSH client that hold a path, written by its rules (ssh_config(5))."""

from __future__ import annotations

from pathlib import Path

from inventory.errors import UsageError


def path_option(name: str, path: str | Path) -> tuple[str, str]:
    """``-o NAME="PATH"``, for IdentityFile or UserKnownHostsFile: exactly that path, whatever is in it.
    UsageError for "${": ssh takes it for a variable of the environment, and it can't be written
    otherwise."""
    text = str(path)
    if "${" in text or "\n" in text:
        raise UsageError(f"{text!r}: OpenSSH can't be told such a path", remedy="give it another name")
    text = text.replace("\\", r"\\").replace('"', r"\"").replace("%", "%%")
    return "-o", f'{name}="{text}"'
