"""VMs moved to a newer generation, checkpoints listed and removed, disks made larger: on the fake."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_farm import Desk, lines

from builds.operation import RunCycle
from hypervisors.api import KeptMemory, WarmMachines
from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from inventory.errors import (
    ConnectionLost,
    DriverFailed,
    FarmhandError,
    NoSpace,
    NotFound,
    TimedOut,
    Unsupported,
    UsageError,
    WrongState,
    spelled,
)
from provision.engine.facts import NoFacts
from provision.engine.journal import Entry
from provision.engine.operation import Activity, Recovery
from provision.engine.record import Record
from provision.engine.recovery import half_done
from provision.engine.runner import perform
from provision.guest.identity import keeps_own_key
from provision.member import Member
from provision.operations import renew
from provision.operations.checkpoint_remove import kept_states
from provision.site import Site
from tests import farm
from tests.identities import identity


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    return desk


def checkpoints(desk: Desk, vm: str = "prod") -> list[str]:
    with desk.site() as site:
        return [one.checkpoint.name for one in kept_states(site, [vm])]


def disk(desk: Desk, vm: str = "prod") -> Any:
    with desk.site() as site:
        return Member(site, vm).disk()


def write(desk: Desk, content: bytes, vm: str = "prod") -> None:
    with desk.site() as site:
        store: Any = Member(site, vm).store
        store.write(Member(site, vm).machine, content)


def content(desk: Desk, vm: str = "prod") -> bytes:
    with desk.site() as site:
        store: Any = Member(site, vm).store
        found: bytes = store.content(Member(site, vm).machine)
        return found


@pytest.fixture
def newer(made: Desk) -> Desk:
    """base@2 is there; prod, which runs, holds what its guest wrote, and has a checkpoint."""
    write(made, b"old")
    made.run(farm.checkpoint, ["prod"], "mine")
    with made.site() as site:
        farm.template_build(site, "base")
    return made


def test_checkpoints_are_listed_and_removed(made: Desk) -> None:
    made.run(farm.checkpoint, ["prod"], "one")
    with made.site() as site:
        found = [(one.vm, one.checkpoint.name, one.current) for one in kept_states(site)]
    assert found == [("dev2", "clean", True), ("prod", "clean", False), ("prod", "one", True)]
    with made.site() as site, pytest.raises(WrongState, match="checkpoint one stays: its disk grows"):
        farm.checkpoint_remove(site, ["prod"], "one")
    with made.site() as site, pytest.raises(NotFound, match="dev2 has no checkpoint 'one'"):
        farm.checkpoint_remove(site, ["prod", "dev2"], "one")
    with made.site() as site, pytest.raises(UsageError, match="clean is what its template is"):
        farm.checkpoint_remove(site, ["prod"], "clean")
    made.run(farm.reset, ["prod"])
    made.run(farm.checkpoint_remove, ["prod"], "one")
    assert checkpoints(made) == ["clean"]
    assert made.machine("prod").power == "running"


def test_a_removal_that_was_killed_is_done_to_the_end(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.run(farm.checkpoint, ["prod"], "one")
    made.run(farm.reset, ["prod"])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, made.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeDisks, "remove_checkpoint", killed)
        farm.checkpoint_remove(site, ["prod"], "one")
    with made.site() as site:
        (action,) = farm.recover(site).actions
    assert "remove checkpoint one to the end" in str(action)
    assert checkpoints(made) == ["clean"]


def test_a_warm_checkpoint_goes_with_its_memory(made: Desk) -> None:
    made.run(farm.checkpoint, ["prod"], "hot", warm=True)
    with made.site() as site:
        assert list(memories(Member(site, "prod"))) == ["hot"]
    with made.site() as site, pytest.raises(WrongState, match="grows from it"):
        farm.checkpoint_remove(site, ["prod"], "hot")
    with made.site() as site:
        assert list(memories(Member(site, "prod"))) == ["hot"], "a refusal takes nothing"
    made.run(farm.reset, ["prod"], to="clean")
    made.run(farm.checkpoint_remove, ["prod"], "hot")
    with made.site() as site:
        assert not memories(Member(site, "prod"))
    assert checkpoints(made) == ["clean"]


def memories(member: Member) -> Mapping[str, KeptMemory]:
    assert isinstance(member.driver, WarmMachines)
    return member.driver.memories(member.machine)


def test_a_vm_moves_to_the_newest_generation(newer: Desk) -> None:
    done = newer.run(farm.renew, ["prod"])
    assert lines(done) == [
        "prod: shut down, move from base@1 to base@2, start, wait until its ssh answers; "
        "until it answers its state is kept as before-base-2"
    ]
    now = disk(newer)
    assert (now.template, now.base, content(newer)) == ("base@2", "clean", b"")
    assert newer.machine("prod").template == "base@2"
    assert newer.machine("prod").power == "running"
    assert checkpoints(newer) == ["clean", "mine"]
    assert lines(newer.run(farm.renew, ["prod"])) == ["prod: is on base@2, the newest"]
    newer.run(farm.reset, ["prod"], to="mine")
    assert content(newer) == b"old", "older checkpoints stay"
    with newer.site() as site:
        said = [spelled(note) for note in farm.status(site).warnings]
    assert said == ["base@2 is newer than what dev2 is on: renew --vm dev2"]


def test_a_stopped_vm_is_shut_down_again(newer: Desk) -> None:
    newer.run(farm.stop, ["prod"])
    newer.run(farm.renew, ["prod"])
    assert newer.machine("prod").power == "stopped"
    assert disk(newer).template == "base@2"


def test_one_that_does_not_answer_goes_back(newer: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    write(newer, b"work")
    real, failing = FakeHypervisor.start, [True]

    def start(self: FakeHypervisor, name: str, **more: bool) -> None:
        if failing:
            failing.clear()
            raise TimedOut("no answer")
        real(self, name, **more)

    monkeypatch.setattr(FakeHypervisor, "start", start)
    with newer.site() as site, pytest.raises(FarmhandError, match="no answer"):
        farm.renew(site, ["prod"])
    assert "base@2 failed: no answer; it goes back" in newer.heard.warnings[-1]
    assert (disk(newer).template, content(newer)) == ("base@1", b"work")
    assert newer.machine("prod").power == "running"
    assert newer.machine("prod").template == "base@1"
    assert checkpoints(newer) == ["clean", "mine", "before-base-2"]
    done = newer.run(farm.renew, ["prod"])  # a second try has a name for what it keeps
    assert "kept as before-base-2-2; then before-base-2, of an earlier try, goes too" in lines(done)[0]
    assert disk(newer).template == "base@2"
    assert checkpoints(newer) == ["clean", "mine"]
    newer.run(farm.checkpoint, ["prod"], "before-base-2")
    with newer.site() as site:
        farm.template_build(site, "base")
    newer.run(farm.renew, ["prod"])
    assert checkpoints(newer) == ["clean", "mine", "before-base-2"], "one's own is left alone"


@pytest.mark.parametrize("at", ["checkpoint", "move", "start", "remove_checkpoint"])
def test_killed_anywhere_it_is_the_old_or_the_new(
    newer: Desk, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    write(newer, b"work")
    for when in ("before", "after"):
        where: Any = FakeHypervisor if at == "start" else FakeDisks
        real = getattr(where, at)

        def cut(*args: Any, real: Any = real, when: str = when, **more: Any) -> None:
            if when == "after":
                real(*args, **more)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, newer.site() as site, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, at, cut)
            farm.renew(site, ["prod"])
        with newer.site() as site:
            assert "was interrupted" in lines(farm.recover(site))[0]
            assert not site.journal.unfinished()
        assert newer.machine("prod").power == "running"
        state = (disk(newer).template, content(newer))
        assert state == (("base@2", b"") if at == "remove_checkpoint" else ("base@1", b"work"))
        if at == "remove_checkpoint":
            assert checkpoints(newer) == ["clean", "mine"]
            break


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("at", ["checkpoint", "move", "start", "remove_checkpoint"])
def test_an_error_that_nobody_foresaw_leaves_it_to_recovery(
    newer: Desk, monkeypatch: pytest.MonkeyPatch, at: str, was_on: bool
) -> None:
    write(newer, b"work")
    if not was_on:
        newer.run(farm.stop, ["prod"])

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, newer.site() as site, pytest.raises(OSError, match="Input"):
        patch.setattr(FakeHypervisor if at == "start" else FakeDisks, at, fails)
        farm.renew(site, ["prod"])
    newer.run(farm.start, ["dev2"])
    with newer.site() as site:
        assert not site.journal.unfinished()
    assert newer.machine("prod").power == ("running" if was_on else "stopped")
    new = at == "remove_checkpoint"
    assert (disk(newer).template, content(newer)) == (("base@2", b"") if new else ("base@1", b"work"))


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("killed", [False, True])
def test_what_can_not_be_removed_keeps_its_power_as_it_was_and_is_removed_later(
    newer: Desk, monkeypatch: pytest.MonkeyPatch, was_on: bool, killed: bool
) -> None:
    """What its user makes of its power meanwhile stays."""
    if not was_on:
        newer.run(farm.stop, ["prod"])

    def fails(*_: object) -> None:
        raise DriverFailed("the store is busy")

    def killed_there(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FakeDisks, "remove_checkpoint", killed_there if killed else fails)
        with newer.site() as site, pytest.raises(KeyboardInterrupt if killed else DriverFailed):
            farm.renew(site, ["prod"])
        patch.setattr(FakeDisks, "remove_checkpoint", fails)
        if killed:
            with newer.site() as site:
                farm.start(site, ["dev2"])  # its recovery fails, too
        assert newer.machine("prod").power == ("running" if was_on else "stopped")
        with newer.site() as site:
            (farm.stop if was_on else farm.start)(site, ["prod"])
    for _ in range(2):
        with newer.site() as site:
            told = lines(farm.recover(site))
            assert not site.journal.unfinished()
        assert newer.machine("prod").power == ("stopped" if was_on else "running")
        assert "again" not in told[0]
    assert (disk(newer).template, checkpoints(newer)) == ("base@2", ["clean", "mine"])


@pytest.mark.parametrize("was_on", [True, False])
@pytest.mark.parametrize("what", ["decided", "changed"])
def test_what_can_not_be_noted_is_not_done(
    newer: Desk, monkeypatch: pytest.MonkeyPatch, what: str, was_on: bool
) -> None:
    """The journal's file system is full."""
    write(newer, b"work")
    if not was_on:
        newer.run(farm.stop, ["prod"])
    note = Entry.note

    def full(self: Entry[Any], facts: Any) -> None:
        if getattr(facts, what, False):
            raise NoSpace("the journal is full")
        note(self, facts)

    with monkeypatch.context() as patch, newer.site() as site, pytest.raises(NoSpace, match="full"):
        patch.setattr(Entry, "note", full)
        farm.renew(site, ["prod"])
    with newer.site() as site:
        assert [one.verb for one in site.journal.unfinished()] == ["renew"] * (what == "changed")
        farm.recover(site)
    assert newer.machine("prod").power == ("running" if was_on else "stopped")
    assert (disk(newer).template, content(newer)) == ("base@1", b"work")


