"""run: shell scripts in a VM, and what they made fetched into the record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from builds.step_kind import StepKind
from inventory.sizes import format_duration, format_size

if TYPE_CHECKING:
    from builds.step_run import StepRun
    from inventory.fields import Label, Lines, Scripts
    from inventory.model import FailureClass
    from provision.guest.connection import Connection, Moved

_FETCHING = 60.0  # seconds at least, for the artifacts


@dataclass(frozen=True, kw_only=True)
class RunStep(StepKind):
    """Run shell commands in a VM."""

    KIND: ClassVar = "run"
    VMS: ClassVar = ("vm",)
    BUILDS: ClassVar = True

    vm: Label
    """The VM."""
    run: Scripts
    """Shell scripts, run by `sh -eu` one after the other, as the ssh login. What they get is in
    docs/cycle.md."""
    failure: FailureClass | None = None
    """The class of its failure; absent: judged by what it printed."""
    artifacts: Lines = ()
    """Files (shell patterns) that are fetched into the build record afterwards; relative to the
    login's home."""

    @property
    def limit(self) -> float | None:
        return None  # what runs there is ended there

    @property
    def scripts(self) -> tuple[str, ...]:
        return self.run

    def does(self) -> str:
        first = next((ln.strip() for ln in self.run[0].splitlines() if ln.strip()), "")
        many = len(self.run) > 1 or len(self.run[0].strip().splitlines()) > 1
        fetched = f", fetch {', '.join(self.artifacts)}" if self.artifacts else ""
        limit = f"at most {format_duration(self.timeout)}"
        return f"run {first[:60]}{' ...' if many or len(first) > 60 else ''}, {limit}{fetched}"

    async def carry_out(self, work: StepRun) -> None:
        machines = work.machines
        connection = await machines.connection(self.vm)
        await machines.list_packages(self.vm)
        await work.before_run(self.vm, work.log)
        environment = {**work.environment(self.vm), **await machines.source(self.vm)}
        for number, script in enumerate(self.run, 1):
            work.log.mark()
            with work.meter.guest():
                result = await connection.run(
                    script,
                    env=environment,
                    timeout=max(self.timeout - work.seconds, 0.001),
                    log=work.log.write,
                )
            work.exit = result.status
            served = connection.git_said()
            for line in served:
                work.log.say(f"git says here, on this machine: {line}")
            if result.status:
                self._failed(work, number, result.timed_out, served)
        if self.artifacts:
            await self._fetch(work, connection)

    def _failed(self, work: StepRun, number: int, late: bool, served: tuple[str, ...]) -> None:
        """StepFailed."""
        from builds.classify import classify
        from builds.step_run import StepFailed

        assert work.exit is not None
        kind, evidence = classify(
            work.log.text(), status=work.exit, timed_out=late, declared=self.failure
        )
        which = f"script {number} of {len(self.run)} " if len(self.run) > 1 else ""
        if late:
            message = f"not done within its limit of {format_duration(self.timeout)}; ended there"
        elif evidence:
            message = evidence
        else:
            message = f"{which}exited with {work.exit}"
        if served:
            message += f"; git says here, on this machine: {served[0]}"
        raise StepFailed(kind, message, exit=work.exit)

    async def _fetch(self, work: StepRun, connection: Connection) -> None:
        import asyncio

        from builds.step_run import StepFailed
        from host.files import make_directory
        from inventory.errors import NotFound

        make_directory(work.artifacts, mode=0o755)
        left = max(self.timeout - work.seconds, _FETCHING)
        with work.meter.guest():
            try:
                async with asyncio.timeout(left):
                    fetched = await connection.get(self.artifacts, work.artifacts / f".{self.name}")
            except NotFound as error:
                raise StepFailed(
                    "source", f"it left no artifact: {error.message}", remedy=error.remedy
                ) from None
        self._keep(work, fetched)

    def _keep(self, work: StepRun, fetched: tuple[Moved, ...]) -> None:
        """Into artifacts/, or artifacts/STEP/ where another step's file has the name."""
        from host.files import make_directory

        waiting = work.artifacts / f".{self.name}"
        taken = any((work.artifacts / file.name).exists() for file in fetched)
        home = work.artifacts / self.name if taken else work.artifacts
        make_directory(home, mode=0o755)
        for file in fetched:
            (waiting / file.name).replace(home / file.name)
            (home / file.name).chmod(0o644)
            work.log.say(f"fetched {file.path}: {format_size(file.size)}, sha256 {file.sha256}")
            path = str((home / file.name).relative_to(work.artifacts.parent))
            work.keep(file, vm=self.vm, path=path, flow="out")
        waiting.rmdir()
