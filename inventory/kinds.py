"""The sections of a farm file that belong to a kind: of a step.

What farmhand knows of a kind, its section too, is in one file above this room. So the rooms' tables (by
name, "module:Class") are put in here by what is at the top, ``cli.composition``, and a kind's module is
imported at its first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from inventory.base import Model
    from inventory.model import Step

S = TypeVar("S", bound="Model")


class Kinds(Generic[S]):
    """Sections by the name of their kind, in the order in which they were registered."""

    def __init__(self) -> None:
        self._places: dict[str, str] = {}

    def register(self, places: Mapping[str, str]) -> None:
        """By name "module:Class"."""
        self._places.update(places)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._places)

    def section(self, name: str) -> type[S]:
        """KeyError: there is no such kind."""
        module, _, attribute = self._places[name].partition(":")
        found: type[S] = getattr(import_module(module), attribute)
        return found

    def named(self, section: str) -> type[S] | None:
        """The section of this class's name."""
        for name, place in self._places.items():
            if place.endswith(f":{section}"):
                return self.section(name)
        return None


STEPS: Kinds[Step] = Kinds()


def named(section: str) -> type[Model] | None:
    """Of any kind."""
    return STEPS.named(section)
