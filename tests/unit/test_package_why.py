"""Why a package is built, or is not: from records as `build` writes them, real repositories and git."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from cycle_farm import GIT
from test_package_graph import package

from builds.packages.commits import commits_between, since_passed
from builds.packages.graph import PackageBuild, SourcePackage, graph_of
from builds.packages.inputs import BuildInputs, InstalledPackage
from builds.packages.lookup import EarlierBuilds
from builds.packages.plan import Channel, PackagePlan, foresee, inputs_of, target
from builds.packages.record import PackageOrigin, PackageRecord, PackageRecords
from builds.packages.source import SourceState
from builds.packages.why import Asking, BuildReason, PackagesNow
from builds.record import FileRecord
from host.paths import FarmPaths
from host.run import Runner
from inventory.errors import NotFound
from inventory.loader import load
from inventory.packages import PackageBuilds, PackageSource
from provision.package_repositories import opened
from tests.debs import deb, fields
from tests.repos import RepoFarm

SETTINGS = PackageBuilds(builders=("b1",), repository="packages")


class Sources:
    """A farm's packages and what was built of them, without any VM."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.repository = RepoFarm(directory, "deb")
        self.records = PackageRecords(FarmPaths("try"))
        self.packages: dict[str, SourcePackage] = {}
        self.states: dict[str, SourceState] = {}
        self.template = "base@1 0123456789abcdef, clean"
        self.cleared = 0
        self.offered: dict[str, InstalledPackage] = {}
        self.running: dict[str, str] = {}

    def source(
        self, name: str, needs: str = "", *, tree: str = "a", version: str = "1.0-1", commit: str = "",
        repository: Path | None = None, **binaries: str,
    ) -> None:  # fmt: skip
        """Declare it, or commit to it."""
        made = self.packages[name] = package(name, needs, version, **binaries)
        self.states[name] = SourceState(
            name=name, format="deb", declared=PackageSource(git=f"src/{name}"), place=f"/src/{name}",
            tree=hashlib.sha1(tree.encode()).hexdigest(), stated=version, given=version, when=0,
            commit=commit or hashlib.sha1(f"{name} {tree}".encode()).hexdigest(), subject=f"Do {tree}",
            control=made.control, repository=repository,
        )  # fmt: skip

    def inputs(self, build: PackageBuild) -> BuildInputs:
        state = self.states[build.package.name]
        return inputs_of(build, state, SETTINGS, self.template, self.cleared)

    def plan(self) -> PackagePlan:
        graph = graph_of(self.packages.values(), target())
        repository = opened(load(self.repository.file))
        plan = PackagePlan(
            settings=SETTINGS, revision="HEAD", only_changed=False, cleared=False, states=self.states,
            graph=graph, wanted=tuple(graph.builds), asked=(), builders=("b1",),
            template=self.template,
            inputs={name: self.inputs(one) for name, one in graph.builds.items()},
            channel=Channel(repository, "experimental"), earlier=EarlierBuilds(self.records),
            records=self.records,
        )  # fmt: skip
        return replace(plan, foreseen=foresee(plan))

    def asking(self, **more: object) -> Asking:
        return Asking(PackagesNow(plan=self.plan(), running=self.running), **more)  # type: ignore[arg-type]

    def build(
        self, name: str, text: str = "", *, result: str = "passed", message: str = "",
        uses: str = "", outside: Mapping[str, str] | None = None,
    ) -> PackageRecord:  # fmt: skip
        """Its record, and if it passed its packages, whose file has that text. ``uses``: packages of
        ours that were installed for it."""
        state = self.states[name]
        inputs = self.inputs(PackageBuild(name, self.packages[name], target()))
        number, directory = self.records.begin(name)
        installed = [self.offered[each] for each in uses.split()]
        installed += [
            InstalledPackage(name=each, version=version, architecture="amd64")
            for each, version in (outside or {"libc6": "2.36"}).items()
        ]
        outputs = []
        (directory / "artifacts").mkdir()
        for binary in self.packages[name].control.binaries if result == "passed" else ():
            data = deb(fields(binary.name, state.given), {f"usr/{binary.name}": text.encode()})
            file = f"{binary.name}_{state.given}_amd64.deb"
            (directory / "artifacts" / file).write_bytes(data)
            sum_ = hashlib.sha256(data).hexdigest()
            outputs.append(FileRecord(name=file, size=len(data), sha256=sum_, path=f"artifacts/{file}"))
            self.offered[binary.name] = InstalledPackage(
                name=binary.name, version=state.given, architecture="amd64", sha256=sum_
            )
        record = PackageRecord(
            package=name, name=name, number=number, farm="try", run="r", started="", result=result,  # type: ignore[arg-type]
            inputs=replace(inputs, installed=tuple(installed)),
            source=PackageOrigin(
                place=state.place, tree=state.tree, stated=state.stated, when=0, commit=state.commit,
                subject=state.subject, path=state.path,
            ),
            outputs=tuple(outputs), directory=directory, message=message,
            failure="source" if result == "failed" else "", why=("it was never built",),
        )  # fmt: skip
        record.save()
        return record

    def publish(self, *records: PackageRecord) -> None:
        self.repository.add(*(one.directory / file.path for one in records for file in one.packages))


