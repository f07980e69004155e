"""Builds of many packages: what the controller itself costs. The builders are sshds of this machine, and
what is in them is a stand-in that sleeps (``tests/unit/package_lab.py``): real builds are in the
tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from builds.packages.formats import BUILD_FORMATS
from builds.packages.inputs import InstalledPackage
from builds.packages.lookup import sums_of
from builds.packages.planning import plan_packages
from builds.packages.record import ARTIFACTS, PackageOrigin, PackageRecord
from builds.record import FileRecord, now
from provision.engine.runner import perform
from provision.operations.repositories import RepoAdd
from tests.debs import deb, fields
from tests.figures import Figure
from tests.unit.cycle_farm import environment
from tests.unit.package_lab import ROOT, STAND_IN, PackageLab

MANY = 1000
UNCHANGED = f"./invoke build, {MANY} packages, none changed"
_SAID = 2.0
"""Seconds."""
_SLEEP = 4
"""Seconds that each build takes."""
_ONE, _TWO = "10 packages, on one builder", "10 packages, on two builders"


def measure(place: Path, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    with _in_place(place / "many"):
        yield from _unchanged(place / "many", rounds, say)
    for builders, name in ((1, _ONE), (2, _TWO)):
        say(name)
        with _lab(place / f"ten-{builders}", builders) as lab:
            for number in range(10):
                lab.source(f"p{number}", f"sleep {_SLEEP}\ndeb p{number} one\n")
            started = time.monotonic()
            lab.run()
            limit, beside = (0.6, _ONE) if builders == 2 else (None, "")
            yield Figure(name, (time.monotonic() - started,), limit, beside)
    say("20 packages, the controller's share")
    with _lab(place / "share", 2) as lab:
        for number in range(20):
            needs = f"p{number // 2}" if number else ""
            lab.source(f"p{number}", f"sleep {_SLEEP}\ndeb p{number} one\n", needs=needs)
        lab.run()
        run = lab.last_run()
        yield Figure("20 packages on two builders", (run.seconds,))
        over = max(run.controller_seconds - 0.03 * run.seconds, 0.0)
        yield Figure("of that the controller's, beyond 3 %", (over,), 2.0)


@contextmanager
def _in_place(place: Path) -> Iterator[None]:
    place.mkdir()
    before, real = {**os.environ}, BUILD_FORMATS["deb"]
    os.environ.update(environment(place))
    BUILD_FORMATS["deb"] = STAND_IN
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        BUILD_FORMATS["deb"] = real


@contextmanager
def _lab(place: Path, builders: int) -> Iterator[PackageLab]:
    with _in_place(place):
        lab = PackageLab(place, builders)
        try:
            yield lab
        finally:
            lab.stop()


def _unchanged(place: Path, rounds: int, say: Callable[[str], None]) -> Iterator[Figure]:
    """Whole commands. Each package has a record of a build, as one would have left it."""
    say(f"{MANY} packages: making them")
    lab = PackageLab(place, builders=1)
    lab.stop()  # nobody is to be asked
    for number in range(MANY):
        before = sorted({number * part // 12 for part in range(1, 12)} - {number})
        lab.source(f"p{number}", f"deb p{number} one\n", needs=", ".join(f"p{n}" for n in before))
    _pretend(lab)
    argv = [sys.executable, "-P", Path(__file__).with_name("package_command.py"), "build"]
    env = {**os.environ, "FARMHAND_FARM": str(lab.farm_file()), "PYTHONPATH": str(ROOT)}
    wall, cpu = [], []
    for turn in range(rounds + 1):
        say(f"{UNCHANGED}: {turn} of {rounds}")
        started, used = time.monotonic(), os.times()
        done = subprocess.run(argv, env=env, cwd=place, capture_output=True, text=True, check=False)
        ended = os.times()
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{MANY} packages are as built before" in done.stdout, done.stdout
        if turn:  # the first one has what git says to read
            wall.append(time.monotonic() - started)
            cpu.append(
                ended.children_user + ended.children_system - used.children_user - used.children_system
            )
    yield Figure(UNCHANGED, tuple(wall), _SAID)
    yield Figure(f"{UNCHANGED}: CPU", tuple(cpu), _SAID)


def _pretend(lab: PackageLab) -> None:
    """The records, and what they published."""
    with lab.site() as site:
        site.prepare()
        plan = plan_packages(site, (), with_dependants=False, revision=None, only_changed=False)
        sums: dict[str, str] = {}
        paths = []
        for name in plan.wanted:
            state, inputs = plan.state(plan.graph.builds[name]), plan.inputs[name]
            number, directory = plan.records.begin(state.name)
            files = _files(directory / ARTIFACTS, name, inputs.version)
            needs = [need.needs for need in plan.graph.needs(name)]
            record = PackageRecord(
                package=state.name, name=name, number=number, farm=site.farm.farm, run="none",
                result="passed", started=now(), inputs=_with(inputs, {n: sums[n] for n in needs}),
                source=PackageOrigin(
                    place=state.place, tree=state.tree, stated=state.stated, when=state.when
                ),
                outputs=files, directory=directory,
            )  # fmt: skip
            record.save()
            sums |= sums_of(files)
            paths += [directory / file.path for file in files]
        perform(site, RepoAdd("debs", "experimental", tuple(paths)))


def _with(inputs, sums: Mapping[str, str]):
    from dataclasses import replace

    others = [InstalledPackage(name=f"other{n}", version="1.0", architecture="all") for n in range(150)]
    ours = [
        InstalledPackage(name=name, version="1.0-1", architecture="all", sha256=sum_)
        for name, sum_ in sums.items()
    ]
    return replace(inputs, installed=(*ours, *others))


def _files(place: Path, name: str, version: str) -> tuple[FileRecord, ...]:
    import hashlib

    place.mkdir()
    data = deb(fields(name, version, "all"), {f"usr/share/{name}": name.encode()})
    path = place / f"{name}_{version}_all.deb"
    path.write_bytes(data)
    return (
        FileRecord(
            name=path.name, size=len(data), sha256=hashlib.sha256(data).hexdigest(),
            path=f"{ARTIFACTS}/{path.name}", flow="out",
        ),
    )  # fmt: skip
