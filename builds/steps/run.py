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

    from builds.step_run import StepRun
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
        from builds.scripts import run_scripts

        connection = await run_scripts(
            work, self.vm, self.run, timeout=self.timeout, root=self.root, declared=self.failure
        )
        if self.artifacts:
            await self._fetch(work, connection)

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
