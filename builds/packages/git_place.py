"""Where a git repository of this machine keeps what, and which commit a name means in it: told without
a git process, so that a thousand repositories are looked at in less than a second. As
gitrepository-layout(5) and gitrevisions(7) have it; what isn't plain is left to git."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from builds.source import broken

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAME = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)))[A-Za-z0-9_](?:[A-Za-z0-9_./-]*[A-Za-z0-9_-])?")
_NEVER_TAGS = ("HEAD", "refs/heads/", "refs/remotes/")
_OF_WORKTREES = ("refs/bisect/", "refs/worktree/", "refs/rewritten/")
_LINKS = 5  # as many symbolic refs as git follows
_MOST = 4096  # bytes of a ref, or of a file that names a directory


@dataclass(frozen=True, slots=True)
class GitPlace:
    """A repository. ``directory``: where it is, as it was named. ``own``: its git directory; of a linked
    work tree that with its HEAD and index. ``common``: the one with branches and objects. ``worktree``:
    whether somebody works in ``directory``."""

    directory: Path
    own: Path
    common: Path
    worktree: bool

    @property
    def objects(self) -> Path:
        return self.common / "objects"

    @property
    def shallow(self) -> bool:
        """Whether its history is cut off."""
        return (self.common / "shallow").exists()


class _OnlyGitKnows(Exception):
    pass


def git_place(directory: Path) -> GitPlace | None:
    """None: it is no git repository itself, though it may lie inside one. WrongState: it is a broken
    one. OSError: it can't be read."""
    try:
        return _git_place(directory)
    except (_OnlyGitKnows, ValueError):
        raise broken(directory, "its .git names no git directory") from None


def _git_place(directory: Path) -> GitPlace | None:
    inner = directory / ".git"
    try:
        found = inner.stat()
    except (FileNotFoundError, NotADirectoryError):
        own, worktree = directory, False
        if not ((own / "HEAD").is_file() and (own / "refs").is_dir() and (own / "objects").is_dir()):
            return None
    else:
        own, worktree = inner, True
        if not stat.S_ISDIR(found.st_mode):
            named = _text(inner)
            if not named.startswith("gitdir:"):
                raise _OnlyGitKnows
            own = Path(os.path.normpath(directory / named.removeprefix("gitdir:").strip()))
    try:
        common = Path(os.path.normpath(own / _text(own / "commondir").strip()))
    except FileNotFoundError:
        common = own
    if not (common / "objects").is_dir():
        raise broken(directory, f"{common} has no objects")
    return GitPlace(directory, own, common, worktree)


def object_named(place: GitPlace, revision: str) -> tuple[str, bool] | None:
    """The object that a name means, and whether that is a commit for certain (else it may be an
    annotated tag, or nothing at all); None: git has to be asked."""
    if _COMMIT.fullmatch(revision):
        return revision, False
    of_git = revision != "HEAD" and "/" not in revision and os.path.lexists(place.own / revision)
    if of_git or not _NAME.fullmatch(revision):  # FETCH_HEAD and the like
        return None
    try:
        for name in _meant(revision):
            if found := _ref(place, name, _LINKS):
                last, id_ = found
                return id_, last.startswith(_NEVER_TAGS)
    except (_OnlyGitKnows, OSError, ValueError):
        pass
    return None


def _meant(revision: str) -> Iterator[str]:
    """gitrevisions(7), <refname>, in its order."""
    if revision == "HEAD" or revision.startswith("refs/"):
        yield revision
    if revision != "HEAD":
        for form in ("refs/{}", "refs/tags/{}", "refs/heads/{}", "refs/remotes/{}"):
            yield form.format(revision)
        yield f"refs/remotes/{revision}/HEAD"


def _ref(place: GitPlace, name: str, links: int) -> tuple[str, str] | None:
    """The ref that it leads to, and what that holds; None: there is none."""
    here = place.own if name == "HEAD" or name.startswith(_OF_WORKTREES) else place.common
    try:
        text = _text(here / name).rstrip()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return _packed(place, name)
    if text.startswith("ref:"):
        target = text.removeprefix("ref:").strip()
        if not links or not target.startswith("refs/") or not _NAME.fullmatch(target):
            raise _OnlyGitKnows
        return _ref(place, target, links - 1)
    if not _COMMIT.fullmatch(text):
        raise _OnlyGitKnows
    return name, text


def _packed(place: GitPlace, name: str) -> tuple[str, str] | None:
    try:
        data = _bytes(place.common / "packed-refs", 2**28)
    except FileNotFoundError:
        return None
    at = data.find(f" {name}\n".encode())
    if at < 0:
        return None
    commit = data[max(at - 40, 0) : at].decode("latin-1")
    rest = data[at + len(name) + 2 :]
    if rest.startswith(b"^"):
        commit, name = rest[1:41].decode("latin-1"), "refs/heads/"  # an annotated tag's commit
    if not _COMMIT.fullmatch(commit):
        raise _OnlyGitKnows
    return name, commit


def _text(path: Path) -> str:
    return _bytes(path, _MOST).decode()


def _bytes(path: Path, most: int) -> bytes:
    """Of a regular file: nobody's FIFO is waited for."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise _OnlyGitKnows
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)
