"""A host's memory, shared: what is planned, as a pure function; and what the commands then do with it on
the fake driver, whose own count says what its machines had."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.processes import Process
from hypervisors.fake.driver import FakeHypervisor
from inventory.errors import NoSpace, TimedOut, UsageError
from provision.engine.facts import to_json
from provision.engine.locks import Locks
from provision.member import Member
from provision.memory import SLACK, Guest, HostMemory, at_once, plan, squeeze
from provision.memory_budget import BalloonFacts, host_memory, room_for
from tests import farm
from tests.unit.test_farm import MIB, Desk, lines

GIB = 2**30


def guest(vm: str, now: int, maximum: int, idle: int | None = None, **more: Any) -> Guest:
    """Sizes in MiB; needs 64M, unless told otherwise."""
    least = more.pop("least", 64)
    return Guest(
        vm=vm, on=more.pop("on", now > 0), now=now * MIB, maximum=maximum * MIB,
        idle=None if idle is None else idle * MIB, least=None if least is None else least * MIB, **more,
    )  # fmt: skip


def host(limit: int | None, *guests: Guest, free: int | None = None) -> HostMemory:
    return HostMemory(
        host="here", limit=None if limit is None else limit * MIB,
        free=None if free is None else free * MIB, guests=guests,
    )  # fmt: skip


# ---- The plan.


def test_what_is_left_is_the_lesser_of_what_is_declared_and_what_is_there() -> None:
    one = guest("a", 512, 1024)
    assert host(2048, one).left == 1536 * MIB
    assert host(2048, one, free=100).left == 100 * MIB
    assert host(None, one, free=100).left == 100 * MIB
    assert host(None, one).left is None
    assert host(256, one).left == -256 * MIB
    assert host(None, one).short_of(10**15) == 0


def test_the_one_that_has_most_to_give_gives_and_no_more_than_needed() -> None:
    seen = host(4096, guest("a", 1024, 1024, 256), guest("b", 2048, 2048, 512), guest("c", 1024, 1024))
    assert squeeze(seen, 300 * MIB) == {"b": (2048 - 301) * MIB}
    assert squeeze(seen, 1700 * MIB) == {"b": 512 * MIB, "a": (1024 - 166) * MIB}
    assert squeeze(seen, 3000 * MIB) is None
    assert squeeze(seen, 300 * MIB, but={"b"}) == {"a": (1024 - 301) * MIB}


@pytest.mark.parametrize(
    "one",
    [
        guest("a", 1024, 1024),
        guest("a", 1024, 1024, 256, user="building"),
        guest("a", 1024, 1024, 256, least=None),
        guest("a", 1024, 1024, 256, least=1024),
        guest("a", 1024, 1024, 256, fixed="paused"),
        guest("a", 1024, 1024, 256, on=False),
        guest("a", 256, 1024, 256),
    ],
)
def test_who_gives_nothing(one: Guest) -> None:
    assert one.gives == 0
    assert squeeze(host(1024, one), MIB) is None


def test_a_guest_that_needs_more_than_its_idle_memory_gives_less() -> None:
    assert guest("a", 1024, 1024, 256, least=600).gives == 424 * MIB


def test_prospects() -> None:
    seen = host(
        4096,
        guest("idle", 1024, 1024, 256),
        guest("busy", 1024, 2048, 512, user="building"),
        guest("small", 512, 2048),
        guest("off", 0, 1024),
        guest("huge", 0, 8192),
    )
    found = {one.guest.vm: one for one in plan(seen)}
    assert {vm: one.grow_to // MIB for vm, one in found.items()} == {
        "idle": 1024, "busy": 2048, "small": 2048, "off": 1024, "huge": 0,
    }  # fmt: skip
    assert {vm: one.target // MIB for vm, one in found.items()} == {
        "idle": 256, "busy": 1024, "small": 2048, "off": 0, "huge": 0,
    }  # fmt: skip
    assert found["busy"].why == "building"
    assert found["huge"].why == "stopped; 5.8G are missing to start it"


def test_what_is_started_at_once_waits_for_what_falls() -> None:
    assert at_once([]) == 0
    assert at_once([(4, 1)] * 10) == 13
    assert at_once([(4, 4), (4, 1)]) == 8


sizes = st.integers(0, 4096).map(lambda n: n * MIB // 3)


@st.composite
def guests(draw: st.DrawFn) -> list[Guest]:
    found = []
    for number in range(draw(st.integers(0, 8))):
        maximum = draw(sizes)
        on = draw(st.booleans())
        found.append(
            Guest(
                vm=f"vm{number}",
                on=on,
                now=draw(st.integers(0, maximum)) if on else draw(st.sampled_from([0, maximum])),
                maximum=maximum,
                idle=draw(st.none() | st.integers(0, maximum)),
                least=draw(st.none() | sizes),
                user=draw(st.sampled_from(["", "", "building"])),
                fixed=draw(st.sampled_from(["", "", "paused"])),
            )
        )
    return found


hosts = st.builds(
    HostMemory,
    host=st.just("here"),
    limit=st.none() | st.integers(0, 2**35),
    free=st.none() | st.integers(0, 2**35),
    guests=guests().map(tuple),
)


def fair(before: Guest, after: int) -> None:
    if after < before.now:
        assert before.on and before.idle is not None and before.least is not None
        assert after >= before.idle and after >= before.least
    if after != before.now:
        assert not before.user and not before.fixed
        assert after <= before.maximum


@given(hosts, st.integers(1, 2**34))
def test_a_squeeze_is_enough_and_takes_nothing_that_is_needed(seen: HostMemory, short: int) -> None:
    targets = squeeze(seen, short)
    assert targets == squeeze(seen, short)
    could = sum(g.gives - SLACK for g in seen.guests if g.gives > SLACK)
    assert (targets is None) == (could < short)
    if targets is None:
        return
    by_name = {g.vm: g for g in seen.guests}
    for vm, target in targets.items():
        fair(by_name[vm], target)
    # also where each stops a balloon's inaccuracy short of it
    assert sum(by_name[vm].now - target - SLACK for vm, target in targets.items()) >= short


@given(hosts)
def test_what_all_are_brought_to_never_exceeds_the_host(seen: HostMemory) -> None:
    prospects = plan(seen)
    assert prospects == plan(seen)
    running = [one for one in prospects if one.guest.on]
    for one in running:
        fair(one.guest, one.target)
    grown = sum(max(0, one.target - one.guest.now) for one in running)
    freed = sum(max(0, one.guest.now - one.target - SLACK) for one in running)
    if seen.left is not None:
        assert grown <= max(0, seen.left + freed)
    if seen.limit is not None and seen.in_use <= seen.limit:
        after = sum(one.target if one.guest.on else one.guest.now for one in prospects)
        assert after <= seen.limit


@given(hosts)
def test_whoever_may_grow_alone_finds_the_room(seen: HostMemory) -> None:
    for one in plan(seen):
        more = one.grow_to - one.guest.now
        if more > 0:
            others = replace(seen, guests=tuple(g for g in seen.guests if g is not one.guest))
            short = seen.short_of(more)
            assert short == 0 or squeeze(others, short) is not None
        if not one.guest.on and one.grow_to == 0 and one.guest.maximum > one.guest.now:
            others = replace(seen, guests=tuple(g for g in seen.guests if g is not one.guest))
            assert squeeze(others, seen.short_of(one.guest.maximum - one.guest.now)) is None


# ---- What the commands do.

FOUR = "".join(f"  vm{n}: {{memory: 512M, idle_memory: 128M}}\n" for n in range(4))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    return Desk(tmp_path)


def limit(desk: Desk, vms: str, memory: str) -> None:
    desk.write(vms, host=f"driver: fake, memory: {memory}")


def peak(desk: Desk) -> int:
    """MiB, by the host's own count."""
    with desk.site() as site:
        driver = site.hypervisor("here")
        assert isinstance(driver, FakeHypervisor)
        return driver.peak() // MIB


