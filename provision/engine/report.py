"""How a use case tells what it does, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from inventory.errors import Text, spelled
from provision.engine.facts import shown

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

UNCHANGING = ("keep", "note")
"""Verbs of the actions that change nothing: ``keep`` is as declared, ``note`` is worth knowing."""


class Reporter(Protocol):
    """Where an operation tells what it does. Any thread may call it, at any time."""

    def say(self, text: Text, *, vm: str = "") -> None:
        """Something happened; the line stays on the screen."""

    def working(self, text: str, *, vm: str = "") -> None:
        """Something is under way. Shown on a terminal, may be dropped elsewhere. What follows a
        semicolon is how far it is: where only that changes, the same thing goes on."""

    def warn(self, text: Text, *, vm: str = "") -> None:
        """Something is worth a look, though the work goes on."""


class QuietReporter:
    """Says nothing: for libraries, tests and ``--json``."""

    def say(self, text: Text, *, vm: str = "") -> None:
        """Drops it."""

    def working(self, text: str, *, vm: str = "") -> None:
        """Drops it."""

    def warn(self, text: Text, *, vm: str = "") -> None:
        """Drops it."""


@dataclass(frozen=True, slots=True)
class Action:
    """One line of a plan, and of what the run did. ``vm`` is "" for what concerns the whole farm.
    ``scripts``: those that it runs, for a plan to show in full."""

    verb: str
    vm: str
    text: Text
    scripts: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """As ``--json`` shows it."""
        scripts = {"scripts": list(self.scripts)} if self.scripts else {}
        return {"verb": self.verb, "vm": self.vm, "text": self.text, **scripts}

    def __str__(self) -> str:
        text = spelled(self.text)
        return f"{self.vm}: {text}" if self.vm else text


@dataclass(frozen=True, slots=True)
class NoResult:
    """Of an operation whose actions say it all."""


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R_co]):
    """What an operation did, or would do (``planned``). ``result``: a frozen dataclass of its own."""

    verb: str
    planned: bool
    actions: tuple[Action, ...]
    result: R_co

    @property
    def changed(self) -> bool:
        return any(action.verb not in UNCHANGING for action in self.actions)

    def as_dict(self) -> dict[str, object]:
        """As ``--json`` shows it."""
        return {
            "verb": self.verb,
            "planned": self.planned,
            "changed": self.changed,
            "actions": [action.as_dict() for action in self.actions],
            "facts": shown(self.result),
        }
