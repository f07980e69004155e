"""What is built: a git revision, resolved to one commit before anything is touched.

A directory on this machine is resolved here, and later offered to the VMs through their ssh connections.
A directory that is no git repository itself (though it may lie inside one) is made one: its present
state is committed to a bare repository of the farm's own. So what was built has a name and can be built
again. A URL is asked by ``git ls-remote``. What that can't answer (``master~3``, a host that only the VM
reaches) is resolved in the VM."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit, urlunsplit

from host.files import make_directory
from host.processes import account
from host.run import MASK, CommandResult, Runner
from inventory.errors import (
    CommandFailed,
    NotFound,
    Remedy,
    TimedOut,
    Unsupported,
    UsageError,
    WrongState,
    some,
)
from inventory.values import is_directory
from provision.git import git_config, reading

_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_./-]+")  # of a branch or tag, and no expression
_ABBREVIATED = re.compile(r"(.*-g)?[0-9a-f]{4,}")  # a commit, or what git-describe(1) says
_UNFIT = re.compile(r"[^A-Za-z0-9._-]")
_HEADS = "refs/heads/"
_CHANGELOG = re.compile(r"[a-z0-9][a-z0-9+.-]* \(([0-9][A-Za-z0-9.+:~-]*)\)")  # deb-changelog(5)
LONG = 600.0
"""Seconds that git may take."""
# A cycle may be started by a git hook, whose GIT_DIR means another repository than ours.
_OF_ANOTHER = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY",
               "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_NAMESPACE", "GIT_SHALLOW_FILE", "GIT_GRAFT_FILE",
               "GIT_QUARANTINE_PATH")  # fmt: skip
GIT = ("env", *(word for name in _OF_ANOTHER for word in ("-u", name)), "git")
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
_POINTER = "^version https://git-lfs.github.com/spec/v1$"  # git-lfs-spec, "The Pointer"
# git-clone(1) takes settings in the environment for its own, and none of them for the other side.
_SERVE = (
    "--upload-pack=git -c 'safe.directory=*' -c core.fsmonitor=false "
    "-c uploadpack.allowAnySHA1InWant=true upload-pack"
)
_RECENT = 1000  # commits whose files are looked for beforehand: enough to find a broken repository
_SHOWN = 3

RESOLVE_IN_GUEST = """\
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
head=$(git ls-remote "$SOURCE_URL" HEAD)
head=${head%%[!0-9a-f]*}
[ ${#head} -ne 64 ] || export GIT_DEFAULT_HASH=sha256
git init -q --bare "$d"
git -C "$d" fetch -q --filter=tree:0 "$SOURCE_URL" '+HEAD:refs/asked/HEAD' '+refs/*:refs/*' ||
    git -C "$d" fetch -q "$SOURCE_URL" '+HEAD:refs/asked/HEAD' '+refs/*:refs/*'
case $ASKED in HEAD | HEAD[~^@]*) ASKED=refs/asked/$ASKED ;; esac
git -C "$d" --no-pager log -1 --no-show-signature --format='%H %s' "$ASKED" --
"""
"""A script for the VM: prints commit and subject of $ASKED at $SOURCE_URL."""


class NoRevision(NotFound):
    """The source is there and has no such revision."""

    def __init__(self, revision: str, what: str, *, remedy: Remedy = "") -> None:
        super().__init__(what, remedy=remedy)
        self.revision = revision


@dataclass(frozen=True, slots=True, kw_only=True)
class Submodule:
    """Another repository's ``commit`` within the source. ``name``: as in .gitmodules, or "".
    ``repository``: its place on this machine; None if it isn't here."""

    name: str
    path: str
    commit: str
    repository: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """One revision. ``commit``: "" if only the VM can tell. ``branch``: that it was asked for by, or "".
    ``version``: by its debian/changelog, else by its tags, as git-describe(1) has it; "": neither is
    there to be seen. ``url``: "" if the repository is offered through the connection. ``repository``:
    the git directory that is offered then."""

    name: str
    shown: str  # the source as messages and records show it, without passwords
    asked: str
    commit: str = ""
    tree: str = ""
    subject: str = ""
    branch: str = ""
    version: str = ""
    url: str = ""
    repository: Path | None = None
    notes: tuple[str, ...] = field(default=())
    submodules: tuple[Submodule, ...] = ()  # those within them, too, as far as they are here
    pointers: tuple[str, ...] = ()  # files in the commit whose content is kept by Git LFS

    @property
    def short(self) -> str:
        return self.commit[:10]


def directory_of(repository: str, base: Path) -> Path:
    """NotFound: it begins with ``~`` and the name of nobody's."""
    given = Path(repository.removeprefix("file://"))
    try:
        return (base / given.expanduser()).resolve()
    except RuntimeError:
        raise NotFound(
            f"{repository}: there is no such user's home", remedy="write the path out in the farm file"
        ) from None


def mask(url: str) -> str:
    """A URL without its password, or the token in the user's place."""
    if not (secret := secret_of(url)):
        return url
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.replace(secret, MASK)}@{host}"))