@pytest.fixture
def farm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sources]:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path / "state"))
    return Sources(tmp_path)


def lines(reasons: tuple[BuildReason, ...], depth: int = 0) -> list[str]:
    found = []
    for one in reasons:
        found.append(f"{'  ' * depth}{one.text}")
        found += lines(one.because, depth + 1)
    return found


def why(farm: Sources, name: str) -> list[str]:
    return lines(farm.asking().why(name).reasons)


def test_never_built_and_built(farm: Sources) -> None:
    farm.source("hello")
    found = farm.asking().why("hello")
    assert (found.last, lines(found.reasons), found.certain) == ("", ["it was never built"], True)
    farm.build("hello")
    found = farm.asking().why("hello")
    assert (found.last, found.reasons, found.certain) == ("hello/1", (), False)
    with pytest.raises(NotFound, match="no package 'helo' is built") as refused:
        farm.asking().why("helo")
    assert refused.value.remedy == "did you mean hello?"


def test_what_was_asked_for_has_changed(farm: Sources) -> None:
    farm.source("hello")
    farm.build("hello")
    farm.source("hello", tree="b")
    state = farm.states["hello"]
    (line,) = why(farm, "hello")
    assert line.startswith("the source: 86f7e437faa5 before, e9d71f5ee7c9 now")
    assert line.endswith(f"({state.commit[:10]} Do b)")
    farm.source("hello")
    farm.template = "base@2 fedcba9876543210, clean"
    farm.cleared = 1
    assert why(farm, "hello") == [
        "the builder's template: base@1 0123456789abcdef, clean before, base@2 fedcba9876543210, clean "
        "now",
        "GIT_REVISION is another, which has cleared the graph since",
    ]


def test_an_older_build_that_fits_is_as_good(farm: Sources) -> None:
    farm.source("hello")
    farm.build("hello")
    farm.source("hello", tree="b")
    farm.build("hello")
    farm.source("hello")
    assert (farm.asking().why("hello").last, why(farm, "hello")) == ("hello/1", [])


def test_the_last_build_failed(farm: Sources) -> None:
    farm.source("hello")
    farm.build("hello", result="failed", message="hello.c:1: error: x\nmore")
    assert why(farm, "hello") == ["hello/1 failed (source): hello.c:1: error: x"]
    farm.build("hello", result="running")
    assert why(farm, "hello") == ["hello/2 was interrupted"], "nobody builds it"
    farm.running = {"hello": "hello/2 on b1"}
    assert farm.asking().states() == {"hello": "running"}


def test_outputs_that_are_gone(farm: Sources) -> None:
    farm.source("hello")
    record = farm.build("hello")
    (record.directory / record.packages[0].path).unlink()
    assert why(farm, "hello") == ["of hello/1 hello_1.0-1_amd64.deb is gone"]


def chain(farm: Sources) -> None:
    """base <- libfoo <- hello, all built and published."""
    farm.source("base", libbase="")
    farm.source("libfoo", "libbase", libfoo1="", libfoo_dev="Depends: libfoo1")
    farm.source("hello", "libfoo-dev")
    farm.publish(
        farm.build("base"), farm.build("libfoo", uses="libbase"),
        farm.build("hello", uses="libfoo1 libfoo-dev"),
    )  # fmt: skip


def test_what_was_installed_down_to_the_first_cause(farm: Sources) -> None:
    chain(farm)
    assert [why(farm, name) for name in ("base", "libfoo", "hello")] == [[], [], []]
    farm.source("base", tree="b", version="1.0-2", libbase="")
    base = farm.build("base", "two")
    farm.source("libfoo", "libbase", version="1.0-2", libfoo1="", libfoo_dev="Depends: libfoo1")
    libfoo = farm.build("libfoo", "two", uses="libbase")
    farm.publish(base, libfoo)
    source = f"the source: 86f7e437faa5 before, e9d71f5ee7c9 now ({base.source.commit[:10]} Do b)"
    assert why(farm, "hello") == [
        "libfoo1: 1.0-1 -> 1.0-2, built as libfoo/2",
        "  the version: 1.0-1 before, 1.0-2 now",
        "  libbase: 1.0-1 -> 1.0-2, built as base/2",
        f"    {source}",
        "    the version: 1.0-1 before, 1.0-2 now",
        "libfoo-dev: 1.0-1 -> 1.0-2, built as libfoo/2",
        "  as above",
    ]
    farm.build("hello", "two", uses="libfoo1 libfoo-dev")
    assert why(farm, "hello") == [], "not published yet, and the same already"


