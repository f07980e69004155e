"""Remedies worded for a command line, and as data for ``--json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from host.program import typed
from inventory.errors import Text, calls_in, spelled


@dataclass(frozen=True, slots=True)
class Words:
    """``farm``: the farm file that every call must name; "" where it is found without."""

    farm: str = ""

    def text(self, text: Text) -> str:
        """To be read, and its calls to be typed as they stand."""
        return spelled(text, partial(typed, farm=self.farm))

    def data(self, value: Any) -> Any:
        """Plain JSON values: each remedy in ``value`` as text, and in the same object its ``calls``,
        each a task with its flags, for who would rather not read text."""
        if isinstance(value, Mapping):
            found = {key: self.data(item) for key, item in value.items()}
            calls = [call for item in value.values() for call in calls_in(item)]
            if calls:
                found["calls"] = [self._of_farm(call.as_dict()) for call in calls]
            return found
        if calls_in(value):
            return self.text(value)
        return [self.data(item) for item in value] if isinstance(value, list | tuple) else value

    def _of_farm(self, call: dict[str, Any]) -> dict[str, Any]:
        return {**call, "flags": {"farm": self.farm, **call["flags"]}} if self.farm else call