def test_one_that_went_back_and_can_not_be_started_may_be_used_and_is_started_later(
    newer: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise DriverFailed("no QEMU")

    with monkeypatch.context() as patch, newer.site() as site, pytest.raises(DriverFailed):
        patch.setattr(FakeHypervisor, "start", fails)
        farm.renew(site, ["prod"])
    with newer.site() as site:
        assert [half_done(one) for one in site.journal.unfinished()] == [False]
    newer.run(farm.stop, ["dev2"])
    assert newer.machine("prod").power == "running"
    assert disk(newer).template == "base@1"


def test_one_that_can_not_be_ballooned_down_has_answered(
    newer: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionLost("libvirtd has gone")

    monkeypatch.setattr(FakeHypervisor, "balloon", fails)
    with newer.site() as site:
        farm.renew(site, ["dev2"])
    assert "dev2: stays at 512M while idle: libvirtd has gone" in newer.heard.warnings
    assert disk(newer, "dev2").template == "base@2"


def test_half_renewed_on_another_host_it_is_not_forgotten(
    newer: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, newer.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeHypervisor, "start", _cut)
        farm.renew(site, ["prod"])
    vms = "  dev2: {memory: 512M, host: here}\n  prod: {memory: 512M, host: %s}\n"
    text = newer.file.read_text()
    before = text.partition("vms:")[0].replace("hosts: {", "hosts: {there: {driver: fake}, ")
    newer.file.write_text(before + "vms:\n" + vms % "there")
    for plan in (True, False):
        with (
            newer.site(plan=plan) as site,
            pytest.raises(WrongState, match="renew of prod is half"),
        ):
            farm.start(site, ["prod"])
    with newer.site() as site, pytest.raises(WrongState, match="is on host here, not on there") as why:
        farm.recover(site)
    assert spelled(why.value.remedy) == "give it 'host: here' again, then recover"
    newer.file.write_text(before + "vms:\n" + vms % "here")
    newer.run(farm.recover)
    assert newer.machine("prod").power == "running"
    assert disk(newer).template == "base@1"


def _cut(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_recovered_after_its_answer_a_stopped_one_is_shut_down_again(
    newer: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer.run(farm.stop, ["prod"])

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, newer.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeDisks, "remove_checkpoint", cut)
        farm.renew(site, ["prod"])
    with newer.site() as site:
        told = lines(farm.recover(site))[0]
    assert told.endswith("remove checkpoint before-base-2; shut it down again")
    assert newer.machine("prod").power == "stopped"
    assert (disk(newer).template, checkpoints(newer)) == ("base@2", ["clean", "mine"])


def test_a_generation_older_than_its_recipe_is_told(made: Desk) -> None:
    """By status, clone-farm and cycle, until a new one is built."""
    note = "base@1 is older than the file's recipe: template-build --name base"
    with made.site() as site:
        assert farm.status(site).warnings == ()
    text = made.file.read_text().replace("size: 64M", "size: 64M, packages: [jq]")
    made.file.write_text(f"{text}cycle:\n  steps:\n    - {{name: clean, reset: prod}}\n")
    with made.site() as site:
        assert [spelled(text) for text in farm.status(site).warnings] == [note]
    assert lines(made.run(farm.clone_farm))[0] == note
    with made.site(plan=True) as site:
        perform(site, RunCycle())
    assert made.heard.warnings == [f": {note}"]
    with made.site() as site:
        farm.template_build(site, "base")
        newer = [spelled(text) for text in farm.status(site).warnings]
    assert newer == ["base@2 is newer than what dev2, prod are on: renew --all"]


def test_a_template_that_is_larger_than_the_disk(newer: Desk) -> None:
    newer.file.write_text(newer.file.read_text().replace("size: 64M", "size: 128M"))
    with newer.site() as site:
        farm.template_build(site, "base")
    with newer.site() as site, pytest.raises(UsageError, match="smaller than template base@3"):
        farm.renew(site, ["prod"])
    assert disk(newer).template == "base@1"


def test_a_disk_grows_at_the_next_start(made: Desk) -> None:
    write(made, b"work")
    made.run(farm.checkpoint, ["prod"], "mine")
    made.write("  dev2: {memory: 512M, idle_memory: 256M}\n  prod: {memory: 512M, disk: 128M}\n")
    done = made.run(farm.clone_farm)
    assert "prod: its disk is 64M, declared 128M: it grows at its next start" in lines(done)
    made.run(farm.stop, ["prod"])
    made.run(farm.start, ["prod"])
    assert (disk(made).size, content(made)) == (128 * 2**20, b"work")
    made.run(farm.reset, ["prod"], to="mine")
    assert disk(made).size == 128 * 2**20
    made.write("  dev2: {memory: 512M, idle_memory: 256M}\n  prod: {memory: 512M, disk: 96M}\n")
    assert any("a disk never becomes smaller" in line for line in lines(made.run(farm.clone_farm)))
    made.run(farm.stop, ["prod"])
    made.run(farm.start, ["prod"])
    assert disk(made).size == 128 * 2**20


def test_a_store_that_can_t_enlarge_is_told_of_at_each_start(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a storage repository of a XenAPI server; the VM starts all the same."""
    made.run(farm.stop, ["prod"])
    made.write("  dev2: {memory: 512M, idle_memory: 256M}\n  prod: {memory: 512M, disk: 128M}\n")

    def enlarge(*_: object) -> None:
        raise Unsupported("its storage can't")

    monkeypatch.setattr(FakeDisks, "enlarge", enlarge)
    made.run(farm.start, ["prod"])
    assert made.machine("prod").power == "running"
    assert disk(made).size == 64 * 2**20
    assert "prod: its disk stays 64M: its storage can't" in made.heard.warnings


def test_a_store_that_fails_to_enlarge_leaves_the_disk(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.run(farm.stop, ["prod"])
    made.write("  dev2: {memory: 512M, idle_memory: 256M}\n  prod: {memory: 512M, disk: 128M}\n")

    def enlarge(*_: object) -> None:
        raise DriverFailed("no")

    monkeypatch.setattr(FakeDisks, "enlarge", enlarge)
    with made.site() as site, pytest.raises(FarmhandError, match="no"):
        farm.start(site, ["prod"])
    assert made.machine("prod").power == "stopped"
    assert disk(made).size == 64 * 2**20


@pytest.mark.parametrize("killed", [False, True])
def test_it_goes_back_where_its_old_generation_is_another_farms(
    newer: Desk, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """As after an adoption of the VM alone."""
    write(newer, b"work")
    with newer.site() as site:
        store: Any = Member(site, "prod").store
        with store.store.change() as world:
            theirs = replace(world.templates["base@1"], farm=identity("kata", "/root/farm.yaml"))
            world.templates["base@1"] = theirs
    real, failing = FakeHypervisor.start, [True]

    def start(self: FakeHypervisor, name: str, **more: bool) -> None:
        if failing:
            failing.clear()
            raise KeyboardInterrupt if killed else TimedOut("no answer")
        real(self, name, **more)

    monkeypatch.setattr(FakeHypervisor, "start", start)
    with newer.site() as site, pytest.raises((TimedOut, KeyboardInterrupt)):
        farm.renew(site, ["prod"])
    with newer.site() as site:
        farm.recover(site)
        assert not site.journal.unfinished()
    assert (content(newer), newer.machine("prod").power) == (b"work", "running")
    assert checkpoints(newer) == ["clean", "mine", "before-base-2"]
    text = "base@1 is not this farm's, or is gone: its clean stays base@2, which it gets with: reset"
    assert any(text in warned for warned in newer.heard.warnings)
    newer.run(farm.reset, ["prod"], to="clean")
    assert (disk(newer).template, content(newer)) == ("base@2", b"")


class _Renewed(Activity[NoFacts]):
    """As another farmhand wrote it."""

    name, facts = "renew", NoFacts

    def recover(self, site: Site, record: Record, facts: NoFacts) -> Recovery[NoFacts]:
        return Recovery("noted")


def test_what_another_farmhand_noted_of_earlier_ones_is_passed_over(newer: Desk) -> None:
    with newer.site() as site, site.journal.begin(_Renewed(), ["prod"], NoFacts()):
        pass
    newer.run(farm.renew, ["prod"])
    assert disk(newer).template == "base@2"


def test_its_key_is_what_it_was_where_its_disk_could_not_be_moved(
    newer: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise NoSpace("the store is full")

    monkeypatch.setattr(renew, "left_alone", lambda *_: True)  # the new generation has a key of its own
    monkeypatch.setattr(FakeDisks, "move", full)
    with newer.site() as site:
        before = keeps_own_key(site.paths, "prod")
        with pytest.raises(NoSpace):
            farm.renew(site, ["prod"])
        assert keeps_own_key(site.paths, "prod") == before
