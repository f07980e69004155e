"""A guest that gives or takes memory is waited for as long as it comes nearer."""

from __future__ import annotations

import time

import pytest

from hypervisors.libvirt import balloon

MIB = 2**20


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balloon, "_LOOK", 0.01)


@pytest.mark.parametrize("step", [-2 * MIB, 2 * MIB], ids=["down", "up"])
def test_a_slow_one_gets_there(step: int) -> None:
    start, target = 500 * MIB, 500 * MIB + 100 * step
    told = iter(range(start, target + step, step))
    began = time.monotonic()
    assert balloon.follow(lambda: next(told), target, 0.5) == target
    assert time.monotonic() - began > 0.9, "longer than its patience"


def test_one_that_stops_on_its_way_is_left_there() -> None:
    told = iter([500 * MIB, 400 * MIB])
    assert balloon.follow(lambda: next(told, 400 * MIB), 100 * MIB, 0.1) == 400 * MIB


def test_one_that_comes_and_goes_is_not_waited_for_without_end() -> None:
    told = iter([400 * MIB, 410 * MIB] * 10_000)
    began = time.monotonic()
    assert balloon.follow(lambda: next(told), 100 * MIB, 0.1) >= 400 * MIB
    assert time.monotonic() - began < 30
