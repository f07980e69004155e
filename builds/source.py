"""What is built: a git revision, resolved to one commit before anything is touched.

A directory on this machine is resolved here and later offered to the VMs through their ssh
connections. One that isn't a git repository by itself (though it may lie inside one) is made one: its
present state is committed to a bare repository of the farm's own, so that what was built has a name
and can be built again. A URL is asked by ``git ls-remote``; what that can't answer (``master~3``, a
host only the VM reaches) is resolved in the VM.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from hypervisors.files import make_directory
from hypervisors.run import MASK, Runner
from inventory.errors import CommandFailed, NotFound, TimedOut, UsageError

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SCP_LIKE = re.compile(r"[^/]+:")  # git-clone(1): host:path, the colon before any slash
_UNFIT = re.compile(r"[^A-Za-z0-9._-]")
_LONG = 600.0
# A cycle may be started by a git hook, whose GIT_DIR means another repository than ours.
_GIT = ("env", "-u", "GIT_DIR", "-u", "GIT_WORK_TREE", "-u", "GIT_INDEX_FILE", "git")
# Nothing of the admin's own settings may change what a snapshot holds.
_PLAIN_GIT = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
# The same tree gives the same first commit, on any machine and at any time.
_NOBODY = {
    "GIT_AUTHOR_NAME": "farmhand",
    "GIT_AUTHOR_EMAIL": "farmhand@localhost",
    "GIT_COMMITTER_NAME": "farmhand",
    "GIT_COMMITTER_EMAIL": "farmhand@localhost",
}
_EPOCH = 946684800  # 2000-01-01; the nth state is n seconds later
# The admin named the directory as the source, so it is read whoever owns it (git-config(1),
# safe.directory); and a status must not write to a repository that somebody works in.
_TRUSTING = {
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    "GIT_OPTIONAL_LOCKS": "0",
}

RESOLVE_IN_GUEST = """\
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
git init -q --bare "$d"
git -C "$d" fetch -q --filter=tree:0 "$SOURCE_URL" '+HEAD:refs/asked/HEAD' '+refs/*:refs/*' ||
    git -C "$d" fetch -q "$SOURCE_URL" '+HEAD:refs/asked/HEAD' '+refs/*:refs/*'
case $ASKED in HEAD | HEAD[~^@]*) ASKED=refs/asked/$ASKED ;; esac
git -C "$d" --no-pager log -1 --no-show-signature --format='%H %s' "$ASKED" --
"""
"""A script for the VM: prints commit and subject of $ASKED at $SOURCE_URL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """One revision. ``commit`` is "" where only the VM can tell; ``url`` is "" where the repository is
    offered through the connection; ``repository`` is the git directory that is offered then."""

    name: str
    shown: str  # the source as messages and records show it, without passwords
    asked: str
    commit: str = ""
    tree: str = ""
    subject: str = ""
    url: str = ""
    repository: Path | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def short(self) -> str:
        return self.commit[:10]


def is_directory(repository: str) -> bool:
    """Whether it names a directory of this machine, rather than a URL that the VM reaches."""
    if repository.startswith("file://"):
        return True
    return "://" not in repository and not _SCP_LIKE.match(repository)


def directory_of(repository: str, base: Path) -> Path:
    return (base / Path(repository.removeprefix("file://")).expanduser()).resolve()


