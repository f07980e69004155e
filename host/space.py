"""How much room files take."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def taken(path: Path) -> int:
    """Bytes that a file, or a directory with all below it, takes on its file system. No link is
    followed; a file of several names counts once. What may not be seen, or goes meanwhile, counts as
    nothing."""
    total, seen, todo = 0, set[tuple[int, int]](), [str(path)]
    while todo:
        place = todo.pop()
        try:
            found = os.lstat(place)
            if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
                if (found.st_dev, found.st_ino) in seen:
                    continue
                seen.add((found.st_dev, found.st_ino))
            total += found.st_blocks * 512
            if stat.S_ISDIR(found.st_mode):
                with os.scandir(place) as entries:
                    todo += [entry.path for entry in entries]
        except OSError:
            continue
    return total
