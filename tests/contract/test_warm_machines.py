"""The contract of a hypervisor that keeps running machines' memory (hypervisors.api.WarmMachines), on
each. A letter stands for a disk's content, a word for what a guest holds in memory."""

from __future__ import annotations

import contextlib
import re

import pytest
from rigs import SIZE

from hypervisors.api import Owner, Power, SharingMachines, WarmMachines
from inventory.errors import Conflict, WrongState
from tests.identities import KATA

NAME, OTHER = "kata-prod", "kata-dev2"


class Stopped(Exception):
    pass


@pytest.fixture
def made(warm_rig):
    hypervisor = warm_rig.hypervisor()
    hypervisor.define(warm_rig.spec("prod", stamp="A"), warm_rig.template)
    return hypervisor


@pytest.fixture
def ready(warm_rig, made):
    """It was kept as ready with A on its disk and "one" in its memory, and has B and "two" now."""
    warm_rig.boot("prod", stamp="A")
    warm_rig.remember("prod", "one")
    made.checkpoint(NAME, "ready", warm=True)
    warm_rig.write("prod", "B")
    warm_rig.remember("prod", "two")
    return made


def power(hypervisor, name=NAME):
    return hypervisor.find(name).power


def names(rig, machine=NAME):
    return [kept.name for kept in rig.disks().find(machine).checkpoints]


def test_what_is_kept_runs_on_and_can_be_gone_back_to_again_and_again(warm_rig, made):
    assert isinstance(made, WarmMachines)
    assert made.capabilities().warm_checkpoints
    warm_rig.boot("prod", stamp="A")
    warm_rig.remember("prod", "one")
    kept = made.checkpoint(NAME, "ready", warm=True)
    assert (kept.name, kept.warm) == ("ready", True)
    assert (power(made), warm_rig.recall("prod")) == (Power.RUNNING, "one")
    assert names(warm_rig) == ["clean", "ready"]
    for word in ("two", "three"):
        warm_rig.write("prod", "B")
        warm_rig.remember("prod", word)
        made.reset(NAME, "ready")
        assert power(made) is Power.SUSPENDED
        assert [m.power for m in made.list()] == [Power.SUSPENDED]
        made.start(NAME)
        assert power(made) is Power.RUNNING
        assert (warm_rig.recall("prod"), warm_rig.read("prod")) == ("one", "A")


def test_any_of_several_in_any_order(warm_rig, ready):
    ready.checkpoint(NAME, "later", warm=True)
    for name, word, letter in (("ready", "one", "A"), ("later", "two", "B"), ("ready", "one", "A")):
        ready.reset(NAME, name)
        ready.start(NAME)
        assert (warm_rig.recall("prod"), warm_rig.read("prod")) == (word, letter)
    ready.reset(NAME, "clean")
    assert power(ready) is Power.STOPPED
    assert names(warm_rig) == ["clean", "ready", "later"]


def test_what_is_told_of_it(warm_rig, ready):
    (kept,) = ready.memories(NAME).values()
    assert (kept.checkpoint, kept.size, kept.trouble) == ("ready", ready.find(NAME).memory, "")
    assert kept.how in ("mapped", "read")
    assert re.fullmatch("[0-9a-f]{64}", kept.seal)
    assert 0 <= kept.pause < 60
    assert list(ready.leftovers()) == []


def test_a_disk_that_was_written_to_gets_no_memory(warm_rig, ready):
    ready.reset(NAME, "ready")
    assert power(ready) is Power.SUSPENDED
    warm_rig.write("prod", "C")
    assert power(ready) is Power.STOPPED
    ready.start(NAME)
    assert (warm_rig.recall("prod") != "one", warm_rig.read("prod")) == (True, "C")


def test_another_checkpoint_of_its_name_gets_no_memory(warm_rig, ready):
    ready.stop(NAME, grace=0)
    warm_rig.disks().destroy(NAME)
    warm_rig.disks().clone(warm_rig.template, NAME, Owner(KATA, "prod"), SIZE)
    warm_rig.disks().checkpoint(NAME, "ready")
    assert ready.memories(NAME) == {}
    assert power(ready) is Power.STOPPED
    (left,) = ready.leftovers()
    assert (left.kind, left.owner) == ("memory", Owner(KATA, "prod"))
    ready.start(NAME)
    assert warm_rig.recall("prod") != "one"
    for _ in range(2):
        ready.discard(left)
    assert list(ready.leftovers()) == []


def test_it_boots_where_that_is_asked_and_its_memory_stays(warm_rig, ready):
    ready.reset(NAME, "ready")
    ready.start(NAME, cold=True)
    assert warm_rig.recall("prod") not in ("one", "two")
    ready.reset(NAME, "ready")
    ready.start(NAME)
    assert warm_rig.recall("prod") == "one"


