"""Which of a batch fails: named within ceil(log2 n) runs, alone or together, and never a wrong one."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations
from math import ceil, log2

import pytest

from repositories.flows.bisection import Bisection


def halved(units: tuple[str, ...], fails: Collection[str]) -> tuple[Bisection, int, list[int]]:
    """Its end; after how many runs the first one was named; all runs, each with what was said before of
    how many it takes at most."""
    known, first, left = Bisection.of(units), 0, []
    runs = 0
    while not known.done:
        left.append(known.most)
        before = known.named
        known = known.judged(passed=not set(fails) <= set(known.trial))
        runs += 1
        if not before and known.named:
            first = runs
    return known, first, left


@pytest.mark.parametrize("size", range(1, 18))
def test_the_guilty_one_is_named_in_time(size: int) -> None:
    units = tuple(f"p{n}" for n in range(size))
    for unit in units:
        end, first, left = halved(units, {unit})
        assert end.named == (unit,)
        assert first <= ceil(log2(size))
        assert len(left) <= ceil(log2(size)) + 1, "and one that tries it alone"


@pytest.mark.parametrize("together", [2, 3])
def test_what_fails_only_together_is_named_together(together: int) -> None:
    units = tuple(f"p{n}" for n in range(9))
    for fails in combinations(units, together):
        end, first, left = halved(units, fails)
        assert set(end.named) == set(fails)
        assert first <= ceil(log2(9))
        assert len(left) <= together * (ceil(log2(9)) + 1)


def test_it_says_how_many_runs_are_left() -> None:
    units = tuple(f"p{n}" for n in range(16))
    for unit in units:
        known, runs, most = Bisection.of(units), 0, Bisection.of(units).most
        while not known.named:
            known = known.judged(passed=unit not in known.trial)
            runs += 1
        assert runs <= most == 4


def test_of_two_guilty_ones_one_is_named() -> None:
    """The flow goes on without it, and the other one is found then."""
    units = ("p0", "p1", "p2", "p3", "p4")
    known = Bisection.of(units)
    while not known.done:
        known = known.judged(passed=not {"p1", "p3"} & set(known.trial))
    assert known.named in (("p1",), ("p3",))
