"""The power of a XenAPI server fails at each call of each operation, and takes all of its database that
was not on its disk; or the process that uses it is killed, and then it fails. Whatever is left, nothing
that was written is lost, recovery and gc put it right, and no name is blocked."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import pytest
from bench import KILLS, MANY, SEED, Bench
from places import OLD, TEMPLATE, XenApiPlace
from test_kills import _no_spare, _remove, _spare, _written
from test_warm import NEWER, _content, _newer, _unharmed

from inventory.errors import DriverFailed, FarmhandError, NotFound, WrongState
from provision.member import Member, is_on
from tests import farm

pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(3600),
    pytest.mark.parametrize("bench", ["xenapi"], indirect=True),
]
UNCHANGING = re.compile(r"get_|event\.from|session\.|task\.")
PARTS = {"VM.checkpoint": 6, "VM.revert": 7, "VM.resume": 3, "VM.clone": 2, "VM.snapshot": 2}
"""So many parts has the call: its power fails after each of them."""
FEW = 4
"""Calls of each operation, drawn; all of them with FARMHAND_KILLS=many."""


@pytest.fixture(autouse=True)
def _forget(bench: Bench) -> None:
    bench.shapes = []


def _place(bench: Bench) -> XenApiPlace:
    assert isinstance(bench.place, XenApiPlace)
    return bench.place


def cuts(
    bench: Bench, operation: str, verb: str, arguments: Mapping[str, Any], ready: Callable[[], None]
) -> Iterator[str]:
    """First at each call of it, the process lives on and gets an error; then as the bench's kills are,
    the process dies first. After each, what is left is put right before the caller looks at it."""
    place, name = _place(bench), f"{operation}, power cut"

    def do() -> None:
        with bench.site() as site:
            getattr(farm, verb)(site, **arguments)

    ready()
    place.calls()
    do()
    calls = place.calls()
    points = [
        (number, part, call)
        for number, call in enumerate(calls, 1)
        for part in range(1, PARTS.get(call, 1) + 1)
    ]
    if not MANY:
        dice = random.Random(f"{SEED} {name}")
        telling = [point for point in points if not UNCHANGING.search(point[2])]
        points = sorted(dice.sample(telling, min(FEW, len(telling))))
    for number, part, call in points:
        ready()
        place.loses_power_at(number, part)
        with contextlib.suppress(FarmhandError):
            do()
        place.lasts()
        KILLS.add(name, bench.driver)
        context = f"{name} at call {number}, {call}, {part} parts of it (FARMHAND_SEED={SEED})"
        KILLS.open[context] = None
        _righted(bench, context)
        yield context
        del KILLS.open[context]
    for context in bench.kills(f"{operation}, killed, power cut", verb, arguments, ready, shapes=False):
        place.loses_power()
        _righted(bench, context)
        yield context


def _righted(bench: Bench, context: str) -> None:
    """Recovery and gc get to their ends, and nothing is left but disks that nobody knows."""
    with bench.site() as site:
        bench.nothing_half_made(site, context)
        farm.recover(site)
        assert site.journal.unfinished() == (), context
        farm.gc(site)
    with bench.site(plan=True) as site:
        left = farm.gc(site)
        assert not left.changed, f"{context}: {[str(a) for a in left.actions]}"
        assert site.locks.held() == (), context
    assert not [line for line in bench.shape()[""] if "xenapi-" in line], f"{context}: notes"
    _unharmed(bench, context)
    _place(bench).remove_nobodys()


def test_clone(bench: Bench) -> None:
    arguments = {"vms": ["prod"], "wait": False}
    for context in cuts(bench, "clone-farm", "clone_farm", arguments, partial(_remove, bench)):
        bench.usable(context)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_reset(bench: Bench, running: bool) -> None:
    arguments = {"vms": ["prod"], "start": running, "wait": False}
    operation = f"reset, {'running' if running else 'stopped'}"
    for context in cuts(bench, operation, "reset", arguments, partial(_written, bench, running=running)):
        with bench.site() as site:
            assert bench.content(site, "prod") in ("old", "new"), context
            farm.reset(site, ["prod"], wait=False)
            assert bench.content(site, "prod") == "new", context


def test_checkpoint(bench: Bench) -> None:
    arguments = {"vms": ["prod"], "name": "kept", "wait": False}

    def ready() -> None:
        with bench.site() as site:
            disk = bench.disk(site, "prod")
            if disk and "kept" in [kept.name for kept in disk.checkpoints]:
                farm.destroy(site, ["prod"])
        _written(bench, running=True)

    for context in cuts(bench, "checkpoint", "checkpoint", arguments, ready):
        with bench.site() as site:
            disk = bench.disk(site, "prod")
            assert disk
            if "kept" in [kept.name for kept in disk.checkpoints]:
                farm.reset(site, ["prod"], to="kept", start=False)
            farm.stop(site, ["prod"], force=True)
            assert bench.content(site, "prod") == "old", context


def test_checkpoint_warm(bench: Bench) -> None:
    arguments = {"vms": ["prod"], "name": "kept", "warm": True}

    for context in cuts(
        bench, "checkpoint --warm", "checkpoint", arguments, partial(_warm_to_be_kept, bench)
    ):
        with bench.site() as site:
            disk = bench.disk(site, "prod")
            assert disk
            if "kept" in [kept.name for kept in disk.checkpoints]:
                farm.reset(site, ["prod"], to="kept", wait=False)
            assert _content(bench, site) == NEWER, context
        _unharmed(bench, context)


def test_reset_to_a_warm_one(bench: Bench) -> None:
    arguments = {"vms": ["prod"], "to": "warm", "wait": False}
    for context in cuts(
        bench, "reset to warm", "reset", arguments, partial(_newer, bench, running=True)
    ):
        with bench.site() as site:
            assert _content(bench, site) in (OLD, NEWER), context
            farm.reset(site, ["prod"], to="warm", wait=False)
            assert _content(bench, site) == OLD, context
            assert is_on(Member(site, "prod").look()), context
        _unharmed(bench, context)


def test_destroy(bench: Bench) -> None:
    """One with a warm checkpoint: its memory and its disks go with it."""
    arguments = {"vms": ["prod"]}
    for context in cuts(bench, "destroy", "destroy", arguments, partial(_newer, bench, running=True)):
        with bench.site() as site:
            if Member(site, "prod").look() is None:
                assert bench.disk(site, "prod") is None, context
                continue
            assert _content(bench, site) == NEWER, context


def test_template_import_and_remove(bench: Bench) -> None:
    bench.place.make_image(bench.file.with_name("spare.qcow2"))
    name = {"name": "spare"}
    for context in cuts(bench, "template-import", "template_import", name, partial(_no_spare, bench)):
        with bench.site() as site:
            assert len(_spare(site)) <= 1, context
    arguments: dict[str, str] = {}

    def ready() -> None:
        with bench.site() as site:
            if not _spare(site):
                farm.template_import(site, "spare")
            (arguments["label"],) = _spare(site)

    for context in cuts(bench, "template-remove", "template_remove", arguments, ready):
        with bench.site() as site:
            assert _spare(site) in ([], [arguments["label"]]), context
    _no_spare(bench)


@pytest.mark.parametrize("to", ["clean", "warm"])
def test_a_vm_whose_own_disk_is_gone(bench: Bench, to: str) -> None:
    """It is told, not swept away, and put back."""
    _newer(bench, running=False)
    with bench.site() as site:
        disk = bench.disk(site, "prod")
        assert disk
        _place(bench).lose_disk(disk)
    with bench.site() as site:
        row = next(row for row in farm.status(site).vms if row.vm == "prod")
        assert "its disk is gone; its checkpoints are left: warm" in str(row)
        assert not farm.gc(site).changed
        with pytest.raises(NotFound, match="its disk is gone"):
            farm.start(site, ["prod"], wait=False)
        farm.reset(site, ["prod"], to=to, wait=False)
        assert is_on(Member(site, "prod").look())
        assert _content(bench, site) == {"clean": TEMPLATE, "warm": OLD}[to]
    _unharmed(bench, to)


def test_what_can_not_be_removed(bench: Bench) -> None:
    """gc fails then; the recovery has succeeded nevertheless, and is not done again."""
    place, arguments = _place(bench), {"vms": ["prod"], "name": "kept", "warm": True}
    _warm_to_be_kept(bench)
    place.calls()
    with bench.site() as site:
        farm.checkpoint(site, ["prod"], "kept", warm=True)
    calls = [call for call in place.calls() if not call.startswith("session.")]
    _warm_to_be_kept(bench)
    number = calls.index("VM.checkpoint") + 2  # the task is over
    assert bench.killed_at("called", number, "checkpoint", arguments)
    place.settle()
    place.fails("VDI.destroy", "VDI_IN_USE", "OpaqueRef:1", "destroy")
    with bench.site() as site:
        (done,) = farm.recover(site).actions
        assert "it is there or not" in done.text
        assert site.journal.unfinished() == ()
    place.lasts()
    assert _left(bench)
    with bench.site() as site:
        place.fails("VDI.destroy", "VDI_IN_USE", "OpaqueRef:1", "destroy")
        with pytest.raises(DriverFailed, match=r"could not be removed.*VDI_IN_USE") as caught:
            farm.gc(site)
        assert "xe vbd-list" in (caught.value.remedy or "")
        assert _left(bench)
        place.lasts()
        farm.gc(site)
    assert not _left(bench)


def test_a_way_back_that_can_not_succeed(bench: Bench) -> None:
    """Half way back, and no room: it is in the way of its VM alone, and leaves no more at each try."""
    place, why = _place(bench), "SR_FULL"
    _newer(bench, running=True)
    place.dies("VM.revert", 4)
    with bench.site() as site, pytest.raises(FarmhandError):
        farm.reset(site, ["prod"], to="warm", wait=False)
    there = []
    for _ in range(3):
        place.fails("VM.revert", why, "10", "5")
        with bench.site() as site, pytest.raises(FarmhandError, match=why):
            farm.recover(site)
        there.append(sorted(place.everything()))
    assert there[0] == there[1] == there[2]
    place.fails("VM.revert", why, "10", "5")
    with bench.site() as site:
        farm.start(site, ["dev2"], wait=False)
    place.fails("VM.revert", why, "10", "5")
    with bench.site() as site, pytest.raises(WrongState, match=f"half done.*{why}"):
        farm.start(site, ["prod"], wait=False)
    place.lasts()
    with bench.site() as site:
        farm.recover(site)
        assert _content(bench, site) == OLD
        assert is_on(Member(site, "prod").look())
    _unharmed(bench, "room again")
    place.remove_nobodys()  # those of the revert that was cut off


def _warm_to_be_kept(bench: Bench) -> None:
    """prod runs, without a checkpoint "kept"."""
    with bench.site() as site:
        disk = bench.disk(site, "prod")
        if disk and "kept" in [kept.name for kept in disk.checkpoints]:
            farm.destroy(site, ["prod"])
    _newer(bench, running=True)


def _left(bench: Bench) -> list[str]:
    with bench.site(plan=True) as site:
        return [str(action) for action in farm.gc(site).actions if action.verb == "discard"]