def has(desk: Desk, vm: str) -> int:
    return int(desk.machine(vm).current) // MIB


def test_vms_are_started_one_after_the_other_where_they_do_not_fit_at_once(desk: Desk) -> None:
    limit(desk, FOUR, "900M")  # 4 * 128M idle and one that starts: 896M
    desk.run(farm.clone_farm)
    assert [has(desk, f"vm{n}") for n in range(4)] == [128] * 4
    assert peak(desk) <= 900
    desk.run(farm.reset)
    assert peak(desk) <= 900
    desk.run(farm.checkpoint, ["vm0", "vm1", "vm2", "vm3"], "kept")
    assert peak(desk) <= 900
    limit(desk, FOUR, "895M")
    with desk.site() as site, pytest.raises(NoSpace, match=r"takes 896M.* which may use 895M"):
        farm.reset(site)
    assert desk.machine("vm0").power == "running", "refused before anything was begun"


def test_those_that_idle_give_for_one_that_starts(desk: Desk) -> None:
    limit(desk, "  a: {memory: 512M, idle_memory: 128M}\n  b: {memory: 512M, start: no}\n", "800M")
    desk.run(farm.clone_farm)
    desk.run(farm.balloon, "a", 512 * MIB)
    done = desk.run(farm.start, ["b"])
    assert lines(done) == [
        "a: memory 512M -> 287M, to make room", "b: start, wait until its ssh answers",
    ]  # fmt: skip
    assert (has(desk, "a"), has(desk, "b")) == (287, 512)
    assert peak(desk) <= 800
    with desk.site() as site, pytest.raises(NoSpace, match=r"800M: b has 512M$") as no:
        farm.balloon(site, "a", 512 * MIB)
    assert "\n" not in no.value.message
    assert (has(desk, "a"), has(desk, "b")) == (287, 512)


