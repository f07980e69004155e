"""SIGKILL at the journal's steps of what moves VMs to another generation and removes checkpoints: it is
the old or the new, nothing of the old state is lost before the new one is there, nothing stays over."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from bench import MANY, Bench

from inventory.errors import WrongState
from provision.member import Member, is_on
from provision.operations import checkpoint
from tests import farm

pytestmark = [pytest.mark.system, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("bench", ["fake", "kvm", "xenapi"], indirect=True)
def test_renew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "GRACE", 0.2)  # its guests don't listen
    if bench.driver == "kvm" and not MANY:  # four seconds each
        monkeypatch.setattr(bench, "chosen", bench.chosen or 8)
    arguments = {"vms": ["prod"], "wait": False}
    seen: set[str] = set()
    for context in bench.kills("renew", "renew", arguments, partial(_behind, bench), shapes=False):
        bench.recovered(context)
        with bench.site() as site:
            assert is_on(Member(site, "prod").look()), context
            farm.stop(site, ["prod"], force=True)
            disk = bench.disk(site, "prod")
            assert disk, context
            bench.place.check(disk)
            kept = [one.name for one in disk.checkpoints]
            if disk.template == "base@2":
                assert bench.content(site, "prod") == "new", context
                assert kept == ["clean"], context
            else:
                assert bench.content(site, "prod") == "old", f"{context}: nothing written is lost"
            seen.add(disk.template)
            farm.renew(site, ["prod"], wait=False)
            assert farm.clone_farm(site, ["prod"], wait=False).result.diff == ""
            now = bench.disk(site, "prod")
            assert now, context
            assert now.template == "base@2", context
    assert seen == {"base@1", "base@2"} or bench.chosen is not None


@pytest.mark.parametrize("bench", ["fake", "kvm", "xenapi"], indirect=True)
def test_checkpoint_remove(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "GRACE", 0.2)
    arguments = {"vms": ["prod"], "label": "kept"}
    ready = partial(_kept, bench)
    for context in bench.kills("checkpoint-remove", "checkpoint_remove", arguments, ready):
        bench.recovered(context)
        with bench.site() as site:
            disk = bench.disk(site, "prod")
            assert disk, context
            bench.place.check(disk)
            if len(disk.checkpoints) > 1:
                farm.reset(site, ["prod"], to="kept", start=False)
                assert bench.content(site, "prod") == "old", context


def _behind(bench: Bench) -> None:
    """prod runs on base@1, with something written; base@2 is there."""
    with bench.site() as site:
        store = site.disks("here")
        farm.destroy(site, ["prod"])
        for template in store.templates():
            if template.label == "base@2":
                store.remove_template(template.label)
        farm.clone_farm(site, wait=False)
        farm.stop(site, ["prod"], force=True)
        bench.write_on(site, "prod")
        farm.start(site, ["prod"], wait=False)
        image = bench.file.with_name("base.qcow2")
        bench.place.make_image(image)
        (first,) = (one for one in store.templates() if one.label == "base@1")
        store.seal(image, replace(first, generation=2, ref="", farm=None))


def _kept(bench: Bench) -> None:
    """prod is stopped and clean again, and has a checkpoint."""
    with bench.site() as site:
        farm.destroy(site, ["prod"])
        for template in site.disks("here").templates():
            if template.label == "base@2":
                site.disks("here").remove_template(template.label)
        farm.clone_farm(site, wait=False)
        farm.stop(site, ["prod"], force=True)
        bench.write_on(site, "prod")
        farm.checkpoint(site, ["prod"], "kept")
        farm.reset(site, ["prod"], start=False)


@pytest.mark.parametrize("bench", ["qcow2", "far"], indirect=True)
def test_a_plan_refuses_what_the_removal_would(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "GRACE", 0.2)
    _kept(bench)
    with bench.site() as site:
        farm.reset(site, ["prod"], to="kept", start=False)
        farm.checkpoint(site, ["prod"], "later")
        farm.reset(site, ["prod"], start=False)
    said = []
    for plan in (True, False):
        with bench.site(plan=plan) as site, pytest.raises(WrongState, match="later grows from it") as no:
            farm.checkpoint_remove(site, ["prod"], "kept")
        said.append(no.value.remedy)
    assert said[0] == said[1]
    with bench.site() as site:
        farm.checkpoint_remove(site, ["prod"], "later")
        farm.checkpoint_remove(site, ["prod"], "kept")
