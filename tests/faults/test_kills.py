"""SIGKILL at every journal step of every changing use case, right after each step's change, and at any
moment: what is left is never half-made, recovery puts it right, nothing stays over, no name is
blocked."""

from __future__ import annotations

from functools import partial

import pytest
from bench import KILLS, Bench
from benches import on_two_as_well, xen

from provision.member import Member, is_on
from provision.operations import templates as golden
from provision.site import Site
from tests import farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]
MIB = 2**20
NOTHING = ["nothing was left unfinished"]
NOT_BEGUN = "it had not begun, nothing is gone"
fake_only = pytest.mark.parametrize("bench", ["fake"], indirect=True)  # the drivers' part is the same


@pytest.fixture(autouse=True)
def _forget(bench: Bench) -> None:
    """What a test expected that failed in the midst of its kills."""
    bench.shapes = []


def test_clone_farm(bench: Bench) -> None:
    for context in bench.kills("clone-farm", "clone_farm", {"wait": False}, partial(_remove, bench)):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        bench.recovered(context)
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        bench.usable(context)


@fake_only
def test_the_next_clone_farm_recovers_by_itself(bench: Bench) -> None:
    """Without a recover in between."""
    arguments = {"wait": False, "vms": ["prod"]}
    for context in bench.kills(
        "clone-farm, then clone-farm", "clone_farm", arguments, partial(_remove, bench), shapes=False
    ):
        with bench.site() as site:
            unfinished = bool(site.journal.unfinished())
            outcome = farm.clone_farm(site, wait=False)
            recovered = any(action.verb == "recover" for action in outcome.actions)
            assert recovered == unfinished, context
        bench.usable(context)
        bench.recovered(context)


@pytest.mark.parametrize("bench", ["fake", "kvm"], indirect=True)
def test_clone_again_where_the_disk_is_gone(bench: Bench) -> None:
    arguments = {"vms": ["prod"], "start": False}
    for context in bench.kills(
        "clone-farm, disk gone", "clone_farm", arguments, partial(_without_disk, bench), shapes=False
    ):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
            farm.clone_farm(site, ["prod"], start=False)
            assert bench.content(site, "prod") == "new", context
            assert is_on(Member(site, "dev2").look()), f"{context}: the other one is untouched"
        bench.recovered(context)
        bench.usable(context)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_reset(bench: Bench, running: bool) -> None:
    operation = f"reset, {'running' if running else 'stopped'}"
    arguments = {"vms": ["prod"], "start": running, "wait": False}
    ready = partial(_written, bench, running=running)
    for context in bench.kills(operation, "reset", arguments, ready):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
            assert bench.content(site, "prod") in ("old", "new"), context
        _after_reset(bench, context, running=running)


@fake_only
def test_the_next_command_recovers_a_reset(bench: Bench) -> None:
    ready = partial(_written, bench, running=True)
    for context in bench.kills("reset, then start", "reset", {"vms": ["prod"], "wait": False}, ready):
        with bench.site() as site:
            farm.start(site, ["dev2", "prod"], wait=False)
            assert bench.content(site, "prod") in ("old", "new"), context
            assert is_on(Member(site, "prod").look()), context
            assert site.journal.unfinished() == (), context
        bench.recovered(context)


@pytest.mark.parametrize("when", ["written", "done"])
def test_a_recovery_that_is_killed_too(bench: Bench, when: str) -> None:
    arguments = {"vms": ["prod"], "wait": False}
    number = 1
    while True:
        _written(bench, running=True)
        # killed at its swap of the disk, then again and again while being recovered
        cut = bench.killed_at(when, 3, "reset", arguments)
        assert cut
        again = bench.killed_at("written", number, "recover", {})
        if again is None:
            break
        KILLS.add("recover of a reset", bench.driver)
        context = f"reset killed at {cut!r}, its recovery at {again!r}"
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        _after_reset(bench, context, running=True)
        number += 1
    # the fake's power and disk change in one: killed before its swap, there is nothing to do again
    assert number > 1 or (bench.driver, when) == ("fake", "written")


def test_reset_to_an_older_checkpoint(bench: Bench) -> None:
    """Newer ones stay, so the store has to grow another disk."""
    arguments = {"vms": ["prod"], "to": "clean", "start": False, "wait": False}
    for context in bench.kills("reset, older", "reset", arguments, partial(_written_on, bench, "kept")):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
            assert bench.content(site, "prod") in ("old", "new"), context
        _after_reset(bench, context, running=False)
        with bench.site() as site:
            disk = site.disks("here").find(Member(site, "prod").machine)
            assert disk
            assert [kept.name for kept in disk.checkpoints] == ["clean", "kept"], context


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_checkpoint(bench: Bench, running: bool) -> None:
    operation = f"checkpoint, {'running' if running else 'stopped'}"
    name = "kept"
    arguments = {"vms": ["prod"], "name": name, "wait": False}
    ready = partial(_unkept, bench, running=running)
    for context in bench.kills(operation, "checkpoint", arguments, ready):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        bench.recovered(context)
        with bench.site() as site:
            assert is_on(Member(site, "prod").look()) == running, context
            disk = site.disks("here").find(Member(site, "prod").machine)
            assert disk
            if name in [kept.name for kept in disk.checkpoints]:
                farm.reset(site, ["prod"], to=name, start=False)
            farm.stop(site, ["prod"], force=True)
            assert bench.content(site, "prod") == "old", f"{context}: nothing written is lost"


