"""A build under way, seen from another terminal: the logs of its steps as they are written.

What the VMs print has ``GUEST`` in front, as in ``builds.log_text``. Which of a log's lines are
farmhand's own is in the record when the step has ended: until then all of them count as the VM's."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from builds.log_text import log_lines
from builds.record import CYCLE_LOCK, BuildRecord, StepRecord, find_record, read_record
from cli.run import TaskRun
from inventory.errors import Call, NotFound
from provision.site import Site

_PAUSE = 0.25  # seconds
_BLOCK = 2**20  # bytes that are read at once
_LONGEST = 2**16  # bytes of a line that is waited for


def follow_build(run: TaskRun, site: Site, build: str) -> BuildRecord:
    """Print it until it ends; returns its record then. ``build``: "" is the running one; another that
    has ended is printed from its beginning. NotFound where none runs. With --json and --quiet
    nothing is printed but the end."""
    record = read_record(site.paths, _running(site)) if not build else find_record(site.paths, build)
    steps: dict[str, _FollowedStep] = {}
    while True:
        for step in record.steps:
            if step.started:
                seen = steps.setdefault(step.name, _FollowedStep(step.name))
                for lines in seen.lines(record, step, several=_at_once(record)):
                    if not (run.json or run.quiet):
                        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
        if record.result != "running":
            return record
        time.sleep(_PAUSE)
        record = read_record(site.paths, record.id)


def _running(site: Site) -> str:
    """Its id; one that is just beginning is waited for."""
    while True:
        holder = site.locks.holder(CYCLE_LOCK)
        with contextlib.suppress(NotFound):
            last = find_record(site.paths)
            if last.result == "running":
                return last.id
        if holder is None:
            again = Call("log", build="last", follow=True)
            raise NotFound(
                f"{site.name}: no cycle is running",
                remedy=("the last one: ", Call("log"), "; with all its logs: ", again),
            )
        time.sleep(_PAUSE)


def _at_once(record: BuildRecord) -> bool:
    return sum(step.status == "running" for step in record.steps) > 1


@dataclass(slots=True)
class _FollowedStep:
    """How far its log was printed."""

    name: str
    begun: bool = False
    offset: int = 0
    number: int = 1  # of the next line
    rest: bytes = b""
    ended: bool = field(default=False)

    def lines(self, record: BuildRecord, step: StepRecord, *, several: bool) -> Iterator[list[str]]:
        """What is new, some lines at a time. ``several`` steps are under way: each line has its VM."""
        if self.ended:
            return
        if not self.begun:
            self.begun = True
            to = f" -> {step.to}" if step.to else ""
            yield [f"==> {step.name}{f' on {step.vm}' if step.vm else ''}{to} <=="]
        over = step.status != "running"
        front = f"{step.vm} " if several and step.vm else ""
        while data := self._read(record, step):
            *whole, self.rest = (self.rest + data).split(b"\n")
            yield from self._shown(whole, step, front)
            if len(self.rest) > _LONGEST:  # of one line: the number stays, and none of ours is so long
                yield [f"{front}{line}" for line in log_lines(self.rest.decode(errors="replace"), ())]
                self.rest = b""
        if over:
            yield from self._shown([self.rest] if self.rest else [], step, front)
            self.ended = True

    def _read(self, record: BuildRecord, step: StepRecord) -> bytes:
        try:
            with (record.directory / step.log).open("rb") as file:
                file.seek(self.offset)
                data = file.read(_BLOCK)
        except OSError:  # not yet there; or its record was just removed
            return b""
        self.offset += len(data)
        return data

    def _shown(self, whole: list[bytes], step: StepRecord, front: str) -> Iterator[list[str]]:
        if not whole:
            return
        text = "\n".join(line.decode(errors="replace") for line in whole) + "\n"
        lines = log_lines(text, frozenset(step.ours), self.number)
        self.number += len(whole)
        yield [front + line for line in lines]
