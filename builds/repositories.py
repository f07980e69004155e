"""The package repositories of a build: which generation each of its steps means.

Steps name a channel or a flow, and both move. So each is looked up once, when the build begins, and all
steps and VMs of the build get that very generation. Only what a step of the build itself publishes to is
what that step made of it, for the steps after it. A lease keeps each generation until the build has
ended; then its record does, for what was used. A run like an earlier one gets what that one had."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from builds.record import BuildRecord, UsedGeneration
from builds.repository_place import RepositoryPlace
from inventory.errors import Call, NotFound

if TYPE_CHECKING:
    from provision.site import Site
    from repositories.generation import Generation
    from repositories.repository import Repository


class RepositoryStep(Protocol):
    """What is asked of a step."""

    @property
    def name(self) -> str: ...
    @property
    def uses(self) -> RepositoryPlace | None: ...
    @property
    def publishes(self) -> RepositoryPlace | None: ...


def holder_of(build: str) -> str:
    """Of a build's leases."""
    return f"build {build}"


def meant_now(
    site: Site, steps: Sequence[RepositoryStep], like: BuildRecord | None
) -> Mapping[str, int]:
    """By step, the generation that it means as things are now; without those that a step before it
    publishes to. Changes nothing. NotFound, WrongState: there is none."""
    published: set[RepositoryPlace] = set()
    found: dict[str, int] = {}
    for step in steps:
        if step.uses is not None and (like or step.uses not in published):
            found[step.name] = _meant(site, step, step.uses, like)
        if step.publishes is not None:
            published.add(step.publishes)
    return found


def _meant(site: Site, step: RepositoryStep, place: RepositoryPlace, like: BuildRecord | None) -> int:
    from provision.package_repositories import opened

    repository = opened(site.farm, place.repository)
    if like is not None:
        used = next((one for one in like.repositories if one.step == step.name), None)
        if used is None or used.repository != place.repository:
            raise NotFound(
                f"{site.name}: build {like.id} used nothing of {place.repository} in a step {step.name}",
                remedy=("its record says what it used; or take what is there now: ", Call("cycle")),
            )
        try:
            return repository.documents.read(used.generation).sequence
        except NotFound:
            raise NotFound(
                f"{site.name}: build {like.id} used generation {used.generation} of {place.repository}, "
                "which is gone: it can't be done again on just that",
                remedy=("what there is: ", Call("repo-log", repo=place.repository)),
            ) from None
    if not repository.exists:
        raise NotFound(
            f"{site.name}: step {step.name}: nothing was published in {place.repository} yet",
            remedy=Call("repo-add", repo=place.repository),
        )
    if place.flow:
        return repository.flows.open(place.flow).to_test
    return repository.generation(place.channel).sequence


class BuildRepositories:
    """Those of one build, which holds leases until ``give_back``. Its methods wait for locks, and are
    for threads."""

    def __init__(
        self,
        site: Site,
        build: str,
        like: BuildRecord | None = None,
        before: Sequence[UsedGeneration] = (),
    ) -> None:
        """``before``: what the steps that are left out pointed their VMs to."""
        self._site = site
        self._build = build
        self.like = like
        self._meant: dict[str, int] = {}  # by step
        self._published: dict[RepositoryPlace, int] = {}
        self._holding: set[str] = set()
        self.used = tuple(before)

    def begin(self, steps: Sequence[RepositoryStep]) -> None:
        """Look up what the steps mean, and take leases of it. NotFound, WrongState."""
        if not any(step.uses for step in steps):
            return
        wanted = {step.uses.repository for step in steps if step.uses}
        with contextlib.ExitStack() as stack:
            for name in sorted(wanted):
                stack.enter_context(self._locked(name))
            self._meant = dict(meant_now(self._site, steps, self.like))
            for step in steps:
                if step.uses and step.name in self._meant:
                    self._take(step.uses.repository, self._meant[step.name])

    def published(self, place: RepositoryPlace, generation: int) -> None:
        """A step of this build made that of it: the steps after it use just this."""
        with self._locked(place.repository):
            self._take(place.repository, generation)
        self._published[place] = generation

    def generation(self, step: RepositoryStep) -> tuple[Repository, Generation]:
        """What the step uses. NotFound: the step that was to publish it was left out, or failed."""
        from provision.package_repositories import opened

        assert step.uses
        number = self._meant.get(step.name) or self._published.get(step.uses)
        if number is None:
            raise NotFound(f"no step of this build has published to {step.uses}")
        repository = opened(self._site.farm, step.uses.repository)
        return repository, repository.documents.read(number)

    def note(self, used: UsedGeneration) -> None:
        """For the record, which keeps the generation from now on."""
        if used not in self.used:
            self.used = (*self.used, used)

    def give_back(self) -> None:
        """The leases, at the build's end."""
        for name in sorted(self._holding):
            give_back(self._site, name, self._build)
        self._holding.clear()

    def _take(self, name: str, generation: int) -> None:
        from provision.package_repositories import opened
        from repositories.leases import take

        self._holding.add(name)
        take(opened(self._site.farm, name).layout, generation, holder_of(self._build))

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        from provision.package_repositories import opened
        from repositories.change import changing

        repository = opened(self._site.farm, name)
        if not repository.exists:
            yield
            return
        with changing(repository):
            yield


def give_back(site: Site, name: str, build: str) -> None:
    """A build's leases in one repository of the farm."""
    from provision.package_repositories import opened
    from repositories.leases import give_back

    repository = opened(site.farm, name)
    if repository.exists:
        give_back(repository.layout, holder_of(build))
