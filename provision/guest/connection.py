"""One ssh connection to a VM, kept for many commands and files.

A script reaches the guest on the command's standard input and is read whole before it begins, so
that neither its length nor a command that reads standard input can spoil it (shell.py). The
same channel then is the dead man's switch: as long as it is open the script may run; once it is closed
- by us, for its time is up, by a lost network, by the death of this process - a watcher in the guest
ends the script and its children.

Files go the same way, through cat(1): a server without SFTP needs no other. Beside sh, what is needed
there is little, and looked at when the connection is made.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

import asyncssh

from host.files import make_directory, open_new
from host.run import Runner, hang_up
from inventory.errors import (
    Call,
    Conflict,
    ConnectionLost,
    DriverFailed,
    NotFound,
    Unsupported,
    UsageError,
)
from provision.git import reading
from provision.guest.remote import Endpoint, Ready
from provision.guest.shell import Shell, ended, start
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

# What is needed there, judged by its use where names differ.
_LOOK = """
for c in cat kill mkdir mv rm setsid sleep wc; do command -v "$c" >/dev/null || echo "lacks $c"; done
for c in sha256sum "shasum -a 256" "openssl dgst -sha256 -r" "sha256 -q" "busybox sha256sum"; do
  case $(printf abc | $c 2>/dev/null) in ba7816bf8f01cfea*) echo "sums $c"; break;; esac
