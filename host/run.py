"""The one place that starts host commands.

Argument lists, never a shell; the C locale; our environment without our secrets; standard input closed
unless given; always a time limit.
``read`` is for commands that change nothing and may always run; ``change`` is for the rest. A runner
made with ``changes=False``, as under ``--plan``, refuses those: a plan that would change something is a
defect of ours, and shows as one."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from host.files import file_error, open_to_append
from host.printable import last_line
from host.processes import worked
from host.progress import Progress, Pulse
from inventory.errors import Call, CommandFailed, TimedOut, UsageError

if TYPE_CHECKING:
    import asyncio

_LOCALE = {"LC_ALL": "C.UTF-8", "LANGUAGE": "C", "LVM_SUPPRESS_FD_WARNINGS": "1"}
MASK = "********"
_SECRET = re.compile(r"FARMHAND_\w*(?:KEY|SECRET|TOKEN|PASSWORD)\w*")
_withheld: set[str] = set()


def withhold(*names: str) -> None:
    """Programs that this process starts from now on don't have these variables of the environment: the
    farm file says that they hold secrets for us."""
    _withheld.update(names)


def environment() -> dict[str, str]:
    """What programs that we start have of our environment: all but secrets that are for us. A list of
    what they may have would be a guess: commands of the admin's own (reloads, resets, ssh) rely on
    agents, proxies and libraries, and a variable that we don't know is no secret of ours."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _withheld and not _SECRET.fullmatch(name)
    }


@dataclass(frozen=True, slots=True)
class CommandResult:
    """What a command ended with. ``stdout`` and ``stderr`` are decoded as UTF-8, bad bytes replaced."""

    argv: tuple[str, ...]
    status: int
    stdout: str
    stderr: str
    seconds: float


class Runner:
    """Runs commands. ``secrets``: strings that must never be shown."""

    def __init__(self, *, changes: bool = True, secrets: Sequence[str] = ()) -> None:
        self.changes = changes
        self._secrets = tuple(s for s in secrets if s)

    def read(
        self,
        *argv: str | Path,
        timeout: float = 60,
        ok: Sequence[int] = (0,),
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,
        patient: bool = False,
    ) -> CommandResult:
        """Run a command that changes nothing. CommandFailed unless its status is in ``ok``. ``patient``:
        ``timeout`` counts seconds in which the command doesn't work, see ``host.progress``."""
        return self._run(argv, timeout, ok, env, input, None, patient=patient)

    def change(
        self,
        *argv: str | Path,
        timeout: float = 600,
        ok: Sequence[int] = (0,),
        env: Mapping[str, str] | None = None,
        input: bytes | None = None,
        log: Path | None = None,
        clean: bool = False,
        patient: bool = False,
        working: Callable[[str], None] | None = None,
    ) -> CommandResult:
        """Run a command that changes the host. ``log``: both outputs are appended there as they are
        made, and the result's are empty; ``timeout`` then counts seconds without output, see
        ``host.progress``. ``patient``: as with ``read``. ``clean``: its environment is ``env`` and the
        locale, nothing else of ours. ``working``: told the log's last line, once a second."""
        if not self.changes:
            raise UsageError(f"would run, which a plan must not: {self.show(argv)}")
        return self._run(
            argv, timeout, ok, env, input, log, clean=clean, patient=patient, working=working
        )

    async def serve(
        self, *argv: str | Path, env: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start a command that changes nothing and talks over pipes (``git daemon --inetd``); its errors
        have a pipe of their own. The caller reads all of them, and ends it with ``hang_up``."""
        import asyncio  # 50 ms, and few commands need it

        return await asyncio.create_subprocess_exec(
            *(str(a) for a in argv),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**environment(), **_LOCALE, **(env or {})},
            start_new_session=True,
        )

    async def hand_over(self, *argv: str | Path) -> int:
        """Give our terminal to a program until it ends; returns its status. Cancelled, it is ended."""
        import asyncio

        args = tuple(str(a) for a in argv)
        try:
            process = await asyncio.create_subprocess_exec(*args, env=environment())
        except OSError as error:
            raise _not_there(args, error) from error
        try:
            return await process.wait()
        except asyncio.CancelledError:
            process.terminate()
            await process.wait()
            raise

    def talk(self, *argv: str | Path) -> subprocess.Popen[bytes]:
        """Start a command that is talked to over three pipes for as long as it is needed (an agent on
        another machine); the caller reads both outputs. Ctrl-C does not reach it: it ends when its input
        does. CommandFailed if it isn't there."""
        args = tuple(str(a) for a in argv)
        try:
            return subprocess.Popen(
                args,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**environment(), **_LOCALE},
                start_new_session=True,
            )
        except OSError as error:
            raise _not_there(args, error) from error

    def show(self, argv: Sequence[str | Path]) -> str:
        """The command, fit to be pasted into a shell; secrets are masked."""
        text = shlex.join(str(a) for a in argv)
        for secret in self._secrets:
            text = text.replace(secret, MASK)
        return text

    def _run(
        self,
        argv: Sequence[str | Path],
        timeout: float,
        ok: Sequence[int],
        env: Mapping[str, str] | None,
        data: bytes | None,
        log: Path | None,
        *,
        clean: bool = False,
        patient: bool = False,
        working: Callable[[str], None] | None = None,
    ) -> CommandResult:
        args = tuple(str(a) for a in argv)
        started = time.monotonic()
        try:
            sink = open_to_append(log) if log else None
        except OSError as error:
            assert log
            raise file_error(error, log, "write") from error
        try:
            process = subprocess.Popen(
                args,
                stdin=subprocess.PIPE if data is not None else subprocess.DEVNULL,
                stdout=sink or subprocess.PIPE,
                stderr=sink or subprocess.PIPE,
                env={**({} if clean else environment()), **_LOCALE, **(env or {})},
                start_new_session=True,  # so that a time-out ends its children too
            )
        except OSError as error:
            raise _not_there(args, error) from error
        finally:
            if sink:
                sink.close()
        try:
            out, err = _outputs(process, data, timeout, log, patient=patient, working=working)
        except subprocess.TimeoutExpired:
            _end(process)
            after = round(time.monotonic() - started) if log or patient else timeout
            raise TimedOut(f"still running after {after:g} s, ended: {self.show(args)}") from None
        except BaseException:  # Ctrl-C: the child is in its own session and did not get it
            _end(process)
            raise
        result = CommandResult(
            args,
            process.returncode,
            (out or b"").decode(errors="replace"),
            (err or b"").decode(errors="replace"),
            time.monotonic() - started,
        )
        if result.status not in ok:
            raise self._failure(result, log)
        return result

    def _failure(self, result: CommandResult, log: Path | None) -> CommandFailed:
        if result.status < 0:
            how = f"was killed by {signal.Signals(-result.status).name}"
        else:
            how = f"exited with {result.status}"
        lines = result.stderr.strip().splitlines() or result.stdout.strip().splitlines()
        why = lines[-1] if lines else ""
        if log:
            why = f"its output is in {log}"
        detail = "\n".join(lines[-15:])
        for secret in self._secrets:
            why, detail = why.replace(secret, MASK), detail.replace(secret, MASK)
        return CommandFailed(
            f"{Path(result.argv[0]).name} {how}{': ' + why if why else ''}",
            argv=tuple(shlex.split(self.show(result.argv))),
            status=result.status,
            stderr=result.stderr,
            detail=f"$ {self.show(result.argv)}\n{detail}".strip(),
        )


