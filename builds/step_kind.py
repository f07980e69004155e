"""A kind of step of a cycle. All that farmhand knows of a kind is in one file of ``builds.steps``.

A kind is its section of the farm file, with what is done for it: what is checked beforehand, its line in
the plan, how it is carried out, what it leaves in the record, the class of its failures. The cycle, its
plan, record and page know no kind by name.

Each command imports the kinds that its farm uses. What only a run needs, the run imports."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from inventory.errors import FarmhandError, NoSpace, Unfit
from inventory.model import Cycle, FailureClass, Step, StepLimits

if TYPE_CHECKING:
    from builds.repository_place import RepositoryPlace
    from builds.step_run import StepRun
    from provision.site import Site


@dataclass(frozen=True, kw_only=True)
class StepKind(Step, metaclass=ABCMeta):  # not ABC, which has slots
    """A step. Its fields are the keys of its section."""

    RENEWS: ClassVar[bool] = False
    """Whether it puts its VM into a known state, whatever the VM held before. Such steps that follow one
    another, of different VMs, are done side by side. Any other needs a VM that runs and answers."""
    BUILDS: ClassVar[bool] = False
    """Whether its VM has all its memory for it."""
    TOOLS: ClassVar[tuple[str, ...]] = ()
    """Commands that it runs on this machine, each in the Debian package of its name."""

    @property
    def limit(self) -> float | None:
        """Seconds after which the step is ended from outside; None: it keeps ``timeout`` itself."""
        return self.timeout

    @property
    def own_limits(self) -> StepLimits:
        """Its own limits to what is taken from its VM."""
        return StepLimits()

    @property
    def needs_root(self) -> bool:
        """Whether what it runs in its VM runs as root."""
        return False

    @property
    def scripts(self) -> tuple[str, ...]:
        """The shell commands that it runs in its VM."""
        return ()

    @abstractmethod
    def does(self) -> str:
        """What it does, in a few words, for the plan."""

    @property
    def target(self) -> str:
        """The VM that it brings something to from another VM; "" if it does no such thing."""
        return ""

    @property
    def uses(self) -> RepositoryPlace | None:
        """The channel or flow of a package repository, a generation of which its VM gets."""
        return None

    @property
    def publishes(self) -> RepositoryPlace | None:
        """The channel or flow that gets a new generation by it."""
        return None

    def details(self) -> Mapping[str, str]:
        """What the record and its page say of it besides its name and VMs: short texts by short
        names."""
        return {}

    def check(self, site: Site) -> None:
        """Check what can be known before anything is touched; its VMs exist. FarmhandError."""

    @abstractmethod
    async def carry_out(self, work: StepRun) -> None:
        """Do it. Raises StepFailed if it knows the class of its failure, else another FarmhandError."""

    def class_of(self, error: FarmhandError) -> FailureClass:
        """The failure class of an error of ours that ended it."""
        if isinstance(error, Unfit):
            return "source"
        return "environment" if isinstance(error, NoSpace) else "infrastructure"


def steps_of(cycle: Cycle) -> tuple[StepKind, ...]:
    """A cycle's steps, as StepKinds."""
    steps = tuple(step for step in cycle.steps if isinstance(step, StepKind))
    assert len(steps) == len(cycle.steps), "every kind of builds.steps is a StepKind"
    return steps
