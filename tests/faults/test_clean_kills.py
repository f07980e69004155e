"""SIGKILL at the journal's steps of ``clean`` remade: it is the old or the new, and until that has
answered all that was written to the disk is there."""

from __future__ import annotations

from functools import partial

import pytest
from bench import Bench

from provision.clean_state import clean_state
from provision.member import Member, is_on
from provision.operations import checkpoint
from tests import farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]
FIRST = "clean-1-of-base-1"


@pytest.mark.parametrize("bench", ["fake", "qcow2", "xenapi"], indirect=True)
def test_clean(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child writes NEW where tools would be installed."""
    monkeypatch.setattr(checkpoint, "GRACE", 0.2)
    letters = {"old": "O", "first": "C", "new": "N"}
    if bench.driver == "xenapi":
        letters = {"old": "O", "first": "T", "new": "T"}
    if bench.driver != "fake":
        monkeypatch.setattr(bench, "chosen", bench.chosen or 8)
    arguments = {"vms": ["prod"], "packages": ["git"]}
    seen: set[str] = set()
    for context in bench.kills("clean", "clean", arguments, partial(_tooled, bench), shapes=False):
        bench.recovered(context)
        with bench.site() as site:
            assert is_on(Member(site, "prod").look()), context
            farm.stop(site, ["prod"], force=True)
            disk = bench.disk(site, "prod")
            assert disk, context
            bench.place.check(disk)
            state = clean_state(site.paths, "prod", disk)
            assert state.tools, context
            read = bench.place.read(disk, site)
            farm.reset(site, ["prod"], start=False)
            disk = bench.disk(site, "prod")
            assert disk, context
            assert disk.base == state.checkpoint, context
            if state.checkpoint == FIRST:
                assert (state.tools.asked, read) == (("ccache",), letters["old"]), (
                    f"{context}: nothing is lost"
                )
                assert bench.place.read(disk, site) == letters["first"], context
            else:
                assert (state.tools.asked, read) == (("git",), letters["new"]), context
                assert bench.place.read(disk, site) == letters["new"], context
                assert [one.name for one in disk.checkpoints] == ["clean", state.checkpoint], context
            seen.add(state.checkpoint)
    assert len(seen) == 2 or bench.chosen is not None


@pytest.mark.parametrize("bench", ["qcow2"], indirect=True)
def test_what_grows_from_the_clean_before_keeps_it(bench: Bench) -> None:
    _tooled(bench)
    with bench.site() as site:
        farm.stop(site, ["prod"], force=True)
        farm.reset(site, ["prod"], start=False)
        farm.checkpoint(site, ["prod"], "mine")
    bench.uninterrupted("clean", {"vms": ["prod"], "packages": []})
    with bench.site() as site:
        farm.stop(site, ["prod"], force=True)
        disk = bench.disk(site, "prod")
        assert disk
        assert {one.name for one in disk.checkpoints} == {"clean", FIRST, "mine", "clean-2-of-base-1"}
        assert bench.place.read(disk, site) == "T"
        farm.reset(site, ["prod"], to="mine", start=False)
        disk = bench.disk(site, "prod")
        assert disk
        assert bench.place.read(disk, site) == "C"


@pytest.mark.parametrize("bench", ["qcow2"], indirect=True)
def test_a_lost_disk_is_put_back_to_what_clean_is(bench: Bench) -> None:
    _tooled(bench)
    with bench.site() as site:
        farm.stop(site, ["prod"], force=True)
        disk = bench.disk(site, "prod")
        assert disk
        bench.place.lose(disk, site)
        farm.reset(site, ["prod"], to="clean", start=False)
        disk = bench.disk(site, "prod")
        assert disk
        assert (disk.base, bench.place.read(disk, site)) == (FIRST, "C")


def _tooled(bench: Bench) -> None:
    """prod runs, with something written; its clean has tools."""
    with bench.site() as site:
        farm.destroy(site, ["prod"])
        farm.clone_farm(site, wait=False)
    bench.uninterrupted("clean", {"vms": ["prod"], "packages": ["ccache"]})
    with bench.site() as site:
        farm.stop(site, ["prod"], force=True)
        bench.write_on(site, "prod")
        farm.start(site, ["prod"], wait=False)
