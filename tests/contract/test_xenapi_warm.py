"""Warm checkpoints on XenAPI: a running machine's memory and disk, of one moment, whatever fails. On the
test server: simulated. It tells of every memory image that was resumed on a disk which it wasn't of."""

from __future__ import annotations

import contextlib
import os
import re

import pytest
import xenapi_rig
from rigs import MIB, template

from hypervisors.api import Power, WarmDisks
from hypervisors.xenapi import wait
from inventory.errors import (
    Conflict,
    FarmhandError,
    NoSpace,
    NotFound,
    Unsupported,
    WrongState,
)
from tests.identities import KATA

NAME = "kata-prod"
MANY = os.environ.get("FARMHAND_KILLS") == "many"


@pytest.fixture
def rig(request, tmp_path, monkeypatch):
    monkeypatch.setattr(wait, "_ROUND", 1.0)  # seconds after which a server that was up again is noticed
    server = request.getfixturevalue("xenapi")
    with xenapi_rig.opened(xenapi_rig.XenApiMachines, tmp_path, server) as made:
        if xenapi_rig.REAL_URL:
            if not made.hypervisor().capabilities().warm_checkpoints:
                pytest.skip("not run: the pool has no suspend image SR")
            yield made
            return
        server.tell(knobs={"suspend_sr": True})
        yield made
        assert server.tell(harm=True) == []


server = xenapi_rig.its_server  # a fixture


@pytest.fixture
def made(rig):
    """With a cold checkpoint "cold" of content C, and a warm one "warm" of content A; now it runs, its
    disk is another by a reset in between, and holds B."""
    hypervisor = rig.hypervisor()
    hypervisor.define(rig.spec("prod"), rig.template)
    rig.write(NAME, "C")
    hypervisor.checkpoint(NAME, "cold")
    rig.write(NAME, "A")
    hypervisor.start(NAME)
    try:
        hypervisor.checkpoint(NAME, "warm", warm=True)
    except Unsupported as error:  # a guest without its drivers: ours have an empty disk
        if not xenapi_rig.REAL_URL:
            raise
        pytest.skip(f"not run: {error}")
    hypervisor.reset(NAME, "cold")
    rig.write(NAME, "B")
    hypervisor.start(NAME)
    return hypervisor


def power(rig) -> Power:
    return rig.hypervisor().find(NAME).power


def bare(rig) -> dict:
    """The machine's record."""
    call = rig.sessions().call
    (ref,) = call("VM.get_by_name_label", NAME)
    return {"ref": ref, **call("VM.get_record", ref)}


# -- what it does ------------------------------------------------------------------------------------


def test_it_runs_on_while_it_is_kept_and_runs_on_from_there(rig, server, made):
    assert isinstance(rig.disks(), WarmDisks)
    before = bare(rig)
    kept = made.checkpoint(NAME, "now", warm=True)
    assert kept.warm
    assert power(rig) is Power.RUNNING
    disk = rig.disks().find(NAME)
    assert [(c.name, c.warm) for c in disk.checkpoints] == [
        ("clean", False), ("cold", False), ("warm", True), ("now", True),
    ]  # fmt: skip
    for name, letter in (("warm", "A"), ("now", "B"), ("warm", "A")):
        made.reset(NAME, name)
        assert (power(rig), rig.read(NAME)) == (Power.SUSPENDED, letter)
        assert rig.disks().find(NAME).base == name
        assert not rig.disks().pristine(NAME, name), "its memory goes on: it is never clean"
        made.start(NAME)
        assert power(rig) is Power.RUNNING
    after = bare(rig)
    assert (after["ref"], after["uuid"]) == (before["ref"], before["uuid"])
    assert list(made.leftovers()) == []
    made.reset(NAME, "cold")
    assert (power(rig), rig.read(NAME)) == (Power.STOPPED, "C")
    assert rig.disks().pristine(NAME, "cold")
    made.destroy(NAME)
    assert not [line for line in server.tell(world=True) if "prod" in line or "Suspend" in line]