done
"""


@dataclass(frozen=True, slots=True)
class RunResult:
    """``status`` as the shell gives it: 128 + n for a script ended by signal n; 124 if ``timed_out``."""

    status: int
    timed_out: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Moved:
    """A file that was carried, the same at both ends by sha256. ``size`` in bytes."""

    name: str
    path: str  # where it was
    size: int
    sha256: str


class Connection:
    """Made with ``Connection.open``; an async context manager. Safe for several tasks at once."""

    def __init__(
        self, endpoint: Endpoint, ssh: asyncssh.SSHClientConnection, runner: Runner | None = None
    ) -> None:
        self.endpoint = endpoint
        self._ssh = ssh
        self._runner = runner or Runner(changes=False)
        self._sum = ""  # the command that makes sha256 sums there
        self._git_said: list[str] = []
        self._listeners: list[asyncssh.SSHListener] = []

    @classmethod
    async def open(cls, endpoint: Endpoint, *, runner: Runner | None = None) -> Connection:
        """Conflict for a wrong host key, DriverFailed where nobody answers, or the login runs no
        commands; Unsupported where it lacks what is needed."""
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
    ) -> RunResult:
        """Run ``script`` by ``sh -eu`` in the login's home, standard input closed. Both outputs go to
        ``log`` in their order, as raw bytes, as they are made. After ``timeout`` seconds it is ended
        in the guest, children too; likewise when this call is cancelled, or the connection lost.

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
        channel, shell = await self._start(_WRAPPER.replace("SCRIPT", shlex.quote(text)), log)
        late = False
        try:
            async with asyncio.timeout(max(timeout, 0.001)):
                await shell.exited.wait()
        except TimeoutError:
            late = True
            await _end_it(channel, shell)
        except asyncio.CancelledError:
            await asyncio.shield(_end_it(channel, shell))
            raise
        await shell.drained(_LINGER)
        seconds = time.monotonic() - started
        await ended(channel)
        if late:
            return RunResult(124, True, seconds)  # as timeout(1) has it
        if shell.status is None:
            raise self._lost(shell.error)
        return RunResult(shell.status, False, seconds)

    async def output(self, script: str, *, timeout: float = 60) -> str:
        """What a short script prints. DriverFailed if it fails."""
        parts: list[bytes] = []
        result = await self.run(script, timeout=timeout, log=parts.append)
        text = b"".join(parts).decode(errors="replace")
        if result.status:
            raise DriverFailed(
                f"a command failed with {result.status}: "
                f"{(text.strip().splitlines() or ['no output'])[-1]}",
                vm=self.endpoint.vm,
            )
        return text

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
        answer: list[bytes] = []
        channel, shell = await self._start(_LOOK, answer.append)
        with contextlib.suppress(OSError):
            channel.write_eof()
        await shell.exited.wait()
        await shell.drained(_LINGER)
        await ended(channel)
        if shell.status is None:
            raise self._lost(shell.error)
        said = [line.partition(" ") for line in b"".join(answer).decode(errors="replace").splitlines()]
        self._sum = next((command for what, _, command in said if what == "sums"), "")
        lacks = [command for what, _, command in said if what == "lacks"]
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
    ) -> tuple[asyncssh.SSHClientChannel[bytes], Shell]:
        try:
            return await start(self._ssh, program, log, ended)
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

    async def list(self, patterns: Sequence[str]) -> tuple[Moved, ...]:
        """The regular files that shell patterns (relative to the login's home) stand for, with size
        and sha256 as the guest sees them. NotFound for a pattern without any."""
        found: list[Moved] = []
        for pattern in patterns:
            text = await self.output(
                f"set +e; for f in {_escape(pattern)}; do "
                f'[ -f "$f" ] && printf "%s %s\\n" "$({self._sum} <"$f")" "$(wc -c <"$f")" '
                '&& printf "%s\\0\\n" "$f"; done; true',
                timeout=600,
            )
            files = text.split("\0\n")[:-1]
            if not files:
                raise NotFound(f"no file matches {pattern}", vm=self.endpoint.vm)
            for entry in files:
                sums, _, path = entry.partition("\n")
                sha256, *_, size = sums.split()
                found.append(Moved(PurePosixPath(path).name, path, int(size), sha256))
        unique = {file.path: file for file in found}.values()
        names = [file.name for file in unique]
        for name in names:
            if names.count(name) > 1:
                raise Conflict(
                    f"two files called {name} match {' '.join(patterns)}", vm=self.endpoint.vm
                )
        return tuple(unique)

    async def get(self, patterns: Sequence[str], directory: Path) -> tuple[Moved, ...]:
        """Fetch files into ``directory``: each appears there complete and verified, or not at all."""
        files = await self.list(patterns)
        make_directory(directory, mode=0o755)
        for file in files:
            part = directory / f".{file.name}.{secrets.token_hex(4)}.part"
            try:
                with open_new(part) as out:
                    async with self._reading(file.path) as read:
                        digest = await _copy(read, _into(out))
                    out.flush()
                    os.fsync(out.fileno())
                self._same(file, digest)
                part.replace(directory / file.name)
            except OSError as error:
                raise self._failed(f"fetching {file.path}", error.strerror or str(error)) from None
            finally:
                part.unlink(missing_ok=True)
        return files

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

        def same(digest: str) -> None:
            self._same(Moved(name, str(file), 0, sha256), digest)

        with file.open("rb") as source:
            return await self._receive(_from(source), name, str(file), home or ".", same, ready)

    async def transfer(
        self, patterns: Sequence[str], target: Connection, directory: str
    ) -> tuple[Moved, ...]:
        """Carry files to another VM through this machine, nothing kept here; verified on both ends."""
        files = await self.list(patterns)
        for file in files:
            async with self._reading(file.path) as read:
                same = partial(self._same, file)
                await target._receive(read, file.name, file.path, directory, same)
        return files

    @contextlib.asynccontextmanager
    async def _reading(self, path: str) -> AsyncIterator[Read]:
        """A file's bytes, as fast as they are taken. Reading raises DriverFailed if they aren't all."""
        ahead = asyncio.StreamReader(_BLOCK)
        channel, shell = await self._start(
            f"exec cat <{shlex.quote(path)}", ahead.feed_data, ahead.feed_eof
        )
        ahead.set_transport(channel)  # type: ignore[arg-type]  # it pauses and resumes reading

        async def read(size: int) -> bytes:
            if data := await ahead.read(size):
                return data
            await shell.exited.wait()
            if shell.status is None:
                raise self._lost(shell.error)
            if shell.status:
                raise self._failed(f"reading {path}", shell.said())
            return b""

        try:
            yield read
        finally:
            await ended(channel)

    async def _receive(
        self,
        read: Read,
        name: str,
        path: str,
        directory: str,
        same: Callable[[str], None] = lambda _digest: None,
        ready: Sequence[str] = (),
    ) -> Moved:
        home = PurePosixPath(directory.removeprefix("~/"))
        part, final = str(home / f".{name}.{secrets.token_hex(4)}.part"), str(home / name)
        here, there = shlex.quote(part), shlex.quote(final)
        try:
            answer: list[bytes] = []
            channel, shell = await self._start(
                f"mkdir -p -- {shlex.quote(str(home))} && cat >{here} && "
                f"{self._sum} <{here} && wc -c <{here}",
                answer.append,
            )

            async def write(data: bytes) -> None:
                with contextlib.suppress(OSError):  # it has ended: its status tells
                    channel.write(data)
                await shell.drain()

            try:
                digest = await _copy(read, write)
                with contextlib.suppress(OSError):
                    channel.write_eof()
                await shell.exited.wait()
                await shell.drained(_LINGER)
            finally:
                await ended(channel)
            if shell.status is None:
                raise self._lost(shell.error)
            if shell.status:
                raise self._failed(f"writing {final}", shell.said())
            seen, *_, size = b"".join(answer).decode(errors="replace").split()
            same(digest)
            self._same(Moved(name, path, int(size), seen), digest)
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
        return Moved(name, path, int(size), digest)

    def _same(self, file: Moved, digest: str) -> None:
        if file.sha256 != digest:
            raise DriverFailed(
                f"{file.path} arrived as sha256 {digest[:12]}..., "
                f"but the guest says {file.sha256[:12]}...",
                vm=self.endpoint.vm,
                remedy="it changed while it was carried, or memory or disk is bad",
            )

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

        try:
            listener = await self._ssh.start_server(
                lambda _host, _port: handle, "127.0.0.1", 0, encoding=None
            )
        except (asyncssh.Error, asyncssh.ChannelListenError, OSError) as error:
            if self.closed:
                raise self._lost(error) from None
            raise Unsupported(
                f"its sshd forwards no ports, so {repository} can't be offered: "
                f"{str(error).strip() or type(error).__name__}",
                vm=self.endpoint.vm,
                remedy="allow it there: AllowTcpForwarding yes in sshd_config; "
                "or give 'source: repository:' as a URL that the VM reaches",
            ) from None
        self._listeners.append(listener)
        return f"git://127.0.0.1:{listener.get_port()}/{name}.git"

    async def _listen(self, errors: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a line without an end
            while line := await errors.readline():
                text = _DAEMON.sub("", line.decode(errors="replace").strip())
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


def _into(out: BinaryIO) -> Write:
    return lambda data: asyncio.to_thread(out.write, data)


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
    """sshd drops most of a client's environment (AcceptEnv), so the script brings its own."""
    for name in env:
        if not _VARIABLE.fullmatch(name):
            raise UsageError(f"{name!r} is not the name of an environment variable")
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())


def _escape(pattern: str) -> str:
    """For the guest's shell: patterns stay patterns, all else is itself."""
    home, rest = ('"$HOME"/', pattern[2:]) if pattern.startswith("~/") else ("", pattern)
    text = "".join(c if _PLAIN.match(c) else f"\\{c}" if c != "\n" else "'\n'" for c in rest)
    return home + (f"./{text}" if not home and text.startswith("-") else text)
