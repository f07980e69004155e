"""How daemons are told about changed files, live where they can be, and how they are seen to have taken
them.

A step is announced before it is done, is the same in a plan, and raises if the daemon refuses or dies.
The steps of a change's inverse put the daemon back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from inventory.errors import DriverFailed, WrongState
from provision.network.service import ApplyStep, services

if TYPE_CHECKING:
    from host.run import Runner
    from inventory.model import Farm
    from provision.network.file_change import FileChange

_LIMIT = 120  # seconds in which a command that tells a daemon does nothing
_SETTLE = 5.0  # seconds that a daemon may take to come up with what it was told
_LOOKS = 40  # and looks: on a machine so busy that one takes a second, a daemon takes long, too
_BLINK = 1.0
_STEADY = 0.3  # for so long it must stay up: one that forks first dies a moment later
_MISSED = 3  # looks


class Settling:
    """The time that a daemon may take to come up with what it was told."""

    def __init__(self) -> None:
        self._looks = 0
        self._until = time.monotonic() + _SETTLE

    def over(self) -> bool:
        """Whether it is. Asked after each look."""
        self._looks += 1
        return self._looks >= _LOOKS and time.monotonic() > self._until


def steps(farm: Farm, changes: Sequence[FileChange]) -> tuple[ApplyStep, ...]:
    """What to tell which daemon after these changes."""
    found: dict[str, list[FileChange]] = {}
    for change in changes:
        found.setdefault(change.service, []).append(change)
    told = [service for service in services(farm) if service.NAME in found]
    told.sort(key=lambda service: service.TOLD_LAST)
    every = [step for service in told for step in service.steps(farm, found[service.NAME])]
    return tuple(sorted(every, key=lambda step: step.restarts))


def command(
    service: str, argv: Sequence[str], alive: Sequence[str] = (), *, restarts: bool = False
) -> ApplyStep:
    """A step that runs a command, for as long as that works. ``alive``: the command that succeeds while
    the daemon runs."""

    def run(runner: Runner) -> None:
        runner.change(*argv, timeout=_LIMIT, patient=True)
        if alive:
            _stays_up(runner, service, alive)

    return ApplyStep(service, f"{service}: {' '.join(argv)}", run, restarts, tuple(alive))


def runs(runner: Runner, alive: Sequence[str]) -> bool:
    """Whether the daemon does, by its own command for that."""
    return runner.read(*alive, ok=range(256)).status == 0


def stopped(
    runner: Runner, service: str, alive: Sequence[str], tell: Sequence[str]
) -> Iterator[WrongState]:
    """If a daemon that can't be told anything while it is stopped is stopped. ``tell``: the command that
    it is told by."""
    if not runs(runner, alive):
        unit = f"as root: systemctl start {tell[-1]}" if tell[:1] == ("systemctl",) else "start it"
        yield WrongState(f"{service} doesn't run ({runner.show(alive)} says so)", remedy=unit)


def _stays_up(runner: Runner, service: str, alive: Sequence[str]) -> None:
    """Check that the daemon runs. One that was seen and is gone has a moment: haproxy, for one, empties
    its pid file and writes it again when it is told to reload."""
    settling = Settling()
    since = seen = None
    missed = 0
    while True:
        now = time.monotonic()
        if runs(runner, alive):
            since = now if since is None else since
            seen, missed = now, 0
            if now - since >= _STEADY:
                return
        else:
            since = None
            missed += 1
            gone = seen is not None and missed >= _MISSED and now - seen > _BLINK
            if settling.over() or gone:
                raise DriverFailed(
                    f"{service} doesn't run with its new configuration ({runner.show(alive)} says so)",
                    remedy="see its log",
                )
        time.sleep(0.05)


def lines(text: str | None) -> set[str]:
    """A file's lines without comments: to see which came and went."""
    return {line for line in (text or "").splitlines() if not line.startswith("#")}


def in_turn(*runs: Callable[[Runner], None]) -> Callable[[Runner], None]:
    """One after the other."""

    def run(runner: Runner) -> None:
        for each in runs:
            each(runner)

    return run
