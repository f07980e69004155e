"""Where the repositories of a farm are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from host.paths import state_dir

if TYPE_CHECKING:
    from inventory.model import Farm


def directory(farm: Farm, name: str) -> Path:
    path = farm.repositories[name].path
    return Path(path) if path else state_dir() / "repositories" / farm.farm / name
