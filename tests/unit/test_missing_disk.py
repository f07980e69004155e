"""VMs whose disk is gone: seen, and made anew where nothing can be lost with that."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from still_farm import KINDS, StillFarm, place

from hypervisors.api import Leftover
from hypervisors.disks.zfs.state import find_leftovers, read_state
from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from inventory.errors import DriverFailed, FarmhandError, NotFound, WrongState, spelled
from provision.engine.report import Outcome
from provision.leftovers import discard_of
from provision.member import Member, is_on
from provision.site import Site
from provision.status import status
from tests import farm
from tests.identities import KATA

__all__ = ["place"]
GONE = "its disk is gone"


class Town(StillFarm):
    def __init__(self, directory: Path, kind: str) -> None:
        super().__init__(directory, kind, ["dev2", "prod"])
        with self.site() as site:
            farm.clone_farm(site, start=False)

    def home(self, vm: str) -> Path:
        with self.site() as site:
            return site.paths.disks / "vms" / Member(site, vm).machine

    def lose(self, vm: str) -> None:
        """As somebody would who removes it by hand."""
        with self.site() as site:
            store, machine = site.disks("here"), Member(site, vm).machine
            if isinstance(store, FakeDisks):
                with store.store.change() as world:
                    del world.disks[machine]
            else:
                (self.home(vm) / "disk.qcow2").unlink()
            assert store.find(machine) is None

    def clone_farm(self, *, start: bool = False) -> Outcome:
        """Planned, then carried out: the very same actions."""
        with self.site(plan=True) as site:
            planned = farm.clone_farm(site, start=start, wait=False)
        with self.site() as site:
            done = farm.clone_farm(site, start=start, wait=False)
        assert done.actions == planned.actions
        return done

    def errors(self) -> dict[str, str]:
        with self.site() as site:
            return {row.vm: spelled(row.error) for row in status(site).vms}

    def refused(self, use: str, **options: object) -> FarmhandError:
        with self.site() as site, pytest.raises(NotFound) as caught:
            getattr(farm, use)(site, ["prod"], **options)
        return caught.value


@pytest.fixture(params=KINDS)
def town(request: pytest.FixtureRequest, place: Path) -> Town:
    return Town(place, request.param)


@pytest.fixture
def files(place: Path) -> Town:
    return Town(place, "qcow2")


def state_of(site: Site, vm: str) -> tuple[str, bool]:
    """Its disk's template, and whether it is as just cloned."""
    store, machine = site.disks("here"), Member(site, vm).machine
    disk = store.find(machine)
    assert disk
    return disk.template, bool(store.pristine(machine, "clean"))


def test_a_lost_disk_is_made_anew(town: Town) -> None:
    with town.site() as site:
        key = Member(site, "prod").endpoint().host_key
    town.lose("prod")
    done = town.clone_farm(start=True)
    assert [str(action) for action in done.actions] == [
        "dev2: start",
        "prod: its disk is gone: a new one from base@1",
        "prod: start",
    ]
    with town.site() as site:
        assert state_of(site, "prod") == ("base@1", True)
        assert is_on(Member(site, "prod").look())
        assert Member(site, "prod").endpoint().host_key == key, "it is itself still"
    assert not town.clone_farm(start=True).changed
    assert set(town.errors().values()) == {""}


@pytest.mark.parametrize("use", ["start", "reset", "checkpoint"])
def test_whoever_needs_it_says_so(town: Town, use: str) -> None:
    town.lose("prod")
    options = {"name": "kept"} if use == "checkpoint" else {}
    error = town.refused(use, wait=False, **options)
    assert error.message == f"still.yaml: prod: {GONE}"
    assert spelled(error.remedy) == "clone-farm --vm prod makes it a new one from base@1"
    assert town.errors() == {"dev2": "", "prod": f"{GONE}: {spelled(error.remedy)}"}


def test_not_while_it_runs(town: Town) -> None:
    """Its guest has it open still, and what it wrote may be copied out of it."""
    with town.site() as site:
        farm.start(site, ["prod"], wait=False)
    town.lose("prod")
    with town.site() as site, pytest.raises(NotFound, match="gone while it runs"):
        farm.clone_farm(site, start=False)
    with town.site() as site:
        farm.gc(site)
        assert is_on(Member(site, "prod").look())
        assert site.disks("here").find("still-prod") is None
        farm.stop(site, ["prod"], force=True)
        farm.clone_farm(site, start=False)
        assert state_of(site, "prod") == ("base@1", True)


def test_not_where_checkpoints_are_left(files: Town) -> None:
    with files.site() as site:
        farm.checkpoint(site, ["prod"], "kept")
        farm.destroy(site, ["dev2"])
    files.lose("prod")
    text = f"{GONE}; its checkpoints are left: kept"
    with files.site() as site, pytest.raises(NotFound, match=text) as caught:
        farm.clone_farm(site, start=False)
    assert "reset --vm prod --to kept" in spelled(caught.value.remedy)
    with files.site() as site:
        assert Member(site, "dev2").look(), "others are made"
        assert not farm.gc(site).changed
        assert [kept.name for kept in site.disks("here").left("still-prod")] == ["clean", "kept"]  # type: ignore[attr-defined]
    assert files.errors()["prod"].startswith(text)
    with files.site() as site:
        farm.reset(site, ["prod"], to="kept", start=False)
        disk = site.disks("here").find("still-prod")
        assert disk is not None and disk.base == "kept"
    assert not files.clone_farm().changed


