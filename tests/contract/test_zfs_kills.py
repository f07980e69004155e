"""The ZFS store killed between any two of its commands: each disk is the old one or the new, nothing is
left over for good, and the same can be done again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rigs import SIZE, template, with_two_disks
from zfs_rig import ZfsRig, zfs

from host.run import Runner
from hypervisors.api import Owner
from hypervisors.disks.zfs import state as zfs_state
from hypervisors.disks.zfs.disks import ZfsDisks
from tests.identities import KATA

pytestmark = pytest.mark.lab


@pytest.fixture
def store(zfs_pool, tmp_path: Path) -> ZfsRig:
    return ZfsRig(tmp_path)


@pytest.fixture
def made(store) -> ZfsDisks:
    return with_two_disks(store)


class Killed(BaseException):
    pass


class Mortal(Runner):
    """Dies at its n-th changing command: before it, or after it is done but nobody has heard."""

    def __init__(self, deaths: int, *, after: bool) -> None:
        super().__init__()
        self.left = deaths
        self.after = after
        self.dead = False
        self.count = 0

    def change(self, *argv, **options):
        if self.dead:  # as a process that is killed does nothing more
            raise Killed
        self.count += 1
        self.left -= 1
        if self.left == 0:
            self.dead = True
            if self.after:
                super().change(*argv, **options)
            raise Killed
        return super().change(*argv, **options)


def as_if_killed(monkeypatch) -> None:
    """The makers' marks then name a process that is gone."""
    monkeypatch.setattr(zfs_state.Process, "alive", lambda _self: False)


def length(store) -> int:
    """Bytes of the disk of kata-prod when it starts."""
    with store.path("kata-prod").open("rb") as file:
        return file.seek(0, os.SEEK_END)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "what",
    ["seal", "clone", "larger", "checkpoint", "back", "older", "all", "grow", "grow untouched",
     "destroy", "remove"],
)  # fmt: skip
def test_killed_at_any_command_it_is_old_or_new_and_goes_on(store, made, monkeypatch, what, after):
    as_if_killed(monkeypatch)
    both = ["kata-prod", "kata-dev2"]
    made.checkpoint_all(both, "one")
    for machine in both:
        store.write(machine, "B")
    if what == "grow untouched":
        made.restore("kata-prod", "one")
    spare = made.seal(store.image(), template(3))
    image = store.image()

    def act(disks):
        match what:
            case "seal":
                disks.seal(image, template(2))
            case "clone":
                disks.clone(spare, "kata-new", Owner(KATA, "new"), SIZE)
            case "larger":
                disks.clone(spare, "kata-new", Owner(KATA, "new"), 2 * SIZE)
            case "checkpoint":
                disks.checkpoint("kata-prod", "two")
            case "back":
                disks.restore("kata-prod", "one")
            case "older":
                disks.restore("kata-prod", "clean")
            case "all":
                disks.restore_all(both, "clean")
            case "grow" | "grow untouched":
                disks.enlarge("kata-prod", 2 * SIZE)
            case "destroy":
                disks.destroy("kata-prod")
            case "remove":
                disks.remove_template("base@3")

    deaths = 0
    while True:
        deaths += 1
        runner = Mortal(deaths, after=after)
        try:
            act(store.disks(runner=runner))
        except Killed:
            prod = made.find("kata-prod")
            if what == "destroy" and prod is None:
                break  # the new state
            content = store.read("kata-prod")
            allowed = {"back": "BT", "older": "BT", "all": "BT", "grow untouched": "T"}
            assert content in allowed.get(what, "B")
            assert length(store) == prod.size, "it is as large as it says when it starts"
            assert prod is not None and {"clean", "one"} <= {c.name for c in prod.checkpoints}
            if what == "all":
                assert content == store.read("kata-dev2")
            for left in made.leftovers():
                made.discard(left)
            assert list(made.leftovers()) == []
            assert store.read("kata-prod") == content
            new = made.find("kata-new")
            if new is not None:
                assert made.pristine("kata-new", "clean")
                made.destroy("kata-new")
            if what == "checkpoint" and len(prod.checkpoints) == 3:
                break  # done, though nobody heard
            if what.startswith("grow"):
                made.restore("kata-dev2", "one")
                assert prod.size in (SIZE, 2 * SIZE)
            if what == "remove" and [t.label for t in made.templates()] == ["base@1"]:
                break
        else:
            break
    if what in {"back", "older", "all"}:
        assert store.read("kata-prod") == "T"
    if what.startswith("grow"):
        assert made.find("kata-prod").size == length(store) == 2 * SIZE
        assert made.pristine("kata-prod", "one") == (what == "grow untouched")
        for name in ("one", "one", "clean", "one"):
            assert made.restore("kata-prod", name).size == 2 * SIZE
            assert made.pristine("kata-prod", name)
            assert store.read("kata-prod") == "T"
            assert length(store) == 2 * SIZE
            assert made.pristine("kata-prod", name), "it had that size already"
            store.write("kata-prod", "C")
    if what == "seal":
        assert [t.label for t in made.templates()] == ["base@1", "base@2", "base@3"]
        assert not image.exists()
        assert "farmhand" in zfs("holds", "-H", f"{store.root}/templates/base.2@sealed")
    for machine in both:
        made.destroy(machine)
    made.destroy("kata-new")
    for known in made.templates():
        made.remove_template(known.label)
    assert list(made.leftovers()) == []
    assert store.names() == ["", "templates", "vms"]
