"""Warm checkpoints, over the fake driver: taken, gone back to, refused, seen, and built on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from test_farm import Desk
from test_group_change import TWO_HOSTS, OneByOne, contents, powers, write

from builds.operation import CYCLE, CycleFacts, RunCycle
from builds.record import find_record
from cli.views import farm_status
from hypervisors.api import Checkpoint, Disk, KeptMemory, Leftover, Power
from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from hypervisors.fake.host import FakeHost
from inventory.errors import (
    ConnectionLost,
    DriverFailed,
    InventoryError,
    NotFound,
    Unsupported,
    UsageError,
    WrongState,
    spelled,
)
from inventory.loader import load
from provision.engine.facts import NoFacts
from provision.engine.runner import perform
from provision.guest.remote import Ready
from provision.member import Member, members_of
from provision.operations.copy_in import COPY_IN, CopyInFacts
from provision.operations.reset import BEYOND, RESET, Proof, ResetFacts
from provision.power import START
from provision.untold import is_untold
from tests import farm

FARM = """\
farm: kata
hosts: {here: {driver: fake}}
templates: {base: {build: debian-12, size: 64M}}
vms:
  dev2: {memory: 512M}
  prod: {memory: 512M}
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    made = Desk(tmp_path)
    made.file.write_text(FARM)
    return made


@pytest.fixture
def made(desk: Desk) -> Desk:
    desk.run(farm.clone_farm)
    return desk


@pytest.fixture
def kept(made: Desk) -> Desk:
    """Both kept as ready with "old" on their disks and "then" in their memory; now they have others."""
    write(made, b"old")
    remember(made, "then")
    made.run(farm.checkpoint, [], "ready", warm=True)
    write(made, b"newer")
    remember(made, "now")
    return made


def declare(desk: Desk, **vms: str) -> None:
    """More keys of VMs."""
    text = FARM
    for vm, keys in vms.items():
        text = text.replace(f"  {vm}: {{memory: 512M", f"  {vm}: {{memory: 512M, {keys}")
    desk.file.write_text(text)


def remember(desk: Desk, word: str) -> None:
    with desk.site() as site:
        for member in members_of(site):
            fake(member.driver).remember(member.machine, word)


def words(desk: Desk) -> list[str]:
    """What the VMs have in memory."""
    with desk.site() as site:
        found = [fake(one.driver).memory_of(one.machine) for one in members_of(site)]
    return [word.partition(" ")[0] for word in found]


def fake(driver: object) -> FakeHypervisor:
    assert isinstance(driver, FakeHypervisor)
    return driver


def damage(
    desk: Desk, vm: str, name: str, trouble: str = "its file is cut short", *, hidden: bool = False
) -> None:
    with desk.site() as site:
        fake(Member(site, vm).driver).damage(Member(site, vm).machine, name, trouble, hidden=hidden)


def memories(desk: Desk, vm: str) -> Mapping[str, KeptMemory]:
    with desk.site() as site:
        return Member(site, vm).memories()


# -- cut off while they are given their memory back