def test_what_is_built_first_may_change_it(farm: Sources) -> None:
    chain(farm)
    farm.source("base", tree="b", libbase="")
    found = farm.asking().why("hello")
    assert not found.certain
    assert [(one.kind, one.text) for one in found.reasons] == [
        ("needs", "base, which it needs, is built first")
    ]
    assert found.reasons[0].because[0].text.startswith("the source: ")
    assert farm.asking().states() == {"base": "waiting", "libfoo": "waiting", "hello": "waiting"}


def test_other_bytes_of_the_same_are_said_to_be_so(farm: Sources) -> None:
    chain(farm)
    farm.source("libfoo", "libbase", version="1.0-1", libfoo1="", libfoo_dev="Depends: libfoo1")
    again = farm.build("libfoo", "by chance", uses="libbase")
    farm.repository.remove("libfoo1", "libfoo-dev")
    farm.publish(again)
    first, *_ = farm.asking().why("hello").reasons
    assert lines((first,)) == [
        "libfoo1: 1.0-1, with another content, built as libfoo/2",
        "  nothing known: libfoo/1 was made from the same",
    ]


def test_what_came_from_elsewhere(farm: Sources) -> None:
    chain(farm)
    farm.source("libfoo", "libbase", libfoo1="", libfoo_dev="Depends: libfoo1")
    again = farm.build("libfoo", "gcc", uses="libbase", outside={"libc6": "2.36", "gcc": "13"})
    farm.repository.remove("libfoo1", "libfoo-dev")
    farm.publish(again)
    first, *_ = farm.asking().why("hello").reasons
    assert lines(first.because) == ["from elsewhere: gcc 13"]


def test_what_the_repository_has_no_more(farm: Sources) -> None:
    farm.source("hello")
    farm.offered["old"] = InstalledPackage(
        name="old", version="1", architecture="amd64", sha256="a" * 64
    )
    farm.build("hello", uses="old")
    assert why(farm, "hello") == ["old 1: the repository has it no more"]


def test_the_way_down_is_told_once_however_many_ways_there_are(farm: Sources) -> None:
    """Ten layers of two: each of the second needs both of the first, and so on."""
    layers = 10
    for step in ("one", "two"):
        for layer in range(layers):
            below = [f"p{layer - 1}{side}" for side in "ab"] if layer else []
            for side in "ab":
                tree = step if not layer else "same"
                farm.source(f"p{layer}{side}", ", ".join(below), tree=tree, version=f"1-{step}")
                farm.build(f"p{layer}{side}", step, uses=" ".join(below))
    farm.source("top", "p9a, p9b", version="1")
    newest = dict(farm.offered)
    for name in list(farm.offered):  # as the first step left it
        first = farm.records.read(name, 1)
        file = first.packages[0]
        farm.offered[name] = replace(newest[name], version=first.version, sha256=file.sha256)
    farm.build("top", uses="p9a p9b")
    assert 20 < len(why(farm, "top")) < 200


def test_of_very_many_few_are_told(farm: Sources) -> None:
    farm.source("p00")
    for number in range(1, 40):
        farm.source(f"p{number:02}", f"p{number - 1:02}")
    found = farm.asking().why("p39").reasons
    assert [one.text for one in found[-2:]] == [
        "p19, which it needs, is built first", "so are 19 more that it needs"
    ]  # fmt: skip
    hindrances = farm.asking().why_not("p39").hindrances
    assert hindrances[-2].text == "waits for p19, which is to be built: it was never built"
    assert hindrances[-1].text == "waits for p18, p17, p16, p15, p14, p13 and 13 more, too"


def test_a_way_down_that_does_not_end(farm: Sources) -> None:
    for step in ("one", "two"):
        for number in range(80):
            below = f"p{number - 1}" if number else ""
            tree = step if not number else "same"
            farm.source(f"p{number}", below, tree=tree, version=f"1-{step}")
            farm.build(f"p{number}", step, uses=below)
    first = farm.records.read("p79", 1)
    farm.source("top", "p79", version="1")
    sum_ = first.packages[0].sha256
    farm.offered["p79"] = replace(farm.offered["p79"], version=first.version, sha256=sum_)
    farm.build("top", uses="p79")
    assert why(farm, "top")[-1].strip() == "and so on"


# -- why not ----------------------------------------------------------------------------------------


def hindered(farm: Sources, name: str, **more: object) -> list[tuple[str, str]]:
    return [(one.kind, one.text) for one in farm.asking(**more).why_not(name).hindrances]


