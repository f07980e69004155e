"""SIGKILL at the journal's steps of a rename: it goes on to the new name or back to the old one, as the
farm file says then; whichever it is, the VM has all that it had, and nobody else has any of it."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
from bench import MANY, Bench

from provision.member import Member, is_on
from provision.operations import checkpoint
from provision.site import Site
from tests import farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]
ARGUMENTS = {"vm": "build", "was": "prod", "wait": False}


RUNNING = [(kind, True) for kind in ("fake", "qcow2", "kvm", "xenapi")]
STOPPED = [(kind, False) for kind in ("fake", "qcow2")]


@pytest.mark.parametrize(("bench", "running"), RUNNING + STOPPED, indirect=["bench"])
def test_rename(bench: Bench, monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
    monkeypatch.setattr(checkpoint, "GRACE", 0.2)  # its guests don't listen
    if bench.driver in ("kvm", "xenapi") and not MANY:  # seconds each
        monkeypatch.setattr(bench, "chosen", bench.chosen or 4)
    operation = f"rename, {'running' if running else 'stopped'}"
    given: list[object] = []
    text = bench.file.read_text()
    turns = itertools.cycle((True, False))
    try:
        for context in bench.kills(
            operation, "rename", ARGUMENTS, partial(_ready, bench, text, given, running=running),
            shapes=False,
        ):  # fmt: skip
            on = next(turns)
            vm, other = ("build", "prod") if on else ("prod", "build")
            with bench.site() as site:
                _one_disk(site, context)
                begun = bool(site.journal.unfinished())
            bench.file.write_text(_called(text, vm))
            done = bench.recovered(context)
            assert not begun or f"it is {vm}" in done[0], f"{context}: {done}"
            with bench.site() as site:
                _one_disk(site, context)
                if not _is_made(site, vm):  # killed before it wrote anything down, or after its end
                    assert not begun, context
                    farm.rename(site, vm, other, wait=False)
                assert site.allocator.recorded()[vm].mac == given[-1], context
                assert other not in site.allocator.recorded(), context
                assert is_on(Member(site, vm).look()) == running, context
                farm.stop(site, [vm], force=True)
                bench.nothing_half_made(site, context)
                assert bench.content(site, vm) == "old", f"{context}: nothing written is lost"
                farm.reset(site, [vm], to="kept", start=False)
                disk = bench.disk(site, vm)
                assert disk and [one.name for one in disk.checkpoints] == ["clean", "kept"], context
                assert bench.content(site, vm) == "old", f"{context}: its checkpoint is what it was"
                assert site.disks("here").pristine(disk.machine, "kept"), context
    finally:
        bench.file.write_text(text)


def _called(text: str, vm: str) -> str:
    return text.replace("  prod: ", f"  {vm}: ")


def _is_made(site: Site, vm: str) -> bool:
    return Member(site, vm).driver.find(site.farm.machine_of(vm)) is not None


def _one_disk(site: Site, context: str) -> None:
    """However far it came: no second machine, and no second disk, of any name."""
    disks = [one.machine for one in site.disks("here").list()]
    machines = [one.name for one in site.hypervisor("here", look=True).list()]
    for found in (disks, machines):
        assert len(found) <= 2 and "kill-dev2" in found, f"{context}: {found}"


def _ready(bench: Bench, text: str, given: list[object], *, running: bool) -> None:
    """prod has something written, that is kept in a checkpoint, too; the farm file calls it build."""
    for vm in ("build", "prod"):
        bench.file.write_text(_called(text, vm))
        with bench.site() as site:
            farm.destroy(site, [vm])
    with bench.site() as site:
        farm.clone_farm(site, wait=False)
        farm.stop(site, ["prod"], force=True)
        bench.write_on(site, "prod")
        farm.checkpoint(site, ["prod"], "kept")
        bench.write_on(site, "prod")
        if running:
            farm.start(site, ["prod"], wait=False)
        given.append(site.allocator.recorded()["prod"].mac)
    bench.file.write_text(_called(text, "build"))
