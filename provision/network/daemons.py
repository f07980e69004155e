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

SETTLE = 5.0
"""Seconds a daemon may take to come up with what it was told."""
_BLINK = 1.0
_STEADY = 0.3  # for so long it must stay up: one that forks first dies a moment later


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
    """A step that runs a command. ``alive``: the command that succeeds while the daemon runs."""

    def run(runner: Runner) -> None:
        runner.change(*argv, timeout=120)
        if alive:
            _stays_up(runner, service, alive)

    return ApplyStep(service, f"{service}: {' '.join(argv)}", run, restarts, tuple(alive))


def runs(runner: Runner, alive: Sequence[str]) -> bool:
    """Whether the daemon does, by its own command for that."""
    return runner.read(*alive, timeout=10, ok=range(256)).status == 0


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
    limit = deadline = time.monotonic() + SETTLE
    since = None
    while True:
        now = time.monotonic()
        if runs(runner, alive):
            since = now if since is None else since
            deadline = min(limit, now + _BLINK)
            if now - since >= _STEADY:
                return
        else:
            since = None
            if now > deadline:
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
