"""transfer: files of one VM carried to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from builds.step_kind import StepKind
from inventory.errors import FarmhandError, NotFound
from inventory.model import StepLimits
from inventory.sizes import format_duration, format_size

if TYPE_CHECKING:
    from builds.step_run import StepRun
    from inventory.fields import Label, Line, SomeLines
    from inventory.model import FailureClass


@dataclass(frozen=True, kw_only=True)
class TransferStep(StepKind):
    """Carry files from one VM to another, through the host."""

    KEYS: ClassVar = {"source": "from"}
    KIND: ClassVar = "transfer"
    VMS: ClassVar = ("source", "to")

    transfer: SomeLines
    """Files (shell patterns) in the VM they come from; relative to the login's home."""
    source: Label
    """The VM they come from."""
    to: Label
    """The VM they go to."""
    into: Line
    """The directory they go into; made if it is missing."""

    limits: StepLimits = field(default_factory=StepLimits)
    """How much is carried, where that isn't as the cycle has it."""

    @property
    def own_limits(self) -> StepLimits:
        return self.limits

    @property
    def target(self) -> str:
        return self.to

    def does(self) -> str:
        limit = format_duration(self.timeout)
        return f"carry {', '.join(self.transfer)} to {self.to}:{self.into}, at most {limit}"

    def details(self) -> Mapping[str, str]:
        return {"into": self.into}

    async def carry_out(self, work: StepRun) -> None:
        import asyncio

        source, target = await asyncio.gather(
            work.machines.connection(self.source), work.machines.connection(self.to)
        )
        with work.meter.guest():
            files = await source.list(self.transfer, work.limits)
        for file in files:
            with work.meter.guest():
                await source.carry(file, target, self.into)
            work.log.say(
                f"{self.source}:{file.path} -> {self.to}:{self.into}/{file.name}: "
                f"{format_size(file.size)}, sha256 {file.sha256} at both ends"
            )
            work.keep(file, vm=self.to, path=f"{self.into}/{file.name}")

    def class_of(self, error: FarmhandError) -> FailureClass:
        return "source" if isinstance(error, NotFound) else super().class_of(error)