def end_talk(process: subprocess.Popen[bytes], patience: float) -> bytes:
    """End what ``Runner.talk`` started, by the end of its input; after ``patience`` seconds, by force.
    Returns what it has printed, on both outputs."""
    try:
        out, errors = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
    return out + errors


def leave_talk(process: subprocess.Popen[bytes], patience: float) -> None:
    """Close all pipes of what ``Runner.talk`` started. After ``patience`` seconds it is left to itself,
    and goes on also when we end."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError):  # it has ended, and not read all
            if pipe:
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)


def _not_there(argv: tuple[str, ...], error: OSError) -> CommandFailed:
    """The error for a command that could not be started. What is missing may also be /dev/null, its
    standard input."""
    where = f"{error.filename}: " if error.filename not in (None, argv[0]) else ""
    absent = isinstance(error, FileNotFoundError) and not where
    return CommandFailed(
        f"cannot run {argv[0]}: {where}{error.strerror}",
        argv=argv,
        remedy=("install it: ", Call("doctor"), f" names the package that has {argv[0]}")
        if absent
        else "",
    )


def _outputs(
    process: subprocess.Popen[bytes],
    data: bytes | None,
    timeout: float,
    log: Path | None,
    *,
    patient: bool,
    working: Callable[[str], None] | None,
) -> tuple[bytes | None, bytes | None]:
    """As ``Popen.communicate``. TimeoutExpired; a command with a log may go on as long as that grows,
    a ``patient`` one as long as it works."""
    if log is not None:
        progress = Progress(lambda: Pulse(console=log.stat().st_size), timeout)
    elif patient:
        progress = Progress(lambda: Pulse(worked=worked(process.pid)), timeout)
    else:
        return process.communicate(data, timeout)
    while (left := progress.left()) > 0:
        try:
            return process.communicate(data, min(left, 1.0))
        except subprocess.TimeoutExpired:
            data = None  # it has that
            progress.look()
            if working and log:
                working(_last_line(log))
    raise subprocess.TimeoutExpired(process.args, timeout)


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 4096, 0))
        return last_line(file.read().decode(errors="replace"), 200)


async def hang_up(process: asyncio.subprocess.Process) -> None:
    """End what ``serve`` started, with its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command and its children: they share a process group of their own."""
    for sig, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sig)
        except ProcessLookupError:
            break
        try:
            process.communicate(timeout=patience)
            break
        except subprocess.TimeoutExpired:
            continue


def which(name: str) -> str | None:
    """Like shutil.which, also looking in the sbin directories an ordinary user's PATH lacks."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")
