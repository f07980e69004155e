"""Events to a command of this machine, as JSON on its standard input."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from host.printable import last_line
from host.run import Runner, which
from inventory.errors import TimedOut, UsageError
from provision.engine.events import Event, SubscriberSection, Undelivered

if TYPE_CHECKING:
    from inventory.fields import SomeLines, TimeLimit

_ENVIRONMENT = ("PATH", "HOME", "USER", "LOGNAME", "TZ", "XDG_RUNTIME_DIR")
_TIMED_OUT = 124  # timeout(1)


@dataclass(frozen=True, kw_only=True)
class CommandSubscriber(SubscriberSection):
    """A command of this machine that is given events as JSON on its standard input."""

    command: SomeLines
    """The program and its arguments. No shell: `[sh, -c, ...]` is one."""
    timeout: TimeLimit = 10
    """How long it may take; it is ended then, and called again later."""

    def opened(self, beside: Path, runner: Runner) -> Command:
        return Command(self, beside, runner)


class Command:
    """The event is taken when the command exits with 0. It gets no more of the environment than any
    command needs: what is secret in ours is not for it."""

    def __init__(self, section: CommandSubscriber, beside: Path, runner: Runner) -> None:
        self._argv = section.command
        self._limit = section.timeout
        self._beside = beside
        self._runner = runner

    def deliver(self, event: Event) -> None:
        """As ``provision.engine.events.Subscriber`` has it."""
        env = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # timeout(1), since the command may outlive this process: nobody waits for it for long.
        result = self._runner.change(
            "timeout", "--kill-after=2", f"{self._limit:g}", self._program(), *self._argv[1:],
            timeout=self._limit + 10, ok=range(-64, 256), env=env, clean=True, input=event.body,
        )  # fmt: skip
        if result.status == _TIMED_OUT:
            raise TimedOut(f"{self._argv[0]} was still running after {self._limit:g} s: ended")
        if result.status:
            why = last_line(result.stderr or result.stdout, 200)
            words = f"{self._argv[0]} exited with {result.status}"
            raise Undelivered(f"{words}: {why}" if why else words)

    def check(self) -> None:
        """As ``provision.engine.events.Subscriber`` has it; nothing is run."""
        program = self._program()
        if which(program) is None:
            raise UsageError(f"there is no command {program}")

    def _program(self) -> str:
        """A path is relative to the farm file."""
        first = self._argv[0]
        return str(self._beside / Path(first).expanduser()) if "/" in first else first