@pytest.fixture
def cut(kept: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Killed right before a machine that has its memory back runs on."""

    def killed(self: FakeHypervisor, name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FakeHypervisor, "_let_run", killed)
        yield patch


def standing(desk: Desk, vm: str = "prod") -> bool:
    return bool(desk.machine(vm).power is Power.PAUSED)


def test_a_reset_that_was_killed_then_runs_on(kept: Desk, cut: pytest.MonkeyPatch) -> None:
    with kept.site() as site, pytest.raises(KeyboardInterrupt):
        farm.reset(site, ["prod"], to="ready")
    assert standing(kept)
    cut.undo()
    done = kept.run(farm.recover)
    assert str(done.actions[0]).endswith("was interrupted: start prod")
    assert powers(kept) == ["running", "running"]
    assert words(kept) == ["now", "then"]


def test_a_start_that_was_killed_then_is_taken_back(kept: Desk, cut: pytest.MonkeyPatch) -> None:
    kept.run(farm.reset, ["prod"], to="ready", start=False)
    with kept.site() as site, pytest.raises(KeyboardInterrupt):
        farm.start(site, ["prod"])
    assert standing(kept)
    cut.undo()
    kept.run(farm.recover)
    assert kept.machine("prod").power is Power.SUSPENDED
    kept.run(farm.start, ["prod"])
    assert words(kept) == ["now", "then"]


@pytest.mark.parametrize("use_case", [farm.reset, farm.start])
def test_a_daemon_that_went_away_then_leaves_it_to_recovery(
    kept: Desk, cut: pytest.MonkeyPatch, use_case: Any
) -> None:
    def lost(self: FakeHypervisor, name: str) -> None:
        raise ConnectionLost("libvirtd has gone")

    kept.run(farm.reset, ["prod"], to="ready", start=False)
    cut.setattr(FakeHypervisor, "_let_run", lost)
    more = {"to": "ready"} if use_case is farm.reset else {}
    with kept.site() as site, pytest.raises(ConnectionLost):
        use_case(site, ["prod"], **more)
    assert standing(kept)
    cut.undo()
    with kept.site() as site:
        assert len(site.journal.unfinished()) == 1
        farm.start(site, ["prod"])
    assert powers(kept) == ["running", "running"]
    assert words(kept) == ["now", "then"]


@pytest.mark.parametrize("decided", [True, False], ids=["changed", "not begun"])
@pytest.mark.parametrize("power", [Power.RUNNING, Power.PAUSED])
@pytest.mark.parametrize("other", ["starts", "runs"])
def test_one_that_was_cut_off_is_seen_to_whatever_the_others_need(
    kept: Desk, monkeypatch: pytest.MonkeyPatch, decided: bool, power: Power, other: str
) -> None:
    """dev2 was given its memory back, and neither thawed nor noted; prod is to start, or runs."""
    if other == "starts":
        kept.run(farm.stop, ["prod"])
    with kept.site() as site:
        member = Member(site, "dev2")
        with fake(member.driver)._store.change() as world:
            there = world.machines[member.machine]
            there.machine = replace(there.machine, power=power, started=None)
    to = {"dev2": "ready", "prod": "ready"}
    known = ResetFacts(
        was_on=("prod",), to=to, start=decided, warm=tuple(to), decided=decided, changed=decided
    )
    settled: list[str] = []
    real = FakeHypervisor.settle

    def heard(self: FakeHypervisor, machine: str) -> str:
        settled.append(machine)
        return real(self, machine)

    monkeypatch.setattr(FakeHypervisor, "settle", heard)
    with (
        kept.site() as site,
        pytest.raises(KeyboardInterrupt),
        site.journal.begin(RESET, list(to), known),
    ):
        raise KeyboardInterrupt
    kept.run(farm.recover)
    assert settled == ["kata-dev2"]
    started = decided or power is Power.RUNNING
    assert powers(kept) == ["running" if started else "stopped", "running"]


def test_what_an_admin_has_suspended_stays_so(kept: Desk) -> None:
    """Whatever is recovered of it."""
    kept.run(farm.reset, ["prod"], to="ready")
    with kept.site() as site:
        member = Member(site, "prod")
        with fake(member.driver)._store.change() as world:
            there = world.machines[member.machine]
            there.machine = replace(there.machine, power=Power.PAUSED)
    facts = ResetFacts(was_on=(), to={"prod": "ready"}, start=True, decided=True, changed=True)
    for activity, known in ((RESET, facts), (START, NoFacts())):
        with (
            kept.site() as site,
            pytest.raises(KeyboardInterrupt),
            site.journal.begin(activity, ["prod"], known),
        ):
            raise KeyboardInterrupt
        kept.run(farm.recover)
        assert standing(kept)
        with kept.site() as site:
            assert fake(Member(site, "prod").driver).settle("kata-prod") == ""
    assert standing(kept)


# -- checkpoint --warm


def test_several_at_one_moment_run_on(made: Desk) -> None:
    write(made, b"old")
    remember(made, "then")
    done = made.run(farm.checkpoint, [], "ready", warm=True)
    assert str(done.actions[0]) == (
        "dev2: keep as ready, disk and memory (up to 1G of room); it runs on"
    )
    assert sorted(done.result.memory) == ["dev2", "prod"]
    facts: Any = done.as_dict()["facts"]
    assert facts["checkpoint"] == "ready"
    assert facts["memory"]["prod"]["pause"] == done.result.memory["prod"].pause
    assert powers(made) == ["running", "running"]
    assert words(made) == ["then", "then"]
    with made.site() as site:
        disk = Member(site, "prod").disk()
        assert disk is not None
        assert [(one.name, one.warm) for one in disk.checkpoints] == [("clean", False), ("ready", True)]


def test_only_what_runs_on_one_host(made: Desk) -> None:
    made.run(farm.stop, ["prod"])
    with made.site() as site, pytest.raises(WrongState, match="prod is stopped"):
        farm.checkpoint(site, [], "ready", warm=True)
    made.run(farm.destroy)
    made.file.write_text(TWO_HOSTS)
    made.run(farm.clone_farm)
    with made.site() as site, pytest.raises(UsageError, match="of VMs of one host, and these"):
        farm.checkpoint(site, [], "ready", warm=True)
    made.run(farm.checkpoint, ["prod", "repo"], "ready", warm=True)


def test_a_host_that_keeps_no_running_machines_memory(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    can = FakeHypervisor.capabilities
    monkeypatch.setattr(
        FakeHypervisor, "capabilities", lambda self: replace(can(self), warm_checkpoints=False)
    )
    with made.site() as site, pytest.raises(Unsupported, match="keeps no running machine's memory"):
        farm.checkpoint(site, ["prod"], "ready", warm=True)
    declare(made, prod="reset_to: warm")
    with made.site() as site, pytest.raises(Unsupported, match="prod's host here keeps no running"):
        farm.clone_farm(site)


def test_an_error_leaves_all_running_and_says_what_is_kept(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = FakeDisks.checkpoint_live

    def fails(self: FakeDisks, machine: str, name: str, move: Any) -> Any:
        if machine == "kata-prod":
            raise DriverFailed("the pool is gone")
        return live(self, machine, name, move)

    monkeypatch.setattr(FakeDisks, "checkpoint_live", fails)
    with made.site() as site, pytest.raises(DriverFailed, match="the pool is gone"):
        farm.checkpoint(site, [], "ready", warm=True)
    assert powers(made) == ["running", "running"]
    assert made.heard.warnings == ["dev2: it has the checkpoint ready"]


def test_one_that_is_left_paused_is_let_go_by_the_next_command(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FakeDisks, "checkpoint_live", _fails)
        patch.setattr(FakeHypervisor, "settle", _fails)
        with made.site() as site, pytest.raises(DriverFailed):
            farm.checkpoint(site, [], "ready", warm=True)
        assert powers(made) == ["paused", "paused"]
    with made.site(plan=True) as site:
        (planned,) = farm.recover(site).actions
    assert "see that dev2, prod run on" in spelled(planned.text)
    with monkeypatch.context() as patch:
        patch.setattr(FakeHypervisor, "settle", lambda *_: "")
        patch.setattr("provision.engine.journal.Journal.settle", lambda *_, **__: None)
        made.run(farm.recover)
    assert "prod: it is paused: its hypervisor's own tools let it run on" in made.heard.warnings
    made.run(farm.recover)
    assert powers(made) == ["running", "running"]
    assert memories(made, "prod") == {}


@pytest.mark.parametrize("error", [DriverFailed("the pool is gone"), RuntimeError("a defect")])
def test_what_an_error_leaves_is_seen_to_at_once(
    made: Desk, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(driver: FakeHypervisor, machines: Any, name: str) -> None:
        driver._pause(machines, name)
        raise error

    monkeypatch.setattr(FakeHypervisor, "checkpoint_all", fails)
    with made.site() as site, pytest.raises(type(error), match=str(error)):
        farm.checkpoint(site, [], "ready", warm=True)
    assert powers(made) == ["running", "running"]
    with made.site() as site:  # what nobody foresaw is looked at once more
        assert len(site.journal.unfinished()) == isinstance(error, RuntimeError)


def _fails(*_: object) -> None:
    raise DriverFailed("its QEMU does not answer")


# -- reset


def test_all_go_back_disk_and_memory_proven(kept: Desk) -> None:
    seal = memories(kept, "prod")["ready"].seal
    for _ in range(2):
        done = kept.run(farm.reset, [], to="ready")
        assert str(done.actions[-1]) == (
            "prod: put back to ready, disk and memory, run on, wait until its ssh answers"
        )
        proof = done.result.vms["prod"].proof
        assert (proof.checkpoint, proof.pristine, proof.memory) == ("ready", True, seal)
        assert proof.beyond == BEYOND
        assert contents(kept) == [b"old", b"old"]
        assert words(kept) == ["then", "then"]
        write(kept, b"newer")
        remember(kept, "now")


def test_without_start_they_are_suspended_and_a_start_runs_them_on(kept: Desk) -> None:
    kept.run(farm.reset, [], to="ready", start=False)
    assert powers(kept) == ["suspended", "suspended"]
    done = kept.run(farm.stop, ["prod"])
    assert [action.verb for action in done.actions] == ["keep"]
    done = kept.run(farm.start, ["prod"])
    assert "run on from where it was suspended" in str(done.actions[-1])
    kept.run(farm.start, ["dev2"], cold=True)
    assert words(kept) == ["booted", "then"]


def test_cold_leaves_the_memory_alone(kept: Desk) -> None:
    done = kept.run(farm.reset, ["prod"], to="ready", cold=True)
    assert str(done.actions[-1]) == (
        "prod: put back to ready, its disk only, start, wait until its ssh answers"
    )
    assert done.result.vms["prod"].proof.memory == ""
    assert (words(kept), contents(kept)) == (["now", "booted"], [b"newer", b"old"])
    kept.run(farm.reset, ["prod"], to="ready")
    assert words(kept) == ["now", "then"]


@pytest.mark.parametrize("hidden", [False, True], ids=["seen at a glance", "seen by a whole look"])
def test_a_memory_that_cant_be_used_is_refused_before_anything_stops(kept: Desk, hidden: bool) -> None:
    damage(kept, "prod", "ready", hidden=hidden)
    with kept.site() as site, pytest.raises(WrongState) as refused:
        farm.reset(site, to="ready")
    assert (
        "prod can't run on from checkpoint ready: its memory can't be used: its file is cut short"
        in (refused.value.message)
    )
    assert "reset --vm prod --to ready --cold" in spelled(refused.value.remedy)
    assert (words(kept), contents(kept)) == (["now", "now"], [b"newer", b"newer"])
    kept.run(farm.reset, [], to="ready", cold=True)
    assert (words(kept), contents(kept)) == (["booted", "booted"], [b"old", b"old"])


@pytest.mark.parametrize("hidden", [False, True], ids=["seen at a glance", "seen by a whole look"])
def test_it_boots_instead_where_the_farm_file_says_so(kept: Desk, hidden: bool) -> None:
    declare(kept, prod="boot_instead: yes")
    damage(kept, "prod", "ready", hidden=hidden)
    kept.heard.warnings.clear()
    done = kept.run(farm.reset, [], to="ready")
    assert "its disk only (its memory can't be used: its file is cut short), start" in str(
        done.actions[-1]
    )
    assert kept.heard.warnings == [
        "prod: boots from the disk of ready: its memory can't be used: its file is cut short"
    ]
    assert words(kept) == ["then", "booted"]


@pytest.fixture
def unseen(kept: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """prod's memory is damaged after it was looked at."""
    damage(kept, "prod", "ready", hidden=True)
    monkeypatch.setattr(FakeHypervisor, "why_unusable", lambda *_: "")
    return kept


def test_a_memory_that_fails_at_its_start_alone_is_no_part_of_the_proof(unseen: Desk) -> None:
    declare(unseen, prod="boot_instead: yes")
    unseen.heard.warnings.clear()
    done = unseen.run(farm.reset, [], to="ready")
    (warned,) = unseen.heard.warnings
    assert warned.startswith("prod: boots instead of running on: the memory of kata-prod's checkpoint")
    assert words(unseen) == ["then", "booted"]
    proofs = {vm: one.proof for vm, one in done.result.vms.items()}
    assert (proofs["dev2"].memory != "", proofs["prod"].memory, proofs["prod"].beyond) == (True, "", "")
    with unseen.site() as site:
        facts: Any = site.journal.history(1)[0].facts
    assert {vm: Proof(**one) for vm, one in facts["proofs"].items()} == proofs


def test_it_is_off_where_nobody_lets_it_boot(unseen: Desk) -> None:
    with unseen.site() as site, pytest.raises(WrongState, match="can't be used: its file is cut short"):
        farm.reset(site, ["prod"], to="ready")
    assert powers(unseen) == ["running", "suspended"]


def test_a_suspended_one_that_cant_be_started_boots(unseen: Desk) -> None:
    unseen.run(farm.reset, ["prod"], to="ready", start=False)
    declare(unseen, prod="boot_instead: yes")
    unseen.run(farm.start, ["prod"])
    assert words(unseen) == ["now", "booted"]


def test_a_suspended_one_whose_memory_is_lost(kept: Desk) -> None:
    kept.run(farm.reset, ["prod"], to="ready", start=False)
    damage(kept, "prod", "ready")
    with kept.site() as site, pytest.raises(WrongState, match="prod can't run on") as refused:
        farm.start(site, ["prod"])
    assert spelled(refused.value.remedy) == "boot it: start --vm prod --cold"
    declare(kept, prod="boot_instead: yes")
    done = kept.run(farm.start, ["prod"])
    assert "start it, for the memory of its checkpoint ready can't be used" in str(done.actions[-1])
    assert words(kept) == ["now", "booted"]


@pytest.mark.parametrize(
    ("now", "words"),
    [("memory: 256M", "256M and 1 now"), ("memory: 512M, vcpus: 2", "512M and 2 now")],
    ids=["memory", "CPUs"],
)
def test_another_machine_than_it_was_gets_no_memory(kept: Desk, now: str, words: str) -> None:
    """The room that it takes is counted by the farm file, whatever its definition is until it boots."""
    kept.run(farm.reset, ["prod"], to="ready", start=False)
    kept.file.write_text(FARM.replace("prod: {memory: 512M", f"prod: {{{now}"))
    refused = f"it is of a machine of 512M and 1 vCPU, which has {words}"
    for how, options in ((farm.start, {}), (farm.reset, {"to": "ready"})):
        with kept.site() as site, pytest.raises(WrongState, match=refused):
            how(site, ["prod"], **options)
    with kept.site() as site:
        row = farm.status(site).vms[1]
    assert row.memory_troubles == (f"the memory of its checkpoint ready can't be used: {refused}",)
    kept.run(farm.start, ["prod"], cold=True)
    assert powers(kept) == ["running", "running"]


def test_a_lost_host_key_does_not_get_into_a_memory(kept: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("provision.operations.reset._lost_its_key", lambda member: member.vm == "prod")
    with kept.site() as site, pytest.raises(WrongState, match="its host key was lost"):
        farm.reset(site, to="ready")


def test_one_that_would_boot_all_the_same_is_not_started(
    kept: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeHypervisor, "_suspended_at", lambda *_: "")
    with kept.site() as site, pytest.raises(DriverFailed, match="its memory can't be used: not started"):
        farm.reset(site, ["prod"], to="ready")
    assert powers(kept) == ["running", "stopped"]


def test_each_goes_where_the_farm_file_says(kept: Desk) -> None:
    declare(kept, prod="reset_to: ready")
    done = kept.run(farm.reset)
    assert [str(action).partition(", wait")[0] for action in done.actions] == [
        "dev2: put back to clean, start",
        "prod: put back to ready, disk and memory, run on",
    ]
    assert (contents(kept), words(kept)) == ([b"", b"old"], ["booted", "then"])
    kept.run(farm.reset, [], to="clean")
    assert contents(kept) == [b"", b""]


def test_a_second_checkpoint_that_fails_holds_all_until_it_is_mended(
    kept: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(kept, prod="reset_to: ready")
    with monkeypatch.context() as patch:
        restore = FakeDisks.restore

        def fails(self: FakeDisks, machine: str, name: str) -> Any:
            return _fails() if name == "ready" else restore(self, machine, name)

        patch.setattr(FakeDisks, "restore", fails)
        with kept.site() as site, pytest.raises(WrongState, match="dev2 is done, prod not yet"):
            farm.reset(site)
    assert powers(kept) == ["stopped", "stopped"]
    with kept.site() as site:
        (done,) = farm.recover(site).actions
    assert "put back to clean (dev2), ready (prod) and start" in spelled(done.text)
    assert (contents(kept), words(kept)) == ([b"", b"old"], ["booted", "then"])


def test_a_proof_that_was_written_is_read_again(kept: Desk) -> None:
    kept.run(farm.reset, ["prod"], to="ready")
    with kept.site() as site:
        facts: Any = site.journal.history(1)[0].facts
    assert Proof(**facts["proofs"]["prod"]).memory == memories(kept, "prod")["ready"].seal


class Lost(FakeDisks):
    """Somebody removed prod's disk, and its checkpoints are left."""

    lost = True

    def find(self, machine: str) -> Disk | None:
        return None if self.lost and machine == "kata-prod" else super().find(machine)

    def left(self, machine: str) -> Sequence[Checkpoint]:
        disk = super().find(machine)
        return disk.checkpoints if disk and self.find(machine) is None else ()

    def restore_all(self, machines: Sequence[str], name: str) -> Sequence[Disk]:
        self.lost = False
        return super().restore_all(machines, name)


@pytest.mark.parametrize("cold", [False, True])
def test_one_whose_disk_was_gone_boots_as_its_plan_says(kept: Desk, cold: bool) -> None:
    """Its memory is still there, and it is no part of the proof."""
    kept.run(farm.stop, ["prod"])
    with kept.site() as site:
        store = site.disks("here")
        assert isinstance(store, FakeDisks)
        site.opened("here")._disks = Lost(site.identity, store.store.path)
        done = farm.reset(site, ["prod"], to="ready", cold=cold)
    assert "run on" not in str(done.actions)
    assert done.result.vms["prod"].proof.memory == ""
    assert (words(kept), contents(kept)) == (["now", "booted"], [b"newer", b"old"])


def test_what_boots_does_so_where_recovery_starts_it(kept: Desk) -> None:
    kept.run(farm.reset, ["prod"], to="ready", start=False)
    facts = ResetFacts(was_on=(), to={"prod": "ready"}, start=True, decided=True, changed=True)
    with (
        kept.site() as site,
        pytest.raises(KeyboardInterrupt),
        site.journal.begin(RESET, ["prod"], facts),
    ):
        raise KeyboardInterrupt
    kept.run(farm.recover)
    assert words(kept) == ["now", "booted"]


class Merging(FakeDisks):
    """A store that can write a disk back into its checkpoint."""

    def merge(self, machine: str) -> None:
        raise AssertionError(f"{machine} was merged")


def test_what_has_memory_is_not_merged_into(kept: Desk) -> None:
    with kept.site() as site:
        store = site.disks("here")
        assert isinstance(store, FakeDisks)
        site.opened("here")._disks = Merging(site.identity, store.store.path)
        with pytest.raises(Unsupported, match="grew from ready, a warm checkpoint"):
            farm.merge(site, ["prod"])


# -- clone-farm, reset_to: warm


def test_clone_farm_keeps_each_once_it_answered(desk: Desk) -> None:
    declare(desk, dev2="reset_to: warm", prod="reset_to: warm")
    done = desk.run(farm.clone_farm)
    assert str(done.actions[-1]) == "prod: once it answers, keep as warm, disk and memory"
    assert not desk.run(farm.clone_farm).changed
    remember(desk, "now")
    desk.run(farm.reset)
    assert words(desk) == ["booted", "booted"], "the boot that was kept"
    assert memories(desk, "prod").keys() == {"warm"}
    desk.run(farm.destroy, ["prod"])
    desk.run(farm.clone_farm)
    assert memories(desk, "prod").keys() == {"warm"}, "made anew"


def test_one_that_was_only_cloned_gets_it_by_the_next_clone_farm(desk: Desk) -> None:
    declare(desk, prod="reset_to: warm")
    done = desk.run(farm.clone_farm, ["prod"], start=False)
    assert "gets its checkpoint warm when clone-farm has seen it answer" in str(done.actions[-1])
    desk.run(farm.start, ["prod"])
    desk.run(farm.clone_farm)
    assert memories(desk, "prod").keys() == {"warm"}


def test_one_that_was_used_is_not_kept_as_it_is(made: Desk) -> None:
    made.run(farm.checkpoint, ["prod"], "tools")
    made.run(farm.reset, ["prod"], to="tools")
    declare(made, prod="reset_to: warm")
    done = made.run(farm.clone_farm)
    assert not done.changed
    assert "was used since it was cloned: reset --vm prod --to clean" in str(done.actions[-1])
    with made.site() as site, pytest.raises(NotFound, match="no checkpoint 'warm'") as missing:
        farm.reset(site, ["prod"])
    assert "clone-farm --vm prod" in spelled(missing.value.remedy)
    made.run(farm.reset, ["prod"], to="clean")
    made.run(farm.clone_farm)
    assert memories(made, "prod").keys() == {"warm"}


def test_a_reset_that_another_farmhand_noted_says_nothing(made: Desk) -> None:
    """Clone-farm goes on; what was done to the VM since it was cloned nobody knows."""
    made.run(farm.reset, ["prod"], to="clean")
    with made.site() as site:
        site.journal.write("UPDATE operations SET facts = '{}' WHERE verb = ?", (RESET.name,))
    declare(made, prod="reset_to: warm")
    done = made.run(farm.clone_farm)
    assert "was used since it was cloned: reset --vm prod --to clean" in str(done.actions[-1])
    made.run(farm.reset, ["prod"], to="clean")
    made.run(farm.clone_farm)
    assert memories(made, "prod").keys() == {"warm"}


def test_one_that_was_copied_into_was_used(made: Desk) -> None:
    declare(made, prod="reset_to: warm")
    with made.site() as site, site.journal.begin(COPY_IN, ["prod"], CopyInFacts("patch", "src")):
        pass
    assert "was used since it was cloned" in str(made.run(farm.clone_farm).actions[-1])


@pytest.mark.parametrize("verb", ["clone", "start"])
def test_what_another_farmhand_did_to_one_is_not_trusted(made: Desk, verb: str) -> None:
    """A record that can't be read says neither that it was made anew nor that it is as it was."""
    with made.site() as site:
        change = "UPDATE operations SET facts = '{\"later\": 1}' WHERE verb = ?"
        site.journal.write(change, (verb,))
    declare(made, prod="reset_to: warm")
    assert "was used since it was cloned" in str(made.run(farm.clone_farm).actions[-1])


def test_one_that_was_reset_within_a_build_was_used(made: Desk) -> None:
    declare(made, prod="reset_to: warm")
    with made.site() as site, site.journal.begin(CYCLE, ["prod"], CycleFacts("1")):
        farm.reset(site, ["prod"], to="clean")
    assert "was used since it was cloned" in str(made.run(farm.clone_farm).actions[-1])


def test_clone_farm_tells_of_a_warm_one_whose_memory_is_damaged(desk: Desk) -> None:
    declare(desk, prod="reset_to: warm")
    desk.run(farm.clone_farm)
    damage(desk, "prod", "warm")
    assert "has a memory that can't be used (its file is cut short): made anew after destroy" in str(
        desk.run(farm.clone_farm).actions[-1]
    )


def test_a_warm_one_without_its_memory_is_not_taken_for_a_cold_one(desk: Desk) -> None:
    declare(desk, prod="reset_to: warm")
    desk.run(farm.clone_farm)
    desk.run(farm.stop, ["prod"])
    with desk.site() as site:
        fake(Member(site, "prod").driver).forget(Member(site, "prod").machine, "warm")
    with desk.site() as site, pytest.raises(WrongState, match="its memory can't be used: it is gone"):
        farm.reset(site, ["prod"])
    done = desk.run(farm.clone_farm)
    assert "its checkpoint warm has no memory: made anew after destroy --vm prod" in str(
        done.actions[-1]
    )


@pytest.mark.parametrize("key", ["reset_to: warm", "boot_instead: yes"])
def test_a_listed_machine_has_no_checkpoints(tmp_path: Path, key: str) -> None:
    path = tmp_path / "farm.yaml"
    path.write_text(
        f"farm: kata\nhosts: {{here: {{driver: ssh}}}}\nvms: {{box: {{address: 10.0.0.1, {key}}}}}\n"
    )
    with pytest.raises(InventoryError, match="there are no checkpoints"):
        load(path)


# -- status, gc


def test_status_tells_which_are_warm_what_is_shared_and_what_is_wrong(kept: Desk) -> None:
    kept.run(farm.reset, ["prod"], to="ready")
    damage(kept, "dev2", "ready")
    with kept.site() as site:
        seen = farm.status(site)
    dev2, prod = seen.vms
    assert prod.warm == dev2.warm == ("ready",)
    assert (prod.memory_shared, prod.memory_private) == (512 * 2**20, 0)
    assert dev2.memory_troubles == (
        "the memory of its checkpoint ready can't be used: its file is cut short",
    )
    text = spelled(farm_status(seen).text)
    assert "512M (512M shared)" in text
    assert "ready (warm, dirty)" in text
    assert f"dev2: {dev2.memory_troubles[0]}" in text
    assert prod.as_dict()["memory_shared"] == 512 * 2**20
    kept.run(farm.reset, ["prod"], to="ready", start=False)
    with kept.site() as site:
        row = farm.status(site).vms[1]
    assert (row.state, row.condition, row.memory_shared) == ("suspended", "clean", None)


def test_gc_knows_memories_and_their_owners(kept: Desk) -> None:
    kept.run(farm.stop, ["prod"])
    with kept.site() as site:
        store, machine = site.disks("here"), Member(site, "prod").machine
        assert isinstance(store, FakeDisks)
        with store.store.change() as world:
            del world.disks[machine].checkpoints["ready"]
            world.disks[machine].base = "clean"
            memory = world.machines[machine].kept["ready"]
            memory.created -= timedelta(days=2)  # its age is the same in the plan and in the run
    (item,) = kept.run(farm.gc).result.leftovers
    assert (item.kind, item.ref, item.owner) == ("memory", "kata-prod/ready", "prod")
    assert not kept.run(farm.gc).changed


def test_gc_leaves_what_may_be_all_of_a_memory_to_the_recovery_of_what_was_cut_off(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the libvirt driver tells of a machine that was saved, and is off: with nobody's mark yet."""
    there = {"warm/kata-dev2/.farmhand-new-1-ready"}

    def leftovers(_: FakeHypervisor) -> list[Leftover]:
        why, now = "its VM's memory, when it was killed", datetime.now(UTC)
        return [
            Leftover(kind="memory", ref=ref, owner=None, created=now, bytes=2**20, why=why)
            for ref in there
        ]

    monkeypatch.setattr(FakeHypervisor, "leftovers", leftovers)
    monkeypatch.setattr(FakeHypervisor, "discard", lambda _, left: there.remove(left.ref))
    with monkeypatch.context() as patch:
        patch.setattr(FakeDisks, "checkpoint_live", _fails)
        patch.setattr(FakeHypervisor, "settle", _fails)
        with made.site() as site, pytest.raises(DriverFailed):
            farm.checkpoint(site, [], "ready", warm=True)
        with made.site() as site:
            told = [spelled(action.text) for action in farm.gc(site).actions]
    assert told == [f"left alone until what was cut off is recovered: {next(iter(there))}: recover"]
    made.run(farm.recover)
    made.run(farm.gc)
    assert not there


def test_a_store_of_one_disk_at_a_time(kept: Desk) -> None:
    with kept.site() as site:
        plain: Any = OneByOne(site.disks("here"))  # type: ignore[arg-type]
        site.hypervisor("here")
        plain.restored.append("kata-prod")
        site.opened("here")._disks = plain
        farm.reset(site, to="ready")
    assert words(kept) == ["then", "then"]


def test_a_vm_that_nobody_waits_for_is_noted_as_untold(
    kept: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on in the past. One that boots, or goes, is not."""
    monkeypatch.setattr(FakeHost, "INFO", replace(FakeHost.INFO, guests=True))

    def untold() -> list[str]:
        with kept.site() as site:
            return [one.vm for one in members_of(site) if is_untold(one)]

    kept.run(farm.reset, to="ready", wait=False)
    assert untold() == ["dev2", "prod"]
    with kept.site(plan=True) as site:
        planned = farm.start(site)
    text = "runs on from an earlier moment, and was not told so yet: tell it"
    assert [str(action) for action in planned.actions] == [f"{vm}: {text}" for vm in ("dev2", "prod")]
    kept.run(farm.reset, ["prod"], to="ready", wait=False, cold=True)
    assert untold() == ["dev2"]
    kept.run(farm.destroy, ["dev2"])
    assert untold() == []


# -- a build on one


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake's guests, which do not exist, answer."""

    async def answers(*_: object, **__: object) -> Ready:
        return Ready("5d2c", 12.0, 0.0)

    async def connected(*_: object) -> None:
        """It is only looked whether there is one."""

    monkeypatch.setattr("builds.machines.until_ready", answers)
    monkeypatch.setattr("builds.machines.Machines._connected", connected)


def test_a_build_on_one_that_booted_claims_no_memory(unseen: Desk, answering: None) -> None:
    declare(unseen, prod="reset_to: ready, boot_instead: yes")
    with unseen.file.open("a") as file:
        file.write("cycle: {steps: [{name: back, reset: prod}]}\n")
    record = find_record(load_paths(unseen), unseen.run(perform, RunCycle()).result.build)
    (vm,) = record.vms
    assert (vm.checkpoint, vm.pristine, vm.memory_seal, vm.beyond_proof) == ("ready", True, "", "")


@pytest.mark.parametrize("to", ["", ", to: clean"], ids=["the VM's own", "the step's"])
def test_a_build_on_a_warm_state_says_what_is_proven(kept: Desk, answering: None, to: str) -> None:
    declare(kept, prod="reset_to: ready")
    with kept.file.open("a") as file:
        file.write(f"cycle: {{steps: [{{name: back, reset: prod{to}}}]}}\n")
    planned = kept.run(perform, RunCycle())
    record = find_record(load_paths(kept), planned.result.build)
    [vm] = record.vms
    name = "clean" if to else "ready"
    assert f"back: reset to {name}, start" in " ".join(map(str, planned.actions))
    assert (vm.checkpoint, vm.pristine) == (name, True)
    seal = "" if to else memories(kept, "prod")["ready"].seal
    assert (vm.memory_seal, vm.beyond_proof) == (seal, "" if to else BEYOND)
    said = (record.directory / record.steps[0].log).read_text()
    assert ("not proven: its processes run on from the checkpoint" in said) == (not to)


def load_paths(desk: Desk) -> Any:
    with desk.site() as site:
        return site.paths