def test_it_takes_no_more_calls_than_the_documentation_says(rig, capsys):
    counted = rig.calls_warm()
    with capsys.disabled():
        print(f"\nXenAPI calls of warm checkpoints: {counted}")
    for what, most in xenapi_rig.MOST_CALLS_WARM.items():
        assert counted[what] <= most


def test_stopping_a_suspended_one_gives_its_memory_up(rig, server, made):
    made.reset(NAME, "warm")
    made.stop(NAME, grace=60)
    assert (power(rig), bare(rig)["suspend_VDI"]) == (Power.STOPPED, "OpaqueRef:NULL")
    made.start(NAME)
    assert rig.read(NAME) == "A"
    assert sum("Suspend image" in line for line in server.tell(world=True)) == 1  # the checkpoint's


@pytest.mark.parametrize("what", ["reset", "destroy"])
def test_a_suspended_one_is_reset_or_destroyed(rig, server, made, what):
    made.reset(NAME, "warm")
    if what == "destroy":
        made.destroy(NAME)
        assert not [line for line in server.tell(world=True) if "prod" in line or "Suspend" in line]
        return
    made.reset(NAME, "cold")
    assert (power(rig), rig.read(NAME)) == (Power.STOPPED, "C")
    made.start(NAME)


def test_one_that_an_admin_suspended_runs_on(rig, made):
    """Also one that has been resumed by us before: only that image is used up."""
    made.reset(NAME, "warm")
    made.start(NAME)
    rig.sessions().call("VM.suspend", bare(rig)["ref"])
    assert power(rig) is Power.SUSPENDED
    made.start(NAME)
    assert power(rig) is Power.RUNNING


def test_a_revert_by_an_admin_is_taken_as_it_is(rig, made):
    sessions = rig.sessions()
    ref = bare(rig)["ref"]
    (snapshot,) = sessions.call("VM.get_by_name_label", f"{NAME} warm")
    sessions.call("VM.revert", snapshot)
    assert (power(rig), rig.read(NAME)) == (Power.SUSPENDED, "A")
    made.start(NAME)
    assert (power(rig), bare(rig)["ref"]) == (Power.RUNNING, ref)
    made.reset(NAME, "warm")
    made.start(NAME)


# -- refusals ---------------------------------------------------------------------------------------


def test_it_is_of_a_running_machine_and_its_name_is_free(rig, made):
    for name in ("warm", "cold", "clean"):
        with pytest.raises(Conflict, match=name):
            made.checkpoint(NAME, name, warm=True)
    with pytest.raises(WrongState, match="running"):
        made.checkpoint(NAME, "more")
    made.stop(NAME, grace=0)
    with pytest.raises(WrongState, match="running machine"):
        made.checkpoint(NAME, "more", warm=True)
    with pytest.raises(NotFound):
        made.reset(NAME, "more")


def test_a_server_that_cannot_says_so_and_nothing_is_changed(rig, server, made):
    assert made.capabilities().warm_checkpoints
    server.tell(knobs={"suspend_sr": False})
    can = made.capabilities()
    assert not can.warm_checkpoints
    assert "suspend image SR" in can.why_not_warm
    assert can.why_not_warm in can.notes
    before = server.tell(world=True)
    with pytest.raises(Unsupported, match="suspend image SR"):
        made.checkpoint(NAME, "more", warm=True)
    server.tell(knobs={"suspend_sr": True, "sr_size": 2**27})
    with pytest.raises(NoSpace, match="suspend image SR"):
        made.checkpoint(NAME, "more", warm=True)
    with pytest.raises(NoSpace, match="storage repository"):
        made.reset(NAME, "warm")
    server.tell(knobs={"sr_size": 2**40, "agent": False})
    made.start(NAME)
    with pytest.raises(Unsupported, match="VM_LACKS_FEATURE_SUSPEND"):
        made.checkpoint(NAME, "more", warm=True)
    assert server.tell(world=True) == before
    assert power(rig) is Power.RUNNING


