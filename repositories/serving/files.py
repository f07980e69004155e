"""A repository's files, as those reach them who read it over a network: by a path below its directory,
never outside it, never what begins with a dot. Only the links that the layout has are followed
(``repositories.layout``)."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass

_LINKS = re.compile(r"(?:channels|dists)/[^/]+|(?:generations/[^/]+|published/[^/]+/[^/]+)/pool")
_MOST_LINKS = 8
_MOST_MOVES = 100  # of a channel, while one file is looked for
_CONTENT = re.compile(r"([0-9a-f]{64})(?:-.*)?", re.DOTALL)
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Neither waits for a FIFO's other end, nor follows a link that has just come.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ServedFile:
    """A file that was opened. ``handle``: its descriptor, for the caller to close. ``size`` in bytes.
    ``modified``: since when the path leads to it, in seconds since the epoch: the later one of its own
    change and that of the links on the way. ``tag``: a word that is another one for other bytes.
    ``lasting``: what the path leads to never changes. ``stays``: the path by which the same file can be
    had when this one leads to another; empty: there is none."""

    handle: int
    size: int
    modified: float
    tag: str
    lasting: bool
    stays: tuple[str, ...] = ()


def open_served(top: int, path: Sequence[str]) -> ServedFile:
    """Open a file by its path's components; by none, the page for people. ``top``: a descriptor of the
    repository's directory. Each link is read once: so it is the file that one state of the repository
    has. FileNotFoundError: there is none that is served; PermissionError; OSError."""
    parts = tuple(path) if any(path) else ("index.html",)
    for _ in range(_MOST_MOVES):
        links: list[_Onward] = []
        try:
            return _open(top, parts, links)
        except FileNotFoundError:
            # It may have gone since a link was read that led to it: see where that leads by now.
            if not any(link.is_another(top) for link in links):
                raise
    raise _none()


def _open(top: int, parts: tuple[str, ...], links: list[_Onward]) -> ServedFile:
    """``links``: gets those that were followed."""
    while len(links) < _MOST_LINKS:
        step = _descend(top, parts)
        if isinstance(step, _Onward):
            links.append(step)
            parts = step.parts
            continue
        try:
            found = os.fstat(step)
            if not stat.S_ISREG(found.st_mode):
                raise _none()
        except BaseException:
            os.close(step)
            raise
        content = next(filter(None, map(_CONTENT.fullmatch, reversed(parts[-2:]))), None)
        return ServedFile(
            handle=step,
            size=found.st_size,
            modified=max(found.st_mtime, *(link.changed for link in links), 0),
            tag=content[1] if content else f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}",
            lasting=content is not None or parts[0] == "generations",
            # What a channel shows is its generation's own, and goes when the channel moves on.
            stays=("generations", *parts[2:]) if parts[0] == "published" else (),
        )
    raise _none()


@dataclass(frozen=True, slots=True)
class _Onward:
    """Where to go on from a link. ``changed``: when it came to lead there (the ctime of its rename).
    ``link``: its path below the top."""

    parts: tuple[str, ...]
    changed: float
    link: str
    leads: str

    def is_another(self, top: int) -> bool:
        """Whether it leads elsewhere by now."""
        try:
            return os.readlink(self.link, dir_fd=top) != self.leads
        except OSError:
            return False


def _descend(top: int, parts: Sequence[str]) -> int | _Onward:
    """Down to the file, which is opened, or to the first link. Nothing here leads upwards, or
    through a link: what it opens is below the top, whoever changes names meanwhile."""
    if not parts or any(not part or part[0] == "." or "/" in part or "\0" in part for part in parts):
        raise _none()
    here = top
    try:
        for at, name in enumerate(parts):
            found = os.stat(name, dir_fd=here, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                link = "/".join(parts[: at + 1])
                if not _LINKS.fullmatch(link):
                    raise _none()
                leads = os.readlink(name, dir_fd=here)
                onward = _joined(parts[:at], leads) + tuple(parts[at + 1 :])
                return _Onward(onward, found.st_ctime, link, leads)
            last = at == len(parts) - 1
            if last and not stat.S_ISREG(found.st_mode):
                raise _none()
            below = os.open(name, _FILE if last else _DIRECTORY, dir_fd=here)
            if here != top:
                os.close(here)
            here = below
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise _none() from error
        raise
    else:
        result, here = here, top
        return result
    finally:
        if here != top:
            os.close(here)


def _joined(directory: Sequence[str], target: str) -> tuple[str, ...]:
    """Where a link leads; there is no link among the directory's own parts."""
    if target.startswith("/"):
        raise _none()
    found = list(directory)
    for part in target.split("/"):
        if part == ".." and found:
            found.pop()
        elif part == "..":
            raise _none()
        elif part not in ("", "."):
            found.append(part)
    return tuple(found)


def _none() -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
