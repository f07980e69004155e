"""SIGKILL within a warm checkpoint, and within the way back to one: whatever is left, memory and disk
are of one moment, and no memory is ever resumed on another disk (the test server tells: ``harm``)."""

from __future__ import annotations

from functools import partial

import pytest
from bench import Bench
from places import OLD, XenApiPlace

from inventory.errors import FarmhandError, WrongState
from provision.member import Member, is_on
from provision.site import Site
from tests import farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]
NOTHING = ["nothing was left unfinished"]
NEWER = "N"  # what the disk holds now; OLD: what it held when it was kept
on_xenapi = pytest.mark.parametrize("bench", ["xenapi"], indirect=True)


@pytest.fixture(autouse=True)
def _forget(bench: Bench) -> None:
    bench.shapes = []


@on_xenapi
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_reset_to_a_warm_one(bench: Bench, running: bool) -> None:
    arguments = {"vms": ["prod"], "to": "warm", "wait": False}
    ready = partial(_newer, bench, running=running)
    for context in bench.kills("reset to warm", "reset", arguments, ready):
        _used_by_nobody(bench, context)
        done = bench.recovered(context)
        _unharmed(bench, context)
        with bench.site() as site:
            content = _content(bench, site)
            not_begun = any("had not begun" in line for line in done)
            if done == NOTHING:  # killed before it wrote anything down, or after its end
                assert content in (OLD, NEWER), context
            else:
                assert content == (NEWER if not_begun else OLD), f"{context}: {done}"
            assert is_on(Member(site, "prod").look()) == (running or content == OLD), (
                f"{context}: {done}"
            )


@on_xenapi
def test_a_recovery_of_it_that_is_killed_too(bench: Bench) -> None:
    for number in (2, 3, 4):
        _newer(bench, running=True)
        assert bench.killed_at("done", 5, "reset", {"vms": ["prod"], "to": "warm", "wait": False})
        again = bench.killed_at("written", number, "recover", {})
        context = f"its recovery killed at {again!r}"
        _used_by_nobody(bench, context)
        bench.recovered(context)
        _unharmed(bench, context)
        with bench.site() as site:
            assert _content(bench, site) == OLD, context
            assert is_on(Member(site, "prod").look()), context


@on_xenapi
@pytest.mark.parametrize(("call", "parts"), [("VM.revert", 6), ("VM.resume", 2)])
def test_a_server_that_dies_within(bench: Bench, call: str, parts: int) -> None:
    """The command fails and stays unfinished; recovery, or the next command, goes on with it."""
    place = bench.place
    assert isinstance(place, XenApiPlace)
    for part in range(1, parts + 1):
        context = f"{call}, {part} parts of it"
        _newer(bench, running=True)
        place.dies(call, part)
        with bench.site() as site, pytest.raises(FarmhandError):
            farm.reset(site, ["prod"], to="warm", wait=False)
        _used_by_nobody(bench, context)
        if part == 1:
            with bench.site() as site:
                farm.start(site, ["prod"], wait=False)
        assert (bench.recovered(context) == NOTHING) == (part == 1), context
        _unharmed(bench, context)
        with bench.site() as site:
            assert _content(bench, site) == OLD, context
            assert is_on(Member(site, "prod").look()), context
        place.remove_nobodys()


@on_xenapi
def test_start_of_a_suspended_one(bench: Bench) -> None:
    def ready() -> None:
        _newer(bench, running=True)
        with bench.site() as site:
            farm.reset(site, ["prod"], to="warm", start=False)

    for context in bench.kills("start, suspended", "start", {"vms": ["prod"], "wait": False}, ready):
        bench.recovered(context)
        with bench.site() as site:
            try:
                farm.start(site, ["prod"], wait=False)
            except WrongState:  # its memory has been used, perhaps
                farm.reset(site, ["prod"], to="warm", wait=False)
            assert is_on(Member(site, "prod").look()), context
            assert _content(bench, site) == OLD, context
        _unharmed(bench, context)


@on_xenapi
def test_checkpoint_warm(bench: Bench) -> None:
    arguments = {"vms": ["prod"], "name": "kept", "warm": True}

    def ready() -> None:
        with bench.site() as site:
            disk = bench.disk(site, "prod")
            if disk and "kept" in [kept.name for kept in disk.checkpoints]:
                farm.destroy(site, ["prod"])
        _newer(bench, running=True)

    for context in bench.kills("checkpoint --warm", "checkpoint", arguments, ready):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        place = bench.place
        assert isinstance(place, XenApiPlace)
        place.settle()  # what the server was told, it does to its end
        bench.recovered(context)
        _unharmed(bench, context)
        with bench.site() as site:
            assert is_on(Member(site, "prod").look()), f"{context}: it runs on"
            disk = bench.disk(site, "prod")
            assert disk
            kept = [one for one in disk.checkpoints if one.name == "kept"]
            if kept:
                assert kept[0].warm, context
                farm.reset(site, ["prod"], to="kept", wait=False)
            assert _content(bench, site) == NEWER, f"{context}: nothing written is lost"
        _unharmed(bench, context)


def _newer(bench: Bench, *, running: bool) -> None:
    """prod with a warm checkpoint of content OLD, on another disk since, which holds NEWER."""
    place = bench.place
    assert isinstance(place, XenApiPlace)
    place.keeps_memory()
    with bench.site() as site:
        farm.clone_farm(site, wait=False)
        disk = bench.disk(site, "prod")
        assert disk
        if "warm" not in [kept.name for kept in disk.checkpoints]:
            place.write(disk, site, OLD)
            farm.checkpoint(site, ["prod"], "warm", warm=True)
        farm.reset(site, ["prod"], start=False)
        disk = bench.disk(site, "prod")
        assert disk
        place.write(disk, site, NEWER)
        if running:
            farm.start(site, ["prod"], wait=False)


def _used_by_nobody(bench: Bench, context: str) -> None:
    """What is half way back can't be started."""
    with bench.site() as site:
        machine = Member(site, "prod").machine
        if site.disks("here").half_back(machine):  # type: ignore[attr-defined]
            with pytest.raises(WrongState):
                site.hypervisor("here").start(machine)
    _unharmed(bench, context)


def _unharmed(bench: Bench, context: str) -> None:
    place = bench.place
    assert isinstance(place, XenApiPlace)
    assert place.harm() == [], context


def _content(bench: Bench, site: Site) -> str:
    disk = bench.disk(site, "prod")
    assert disk
    return bench.place.read(disk, site)
