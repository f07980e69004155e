"""One ssh connection to a VM, kept for many commands and files.

A script reaches the guest on the command's standard input and is read whole before it begins, so
that neither its length nor a command that reads standard input can spoil it. The same channel then
is the dead man's switch: as long as it is open the script may run; once it is closed - by us, by a
lost network, by the death of this process - a watcher in the guest ends the script and its children.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

import asyncssh

from hypervisors.files import make_directory, open_new
from hypervisors.run import Runner, hang_up
from inventory.errors import Conflict, DriverFailed, NotFound, UsageError
from provision.dial import dial, facts
from provision.remote import Endpoint, Ready

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[A-Za-z0-9_./*?\[\]!^+=:,@%-]")  # left to the guest's shell in file patterns
_SCRIPT_MAX = 120_000  # one argument of execve(2) has at most 128 KiB
Read = Callable[[int], Awaitable[bytes]]
Write = Callable[[bytes], Awaitable[object]]

_BLOCK = 2**20
_LINGER = 2.0  # seconds for output still under way after a script's exit
_GRACE = 10  # seconds between SIGTERM and SIGKILL in the guest

# sh(1), POSIX. $1: bytes of script, $2: time limit in seconds. Channel's stdin on 3. timeout(1) makes
# itself the leader of a process group, $t, that everything the script starts belongs to. The rest must
# not hold the output open, or the channel would never end, nor write to it, or a lost connection would
# end it by SIGPIPE before its work is done. (dash takes a process group only with "-s".)
_WRAPPER = f"""
s=$(head -c "$1"; echo .) || exit 125
exec 3<&0 </dev/null 2>&1
timeout -k {_GRACE} "$2" sh -euc "${{s%.}}" sh 3<&- &
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