@on_two_as_well
def test_reset_all(bench: Bench) -> None:
    """Both VMs get there or none does; so it is, too, that both run or none."""
    arguments = {"vms": [], "wait": False}
    for context in bench.kills("reset --all", "reset", arguments, partial(_both_written, bench)):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
            assert {bench.content(site, vm) for vm in site.farm.vms} <= {"old", "new"}, context
        done = bench.recovered(context)
        with bench.site() as site:
            not_begun = any("had not begun" in line for line in done)
            expected = "old" if not_begun else "new"
            if done == NOTHING:  # killed before it wrote anything down, or after its end
                expected = bench.content(site, "prod")
                assert expected in ("old", "new"), context
            assert [bench.content(site, vm) for vm in site.farm.vms] == [expected] * 2, context
            assert all(is_on(Member(site, vm).look()) for vm in site.farm.vms), context


@on_two_as_well
def test_checkpoint_all(bench: Bench) -> None:
    arguments = {"vms": [], "name": "kept", "wait": False}
    ready = partial(_both_written, bench, anew=True)
    for context in bench.kills("checkpoint --all", "checkpoint", arguments, ready):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        bench.recovered(context)
        with bench.site() as site:
            assert all(is_on(Member(site, vm).look()) for vm in site.farm.vms), context
            disks = [bench.disk(site, vm) for vm in site.farm.vms]
            kept = {"kept" in [c.name for c in disk.checkpoints] for disk in disks if disk}
            assert len(disks) == 2, context
            assert len(kept) == 1, f"{context}: of both or of none"
            if kept == {True}:
                farm.reset(site, to="kept", start=False)
            farm.stop(site, force=True)
            for vm in site.farm.vms:
                assert bench.content(site, vm) == "old", f"{context}: nothing written is lost"


@pytest.mark.parametrize("bench", ["fake", "two fakes"], indirect=True)
def test_a_recovery_of_all_that_is_killed_too(bench: Bench) -> None:
    number = 1
    while True:
        _both_written(bench)
        assert bench.killed_at("written", 4, "reset", {"vms": [], "wait": False})
        again = bench.killed_at("written", number, "recover", {})
        if again is None:
            break
        KILLS.add("recover of a reset --all", bench.driver)
        bench.recovered(again)
        with bench.site() as site:
            assert [bench.content(site, vm) for vm in site.farm.vms] == ["new", "new"], again
            assert all(is_on(Member(site, vm).look()) for vm in site.farm.vms), again
        number += 1
    assert number > 1


@pytest.mark.parametrize("bench", ["fake", pytest.param("xen+lvm-thin", marks=xen)], indirect=True)
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_balloon(bench: Bench, up: bool) -> None:
    """What it may have been given counts until it is recovered, and then it has it."""
    low, high = bench.place.memory
    has, target = (low, high) if up else (high, low)

    def ready() -> None:
        with bench.site() as site:
            farm.clone_farm(site, ["prod"], wait=False)
            bench.place.booted(Member(site, "prod").machine)
            farm.balloon(site, "prod", has * MIB)

    def memory(site: Site) -> tuple[int, int]:
        """Of prod: what it has, and what counts."""
        machine = Member(site, "prod").look()
        assert machine
        (seen,) = [p.guest for p in farm.memory_plan(site).prospects("here") if p.guest.vm == "prod"]
        return round(machine.current / MIB), round(seen.now / MIB)

    operation = f"balloon, {'up' if up else 'down'}"
    arguments = {"vm": "prod", "target": target * MIB}
    for context in bench.kills(operation, "balloon", arguments, ready, shapes=False):
        with bench.site() as site:
            unfinished = bool(site.journal.unfinished())
            now, counts = memory(site)
            assert now in (has, target) or (bench.place.gradual and low < now < high), context
            assert counts == (max(now, target) if unfinished else now), context
        bench.recovered(context)
        with bench.site() as site:
            assert memory(site) == ((target, target) if unfinished else (now, now)), context


def test_destroy_a_vm(bench: Bench) -> None:
    _remove(bench)  # and with them the checkpoints of tests before
    ready = partial(bench.usable, "made again")
    for context in bench.kills("destroy a VM", "destroy", {"vms": ["prod"]}, ready):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        done = bench.recovered(context)
        with bench.site() as site:
            assert is_on(Member(site, "dev2").look()), f"{context}: the other one is untouched"
            if (done == NOTHING or NOT_BEGUN in done[0]) and Member(site, "prod").look() is not None:
                bench.nothing_half_made(site, context)
                continue
            assert Member(site, "prod").look() is None, context
            assert site.disks("here").find(Member(site, "prod").machine) is None, context
            assert "prod" not in site.allocator.recorded(), context


