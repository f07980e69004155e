"""use: a VM is pointed to a generation of a package repository."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from builds.repository_place import RepositoryPlace
from builds.step_kind import StepKind
from inventory.base import at_key
from inventory.sizes import format_duration

if TYPE_CHECKING:
    from builds.step_run import StepRun
    from inventory.errors import FarmhandError
    from inventory.fields import Label
    from inventory.model import FailureClass, Farm


@dataclass(frozen=True, kw_only=True)
class UseStep(StepKind):
    """Point a VM to the generation of a package repository that a channel or a flow has when the build
    begins, or that an earlier step of the build published to it. All its steps get the same one; the
    record says which."""

    KIND: ClassVar = "use"
    VMS: ClassVar = ("vm",)

    use: Label
    """The repository."""
    vm: Label
    """The VM."""
    channel: Label | None = None
    """The channel."""
    flow: Label | None = None
    """In place of a channel: the flow."""

    def __post_init__(self) -> None:
        if (self.channel is None) == (self.flow is None):
            raise at_key("", "a step uses a 'channel' or a 'flow', one of them", "channel", "flow")

    @property
    def uses(self) -> RepositoryPlace:
        return RepositoryPlace(self.use, self.channel or "", self.flow or "")

    @property
    def needs_root(self) -> bool:
        return True

    def refusal(self, farm: Farm) -> tuple[str, str] | None:
        if self.use not in farm.repositories:
            return "use", f"no repository is called {self.use}"
        if self.channel and self.channel not in farm.repositories[self.use].channels:
            return "channel", f"repository {self.use} has no channel {self.channel}"
        return None

    def does(self) -> str:
        limit = format_duration(self.timeout)
        return f"packages of {self.uses}, as it is when the build begins, at most {limit}"

    def details(self) -> Mapping[str, str]:
        return {"repository": str(self.uses)}

    async def carry_out(self, work: StepRun) -> None:
        from builds.record import UsedGeneration
        from builds.repository_client import point_to, reached_by
        from provision.guest.ssh_connection import in_thread

        repository, generation = await in_thread(lambda: work.repositories.generation(self))
        source = await reached_by(work.machines, self.vm, repository, generation)
        work.repositories.note(
            UsedGeneration(
                repository=repository.name, channel=generation.channel, generation=generation.sequence,
                url=source.url if repository.settings.url else "", vm=self.vm, step=self.name,
            )
        )  # fmt: skip
        work.details["generation"] = f"{generation.sequence} of {generation.channel}"
        work.log.say(
            f"{self.vm} gets generation {generation.sequence} of {repository.name}: {source.url}"
        )
        await point_to(
            work.machines, self.vm, repository, source, build=work.artifacts.parent.name, log=work.log,
            seconds=self.timeout - work.seconds,
        )  # fmt: skip
        work.exit = 0

    def class_of(self, error: FarmhandError) -> FailureClass:
        from inventory.errors import NotFound

        return "source" if isinstance(error, NotFound) else super().class_of(error)
