"""A machine's console log: what it wrote since its start, and at its last one.

NAME.log, NAME.log.0        since its start: the end, and what came before, where virtlogd(8) turned
                            the file over
NAME.log.1, NAME.log.1.0    the last start's
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from host.files import make_directory, make_file, remove

_LAST, _BEFORE = ".1", ".0"


def end_of(log: Path, limit: int) -> bytes:
    """The last ``limit`` bytes, also where it was turned over just now. OSError if it can't be read."""
    with log.open("rb") as file:
        seen = os.fstat(file.fileno())
        file.seek(max(seen.st_size - limit, 0))
        text = file.read(limit)
    if len(text) < limit:
        with contextlib.suppress(OSError), _beside(log, _BEFORE).open("rb") as file:
            before = os.fstat(file.fileno())
            if not os.path.samestat(seen, before):  # turned over since it was opened
                file.seek(max(before.st_size - (limit - len(text)), 0))
                text = file.read(limit - len(text)) + text
    return text


def size_of(log: Path) -> int:
    """Bytes since its start, as far as they are kept. OSError if it isn't there."""
    size = log.stat().st_size
    with contextlib.suppress(OSError):
        size += _beside(log, _BEFORE).stat().st_size
    return size


def begin(log: Path) -> None:
    """Keep what there is as the last start's, and make an empty one, which is ours and so can be read
    without root."""
    with contextlib.suppress(FileNotFoundError):
        if size_of(log):
            last = _beside(log, _LAST)
            remove(_beside(last, _BEFORE))
            with contextlib.suppress(FileNotFoundError):
                _beside(log, _BEFORE).replace(_beside(last, _BEFORE))
            log.replace(last)
    make_directory(log.parent, mode=0o711)
    make_file(log)


def move(log: Path, to: Path) -> None:
    """Give it, where there is one, another name. Safe to do again."""
    for old, new in zip(files_of(log), files_of(to), strict=True):
        with contextlib.suppress(FileNotFoundError):
            old.replace(new)


def files_of(log: Path) -> tuple[Path, ...]:
    """All files that it may consist of."""
    last = _beside(log, _LAST)
    return (log, _beside(log, _BEFORE), last, _beside(last, _BEFORE))


def _beside(log: Path, what: str) -> Path:
    return log.with_name(log.name + what)
