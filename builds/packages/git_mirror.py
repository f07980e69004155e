"""Mirrors of git URLs: bare repositories of ours, all branches and tags. One that is lost or damaged is
made anew."""

from __future__ import annotations

import shlex
from pathlib import Path

from builds.packages.git_place import GitPlace, git_place
from builds.source import GIT, LONG, mask, reason_of, secret_of
from host.file_lock import FileLock
from host.files import make_directory, remove
from host.printable import one_line
from host.run import MASK, Runner
from inventory.errors import TimedOut, WrongState
from provision.git import reading

_QUIET = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=10"}
# What stands still is given up; nothing goes on behind our back.
_FETCHING = {"http.lowSpeedLimit": "1000", "http.lowSpeedTime": "30", "gc.autoDetach": "false"}
_MIRRORED_HEAD = "refs/farmhand/head"


def mirror_at(where: Path) -> GitPlace | None:
    """None: there is none, or it is damaged."""
    try:
        return git_place(where)
    except (WrongState, OSError):
        return None


def fetched_mirror(url: str, where: Path) -> GitPlace:
    """The mirror of a URL, as that is now. WrongState: it can't be asked."""
    make_directory(where.parent, mode=0o700)
    with FileLock(where.with_name(f"{where.name}.lock")).hold():
        return _fetched(url, where)


def _fetched(url: str, where: Path) -> GitPlace:
    head = _asked_of(url, "ls-remote", "--", url, "HEAD", timeout=60)
    if mirror_at(where) is None:
        remove(where)
        part = where.with_name(f"{where.name}.part")
        remove(part)
        kind = "sha256" if len(head.split("\t", maxsplit=1)[0]) == 64 else "sha1"
        init = (*GIT, "init", "-q", "--bare", "--template=", f"--object-format={kind}")
        Runner().read(*init, part)
        (part / "HEAD").write_text(f"ref: {_MIRRORED_HEAD}\n")
        part.rename(where)
    refs = ["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"]
    if head:
        refs.append(f"+HEAD:{_MIRRORED_HEAD}")
    else:
        Runner().read(*GIT, "-C", where, "update-ref", "-d", _MIRRORED_HEAD)
    _asked_of(
        url, "-C", where, "fetch", "-q", "--prune", "--no-tags", "--no-write-fetch-head",
        "--no-recurse-submodules", "--", url, *refs,
    )  # fmt: skip
    place = mirror_at(where)
    assert place is not None
    return place


def _asked_of(url: str, *args: str | Path, timeout: float = LONG) -> str:
    """What git prints, which speaks with the URL. WrongState: it can't."""
    secret = secret_of(url)
    env = {**reading(_FETCHING, protocols=None), **_QUIET}
    try:
        runner = Runner(secrets=[secret])
        found = runner.read(*GIT, *args, env=env, timeout=timeout, ok=range(256))
        if found.status == 0:
            return found.stdout
        why = reason_of(found).removeprefix("fatal: ")
    except TimedOut:
        why = f"it took longer than {timeout:g} s"
    raise WrongState(
        f"{mask(url)} is out of reach: {one_line(why.replace(secret or MASK, MASK), 300)}",
        remedy=f"see git ls-remote {shlex.quote(mask(url))}; a 'revision' that is a commit is not asked "
        "for again",
    )
