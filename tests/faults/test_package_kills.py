"""SIGKILL anywhere in `build`: the same command goes on where it was. What was built is not built again,
nothing half-made is published, and at the end all is as if nobody had been killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench import KILLS, MANY, ROOT, SEED

from builds.packages.planning import end_old_flows
from builds.packages.runs import RunRecords, flow_of
from builds.packages.verified import verified
from provision.engine.runner import perform
from provision.operations.flows import FlowBegin
from provision.package_repositories import opened
from repositories.check import check
from repositories.leases import leases
from tests import farm
from tests.unit.cycle_farm import environment
from tests.unit.package_lab import PackageLab

pytestmark = [pytest.mark.system, pytest.mark.timeout(7200)]
CHILD = Path(__file__).with_name("package_child.py")
EACH = 60 if MANY else 4


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageLab]:
    for name, value in environment(tmp_path).items():
        if name.startswith("FARMHAND_"):
            monkeypatch.setenv(name, value)
    made = PackageLab(tmp_path)
    made.source("libfoo")
    made.source("tool", 'deb tool "tool with $(text_of libfoo)"\n', needs="libfoo")
    made.source("lone")
    yield made
    made.stop()


def child(
    lab: PackageLab, at: int, operation: str = "build", **request: object
) -> subprocess.CompletedProcess[str]:
    paths = f"{ROOT}:{ROOT / 'tests/unit'}:{ROOT / 'tests/faults'}"
    return subprocess.run(
        [sys.executable, CHILD, lab.farm_file(), str(at), json.dumps(request), operation],
        env={**os.environ, "PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip


def outcome(lab: PackageLab) -> dict[str, str]:
    """What the channel has: sha256 by name and version."""
    with lab.site(plan=True) as site:
        repository = opened(site.farm)
        head = repository.head("experimental")
        found = list(repository.packages(head)) if head else []
        assert len({one.identity for one in found}) == len(found)
        return {f"{one.name} {one.version}": one.sha256 for one in found}


def numbers(lab: PackageLab) -> dict[str, int]:
    """How many builds that passed each package has."""
    return {
        name: sum(1 for record in lab.records.of(name) if record.result == "passed")
        for name in lab.packages
    }


def test_a_flow_that_was_begun_and_not_noted_is_ended(lab: PackageLab) -> None:
    """Killed between the two."""
    assert child(lab, 0).returncode == 0
    with lab.site() as site:
        record = RunRecords(site.paths).find("last")
        directory = record.directory.with_name("20200101t000000z")
        shutil.copytree(record.directory, directory)
        cut = replace(
            record, id=directory.name, directory=directory, result="interrupted", flow="", generation=0
        )
        cut.save(durable=False)
        package = next(directory.parent.parent.rglob("libfoo*.deb"))
        begin = FlowBegin(record.repository, flow_of(cut.id), "experimental", (package,), more=True)
        perform(site, begin)
        repository = opened(site.farm)
        plan: Any = SimpleNamespace(channel=SimpleNamespace(repository=repository))
        assert {flow.name: flow.state for flow in repository.flows.all()}[flow_of(cut.id)] == "open"
        end_old_flows(site, plan)
        assert [flow.name for flow in repository.flows.all() if flow.state == "open"] == []


def test_kills(lab: PackageLab, tmp_path: Path) -> None:
    whole = child(lab, 0)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    total, wanted = int(whole.stdout), outcome(lab)
    assert len(wanted) == 3
    dice = random.Random(f"{SEED} build")
    for at in sorted(dice.sample(range(1, total + 1), EACH)):
        shutil.rmtree(tmp_path / "state")
        killed = child(lab, at)
        if killed.returncode == 0:  # it took fewer steps this time
            continue
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
        KILLS.add("build", "packages")
        context = f"build killed at {at} of {total} (FARMHAND_SEED={SEED})"
        KILLS.open[context] = None
        assert outcome(lab) in ({}, wanted), context
        before = numbers(lab)
        on = child(lab, 0)
        assert on.returncode == 0, f"{context}: {on.stdout}{on.stderr}"
        assert outcome(lab) == wanted, context
        after = numbers(lab)
        assert all(after[name] == max(count, 1) for name, count in before.items()), (
            f"{context}: built again: {before} {after}"
        )
        with lab.site() as site:
            farm.recover(site)
            assert site.journal.unfinished() == (), context
            repository = opened(site.farm)
            found = check(repository, site.runner, lambda _: None).findings
            assert [str(one) for one in found] == [], context
            open_ = [flow.name for flow in repository.flows.all() if flow.state == "open"]
            assert open_ == [], context
        running = [r.id for name in lab.packages for r in lab.records.of(name) if r.result == "running"]
        assert running == [], context
        del KILLS.open[context]


def test_kills_of_a_rebuild(lab: PackageLab) -> None:
    """Whatever is cut off, its lease of the repository is given back, and it can be done again."""
    assert child(lab, 0).returncode == 0
    published, request = outcome(lab), {"build": "tool", "verify": True}
    whole = child(lab, 0, "rebuild", **request)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    total = int(whole.stdout)
    dice = random.Random(f"{SEED} rebuild")
    for at in sorted(dice.sample(range(1, total + 1), min(EACH, total))):
        killed = child(lab, at, "rebuild", **request)
        if killed.returncode == 0:
            continue
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
        KILLS.add("rebuild", "packages")
        context = f"rebuild killed at {at} of {total} (FARMHAND_SEED={SEED})"
        KILLS.open[context] = None
        with lab.site() as site:
            farm.recover(site)
            assert site.journal.unfinished() == (), context
            layout = opened(site.farm).layout
            assert [one for one in leases(layout) if "rebuild" in one.holder] == [], context
        tool = lab.last("tool").directory
        assert not list(tool.glob("rebuilds/*/.*")), context
        known = verified(tool)
        assert known is not None, context
        assert known.identical, f"{context}: {known.differences}"
        assert outcome(lab) == published, context
        del KILLS.open[context]
    again = child(lab, 0, "rebuild", **request)
    assert again.returncode == 0, again.stdout + again.stderr