def test_one_that_grows_is_given_by_those_that_idle(desk: Desk) -> None:
    both = "{memory: 512M, idle_memory: 128M}"
    limit(desk, f"  a: {both}\n  b: {both}\n", "700M")
    desk.run(farm.clone_farm)
    desk.run(farm.balloon, "a", 512 * MIB)
    done = desk.run(farm.balloon, "b", 512 * MIB)
    assert lines(done) == ["a: memory 512M -> 187M, to make room", "b: memory 128M -> 512M"]
    assert (has(desk, "a"), has(desk, "b")) == (187, 512)
    assert peak(desk) <= 700


@pytest.mark.parametrize("is_build", [True, False])
def test_one_that_is_in_use_gives_nothing(desk: Desk, is_build: bool) -> None:
    limit(desk, "  a: {memory: 512M, idle_memory: 128M}\n  b: {memory: 512M, start: no}\n", "800M")
    desk.run(farm.clone_farm)
    desk.run(farm.balloon, "a", 512 * MIB)
    doing = "reset a to clean"
    who = "building" if is_build else f"in use: {doing}"
    with desk.site() as site, Locks(site.paths.locks).hold("vm-a", doing=doing, is_build=is_build):
        with pytest.raises(NoSpace, match=rf"a has 512M \({who}\)"):
            farm.start(site, ["b"])
        assert farm.memory_plan(site).prospects("here")[0].why.startswith(who)
    assert has(desk, "a") == 512


def test_what_builds_takes_nothing_from_the_vms_it_builds_on(desk: Desk) -> None:
    """Its locks are this very process's, and re-entrant."""
    limit(desk, "  a: {memory: 512M, idle_memory: 128M}\n  b: {memory: 512M, start: no}\n", "800M")
    desk.run(farm.clone_farm)
    desk.run(farm.balloon, "a", 512 * MIB)
    with desk.site() as site:
        with (
            site.locks.hold("vm-a", "vm-b", doing="build 1 of 2", is_build=True),
            pytest.raises(NoSpace, match="building"),
        ):
            farm.reset(site, ["b"], wait=False)
        assert has(desk, "a") == 512