def test_a_host_without_memory_leaves_it_as_it_is(rig, server, made):
    made.reset(NAME, "warm")
    server.tell(knobs={"host_memory": 64 * MIB})
    with pytest.raises(NoSpace, match="NO_HOSTS_AVAILABLE"):
        made.start(NAME)
    assert rig.disks().half_back(NAME) == ""
    server.tell(knobs={"host_memory": 2**36})
    made.start(NAME)


def test_a_checkpoint_whose_memory_is_gone_destroys_nothing(rig, made):
    call = rig.sessions().call
    (snapshot,) = call("VM.get_by_name_label", f"{NAME} warm")
    call("VDI.destroy", call("VM.get_record", snapshot)["suspend_VDI"])
    with pytest.raises(WrongState, match="is gone"):
        made.reset(NAME, "warm")
    assert rig.read(NAME) == "B"
    made.start(NAME)


def test_a_revert_that_is_refused_changes_nothing(rig, server, made):
    before = server.tell(world=True)
    server.fail("VM.revert", ["error", "OPERATION_NOT_ALLOWED", "not now"])
    with pytest.raises(WrongState, match="OPERATION_NOT_ALLOWED"):
        made.reset(NAME, "warm")
    assert (rig.disks().half_back(NAME), rig.read(NAME)) == ("", "B")
    assert server.tell(world=True) == before
    made.start(NAME)


# -- every call may fail ------------------------------------------------------------------------------

HOWS: dict[str, list[object]] = {
    "refused": ["error", "INTERNAL_ERROR", "told to"],
    "before": ["drop-before"],
    "after": ["drop-after"],
    "dies": ["dies"],
    "cut": ["cut"],  # it loses what of its database isn't on its disk
    "cut, unnoticed": ["cut-unnoticed"],
}
UNCHANGING = re.compile(r"get_|event\.from|session\.|task\.")
_PARTS = {"VM.checkpoint": 6, "VM.revert": 7, "VM.resume": 3}
"""So many parts has the call: the host dies after each of them."""


def act(operation: str, rig) -> None:
    hypervisor = rig.hypervisor()
    match operation:
        case "checkpoint":
            hypervisor.checkpoint(NAME, "now", warm=True)
        case "reset" | "reset on the same disk":
            hypervisor.reset(NAME, "warm")
        case "reset to cold":
            hypervisor.reset(NAME, "cold")
        case "start":
            hypervisor.start(NAME)


def prepared(operation: str, rig, hypervisor) -> None:
    if operation == "reset on the same disk":  # as it was when it was kept
        hypervisor.checkpoint(NAME, "same", warm=True)
        hypervisor.reset(NAME, "warm")
        hypervisor.start(NAME)
    if operation in ("start", "reset to cold"):
        hypervisor.reset(NAME, "warm")


OPERATIONS = ("checkpoint", "reset", "reset on the same disk", "reset to cold", "start")
CASES = [
    (operation, how)
    for operation in OPERATIONS
    for how in HOWS
    if MANY or how != "cut, unnoticed" or operation == "checkpoint"  # the longest
]


@pytest.mark.parametrize(("operation", "how"), CASES)
def test_whatever_call_fails_memory_and_disk_are_of_one_moment(rig, server, made, operation, how):
    """Each call in turn, refused, hung up on, or cut by the host's death after each of its parts."""
    prepared(operation, rig, made)
    server.tell(keep=True)
    server.log()
    act(operation, rig)
    calls = server.log()
    assert len(calls) > 5
    for number, call in enumerate(calls, 1):
        if (
            UNCHANGING.search(call)
            and not MANY
            and (number == 1 or UNCHANGING.search(calls[number - 2]))
        ):
            continue  # it is as well as the one before
        for part in range(1, _PARTS.get(call, 1) + 1 if how in ("dies", "cut") else 2):
            server.tell(put_back=True)
            server.fail("*", [*HOWS[how], part] if how in ("dies", "cut") else HOWS[how], nth=number)
            with contextlib.suppress(FarmhandError):
                act(operation, rig)
            server.tell(fail=[])
            server.tell(settle=True)
            _one_moment(rig, server, operation, f"{operation}, call {number}, {call}, {how} {part}")


