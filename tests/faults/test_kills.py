"""SIGKILL at every journal step of every changing use case, and right after each step's change: what is
left is never half-made, recovery puts it right, nothing stays over, no name is blocked."""

from __future__ import annotations

import pytest
from bench import Bench

from provision import farm
from provision.site import Site
from provision.work import is_on, look

pytestmark = pytest.mark.system


def test_clone_farm(bench: Bench) -> None:
    for context in bench.kills("clone-farm", "clone_farm", {"wait": False}):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        bench.recovered(context)
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        bench.usable(context)
        _remove(bench)


def test_the_next_clone_farm_recovers_by_itself(bench: Bench) -> None:
    """Without a recover in between."""
    for context in bench.kills(
        "clone-farm, then clone-farm", "clone_farm", {"wait": False, "vms": ["prod"]}
    ):
        with bench.site() as site:
            outcome = farm.clone_farm(site, wait=False)
            assert any(action.verb == "recover" for action in outcome.actions), context
        bench.usable(context)
        bench.recovered(context)
        _remove(bench)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_reset(bench: Bench, running: bool) -> None:
    operation = f"reset, {'running' if running else 'stopped'}"
    _written(bench, running=running)
    for context in bench.kills(operation, "reset", {"vms": ["prod"], "start": running, "wait": False}):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
            assert bench.content(site, "prod") in ("old", "new"), context
        _after_reset(bench, context, running=running)


def test_the_next_command_recovers_a_reset(bench: Bench) -> None:
    _written(bench, running=True)
    for context in bench.kills("reset, then start", "reset", {"vms": ["prod"], "wait": False}):
        with bench.site() as site:
            farm.start(site, ["dev2", "prod"], wait=False)
            assert bench.content(site, "prod") in ("old", "new"), context
            assert is_on(look(site, "prod")), context
            assert site.journal.unfinished() == (), context
        bench.recovered(context)
        _written(bench, running=True)


def test_a_recovery_that_is_killed_too(bench: Bench) -> None:
    _written(bench, running=True)
    arguments = {"vms": ["prod"], "wait": False}
    number = 1
    while True:
        # killed once its power is cut, then again and again while being recovered
        cut = bench.killed_at("written", 3, "reset", arguments)
        assert cut
        again = bench.killed_at("written", number, "recover", {})
        if again is None:
            break
        from bench import KILLS

        KILLS.add("recover of a reset", bench.driver)
        context = f"reset killed at {cut!r}, its recovery at {again!r}"
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        _after_reset(bench, context, running=True)
        number += 1
    assert number > 1


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_checkpoint(bench: Bench, running: bool) -> None:
    operation = f"checkpoint, {'running' if running else 'stopped'}"
    _written(bench, running=running)
    name = "kept"
    for context in bench.kills(operation, "checkpoint", {"vms": ["prod"], "name": name}):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        bench.recovered(context)
        with bench.site() as site:
            assert is_on(look(site, "prod")) == running, context
            disk = site.disks("here").find(site.machine("prod"))
            assert disk
            if name in [kept.name for kept in disk.checkpoints]:
                farm.reset(site, ["prod"], to=name, start=False)
                farm.destroy(site, ["prod"])
            else:
                farm.stop(site, ["prod"], force=True)
                assert bench.content(site, "prod") == "old", context
        _written(bench, running=running)


def test_destroy_a_vm(bench: Bench) -> None:
    bench.usable("at first")
    for context in bench.kills("destroy a VM", "destroy", {"vms": ["prod"]}):
        with bench.site() as site:
            bench.nothing_half_made(site, context)
        bench.recovered(context)
        with bench.site() as site:
            assert look(site, "prod") is None, context
            assert site.disks("here").find(site.machine("prod")) is None, context
            assert "prod" not in site.allocator.recorded(), context
            assert is_on(look(site, "dev2")), f"{context}: the other one is untouched"
        bench.usable(context)


def test_destroy_the_farm(bench: Bench) -> None:
    bench.usable("at first")
    for context in bench.kills("destroy the farm", "destroy", {}):
        bench.recovered(context)
        with bench.site() as site:
            assert not site.paths.root.exists(), context
            assert not site.allocator.lock_file.exists(), context
        bench.seal()
        bench.usable(context)


def _written(bench: Bench, *, running: bool) -> None:
    """Both VMs made, prod with something on its disk, running or not."""
    with bench.site() as site:
        farm.clone_farm(site, wait=False)
        farm.stop(site, ["prod"], force=True)
        bench.write_on(site, "prod")
        assert bench.content(site, "prod") == "old"
        if running:
            farm.start(site, ["prod"], wait=False)


def _after_reset(bench: Bench, context: str, *, running: bool) -> None:
    done = bench.recovered(context)
    with bench.site() as site:
        content = bench.content(site, "prod")
        not_begun = any("had not begun" in line for line in done)
        assert content == ("old" if not_begun else "new"), f"{context}: {done}"
        assert is_on(look(site, "prod")) == running, context
        _same_identity(site)
    _written(bench, running=running)


def _same_identity(site: Site) -> None:
    assert site.allocator.recorded()["prod"] == site.allocator.peek("prod")


def _remove(bench: Bench) -> None:
    with bench.site() as site:
        farm.destroy(site, list(site.farm.vms))
