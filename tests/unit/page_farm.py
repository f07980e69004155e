"""A farm with records of package builds of every kind, a repository, runs, a graph: for its pages. What
guests, sources and commits say in it is hostile."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from repo_tree import make_deb

from builds.packages.control import control_of_source
from builds.packages.drawing import GraphPicture, picture_of
from builds.packages.graph import SourcePackage, graph_of
from builds.packages.inputs import BuildInputs, InstalledPackage
from builds.packages.record import (
    ARTIFACTS,
    LOG,
    BuilderRecord,
    PackageAttempt,
    PackageOrigin,
    PackageRecord,
    PackageRecords,
)
from builds.packages.relations import BuildTarget
from builds.packages.runs import RunEntry, RunRecord, RunRecords
from builds.record import BuildRecord, FileRecord, SourceRecord, StepRecord, new_directory
from inventory.errors import Call
from inventory.loader import load
from provision.engine.registry import operation
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.site import Site

EVIL = "<script>alert('x')</script>\x1b[2J\u202e\"><img src=http://evil.example/>"
_FARM = """
farm: kata
hosts: {here: {driver: fake}}
templates: {base: {build: debian-12}}
vms: {dev2: {memory: 512M}, prod: {memory: 512M}, b1: {memory: 1G}, b2: {memory: 1G}}
repositories: {main: {format: deb, path: REPO, url: "http://packages.example.org/kata",
  channels: [experimental, stable]}}
