"""What can be built now, while builds end well or badly."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import Literal, TypeAlias

PackageState: TypeAlias = Literal["waiting", "running", "passed", "failed", "skipped"]


class Schedule:
    """The way through a graph, for any number of builders; from ``Graph.schedule``. For one thread.

    ``names``: of the vertices that are builds; the others are there as soon as all they need is.
    ``needs``: of each vertex, without circles. ``done``: those that needn't be built."""

    def __init__(
        self, names: Mapping[int, str], needs: Mapping[int, set[int]], done: frozenset[int]
    ) -> None:
        self._names = names
        self._number = {name: number for number, name in names.items()}
        needs = {n: set[int]() if n in done else ends - done for n, ends in needs.items()}
        self._users: dict[int, list[int]] = {number: [] for number in needs}
        for number, ends in needs.items():
            for end in ends:
                self._users[end].append(number)
        self._done = done
        self._states: dict[str, PackageState] = {
            name: "waiting" for number, name in names.items() if number not in done
        }
        self._because: dict[str, str] = {}
        self._lost: set[int] = set()
        self._ready: set[str] = set()
        self._sorter = TopologicalSorter(needs)
        order = [*TopologicalSorter(needs).static_order()]
        self._after: dict[int, int] = {}
        for number in reversed(order):
            later = max((self._after[user] for user in self._users[number]), default=0)
            self._after[number] = later + (number in names and number not in done)
        self._sorter.prepare()
        self._settle()

    @property
    def states(self) -> Mapping[str, PackageState]:
        """Of each build that is to be done."""
        return self._states

    @property
    def skipped(self) -> Mapping[str, str]:
        """Each with the failed build that it needs, directly or not."""
        return self._because

    @property
    def ended(self) -> bool:
        """Nothing runs, and nothing can be begun."""
        return not self._ready and "running" not in self._states.values()

    def ready(self) -> tuple[str, ...]:
        """What can be begun now: first what most others wait for in a row, then by name."""
        return tuple(sorted(self._ready, key=lambda name: (-self._after[self._number[name]], name)))

    def begin(self, name: str) -> None:
        """It is being built."""
        assert name in self._ready, f"{name} can't be begun"
        self._ready.discard(name)
        self._states[name] = "running"

    def done(self, name: str) -> None:
        """It was built, whether it was begun here or in an earlier run."""
        self._end(name, "passed")
        self._sorter.done(self._number[name])
        self._settle()

    def failed(self, name: str) -> tuple[str, ...]:
        """It was not; its dependants are skipped. Returns those that are so because of it."""
        self._end(name, "failed")
        found = []
        wanted = [self._number[name]]
        while wanted:
            for user in self._users[wanted.pop()]:
                if user in self._lost:
                    continue
                self._lost.add(user)
                wanted.append(user)
                if user in self._names:
                    found.append(self._names[user])
        for each in found:
            self._states[each] = "skipped"
            self._because[each] = name
        return tuple(sorted(found))

    def _end(self, name: str, state: PackageState) -> None:
        assert name in self._ready or self._states[name] == "running", f"{name} can't have ended"
        self._ready.discard(name)
        self._states[name] = state

    def _settle(self) -> None:
        """What can be had now, without being built, is."""
        while found := self._sorter.get_ready():
            for number in found:
                if number in self._names and number not in self._done:
                    self._ready.add(self._names[number])
                else:
                    self._sorter.done(number)