def _one_moment(rig, server, operation: str, context: str) -> None:
    hypervisor, disks = rig.hypervisor(), rig.disks()
    for left in hypervisor.leftovers():
        hypervisor.discard(left)
    assert list(hypervisor.leftovers()) == [], context
    disk = disks.find(NAME)
    assert disk, context
    half = disks.half_back(NAME)
    if half:
        assert operation != "checkpoint", context
        with pytest.raises(WrongState):  # nobody uses it before it is there
            hypervisor.start(NAME)
        hypervisor.stop(NAME, grace=0)
        disks.restore(NAME, half)
        assert disks.half_back(NAME) == "", context
        assert (power(rig), rig.read(NAME)) == (Power.SUSPENDED, "A"), context
    else:
        content, now = rig.read(NAME), power(rig)
        new = {"reset to cold": "C", "reset": "A", "checkpoint": "B"}.get(operation, "A")
        old = "A" if operation in ("start", "reset to cold", "reset on the same disk") else "B"
        assert content in (old, new), context
        if operation == "reset" and content == "A":
            assert now is Power.SUSPENDED, context
        if operation == "start":  # a host that dies once it runs has it stopped, as any other
            after = r"(VM.resume, dies 3|(event.from|task.destroy|sync_database), (dies|cut)\b.* 1)$"
            ran_on = re.search(after, context)
            assert now in (Power.SUSPENDED, Power.RUNNING) or ran_on, context
    assert server.tell(harm=True) == [], context
    kept = [c.name for c in disks.find(NAME).checkpoints]
    assert kept[:3] == ["clean", "cold", "warm"], context
    if operation == "checkpoint":
        assert kept[3:] in ([], ["now"]), context
        if not kept[3:]:
            _running(rig, hypervisor)
            act(operation, rig)
        hypervisor.reset(NAME, "now")
        assert (power(rig), rig.read(NAME)) == (Power.SUSPENDED, "B"), context
    _running(rig, hypervisor)
    assert server.tell(harm=True) == [], context
    hypervisor.reset(NAME, "warm")
    assert rig.read(NAME) == "A", context
    hypervisor.destroy(NAME)
    for left in hypervisor.leftovers():
        hypervisor.discard(left)
    hypervisor.doubtful()  # the server looks at its storage
    left = [line for line in server.tell(world=True) if not re.search("base@1|template", line)]
    # of a host that dies while it clones, disks stay that are nobody's: see docs/xenapi.md
    only_vdis = re.search("dies|cut", context) and {x.split()[0] for x in left} == {"VDI"}
    assert not left or only_vdis, (context, left)
    assert server.tell(harm=True) == [], context


def _running(rig, hypervisor) -> None:
    if power(rig) is Power.RUNNING:
        return
    try:
        hypervisor.start(NAME)
    except WrongState:  # suspended by a checkpoint whose server died
        hypervisor.stop(NAME, grace=0)
        hypervisor.start(NAME)


def test_the_table_names_the_calls_that_fail_in_turn(rig, server, made):
    table = (xenapi_rig._SERVER.parents[2] / "docs/xenapi.md").read_text()
    called: set[str] = set()
    server.log()
    for operation in ("checkpoint", "reset", "start"):
        act(operation, rig)
        called |= set(server.log())
    for call in (call for call in called if not UNCHANGING.search(call)):
        assert re.search(rf"\| `{re.escape(call)}` \|.*fails in turn", table), call


# -- what a dead client leaves --------------------------------------------------------------------------


class Killed(Exception):
    pass


