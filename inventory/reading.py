"""A farm file's bytes, and the files it names: what needs no look at what it says."""

from __future__ import annotations

import stat
from pathlib import Path

from inventory.errors import InventoryError, NotFound, Problem, UnknownName

MAX_BYTES = 8 * 2**20


def read(path: Path) -> bytes:
    """The file's content, at most one byte more than MAX_BYTES. UnknownName if there is no such file,
    InventoryError if it can't be read."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise InventoryError([Problem(str(path), 1, 1, f"{kind}: a farm file is needed")])
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UnknownName(
            f"no farm file {path}",
            remedy="name one with --farm PATH; inventory/default.yaml is a good one to begin with",
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InventoryError([Problem(str(path), 1, 1, f"it can't be read: {reason}")]) from None


def resolve(farm_file: Path, path: Path | str) -> Path:
    """An absolute path for one that the farm file holds, which is relative to the farm file and may
    begin with ``~``. NotFound: there is no such user's home."""
    given = Path(path)
    if given.parts[:1] and given.parts[0].startswith("~"):
        try:
            given = given.expanduser()
        except RuntimeError:
            raise NotFound(
                f"{path}: there is no such user's home", remedy=f"write the path out in {farm_file}"
            ) from None
    return farm_file.parent / given
