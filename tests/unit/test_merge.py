"""A merge that fails or is cut off: nothing of the VM is lost. On the fake, as a store that can merge,
and has no disk of the machine meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_farm import Desk, lines
from test_lost_definition import undefine
from test_renew import checkpoints, content, write

from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from inventory.errors import DriverFailed, FarmhandError, NotFound, WrongState
from provision.power import STOP, StopFacts
from tests import farm

PARTED: dict[str, Any] = {}
"""The disks that are being merged."""


def begin(store: FakeDisks, machine: str) -> None:
    with store.store.change() as world:
        PARTED[machine] = world.disks[machine]
        del world.disks[machine]


def merge(store: FakeDisks, machine: str) -> None:
    if machine not in PARTED:
        begin(store, machine)
    with store.store.change() as world:
        world.disks[machine] = PARTED.pop(machine)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """prod runs, and holds what its guest wrote since its checkpoint."""
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setattr(FakeDisks, "merge", merge, raising=False)
    monkeypatch.setattr("provision.operations.checkpoint.GRACE", 0.4)  # of one that does not listen
    PARTED.clear()
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    desk.run(farm.checkpoint, ["prod"], "mine")
    write(desk, b"work")
    return desk


def cut(desk: Desk, error: BaseException, where: type, at: str, first: Callable[..., None]) -> None:
    """``first`` is done, then that error comes."""

    def cut_off(*given: Any, **options: Any) -> None:
        first(*given, **options)
        raise error

    with pytest.MonkeyPatch.context() as patch, desk.site() as site, pytest.raises(type(error)):
        patch.setattr(where, at, cut_off)
        farm.merge(site, ["prod"])


def unfinished(desk: Desk) -> int:
    with desk.site() as site:
        return len(site.journal.unfinished())


@pytest.mark.parametrize("first", [lambda *_, **__: None, FakeHypervisor.stop], ids=["on", "off"])
def test_killed_before_it_began_it_is_not_done(made: Desk, first: Callable[..., None]) -> None:
    cut(made, KeyboardInterrupt(), FakeHypervisor, "stop", first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeDisks, "merge", lambda *_: pytest.fail("it was merged"), raising=False)
        made.run(farm.start, ["dev2"])
    assert made.machine("prod").power == "running"
    assert (content(made), unfinished(made)) == (b"work", 0)


def test_one_that_could_not_be_shut_down_runs_again(made: Desk) -> None:
    """It was asked to, and went down after the error."""
    cut(made, DriverFailed("connection lost"), FakeHypervisor, "stop", FakeHypervisor.stop)
    assert made.machine("prod").power == "running"
    assert unfinished(made) == 0


def test_one_that_its_store_refuses_runs_again(made: Desk) -> None:
    cut(made, WrongState("refused"), FakeDisks, "merge", lambda *_: None)
    assert made.machine("prod").power == "running"
    assert (content(made), unfinished(made)) == (b"work", 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), DriverFailed("no"), OSError("no")], ids=type)
def test_half_a_merge_is_gone_on_with_and_nothing_else_touches_the_vm(
    made: Desk, error: BaseException
) -> None:
    cut(made, error, FakeDisks, "merge", begin)
    assert unfinished(made) == 1

    def fails(*_: object) -> None:
        raise DriverFailed("its merge goes on")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeDisks, "merge", fails, raising=False)
        with made.site() as site:
            told = lines(farm.gc(site))
        assert told == ["prod: left alone until its merge is recovered: kata-prod: recover"]
        with made.site() as site, pytest.raises(WrongState, match="a merge of prod is half done"):
            farm.start(site, ["prod"])
    assert made.machine("prod").power == "stopped"
    with made.site() as site:
        assert "merge it to the end" in lines(farm.recover(site))[0]
    assert made.machine("prod").power == "running"
    assert (content(made), checkpoints(made), unfinished(made)) == (b"work", ["clean", "mine"], 0)


def test_it_is_half_done_where_nobody_can_tell(made: Desk) -> None:
    """The store can't be asked after the error."""
    real = FakeDisks.find

    def find(self: FakeDisks, machine: str) -> Any:
        if machine in PARTED:
            raise DriverFailed("the store is away")
        return real(self, machine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeDisks, "find", find)
        cut(made, DriverFailed("no"), FakeDisks, "merge", begin)
    assert unfinished(made) == 1
    made.run(farm.start, ["dev2"])
    assert (content(made), unfinished(made)) == (b"work", 0)


def test_the_recovery_of_another_activity_does_not_take_it_for_remains(made: Desk) -> None:
    cut(made, KeyboardInterrupt(), FakeDisks, "merge", begin)
    with (
        made.site() as site,
        pytest.raises(KeyboardInterrupt),
        site.journal.begin(STOP, ["prod"], StopFacts(force=False)),  # which is allowed at any time
    ):
        raise KeyboardInterrupt

    def fails(*_: object) -> None:
        raise DriverFailed("its merge goes on")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeDisks, "merge", fails, raising=False)
        with made.site() as site:
            farm.start(site, ["dev2"])  # and recovers the stop
    assert made.machine("prod") is not None
    assert unfinished(made) == 1
    made.run(farm.start, ["dev2"])
    assert (content(made), unfinished(made)) == (b"work", 0)


def test_merged_when_it_was_killed_it_runs_again(made: Desk) -> None:
    cut(made, KeyboardInterrupt(), FakeHypervisor, "start", lambda *_, **__: None)
    with made.site() as site:
        assert "it is merged into mine; see that it runs as before" in lines(farm.recover(site))[0]
    assert made.machine("prod").power == "running"


def test_its_disk_is_made_whole_without_its_definition(made: Desk) -> None:
    cut(made, KeyboardInterrupt(), FakeDisks, "merge", begin)
    undefine(made)
    with made.site() as site:
        told = lines(farm.recover(site))[0]
    assert "its machine is gone; merge its disk to the end" in told
    assert (content(made), unfinished(made)) == (b"work", 0)


def test_where_its_store_can_not_merge_it_stays_half_done(made: Desk) -> None:
    """The farm file names another one by now."""
    cut(made, KeyboardInterrupt(), FakeDisks, "merge", begin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("provision.operations.merge.MergingDisks", bytes)  # which no store is
        with made.site() as site, pytest.raises(FarmhandError, match="can't go on with the merge"):
            farm.recover(site)
    made.run(farm.start, ["dev2"])
    assert content(made) == b"work"


def test_where_its_disk_has_gone_too_it_is_over(made: Desk) -> None:
    cut(made, KeyboardInterrupt(), FakeDisks, "merge", begin)
    undefine(made)

    def gone(*_: object) -> None:
        raise NotFound("kata-prod has no disk here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeDisks, "merge", gone, raising=False)
        made.run(farm.start, ["dev2"])
    assert unfinished(made) == 0
