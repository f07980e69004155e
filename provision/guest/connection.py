"""One ssh connection to a VM, kept for many commands and files.

A script reaches the guest on the command's standard input and is read whole before it begins, so
that neither its length nor a command that reads standard input can spoil it (shell.py). The
same channel then is the dead man's switch: as long as it is open the script may run; once it is closed
- by us, for its time is up, by a lost network, by the death of this process - a watcher in the guest
ends the script and its children.

Files go the same way, through cat(1): a server without SFTP needs no other. Beside sh, what is needed
there is little, and looked at when the connection is made.

A guest is a stranger: whatever it sends, nothing but bytes is taken from it, and no more of them than
the caller says. What it tells of a file (name, size, sum) is checked before one is made here, and held
against what then comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import posixpath
import re
import secrets
import shlex
import time
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

import asyncssh

from host.files import check_room, file_error, make_directory, open_new
from host.printable import last_line
from host.run import Runner, hang_up
from inventory.errors import (
    Call,
    ConnectionLost,
    DriverFailed,
    FarmhandError,
    NotFound,
    Unfit,
    Unsupported,
    UsageError,
)
from inventory.model import Limits
from inventory.sizes import format_size
from provision.git import reading
from provision.guest.remote import Endpoint, Ready
from provision.guest.shell import ANSWER_MAX, Shell, ask, ended, start
from provision.guest.ssh_connection import dial, facts

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[A-Za-z0-9_./*?\[\]!^+=:,@%-]")  # left to the guest's shell in file patterns
_SCRIPT_MAX = 120_000  # one argument of execve(2) has at most 128 KiB
Read = Callable[[int], Awaitable[bytes]]
Write = Callable[[bytes], Awaitable[object]]

_BLOCK = 2**20
_LINGER = 2.0  # seconds for output still under way after a script's exit
_GRACE = 10  # seconds between SIGTERM and SIGKILL in the guest
_DAEMON = re.compile(r"^\[\d+\] ")  # as git-daemon(1) begins its lines
_GIT_SAID_MAX = 20
_GIT_AT_ONCE = 16
"""Clients of an offered repository that are served: each is a program here."""

# sh(1), POSIX. Channel's stdin on 3. setsid(1) makes the script the leader of a process group, $t, that
# everything it starts belongs to. The rest must not hold the output open, or the channel would never
# end, nor write to it, or a lost connection would end it by SIGPIPE before its work is done.
_WRAPPER = f"""
exec 3<&0 </dev/null 2>&1
setsid sh -euc SCRIPT sh 3<&- &
t=$!
exec >/dev/null 2>&1
(
  while read -r _; do :; done
  kill -s TERM -- "-$t" || kill "$t"
  n=0
  while [ "$n" -lt {_GRACE} ] && kill -s 0 -- "-$t"; do sleep 1; n=$((n + 1)); done
  kill -s KILL -- "-$t"
) <&3 &
w=$!
wait "$t"
r=$?
[ "$r" -eq 0 ] || kill -s KILL -- "-$t"
kill "$w"
exit "$r"
"""

# Root runs the whole of it, so that the watcher may end what root runs. It comes on standard input, up
# to the line END: sudo writes arguments into the system's log.
_AS_ROOT = """
set --
[ "$(id -u)" = 0 ] || set -- sudo -n -- env HOME="$HOME"
exec "$@" sh -c '
p=$(while IFS= read -r l; do printf "%s\\n" "$l"; [ "$l" = END ] && break; done)
case $p in *END) eval "${p%END}";; *) exit 125;; esac'
"""
_ROOT = '[ "$(id -u)" = 0 ] || sudo -n true'

# What is needed there, judged by its use where names differ.
_NEEDS = ("cat", "kill", "ls", "mkdir", "mv", "rm", "setsid", "sleep", "wc")
_SUMS = ("sha256sum", "shasum -a 256", "openssl dgst -sha256 -r", "sha256 -q", "busybox sha256sum")
_LOOK = f"""
for c in {shlex.join(_NEEDS)}; do command -v "$c" >/dev/null || echo "lacks $c"; done
for c in {shlex.join(_SUMS)}; do
  case $(printf abc | $c 2>/dev/null) in ba7816bf8f01cfea*) echo "sums $c"; break;; esac