def secret_of(url: str) -> str:
    """The part of a URL that must never be shown; "" if there is none."""
    if "://" not in url:
        return ""
    user, _, _ = urlsplit(url).netloc.rpartition("@")
    name, colon, password = user.partition(":")
    return password if colon else name if url.startswith(("http:", "https:")) else ""


def name_of(repository: str, base: Path) -> str:
    """A plain name for the source, from its last component."""
    if is_directory(repository):
        last = directory_of(repository, base).name
    else:
        last = re.split(r"[/:]", repository.rstrip("/"))[-1]
    return _UNFIT.sub("-", last.removesuffix(".git")).strip("-.") or "source"


def check_revision(revision: str) -> str:
    """UsageError for a revision that git could take for an option, or not take at all."""
    if not revision or revision.startswith("-") or not revision.isprintable() or len(revision) > 500:
        raise UsageError(
            f"{revision!r} is not a git revision",
            remedy="gitrevisions(7): a branch, a tag, a commit, HEAD~3, ...",
        )
    return revision


def resolve(
    runner: Runner, repository: str, revision: str, *, base: Path, sources: Path, snapshot: bool = True
) -> Resolved:
    """Find the commit. ``base``: relative paths start there. ``sources``: where repositories of our own
    are kept. With ``snapshot`` False nothing is changed, and a directory's present state stays
    unresolved.

    Errors: NotFound (no such directory or revision), UsageError, WrongState (a repository that can't be
    read, or lacks what it should hold), CommandFailed."""
    check_revision(revision)
    name = name_of(repository, base)
    if not is_directory(repository):
        return _resolve_url(name, repository, revision)
    directory = directory_of(repository, base)
    _check_directory(directory)
    notes: list[str] = []
    own, mirror = _own_git_directory(runner, directory), sources / f"{name}.git"
    if own is None:
        if not snapshot:
            return Resolved(
                name=name, shown=str(directory), asked=revision, repository=mirror,
                notes=("its present state would be committed first",),
            )  # fmt: skip
        if take_state(runner, directory, mirror, name):
            notes.append(f"{directory} is no git repository: its state was committed to {mirror}")
        own = where = mirror
        git = Git(runner, mirror)
    else:
        where = directory
        git = Git(runner, directory)
    commit, tree, subject = commit_of(git, revision, directory)
    _check_complete(git, commit, directory)
    if own != where:
        notes += _uncommitted(git, directory)
    submodules = tuple(_submodules(runner, git, commit, directory))
    if away := [submodule.path for submodule in submodules if submodule.repository is None]:
        names = some(away, _SHOWN)
        notes.append(f"submodules not checked out here, the VM has to reach their URLs: {names}")
    return Resolved(
        name=name, shown=str(directory), asked=revision, commit=commit, tree=tree, subject=subject,
        branch=_branch(git, revision) if own != mirror else "", version=_version(git, commit),
        repository=own, notes=tuple(notes),
        submodules=submodules, pointers=pointers(git, commit),
    )  # fmt: skip