packages: {hello: {git: /src/hello}}
build: {builders: [b1, b2], repository: main}
"""
_WHY = "its source changed: 1a2b3c4d5e6f before, 9f8e7d6c5b4a now"
_MESSAGE = f"hello.c:3:5: error: expected ';' {EVIL}"


class PageFarm:
    """Below ``root``, which is where farmhand's state is, too."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file = root / "farm.yaml"
        self.file.write_text(_FARM.replace("REPO", str(root / "repo")))
        with self.site() as site:
            site.prepare()
            self.paths = site.paths
            self.records = PackageRecords(site.paths)
            self.runs = RunRecords(site.paths)

    def site(self) -> Site:
        return Site(load(self.file), reporter=QuietReporter())

    def record(self, package: str = "hello", day: int = 1, **values: object) -> PackageRecord:
        """Saved, with its files."""
        number, directory = self.records.begin(package)
        deb = make_deb(package, f"1.{number}")
        (directory / ARTIFACTS).mkdir()
        file = f"{ARTIFACTS}/{package}_1.{number}_all.deb"
        (directory / file).write_bytes(deb)
        (directory / LOG).write_text(f"make\n{EVIL}\n")
        sum_ = hashlib.sha256(deb).hexdigest()
        named = FileRecord(name=Path(file).name, size=len(deb), sha256=sum_, path=file, flow="out")
        record = PackageRecord(
            package=package,
            name=package,
            number=number,
            farm="kata",
            run="20261129t100000z",
            result="passed",
            started=f"2026-11-{day:02}T10:00:00.000+00:00",
            ended=f"2026-11-{day:02}T10:01:00.000+00:00",
            seconds=20.0 + 7 * number,
            inputs=BuildInputs(
                format="deb", tree="1a" * 20, version=f"1.{number}", recipe="ab" * 32,
                template=f"base@3 {'cd' * 32} clean", architecture="amd64", options=("nocheck",),
                downloads={"data.tar.gz": "ef" * 32},
                installed=(
                    InstalledPackage(name="libbase-dev", version="2.0-1+42.gabc1234",
                                     architecture="amd64", sha256="12" * 32),
                    *(InstalledPackage(name=f"lib{n}-dev", version=f"1:{n}.0-1", architecture="amd64")
                      for n in range(40)),
                ),
            ),
            source=PackageOrigin(
                place="https://git.example.org/farm/hello.git", tree="1a" * 20, stated="1.0-1",
                when=1764410000, asked="main", commit="9f8e7d6c5b4a39281706f5e4d3c2b1a098765432",
                subject=f"Greet in more tongues {EVIL}", path="packages/hello",
            ),
            why=(_WHY, "libbase-dev was built otherwise"),
            builder=BuilderRecord(
                vm="b1", host="here", driver="fake", template="base@3", checkpoint="clean",
                pristine=True, memory=2**30, cpus=2, kernel="6.1.0-28-amd64", features="sse4_2 " * 60,
                user="farmhand-build", directory="/var/lib/farmhand-build/src", umask="0022",
                environment={"LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "1764410000"},
            ),
            repository="main",
            generation=12,
            tail="| dpkg-deb: building package\n| done",
            outputs=(named,),
            directory=directory,
        )  # fmt: skip
        record = replace(record, **values)  # type: ignore[arg-type]
        record.save()
        return record

    def failed(self, package: str = "hello", day: int = 1, **values: object) -> PackageRecord:
        return self.record(
            package, day, result="failed", failure="source", message=_MESSAGE, exit=2, outputs=(),
            remedy=("mend it, then ", Call("build", package=package)),
            tail="\n".join(f"| line {n} {'long ' * 40}{EVIL}" for n in range(60)),
            notes=(f"since it last passed: 9f8e7d6 Greet {EVIL}",), **values,
        )  # fmt: skip

    def died(self, package: str = "hello", day: int = 1) -> PackageRecord:
        """The VM did, twice."""
        record = self.record(
            package, day, result="failed", failure="infrastructure",
            message="b2: the connection was lost, and the VM is gone", outputs=(),
            console=f"[   12.3] Kernel panic - not syncing {EVIL}",
            attempts=(
                PackageAttempt(vm="b1", failure="infrastructure", message=f"the VM is gone {EVIL}",
                               seconds=8.0, directory="attempt-1"),
            ),
        )  # fmt: skip
        (record.directory / "attempt-1").mkdir()
        (record.directory / "attempt-1" / LOG).write_text(f"make all\n{EVIL}\n")
        return record

    def run(self, day: int, *entries: RunEntry, **values: object) -> RunRecord:
        record = RunRecord(
            id="", farm="kata", result="passed", started=f"2026-11-{day:02}T09:59:00.000+00:00",
            seconds=75.0, revision="main", builders=("b1", "b2"), repository="main",
            channel="experimental", packages=entries,
            directory=self.runs.top / f"202611{day:02}t100000z",
        )  # fmt: skip
        record = replace(record, id=record.directory.name, **values)  # type: ignore[arg-type]
        record.directory.mkdir(parents=True)
        record.save(durable=False)
        return record

    def cycle(self) -> BuildRecord:
        directory = new_directory(self.paths, "a" * 40)
        record = BuildRecord(
            id=directory.name, farm="kata", result="passed", started="2026-11-20T10:00:00+00:00",
            seconds=61.0, directory=directory,
            source=SourceRecord(repository="/kata", asked="HEAD", commit="a" * 40, subject=EVIL),
            steps=(StepRecord(name="build", kind="run", vm="dev2", status="passed", log="01-build.log",
                              started="2026-11-20T10:00:00+00:00", seconds=60.0),),
        )  # fmt: skip
        (directory / "01-build.log").write_text("built\n")
        record.save()
        return record

    def publish(self, record: PackageRecord, channel: str = "experimental") -> None:
        add = operation("repo-add")
        with self.site() as site:
            paths = tuple(record.directory / file.path for file in record.packages)
            perform(site, add(repo="main", channel=channel, paths=paths))


def picture(count: int = 8, *, wide: int = 3) -> GraphPicture:
    """Of packages that need some that come before."""
    packages = []
    for number in range(count):
        wanted = ", ".join(
            f"p{n:04}" for n in range(number - number % wide - wide, number - wide) if n >= 0
        )
        text = f"Source: p{number:04}\n" + (f"Build-Depends: {wanted}\n" if wanted else "")
        text += f"\nPackage: p{number:04}\nArchitecture: any\n"
        packages.append(SourcePackage(control_of_source(text.encode(), f"p{number:04}"), "1.0-1"))
    return picture_of(graph_of(packages, BuildTarget("amd64")))
