"""What a builder VM is told, and what it answers: between whoever runs a build of many packages
(``builds.packages.run``) and whoever knows how one is built (``builds.packages.formats``)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from builds.packages.inputs import InstalledPackage
from builds.packages.record import BuilderRecord
from builds.packages.source import SourceState
from builds.step_run import StepLog
from inventory.model import Limits
from inventory.packages import PackageBuilds
from provision.guest.connection import Connection, Moved


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOrder:
    """One build in one VM, which was just reset and reaches the repository. ``name``: the build's, for
    messages. ``source``: a tar archive on this machine whose one directory is the source, or has the
    files of a .dsc or .src.rpm (``builds.packages.packing.pack``). ``downloads``: files on this machine,
    for $DOWNLOADS. ``profiles``: the build profiles, a bootstrap's among them. ``environment``: what the
    farm says of it: GIT_REVISION, BUILD_ID, FARM, SOURCE_DATE_EPOCH. ``repository``: the id of its
    sources in the VM (``farmhand-NAME``); ``outside``: whether dependencies may come from elsewhere,
    too. ``install``: exactly these packages, NAME=VERSION, in place of what the source asks for (a
    rebuild from a record); None: as the source asks. ``seconds``: how long all of it may take."""

    name: str
    state: SourceState
    source: Path
    settings: PackageBuilds
    environment: Mapping[str, str]
    repository: str
    downloads: tuple[Path, ...] = ()
    profiles: frozenset[str] = frozenset()
    outside: bool = True
    install: tuple[str, ...] | None = None
    seconds: float = 3600.0
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """``installed``: all that was installed when the build began, sorted by name, without sums.
    ``files``: what it made, not fetched yet: packages, .buildinfo, .changes. ``builder``: with what the
    guest told of itself: CPUs, kernel, features, user, directory, umask, environment."""

    installed: tuple[InstalledPackage, ...]
    files: tuple[Moved, ...]
    builder: BuilderRecord


class BuildFormat(Protocol):
    """How packages of one format are built in a VM."""

    NAME: ClassVar[str]

    def recipe(self, settings: PackageBuilds) -> str:
        """The text of all that is done in the VM: other text, other digest."""

    async def build(
        self,
        connection: Connection,
        order: BuildOrder,
        log: StepLog,
        before: Callable[[tuple[InstalledPackage, ...]], Awaitable[None]],
    ) -> Built:
        """Send the source, install what it wants, build it as ``settings.user`` without network, within
        its limits. ``before`` is told what is installed, just before the build. Raises StepFailed with
        its class: dependencies (what can't be installed), source (what doesn't build), time-out,
        environment (a tool that isn't in the VM); ConnectionLost, for whoever asked to judge."""