class AsksGit(Protocol):
    """git in some repository."""

    def ask(self, *args: str | Path, ok: Sequence[int] = ...) -> CommandResult: ...


class Git:
    """git in a repository that the admin named as the source. It reads the repository whoever owns it,
    and runs no program that its configuration names, for its owner may be somebody else. It writes
    nothing to a repository that somebody works in."""

    def __init__(self, runner: Runner, where: Path, *, protocols: str = "none") -> None:
        """``protocols``: those that it may fetch by."""
        self._runner = runner
        self._where = where
        self._env = reading({})
        drivers = self.ask("config", "-z", "--name-only", "--get-regexp", r"^filter\.", ok=(0, 1)).stdout
        # what git-archive(1) makes must not hang on the admin's settings either
        filters = {key: "" for key in drivers.split("\0") if key}
        self._env = reading({**filters, "core.autocrlf": "false"}, protocols=protocols)

    def __call__(self, *args: str | Path) -> str:
        return self.ask(*args).stdout

    def ask(self, *args: str | Path, ok: Sequence[int] = (0,), timeout: float = LONG) -> CommandResult:
        return self._runner.read(*GIT, "-C", self._where, *args, ok=ok, timeout=timeout, env=self._env)


def check_contents(source: Resolved, scripts: Iterable[str]) -> None:
    """Unsupported if the commit has what git alone doesn't bring to the VM, and none of the cycle's
    ``scripts`` mentions it."""
    text = "\n".join(scripts).lower()
    submodules = tuple(submodule.path for submodule in source.submodules)
    for paths, word, what, how in (
        (submodules, "submodule", "submodules", "`git submodule update --init`"),
        (source.pointers, "lfs", "files kept by Git LFS", "`git lfs pull`"),
    ):
        if paths and word not in text:
            raise Unsupported(
                f"{source.shown} has {what} at {source.short}, which the VM would not get: "
                f"{some(paths, _SHOWN)}",
                remedy=f"have a run step of the cycle fetch them: {how}; "
                "or commit them to the repository itself",
            )


def _check_directory(directory: Path) -> None:
    try:
        found = directory.is_dir()
        readable = found and os.access(directory, os.R_OK | os.X_OK)
    except PermissionError:  # one of those above it
        found, readable = True, False
    if not found:
        raise NotFound(
            f"the source {directory} is not a directory",
            remedy="see 'source: repository:' in the farm file",
        )
    if not readable:
        raise _unreadable(directory)


def _unreadable(path: Path) -> WrongState:
    return WrongState(
        f"the source {path} can't be read by {account(os.geteuid())}",
        remedy="make it, and what it lies in, readable; or run this as a user who may read it",
    )


def broken(directory: Path | str, why: str) -> WrongState:
    return WrongState(
        f"the source {directory} is a broken git repository: {why}",
        remedy=f"see git -C {shlex.quote(str(directory))} fsck",
    )


def _check_complete(git: Git, commit: str, directory: Path) -> None:
    """Check that all is there that a clone would bring, as far as can be told in little time. What a
    partial clone lacks is not fetched: a VM that clones it could not wait for that."""
    partial = git.ask("config", "--get-regexp", r"^remote\..*\.partialclonefilter$", ok=(0, 1)).stdout
    what = ("--all", commit) if partial else (f"--max-count={_RECENT}", commit)
    found = git.ask(
        "rev-list", "--objects", "--missing=print", "--quiet", *what, "--", ok=(0, 128)
    )  # fmt: skip
    missing = [line[1:] for line in found.stdout.splitlines() if line.startswith("?")]
    if missing and partial:
        raise WrongState(
            f"the source {directory} is a partial clone: {len(missing)} of its objects are only where "
            "it was cloned from",
            remedy=f"fetch them: git -C {shlex.quote(str(directory))} fetch --refetch --no-filter; "
            "or give 'source: repository:' as that URL, if the VM reaches it",
        )
    if missing:
        raise broken(directory, f"object {missing[0]} is missing")
    if found.status:
        raise broken(directory, reason_of(found))


