"""What a repository's channels have now of what was built."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from builds.packages.lookup import package_name
from builds.packages.record import packages_of
from builds.pages.summary import BuildSummary
from inventory.errors import FarmhandError
from inventory.model import Farm
from provision.package_repositories import opened

if TYPE_CHECKING:
    from repositories.repository import Repository


class ChannelContents:
    """As they are when it is asked the first time. ``repository``: that of the farm's builds; None: it
    has none."""

    def __init__(self, farm: Farm) -> None:
        self.repository: Repository | None = opened(farm, farm.build.repository) if farm.build else None
        self._sums: dict[tuple[str, str], frozenset[str]] = {}

    def builds_in(self, builds: Iterable[BuildSummary]) -> Mapping[str, BuildSummary]:
        """By channels, the newest of these of which the channel has a package."""
        found: dict[str, BuildSummary] = {}
        channels = self.repository.settings.channels if self.repository else ()
        for build in builds:
            files = packages_of(build.outputs)
            for channel in channels:
                if channel not in found and any(
                    file.sha256 in self._of(channel, package_name(file)) for file in files
                ):
                    found[channel] = build
        return {channel: found[channel] for channel in channels if channel in found}

    def _of(self, channel: str, name: str) -> frozenset[str]:
        """Sums of the packages of that name. A channel that can't be read has none here: it is for the
        repository's own tasks to say so."""
        key = channel, name
        if key not in self._sums:
            self._sums[key] = frozenset()
            with contextlib.suppress(FarmhandError):
                assert self.repository is not None
                head = self.repository.head(channel)
                if head is not None:
                    packages = self.repository.chunks.named(head.chunks, name)
                    self._sums[key] = frozenset(package.sha256 for package in packages)
        return self._sums[key]
