"""publish: what a build made, added to a package repository's channel, or to a flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from builds.repository_place import RepositoryPlace
from builds.step_kind import StepKind
from inventory.base import at_key

if TYPE_CHECKING:
    from builds.step_run import StepRun
    from inventory.errors import FarmhandError
    from inventory.fields import Label, Line
    from inventory.model import FailureClass, Farm
    from provision.engine.report import Action

_AIM = "tested"


@dataclass(frozen=True, kw_only=True)
class PublishStep(StepKind):
    """Add the packages that the earlier steps of the build fetched to a package repository: to a
    channel, or to a flow, which begins with them, or gets them beside what it has."""

    KIND: ClassVar = "publish"
    VMS: ClassVar = ()

    publish: Label
    """The repository."""
    channel: Label | None = None
    """The channel; with `flow`: the one that it aims at, absent: tested."""
    flow: Label | None = None
    """The flow."""
    component: Line | None = None
    """deb only: the component; absent: the repository's first."""

    def __post_init__(self) -> None:
        if self.channel is None and self.flow is None:
            raise at_key("", "a step publishes to a 'channel' or to a 'flow'", "channel", "flow")

    @property
    def publishes(self) -> RepositoryPlace:
        if self.flow:
            return RepositoryPlace(self.publish, flow=self.flow)
        return RepositoryPlace(self.publish, self.channel or "")

    def refusal(self, farm: Farm) -> tuple[str, str] | None:
        if self.publish not in farm.repositories:
            return "publish", f"no repository is called {self.publish}"
        repository, channel = farm.repositories[self.publish], self.channel or _AIM
        if channel not in repository.channels:
            return "channel" if self.channel else "flow", f"{self.publish} has no channel {channel}"
        if self.component and self.component not in repository.components:
            return "component", f"{self.publish} has no component {self.component}"
        return None

    def does(self) -> str:
        return f"what was fetched, to {self.publishes}"

    def details(self) -> Mapping[str, str]:
        return {"repository": str(self.publishes)}

    async def carry_out(self, work: StepRun) -> None:
        from builds.step_run import StepFailed
        from provision.engine.runner import perform
        from provision.guest.ssh_connection import in_thread
        from provision.operations.flows import FlowBegin
        from provision.operations.repositories import RepoAdd
        from provision.package_repositories import opened

        if work.repositories.like is not None:
            work.log.say(f"a run like build {work.repositories.like.id} publishes nothing")
            work.details["published"] = "nothing: a run like an earlier one"
            return
        if work.failed:
            raise StepFailed("source", f"step {work.failed} failed: nothing is published")
        repository = opened(work.site.farm, self.publish)
        directory, suffix = work.artifacts.parent, repository.format.SUFFIX
        files = [file for file in work.made if file.name.endswith(suffix)]
        paths = tuple(directory / file.path for file in files)
        if not files:
            raise StepFailed(
                "source",
                f"no step of this build has fetched a {suffix} file",
                remedy="give the step that builds them 'artifacts'",
            )
        channel, component = self.channel or _AIM, self.component or ""

        def publish() -> tuple[Sequence[Action], int]:
            if self.flow:
                begin = FlowBegin(
                    repository.name, self.flow, channel, paths, component, directory.name, more=True,
                    sums=tuple(file.sha256 for file in files),
                )  # fmt: skip
                begun = perform(work.site, begin)
                return begun.actions, begun.result.generation
            add = RepoAdd(
                repository.name, channel, paths, component, directory.name,
                sums=tuple(file.sha256 for file in files),
            )  # fmt: skip
            added = perform(work.site, add)
            return added.actions, added.result.generation

        await work.before_publishing()
        actions, generation = await in_thread(publish)
        for action in actions:
            work.log.say(f"{action}")
        work.details["generation"] = str(generation)
        await in_thread(lambda: work.repositories.published(self.publishes, generation))

    def class_of(self, error: FarmhandError) -> FailureClass:
        """What is wrong with the packages is the source's: damaged ones (Unfit), and such as contradict
        others."""
        from inventory.errors import Conflict

        return "source" if isinstance(error, Conflict) else super().class_of(error)
