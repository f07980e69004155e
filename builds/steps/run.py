"""run: shell scripts in a VM, and what they made fetched into the record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from builds.step_kind import StepKind
from inventory.model import StepLimits
from inventory.sizes import format_duration, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from builds.step_run import StepFailed, StepRun
    from inventory.fields import Bool, Label, Lines, Scripts
    from inventory.model import FailureClass
    from provision.guest.connection import Connection

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
    root: Bool = False
    """Whether its scripts need root: they then run by sudo(8), in the login's home, where the login is
    another. A login that may not is refused before the cycle begins."""
    failure: FailureClass | None = None
    """The class of its failure; absent: judged by what it printed."""
    artifacts: Lines = ()
    """Files (shell patterns) that are fetched into the build record afterwards; relative to the
    login's home."""
    limits: StepLimits = field(default_factory=StepLimits)
    """How much is taken from the VM, where that isn't as the cycle has it."""

    @property
    def limit(self) -> float | None:
        return None  # what runs there is ended there

    @property
    def own_limits(self) -> StepLimits:
        return self.limits

    @property
    def needs_root(self) -> bool:
        return self.root

    @property
    def scripts(self) -> tuple[str, ...]:
        return self.run

    def does(self) -> str:
        first = next((ln.strip() for ln in self.run[0].splitlines() if ln.strip()), "")
        many = len(self.run) > 1 or len(self.run[0].strip().splitlines()) > 1
        fetched = f", fetch {', '.join(self.artifacts)}" if self.artifacts else ""
        limit = f"at most {format_duration(self.timeout)}"
        by = " as root" if self.root else ""
        return f"run {first[:60]}{' ...' if many or len(first) > 60 else ''}{by}, {limit}{fetched}"

    async def carry_out(self, work: StepRun) -> None:
        import asyncio

        machines = work.machines
        async with asyncio.timeout(max(self.timeout - work.seconds, 0)):
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
                    most=work.log.room,
                    root=self.root,
                )
            work.exit = result.status
            served = connection.git_said()
            for line in served:
                work.log.say(f"git says here, on this machine: {line}")
            if result.cut:
                raise self._too_much(work)
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

    def _too_much(self, work: StepRun) -> StepFailed:
        from builds.step_run import StepFailed

        most = format_size(work.limits.log_size)
        work.log.say(f"cut here: this step's log may have {most} (limits: log_size)")
        return StepFailed(
            self.failure or "source",
            f"printed more than {most}; ended there",
            remedy=work.limits.remedy("log_size"),
            exit=work.exit,
        )

    async def _fetch(self, work: StepRun, connection: Connection) -> None:
        """What arrives is kept, whatever becomes of the rest."""
        import asyncio

        from builds.step_run import StepFailed
        from host.files import check_room, make_directory
        from inventory.errors import NotFound

        make_directory(work.artifacts, mode=0o755)
        async with asyncio.timeout(max(self.timeout - work.seconds, _FETCHING)):
            with work.meter.guest():
                try:
                    files = await connection.list(self.artifacts, work.limits)
                except NotFound as error:
                    raise StepFailed(
                        "source", f"it left no artifact: {error.message}", remedy=error.remedy
                    ) from None
            check_room(work.artifacts, sum(file.size for file in files))
            home = self._home(work.artifacts, [file.name for file in files])
            for file in files:
                with work.meter.guest():
                    await connection.get(file, home)
                work.log.say(f"fetched {file.path}: {format_size(file.size)}, sha256 {file.sha256}")
                path = str((home / file.name).relative_to(work.artifacts.parent))
                work.keep(file, vm=self.vm, path=path, flow="out")

    def _home(self, artifacts: Path, names: Sequence[str]) -> Path:
        """artifacts/; where something else has one of the names there, artifacts/STEP/; and so on."""
        home, number = artifacts, 0
        while (home.exists() and not home.is_dir()) or any((home / name).exists() for name in names):
            number += 1
            home = artifacts / (self.name if number == 1 else f"{self.name}.{number}")
        return home