def test_destroy_the_farm(bench: Bench) -> None:
    _remove(bench)
    for context in bench.kills("destroy the farm", "destroy", {}, partial(_whole, bench)):
        done = bench.recovered(context)
        with bench.site() as site:
            if (done == NOTHING or NOT_BEGUN in done[0]) and site.paths.root.exists():
                assert all(is_on(Member(site, vm).look()) for vm in site.farm.vms), context
                continue
            assert not site.paths.root.exists(), context
            assert not site.allocator.lock_file.exists(), context


def test_template_import(bench: Bench) -> None:
    image = bench.file.with_name("spare.qcow2")
    bench.place.make_image(image)
    for context in bench.kills(
        "template-import", "template_import", {"name": "spare"}, partial(_no_spare, bench)
    ):
        bench.recovered(context)
        with bench.site() as site:
            assert len(_spare(site)) <= 1, context
            farm.template_import(site, "spare")
            assert len(_spare(site)) >= 1, context
        assert image.exists(), context


def test_template_remove(bench: Bench) -> None:
    _no_spare(bench)
    bench.place.make_image(bench.file.with_name("spare.qcow2"))
    label = ""

    def ready() -> None:
        nonlocal label
        with bench.site() as site:
            if not _spare(site):
                farm.template_import(site, "spare")
            (label,) = _spare(site)
            arguments["label"] = label

    arguments: dict[str, str] = {}
    for context in bench.kills("template-remove", "template_remove", arguments, ready):
        bench.recovered(context)
        with bench.site() as site:
            assert _spare(site) in ([], [label]), context


def _spare(site: Site) -> list[str]:
    return [t.label for t in golden.template_list(site) if t.name == "spare"]


def _no_spare(bench: Bench) -> None:
    with bench.site() as site:
        for label in _spare(site):
            farm.template_remove(site, label)


def _whole(bench: Bench) -> None:
    bench.seal()
    bench.usable("made again")


def _written(bench: Bench, *, running: bool) -> None:
    """Both VMs made, prod with something on its disk, running or not."""
    with bench.site() as site:
        farm.clone_farm(site, wait=False)
        farm.stop(site, ["prod"], force=True)
        bench.write_on(site, "prod")
        assert bench.content(site, "prod") == "old"
        if running:
            farm.start(site, ["prod"], wait=False)


def _written_on(bench: Bench, name: str) -> None:
    """prod stopped, with something written since checkpoint ``name``."""
    with bench.site() as site:
        farm.clone_farm(site, wait=False)
        farm.stop(site, ["prod"], force=True)
        disk = site.disks("here").find(Member(site, "prod").machine)
        assert disk
        if name not in [kept.name for kept in disk.checkpoints]:
            farm.checkpoint(site, ["prod"], name)
        else:
            farm.reset(site, ["prod"], to=name, start=False)
        bench.write_on(site, "prod")
        assert bench.content(site, "prod") == "old"


def _both_written(bench: Bench, *, anew: bool = False) -> None:
    """Both VMs running, with something on their disks; ``anew``: without checkpoints of their own."""
    with bench.site() as site:
        disks = [bench.disk(site, vm) for vm in site.farm.vms]
        if anew and any(disk and len(disk.checkpoints) > 1 for disk in disks):
            farm.destroy(site, list(site.farm.vms))
        farm.clone_farm(site, wait=False)
        farm.stop(site, force=True)
        for vm in site.farm.vms:
            bench.write_on(site, vm)
        farm.start(site, wait=False)


def _after_reset(bench: Bench, context: str, *, running: bool) -> None:
    done = bench.recovered(context)
    with bench.site() as site:
        content = bench.content(site, "prod")
        if done == NOTHING:  # killed before it wrote anything down, or after its end
            assert content in ("old", "new"), context
        else:
            not_begun = any("had not begun" in line for line in done)
            assert content == ("old" if not_begun else "new"), f"{context}: {done}"
        assert is_on(Member(site, "prod").look()) == running, context


def _unkept(bench: Bench, *, running: bool) -> None:
    """As ``_written``, on a disk without checkpoints of its own."""
    with bench.site() as site:
        farm.destroy(site, ["prod"])
    _written(bench, running=running)


def _without_disk(bench: Bench) -> None:
    """All are there, and the disk of prod, which is stopped, is gone."""
    bench.usable("made again")
    with bench.site() as site:
        farm.stop(site, ["prod"], force=True)
        disk = bench.disk(site, "prod")
        assert disk
        bench.place.lose(disk, site)


def _remove(bench: Bench) -> None:
    with bench.site() as site:
        farm.destroy(site, list(site.farm.vms))
