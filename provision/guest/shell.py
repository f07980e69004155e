"""A program in the guest's login, whatever that login is.

sshd(8) has the login's own shell run a command: bash reads .bashrc first, which may print or ask; csh
and fish quote by rules of their own. So the command is one short line that all of them read alike (no
newline, ``!`` or single quote in it). It prints a mark, never seen before and not found in the command
as such, and then takes the program from standard input. What comes before the mark is the login's own
noise; a prompt is answered by Enter. ``read`` takes bytes one by one, so what follows the program on
the channel is there for the program itself. sh(1), POSIX.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import asyncssh

from host.printable import last_line
from inventory.errors import DriverFailed
from inventory.sizes import format_size

START_SECONDS = 45.0
"""From the request to the mark. Below the patience for a login: its reason is told, not the clock's."""
ANSWER_MAX = 2**16
"""Bytes that a question may be answered with: guests are strangers."""
ANSWER_SECONDS = 120.0
"""Until its answer is there: emulated guests are slow."""
_ENTER = b"\n" * 8  # for questions in .bashrc; waiting for the program, sh passes them by
_NOISE_MAX = 65536
_NOISE_END = 2**22  # bytes of a login that never comes to its end
_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.5)


class Shell(asyncssh.SSHClientSession[bytes]):
    """``status`` as a shell gives it, None where the connection was lost. ``log`` is told what the
    program prints, ``ended`` that there will be no more of it. ``most``: bytes that it may print, on
    both outputs together; what comes after them is dropped, and it is ``over``."""

    def __init__(
        self,
        mark: str,
        log: Callable[[bytes], None],
        ended: Callable[[], None] | None = None,
        most: int | None = None,
    ) -> None:
        self._mark = f"{mark}\n".encode()
        self._log = log
        self._tell_end = ended
        self._room = most
        self._before = bytearray()
        self._unmarked = 0
        self._noise = bytearray()
        self._answered = asyncio.Event()  # by the mark, or by the end
        self._may_write = asyncio.Event()
        self._may_write.set()
        self.marked = False
        self.marked_at = 0.0  # time.time(): what the login does before may take long
        self.status: int | None = None
        self.error: Exception | None = None
        self.over = False
        self.exited = asyncio.Event()
        self._settled = asyncio.Event()  # it exited, or is over
        self._ended = asyncio.Event()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if self.marked:
            data = self._within(data)
        if datatype is None and self.marked:
            if data:
                self._log(data)
            return
        self._noise += data
        del self._noise[:-_NOISE_MAX]
        if not self.marked:
            self._unmarked += len(data)
            if self.endless:
                self._answered.set()
        if datatype is not None:
            return
        self._before += data
        _, mark, rest = self._before.partition(self._mark)
        if not mark:
            del self._before[:-_NOISE_MAX]
            return
        self._noise.clear()
        self.marked, self.marked_at = True, time.time()
        self._answered.set()
        if begun := self._within(bytes(rest)):
            self._log(begun)

    @property
    def endless(self) -> bool:
        """Whether the login prints more than any does before it comes to the program."""
        return self._unmarked > _NOISE_END

    def _within(self, data: bytes) -> bytes:
        """What there is room for of it."""
        if self._room is None:
            return data
        kept = data[: self._room]
        self._room -= len(kept)
        if len(kept) < len(data):
            self.over = True
            self._settled.set()
        return kept

    def said(self) -> str:
        """The last line of what the login printed; once the program runs, of its standard error."""
        text = self._noise.decode(errors="replace")
        return last_line(text, 300).rstrip(".")

    def exit_status_received(self, status: int) -> None:
        self.status = status
        self._exit()

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        del core_dumped, msg, lang
        self.status = 128 + {"HUP": 1, "INT": 2, "QUIT": 3, "KILL": 9, "TERM": 15}.get(signal, 0)
        self._exit()

    def eof_received(self) -> bool:
        self._end()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        self._exit()
        self._may_write.set()
        self._end()

    def _exit(self) -> None:
        self.exited.set()
        self._settled.set()

    def _end(self) -> None:
        self._answered.set()
        if not self._ended.is_set():
            self._ended.set()
            if self._tell_end is not None:
                self._tell_end()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    async def drain(self) -> None:
        """Until there is room for more of the program's input."""
        await self._may_write.wait()

    async def answered(self) -> None:
        await self._answered.wait()

    async def settled(self) -> None:
        """Until the program has exited, or has printed more than it may."""
        await self._settled.wait()

    async def drained(self, seconds: float) -> None:
        """The rest of the output; a daemon that the program left behind may hold it open for ever."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)


async def start(
    ssh: asyncssh.SSHClientConnection,
    program: str,
    log: Callable[[bytes], None],
    ended: Callable[[], None] | None = None,
    most: int | None = None,
) -> tuple[asyncssh.SSHClientChannel[bytes], Shell]:
    """Have sh(1) run a program, without NUL bytes, in the login's home; its standard input is what is
    written to the channel. What it prints on standard error counts as noise. ``log``, ``ended`` and
    ``most`` as a Shell has them.

    DriverFailed, its message without the VM's name, where the login doesn't get that far;
    asyncssh.Error and OSError where the connection is lost.
    """
    mark, end = secrets.token_hex(8), secrets.token_hex(8)
    shell = Shell(mark, log, ended, most)
    try:
        channel = await _open(ssh, shell, _command(mark, end))
    except asyncssh.ChannelOpenError as error:
        if ssh.is_closed():
            raise
        raise DriverFailed(
            f"its sshd opens no session: {str(error).strip() or 'no reason given'}",
            remedy="MaxSessions in its sshd_config must not be 0, nor its account be for tunnels only",
        ) from None
    try:
        _write(channel, _ENTER)
        async with asyncio.timeout(START_SECONDS):
            await shell.answered()
        if shell.marked:
            _write(channel, f"{end}\n{program}\n{end}\n".encode())
            return channel, shell
    except TimeoutError:
        channel.abort()
        raise _refused(shell, "runs no command, and does not end") from None
    except BaseException:
        channel.abort()
        raise
    if not shell.endless:
        await shell.drained(1)
    channel.abort()
    if shell.error is not None:
        raise shell.error
    raise _refused(shell, "prints without end" if shell.endless else "runs no commands")


def _write(channel: asyncssh.SSHClientChannel[bytes], data: bytes) -> None:
    """To a login that may have ended by now: what it said, and its status, tell why."""
    with contextlib.suppress(BrokenPipeError):
        channel.write(data)


async def _open(
    ssh: asyncssh.SSHClientConnection, shell: Shell, command: str
) -> asyncssh.SSHClientChannel[bytes]:
    """Where sshd allows one session at a time (sshd_config(5), MaxSessions), it counts the one before
    for a moment after it has closed it: nothing tells when that is over."""
    for pause in _PAUSES:
        with contextlib.suppress(asyncssh.ChannelOpenError):
            return (await ssh.create_session(lambda: shell, command, encoding=None))[0]
        await asyncio.sleep(pause)
    return (await ssh.create_session(lambda: shell, command, encoding=None))[0]


@dataclass(frozen=True, slots=True)
class Reply:
    """``status`` and ``error`` as a Shell has them. ``asked`` and ``answered``: ``time.time()`` of when
    the program began, and of its exit. ``said``: the last line on its standard error."""

    text: str
    status: int | None
    asked: float
    answered: float
    said: str
    error: Exception | None


async def ask(ssh: asyncssh.SSHClientConnection, program: str) -> Reply:
    """What a program prints that answers a question: at most ``ANSWER_MAX`` bytes, within
    ``ANSWER_SECONDS``; else DriverFailed. Other errors: as of ``start``."""
    parts: list[bytes] = []
    channel, shell = await start(ssh, program, parts.append, most=ANSWER_MAX)
    try:
        with contextlib.suppress(OSError):  # it has ended: its status tells
            channel.write_eof()
        async with asyncio.timeout(ANSWER_SECONDS):
            await shell.settled()
        answered = time.time()
        if not shell.over:
            await shell.drained(1)
    except TimeoutError:
        raise DriverFailed(f"a question was not answered within {ANSWER_SECONDS:.0f} s") from None
    finally:
        await ended(channel)
    if shell.over:
        raise DriverFailed(f"a question was answered with more than {format_size(ANSWER_MAX)}")
    text = b"".join(parts).decode(errors="replace")
    return Reply(text, shell.status, shell.marked_at, answered, shell.said(), shell.error)


async def ended(channel: asyncssh.SSHClientChannel[bytes]) -> None:
    """Let go of a channel, and wait a little until sshd has, too: it may allow one at a time."""
    channel.close()
    with contextlib.suppress(TimeoutError, asyncssh.Error, OSError):
        await asyncio.wait_for(channel.wait_closed(), 2)
    channel.abort()


def _command(mark: str, end: str) -> str:
    line = f'while IFS= read -r l; do [ "$l" = {end} ] && break'
    return (
        f'exec sh -c \'echo {mark[:8]}""{mark[8:]}; '
        f'{line}; done; p=$({line}; printf "%s\\n" "$l"; done; echo "$l"); '
        f'case $p in *{end}) eval "${{p%{end}}}";; *) exit 125;; esac\''
    )


def _refused(shell: Shell, how: str) -> DriverFailed:
    said = shell.said()
    return DriverFailed(
        f"its login {how}{f': it says: {said}' if said else ''}",
        remedy="see docs/logins.md: a shell that runs `sh -c` (not nologin, no ForceCommand of another "
        "kind), and a .bashrc that neither goes on asking nor starts another shell",
    )
