"""The contract of a hypervisor (hypervisors.api.Hypervisor), on each; guests really boot on libvirt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import IPv4Address

import pytest
from machine_rigs import WITH_PORTS
from rigs import MIB, SIZE

from hypervisors.api import Foreign, Owner, Power, spec_hash
from inventory.errors import (
    Conflict,
    Interrupted,
    NotFound,
    NotOurs,
    Unsupported,
    UsageError,
    WrongState,
)
from tests.identities import KATA, identity
from tests.unit.sshd_machine import free_port

NAME = "kata-prod"
NAMESAKE = identity("kata", "/root/farm.yaml", "root@pc2")


class Stopped(Exception):
    pass


@pytest.fixture
def made(rig):
    hypervisor = rig.hypervisor()
    hypervisor.define(rig.spec("prod", stamp="A"), rig.template)
    return hypervisor


def test_a_defined_machine_is_complete_and_stopped(rig, made):
    machine = made.find(NAME)
    spec = rig.spec("prod", stamp="A")
    assert machine.owner == Owner(KATA, "prod")
    assert machine.power is Power.STOPPED
    assert (machine.memory, machine.current, machine.vcpus) == (192 * MIB, 192 * MIB, 1)
    assert (machine.mac, machine.template) == (spec.nic.mac, rig.template.label)
    assert machine.spec_hash == spec_hash(spec)
    assert machine.disk == rig.disks().find(NAME).path
    assert machine.started is None
    assert list(made.list()) == [machine]
    assert list(made.leftovers()) == []


def test_defining_again_is_a_conflict(rig, made):
    with pytest.raises(Conflict):
        made.define(rig.spec("prod"), rig.template)


def test_a_define_that_fails_leaves_nothing(rig):
    def step(text):
        if text.startswith("define"):
            raise Stopped

    with pytest.raises(Stopped):
        rig.hypervisor(step=step).define(rig.spec("prod"), rig.template)
    assert rig.hypervisor().find(NAME) is None
    assert rig.disks().find(NAME) is None


def test_a_killed_define_is_taken_up(rig):
    rig.disks().clone(rig.template, NAME, Owner(KATA, "prod"), SIZE)
    (leftover,) = rig.hypervisor().leftovers()
    assert (leftover.kind, leftover.ref) == ("disk", NAME)
    rig.hypervisor().define(rig.spec("prod"), rig.template)
    assert list(rig.hypervisor().leftovers()) == []


def test_leftovers_are_discarded(rig, made):
    rig.disks().clone(rig.template, "kata-disk", Owner(KATA, "disk"), SIZE)
    rig.disks().destroy(NAME)
    found = list(made.leftovers())
    assert [(x.kind, x.ref) for x in found] == [("domain", NAME), ("disk", "kata-disk")]
    with pytest.raises(NotFound):
        made.start(NAME)
    for leftover in found:
        made.discard(leftover)
        made.discard(leftover)
    assert list(made.leftovers()) == list(made.list()) == list(rig.disks().list()) == []


def test_a_foreign_machine_of_a_look_alike_name_is_left_alone(rig, made):
    rig.add_foreign("kata-dev2")
    assert made.find("kata-dev2").owner is None
    assert [m.name for m in made.list()] == [NAME]
    with pytest.raises(NotOurs):
        made.define(rig.spec("dev2"), rig.template)
    assert rig.disks().find("kata-dev2") is None
    for change in (
        lambda: made.start("kata-dev2"),
        lambda: made.stop("kata-dev2", grace=0),
        lambda: made.reset("kata-dev2", "clean"),
        lambda: made.balloon("kata-dev2", MIB, timeout=1),
        lambda: made.redefine(rig.spec("dev2")),
        lambda: made.checkpoint("kata-dev2", "x"),
        lambda: made.destroy("kata-dev2"),
    ):
        with pytest.raises(NotOurs):
            change()
    assert rig.foreign_there("kata-dev2")
    assert list(made.leftovers()) == []


def test_another_farms_machine_is_left_alone(rig, made):
    other = rig.hypervisor(identity("other"))
    assert list(other.list()) == []
    assert other.find(NAME).owner == Owner(KATA, "prod")
    for change in (
        lambda: other.start(NAME),
        lambda: other.reset(NAME, "clean"),
        lambda: other.destroy(NAME),
    ):
        with pytest.raises(NotOurs):
            change()


def test_a_machine_of_a_farm_of_the_same_name_is_adopted_also_while_it_runs(rig, made):
    made.define(rig.spec("dev2"), rig.template)
    made.checkpoint("kata-dev2", "one")
    rig.boot("prod")
    other = rig.hypervisor(NAMESAKE)
    prod, dev2 = Owner(KATA, "prod"), Owner(KATA, "dev2")
    assert list(other.others()) == [Foreign("kata-dev2", dev2), Foreign(NAME, prod)]
    assert list(other.list()) == list(other.leftovers()) == list(made.others()) == []
    for change in (
        lambda: other.stop(NAME, grace=0),
        lambda: other.reset("kata-dev2", "one"),
        lambda: other.redefine(rig.spec("dev2")),
        lambda: other.destroy(NAME),
    ):
        with pytest.raises(NotOurs, match="this farm is kata"):
            change()
    spec = made.find(NAME).spec_hash
    for machine in (NAME, "kata-dev2"):
        other.adopt(machine, KATA)
    assert [m.owner for m in other.list()] == [Owner(NAMESAKE, "dev2"), Owner(NAMESAKE, "prod")]
    assert other.find(NAME).power is Power.RUNNING
    assert other.find(NAME).spec_hash == spec
    assert list(made.list()) == list(made.leftovers()) == list(other.leftovers()) == []
    with pytest.raises(NotOurs):
        made.stop(NAME, grace=0)
    other.stop(NAME, grace=0)
    assert other.find(NAME).owner == Owner(NAMESAKE, "prod")
    other.reset("kata-dev2", "one")
    for machine in (NAME, "kata-dev2"):
        other.destroy(machine)
    assert list(other.list()) == list(other.leftovers()) == []


def test_machines_that_are_not_there(rig):
    hypervisor = rig.hypervisor()
    assert hypervisor.find("kata-nobody") is None
    for change in (
        lambda: hypervisor.start("kata-nobody"),
        lambda: hypervisor.stop("kata-nobody", grace=0),
        lambda: hypervisor.reset("kata-nobody", "clean"),
        lambda: hypervisor.memory("kata-nobody"),
    ):
        with pytest.raises(NotFound):
            change()
    hypervisor.destroy("kata-nobody")


def test_redefining_keeps_the_disk(rig, made):
    made.checkpoint(NAME, "one")
    changed = replace(rig.spec("prod"), memory=256 * MIB)
    machine = made.redefine(changed)
    assert (machine.memory, machine.spec_hash) == (256 * MIB, spec_hash(changed))
    assert machine.template == rig.template.label
    assert [c.name for c in rig.disks().find(NAME).checkpoints] == ["clean", "one"]


def test_a_machine_tells_its_address(rig, made):
    assert made.find(NAME).address is None
    there = replace(rig.spec("prod"), address=IPv4Address("10.9.8.7"))
    assert made.redefine(there).address == IPv4Address("10.9.8.7")
    assert rig.hypervisor().find(NAME).address == IPv4Address("10.9.8.7")
    assert rig.hypervisor().list()[0].address == IPv4Address("10.9.8.7")
    assert made.redefine(rig.spec("prod")).address is None


def test_ten_machines_at_once(rig):
    hypervisor = rig.hypervisor()
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda n: hypervisor.define(rig.spec(f"n{n}"), rig.template), range(10)))
    assert len(hypervisor.list()) == 10
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda n: hypervisor.destroy(f"kata-n{n}"), range(10)))
    assert list(hypervisor.leftovers()) == list(hypervisor.list()) == []


@pytest.mark.timeout(1800)  # emulated, beside others: minutes
def test_a_life(rig, made):
    """Write, stop, read it back; checkpoint; write more; back to either; power cut by reset."""
    assert made.pulse(NAME) is None
    assert rig.boot("prod", "A") == ""
    machine = made.find(NAME)
    assert machine.power is Power.RUNNING and machine.started is not None
    assert (pulse := made.pulse(NAME)) is None or (pulse.console and "READY" in pulse.said)
    for change in (
        lambda: made.start(NAME),
        lambda: made.redefine(rig.spec("prod")),
        lambda: made.checkpoint(NAME, "x"),
    ):
        with pytest.raises(WrongState):
            change()
    with pytest.raises(NotFound):
        made.reset(NAME, "nothing")
    assert made.find(NAME).power is Power.RUNNING
    made.stop(NAME, grace=60)
    made.stop(NAME, grace=60)
    assert made.find(NAME).power is Power.STOPPED
    made.checkpoint(NAME, "older")
    made.redefine(rig.spec("prod", stamp="B"))
    assert rig.boot("prod", "B") == "A"
    made.reset(NAME, "clean")
    assert made.find(NAME).power is Power.STOPPED
    assert rig.disks().pristine(NAME, "clean")
    assert rig.boot("prod", "B") == ""
    made.reset(NAME, "older")
    assert rig.boot("prod", "B") == "A"
    made.destroy(NAME)
    made.destroy(NAME)
    assert made.find(NAME) is None and rig.disks().find(NAME) is None


def test_warm_checkpoints_are_made_or_refused(rig, made):
    rig.boot("prod", "A")
    names = ["clean"]
    if made.capabilities().warm_checkpoints:
        assert made.checkpoint(NAME, "x", warm=True).warm
        names.append("x")
    else:
        with pytest.raises(Unsupported, match="memory"):
            made.checkpoint(NAME, "x", warm=True)
    assert made.find(NAME).power is Power.RUNNING
    assert [c.name for c in rig.disks().find(NAME).checkpoints] == names
    made.stop(NAME, grace=0)


def test_ballooning(rig, made):
    with pytest.raises(WrongState):
        made.balloon(NAME, 128 * MIB, timeout=5)
    rig.boot("prod", "A")
    assert abs(made.balloon(NAME, 128 * MIB, timeout=60) - 128 * MIB) < MIB
    assert abs(made.find(NAME).current - 128 * MIB) < MIB
    assert abs(made.balloon(NAME, 192 * MIB, timeout=60) - 192 * MIB) < MIB
    with pytest.raises(UsageError, match="maximum"):
        made.balloon(NAME, 256 * MIB, timeout=5)
    with pytest.raises(UsageError, match="go down"):
        made.balloon(NAME, 16 * MIB, timeout=5)
    assert abs(made.find(NAME).current - 192 * MIB) < MIB
    made.balloon(NAME, 128 * MIB, timeout=60)
    made.stop(NAME, grace=0)
    rig.boot("prod", "A")
    assert abs(made.find(NAME).current - 192 * MIB) < MIB  # it lasts until the next start
    made.stop(NAME, grace=0)


def test_memory_says_within_what_a_guest_can_be_ballooned(rig, made):
    with pytest.raises(WrongState):
        made.memory(NAME)
    rig.boot("prod", "A")
    made.balloon(NAME, 160 * MIB, timeout=60)  # its driver listens, then
    use = made.memory(NAME)
    assert abs(use.actual - 160 * MIB) < MIB
    assert use.maximum == 192 * MIB
    assert use.least is not None and MIB < use.least < 160 * MIB
    with pytest.raises(UsageError, match="go down"):
        made.balloon(NAME, use.least - 16 * MIB, timeout=5)
    lower = max(use.least, 128 * MIB)
    assert abs(made.balloon(NAME, lower, timeout=60) - lower) < MIB
    assert abs(made.memory(NAME).actual - lower) < MIB
    made.stop(NAME, grace=0)
    with pytest.raises(WrongState):
        made.memory(NAME)


def test_two_clients_at_once(rig, made):
    second = rig.hypervisor()
    rig.boot("prod", "A")
    assert second.find(NAME).power is Power.RUNNING
    second.stop(NAME, grace=0)
    assert made.find(NAME).power is Power.STOPPED


@pytest.mark.parametrize("rig", WITH_PORTS, indirect=True)
def test_a_port_that_is_taken_is_named(rig):
    hypervisor = rig.hypervisor()
    port = free_port()
    if not rig.forwards:  # then it says so
        with pytest.raises(Unsupported):
            hypervisor.define(rig.spec("one", port=port), rig.template)
        assert rig.disks().find("kata-one") is None
        return
    for vm in ("one", "two"):
        hypervisor.define(rig.spec(vm, port=port), rig.template)
    hypervisor.start("kata-one")
    with pytest.raises(Conflict, match=str(port)):
        hypervisor.start("kata-two")
    assert hypervisor.find("kata-two").power is Power.STOPPED
    hypervisor.stop("kata-one", grace=0)
    hypervisor.start("kata-two")
    hypervisor.destroy("kata-two")


BUILD = "kata-build"


def test_a_machine_is_renamed_with_its_disk(rig, made):
    made.checkpoint(NAME, "one")
    spec = rig.spec("build", stamp="B")
    machine = made.rename(NAME, spec)
    assert (machine.name, machine.owner, machine.power) == (BUILD, spec.owner, Power.STOPPED)
    assert (machine.spec_hash, machine.template) == (spec_hash(spec), rig.template.label)
    assert made.rename(NAME, spec) == machine, "done twice, it is done once"
    assert (made.find(NAME), rig.disks().find(NAME)) == (None, None)
    assert list(made.list()) == [made.find(BUILD)] == [machine]
    disk = rig.disks().find(BUILD)
    assert machine.disk == disk.path
    assert [c.name for c in disk.checkpoints] == ["clean", "one"]
    assert list(made.leftovers()) == []
    assert rig.boot("build", "B") == ""
    with pytest.raises(WrongState):
        made.rename(BUILD, rig.spec("prod"))
    made.stop(BUILD, grace=0)
    made.define(rig.spec("prod", stamp="A"), rig.template)  # the name is free again
    with pytest.raises(Conflict):
        made.rename(BUILD, rig.spec("prod"))
    made.destroy(NAME)
    with pytest.raises(NotOurs):
        rig.hypervisor(identity("other")).rename(BUILD, rig.spec("prod"))
    rig.add_foreign("kata-dev2")
    with pytest.raises((Conflict, NotOurs)):
        made.rename(BUILD, rig.spec("dev2"))
    with pytest.raises(NotOurs):
        made.rename("kata-nobody", rig.spec("dev2"))
    assert rig.foreign_there("kata-dev2")
    with pytest.raises(NotFound):
        made.rename("kata-nobody", rig.spec("other"))


def test_a_rename_of_a_machine_may_be_killed_before_each_of_its_steps(rig, made):
    """And then is finished, or taken back: each in turn."""
    made.checkpoint(NAME, "one")
    for steps in range(20):
        left = iter(range(steps))

        def step(_text, left=left):
            if next(left, None) is None:
                raise Stopped

        try:
            rig.hypervisor(step=step).rename(NAME, rig.spec("build"))
        except (Stopped, Interrupted):
            after = rig.hypervisor()
            assert len([one for one in (NAME, BUILD) if rig.disks().find(one)]) <= 1
            if steps % 2:
                assert after.rename(NAME, rig.spec("build")).name == BUILD
            assert after.rename(BUILD, rig.spec("prod", stamp="A")) == after.find(NAME)
            assert after.find(BUILD) is rig.disks().find(BUILD) is None
            assert [c.name for c in rig.disks().find(NAME).checkpoints] == ["clean", "one"]
            assert list(after.leftovers()) == []
            continue
        break
    assert steps, "it changes something"
    assert [machine.name for machine in made.list()] == [BUILD]
