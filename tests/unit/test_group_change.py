"""Several VMs' disks changed as one, over the fake driver."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_farm import Desk

from cli.views import farm_status
from hypervisors.api import FarmDisks, MergingDisks, Owner
from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from inventory.errors import (
    Conflict,
    ConnectionLost,
    DriverFailed,
    FarmhandError,
    Interrupted,
    NoSpace,
    NotFound,
    Unsupported,
    WrongState,
    spelled,
)
from provision.doctor import examine
from provision.engine.facts import Facts
from provision.engine.journal import Entry
from provision.engine.operation import Activity
from provision.member import Member
from provision.memory_budget import BALLOON, BalloonFacts
from provision.operations.reset import RESET, ResetFacts
from tests import farm

TWO_HOSTS = """\
farm: kata
hosts: {here: {driver: fake}, there: {driver: fake}}
templates: {base: {build: debian-12, size: 64M}}
vms:
  dev2: {host: here}
  prod: {host: there}
  repo: {host: there}
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    desk = Desk(tmp_path)
    desk.run(farm.clone_farm)
    write(desk, b"old")
    return desk


@pytest.fixture
def apart(made: Desk) -> Desk:
    """Three VMs on two hosts."""
    made.run(farm.destroy)
    made.file.write_text(TWO_HOSTS)
    made.run(farm.clone_farm)
    write(made, b"old")
    return made


def write(desk: Desk, content: bytes) -> None:
    with desk.site() as site:
        for vm in site.farm.vms:
            store = site.disks(site.farm.host_of(vm))
            assert isinstance(store, FakeDisks)
            store.write(Member(site, vm).machine, content)


def contents(desk: Desk) -> list[bytes]:
    with desk.site() as site:
        stores: list[Any] = [site.disks(site.farm.host_of(vm)) for vm in site.farm.vms]
        return [s.content(Member(site, vm).machine) for s, vm in zip(stores, site.farm.vms, strict=True)]


def powers(desk: Desk) -> list[str]:
    with desk.site() as site:
        return [str(row.state) for row in farm.status(site).vms]


def test_what_one_vm_lacks_is_found_before_anything_changes(made: Desk) -> None:
    made.run(farm.checkpoint, ["dev2"], "hers")
    for use_case, arguments, kind in (
        (farm.reset, {"to": "hers"}, NotFound),
        (farm.checkpoint, {"vms": [], "name": "hers"}, Conflict),
    ):
        with made.site() as site, pytest.raises(kind):
            before = site.journal.history(1)[0].id
            use_case(site, **arguments)  # type: ignore[operator]
        with made.site() as site:
            assert site.journal.history(1)[0].id == before, "not even begun"
    assert powers(made) == ["running", "running"]
    assert contents(made) == [b"old", b"old"]


