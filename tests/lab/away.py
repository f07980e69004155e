"""A command that goes on in a lab by itself, whatever becomes of the connection that began it. Its
output and its end are files there, which are followed from here over as many connections as it takes.

    OUT/command   what sh(1) runs
    OUT/output    both outputs, as they are made
    OUT/pid       of the shell that waits for it, the leader of its session
    OUT/status    when it has ended, as the shell gives it: 128 + n if signal n killed it
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from host.run import CommandResult
from inventory.errors import CommandFailed, DriverFailed, TimedOut

_LOST = 255  # ssh(1): of its own, an error with the connection
_SILENT = 120.0  # seconds that a lab may leave a new connection without an answer
# setsid -f, not "&": a shell's background commands don't hear SIGINT.
_BEGIN = """
mkdir -p {out} && cd {out} && rm -f pid status && : >output && cat >command || exit
setsid -f sh -c 'echo $$ >pid.new && mv pid.new pid
sh ./command
echo $? >status.new && mv status.new status' </dev/null >output 2>&1
until [ -s pid ]; do sleep 0.1; done
"""
# Not tail's own --pid: what its parent has not reaped yet, as init may be late, counts as alive there.
_FOLLOW = """
cd {out} && read -r p <pid || exit
tail -s 0.2 -c +{first} -f output &
while [ ! -e status ] && read -r line 2>/dev/null </proc/"$p"/stat; do
    case $line in *") Z "*) break ;; esac
    sleep 0.5
done
kill $!
"""
_REST = "exec tail -c +{first} {out}/output"
_INTERRUPT = "kill -INT $(cat /proc/$(cat {out}/pid)/task/*/children)"


class Place(Protocol):
    """What is needed of a lab."""

    def ssh_argv(self, *command: str) -> list[str]: ...

    def run(self, script: str, *, timeout: float = 120, input: bytes | None = None) -> CommandResult: ...


@dataclass(slots=True)
class Away:
    """``out``: a directory there. ``log`` gets all of the output, and so does ``show``, as it is made.
    ``say``: a line when a connection was lost and another one goes on."""

    place: Place
    out: str
    log: Path
    show: Callable[[bytes], None]
    say: Callable[[str], None]

    def begin(self, command: str) -> None:
        """``command``: for sh(1); it begins in ``out``. Returns when it has begun."""
        self.place.run(_BEGIN.format(out=shlex.quote(self.out)), input=command.encode())
        self.log.write_bytes(b"")

    def follow(self, limit: float) -> int:
        """Until it ends: its status. TimedOut after ``limit`` seconds; DriverFailed where the lab
        answers no new connection, or does, and neither the command nor its status is there."""
        end = time.monotonic() + limit
        script = _FOLLOW
        while True:
            first = self.log.stat().st_size + 1
            argv = self.place.ssh_argv(script.format(out=shlex.quote(self.out), first=first))
            status = self._stream(argv, end, limit)
            if status == _LOST or status < 0:
                self._answers()
                self.say("the connection was lost; the tests went on, and so does what they say")
            elif script is _REST:
                return self._status()
            else:
                script = _REST

    def interrupt(self, patience: float) -> int | None:
        """SIGINT to the command: what it still says, and its status; None where that takes too long."""
        with contextlib.suppress(CommandFailed, TimedOut, DriverFailed):
            self.place.run(_INTERRUPT.format(out=shlex.quote(self.out)), timeout=patience)
            return self.follow(patience)
        return None

    def _stream(self, argv: Sequence[str], end: float, limit: float) -> int:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            with self.log.open("ab") as file, selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    if (left := end - time.monotonic()) <= 0:
                        raise TimedOut(
                            f"the tests in the lab were not through after {limit / 60:.0f} minutes",
                            remedy=f"the lab was ended; what there is: {self.log.parent}",
                        )
                    if not selector.select(min(left, 60)):
                        continue
                    data = os.read(process.stdout.fileno(), 65536)
                    if not data:
                        break
                    file.write(data)
                    file.flush()
                    self.show(data)
            return process.wait(timeout=60)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            process.stdout.close()

    def _answers(self) -> None:
        """Once more, for a busy lab; DriverFailed."""
        end = time.monotonic() + _SILENT
        while True:
            try:
                self.place.run("true", timeout=60)
            except (CommandFailed, TimedOut) as error:
                if time.monotonic() > end:
                    raise DriverFailed(f"it answers no new connection: {error.message}") from error
                time.sleep(1)
            else:
                return

    def _status(self) -> int:
        try:
            return int(self.place.run(f"cat {shlex.quote(self.out)}/status").stdout)
        except (CommandFailed, TimedOut, ValueError) as error:
            raise DriverFailed("the command ended, and left no status") from error