def test_one_that_does_not_give_is_passed_over(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    vms = FOUR + "  last: {memory: 512M, start: no}\n"
    limit(desk, vms, "1030M")
    desk.run(farm.clone_farm)
    desk.run(farm.balloon, "vm2", 512 * MIB)  # 896M in use, vm2 could give 384M: just enough
    real = FakeHypervisor.balloon

    def stubborn(self: FakeHypervisor, name: str, target: int, *, timeout: float) -> int:
        if name == "kata-vm2":
            raise TimedOut("vm2 gives no more now")
        return real(self, name, target, timeout=timeout)

    monkeypatch.setattr(FakeHypervisor, "balloon", stubborn)
    with desk.site() as site, pytest.raises(NoSpace, match="vm2 has 512M"):
        farm.start(site, ["last"])
    assert any("vm2: gave nothing to make room for last" in line for line in desk.heard.warnings)
    assert desk.machine("last").power == "stopped"
    monkeypatch.undo()


def test_all_at_once(desk: Desk) -> None:
    vms = "  a: {memory: 512M, idle_memory: 128M}\n  b: {memory: 512M}\n  c: {memory: 1G}\n"
    limit(desk, vms, "2G")
    desk.run(farm.clone_farm)
    desk.run(farm.balloon, "a", 512 * MIB)
    desk.run(farm.balloon, "b", 256 * MIB)
    desk.run(farm.balloon, "c", 256 * MIB)
    limit(desk, vms, "1100M")
    done = desk.run(farm.balloon_all)
    assert lines(done) == [
        "a: memory 512M -> 128M", "b: memory 256M -> 512M", "c: memory 256M -> 459M",
    ]  # fmt: skip
    assert [has(desk, vm) for vm in "abc"] == [128, 512, 459]
    again = desk.run(farm.balloon_all)
    assert not again.changed
    assert lines(again)[0] == "a: has 128M, 383M are missing"


def test_what_a_killed_command_may_be_giving_is_counted_until_it_is_recovered(desk: Desk) -> None:
    limit(desk, "  a: {memory: 512M}\n  b: {memory: 512M}\n", "800M")
    desk.run(farm.clone_farm, start=False)
    desk.run(farm.start, ["a"])
    desk.run(farm.balloon, "a", 256 * MIB)
    with desk.site() as site:  # as a process leaves it that dies right after it asked for more
        dead = Process(2**22 + 1, "0", "gone")
        site.journal._process = dead
        facts = to_json(BalloonFacts(512 * MIB))
        site.journal.write(
            "INSERT INTO operations (verb, vms, facts, pid, pid_start, boot, started)"
            " VALUES ('balloon', '[\"a\"]', ?, ?, ?, ?, '2026-01-01T00:00:00+00:00')",
            (facts, dead.pid, dead.start, dead.boot),
        )
    with desk.site() as site:
        (seen,) = farm.memory_plan(site).hosts.values()
        assert (seen.in_use, seen.left) == (512 * MIB, 288 * MIB)
        held = Locks(site.paths.locks).hold("vm-a", doing="something")  # nobody can recover it now
        with held, pytest.raises(NoSpace, match="800M"):
            farm.start(site, ["b"])
        recovered = farm.recover(site)
        assert "set its memory to 512M" in str(recovered.actions[0])
    assert has(desk, "a") == 512
    with desk.site() as site:
        assert site.journal.unfinished() == ()


def test_one_look_does_for_vms_that_are_started_one_after_the_other(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as nobody else had the turn between; what is left is counted down."""
    vms = "".join(f"  vm{n}: {{memory: 64M}}\n" for n in range(9))
    limit(desk, vms, "512M")
    with desk.site() as site:
        farm.clone_farm(site, start=False)
    looks = 0

    def look(*arguments: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        return host_memory(*arguments, **options)

    monkeypatch.setattr("provision.memory_budget.host_memory", look)
    with desk.site() as site, site.locks.hold("memory-here", doing="starting them"):
        farm.start(site, [f"vm{n}" for n in range(8)], wait=False)
        assert looks == 2, "before it begins, and the first VM's"
        with pytest.raises(NoSpace):
            farm.start(site, ["vm8"], wait=False)
    assert peak(desk) == 512
    for n in (0, 1):
        with desk.site() as site:
            farm.stop(site, [f"vm{n}"])
    looks = 0
    with desk.site() as site:
        farm.start(site, ["vm8"], wait=False)
        farm.start(site, ["vm0"], wait=False)
        assert looks == 4, "the turn was let go between"
        with pytest.raises(NoSpace):
            farm.start(site, ["vm1"], wait=False)


def test_a_turn_is_waited_for(desk: Desk) -> None:
    limit(desk, "  a: {memory: 512M, start: no}\n", "800M")
    desk.run(farm.clone_farm)
    with desk.site() as site, desk.site() as other:
        begun, over = threading.Event(), threading.Event()

        def start() -> None:
            begun.set()
            farm.start(other, ["a"])
            over.set()

        with site.locks.hold("memory-here", doing="starting b"):
            thread = threading.Thread(target=start)
            thread.start()
            begun.wait()
            assert not over.wait(1), "it does not start while another has the turn"
            assert desk.machine("a").power == "stopped"
        thread.join()
        assert over.is_set()


def test_what_one_thread_is_about_to_take_the_others_see(desk: Desk) -> None:
    limit(desk, "  a: {memory: 512M, start: no}\n  b: {memory: 512M, start: no}\n", "800M")
    desk.run(farm.clone_farm)
    with desk.site() as site:
        with room_for(Member(site, "a"), 512 * MIB, "starting a"):
            with (
                pytest.raises(NoSpace, match="a has 512M"),
                room_for(Member(site, "b"), 512 * MIB, "starting b"),
            ):
                raise AssertionError("there was none")
            with room_for(Member(site, "b"), 288 * MIB, "ballooning b"):
                (seen,) = farm.memory_plan(site).hosts.values()
                assert seen.left == 0
        assert site.locks.held() == ()
        farm.start(site, ["b"])


def test_what_is_on_the_host_is_told(desk: Desk) -> None:
    limit(desk, "  a: {memory: 512M, idle_memory: 128M}\n  b: {memory: 750M, start: no}\n", "800M")
    desk.run(farm.clone_farm)
    with desk.site(plan=True) as site:
        found: Any = farm.memory_plan(site).as_dict()
    (one,) = found["hosts"]
    assert (one["limit"], one["in_use"], one["left"]) == (800 * MIB, 128 * MIB, 672 * MIB)
    assert [vm["may_have"] for vm in one["vms"]] == [512 * MIB, 0], "b lacks 78M"
    assert [vm["needs"] for vm in one["vms"]] == [128 * MIB, None]


def test_balloon_under_need_is_refused_as_ever(desk: Desk) -> None:
    limit(desk, "  a: {memory: 512M}\n", "800M")
    desk.run(farm.clone_farm)
    with desk.site() as site, pytest.raises(UsageError, match="can't go down"):
        farm.balloon(site, "a", MIB)
