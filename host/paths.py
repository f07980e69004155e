"""Where things live. Never in the checkout, unless the admin points there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from inventory.errors import UsageError

_UNFIT = r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]"  # all of it unprintable
"""What XML can't hold (libvirt's files), or ends a line of somebody's: no path of ours has it."""

SHARED = Path("/run/farmhand")
"""Root's, of this machine: one for all state and runtime directories. Gone after a boot."""


def _fit(path: Path, source: str) -> Path:
    """``path`` as an absolute path. UsageError, naming its ``source``, if not every program could take
    it."""
    path = path.absolute()
    if not str(path).isprintable() and re.search(_UNFIT, str(path)):
        raise UsageError(
            f"{source}: {str(path)!r} has a control character, or is not UTF-8",
            remedy="set it to a directory without: libvirt and others can't be told of this one",
        )
    return path


def _directory(variable: str, root: str, xdg: str, fallback: str) -> Path:
    if given := os.environ.get(variable):
        return _fit(Path(given), variable)
    if os.geteuid() == 0:
        return Path(root)
    if base := os.environ.get(xdg):
        return _fit(Path(base, "farmhand"), xdg)
    return _fit(Path.home() / fallback / "farmhand", "HOME")


def state_dir() -> Path:
    """Where to keep what must not be lost: disks, journal, records, keys. By hier(7), or the XDG base
    directories."""
    return _directory("FARMHAND_STATE_DIR", "/var/lib/farmhand", "XDG_STATE_HOME", ".local/state")


def cache_dir() -> Path:
    """Where to keep what can be made again: built images, virtual environments."""
    return _directory("FARMHAND_CACHE_DIR", "/var/cache/farmhand", "XDG_CACHE_HOME", ".cache")


def runtime_dir() -> Path:
    """Where to keep sockets and pid files. The path is short: a unix socket's has at most 107 bytes
    (unix(7))."""
    if given := os.environ.get("FARMHAND_RUNTIME_DIR"):
        return _fit(Path(given), "FARMHAND_RUNTIME_DIR")
    if os.geteuid() == 0:
        return Path("/run/farmhand")
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return _fit(Path(base, "farmhand"), "XDG_RUNTIME_DIR")
    from tempfile import gettempdir

    return Path(gettempdir()) / f"farmhand-{os.getuid()}"


def check_directories() -> None:
    """WrongState unless state, cache and runtime directory are ours, as far as they are there: see
    ``host.files.check_own_directory``."""
    from host.files import check_own_directory

    for directory in (state_dir(), cache_dir(), runtime_dir()):
        check_own_directory(directory)


@dataclass(frozen=True, slots=True)
class FarmPaths:
    """One farm's places. The environment is asked when this is made."""

    farm: str
    root: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", state_dir() / "farms" / self.farm)

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
        """The farm's own ssh key pair, and hostkeys/VM, VM.pub; or VM.learnt."""
        return self.root / "keys"

    @property
    def consoles(self) -> Path:
        """MACHINE.log each."""
        return self.root / "consoles"

    @property
    def untold(self) -> Path:
        """A file of its name for each VM that runs on from a kept memory and doesn't know the time."""
        return self.root / "untold"

    @property
    def builds(self) -> Path:
        return self.root / "builds"

    @property
    def runtime(self) -> Path:
        return runtime_dir() / self.farm