def _uncommitted(git: Git, directory: Path) -> list[str]:
    # within submodules git would run what their own configurations name
    only = ("--untracked-files=no", "--ignore-submodules=dirty")
    status = git.ask("status", "--porcelain", *only, ok=(0, 128))
    if status.status:
        return [f"whether {directory} has uncommitted changes is not known: {reason_of(status)}"]
    count = len(status.stdout.splitlines())
    return [f"{count} uncommitted change{'s' * (count > 1)} in {directory}: not built"] if count else []


def _submodules(runner: Runner, git: Git, commit: str, directory: Path) -> Iterator[Submodule]:
    lines = git("ls-tree", "-r", "-z", "--full-tree", commit).split("\0")
    links = [line.partition("\t") for line in lines if line.startswith("160000 ")]
    if not links:
        return
    declared = git.ask(
        "config", "-z", "--blob", f"{commit}:.gitmodules", "--get-regexp", r"^submodule\..*\.path$",
        ok=(0, 1, 128),
    ).stdout  # fmt: skip
    pairs = [entry.partition("\n") for entry in declared.split("\0") if entry]
    names = {path: key[len("submodule.") : -len(".path")] for key, _, path in pairs}
    for what, _, path in links:
        pinned, inner = what.split()[2], directory / path
        here = Submodule(name=names.get(path, ""), path=path, commit=pinned)
        own = _own_git_directory(runner, inner) if (inner / ".git").exists() else None
        its = None if own is None else Git(runner, inner)
        if its is None or its.ask("cat-file", "-e", f"{pinned}^{{commit}}", ok=(0, 1, 128)).status:
            yield here
            continue
        yield replace(here, repository=own)
        for nested in _submodules(runner, its, pinned, inner):
            yield replace(nested, path=f"{path}/{nested.path}")


def pointers(git: AsksGit, commit: str, *, anyway: bool = False) -> tuple[str, ...]:
    """Files that are LFS pointers, of a commit or tree. Looked for only if a .gitattributes in it
    mentions LFS, or ``anyway``."""

    def holding(*args: str) -> tuple[str, ...]:
        found = git.ask("grep", "-I", "-l", "-z", "--full-name", *args, ok=(0, 1)).stdout
        return tuple(name.partition(":")[2] for name in found.split("\0") if name)

    attributes = ":(top,glob)**/.gitattributes"
    if not anyway and not holding("-F", "-e", "filter=lfs", commit, "--", attributes):
        return ()
    return holding("-e", _POINTER, commit, "--", ":(top)")


def archive_sha256(runner: Runner, source: Resolved) -> tuple[str, int]:
    """sha256 and size in bytes of the commit's ``git archive``; the same wherever it is made."""
    assert source.repository is not None
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "source.tar"
        Git(runner, source.repository)("archive", "--format=tar", "-o", out, source.commit)
        with out.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), out.stat().st_size


def offered(source: Resolved) -> dict[str, tuple[Path, str]]:
    """What the VMs are given: by name, each repository of this machine, and the commit meant in it."""
    assert source.repository is not None
    here = [(s.repository, s.commit) for s in source.submodules if s.name and s.repository is not None]
    numbered = {f"{source.name}-{number}": which for number, which in enumerate(here, 1)}
    return {source.name: (source.repository, source.commit), **numbered}