def test_checkpoints_that_are_left_go_with_a_destroy(files: Town) -> None:
    with files.site() as site:
        farm.checkpoint(site, ["prod"], "kept")
    files.lose("prod")
    with files.site() as site:
        farm.destroy(site, ["prod"])
    assert not files.home("prod").exists()
    with files.site() as site:
        farm.clone_farm(site, start=False)
        assert state_of(site, "prod") == ("base@1", True)


@pytest.mark.parametrize("kind", ["checkpoint", "memory"])
@pytest.mark.parametrize("lost", [True, False], ids=["its disk is gone", "its disk is there"])
def test_what_is_kept_of_it_stays_without_a_disk(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lost: bool
) -> None:
    """The disk may come back, or somebody needs what is kept; beside its disk it is a remain."""
    town = Town(place, "fake")
    if lost:
        town.lose("prod")
    with town.site() as site:
        owner = Member(site, "prod").owner
    made = datetime.now(UTC)
    left = [Leftover(kind=kind, ref="kept", owner=owner, created=made, bytes=1, why="as it is")]
    monkeypatch.setattr(FakeHypervisor, "leftovers", lambda _: tuple(left))
    monkeypatch.setattr(FakeHypervisor, "discard", lambda _, item: left.remove(item))
    with town.site() as site:
        discard_of([Member(site, "prod")])
        assert bool(left) == lost, "by the recovery of anything of it"
        told = [spelled(action.text) for action in farm.gc(site).actions if "kept" in str(action.text)]
        assert bool(left) == lost
        if lost:
            (text,) = told
            assert text.startswith(f"left alone, for the farm file has prod: {kind} kept ")
            assert text.endswith("if nothing on it is needed: destroy --vm prod")
        farm.destroy(site, ["prod"])
    assert not left


def test_a_zfs_disk_that_was_removed_alone_is_told_from_one_half_removed() -> None:
    """``zfs destroy`` of the volume that was the disk: an older one has the checkpoints."""

    def left(state: str) -> tuple[str, str]:
        snapshot = {"txg": 1, "created": 1, "marks": {"kind": "checkpoint", "name": "mine"}}
        marks = {"machine": "kata-prod", "farm": KATA.mark, "vm": "prod", "template": "base@1",
                 "base": "mine", "size": "1", "created": "2026-01-01T00:00:00+00:00",
                 "maker": "", "token": "0", "state": state}  # fmt: skip
        volume = {"marks": marks, "used": 1, "written": 0, "snapshots": {"one": snapshot}}
        (found,) = find_leftovers(read_state({"volumes": {"tank/kata/vms/kata-prod.1": volume}}), KATA)
        assert found.ref == "tank/kata/vms/kata-prod"
        return found.kind, found.why

    assert left("kept") == ("checkpoint", "its disk is gone")
    assert left("gone") == ("disk", "half removed")


class Merging(FakeDisks):
    """Has no disk while it is written back into its checkpoint, as some stores."""

    def merge(self, machine: str) -> None:
        with self.store.change() as world:
            if machine not in world.disks:
                raise DriverFailed("it can't be gone on with now")
            del world.disks[machine]
        raise KeyboardInterrupt  # unwinds, and leaves the journal as a kill does


def test_not_in_the_midst_of_a_merge(place: Path) -> None:
    town = Town(place, "fake")

    def site_that_merges() -> Site:
        site = town.site()
        opened = site.opened("here")
        opened._disks = Merging(site.identity, opened.state())
        return site

    with site_that_merges() as site:
        farm.checkpoint(site, ["prod"], "kept")
    with site_that_merges() as site, pytest.raises(KeyboardInterrupt):
        farm.merge(site, ["prod"])
    with (
        site_that_merges() as site,
        pytest.raises(WrongState, match="a merge of prod is half done"),
    ):
        farm.clone_farm(site, start=False)
    with town.site() as site:
        assert Member(site, "prod").look()


def test_a_store_that_is_not_there_is_no_lost_disk(files: Town, place: Path) -> None:
    """Such as one on a file system that is not mounted: nothing is made beside it."""
    with files.site() as site:
        disks = site.paths.disks
    disks.rename(place / "elsewhere")
    disks.mkdir()
    with files.site() as site, pytest.raises(FarmhandError) as caught:
        farm.clone_farm(site, start=False)
    assert "and so is its template base@1" in str(caught.value)
    assert "mounted" in str(caught.value) + spelled(caught.value.remedy)
    with files.site() as site:
        assert not farm.gc(site).changed
        assert Member(site, "prod").look(), "it is left as it is"
    disks.rmdir()
    (place / "elsewhere").rename(disks)
    assert not files.clone_farm().changed
