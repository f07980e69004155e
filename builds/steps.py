"""One step of a cycle: carried out, its log written as it is made, its failure given a class."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from builds.classify import classify
from builds.machines import Machines
from builds.meter import Meter
from builds.record import FileRecord
from host.files import make_directory, open_to_append
from host.printable import plain
from inventory.errors import (
    Conflict,
    FarmhandError,
    NoSpace,
    NotFound,
    Remedy,
    TimedOut,
)
from inventory.model import FailureClass, ResetStep, RunStep, Step, TransferStep
from inventory.sizes import format_duration, format_size
from provision.guest.connection import Moved

_TAIL_BYTES = 65536


class StepFailed(Exception):
    """``failure`` is the class; the message one line; ``remedy`` what the error it comes from says."""

    def __init__(
        self,
        failure: FailureClass,
        message: str,
        *,
        remedy: Remedy = "",
        exit: int | None = None,
        console: str = "",
    ) -> None:
        super().__init__(message)
        self.failure = failure
        self.remedy = remedy
        self.exit = exit
        self.console = console


class StepLog:
    """A step's log: raw bytes to the file and onwards as they come; the end is kept in memory."""

    def __init__(self, path: Path, vm: str, stream: Callable[[str, bytes], None] | None) -> None:
        self._file = open_to_append(path, mode=0o644)
        self._vm = vm
        self._stream = stream
        self._tail = bytearray()
        self._mark = 0
        self.trouble = ""

    def write(self, data: bytes) -> None:
        """Never raises: a full disk here must not end what runs there."""
        try:
            self._file.write(data)
        except OSError as error:
            self.trouble = f"the log is incomplete: {error.strerror}"
        self._tail += data
        if len(self._tail) > 2 * _TAIL_BYTES:
            cut = len(self._tail) - _TAIL_BYTES
            del self._tail[:cut]
            self._mark = max(self._mark - cut, 0)
        if self._stream is not None:
            self._stream(self._vm, data)

    def say(self, text: str) -> None:
        """A line of ours."""
        start = b"\n" if self._tail and not self._tail.endswith(b"\n") else b""
        self.write(start + f"farmhand: {text}\n".encode())

    def mark(self) -> None:
        """What is judged later begins here."""
        self._mark = len(self._tail)

    def text(self) -> str:
        """The output since the mark, at most its last 64 KiB, as plain text."""
        return _plain(self._tail[self._mark :][-_TAIL_BYTES:])

    def last(self, lines: int) -> str:
        return "\n".join(_plain(self._tail).splitlines()[-lines:])

    def close(self) -> None:
        self._file.close()


def _plain(data: bytearray) -> str:
    return plain(data.decode(errors="replace"))


