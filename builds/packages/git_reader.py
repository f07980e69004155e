"""Reads commits of repositories of this machine, whoever owns them, out of a git directory of our own
that borrows their objects (git(1), GIT_ALTERNATE_OBJECT_DIRECTORIES). So none of their configuration,
hooks, attributes and replaced objects is looked at, nothing is written to them, and what a tree holds
is what is read: ``export-ignore``, ``export-subst``, line ends and filters of a .gitattributes change
nothing."""

from __future__ import annotations

import re
import tarfile
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from builds.source import GIT, LONG, reason_of
from host.run import CommandResult, Runner
from inventory.errors import WrongState

_ENV = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "GIT_CONFIG_COUNT": "0",
        "GIT_ALLOW_PROTOCOL": "none"}  # fmt: skip
_CONFIG = "[core]\n\trepositoryformatversion = {}\n\tbare = true\n"
_SHA256 = "[extensions]\n\tobjectFormat = sha256\n"
_ATTRIBUTES = "* -export-ignore -export-subst -text -crlf -eol -ident -filter -working-tree-encoding\n"
_COMMIT = re.compile(
    r"tree (?P<tree>[0-9a-f]{40,64})\n(?s:.*?)"
    r"^committer [^\n]* (?P<when>-?[0-9]{1,12}) [-+0-9]+(?s:\n.*)?",
    re.MULTILINE,
)
_SUBJECT = 500  # characters


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """What a tree has. ``mode``: as git writes it: 100644, 120000. ``size`` in bytes; -1: of none."""

    path: str
    mode: str
    id: str
    size: int

    @property
    def is_file(self) -> bool:
        return self.mode.startswith("100")


@dataclass(frozen=True, slots=True)
class CommitFacts:
    """``tree``: of the whole commit. ``when``: of the committer, seconds since 1970."""

    tree: str
    when: int
    subject: str


class GitReader:
    """``scratch``: a directory of ours, which goes when it is no longer needed."""

    def __init__(self, runner: Runner, scratch: Path) -> None:
        self._runner = runner
        self._scratch = scratch
        for name, config in (("sha1", _CONFIG.format(0)), ("sha256", _CONFIG.format(1) + _SHA256)):
            place = scratch / name
            for directory in ("objects", "refs", "info"):
                (place / directory).mkdir(parents=True)
            (place / "HEAD").write_text("ref: refs/heads/none\n")
            (place / "config").write_text(config)
            (place / "info" / "attributes").write_text(_ATTRIBUTES)

    def of(self, objects: Path, id: str) -> ObjectReader:
        """For what is in the directory of objects that has the object ``id``."""
        kind = "sha256" if len(id) == 64 else "sha1"
        return ObjectReader(self._runner, self._scratch / kind, objects, self._scratch)


class ObjectReader:
    """All of it raises WrongState where the repository lacks what it should have."""

    def __init__(self, runner: Runner, own: Path, objects: Path, scratch: Path) -> None:
        self._runner = runner
        borrowed = str(objects).replace("\\", "\\\\").replace('"', '\\"')
        alternates = f'GIT_ALTERNATE_OBJECT_DIRECTORIES="{borrowed}"'
        self._git = (*GIT[:-1], alternates, GIT[-1], f"--git-dir={own}")
        self._objects = objects
        self._scratch = scratch

    def ask(self, *args: str | Path, ok: Sequence[int] = (0,), timeout: float = LONG) -> CommandResult:
        return self._runner.read(*self._git, *args, ok=ok, timeout=timeout, env=_ENV)

    def facts(self, commit: str) -> CommitFacts:
        head, _, message = self._told("cat-file", "commit", commit).partition("\n\n")
        match = _COMMIT.fullmatch(head)
        if match is None:
            raise WrongState(f"git can't read {self._objects.parent}: commit {commit} is malformed")
        subject = " ".join(message.lstrip("\n").partition("\n\n")[0].split("\n"))
        return CommitFacts(match["tree"], int(match["when"]), subject.strip()[:_SUBJECT])

    def peeled(self, id: str) -> str:
        """The commit that an object is, or as a tag leads to; "": it is none, or not there."""
        found = self.ask("rev-parse", "-q", "--verify", f"{id}^{{commit}}", ok=(0, 1, 128))
        return found.stdout.strip() if found.status == 0 else ""

    def count(self, commit: str) -> int:
        """Of the commits that lead to it, itself among them."""
        return int(self._told("rev-list", "--count", commit, "--"))

    def directories(self, tree: str) -> Mapping[str, str]:
        """The trees right in a tree, by their names."""
        lines = self._told("ls-tree", "-z", tree).split("\0")
        found = [line.partition("\t") for line in lines if line.startswith("040000 ")]
        return {name: what.split()[2] for what, _, name in found}

    def entries(self, tree: str) -> list[TreeEntry]:
        """All that is in a tree and in those within it, but for these themselves."""
        found = []
        for line in self._told("ls-tree", "-r", "-l", "-z", tree).split("\0"):
            if line:
                what, _, path = line.partition("\t")
                mode, _, id_, size = what.split()
                found.append(TreeEntry(path, mode, id_, int(size) if size != "-" else -1))
        return found

    def files(self, tree: str, paths: Collection[str]) -> Mapping[str, bytes]:
        """What these files of a tree hold."""
        with tempfile.TemporaryDirectory(dir=self._scratch) as directory:
            out = Path(directory) / "tar"
            self.archive(tree, out, *(f":(literal){path}" for path in paths))
            with tarfile.open(out) as tar:
                found = {each.name: tar.extractfile(each) for each in tar if each.isreg()}
                return {name: file.read() for name, file in found.items() if file}

    def archive(self, tree: str, out: Path, *paths: str) -> None:
        """A tar archive of a tree, or of some paths in it."""
        self._told("archive", "--format=tar", "-o", out, tree, *paths)

    def _told(self, *args: str | Path) -> str:
        found = self.ask(*args, ok=range(256))
        if found.status == 0:
            return found.stdout
        partial = any((self._objects / "pack").glob("*.promisor"))
        raise WrongState(
            f"git can't read {self._objects.parent}: {reason_of(found)}",
            remedy="it is a partial clone: fetch the rest with git fetch --refetch --no-filter"
            if partial
            else f"see git --git-dir={self._objects.parent} fsck",
        )