@dataclass(frozen=True, slots=True)
class RunResult:
    """``status`` as the shell gives it: 128 + n for a script ended by signal n."""

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
        self._sftp: asyncssh.SFTPClient | None = None
        self._sftp_lock = asyncio.Lock()
        self._listeners: list[asyncssh.SSHListener] = []

    @classmethod
    async def open(cls, endpoint: Endpoint, *, runner: Runner | None = None) -> Connection:
        """Conflict for a wrong host key, DriverFailed where nobody answers."""
        return cls(endpoint, await dial(endpoint), runner)

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

        DriverFailed when the connection is lost, UsageError for a script that can't be passed on.
        """
        text = _exports(env or {}) + script
        data = text.encode()
        if len(data) > _SCRIPT_MAX or b"\0" in data:
            raise UsageError(
                f"a script for {self.endpoint.vm} has {len(data)} bytes or a NUL byte",
                remedy=f"keep it under {_SCRIPT_MAX} bytes: put the rest into the source",
            )
        limit = max(timeout, 0.001)
        command = shlex.join(["exec", "sh", "-c", _WRAPPER, "sh", str(len(data)), f"{limit:.3f}"])
        started = time.monotonic()
        channel, session = await self._start(command, log)
        channel.write(data)
        try:
            async with asyncio.timeout(limit + _GRACE + 20):
                await session.exited.wait()
        except TimeoutError:
            # Not even timeout(1) came through: the guest hangs. Let go of it.
            channel.abort()
            return RunResult(124, True, time.monotonic() - started)
        except asyncio.CancelledError:
            await asyncio.shield(_let_go(channel, session))
            raise
        await session.drained(_LINGER)
        seconds = time.monotonic() - started
        channel.abort()
        if session.status is None:
            raise self._lost(session.error)
        late = session.status in (124, 137) and seconds >= limit * 0.98
        return RunResult(session.status, late, seconds)

    async def output(self, script: str, *, timeout: float = 60) -> str:
        """What a short script prints. DriverFailed if it fails."""
        parts: list[bytes] = []
        result = await self.run(script, timeout=timeout, log=parts.append)
        text = b"".join(parts).decode(errors="replace")
        if result.status:
            raise DriverFailed(
                f"{self.endpoint.vm}: a command failed with {result.status}: "
                f"{(text.strip().splitlines() or ['no output'])[-1]}"
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
            '$as date -u -s "$when" >/dev/null'
        )
        return (await self.facts()).skew

    async def _start(
        self, command: str, log: Callable[[bytes], None]
    ) -> tuple[asyncssh.SSHClientChannel[bytes], _Session]:
        session = _Session(log)
        try:
            channel, _ = await self._ssh.create_session(lambda: session, command, encoding=None)
        except (asyncssh.Error, OSError) as error:
            raise self._lost(error) from None
        return channel, session

    def _lost(self, error: BaseException | None) -> DriverFailed:
        why = str(error or "").strip() or "the connection was closed"
        return DriverFailed(
            f"{self.endpoint.vm}: the ssh connection to {self.endpoint.place} was lost: {why}",
            remedy=f"see ./invoke console --vm {self.endpoint.vm}",
        )

    # -- files --------------------------------------------------------------------------------

    async def list(self, patterns: Sequence[str]) -> tuple[Moved, ...]:
        """The regular files that shell patterns (relative to the login's home) stand for, with size
        and sha256 as the guest sees them. NotFound for a pattern without any."""
        found: list[Moved] = []
        for pattern in patterns:
            text = await self.output(
                f"set +e; for f in {_escape(pattern)}; do "
                '[ -f "$f" ] && printf "%s %s\\n" "$(sha256sum <"$f")" "$(wc -c <"$f")" '
                '&& printf "%s\\0\\n" "$f"; done; true',
                timeout=600,
            )
            files = text.split("\0\n")[:-1]
            if not files:
                raise NotFound(f"{self.endpoint.vm}: no file matches {pattern}")
            for entry in files:
                sums, _, path = entry.partition("\n")
                sha256, _, size = sums.split()
                found.append(Moved(PurePosixPath(path).name, path, int(size), sha256))
        unique = {file.path: file for file in found}.values()
        names = [file.name for file in unique]
        for name in names:
            if names.count(name) > 1:
                raise Conflict(f"{self.endpoint.vm}: two files called {name} match {' '.join(patterns)}")
        return tuple(unique)

    async def get(self, patterns: Sequence[str], directory: Path) -> tuple[Moved, ...]:
        """Fetch files into ``directory``: each appears there complete and verified, or not at all."""
        files = await self.list(patterns)
        make_directory(directory, mode=0o755)
        sftp = await self._files()
        for file in files:
            part = directory / f".{file.name}.{secrets.token_hex(4)}.part"
            try:
                with open_new(part) as out:
                    async with sftp.open(file.path, "rb") as source:
                        digest = await _copy(source.read, _into(out))
                    out.flush()
                    os.fsync(out.fileno())
                self._same(file, digest)
                part.replace(directory / file.name)
            except (asyncssh.Error, OSError) as error:
                raise self._failed(f"fetching {file.path}", error) from None
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

    async def transfer(
        self, patterns: Sequence[str], target: Connection, directory: str
    ) -> tuple[Moved, ...]:
        """Carry files to another VM through this machine, nothing kept here; verified on both ends."""
        files = await self.list(patterns)
        sftp = await self._files()
        for file in files:
            try:
                async with sftp.open(file.path, "rb") as source:
                    moved = await target._receive(source.read, file.name, file.path, directory)
            except (asyncssh.Error, OSError) as error:
                raise self._failed(f"reading {file.path}", error) from None
            self._same(file, moved.sha256)
        return files

    async def _receive(self, read: Read, name: str, path: str, directory: str) -> Moved:
        sftp = await self._files()
        home = directory.removeprefix("~/")
        part = str(PurePosixPath(home) / f".{name}.{secrets.token_hex(4)}.part")
        final = str(PurePosixPath(home) / name)
        try:
            await sftp.makedirs(home, exist_ok=True)
            try:
                async with sftp.open(part, "wb") as out:
                    digest = await _copy(read, out.write)
                seen = (await self.output(f"sha256sum <{shlex.quote(part)}", timeout=600)).split()[0]
                size = (await sftp.stat(part)).size or 0
                self._same(Moved(name, path, size, seen), digest)
                await sftp.posix_rename(part, final)
            except BaseException:
                with contextlib.suppress(asyncssh.Error, OSError):
                    await sftp.remove(part)
                raise
        except (asyncssh.Error, OSError) as error:
            raise self._failed(f"writing {final}", error) from None
        return Moved(name, path, size, digest)

    def _same(self, file: Moved, digest: str) -> None:
        if file.sha256 != digest:
            raise DriverFailed(
                f"{self.endpoint.vm}: {file.path} arrived as sha256 {digest[:12]}..., "
                f"but the guest says {file.sha256[:12]}...",
                remedy="it changed while it was carried, or memory or disk is bad",
            )

    def _failed(self, doing: str, error: BaseException) -> DriverFailed:
        if self.closed or isinstance(error, (asyncssh.ConnectionLost, asyncssh.SFTPConnectionLost)):
            return self._lost(error)
        return DriverFailed(f"{self.endpoint.vm}: {doing}: {str(error).strip() or type(error).__name__}")

    async def _files(self) -> asyncssh.SFTPClient:
        async with self._sftp_lock:
            if self._sftp is None:
                try:
                    self._sftp = await self._ssh.start_sftp_client()
                except (asyncssh.Error, OSError) as error:
                    raise self._failed("starting SFTP", error) from None
            return self._sftp

    # -- the source ---------------------------------------------------------------------------

    async def offer_git(self, repository: Path, *, name: str) -> str:
        """Serve one git repository of this machine to the guest, for fetching only, as long as the
        connection lasts; returns its URL in the guest. It goes over this very connection: a listener
        on the guest's loopback, each of whose clients gets a ``git daemon`` of its own here.

        DriverFailed where the guest's sshd forwards no ports.
        """
        inner = repository / ".git"  # --strict-paths wants the very directory
        where = str((inner if inner.is_dir() else repository).resolve())
        argv = (
            "git", "daemon", "--inetd", "--export-all", "--strict-paths", "--timeout=600",
            "--disable=receive-pack", "--disable=upload-archive",
            f"--interpolated-path={where.replace('%', '%%')}", where,
        )  # fmt: skip
        # The admin named this repository: whoever owns its files. Any commit of it may be asked for,
        # for GIT_REVISION may be one that no branch leads to.
        env = git_config({"safe.directory": where, "uploadpack.allowAnySHA1InWant": "true"})

        async def handle(reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]) -> None:
            process = await self._runner.serve(*argv, env=env)
            assert process.stdin is not None and process.stdout is not None
            inwards = asyncio.ensure_future(_pump(reader, process.stdin))
            try:
                await _pump(process.stdout, writer)
            finally:
                inwards.cancel()
                await hang_up(process)
                with contextlib.suppress(asyncssh.Error, OSError):
                    writer.close()

        try:
            listener = await self._ssh.start_server(
                lambda _host, _port: handle, "127.0.0.1", 0, encoding=None
            )
        except (asyncssh.Error, asyncssh.ChannelListenError, OSError) as error:
            raise DriverFailed(
                f"{self.endpoint.vm}: its sshd forwards no ports, so {repository} can't be offered: "
                f"{str(error).strip() or type(error).__name__}",
                remedy="allow it there: AllowTcpForwarding yes in sshd_config; "
                "or give 'source: repository:' as a URL that the VM reaches",
            ) from None
        self._listeners.append(listener)
        return f"git://127.0.0.1:{listener.get_port()}/{name}.git"


class _Session(asyncssh.SSHClientSession[bytes]):
    def __init__(self, log: Callable[[bytes], None]) -> None:
        self._log = log
        self.status: int | None = None
        self.error: Exception | None = None
        self.exited = asyncio.Event()
        self._ended = asyncio.Event()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        del datatype
        self._log(data)

    def exit_status_received(self, status: int) -> None:
        self.status = status
        self.exited.set()

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        del core_dumped, msg, lang
        self.status = 128 + {"HUP": 1, "INT": 2, "QUIT": 3, "KILL": 9, "TERM": 15}.get(signal, 0)
        self.exited.set()

    def eof_received(self) -> bool:
        self._ended.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self.exited.set()
        self._ended.set()

    async def drained(self, seconds: float) -> None:
        """The rest of the output; a daemon that the script left behind may hold it open for ever."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)


async def _let_go(channel: asyncssh.SSHClientChannel[bytes], session: _Session) -> None:
    """Close the dead man's switch and wait until the guest has ended the script."""
    with contextlib.suppress(OSError, TimeoutError, asyncssh.Error):
        channel.write_eof()
        await asyncio.wait_for(session.exited.wait(), _GRACE + 5)
    channel.abort()


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


def git_config(values: Mapping[str, str]) -> dict[str, str]:
    """git-config(1), ENVIRONMENT: settings for one git command, as strong as its ``-c``."""
    env = {"GIT_CONFIG_COUNT": str(len(values))}
    for index, (key, value) in enumerate(values.items()):
        env[f"GIT_CONFIG_KEY_{index}"] = key
        env[f"GIT_CONFIG_VALUE_{index}"] = value
    return env