def variables(source: Resolved, urls: Sequence[str]) -> dict[str, str]:
    """The environment of a build's scripts. It has the URLs, in the VM, of what is ``offered``, in its
    order. Submodules are then fetched from there, whatever their own URLs are: git-config(1),
    ENVIRONMENT."""
    names = [s.name for s in source.submodules if s.name and s.repository is not None]
    settings = {f"submodule.{name}.url": url for name, url in zip(names, urls[1:], strict=True)}
    if not settings:
        return {"SOURCE_URL": urls[0]}
    return {"SOURCE_URL": urls[0], **git_config({**settings, "protocol.file.allow": "always"})}


def pack(runner: Runner, source: Resolved, out: Path) -> None:
    """A tar file with NAME.git for each repository that is ``offered``: a bare copy, made as a clone is,
    so that it holds what a VM would get. Its owner is root, or whoever unpacks it."""

    def nobodys(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".") as scratch:
        part = Path(scratch) / "tar"
        with tarfile.open(part, "w") as tar:
            for name, (where, commit) in offered(source).items():
                copy = Path(scratch) / f"{name}.git"
                git = Git(runner, where, protocols="file")
                git("clone", "-q", "--mirror", "--no-local", "--template=", _SERVE, "--", where, copy)
                git = Git(runner, copy, protocols="file")
                git("fetch", "-q", _SERVE, "--", where, f"{commit}:refs/farmhand/source")
                git("config", "--remove-section", "remote.origin")
                git("config", "uploadpack.allowAnySHA1InWant", "true")
                git("config", "uploadpack.allowFilter", "true")
                tar.add(copy, copy.name, filter=nobodys)
        part.chmod(0o600)  # the source may be for some eyes only
        part.rename(out)


def _own_git_directory(runner: Runner, directory: Path) -> Path | None:
    """The git directory with this directory's branches, if it is a repository (or a work tree) itself;
    None if it only lies inside one."""
    # git-rev-parse looks no further up than this.
    env = {**reading({}), "GIT_CEILING_DIRECTORIES": str(directory.parent)}
    found = runner.read(
        *GIT, "-C", directory,
        "rev-parse", "--path-format=absolute", "--git-common-dir",
        ok=(0, 128), env=env,
    )  # fmt: skip
    if found.status == 0:
        return Path(found.stdout.removesuffix("\n"))
    inner = directory / ".git"
    meant = os.path.lexists(inner) or all((directory / n).exists() for n in ("HEAD", "objects", "refs"))
    if "not a git repository" in found.stderr and not meant:
        return None
    if inner.is_dir() and not os.access(inner, os.R_OK | os.X_OK):
        raise _unreadable(inner)
    raise broken(directory, reason_of(found))


def reason_of(failed: CommandResult) -> str:
    """The line of git's output that says why."""
    lines = [line.strip() for line in failed.stderr.splitlines() if line.strip()]
    why = [line for line in lines if line.startswith(("error:", "fatal:"))]
    return (why or lines[-1:] or ["no reason"])[0]


def take_state(runner: Runner, directory: Path, mirror: Path, name: str) -> bool:
    """Commit the directory's present state to ``mirror``. False if nothing has changed."""
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
        added = runner.change(
            "git", "-C", directory, "add", "-A", "--", ".", ok=(0, 128), env=env, timeout=LONG
        )
        if added.status:
            raise WrongState(
                f"the source {directory} can't be taken as it is: {reason_of(added)}",
                remedy="put that right; or make it a git repository, of which only commits are built",
            )
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