def mask(url: str) -> str:
    """A URL without the password it may hold."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username}:{MASK}@{host}"))


def name_of(repository: str, base: Path) -> str:
    """A plain name for the source, from its last component."""
    if is_directory(repository):
        last = directory_of(repository, base).name
    else:
        last = re.split(r"[/:]", repository.rstrip("/"))[-1]
    return _UNFIT.sub("-", last.removesuffix(".git")).strip("-.") or "source"


def check_revision(revision: str) -> str:
    """UsageError for what git could take for an option or could not take at all."""
    if not revision or revision.startswith("-") or not revision.isprintable() or len(revision) > 500:
        raise UsageError(
            f"{revision!r} is not a git revision",
            remedy="gitrevisions(7): a branch, a tag, a commit, HEAD~3, ...",
        )
    return revision


def resolve(
    runner: Runner, repository: str, revision: str, *, base: Path, sources: Path, snapshot: bool = True
) -> Resolved:
    """Find the commit. ``base``: what relative paths start from; ``sources``: where repositories of our
    own are kept. ``snapshot`` False changes nothing: a directory's present state stays unresolved.

    Errors: NotFound (no such directory or revision), UsageError, CommandFailed.
    """
    check_revision(revision)
    name = name_of(repository, base)
    if not is_directory(repository):
        return _resolve_url(name, repository, revision)
    directory = directory_of(repository, base)
    if not directory.is_dir():
        raise NotFound(
            f"the source {directory} is not a directory",
            remedy="see 'source: repository:' in the farm file",
        )
    notes: list[str] = []
    own = _own_git_directory(runner, directory)
    if own is None:
        mirror = sources / f"{name}.git"
        if not snapshot:
            return Resolved(
                name=name, shown=str(directory), asked=revision, repository=mirror,
                notes=("its present state would be committed first",),
            )  # fmt: skip
        if _take_state(runner, directory, mirror, name):
            notes.append(f"{directory} is no git repository: its state was committed to {mirror}")
        own = mirror
        where = mirror
    else:
        where = directory
        status = _git(runner, where, "status", "--porcelain", "--untracked-files=no", bare=own)
        if status:
            count = len(status.splitlines())
            notes.append(f"{count} uncommitted change{'s' * (count > 1)} in {directory}: not built")
    commit, tree, subject = _commit(runner, where, revision, directory)
    return Resolved(
        name=name, shown=str(directory), asked=revision, commit=commit, tree=tree,
        subject=subject, repository=own, notes=tuple(notes),
    )  # fmt: skip


def archive_sha256(runner: Runner, source: Resolved) -> tuple[str, int]:
    """sha256 and size in bytes of the commit's ``git archive``, the same wherever it is made."""
    assert source.repository is not None
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "source.tar"
        runner.read(
            *_GIT, "-C", source.repository, "archive", "--format=tar", "-o", out, source.commit,
            timeout=_LONG, env=_TRUSTING,
        )  # fmt: skip
        with out.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), out.stat().st_size


def _own_git_directory(runner: Runner, directory: Path) -> Path | None:
    """The git directory that holds this directory's branches, if it is a repository (or a work tree)
    by itself; None if it merely lies inside one."""
    # git-rev-parse looks no further up than this.
    env = {**_TRUSTING, "GIT_CEILING_DIRECTORIES": str(directory.parent)}
    found = runner.read(
        *_GIT, "-C", directory,
        "rev-parse", "--path-format=absolute", "--git-common-dir",
        ok=(0, 128), env=env,
    )  # fmt: skip
    if found.status == 0:
        return Path(found.stdout.strip())
    if "not a git repository" in found.stderr:
        return None
    raise CommandFailed(
        f"git can't read {directory}: {(found.stderr.strip().splitlines() or ['no reason given'])[-1]}",
        argv=found.argv,
        status=found.status,
        stderr=found.stderr,
    )


