"""SIGKILL within warm checkpoints of a hypervisor that keeps memory itself, and within the way back to
them: whatever is left, a VM is never left paused, and never gets memory that isn't its disk's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import pytest
from bench import Bench
from benches import STORES, lab
from places import OLD

from hypervisors.api import WARM, Power
from hypervisors.fake.driver import FakeHypervisor
from provision.member import Member, members_of
from tests import farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]
NOTHING = ["nothing was left unfinished"]
NEWER = "N"  # what the disks hold now; OLD: what they held when they were kept
THEN, NOW = "then", "now"  # the same of their memory
on_fakes = pytest.mark.parametrize(
    "bench", ["fake", "qcow2", *(pytest.param(store, marks=lab) for store in STORES)], indirect=True
)


@pytest.fixture(autouse=True)
def _forget(bench: Bench) -> None:
    bench.shapes = []


@on_fakes
def test_checkpoint_of_several(bench: Bench) -> None:
    arguments = {"vms": [], "name": "kept", "warm": True}
    for context in bench.kills(
        "checkpoint --all --warm", "checkpoint", arguments, partial(_anew, bench), shapes=False
    ):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        bench.recovered(context)
        with bench.site() as site:
            for member in members_of(site):
                disk = member.disk()
                assert disk
                assert member.present().power is Power.RUNNING, f"{context}: it runs on"
                assert (_content(bench, member), _word(member)) == (OLD, THEN), context
                if "kept" not in [one.name for one in disk.checkpoints]:
                    continue
                assert "kept" in member.memories(), f"{context}: disk and memory, or neither"
                _change(bench, [member])
                farm.reset(site, [member.vm], to="kept", wait=False)
                assert (_content(bench, member), _word(member)) == (OLD, THEN), context


@on_fakes
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_reset_to_warm_ones(bench: Bench, cold: bool) -> None:
    arguments = {"vms": [], "to": "kept", "wait": False, "cold": cold}
    for context in bench.kills(
        f"reset to warm{', cold' if cold else ''}", "reset", arguments, partial(_kept, bench)
    ):
        done = bench.recovered(context)
        not_begun = any("had not begun" in line for line in done)
        with bench.site() as site:
            found = {(_content(bench, one), _word(one)) for one in members_of(site)}
            assert {one.present().power for one in members_of(site)} == {Power.RUNNING}, context
        as_before, there = {(NEWER, NOW), (NEWER, "booted")}, {(OLD, "booted" if cold else THEN)}
        if done == NOTHING:  # killed before it wrote anything down, or after its end
            assert found in ({(NEWER, NOW)}, there), context
        elif not_begun:
            assert found <= as_before, context
        else:
            assert found == there, context


@on_fakes
def test_a_recovery_of_a_checkpoint_that_is_killed_too(bench: Bench) -> None:
    for number in range(1, 20):
        _anew(bench)
        assert bench.killed_at("done", 1, "checkpoint", {"vms": [], "name": "kept", "warm": True})
        again = bench.killed_at("written", number, "recover", {})
        if again is None:
            break
        bench.recovered(f"its recovery killed at {again!r}")
        with bench.site() as site:
            assert {one.present().power for one in members_of(site)} == {Power.RUNNING}
    assert number > 1


@pytest.fixture
def at_first(bench: Bench) -> Iterator[Bench]:
    """Its VMs go back to what they were when they first answered."""
    text = bench.file.read_text()
    bench.file.write_text(text.replace("template: base,", "template: base, reset_to: warm,"))
    yield bench
    bench.file.write_text(text)


@pytest.mark.parametrize("bench", ["fake"], indirect=True)
def test_clone_farm_that_keeps_them(at_first: Bench) -> None:
    def put_back() -> None:
        with at_first.site() as site:
            farm.destroy(site, list(at_first.vms))

    for context in at_first.kills("clone-farm, warm", "clone_farm", {}, put_back, shapes=False):
        at_first.recovered(context)
        with at_first.site() as site:
            farm.clone_farm(site)
            assert not farm.clone_farm(site).changed, context
            for member in members_of(site):
                assert list(member.memories()) == [WARM], context
            farm.reset(site)
            assert {_word(one) for one in members_of(site)} == {"booted"}, context


def _anew(bench: Bench) -> None:
    """Just cloned, running, with OLD on their disks and THEN in their memory."""
    with bench.site() as site:
        farm.destroy(site, list(bench.vms))
        farm.clone_farm(site, wait=False)
        _change(bench, members_of(site), OLD, THEN)


def _kept(bench: Bench) -> None:
    """They were kept so, and hold NEWER and NOW."""
    with bench.site() as site:
        disks = [member.disk() for member in members_of(site)]
    if not all(disk and "kept" in [one.name for one in disk.checkpoints] for disk in disks):
        _anew(bench)
        with bench.site() as site:
            farm.checkpoint(site, [], "kept", warm=True)
    with bench.site() as site:
        farm.start(site, wait=False)
        _change(bench, members_of(site))


def _change(bench: Bench, members: Sequence[Member], letter: str = NEWER, word: str = NOW) -> None:
    for member in members:
        disk, driver = member.disk(), member.driver
        assert disk
        assert isinstance(driver, FakeHypervisor)
        bench.place.write(disk, member.site, letter)
        driver.remember(member.machine, word)


def _content(bench: Bench, member: Member) -> str:
    disk = member.disk()
    assert disk
    return bench.place.read(disk, member.site)


def _word(member: Member) -> str:
    """What it has in memory; without the number of its boot."""
    assert isinstance(member.driver, FakeHypervisor)
    return member.driver.memory_of(member.machine).partition(" ")[0]
