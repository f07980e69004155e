"""What was committed to a package's source between two of its builds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builds.packages.record import PackageRecord
from builds.source import Git
from host.printable import one_line
from inventory.errors import CommandFailed, TimedOut

if TYPE_CHECKING:
    from host.run import Runner

_MOST = 10
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class SourceCommit:
    id: str
    author: str
    subject: str

    def __str__(self) -> str:
        return f"{self.id[:10]} {self.subject} ({self.author})"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitsBetween:
    """``commits``: the newest first, at most ten. ``more``: how many others. ``why``: why nobody knows
    which they are; "": they are known."""

    commits: tuple[SourceCommit, ...] = ()
    more: int = 0
    why: str = ""

    def lines(self) -> tuple[str, ...]:
        more = (f"and {self.more} more",) if self.more else ()
        return (self.why,) if self.why else (*map(str, self.commits), *more)


def commits_between(
    runner: Runner, repository: Path | None, old: str, new: str, path: str = ""
) -> CommitsBetween:
    """Those that ``new`` has and ``old`` hasn't. ``repository``: the git directory on this machine;
    ``path``: the directory within it that is the package. Never raises for what is not there."""
    if repository is None or not _COMMIT.fullmatch(old) or not _COMMIT.fullmatch(new):
        return CommitsBetween(why="its commits are not known: it is not built from git")
    if old == new:
        return CommitsBetween()
    only = ("--", f":(top,literal){path}") if path else ("--",)
    try:
        git = Git(runner, repository)
        shown = git.ask(
            "log", f"--max-count={_MOST}", "--no-show-signature", "-z", "--format=%H%x1f%an%x1f%s",
            f"{old}..{new}", *only, timeout=_PATIENCE,
        ).stdout  # fmt: skip
        count = git.ask("rev-list", "--count", f"{old}..{new}", *only, timeout=_PATIENCE).stdout
    except (CommandFailed, TimedOut) as error:
        return CommitsBetween(why=f"its commits are not known: {error.message}")
    found = tuple(_commits(shown.split("\0")))
    return CommitsBetween(commits=found, more=max(int(count) - len(found), 0))


def since_passed(
    runner: Runner, failed: PackageRecord, passed: PackageRecord | None, repository: Path | None
) -> tuple[str, ...]:
    """Of a build that failed, what to look at first, a line each: what was committed since one passed.
    ``passed``: the newest that did; None: none has. ``repository``: as of ``commits_between``."""
    if passed is None:
        return ("it never passed",)
    last = f"it last passed as {passed.id}"
    if not failed.source.commit or not passed.source.commit:
        same = failed.source.tree == passed.source.tree
        return (f"{last}, of {'the same' if same else 'another'} source",)
    old, new = passed.source.commit, failed.source.commit
    if old == new:
        return (f"{last}, of the same commit {old[:10]}",)
    found = commits_between(runner, repository, old, new, failed.source.path)
    if not found.commits and not found.why:
        return (f"{last}, of commit {old[:10]}; no commit since then is about it",)
    return (f"{last}, of commit {old[:10]}; since then:", *(f"  {line}" for line in found.lines()))


def _commits(rows: Iterable[str]) -> Iterable[SourceCommit]:
    for row in rows:
        parts = row.split("\x1f", 2)
        if len(parts) == 3:
            yield SourceCommit(parts[0], one_line(parts[1], 60), one_line(parts[2], 100))