done
"""


# Of each file that a pattern stands for its size, then its sum, and its path up to a NUL; the first one
# that is too much without a sum, and none after it: sums of what is not taken may take for ever.
_LIST = """
exec 2>/dev/null
set +e
count=0 total=0
for f in PATTERN; do
  [ -f "$f" ] || continue
  set -f; set -- $(ls -dnL -- "$f"); set +f
  size=${5:-}
  [ -n "$size" ] || continue
  count=$((count + 1)) total=$((total + size)) sum=-
  [ "$count" -gt FILES ] || [ "$size" -gt SIZE ] || [ "$total" -gt TOTAL ] || sum=$(SUM <"$f")
  printf "%s %s\\n%s\\0\\n" "$size" "$sum" "$f"
  [ "$sum" != - ] || break
done
true
"""
_LIST_SECONDS = 3600.0
_ENTRY_MAX = 8192  # bytes of such an answer for one file: PATH_MAX is 4096
_LISTED = re.compile(r"([0-9]{1,18}) ([0-9a-f]{64})?[^\n]*\n(.+)", re.DOTALL)
_WRITTEN = re.compile(rb"([0-9a-f]{64})\b[^\n]*\n\s*([0-9]{1,18})\s*")
_NAME_MAX = 255  # bytes (limits.h)


@dataclass(frozen=True, slots=True)
class RunResult:
    """``status`` as the shell gives it: 128 + n for a script ended by signal n; 124 for one that we
    ended: ``timed_out``, or ``cut``, for it printed more than it may."""

    status: int
    timed_out: bool
    cut: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Moved:
    """A file that is carried, the same at both ends by sha256. ``size`` in bytes."""

    name: str
    path: str  # where it was
    size: int
    sha256: str


class _Unlike(DriverFailed):
    """A file came otherwise than it was said to be."""


class Connection:
    """An ssh connection to a VM, made with ``Connection.open``: an async context manager. Several tasks
    may use it at once."""

    def __init__(
        self, endpoint: Endpoint, ssh: asyncssh.SSHClientConnection, runner: Runner | None = None
    ) -> None:
        self.endpoint = endpoint
        self._ssh = ssh
        self._runner = runner or Runner(changes=False)
        self._sum = ""  # the command that makes sha256 sums there
        self._git_said: list[str] = []
        self._git_clients = 0
        self._listeners: list[asyncssh.SSHListener] = []

    @classmethod
    async def open(cls, endpoint: Endpoint, *, runner: Runner | None = None) -> Connection:
        """Connect and log in. Conflict for a wrong host key; DriverFailed where nobody answers, or the
        login runs no commands; Unsupported where the guest lacks a tool that is needed."""
        connection = cls(endpoint, await dial(endpoint), runner)
        try:
            await connection._look()
        except BaseException:
            await connection.close()
            raise
        return connection

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends everything still running over it. Never raises, never waits for a dead guest."""
        for listener in self._listeners:
            listener.close()
        self._ssh.close()
        with contextlib.suppress(TimeoutError, asyncssh.Error, OSError):
            await asyncio.wait_for(self._ssh.wait_closed(), 3)
        self._ssh.abort()

    @property
    def closed(self) -> bool:
        return self._ssh.is_closed()

    # -- commands -----------------------------------------------------------------------------

    async def run(
        self,
        script: str,
        *,
        env: Mapping[str, str] | None = None,
        timeout: float,
        log: Callable[[bytes], None],
        most: int = ANSWER_MAX,
        root: bool = False,
    ) -> RunResult:
        """Run ``script`` by ``sh -eu`` in the login's home, standard input closed; with ``root`` by
        sudo(8), unless the login is root. Both outputs go to ``log`` in their order, as raw bytes, as
        they are made. After ``timeout`` seconds, or more than ``most`` bytes, it is ended in the guest,
        children too; likewise when this call is cancelled, or the connection lost.

        ConnectionLost when it is, UsageError for a script that can't be passed on.
        """
        text = _exports(env or {}) + script
        data = text.encode()
        if len(data) > _SCRIPT_MAX or b"\0" in data:
            raise UsageError(
                f"a script for {self.endpoint.vm} has {len(data)} bytes or a NUL byte",
                remedy=f"keep it under {_SCRIPT_MAX} bytes: put the rest into the source",
            )
        started = time.monotonic()
        wrapped = _WRAPPER.replace("SCRIPT", shlex.quote(text))
        end = secrets.token_hex(16)
        program = _AS_ROOT.replace("END", end) if root else wrapped
        channel, shell = await self._start(program, log, most=most)
        if root:
            with contextlib.suppress(OSError):  # it has ended: its status tells
                channel.write(f"{wrapped}\n{end}\n".encode())
        late = False
        try:
            async with asyncio.timeout(max(timeout, 0.001)):
                await shell.settled()
        except TimeoutError:
            late = True
        except asyncio.CancelledError:
            await asyncio.shield(_end_it(channel, shell))
            raise
        if late or shell.over:
            await _end_it(channel, shell)
        await shell.drained(_LINGER)  # may bring more than it may print, too
        seconds = time.monotonic() - started
        await ended(channel)
        if late or shell.over:
            return RunResult(124, late, shell.over, seconds)  # as timeout(1) has it
        if shell.status is None:
            raise self._lost(shell.error)
        return RunResult(shell.status, False, False, seconds)

    async def may_be_root(self) -> bool:
        """Whether the login is root, or may be by sudo(8) without a password."""
        return (await self.run(_ROOT, timeout=60, log=lambda _: None)).status == 0

    async def output(self, script: str, *, timeout: float = 60, most: int = ANSWER_MAX) -> str:
        """What a short script prints. DriverFailed if it fails, or prints more than ``most`` bytes."""
        return (await self._printed(script, timeout, most)).decode(errors="replace")

    async def _printed(self, script: str, timeout: float, most: int) -> bytes:
        parts: list[bytes] = []
        result = await self.run(script, timeout=timeout, log=parts.append, most=most)
        printed = b"".join(parts)
        why = ""
        if result.cut:
            why = f"printed more than {format_size(most)}"
        elif result.timed_out:
            why = f"was not done within {timeout:g} s"
        elif result.status:
            said = last_line(printed.decode(errors="replace"), 300)
            why = f"failed with {result.status}: {said or 'no output'}"
        if why:
            raise DriverFailed(f"a command {why}", vm=self.endpoint.vm)
        return printed

    async def facts(self) -> Ready:
        """Boot id, uptime and clock skew, now."""
        return await facts(self._ssh)

    async def set_clock(self) -> float:
        """Set the guest's clock to ours; returns the skew that is left, seconds. DriverFailed without
        the right to (a login that is neither root nor has sudo without a password)."""
        await self.output(
            f'when=@{time.time() + 0.05:.3f}; [ "$(id -u)" = 0 ] && as= || as="sudo -n"; '
            '$as date -u -s "$when" >/dev/null 2>&1 || '
            '$as date -u -s "${when%.*}" >/dev/null'  # busybox's knows whole seconds only
        )
        return (await self.facts()).skew

    async def _look(self) -> None:
        with self._named():
            answer = await ask(self._ssh, _LOOK)
        if answer.status is None:
            raise self._lost(answer.error)
        said = set(answer.text.splitlines())
        self._sum = next((command for command in _SUMS if f"sums {command}" in said), "")
        lacks = [command for command in _NEEDS if f"lacks {command}" in said]
        if not self._sum:
            lacks.append("sha256sum")
        if lacks:
            raise Unsupported(
                f"{self.endpoint.user} finds no {', '.join(lacks)} there",
                vm=self.endpoint.vm,
                remedy="they come with coreutils and util-linux, or busybox; and must be in the PATH "
                "that a command over ssh gets",
            )

    async def _start(
        self,
        program: str,
        log: Callable[[bytes], None],
        ended: Callable[[], None] | None = None,
        most: int | None = None,
    ) -> tuple[asyncssh.SSHClientChannel[bytes], Shell]:
        with self._named():
            return await start(self._ssh, program, log, ended, most)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of a shell as those of this VM."""
        try:
            yield
        except DriverFailed as error:
            raise DriverFailed(
                error.message, vm=self.endpoint.vm, remedy=error.remedy, detail=error.detail
            ) from None
        except (asyncssh.Error, OSError) as error:
            raise self._lost(error) from None

    def _lost(self, error: BaseException | None) -> ConnectionLost:
        why = str(error or "").strip() or "the connection was closed"
        return ConnectionLost(
            f"the ssh connection to {self.endpoint.place} was lost: {why}",
            vm=self.endpoint.vm,
            remedy=("see ", Call("console", vm=self.endpoint.vm)),
        )

    # -- files --------------------------------------------------------------------------------

    async def list(self, patterns: Sequence[str], limits: Limits) -> tuple[Moved, ...]:
        """The regular files that shell patterns (relative to the login's home) stand for, with size
        and sha256 as the guest sees them. NotFound for a pattern without any. Unfit if they are more
        than the limits allow, which is known before any is read, or have names that can't be kept."""
        found: dict[str, Moved] = {}
        for pattern in patterns:
            files = await self._listed(_escape(pattern), limits)
            if not files:
                raise NotFound(f"no file matches {pattern}", vm=self.endpoint.vm)
            found |= files
        self._check(found.values(), limits)
        names = Counter(file.name for file in found.values())
        if twice := next((name for name, times in names.items() if times > 1), ""):
            raise self._refused(f"two files called {twice} match {' '.join(patterns)}")
        return tuple(found.values())

    async def _listed(self, pattern: str, limits: Limits) -> dict[str, Moved]:
        """By their paths. ``pattern``: a word for the guest's shell."""
        values = {
            "FILES": str(limits.files), "SIZE": str(limits.file_size), "TOTAL": str(limits.total_size),
            "SUM": self._sum, "PATTERN": pattern,
        }  # fmt: skip
        script = re.sub("[A-Z]{3,}", lambda word: values[word[0]], _LIST)
        text = await self._printed(script, _LIST_SECONDS, (limits.files + 1) * _ENTRY_MAX)
        found: dict[str, Moved] = {}
        for entry in text.decode(errors="surrogateescape").split("\0\n")[:-1]:
            said = _LISTED.fullmatch(entry)
            if said is None:
                raise self._failed("listing files", f"{entry[-300:]!r} can't be read")
            size, sha256, path = said.groups(default="")
            found[path] = Moved(self._name(path), path, int(size), sha256)
        self._check(found.values(), limits)
        if closed := next((file for file in found.values() if not file.sha256), None):
            raise self._failed(f"reading {closed.path}", "it may not be read")
        return found

    def _name(self, path: str) -> str:
        """The name it is to have here. Unfit if it can't be a file's, or can't be shown."""
        name = path.rpartition("/")[2]
        if not path.isprintable():  # nor is what isn't UTF-8
            raise self._refused(f"a file's name has bytes that can't be shown: {path[-300:]!r}")
        if name in ("", ".", "..") or len(name.encode()) > _NAME_MAX:
            raise self._refused(f"{path[-300:]!r} is no name for a file")
        return name

    def _check(self, files: Collection[Moved], limits: Limits) -> None:
        """Unfit if they are too much."""
        large = next((file for file in files if file.size > limits.file_size), None)
        if len(files) > limits.files:
            why, key = f"more than {limits.files} files match", "files"
        elif large:
            why = (
                f"{large.path} has {format_size(large.size)}, more than {format_size(limits.file_size)}"
            )
            key = "file_size"
        elif sum(file.size for file in files) > limits.total_size:
            why = f"the files that match have more than {format_size(limits.total_size)} together"
            key = "total_size"
        else:
            return
        raise self._refused(why, remedy=limits.remedy(key))

    async def get(self, file: Moved, directory: Path) -> None:
        """Fetch a file that was listed into ``directory``: it appears there complete and verified, or
        not at all; blocks of zeros take no room. NoSpace; Unfit if it has changed since."""
        make_directory(directory, mode=0o755)
        part = directory / f".{secrets.token_hex(8)}.part"
        try:
            check_room(directory, file.size)
            with open_new(part, mode=0o644) as out:
                async with self._reading(file) as read:
                    digest = await _copy(read, _into(out, directory))
                out.truncate()
                out.flush()
                os.fsync(out.fileno())
            self._same(file, digest)
            part.replace(directory / file.name)
        except _Unlike as error:
            raise await self._judged(file, error) from None
        except OSError as error:
            raise file_error(error, directory / file.name, "write") from error
        finally:
            part.unlink(missing_ok=True)

    async def put(self, files: Sequence[Path], directory: str) -> tuple[Moved, ...]:
        """Bring files into the guest's ``directory`` (made if missing), complete or not at all."""
        moved = []
        for path in files:
            with path.open("rb") as source:
                moved.append(await self._receive(_from(source), path.name, str(path), directory))
        return tuple(moved)

    async def put_file(self, file: Path, there: str, *, sha256: str, ready: Sequence[str] = ()) -> Moved:
        """Bring one file to a path in the guest, complete or not at all; its directory is made if it is
        missing. ``ready``: the beginning of commands that the file is given to before it gets its name,
        such as ``chmod 644 --``. DriverFailed unless it has that sha256 here and there."""
        home, name = posixpath.split(there)

        with file.open("rb") as source:
            return await self._receive(_from(source), name, str(file), home or ".", sha256, ready)

    async def carry(self, file: Moved, target: Connection, directory: str) -> None:
        """Carry a file that was listed to another VM through this machine, nothing kept here; verified
        on both ends. Unfit if it has changed since."""
        try:
            async with self._reading(file) as read:
                await target._receive(read, file.name, file.path, directory, file.sha256)
        except _Unlike as error:
            raise await self._judged(file, error) from None

    @contextlib.asynccontextmanager
    async def _reading(self, file: Moved) -> AsyncIterator[Read]:
        """A file's bytes, as fast as they are taken; one more than it has, if there are more. Reading
        raises DriverFailed if they aren't all."""
        left = file.size + 1
        program = f"exec cat <{shlex.quote(file.path)}"
        async with self.printing(program, f"reading {file.path}") as all_of_it:

            async def read(size: int) -> bytes:
                nonlocal left
                data = await all_of_it(min(size, left)) if left else b""
                left -= len(data)
                return data

            yield read

    @contextlib.asynccontextmanager
    async def printing(self, program: str, doing: str) -> AsyncIterator[Read]:
        """What a program prints on its standard output, as fast as it is taken. At its end reading
        raises DriverFailed if it fails: ``doing`` says what it was to do; ConnectionLost."""
        ahead = asyncio.StreamReader(_BLOCK)
        channel, shell = await self._start(program, ahead.feed_data, ahead.feed_eof)
        ahead.set_transport(channel)  # type: ignore[arg-type]  # it pauses and resumes reading

        async def read(size: int) -> bytes:
            if data := await ahead.read(size):
                return data
            await shell.exited.wait()
            if shell.status is None:
                raise self._lost(shell.error)
            if shell.status:
                why = shell.said() or "no reason given"
                raise _Unlike(f"{doing}: {why}", vm=self.endpoint.vm)
            return b""

        try:
            yield read
        finally:
            await ended(channel)

    async def feed(self, program: str, read: Read, doing: str) -> tuple[str, bytes]:
        """Give a program all that is read, as its standard input. Returns the sha256 of that, and what
        the program prints. DriverFailed if it fails; ConnectionLost."""
        answer: list[bytes] = []
        channel, shell = await self._start(program, answer.append, most=ANSWER_MAX)

        async def write(data: bytes) -> None:
            with contextlib.suppress(OSError):  # it has ended: its status tells
                channel.write(data)
            await shell.drain()

        try:
            digest = await _copy(read, write)
            with contextlib.suppress(OSError):
                channel.write_eof()
            await shell.settled()
            await shell.drained(_LINGER)
        finally:
            await ended(channel)
        if shell.status is None and not shell.over:
            raise self._lost(shell.error)
        if shell.status:
            raise self._failed(doing, shell.said())
        return digest, b"".join(answer)

    async def _receive(
        self,
        read: Read,
        name: str,
        path: str,
        directory: str,
        sha256: str = "",
        ready: Sequence[str] = (),
    ) -> Moved:
        home = PurePosixPath(directory.removeprefix("~/"))
        part, final = str(home / f".{secrets.token_hex(8)}.part"), str(home / name)
        here, there = shlex.quote(part), shlex.quote(final)
        try:
            digest, answer = await self.feed(
                f"mkdir -p -- {shlex.quote(str(home))} && cat >{here} && "
                f"{self._sum} <{here} && wc -c <{here}",
                read,
                f"writing {final}",
            )
            said = _WRITTEN.fullmatch(answer)
            if said is None:
                raise self._failed(f"writing {final}", "what it says of it can't be read")
            seen, size = said[1].decode(), int(said[2])
            self._same(Moved(name, path, size, sha256 or digest), digest)
            self._same(Moved(name, path, size, seen), digest)
            # into a directory of that name it would be moved silently
            await self.output(
                f"[ ! -d {there} ] || {{ echo {there} is a directory; exit 1; }}\n"
                + "".join(f"{command} {here}\n" for command in ready)
                + f"mv -f -- {here} {there}"
            )
        except BaseException:
            if not self.closed:
                with contextlib.suppress(DriverFailed):
                    await self.output(f"rm -f -- {here}")
            raise
        return Moved(name, path, size, digest)

    def _same(self, file: Moved, digest: str) -> None:
        if file.sha256 != digest:
            raise _Unlike(
                f"{file.path} arrived as sha256 {digest[:12]}..., "
                f"but the guest says {file.sha256[:12]}...",
                vm=self.endpoint.vm,
                remedy="memory or disk is bad, there or here",
            )

    async def _judged(self, file: Moved, error: _Unlike) -> FarmhandError:
        """Unfit if it is another file there by now, else the error."""
        alone = Limits(files=1, file_size=file.size, total_size=file.size)
        try:
            if await self._listed(shlex.quote(file.path), alone) == {file.path: file}:
                return error
        except Unfit:  # it grew
            pass
        return self._refused(
            f"{file.path} changed while it was read", remedy="end what writes it before the step ends"
        )

    def _refused(self, why: str, remedy: str = "") -> Unfit:
        return Unfit(why, vm=self.endpoint.vm, remedy=remedy)

    def _failed(self, doing: str, why: str) -> DriverFailed:
        return DriverFailed(f"{doing}: {why or 'no reason given'}", vm=self.endpoint.vm)

    # -- the source ---------------------------------------------------------------------------

    async def offer_git(self, repository: Path, *, name: str) -> str:
        """Serve one git repository of this machine to the guest, for fetching only, as long as the
        connection lasts; returns its URL in the guest. It goes over this very connection: a listener
        on the guest's loopback, each of whose clients gets a ``git daemon`` of its own here.

        Unsupported where the guest's sshd forwards no ports.
        """
        inner = repository / ".git"  # --strict-paths wants the very directory
        where = str((inner if inner.is_dir() else repository).resolve())
        argv = (
            "git", "daemon", "--inetd", "--export-all", "--strict-paths", "--timeout=600",
            "--log-destination=stderr", "--informative-errors",
            "--disable=receive-pack", "--disable=upload-archive",
            f"--interpolated-path={where.replace('%', '%%')}", where,
        )  # fmt: skip
        # any commit may be asked for: GIT_REVISION may be one that no branch leads to
        env = reading({"uploadpack.allowAnySHA1InWant": "true"})

        async def handle(reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]) -> None:
            if self._git_clients >= _GIT_AT_ONCE:
                self._git_says(f"more than {_GIT_AT_ONCE} clients at once: one was refused")
                writer.close()
                return
            self._git_clients += 1
            try:
                await serve(reader, writer)
            finally:
                self._git_clients -= 1

        async def serve(reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]) -> None:
            process = await self._runner.serve(*argv, env=env)
            assert process.stdin and process.stdout and process.stderr
            inwards = asyncio.ensure_future(_pump(reader, process.stdin))
            errors = asyncio.ensure_future(self._listen(process.stderr))
            try:
                await _pump(process.stdout, writer)
                await errors
            finally:
                inwards.cancel()
                errors.cancel()
                await hang_up(process)
                with contextlib.suppress(asyncssh.Error, OSError):
                    writer.close()

        port = await self._listening(
            self._ssh.start_server(lambda _host, _port: handle, "127.0.0.1", 0, encoding=None),
            repository,
            "give 'source: repository:' as a URL that the VM reaches",
        )
        return f"git://127.0.0.1:{port}/{name}.git"

    async def offer_port(self, here: int, what: Path, *, there: int = 0) -> int:
        """Let the guest reach a port of this machine's loopback by one of its own, as long as the
        connection lasts; returns that one. ``what``: what is behind it. ``there``: the port that it is
        to be; 0: any.

        Unsupported where the guest's sshd forwards no ports."""
        return await self._listening(
            self._ssh.forward_remote_port("127.0.0.1", there, "127.0.0.1", here),
            what,
            "give the repository a 'url' that the VM reaches",
        )

    async def _listening(
        self, asked: Awaitable[asyncssh.SSHListener], what: Path, otherwise: str
    ) -> int:
        try:
            listener = await asked
        except (asyncssh.Error, asyncssh.ChannelListenError, OSError) as error:
            if self.closed:
                raise self._lost(error) from None
            raise Unsupported(
                f"its sshd forwards no ports, so {what} can't be offered: "
                f"{str(error).strip() or type(error).__name__}",
                vm=self.endpoint.vm,
                remedy=f"allow it there: AllowTcpForwarding yes in sshd_config; or {otherwise}",
            ) from None
        self._listeners.append(listener)
        return listener.get_port()

    async def _listen(self, errors: asyncio.StreamReader) -> None:
        while True:
            try:
                line = await errors.readline()
            except ValueError:  # one without an end
                continue
            except OSError:
                return
            if not line:
                return
            if text := _DAEMON.sub("", last_line(line.decode(errors="replace"), 300)):
                self._git_says(text)

    def _git_says(self, text: str) -> None:
        if len(self._git_said) < _GIT_SAID_MAX and text not in self._git_said:
            self._git_said.append(text)

    def git_said(self) -> tuple[str, ...]:
        """What went wrong here, since this was last asked, while a repository was offered."""
        said = tuple(self._git_said)
        self._git_said.clear()
        return said