@pytest.mark.parametrize("by", ["killed", "died"])
def test_half_way_back_nothing_else_can_be_done(rig, server, made, by):
    """Killed before VM.revert, or the server died within, when the disk was gone. Nor is the machine
    taken for one without a disk, and swept away."""

    def step(text: str) -> None:
        if by == "killed" and text.startswith("revert"):
            raise Killed

    if by == "died":
        server.fail("VM.revert", ["dies", 3])
    with pytest.raises((Killed, FarmhandError)):
        rig.hypervisor(step=step).reset(NAME, "warm")
    assert (bare(rig)["VBDs"] == []) == (by == "died")
    assert rig.disks().half_back(NAME) == "warm"
    for left in made.leftovers():
        made.discard(left)
    assert not [x for x in made.leftovers() if x.kind == "domain"]
    for refused in (
        lambda: made.start(NAME),
        lambda: made.checkpoint(NAME, "x", warm=True),
    ):
        with pytest.raises(WrongState):
            refused()
    disk = rig.disks().find(NAME)
    assert disk.base == ("warm" if by == "died" else "cold")
    assert [c.name for c in disk.checkpoints] == ["clean", "cold", "warm"]
    made.reset(NAME, "cold")
    assert (power(rig), rig.read(NAME)) == (Power.STOPPED, "C")
    made.start(NAME)
    assert rig.hypervisor().find(NAME).owner.farm == KATA


@pytest.mark.parametrize("parts", range(1, _PARTS["VM.revert"]))
def test_a_second_death_in_the_second_revert(rig, server, made, parts):
    for _ in range(2):
        server.fail("VM.revert", ["dies", parts])
        with pytest.raises(FarmhandError):
            made.reset(NAME, "warm")
        assert rig.disks().half_back(NAME) == "warm"
    made.reset(NAME, "warm")
    assert rig.read(NAME) == "A"
    made.start(NAME)


def test_an_intent_that_lands_late_counts_for_nothing(rig, server, made):
    """Written by a client that was given up on, after another has brought the machine back."""
    call = rig.sessions().call
    (snapshot,) = call("VM.get_by_name_label", f"{NAME} warm")
    disk = rig.disks().find(NAME)
    made.reset(NAME, "warm")
    made.start(NAME)
    made.stop(NAME, grace=0)
    call("VM.add_to_other_config", snapshot, "farmhand:revert", disk.path.name)
    assert rig.disks().half_back(NAME) == ""
    made.start(NAME)
    assert power(rig) is Power.RUNNING


def test_one_with_warm_checkpoints_keeps_its_name(rig, made):
    """VM.revert would bring the old one back."""
    made.stop(NAME, grace=0)
    with pytest.raises(Unsupported, match=r"warm checkpoints \(warm\), which hold its name"):
        made.rename(NAME, rig.spec("build"))
    assert rig.hypervisor().find("kata-build") is None
    made.reset(NAME, "warm")
    made.start(NAME)
    made.reset(NAME, "cold")
    rig.disks().remove_checkpoint(NAME, "warm")
    assert made.rename(NAME, rig.spec("build")).name == "kata-build"
    assert [kept.name for kept in rig.disks().find("kata-build").checkpoints] == ["clean", "cold"]


def test_a_template_stays_while_a_warm_checkpoint_grows_from_it(rig, made):
    """Also where the disk has moved to another one; one that grew from the warm one is of it, too."""
    made.stop(NAME, grace=0)
    disks = rig.disks()
    new = disks.seal(rig.image("N", "new"), template(2))
    disks.move(NAME, new)
    disks.remove_checkpoint(NAME, "cold")
    with pytest.raises(WrongState, match="template base@1 is in use by kata-prod"):
        disks.remove_template("base@1")
    made.reset(NAME, "warm")
    assert rig.read(NAME) == "A"
    made.start(NAME)
    made.checkpoint(NAME, "later", warm=True)
    made.stop(NAME, grace=0)
    made.reset(NAME, "clean")
    disks.remove_checkpoint(NAME, "warm")
    with pytest.raises(WrongState, match="template base@1 is in use by kata-prod"):
        disks.remove_template("base@1")
    made.reset(NAME, "later")
    assert rig.read(NAME) == "A"