@dataclass(slots=True, kw_only=True)
class StepRun:
    """Everything a step needs. ``files`` is what it fetched or carried, ``exit`` its last status."""

    machines: Machines
    meter: Meter
    environment: Callable[[str], Mapping[str, str]]
    before_run: Callable[[str, StepLog], Awaitable[None]]
    artifacts: Path
    log: StepLog
    files: list[FileRecord] = field(default_factory=list)
    exit: int | None = None

    async def carry_out(self, step: Step) -> None:
        """StepFailed, with its class, for everything that can go wrong."""
        began = time.monotonic()
        try:
            await self.machines.look()
            if isinstance(step, RunStep):
                await self._run(step, began)
                return
            async with asyncio.timeout(step.timeout):
                if isinstance(step, ResetStep):
                    await self.machines.reset(step, self.log.say)
                else:
                    await self._transfer(step)
        except TimeoutError:
            vm = step.reset if isinstance(step, ResetStep) else ""
            raise StepFailed(
                "time-out",
                f"not done within its limit of {format_duration(step.timeout)}",
                console=self.machines.console(vm) if vm else "",
            ) from None
        except FarmhandError as error:
            raise await self._judged(step, error) from error

    async def _run(self, step: RunStep, began: float) -> None:
        machines = self.machines
        await machines.inflate(step.vm)
        connection = await machines.connection(step.vm)
        await machines.list_packages(step.vm)
        await self.before_run(step.vm, self.log)
        environment = {**self.environment(step.vm), **await machines.source(step.vm)}
        for number, script in enumerate(step.run, 1):
            left = step.timeout - (time.monotonic() - began)
            self.log.mark()
            with self.meter.guest():
                result = await connection.run(
                    script, env=environment, timeout=max(left, 0.001), log=self.log.write
                )
            self.exit = result.status
            served = connection.git_said()
            for line in served:
                self.log.say(f"git says here, on this machine: {line}")
            if result.status == 0:
                continue
            kind, evidence = classify(
                self.log.text(),
                status=result.status,
                timed_out=result.timed_out,
                declared=step.failure,
            )
            which = f"script {number} of {len(step.run)} " if len(step.run) > 1 else ""
            if result.timed_out:
                message = f"not done within its limit of {format_duration(step.timeout)}; ended there"
            elif evidence:
                message = evidence
            else:
                message = f"{which}exited with {result.status}"
            if served:
                message += f"; git says here, on this machine: {served[0]}"
            raise StepFailed(kind, message, exit=result.status)
        if step.artifacts:
            make_directory(self.artifacts, mode=0o755)
            left = max(step.timeout - (time.monotonic() - began), 60.0)
            with self.meter.guest():
                try:
                    async with asyncio.timeout(left):
                        fetched = await connection.get(step.artifacts, self.artifacts / f".{step.name}")
                except NotFound as error:
                    raise StepFailed(
                        "source", f"it left no artifact: {error.message}", remedy=error.remedy
                    ) from None
            self._keep(step, fetched)

    def _keep(self, step: RunStep, fetched: tuple[Moved, ...]) -> None:
        """Into artifacts/, or artifacts/STEP/ where another step's file has the name."""
        waiting = self.artifacts / f".{step.name}"
        taken = any((self.artifacts / file.name).exists() for file in fetched)
        home = self.artifacts / step.name if taken else self.artifacts
        make_directory(home, mode=0o755)
        for file in fetched:
            (waiting / file.name).replace(home / file.name)
            (home / file.name).chmod(0o644)
            self.log.say(f"fetched {file.path}: {format_size(file.size)}, sha256 {file.sha256}")
            self.files.append(
                FileRecord(
                    name=file.name, size=file.size, sha256=file.sha256, step=step.name, vm=step.vm,
                    path=str((home / file.name).relative_to(self.artifacts.parent)),
                )
            )  # fmt: skip
        waiting.rmdir()

    async def _transfer(self, step: TransferStep) -> None:
        source, target = await asyncio.gather(
            self.machines.connection(step.source), self.machines.connection(step.to)
        )
        with self.meter.guest():
            moved = await source.transfer(step.transfer, target, step.into)
        for file in moved:
            self.log.say(
                f"{step.source}:{file.path} -> {step.to}:{step.into}/{file.name}: "
                f"{format_size(file.size)}, sha256 {file.sha256} at both ends"
            )
            self.files.append(
                FileRecord(
                    name=file.name, size=file.size, sha256=file.sha256, step=step.name, vm=step.to,
                    path=f"{step.into}/{file.name}",
                )
            )  # fmt: skip

    async def _judged(self, step: Step, error: FarmhandError) -> StepFailed:
        """The class of an error of ours. What a guest's own scripts print is judged elsewhere."""
        if isinstance(error, NotFound) and isinstance(step, TransferStep):
            return StepFailed("source", error.message, remedy=error.remedy)
        if isinstance(error, NoSpace):
            return StepFailed("environment", error.message, remedy=error.remedy)
        vms = [step.reset] if isinstance(step, ResetStep) else (
            [step.vm] if isinstance(step, RunStep) else [step.source, step.to]
        )  # fmt: skip
        vm = next((vm for vm in vms if error.message.startswith(f"{vm}:")), vms[0])
        state = ""
        if not isinstance(error, (Conflict, TimedOut)) and "connection" in error.message:
            state = await asyncio.to_thread(self.machines.state, vm)
        return StepFailed(
            "infrastructure",
            f"{error.message}{f' ({state})' if state else ''}",
            remedy=error.remedy,
            console=error.detail or self.machines.console(vm),
        )
