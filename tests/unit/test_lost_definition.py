"""A VM whose definition is gone and whose disk is not: nothing but gc and destroy take it.
On the fake."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_farm import Desk, lines
from test_renew import checkpoints, content, write

from hypervisors.api import own_checkpoints
from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from inventory.errors import Conflict, Several, spelled
from provision.member import Member
from tests import farm


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    return desk


def undefine(desk: Desk, vm: str = "prod") -> None:
    """As somebody's ``virsh undefine``."""
    with desk.site() as site:
        store = Member(site, vm).store
        assert isinstance(store, FakeDisks)
        with store.store.change() as world:
            del world.machines[Member(site, vm).machine]


def refused(desk: Desk) -> Conflict:
    """As which clone-farm is."""
    with desk.site() as site, pytest.raises((Conflict, Several)) as caught:
        farm.clone_farm(site)
    error = caught.value
    error = error.errors["prod"] if isinstance(error, Several) else error
    assert isinstance(error, Conflict)
    return error


def test_no_recovery_takes_its_disk(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    write(made, b"work")
    made.run(farm.checkpoint, ["prod"], "mine")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, made.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeHypervisor, "stop", killed)
        farm.stop(site, ["prod"])
    undefine(made)
    made.run(farm.start, ["dev2"])
    with made.site() as site:
        assert not site.journal.unfinished()
    assert (content(made), checkpoints(made)) == (b"work", ["clean", "mine"])
    error = refused(made)
    assert error.message == (
        "kata-prod has a disk with data (/nonexistent/fake/kata-prod) and checkpoints (mine), and no "
        "machine"
    )
    assert spelled(error.remedy) == "copy what you need from it, then remove it: destroy --vm prod"
    with made.site() as site:
        told = lines(farm.gc(site))
    assert len(told) == 1  # its seed, its key and its console log stay, too
    assert any("left alone, for the farm file has prod: disk kata-prod" in line for line in told)
    assert any("no machine has it; with it go its checkpoints mine" in line for line in told)
    assert content(made) == b"work"
    made.run(farm.destroy, ["prod"])
    made.run(farm.clone_farm)
    assert (content(made), checkpoints(made)) == (b"", ["clean"])


def test_nor_does_clone_farm_where_it_is_clean_and_has_checkpoints(made: Desk) -> None:
    write(made, b"work")
    made.run(farm.checkpoint, ["prod"], "mine")
    made.run(farm.reset, ["prod"], to="clean")
    undefine(made)
    assert "checkpoints (mine)" in refused(made).message
    with made.site() as site:  # nor a driver that is asked to define it
        member = Member(site, "prod")
        (template,) = site.templates("here")
        with pytest.raises(Conflict, match="checkpoints \\(mine\\), and no machine"):
            member.driver.define(member.spec(member.allocate()), template)
        disk = member.disk()
        assert disk is not None
        assert own_checkpoints(disk) == ["mine"]
    made.run(farm.destroy, ["prod"])
    made.run(farm.clone_farm)


def test_one_that_nothing_was_written_to_is_made_anew(made: Desk) -> None:
    undefine(made)
    told = lines(made.run(farm.clone_farm))
    assert "prod: remove a disk that no machine has and nothing was written to" in told
    assert made.machine("prod").power == "running"


def test_a_clone_that_was_cut_off_is_undone(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    made.run(farm.destroy, ["prod"])

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, made.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeHypervisor, "_from", cut)  # the disk is there by then
        farm.clone_farm(site)
    with made.site() as site:
        assert Member(site, "prod").disk() is not None
        assert "undone, nothing of it stays" in lines(farm.recover(site))[0]
        assert Member(site, "prod").disk() is None


def test_what_is_in_the_way_of_a_clone_stays(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a disk that came back after the plan was made, with the file system that it is on."""
    write(made, b"work")
    undefine(made)
    real, seen = Member.disk, []

    def unseen(self: Member) -> object:
        seen.append(self.vm)
        return None if seen.count("prod") == 1 else real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Member, "disk", unseen)
        assert "a disk with data" in refused(made).message
    assert content(made) == b"work"
