"""A kind of a cycle's step is one file, nobody else knows it by name; failures are judged by data."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

from builds import page
from builds.judged import carry_out
from builds.machines import Machines
from builds.meter import Meter
from builds.record import BuildRecord, StepRecord, load_records, new_directory, now
from builds.repositories import BuildRepositories
from builds.step_kind import StepKind
from builds.step_run import StepFailed, StepLog, StepRun
from builds.steps import STEPS
from inventory.errors import Conflict, ConnectionLost, DriverFailed, FarmhandError, NoSpace, TimedOut
from inventory.loader import load
from inventory.model import step_section
from provision.engine.report import QuietReporter
from provision.site import Site
from tests import farm
from tests.unit.test_record import _seal

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", STEPS)
def test_the_table_has_it_by_its_own_key(kind: str) -> None:
    section = step_section(kind)
    assert issubclass(section, StepKind)
    assert kind == section.KIND
    fields = section.__dataclass_fields__
    assert kind in {section.key_of(name) for name in fields}
    assert set(section.VMS) <= fields.keys()


def test_nobody_else_knows_a_kind_by_name() -> None:
    """Neither its class, nor its module, nor by a comparison with its name."""
    named = "|".join(part for place in STEPS.values() for part in place.split(":"))
    known = re.compile(rf"\b(?:{named.replace('.', '[.]')})\b|\.kind (?:==|!=|in) ")
    files = [*ROOT.glob("builds/*.py"), ROOT / "cli/views.py", *ROOT.glob("templates/pages/*")]
    files += [ROOT / "tasks.py", *ROOT.glob("inventory/*.py")]
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not known.search(line), f"{file}:{number}: {line}"


@dataclass(frozen=True, kw_only=True)
class Carry(StepKind):
    """Of this test's own: it fails."""

    KIND: ClassVar = "carry"
    VMS: ClassVar = ("carry", "to")

    carry: str = "dev2"
    to: str = "prod"
    error: FarmhandError

    def does(self) -> str:
        return "fail"

    def details(self) -> Mapping[str, str]:
        return {"weight": "3 <kg>"}

    async def carry_out(self, work: StepRun) -> None:
        del work
        raise self.error


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    (tmp_path / "farm.yaml").write_text(
        "farm: kata\nhosts:\n  here: {driver: fake}\ntemplates:\n  base: {build: debian-12}\n"
        "vms:\n  dev2: {}\n  prod: {}\n"
    )
    with Site(load(tmp_path / "farm.yaml"), reporter=QuietReporter()) as opened:
        _seal(opened)
        farm.clone_farm(opened, start=True, wait=False)
        farm.stop(opened, ["prod"], force=True)
        yield opened


def judged(site: Site, directory: Path, error: FarmhandError) -> StepFailed:
    async def nothing(_vm: str, _log: StepLog) -> None:
        return

    machines, meter = Machines(site, None, directory, Meter(), print), Meter()
    log = StepLog(directory / "log", "dev2", None)
    work = StepRun(
        name="c", site=site, machines=machines, repositories=BuildRepositories(site, "1"), meter=meter,
        environment=lambda _vm: {}, before_run=nothing, artifacts=directory, log=log,
    )  # fmt: skip
    with pytest.raises(StepFailed) as caught:
        asyncio.run(carry_out(Carry(name="c", error=error), work))
    log.close()
    return caught.value


def test_failures_are_judged_by_what_the_error_is(site: Site, tmp_path: Path) -> None:
    lost = judged(site, tmp_path, ConnectionLost("gone", vm="prod"))
    assert (lost.failure, str(lost)) == ("infrastructure", "prod: gone (it is stopped now)")
    lost = judged(site, tmp_path, ConnectionLost("prod: gone", vm="dev2"))
    assert str(lost) == "dev2: prod: gone (it is running now)"
    for error in (
        DriverFailed("no connection of ours", vm="prod"),
        Conflict("prod: another's connection", vm="prod"),
        TimedOut("no connection in time", vm="prod"),
    ):
        failed = judged(site, tmp_path, error)
        assert (failed.failure, str(failed)) == ("infrastructure", error.message)
    full = judged(site, tmp_path, NoSpace("the disk is full"))
    assert (full.failure, str(full)) == ("environment", "the disk is full")


def test_what_it_says_of_itself_is_in_record_and_page(site: Site) -> None:
    step = Carry(name="c", error=NoSpace("no"))
    directory = new_directory(site.paths, "")
    record = BuildRecord(
        id=directory.name, farm="kata", result="passed", started=now(), directory=directory,
        steps=(StepRecord(name="c", kind=step.KIND, vm=step.vms[0], to=step.vms[1], status="passed",
                          started=now(), details=step.details()),),
    )  # fmt: skip
    record.save()
    (read,) = load_records(site.paths)
    assert read == record
    text = page.render(read)
    assert "<dt>weight</dt><dd>3 &lt;kg&gt;</dd>" in text
    assert "dev2 &rarr; prod carry" in text
    assert "&rarr;" not in page.render(replace(record, steps=(replace(record.steps[0], to=""),)))
