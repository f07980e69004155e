"""What a step of a cycle means in a package repository."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RepositoryPlace:
    """What a step means in a repository: a channel, or a flow, one of them."""

    repository: str
    channel: str = ""
    flow: str = ""

    def __str__(self) -> str:
        return f"{self.repository}'s {f'flow {self.flow}' if self.flow else self.channel}"