@pytest.mark.parametrize("what", ["restore_all", "checkpoint_all"])
def test_a_store_that_refuses_leaves_all_as_it_was(
    made: Desk, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    made.run(farm.stop, ["prod"])

    def full(self: FakeDisks, machines: Sequence[str], name: str) -> None:
        raise NoSpace("the pool is full")

    monkeypatch.setattr(FakeDisks, what, full)
    with made.site() as site, pytest.raises(NoSpace, match="the pool is full"):
        farm.reset(site) if what == "restore_all" else farm.checkpoint(site, [], "kept")
    assert powers(made) == ["running", "stopped"], "the one that ran runs again"
    assert contents(made) == [b"old", b"old"]
    with made.site() as site:
        assert site.journal.unfinished() == ()


def test_a_vm_that_cannot_be_stopped_leaves_all_as_it_was(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = FakeHypervisor.stop

    def stuck(self: FakeHypervisor, name: str, *, grace: float) -> None:
        if name == "kata-prod":
            raise DriverFailed("its QEMU is stuck")
        stop(self, name, grace=grace)

    monkeypatch.setattr(FakeHypervisor, "stop", stuck)
    with made.site() as site, pytest.raises(DriverFailed, match="stuck"):
        farm.reset(site)
    assert powers(made) == ["running", "running"]
    assert contents(made) == [b"old", b"old"]


def test_one_disk_that_cannot_be_proven_lets_none_start(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored = FakeDisks.restore_all

    def written_to(self: FakeDisks, machines: Sequence[str], name: str) -> Any:
        disks = restored(self, machines, name)
        self.write("kata-dev2", b"by somebody")
        return disks

    monkeypatch.setattr(FakeDisks, "restore_all", written_to)
    with made.site() as site, pytest.raises(DriverFailed, match="dev2's disk was reset, but isn't"):
        farm.reset(site)
    assert powers(made) == ["stopped", "stopped"]


def test_a_second_store_that_fails_holds_all_until_it_is_mended(
    apart: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored, broken = FakeDisks.restore_all, True

    def full(self: FakeDisks, machines: Sequence[str], name: str) -> Any:
        if broken and "kata-prod" in machines:
            raise NoSpace("the pool is full", remedy="make room")
        return restored(self, machines, name)

    monkeypatch.setattr(FakeDisks, "restore_all", full)
    with apart.site() as site, pytest.raises(WrongState) as halted:
        farm.reset(site)
    assert "the pool is full; dev2 is done, prod, repo not yet" in halted.value.message
    assert spelled(halted.value.remedy) == "make room; then recover takes the rest there"
    assert contents(apart) == [b"", b"old", b"old"]
    assert powers(apart) == ["stopped"] * 3
    for use_case, arguments in (
        (farm.start, [["dev2"]]),
        (farm.clone_farm, []),
        (farm.reset, [["repo"]]),
        (farm.checkpoint, [["prod"], "kept"]),
    ):
        with (
            apart.site() as site,
            pytest.raises(WrongState, match="a reset of dev2, prod, repo is half"),
        ):
            use_case(site, *arguments)  # type: ignore[operator]
    assert powers(apart) == ["stopped"] * 3
    broken = False
    with apart.site() as site:
        (done,) = farm.recover(site).actions
        assert "a reset of dev2, prod, repo of" in done.text
    assert contents(apart) == [b""] * 3
    assert powers(apart) == ["running"] * 3
    apart.run(farm.checkpoint, [], "kept")


def test_what_can_never_get_there_can_be_destroyed(apart: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    restored = FakeDisks.restore_all

    def lost(self: FakeDisks, machines: Sequence[str], name: str) -> Any:
        if "kata-prod" in machines:
            raise DriverFailed("its disk is lost")
        return restored(self, machines, name)

    monkeypatch.setattr(FakeDisks, "restore_all", lost)
    with apart.site() as site, pytest.raises(WrongState):
        farm.reset(site)
    with apart.site() as site:
        farm.destroy(site, ["prod"])
        farm.start(site, ["dev2", "repo"])
    assert contents_of(apart, "dev2", "repo") == [b"", b""]


def contents_of(desk: Desk, *vms: str) -> list[bytes]:
    with desk.site() as site:
        stores: list[Any] = [site.disks(site.farm.host_of(vm)) for vm in vms]
        return [store.content(Member(site, vm).machine) for store, vm in zip(stores, vms, strict=True)]


class OneByOne:
    """A store that knows nothing of several."""

    def __init__(self, store: FakeDisks) -> None:
        self._store = store
        self.restored: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_all"):
            raise AttributeError(name)
        return getattr(self._store, name)

    def restore(self, machine: str, name: str) -> Any:
        if machine == "kata-prod" and not self.restored.count("kata-prod"):
            self.restored.append(machine)
            raise DriverFailed("not today")
        self.restored.append(machine)
        return self._store.restore(machine, name)


def test_a_store_without_transactions_goes_forward(made: Desk) -> None:
    with made.site() as site:
        store = site.disks("here")
        assert isinstance(store, FakeDisks)
        site.hypervisor("here")
        plain: Any = OneByOne(store)
        assert not isinstance(plain, FarmDisks)
        site.opened("here")._disks = plain
        with pytest.raises(WrongState, match="dev2 is done, prod not yet"):
            farm.reset(site)
        farm.start(site)
        assert plain.restored == ["kata-dev2", "kata-prod", "kata-dev2", "kata-prod"]
        assert [action.verb for action in farm.start(site).actions] == ["keep", "keep"]
    assert contents(made) == [b"", b""]


def test_a_merge_goes_into_the_checkpoint_and_the_vm_runs_again(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    MergingDisks._abc_caches_clear()  # type: ignore[attr-defined]  # of fakes that could, in other tests
    with made.site() as site, pytest.raises(Unsupported, match="can't merge"):
        farm.merge(site, ["prod"])

    def into(self: FakeDisks, machine: str) -> None:
        with self.store.change() as world:
            assert world.machines[machine].machine.power == "stopped"
            disk = world.disks[machine]
            disk.checkpoints[disk.base] = replace(disk.checkpoints[disk.base], content=disk.content)

    monkeypatch.setattr(FakeDisks, "merge", into, raising=False)
    with made.site() as site, pytest.raises(Unsupported, match="grew from clean, its template"):
        farm.merge(site, ["prod"])
    made.run(farm.checkpoint, ["prod"], "kept")
    write(made, b"newer")
    done = made.run(farm.merge, ["prod"])
    assert [str(a) for a in done.actions] == [
        "prod: shut down, merge what changed since kept into it, start again"
    ]
    assert powers(made) == ["running", "running"]
    made.run(farm.reset, ["prod"], to="kept")
    assert contents(made) == [b"newer", b"newer"]


def test_a_merge_that_was_killed_is_gone_on_with(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def merge(self: FakeDisks, machine: str) -> None:
        calls.append(machine)
        if len(calls) == 1:
            raise KeyboardInterrupt  # unwinds, and leaves the journal as a kill does

    monkeypatch.setattr(FakeDisks, "merge", merge, raising=False)
    made.run(farm.checkpoint, ["prod"], "kept")
    with made.site() as site, pytest.raises(KeyboardInterrupt):
        farm.merge(site, ["prod"])
    assert powers(made) == ["running", "stopped"]
    made.run(farm.start, ["dev2"])
    assert calls == ["kata-prod", "kata-prod"]
    assert powers(made) == ["running", "running"]


@pytest.mark.parametrize("listens", [True, False], ids=["goes down later", "does not listen"])
def test_guests_that_were_asked_to_shut_down_when_we_were_killed(
    made: Desk, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    """What was asked of them can't be taken back."""
    stop = FakeHypervisor.stop
    with monkeypatch.context() as patch, made.site() as site:
        patch.setattr("provision.operations.checkpoint.GRACE", 60.0 if listens else 0.4)
        patch.setattr(FakeHypervisor, "stop", killed)
        with pytest.raises(KeyboardInterrupt):
            farm.checkpoint(site, [], "kept")
    assert powers(made) == ["running", "running"]
    started = made.machine("prod").started

    def go_down() -> None:
        with made.site() as site:
            for vm in site.farm.vms:
                stop(Member(site, vm).driver, Member(site, vm).machine, grace=0)  # type: ignore[arg-type]

    late = threading.Timer(0.7, go_down)
    if listens:
        late.start()
    done = made.run(farm.recover)
    [line] = [str(action) for action in done.actions]
    assert "it had not begun, all disks are as they were; see that dev2, prod run as before" in line
    assert powers(made) == ["running", "running"]
    assert (made.machine("prod").started == started) is not listens
    assert contents(made) == [b"old", b"old"]


def test_guests_that_were_asked_to_shut_down_when_the_daemon_went_away_run_again(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is still on goes down a moment later."""
    stop = FakeHypervisor.stop
    monkeypatch.setattr("provision.operations.checkpoint.GRACE", 60.0)
    late: list[threading.Timer] = []

    def lost(self: FakeHypervisor, name: str, *, grace: float) -> None:
        late.append(threading.Timer(0.7, lambda: stop(self, name, grace=0)))
        late[-1].start()
        raise ConnectionLost("libvirtd has gone")

    monkeypatch.setattr(FakeHypervisor, "stop", lost)
    with made.site() as site, pytest.raises(ConnectionLost, match="has gone"):
        farm.checkpoint(site, ["prod"], "kept")
    assert late
    for timer in late:
        timer.join()
    assert powers(made) == ["running", "running"]
    with made.site() as site:
        assert site.journal.unfinished() == ()


@pytest.mark.parametrize(
    ("where", "error"),
    [("stop", OSError("torn")), ("restore_all", OSError("torn")), ("note", NoSpace("full"))],
)
def test_an_error_midway_is_not_the_end(
    made: Desk, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    """What nobody foresaw is left to recovery; what can't be noted is not begun."""
    real: Any = FakeHypervisor.stop if where == "stop" else Entry.note

    def fails(self: Any, *arguments: Any, **more: Any) -> None:
        if where == "stop":
            real(self, *arguments, **more)
        elif where == "note" and not arguments[0].decided:
            return
        raise error

    owner: Any = {"stop": FakeHypervisor, "restore_all": FakeDisks, "note": Entry}[where]
    with monkeypatch.context() as patch, made.site() as site, pytest.raises(type(error)):
        patch.setattr(owner, where, fails)
        farm.reset(site)
    with made.site() as site:
        assert bool(site.journal.unfinished()) is (where != "note")
        farm.recover(site)
    assert powers(made) == ["running", "running"]
    assert contents(made) == ([b"", b""] if where == "restore_all" else [b"old", b"old"])


def test_one_that_can_not_be_started_again_is_started_by_the_next_command(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: FakeDisks, machines: Sequence[str], name: str) -> None:
        raise NoSpace("the pool is full")

    def fails(self: FakeHypervisor, name: str, *, cold: bool = False) -> None:
        raise DriverFailed("no QEMU")

    with monkeypatch.context() as patch, made.site() as site, pytest.raises(NoSpace):
        patch.setattr(FakeDisks, "checkpoint_all", full)
        patch.setattr(FakeHypervisor, "start", fails)
        farm.checkpoint(site, [], "kept")
    assert powers(made) == ["stopped", "stopped"]
    with made.site() as site:
        farm.stop(site, ["dev2"])
    assert powers(made) == ["stopped", "running"]


def test_interrupted_while_they_are_started_again(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: FakeDisks, machines: Sequence[str], name: str) -> None:
        raise NoSpace("the pool is full")

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted("interrupted")

    with monkeypatch.context() as patch, made.site() as site, pytest.raises(Interrupted):
        patch.setattr(FakeDisks, "checkpoint_all", full)
        patch.setattr(FakeHypervisor, "start", interrupted)
        farm.checkpoint(site, [], "kept")
    made.run(farm.recover)
    assert powers(made) == ["running", "running"]


def killed(self: FakeHypervisor, name: str, *, grace: float) -> None:
    raise KeyboardInterrupt


def test_status_and_doctor_show_what_a_store_says(made: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDisks, "notes", lambda self: ("vg/pool: data 93 % full",), raising=False)
    with made.site() as site:
        shown = farm_status(farm.status(site))
    assert "host here: vg/pool: data 93 % full" in shown.text
    assert shown.data["hosts"][0]["disk_notes"] == ["vg/pool: data 93 % full"]  # type: ignore[index]
    room, check = [c for c in examine(made.file).checks if c.name == "disks of here"]
    assert room.ok and room.text.endswith("free")
    assert (check.level, check.text) == ("note", "vg/pool: data 93 % full")


def test_status_tells_clean_from_dirty_and_asks_for_no_more_than_a_look(
    made: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.run(farm.reset, ["prod"], start=False)
    made.run(farm.stop, ["dev2"])

    def conditions() -> list[str]:
        with made.site() as site:
            return [row.condition for row in farm.status(site).vms]

    assert conditions() == ["dirty", "clean"]
    asked: list[bool] = []

    def dear(self: FakeDisks, machine: str, name: str, *, quick: bool = False) -> None:
        asked.append(quick)

    monkeypatch.setattr(FakeDisks, "pristine", dear)
    assert conditions() == ["", ""]
    assert asked == [True, True]


def test_a_recovery_that_can_not_succeed_is_in_no_others_way(apart: Desk) -> None:
    """It is told, with what to do; the others are recovered; tried again, there are no more of it."""
    for vm, to in (("dev2", "gone"), ("prod", "clean")):
        with (
            apart.site() as site,
            pytest.raises(Interrupted),
            site.journal.begin(RESET, [vm], ResetFacts(was_on=(), to={vm: to}, decided=True)),
        ):
            raise Interrupted("as if it was killed")
    for _ in range(2):
        with apart.site() as site, pytest.raises(WrongState, match="dev2") as caught:
            farm.recover(site)
        assert caught.value.remedy
        assert contents(apart) == [b"old", b"", b"old"]
        with apart.site() as site:
            assert [record.vm for record in site.journal.unfinished()] == ["dev2"]
    with apart.site() as site:
        farm.start(site, ["repo"])
    with apart.site() as site, pytest.raises(WrongState, match="half done") as half:
        farm.start(site, ["dev2"])
    assert "; in its way: " in half.value.message
    assert "gone" in half.value.message


def left_by(desk: Desk, activity: Activity[Any], facts: Facts) -> None:
    with (
        desk.site() as site,
        pytest.raises(Interrupted),
        site.journal.begin(activity, ["dev2"], facts),
    ):
        raise Interrupted("as if it was killed")


def told(desk: Desk, use_case: Callable[..., object], *arguments: object) -> list[str]:
    """Of recoveries that failed."""
    desk.heard.warnings.clear()
    with desk.site() as site, suppress(FarmhandError):
        use_case(site, *arguments)
    return [text for text in desk.heard.warnings if "could not recover" in text]


def test_a_recovery_that_can_not_succeed_is_told_once(
    apart: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its remedy, by the command that met it first; then by those that want to know, and where
    it is another error."""
    left_by(apart, RESET, ResetFacts(was_on=(), to={"dev2": "gone"}, decided=True))
    [first] = told(apart, farm.start, ["repo"])
    assert "could not recover its reset" in first
    assert "gone" in first
    assert first.endswith(")"), "what to do"
    for use_case, vms in ((farm.stop, ["repo"]), (farm.start, ["repo"]), (farm.start, ["dev2"])):
        assert told(apart, use_case, vms) == []
    with apart.site() as site:
        shown = spelled(farm_status(farm.status(site)).text)
    assert "reset dev2 (interrupted); it could not so far: " in shown
    assert first.partition(": could not recover its reset: ")[2] in shown
    with monkeypatch.context() as otherwise:

        def fails(self: FakeDisks, machine: str, name: str) -> None:
            raise DriverFailed("the store is away", remedy="bring it back")

        otherwise.setattr(FakeDisks, "restore", fails)
        otherwise.setattr(FakeDisks, "restore_all", fails)
        [other] = told(apart, farm.start, ["repo"])
        assert "the store is away" in other
        assert "bring it back" in other
        assert told(apart, farm.start, ["repo"]) == []
    assert told(apart, farm.start, ["repo"]) == [first]


def test_what_is_in_nobodys_way_is_told_by_each_command_for_its_vm(
    apart: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A balloon that can't be finished: its VM may be used, and its memory isn't what was asked for."""
    left_by(apart, BALLOON, BalloonFacts(300 * 2**20))

    def fails(self: FakeHypervisor, name: str, target: int, *, timeout: float) -> int:
        raise DriverFailed("no balloon driver", remedy="load it")

    monkeypatch.setattr(FakeHypervisor, "balloon", fails)
    for vms, times in ((["repo"], 1), (["repo"], 0), (["dev2"], 1), (["dev2"], 1), (["repo"], 0)):
        assert len(told(apart, farm.start, vms)) == times


def test_what_gc_can_not_remove_makes_it_fail(apart: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    with apart.site() as site:
        store = site.disks("here")
        for vm in ("old1", "old2"):
            store.clone(store.templates()[0], f"kata-{vm}", Owner(site.identity, vm), 64 * 2**20)
    destroy = FakeHypervisor.destroy

    def refuse(self: FakeHypervisor, name: str) -> None:
        if name == "kata-old1":
            raise DriverFailed(f"{name} is busy", remedy="end what uses it")
        destroy(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(FakeHypervisor, "destroy", refuse)
        with (
            apart.site() as site,
            pytest.raises(DriverFailed, match=r"1 of 2 .*kata-old1 is busy") as caught,
        ):
            farm.gc(site)
        assert caught.value.remedy == "end what uses it"
    with apart.site() as site:
        assert [action.vm for action in farm.gc(site).actions if action.verb == "discard"] == ["old1"]


def test_what_nobody_foresaw_in_a_recovery_holds_up_no_other(
    apart: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(apart, RESET, ResetFacts(was_on=(), to={"dev2": "clean"}, decided=True))
    with monkeypatch.context() as patch:

        def fails(self: FakeDisks, machine: str, name: str) -> None:
            raise OSError(30, "Read-only file system")

        patch.setattr(FakeDisks, "restore", fails)
        [text] = told(apart, farm.stop, ["repo"])
        assert apart.machine("repo").power == "stopped"
        assert "met OSError: [Errno 30] Read-only file system (if that is its host's trouble" in text
        with apart.site() as site, pytest.raises(WrongState, match="Read-only file system"):
            farm.recover(site)
    apart.run(farm.recover)
    assert contents(apart)[0] == b""


def test_a_reset_that_recovery_can_not_prove_may_be_done_again(
    apart: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_by(apart, RESET, ResetFacts(was_on=(), to={"dev2": "clean"}, decided=True))
    with monkeypatch.context() as patch:
        restored = FakeDisks.restore

        def written_to(self: FakeDisks, machine: str, name: str) -> Any:
            disk = restored(self, machine, name)
            self.write(machine, b"by somebody")
            return disk

        patch.setattr(FakeDisks, "restore", written_to)
        with apart.site() as site, pytest.raises(DriverFailed, match="was reset, but isn't"):
            farm.recover(site)
    apart.run(farm.reset, ["dev2"])
    with apart.site() as site:
        assert not site.journal.unfinished()
    assert (contents(apart)[0], powers(apart)[0]) == (b"", "running")