def test_forgotten_it_is_a_cold_checkpoint(warm_rig, ready):
    ready.reset(NAME, "ready")
    ready.start(NAME)
    with pytest.raises(WrongState):
        ready.forget(NAME, "ready")
    ready.stop(NAME, grace=0)
    for _ in range(2):
        ready.forget(NAME, "ready")
    assert ready.memories(NAME) == {}
    ready.reset(NAME, "ready")
    assert power(ready) is Power.STOPPED
    assert warm_rig.boot("prod") == "A"
    assert warm_rig.recall("prod") != "one"


def test_several_at_one_moment(warm_rig, made):
    made.define(warm_rig.spec("dev2", stamp="A"), warm_rig.template)
    for vm in ("prod", "dev2"):
        warm_rig.boot(vm, stamp="A")
        warm_rig.remember(vm, f"{vm}'s")
    kept = made.checkpoint_all([NAME, OTHER], "both")
    assert {name: one.warm for name, one in kept.items()} == {NAME: True, OTHER: True}
    assert [power(made, name) for name in (NAME, OTHER)] == [Power.RUNNING, Power.RUNNING]
    for vm, name in (("prod", NAME), ("dev2", OTHER)):
        warm_rig.remember(vm, "another")
        made.reset(name, "both")
        made.start(name)
        assert warm_rig.recall(vm) == f"{vm}'s"


def test_one_that_cant_be_kept_leaves_all_running(warm_rig, made):
    made.define(warm_rig.spec("dev2", stamp="A"), warm_rig.template)
    made.checkpoint(OTHER, "both")
    for vm in ("prod", "dev2"):
        warm_rig.boot(vm, stamp="A")
    with pytest.raises(Conflict):
        made.checkpoint_all([NAME, OTHER], "both")
    assert [power(made, name) for name in (NAME, OTHER)] == [Power.RUNNING, Power.RUNNING]
    assert names(warm_rig) == ["clean"]
    assert made.memories(NAME) == made.memories(OTHER) == {}
    made.stop(OTHER, grace=0)
    with pytest.raises(WrongState):
        made.checkpoint_all([NAME, OTHER], "more")
    assert power(made) is Power.RUNNING
    assert names(warm_rig) == ["clean"]


def test_cut_off_anywhere_it_runs_on_and_memory_and_disk_are_of_one_moment(warm_rig, ready):
    number = 0
    while True:
        left = number = number + 1

        def step(text):
            nonlocal left
            left -= 1
            if not left:
                raise Stopped

        name = f"cut{number}"
        with contextlib.suppress(Stopped):
            warm_rig.hypervisor(step=step).checkpoint(NAME, name, warm=True)
        ready.settle(NAME)
        assert ready.settle(NAME) == ""
        assert (power(ready), warm_rig.recall("prod")) == (Power.RUNNING, "two"), number
        assert (name in names(warm_rig)) == (name in ready.memories(NAME)), number
        assert list(ready.leftovers()) == []
        if left > 0:
            break
    ready.reset(NAME, name)
    ready.start(NAME)
    assert (warm_rig.recall("prod"), warm_rig.read("prod")) == ("two", "B")
    assert number > 2


def test_destroyed_nothing_of_it_stays(warm_rig, ready):
    ready.destroy(NAME)
    assert list(ready.leftovers()) == []
    ready.define(warm_rig.spec("prod", stamp="A"), warm_rig.template)
    assert ready.memories(NAME) == {}


def test_how_much_of_its_memory_is_shared(ready):
    if not isinstance(ready, SharingMachines):
        pytest.skip("not run: this hypervisor doesn't see that")
    ready.reset(NAME, "ready")
    assert ready.memory_share(NAME) is None
    ready.start(NAME)
    share = ready.memory_share(NAME)
    assert share.shared > 0
    assert share.private >= 0


def test_renamed_it_runs_on_from_what_was_kept(warm_rig, ready):
    seal = ready.memories(NAME)["ready"].seal
    ready.reset(NAME, "ready")
    ready.rename(NAME, warm_rig.spec("build", stamp="A"))
    assert power(ready, "kata-build") is Power.SUSPENDED
    assert ready.memories("kata-build")["ready"].seal == seal
    ready.start("kata-build")
    assert (warm_rig.recall("build"), warm_rig.read("build")) == ("one", "A")
    ready.checkpoint("kata-build", "later", warm=True)
    ready.stop("kata-build", grace=0)
    assert list(ready.leftovers()) == []
    ready.destroy("kata-build")
    assert list(ready.leftovers()) == []