def commit_of(git: Git, revision: str, shown: Path | str) -> tuple[str, str, str]:
    """Commit, tree and subject. Looked up as it stands, for ":/text" would search for what is appended;
    git-log goes from a tag to its commit by itself."""
    found = git.ask(
        "rev-parse", "--quiet", "--verify", "--end-of-options", revision, ok=(0, 1, 128)
    )  # fmt: skip
    name = (found.stdout.strip().splitlines() or [""])[-1]
    if found.status == 0 and _COMMIT.fullmatch(name):
        log = git.ask("log", "-1", "--no-show-signature", "--format=%H %T %s", name, "--", ok=(0, 128))
        if log.status == 0 and log.stdout:
            commit, tree, subject = log.stdout.rstrip("\n").split(" ", 2)
            return commit, tree, subject
        if name != revision and log.status:  # a name that leads nowhere
            raise broken(shown, reason_of(log))
    refs = git.ask("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags")
    names = refs.stdout.split()
    if not names and "broken ref" in refs.stderr:
        raise broken(shown, refs.stderr.splitlines()[0])
    near = get_close_matches(revision, names, 1)
    shallow = git("rev-parse", "--is-shallow-repository").strip() == "true"
    raise NoRevision(
        revision,
        f"{shown} has no revision {revision!r}",
        remedy=f"did you mean {near[0]}?"
        if near
        else f"its history is cut off: git -C {shlex.quote(str(shown))} fetch --unshallow"
        if shallow
        else f"it has {', '.join(names[:8])}{', ...' * (len(names) > 8)}"
        if names
        else "it has no commit yet: commit something first",
    )


def _branch(git: Git, revision: str) -> str:
    """The branch that this revision names; "" if it names none."""
    found = git.ask("rev-parse", "--symbolic-full-name", "--end-of-options", revision, ok=(0, 128))
    name = (found.stdout.strip().splitlines() or [""])[-1]
    return name.removeprefix(_HEADS) if not found.status and name.startswith(_HEADS) else ""


def _version(git: Git, commit: str) -> str:
    shown = git.ask("cat-file", "blob", f"{commit}:debian/changelog", ok=(0, 128))
    if not shown.status and (match := _CHANGELOG.match(shown.stdout)):
        return match[1]
    described = git.ask("describe", "--tags", commit, ok=(0, 128))
    return "" if described.status else described.stdout.strip()


def _resolve_url(name: str, url: str, revision: str) -> Resolved:
    unresolved = Resolved(name=name, shown=mask(url), asked=revision, url=url)
    if _COMMIT.fullmatch(revision):
        return Resolved(name=name, shown=mask(url), asked=revision, url=url, commit=revision)
    env = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=10"}
    quiet = Runner(changes=False, secrets=[secret_of(url)])
    try:
        answer = quiet.read(
            *GIT, "ls-remote", "--symref", "--", url, revision, f"{revision}^{{}}", env=env, timeout=30
        )
    except (CommandFailed, TimedOut) as error:
        why = error.stderr.strip() if isinstance(error, CommandFailed) else ""
        why = " ".join(why.split()) or error.message
        note = f"{unresolved.shown} can't be asked from here, so the VM will be: {why}"
        return replace(unresolved, notes=(note,))
    said = [line.split("\t") for line in answer.stdout.splitlines()]
    refs = {ref: commit for commit, ref in said if not commit.startswith("ref: ")}
    heads = {ref: what.removeprefix("ref: ") for what, ref in said if what.startswith("ref: ")}
    for ref in (
        revision,
        f"refs/tags/{revision}^{{}}",
        f"refs/tags/{revision}",
        f"refs/heads/{revision}",
        f"{revision}^{{}}",
        f"refs/{revision}",
    ):  # gitrevisions(7), <refname>: in its order; an annotated tag's commit before the tag itself
        if ref in refs:
            head = heads.get(ref, ref)
            branch = head.removeprefix(_HEADS) if head.startswith(_HEADS) else ""
            return Resolved(
                name=name, shown=mask(url), asked=revision, url=url, commit=refs[ref], branch=branch
            )
    if not refs and _NAME.fullmatch(revision) and not _ABBREVIATED.fullmatch(revision):
        raise NoRevision(
            revision,
            f"{mask(url)} has no branch or tag {revision!r}",
            remedy="see 'source: revision:' in the farm file, or ask for another",
        )
    return unresolved