async def _end_it(channel: asyncssh.SSHClientChannel[bytes], shell: Shell) -> None:
    """Close the dead man's switch and wait until the guest has ended the script; one that hangs is let
    go of."""
    with contextlib.suppress(OSError, TimeoutError, asyncssh.Error):
        channel.write_eof()
        await asyncio.wait_for(shell.exited.wait(), _GRACE + 5)


async def _pump(reader: Any, writer: Any) -> None:
    """Carry bytes between a process's pipes and an ssh channel until either end closes."""
    with contextlib.suppress(asyncssh.Error, OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


def _into(out: BinaryIO, directory: Path) -> Write:
    """A new file in the directory, as long as there is room; zeros become holes."""

    def write(data: bytes) -> None:
        check_room(directory, len(data))
        if data.lstrip(b"\0"):
            out.write(data)
        else:
            out.seek(len(data), os.SEEK_CUR)

    return lambda data: asyncio.to_thread(write, data)


def _from(source: BinaryIO) -> Read:
    return lambda size: asyncio.to_thread(source.read, size)


async def _copy(read: Read, write: Write) -> str:
    """Read and write side by side, a block ahead; returns the sha256."""
    digest = hashlib.sha256()
    data = await read(_BLOCK)
    while data:
        digest.update(data)
        data, _ = await asyncio.gather(read(_BLOCK), write(data))
    return digest.hexdigest()


def _exports(env: Mapping[str, str]) -> str:
    """Lines that set a script's environment. sshd drops most of what a client sends (sshd_config(5),
    AcceptEnv), so the script brings it."""
    for name in env:
        if not _VARIABLE.fullmatch(name):
            raise UsageError(f"{name!r} is not the name of an environment variable")
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


def _escape(pattern: str) -> str:
    """A pattern for the guest's shell: its wildcards stay, all else is itself."""
    home, rest = ('"$HOME"/', pattern[2:]) if pattern.startswith("~/") else ("", pattern)
    text = "".join(c if _PLAIN.match(c) else f"\\{c}" if c != "\n" else "'\n'" for c in rest)
    return home + (f"./{text}" if not home and text.startswith("-") else text)
