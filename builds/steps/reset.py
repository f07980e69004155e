"""reset: a VM goes back to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from builds.step_kind import StepKind
from inventory.sizes import format_duration
from provision.member import Member

if TYPE_CHECKING:
    from builds.step_run import StepRun
    from inventory.fields import Label, Name
    from inventory.model import Farm
    from provision.site import Site


@dataclass(frozen=True, kw_only=True)
class ResetStep(StepKind):
    """Put a VM back to a checkpoint, start it, wait until it answers."""

    KIND: ClassVar = "reset"
    VMS: ClassVar = ("reset",)
    RENEWS: ClassVar = True

    reset: Label
    """The VM."""
    to: Name | None = None
    """The checkpoint; absent: the VM's `reset_to`, or clean."""

    def refusal(self, farm: Farm) -> tuple[str, str] | None:
        driver = farm.driver_of(self.reset)
        if not driver.virtual and not farm.vms[self.reset].reset:
            return "reset", f"VM {self.reset} is on {driver.called} and has no 'reset' command"
        return None

    def on(self, farm: Farm) -> ResetStep:
        return replace(self, to=farm.goes_back_to(self.reset, self.to))

    def does(self) -> str:
        limit = format_duration(self.timeout)
        return f"reset to {self.to}, start, wait until its ssh answers, at most {limit}"

    def details(self) -> Mapping[str, str]:
        return {"to": self.to or ""}

    def check(self, site: Site) -> None:
        """That there is what it goes back to, and that this is proven: the disk, and the memory where
        that is kept, too."""
        from inventory.errors import Unsupported
        from provision.operations.reset import way_back

        way = way_back(Member(site, self.reset), self.to or "")
        if way.warm and not way.proven:
            raise Unsupported(
                f"{site.name}: step {self.name}: {self.reset}'s checkpoint {way.to} is warm, and a "
                "build begins on a proven disk",
                remedy="reset it to a cold checkpoint",
            )

    async def carry_out(self, work: StepRun) -> None:
        await work.machines.reset(self.reset, self.to or "", work.log.say)
