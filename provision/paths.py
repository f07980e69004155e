"""Where things live. Never in the checkout, unless the admin points there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


def _directory(variable: str, root: str, xdg: str, fallback: str) -> Path:
    if given := os.environ.get(variable):
        return Path(given)
    if os.geteuid() == 0:
        return Path(root)
    base = os.environ.get(xdg)
    return (Path(base) if base else Path.home() / fallback) / "farmhand"


def state_dir() -> Path:
    """What must not be lost: disks, journal, records, keys. hier(7), or the XDG base directories."""
    return _directory("FARMHAND_STATE_DIR", "/var/lib/farmhand", "XDG_STATE_HOME", ".local/state")


def cache_dir() -> Path:
    """What can be made again: built images, virtual environments."""
    return _directory("FARMHAND_CACHE_DIR", "/var/cache/farmhand", "XDG_CACHE_HOME", ".cache")


def runtime_dir() -> Path:
    """Sockets and pid files. Short, for a unix socket's path has at most 107 bytes (unix(7))."""
    if given := os.environ.get("FARMHAND_RUNTIME_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/run/farmhand")
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "farmhand"
    from tempfile import gettempdir

    return Path(gettempdir()) / f"farmhand-{os.getuid()}"


@dataclass(frozen=True, slots=True)
class FarmPaths:
    """One farm's places."""

    farm: str

    @property
    def root(self) -> Path:
        return state_dir() / "farms" / self.farm

    @property
    def journal(self) -> Path:
        return self.root / "journal.db"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    @property
    def disks(self) -> Path:
        """The default qcow2 store: templates/ and vms/ below it."""
        return self.root / "disks"

    @property
    def seeds(self) -> Path:
        """First-boot images, one MACHINE.iso each, 0600: they hold host keys."""
        return self.root / "seeds"

    @property
    def keys(self) -> Path:
        """The farm's own ssh key pair, and hostkeys/VM, VM.pub."""
        return self.root / "keys"

    @property
    def consoles(self) -> Path:
        """MACHINE.log each."""
        return self.root / "consoles"

    @property
    def builds(self) -> Path:
        return self.root / "builds"

    @property
    def runtime(self) -> Path:
        return runtime_dir() / self.farm
