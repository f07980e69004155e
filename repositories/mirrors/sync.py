"""repo-sync: a mirror of a repository on another host, by rsync(1) over ssh.

What the readers of a mirror can come to see is there before they can: packages, then metadata, then what
names those, the pointers last, and what is gone here is removed after all that. So a connection that is
cut at any moment leaves the mirror as it was, or as it is to become. It is sent from a snapshot of hard
links: the repository may be changed meanwhile.

One sync to a target runs at a time: by a lock beside the repository, which is enough, for a mirror bears
the mark of the one repository that it mirrors, and is refused to others."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from host.check import install
from host.file_lock import FileLock
from host.files import file_error, write_atomic
from host.leases import FileLeases
from host.printable import last_line
from host.processes import described
from host.run import CommandResult, Runner, which
from host.ssh_options import path_option
from inventory.errors import (
    CommandFailed,
    ConnectionLost,
    FarmhandError,
    NotFound,
    NotOurs,
    UsageError,
    WrongState,
)
from repositories.layout import Layout
from repositories.mirrors.snapshot import RepositorySnapshot, take_snapshot
from repositories.repository import Repository

_HOST = re.compile(r"\[?([A-Za-z0-9_](?:[A-Za-z0-9_.:-]*[A-Za-z0-9_])?)\]?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TARGET = re.compile(r"(?:([^@/]*)@)?(\[[^]]*\]|[^:/@]*):(?:(\d{1,5}):)?(/.*)", re.DOTALL)
_ALIVE = ("BatchMode=yes", "ServerAliveInterval=5", "ServerAliveCountMax=3", "ConnectTimeout=15")
_MARK = ".mirror-of-"
_STALLED = 60
"""Seconds without a byte after which rsync gives up."""
_LONG = 7 * 24 * 3600.0
_VANISHED = 24
_CUT = {10, 12, 20, 30, 35, 255}
"""rsync(1), EXIT VALUES: of the connection, not of what is at either end. 255 is ssh's."""
_MODES = "D0755,F0444"


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncTarget:
    """A directory on a host that ssh reaches. All that isn't said is as in the user's ssh configuration.
    ``host``: without brackets."""

    host: str
    directory: str
    user: str = ""
    port: int | None = None
    key: Path | None = None
    known_hosts: Path | None = None

    @classmethod
    def parse(cls, text: str) -> SyncTarget:
        """[USER@]HOST:[PORT:]/DIRECTORY. UsageError."""
        match = _TARGET.fullmatch(text)
        user, host, port, directory = match.groups() if match else ("", "", None, "")
        found = _HOST.fullmatch(host)
        if found is None or (user and not _USER.fullmatch(user)) or not directory.isprintable():
            raise UsageError(
                f"{text!r} is no place to mirror to", remedy="[USER@]HOST:/DIRECTORY, as for rsync"
            )
        if Path(directory) == Path("/"):
            raise UsageError(f"{text}: a mirror has a directory of its own")
        return cls(host=found[1], directory=directory, user=user or "", port=int(port) if port else None)

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"{user}{self.host}:{self.directory}"

    @property
    def ssh(self) -> tuple[str, ...]:
        """The command that rsync is to reach it by. It never asks, for nobody could answer."""
        argv = ["ssh", *(word for option in _ALIVE for word in ("-o", option))]
        if self.port:
            argv += ["-p", str(self.port)]
        if self.user:
            argv += ["-l", self.user]
        if self.key:
            argv += path_option("IdentityFile", self.key)
        if self.known_hosts:
            argv += path_option("UserKnownHostsFile", self.known_hosts)
        return tuple(argv)

    @property
    def place(self) -> str:
        """As rsync takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.directory.rstrip('/')}/"


@dataclass(frozen=True, slots=True)
class Synced:
    """``files``, ``bytes``: what was sent, of packages and metadata. ``removed``: files and directories
    that were removed there. ``channels``: the generation that each has there now."""

    target: str
    files: int
    bytes: int
    removed: int
    channels: dict[str, int]


def sync(
    repository: Repository,
    target: SyncTarget,
    runner: Runner,
    say: Callable[[str], None],
    *,
    remove: bool = False,
) -> Synced:
    """Bring a mirror to the repository's present state. ``remove``: what is gone here goes there, too.

    ConnectionLost: what arrived stays, and the mirror is whole. Busy: another one to that target runs.
    NotOurs: what is there is no mirror of this repository."""
    if not repository.exists:
        raise NotFound(f"there is nothing in repository {repository.name} yet")
    if which("rsync") is None:
        raise WrongState("rsync is not installed here", remedy=install("rsync"))
    layout = repository.layout
    with (
        FileLeases(layout.syncs).hold((f"the sync to {target}",), described(os.getpid())),
        repository.staging() as staging,
    ):
        mark = _mark(layout)
        rsync = _Rsync(target, runner)
        marked = _is_mirror(rsync, mark, repository)
        snapshot = take_snapshot(repository, staging.directory / "mirror")
        if not marked:
            os.link(layout.mirror_mark, snapshot.top / mark)
            rsync.send(snapshot.top, [mark])
        # 1. Packages.
        say(f"packages to {target}")
        rsync.send_all(layout.top, "pool")
        # 2. Metadata that nothing names yet, of the generations whose packages were all there.
        say(f"metadata to {target}")
        snapshot.forget_collected(repository)
        rsync.send(snapshot.top, snapshot.indexes())
        # 3. What names those: from here on a generation can be read by its number.
        rsync.send(snapshot.top, snapshot.entries())
        # 4. Keys, the lists for those who pin, pages.
        rsync.send(snapshot.top, snapshot.lists())
        # 5. The pointers.
        rsync.send(snapshot.top, snapshot.pointers())
        removed = 0
        if remove:
            say(f"what is gone, at {target}")
            removed = _remove(repository, snapshot, rsync)
    return Synced(str(target), rsync.files, rsync.bytes, removed, snapshot.heads)


def _remove(repository: Repository, snapshot: RepositorySnapshot, rsync: _Rsync) -> int:
    """Pointers first, packages last. Nothing is collected here meanwhile."""
    with FileLock(repository.layout.lock).hold(shared=True):
        snapshot.forget_collected(repository)
        counts = [
            rsync.remove(snapshot.top, "channels", "dists", "pages"),
            rsync.remove(snapshot.top, "generations", "published"),
            rsync.remove(repository.layout.top, "pool"),
        ]
    return sum(counts)


def _mark(layout: Layout) -> str:
    """The name of the file that a mirror of this repository has."""
    path = layout.mirror_mark
    try:
        if not path.exists():
            write_atomic(path, secrets.token_hex(8).encode(), mode=0o600)
        found = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise file_error(OSError(str(error)), path, "read") from error
    return _MARK + found


def _is_mirror(rsync: _Rsync, mark: str, repository: Repository) -> bool:
    """Whether what is there is a mirror of this repository, be it only begun; False: there is nothing.
    NotOurs."""
    names = rsync.names()
    marks = {name for name in names if name.startswith(_MARK)}
    if marks - {mark}:
        raise NotOurs(
            f"{rsync.target} is a mirror of another repository",
            remedy=f"give {repository.name} another directory there",
        )
    if names and not marks:
        raise NotOurs(
            f"{rsync.target} is no mirror of {repository.name}: it has {sorted(names)[0]}",
            remedy="name a directory that is empty, or isn't there yet",
        )
    return bool(marks)


class _Rsync:
    """Runs of rsync to one target. All that is sent is for all to read, whoever's it is here."""

    def __init__(self, target: SyncTarget, runner: Runner) -> None:
        self.target, self._runner = target, runner
        self.files = self.bytes = 0
        self._argv = (
            "rsync", "--secluded-args", f"--timeout={_STALLED}", f"--rsh={_quoted(target.ssh)}",
        )  # fmt: skip

    def names(self) -> set[str]:
        """What is in the directory there; nothing if there is none."""
        try:
            found = self._run("--list-only", self.target.place)
        except NotFound:
            return set()
        lines = (line.split(None, 4) for line in found.stdout.splitlines())
        return {words[4] for words in lines if len(words) == 5} - {"."}

    def send(self, top: Path, paths: Iterable[str]) -> None:
        """These files and links, each put in its place whole by a rename; hard links among them stay."""
        listed = "".join(f"{path}\0" for path in paths).encode()
        if listed:
            self._send(
                "--hard-links", "--from0", "--files-from=-", f"{top}/", self.target.place, input=listed
            )

    def send_all(self, top: Path, name: str) -> None:
        """A whole directory; what goes from it meanwhile is left out."""
        self._send("--recursive", str(top / name), self.target.place, ok=(0, _VANISHED))

    def remove(self, top: Path, *names: str) -> int:
        """Remove what isn't in these directories here, as well as what cut transfers left."""
        sources = [str(top / name) for name in names if (top / name).is_dir()]
        hidden = "--filter=hide .*"
        result = self._change(
            "--recursive", "--links", "--existing", "--ignore-existing", "--delete", hidden,
            "--stats", "--no-human-readable", *sources, self.target.place,
        )  # fmt: skip
        return _figure(result, "Number of deleted files")

    def _send(self, *words: str, input: bytes | None = None, ok: Sequence[int] = (0,)) -> None:
        result = self._change(
            "--links", "--times", "--perms", f"--chmod={_MODES}", "--fsync", "--mkpath",
            "--stats", "--no-human-readable", *words, input=input, ok=ok,
        )  # fmt: skip
        self.files += _figure(result, "Number of regular files transferred")
        self.bytes += _figure(result, "Total transferred file size")

    def _change(
        self, *words: str, input: bytes | None = None, ok: Sequence[int] = (0,)
    ) -> CommandResult:
        try:
            return self._runner.change(*self._argv, *words, timeout=_LONG, input=input, ok=ok)
        except CommandFailed as error:
            raise self._failure(error) from error

    def _run(self, *words: str) -> CommandResult:
        try:
            return self._runner.read(*self._argv, *words, timeout=10 * _STALLED)
        except CommandFailed as error:
            raise self._failure(error) from error

    def _failure(self, error: CommandFailed) -> FarmhandError:
        """What it is about, in a line: rsync's own first one, where nobody else said why."""
        target, said = self.target, error.stderr
        lines = [line for line in said.splitlines() if line.strip()]
        others = [line for line in lines if not line.startswith("rsync")]  # ssh's, a shell's
        why = last_line("\n".join(others) or (lines or [""])[0], 200) or f"status {error.status}"
        if "change_dir" in said and "No such file" in said and error.status == 23:
            return NotFound(f"{target}: {why}")
        if error.status == 127 or re.search(r"rsync: (?:command )?not found", said):
            return WrongState(
                f"{target.host} has no rsync", remedy=f"there, {install('rsync')}", detail=said
            )
        if "unknown option" in said:
            return WrongState(
                f"{target.host}'s rsync is too old: {why}", remedy="3.2.4 or later is needed there"
            )
        if error.status in _CUT:
            return ConnectionLost(
                f"{target}: {why}", detail=said,
                remedy="see that ssh gets there without a question, and run it again: what arrived "
                "stays, and the mirror is whole",
            )  # fmt: skip
        return CommandFailed(
            f"{target}: {why}", argv=error.argv, status=error.status, stderr=said, detail=error.detail
        )


def _quoted(argv: Iterable[str]) -> str:
    """A command for --rsh: rsync itself parts it at blanks, and knows quotes, doubled within."""
    return " ".join("'" + word.replace("'", "''") + "'" for word in argv)


def _figure(result: CommandResult, name: str) -> int:
    match = re.search(rf"^{name}: (\d+)", result.stdout, re.MULTILINE)
    return int(match[1]) if match else 0