def _take_state(runner: Runner, directory: Path, mirror: Path, name: str) -> bool:
    """Commit the directory's present state to ``mirror``; False if nothing has changed."""
    if not (mirror / "HEAD").is_file():
        fresh = mirror.with_name(f".{mirror.name}.{os.getpid()}")
        shutil.rmtree(fresh, ignore_errors=True)
        make_directory(fresh.parent, mode=0o700)
        runner.change("git", "init", "-q", "--bare", "-b", "main", fresh, env=_PLAIN_GIT)
        (fresh / "info" / "exclude").write_text("__pycache__/\n*.pyc\n")
        shutil.rmtree(mirror, ignore_errors=True)  # half-made by a killed one
        fresh.rename(mirror)
    with tempfile.TemporaryDirectory(dir=mirror) as scratch:
        env = {
            **_PLAIN_GIT,
            **_NOBODY,
            "GIT_DIR": str(mirror),
            "GIT_WORK_TREE": str(directory),
            "GIT_INDEX_FILE": str(Path(scratch) / "index"),
        }
        runner.change("git", "-C", directory, "add", "-A", "--", ".", env=env, timeout=_LONG)
        tree = runner.change("git", "write-tree", env=env).stdout.strip()
        head = runner.read("git", "rev-parse", "-q", "--verify", "main", ok=(0, 1), env=env)
        old = head.stdout.strip()
        count = 0
        if old:
            if runner.read("git", "rev-parse", f"{old}^{{tree}}", env=env).stdout.strip() == tree:
                return False
            count = int(runner.read("git", "rev-list", "--count", old, env=env).stdout)
        env["GIT_AUTHOR_DATE"] = env["GIT_COMMITTER_DATE"] = f"{_EPOCH + count} +0000"
        message = f"State {count + 1} of {name}"
        parents = ("-p", old) if old else ()
        new = runner.change("git", "commit-tree", "-m", message, *parents, tree, env=env).stdout.strip()
        runner.change("git", "update-ref", "refs/heads/main", new, *((old,) if old else ()), env=env)
    return True


def _commit(runner: Runner, where: Path, revision: str, shown: Path) -> tuple[str, str, str]:
    """Commit, tree and subject. Looked up as it stands, for ":/text" would search for what is appended;
    git-log goes from a tag to its commit by itself."""
    found = runner.read(
        *_GIT, "-C", where, "rev-parse", "--quiet", "--verify", "--end-of-options", revision,
        ok=(0, 1, 128), env=_TRUSTING,
    )  # fmt: skip
    name = (found.stdout.strip().splitlines() or [""])[-1]
    if found.status == 0 and _COMMIT.fullmatch(name):
        log = runner.read(
            *_GIT, "-C", where, "log", "-1", "--no-show-signature", "--format=%H %T %s", name, "--",
            ok=(0, 128), env=_TRUSTING,
        )  # fmt: skip
        if log.status == 0 and log.stdout:
            commit, tree, subject = log.stdout.rstrip("\n").split(" ", 2)
            return commit, tree, subject
    names = _git(
        runner, where, "for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags"
    ).split()  # fmt: skip
    near = get_close_matches(revision, names, 1)
    raise NotFound(
        f"{shown} has no revision {revision!r}",
        remedy=f"did you mean {near[0]}?"
        if near
        else f"it has {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
        if names
        else "it has no commit yet: commit something first",
    )


def _resolve_url(name: str, url: str, revision: str) -> Resolved:
    unresolved = Resolved(name=name, shown=mask(url), asked=revision, url=url)
    if _COMMIT.fullmatch(revision):
        return Resolved(name=name, shown=mask(url), asked=revision, url=url, commit=revision)
    env = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=10"}
    quiet = Runner(changes=False, secrets=[urlsplit(url).password or ""] if "://" in url else [])
    try:
        answer = quiet.read(
            *_GIT, "ls-remote", "--", url, revision, f"{revision}^{{}}", env=env, timeout=30
        )
    except (CommandFailed, TimedOut):
        return unresolved  # perhaps only the VM reaches it; if not, the fetch says why
    refs = {ref: commit for commit, ref in (line.split("\t") for line in answer.stdout.splitlines())}
    for ref in (
        revision,
        f"refs/tags/{revision}^{{}}",
        f"refs/tags/{revision}",
        f"refs/heads/{revision}",
        f"{revision}^{{}}",
        f"refs/{revision}",
    ):  # gitrevisions(7), <refname>: in its order; an annotated tag's commit before the tag itself
        if ref in refs:
            return Resolved(name=name, shown=mask(url), asked=revision, url=url, commit=refs[ref])
    return unresolved


def _git(runner: Runner, where: Path, *args: str, bare: Path | None = None) -> str:
    if bare is not None and bare == where:
        return ""  # no work tree, so nothing uncommitted
    return runner.read(*_GIT, "-C", where, *args, env=_TRUSTING).stdout