def test_nothing_keeps_it(farm: Sources) -> None:
    farm.source("hello")
    assert hindered(farm, "hello") == []
    assert farm.asking().why_not("hello").built == ""
    farm.build("hello")
    assert farm.asking().why_not("hello").built == "hello/1"


def test_what_it_waits_for(farm: Sources) -> None:
    chain(farm)
    farm.source("base", tree="b", libbase="")
    farm.build("base", result="failed", message="no rule to make target")
    farm.source("lib2", "libbase", lib2="")
    farm.source("top", "lib2, libfoo-dev")
    farm.running = {"libfoo": "libfoo/2 on b1, by ann"}
    farm.build("libfoo", result="running")
    assert hindered(farm, "top", since=lambda *_: ["it last passed as base/1"]) == [
        ("waits", "waits for lib2, which is to be built: it was never built"),
        ("running", "libfoo is being built: libfoo/2 on b1, by ann"),
        ("failed", "waits for base: base/2 failed (source): no rule to make target"),
    ]
    last = farm.asking(since=lambda *_: ["it last passed as base/1"]).why_not("top").hindrances[-1]
    assert (last.build, last.more) == ("base", ("it last passed as base/1",))
    assert farm.asking().states() == {
        "base": "failed", "lib2": "skipped", "libfoo": "running", "hello": "waiting", "top": "skipped",
    }  # fmt: skip
    farm.source("base", tree="c", libbase="")
    assert farm.asking().states()["base"] == "waiting", "it is tried again, as another"
    found = farm.asking().why_not("base").hindrances
    assert found[0].more[-1].startswith("other than when it failed: the source: ")


def test_problems_of_the_graph(farm: Sources) -> None:
    farm.source("one", "libtwo")
    farm.source("two", "libone", libtwo="")
    farm.source("libone", "libtwo", libone="")
    farm.source("yin", "yang")
    farm.source("yang", "yin")
    farm.source("lone")
    found = hindered(farm, "one")
    assert [kind for kind, _ in found] == ["problem", "problem", "waits", "waits"]
    assert "libone -> two -> libone is a loop (" in found[0][1]
    assert found[1][1] == "1 problem of other packages keeps all from being built: see the graph"
    (only,) = hindered(farm, "lone")
    assert only[1] == "2 problems of other packages keep all from being built: see the graph"


# -- commits ----------------------------------------------------------------------------------------


class Repository:
    def __init__(self, top: Path) -> None:
        self.top = top
        top.mkdir()
        self.git("init", "-q", "-b", "main")

    def git(self, *args: str) -> str:
        done = subprocess.run([*GIT, "-C", self.top, *args], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit(self, subject: str, file: str = "a") -> str:
        path = self.top / file
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as out:
            out.write(subject)
        self.git("add", "-A")
        self.git("commit", "-qm", subject)
        return self.git("rev-parse", "HEAD")


def test_commits_between_two_builds(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "src")
    first = repository.commit("first")
    commits = [repository.commit(f"Change {number}", "p/a") for number in range(12)]
    other = repository.commit("Elsewhere\x1b[2J", "q/a")
    own = repository.top / ".git"
    found = commits_between(Runner(), own, first, other)
    assert [one.id for one in found.commits[1:]] == commits[:2:-1]
    assert len(found.lines()) == 11
    assert found.lines()[-1] == "and 3 more"
    assert found.lines()[0].startswith(f"{other[:10]} Elsewhere")
    assert "\x1b" not in found.lines()[0]
    within = commits_between(Runner(), own, first, other, "p")
    assert within.commits[0].id == commits[-1]
    assert within.more == 2
    assert commits_between(Runner(), own, other, other).lines() == ()
    (line,) = commits_between(Runner(), own, "0" * 40, other).lines()
    assert line.startswith("its commits are not known: ")
    assert commits_between(Runner(), None, first, other).why
    assert commits_between(Runner(), own, "--output=/tmp/x", other).why


def test_what_newly_fails_names_the_commits_since_it_passed(farm: Sources, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "src")
    own = repository.top / ".git"
    farm.source("hello", commit=repository.commit("first"), repository=own)
    assert since_passed(Runner(), farm.build("hello", result="failed"), None, own) == (
        "it never passed",
    )
    good = farm.build("hello")
    old = good.source.commit[:10]
    same = farm.build("hello", result="failed")
    (line,) = since_passed(Runner(), same, good, own)
    assert line == f"it last passed as hello/2, of the same commit {old}"
    farm.source("hello", tree="b", commit=repository.commit("Break it"), repository=own)
    bad = farm.build("hello", result="failed", message="broken")
    told = since_passed(Runner(), bad, good, own)
    assert told[0] == f"it last passed as hello/2, of commit {old}; since then:"
    assert len(told) == 2
    assert told[1].startswith(f"  {bad.source.commit[:10]} Break it (")
