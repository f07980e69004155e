"""Who is built before whom, and why; what is missing; what goes in circles; what one failure leaves."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_growth import counted

from builds.packages.archive import KnownPackages
from builds.packages.control import control_of_source
from builds.packages.drawing import as_svg, as_text
from builds.packages.graph import Graph, SourcePackage, graph_of
from builds.packages.problems import PackageLoop
from builds.packages.relations import BuildTarget
from inventory.errors import NotFound, WrongState
from tests import bench_packages

AMD64 = BuildTarget("amd64")
NOTHING = KnownPackages({})


def package(name: str, build: str = "", version: str = "1.0-1", **binaries: str) -> SourcePackage:
    """``binaries``: more lines of each, by its name with _ for -; none: one by the source's name."""
    fields = f"Build-Depends: {build}\n" if build else ""
    text = f"Source: {name}\n{fields}"
    for binary, lines in (binaries or {name: ""}).items():
        more = "".join(f"{line.strip()}\n" for line in lines.split(";") if line)
        text += f"\nPackage: {binary.replace('_', '-')}\n"
        text += more if "Architecture" in more else f"Architecture: any\n{more}"
    return SourcePackage(control_of_source(text.encode(), name), version)


def graph(
    *packages: SourcePackage, has: str = "", target: BuildTarget = AMD64, **bootstrap: str
) -> Graph:
    stages = {name: profiles.split() for name, profiles in bootstrap.items()}
    return graph_of(packages, target, KnownPackages.named(has.split()), stages)


def needs(found: Graph, name: str) -> list[str]:
    return [need.needs for need in found.needs(name)]


def problems(found: Graph) -> list[str]:
    return list(map(str, found.problems))


def test_layers() -> None:
    found = graph(
        package("app", "libtop-dev, debhelper"),
        package("top", "libbase-dev (>= 1.0)", libtop_dev="Depends: libtop1 (= ${x:V})", libtop1=""),
        package("base", libbase_dev=""),
        package("alone", "debhelper"),
        has="debhelper",
    )
    assert found.layers == (("alone", "base"), ("top",), ("app",))
    assert [found.layer(name) for name in found.builds] == [0, 0, 1, 2]
    assert needs(found, "app") == ["top"]
    assert found.dependants("base") == ("top", "app")
    assert not found.problems
    with pytest.raises(NotFound, match="no package 'ap' is built") as refused:
        found.needs("ap")
    assert refused.value.remedy == "did you mean app?"


def test_what_is_installed_with_a_build_dependency_is_built_before() -> None:
    """libb is nothing that a's own build wants, and the app names it nowhere."""
    found = graph(
        package("app", "liba-dev"),
        package("aa", liba_dev="Depends: ${x:Depends}, liba-data", liba_data="Pre-Depends: libb (>= 1)"),
        package("bb", libb=""),
    )
    assert needs(found, "app") == ["aa", "bb"]
    assert needs(found, "aa") == []
    way = found.needs("app")[1]
    assert not way.direct
    assert [str(step) for step in way.steps] == [
        "Build-Depends of app: liba-dev, from aa",
        "Depends of liba-dev: liba-data, from aa",
        "Pre-Depends of liba-data: libb (>= 1), from bb",
    ]
    assert found.layers == (("aa", "bb"), ("app",))


def test_who_need_each_other_at_run_time_alone_are_no_loop() -> None:
    found = graph(
        package("app", "one"),
        package("one", one="Depends: two"),
        package("two", two="Depends: one, three"),
        package("three", three="Depends: three-data", three_data="Depends: three"),
    )
    assert not found.problems
    assert needs(found, "app") == ["one", "three", "two"]
    assert found.layers == (("one", "three", "two"), ("app",))


@pytest.mark.parametrize(
    ("wanted", "has", "found"),
    [
        ("made", "made", ["maker"]),  # the set's own, whatever the archive has
        ("made | other", "other", ["maker"]),
        ("other | made", "other", []),  # the first that can be had
        ("other | made", "", ["maker"]),
        ("made (>= 2) | made", "", ["maker"]),
        ("made (>= 2)", "made", []),  # the set's is too old
        ("made (>= 1:0)", "made", []),
        ("made (>= 1.0~rc1)", "", ["maker"]),
        ("made (= 1.0-1)", "", ["maker"]),
        ("made [armhf], other", "other", []),
        ("made <cross>, made <stage1 nocheck>, other", "other", []),
        ("made <!cross>", "", ["maker"]),
        ("made:any", "made", []),  # it is not Multi-Arch: allowed
        ("tool:any", "", ["maker"]),
        ("made:native", "", ["maker"]),
        ("made:amd64", "", ["maker"]),
        ("made:armhf", "made", []),
        ("virtual", "virtual", ["maker"]),
        ("virtual (>= 1)", "virtual", []),  # provided without a version
        ("api (>= 3)", "", ["maker"]),
        ("api (>> 3)", "api", []),
        ("own (= 1.0-1)", "", ["maker"]),
        ("abi (= 7)", "", ["maker"]),  # of a version that the build makes
        ("arm-only", "arm-only", []),
        ("checked", "checked", []),
        ("special (= 5)", "", ["maker"]),
    ],
)
def test_which_dependencies_are_the_sets(wanted: str, has: str, found: list[str]) -> None:
    maker = package(
        "maker",
        made="Provides: virtual, api (= 3), own (= ${binary:Version}), abi (= ${a:V}), ${x:Provides}",
        tool="Multi-Arch: allowed",
        arm_only="Architecture: armhf",
        checked="Build-Profiles: <cross>",
        special="",
    )
    maker = SourcePackage(maker.control, maker.version, {"special": "5"})
    made = graph(package("user", wanted), maker, has=has)
    assert not made.problems
    assert needs(made, "user") == found


def test_a_version_that_is_not_known_yet_does() -> None:
    found = graph(package("user", "made (>= 9), made (<< 3)"), package("made", version=""))
    assert needs(found, "user") == ["made"]


def test_all_that_provide_a_name_are_waited_for() -> None:
    """But a real package is what apt takes, and nobody waits for themselves."""
    awks = [package(name, **{name: "Provides: awk"}) for name in ("mawk", "gawk")]
    assert needs(graph(package("user", "awk"), *awks), "user") == ["gawk", "mawk"]
    assert needs(graph(package("user", "awk"), package("awk"), *awks), "user") == ["awk"]
    own = package("user", "awk", user="Provides: awk")
    assert needs(graph(own, *awks), "user") == ["gawk", "mawk"]


def test_by_architecture_and_kind() -> None:
    text = (
        "Source: user\nBuild-Depends: base\nBuild-Depends-Arch: for-arch\n"
        "Build-Depends-Indep: for-all\n\nPackage: user\nArchitecture: any\n"
    )
    user = SourcePackage(control_of_source(text.encode(), "user"))
    others = [package(name) for name in ("base", "for-arch", "for-all")]
    assert needs(graph(user, *others), "user") == ["base", "for-all", "for-arch"]
    assert needs(graph(user, *others, target=BuildTarget("amd64", indep=False)), "user") == [
        "base", "for-arch",
    ]  # fmt: skip


def test_all_that_is_missing_is_named_at_once() -> None:
    found = graph(
        package("one", "gone-dev (>= 2) | never, old (>= 2), odd <!nocheck>, here"),
        package("two", "gone-dev (>= 2) | never, lib"),
        package("old"),
        package("odd", odd="Architecture: armhf"),
        package("lib", lib="Depends: vanished, ${shlibs:Depends}"),
        package("idle", idle="Depends: whatever"),  # nobody installs it for a build
        has="here old",
    )
    assert problems(found) == [
        "gone-dev (>= 2) | never is missing, for one (Build-Depends), two (Build-Depends)",
        "odd is missing, for one (Build-Depends); odd doesn't make odd for this target",
        "vanished is missing, for lib (Depends)",
    ]
    older = KnownPackages({"here": ("1",), "old": ("1.9", "1.8")}, {"gone-dev": (None, "2.1")})
    wants = package("one", "gone-dev (>= 2), old (>= 2), here (<< 1)")
    again = graph_of([wants, package("old")], AMD64, older)
    assert problems(again) == [
        "here (<< 1) is missing, for one (Build-Depends)",
        "old (>= 2) is missing, for one (Build-Depends); old makes old 1.0-1",
    ]
    with pytest.raises(WrongState, match=r"here .* is missing.*; old .* is missing") as refused:
        again.schedule()
    assert refused.value.remedy == "add the package that makes it, or a repository that has it"
    assert refused.value.detail.splitlines() == problems(again)
    assert not graph_of([package("one", "whatever (>= 9)")], AMD64).problems  # nothing is known


def test_what_two_make() -> None:
    found = graph(package("one", same=""), package("two", same=""), package("one"))
    assert problems(found) == ["source package one is there twice", "same is made by one and two"]


def test_what_a_build_needs_and_forbids() -> None:
    text = (
        "Source: user\nBuild-Depends: lib-dev\nBuild-Conflicts: bad (<< 2), gone, ok (>> 1.0-1)\n\n"
        "Package: user\nArchitecture: any\n"
    )
    found = graph_of(
        [
            SourcePackage(control_of_source(text.encode(), "user")),
            package("lib", lib_dev="Depends: bad, ok"),
            package("worse", bad=""),
            package("ok"),
        ],
        AMD64,
    )
    assert problems(found) == [
        "Build-Conflicts of user forbids bad (<< 2), and it needs bad (Build-Depends of user: lib-dev,"
        " from lib; Depends of lib-dev: bad, from worse)"
    ]


RING = (
    package("one", "two-bin <!nodoc> <stage1>", one_bin=""),
    package("two", "three-bin", two_bin=""),
    package("three", "four-bin, one-bin", three_bin=""),
    package("four", "one-bin", four_bin=""),
    package("user", "one-bin", user=""),
)


def test_the_shortest_loop_is_named_with_its_dependencies() -> None:
    found = graph(*RING)
    assert problems(found) == [
        "one -> two -> three -> one is a loop (Build-Depends of one: two-bin <!nodoc> <stage1>, from"
        " two; Build-Depends of two: three-bin, from three; Build-Depends of three: one-bin, from one);"
        " in loops with them: four"
    ]
    assert found.layers == (("four", "one", "three", "two"), ("user",))
    with pytest.raises(WrongState, match="one -> two -> three -> one is a loop"):
        found.schedule()


def test_each_knot_has_its_loop() -> None:
    pairs = [("aa", "bb"), ("bb", "aa"), ("cc", "dd"), ("dd", "cc"), ("ee", "aa")]
    found = graph(*(package(one, other) for one, other in pairs))
    assert [problem.partition(" is")[0] for problem in problems(found)] == [
        "aa -> bb -> aa", "cc -> dd -> cc",
    ]  # fmt: skip


def test_a_loop_by_what_is_installed() -> None:
    looped = graph(package("app", "tool", app="", libapp=""), package("tool", tool="Depends: libapp"))
    assert problems(looped) == [
        "app -> tool -> app is a loop (Build-Depends of app: tool, from tool;"
        " Depends of tool: libapp, from app)"
    ]


def test_an_earlier_version_of_itself_is_the_archives() -> None:
    compiler = package("ghc", "ghc (>= 0.9)")
    assert not graph(compiler, has="ghc").problems
    assert problems(graph(compiler)) == [
        "ghc -> ghc is a loop (Build-Depends of ghc: ghc (>= 0.9), from ghc)"
    ]
    staged = package("ghc", "ghc (>= 0.9) <!stage1>")
    assert graph(staged, ghc="stage1").layers == (("ghc (stage1)",), ("ghc",))


def test_a_bootstrap_breaks_a_loop() -> None:
    """Those in the loop get what it makes; others what the last build does, also by way of those."""
    packages = (
        package("glib", "docs <!nodoc>", glib_dev="", glib_doc="Build-Profiles: <!nodoc>"),
        package("docs", "parser", docs="Depends: parser"),
        package("parser", "glib-dev", parser="Depends: glib-dev"),
        package("app", "parser"),
        package("manual", "glib-doc"),
    )
    assert problems(graph(*packages)) == [
        "glib -> docs -> parser -> glib is a loop (Build-Depends of glib: docs <!nodoc>, from docs;"
        " Depends of docs: parser, from parser; Depends of parser: glib-dev, from glib);"
        " in loops with them: docs, parser"
    ]
    found = graph(*packages, glib="nodoc")
    assert not found.problems
    assert found.layers == (("glib (nodoc)",), ("parser",), ("docs",), ("glib",), ("app", "manual"))
    assert needs(found, "parser") == ["glib (nodoc)"]
    assert needs(found, "glib") == ["docs"]
    assert needs(found, "app") == ["glib", "parser"]
    assert found.builds["glib (nodoc)"].target.profiles == {"nodoc"}
    assert found.builds["glib (nodoc)"].bootstrap == ("nodoc",)


def test_a_bootstrap_is_built_only_where_it_is_needed() -> None:
    assert [*graph(package("one"), package("two", "one"), one="stage1").builds] == ["one", "two"]


def test_a_bootstrap_that_does_not_help() -> None:
    """The profile leaves the dependency in, or what is wanted out."""
    one = package("one", "two", one="")
    found = graph(one, package("two", "one"), one="stage1")
    assert [text.partition(" is")[0] for text in problems(found)] == [
        "one (stage1) -> two -> one (stage1)"
    ]
    left_out = package("one", "two <!stage1>", one="Build-Profiles: <!stage1>")
    found = graph(left_out, package("two", "one"), one="stage1")
    assert [text.partition(" is")[0] for text in problems(found)] == ["one -> two -> one"]
    with pytest.raises(NotFound, match="no package 'oen' to be built first") as refused:
        graph(one, oen="stage1")
    assert refused.value.remedy == "did you mean one?"


def test_what_a_bootstrap_alone_makes() -> None:
    found = graph(
        package("gcc", "libc-dev <!stage1>", gcc="", gcc_stage1="Build-Profiles: <stage1>"),
        package("libc", "gcc-stage1", libc_dev=""),
        gcc="stage1",
    )
    assert found.layers == (("gcc (stage1)",), ("libc",), ("gcc",))


def test_several_profiles_and_two_loops() -> None:
    found = graph(
        package("aa", "bb <!nodoc>, cc <!nocheck>"),
        package("bb", "aa, cc <!stage1>"),
        package("cc", "bb"),
        aa="nodoc nocheck",
        bb="stage1",
    )
    assert not found.problems
    assert found.layers == (("aa (nodoc nocheck)",), ("bb (stage1)",), ("cc",), ("aa", "bb"))


def test_a_loop_gets_another_loops_last_build() -> None:
    found = graph(
        package("aa", "bb <!stage1>"),
        package("bb", "aa"),
        package("cc", "dd <!stage1>, aa"),
        package("dd", "cc, bb"),
        aa="stage1",
        cc="stage1",
    )
    assert not found.problems
    assert needs(found, "cc (stage1)") == ["aa"]
    assert found.layers == (
        ("aa (stage1)",), ("bb",), ("aa",), ("cc (stage1)",), ("dd",), ("cc",),
    )  # fmt: skip


# ---- A schedule


def small() -> Graph:
    return graph(
        package("base"), package("one", "base"), package("two", "base"), package("top", "one, two"),
        package("tall", "top"), package("alone"),
    )  # fmt: skip


def test_a_schedule_from_end_to_end() -> None:
    run = small().schedule()
    assert run.ready() == ("base", "alone")  # what most wait for comes first
    run.begin("base")
    run.begin("alone")
    assert run.ready() == ()
    assert not run.ended
    run.done("base")
    assert run.ready() == ("one", "two")
    run.done("alone")
    run.begin("one")
    assert run.failed("one") == ("tall", "top")
    assert run.skipped == {"top": "one", "tall": "one"}
    assert not run.ended
    run.begin("two")
    run.done("two")
    assert run.ended
    assert run.states == {
        "base": "passed", "one": "failed", "two": "passed", "top": "skipped", "tall": "skipped",
        "alone": "passed",
    }  # fmt: skip


def test_a_schedule_of_some() -> None:
    """The others are there already, also where one of the set stands before them."""
    found = small()
    run = found.schedule(["top", "base"])
    assert run.ready() == ("base", "top")
    assert run.failed("base") == ()
    run.done("top")
    assert run.ended
    assert [*run.states] and set(run.states) == {"top", "base"}
    run = found.schedule(["base", "one", "tall"])
    assert run.ready() == ("base", "tall")
    assert run.failed("base") == ("one",)
    with pytest.raises(NotFound):
        found.schedule(["tal"])


def test_a_failed_bootstrap_skips_all_that_comes_after() -> None:
    found = graph(package("aa", "bb <!stage1>"), package("bb", "aa"), package("cc", "aa"), aa="stage1")
    assert found.schedule().failed("aa (stage1)") == ("aa", "bb", "cc")


# ---- Against a model that has no cleverness


@st.composite
def sets(draw: st.DrawFn) -> Mapping[str, tuple[list[str], list[str]]]:
    """Build dependencies and run-time ones of packages with one binary each."""
    names = [f"p{n}" for n in range(draw(st.integers(1, 7)))]
    some = st.lists(st.sampled_from(names), max_size=2, unique=True)
    return {name: (draw(some), draw(some)) for name in names}


def loops(found: Graph) -> list[PackageLoop]:
    return [each for each in found.problems if isinstance(each, PackageLoop)]


def installed(set_: Mapping[str, tuple[list[str], list[str]]], wanted: Sequence[str]) -> set[str]:
    found = set(wanted)
    while more := {each for name in found for each in set_[name][1]} - found:
        found |= more
    return found


def made(set_: Mapping[str, tuple[list[str], list[str]]]) -> list[SourcePackage]:
    return [
        package(name, ", ".join(build), **{name: f"Depends: {', '.join(run)}" if run else ""})
        for name, (build, run) in set_.items()
    ]


@settings(max_examples=150, deadline=None)
@given(sets(), st.randoms(use_true_random=False))
def test_any_set_is_built_in_an_order_that_holds(
    set_: Mapping[str, tuple[list[str], list[str]]], chance: random.Random
) -> None:
    before = {name: installed(set_, build) for name, (build, _) in set_.items()}
    after = dict(before)
    for _ in set_:
        after = {name: ends.union(*(after[end] for end in ends)) for name, ends in after.items()}
    looped = {name for name, ends in after.items() if name in ends}
    packages = made(set_)
    found = graph_of(packages, AMD64, NOTHING)
    chance.shuffle(packages)
    assert as_text(graph_of(packages, AMD64, NOTHING)) == as_text(found)
    named = loops(found)
    assert {name for loop in named for name in (*loop.builds, *loop.others)} == looped
    for loop in named:
        for one, other in pairwise((*loop.builds, loop.builds[0])):
            assert other in before[one]
    if looped:
        return
    reached = {name: set(needs(found, name)) for name in set_}
    for _ in set_:
        reached = {name: ends.union(*(reached[end] for end in ends)) for name, ends in reached.items()}
    assert reached == after
    assert {name: {one for one in set_ if name in after[one]} for name in set_} == {
        name: set(found.dependants(name)) for name in set_
    }
    for one, other in combinations(set_, 2):
        assert found.layer(one) > found.layer(other) if other in after[one] else True
    _run(found, before, after, chance)


def _run(
    found: Graph, before: Mapping[str, set[str]], after: Mapping[str, set[str]], chance: random.Random
) -> None:
    """Two builders, and some that fail."""
    run, running, passed, failed = found.schedule(), list[str](), set[str](), set[str]()
    while not run.ended:
        ready = run.ready()
        assert set(ready) == {
            name
            for name in before
            if before[name] <= passed and name not in {*passed, *failed, *running}
        }
        for name in ready[: 2 - len(running)]:
            run.begin(name)
            running.append(name)
        name = running.pop(chance.randrange(len(running)))
        if chance.random() < 0.2:
            failed.add(name)
            run.failed(name)
        else:
            passed.add(name)
            run.done(name)
    assert set(run.skipped) == {name for name in before if after[name] & failed}
    assert all(run.skipped[name] in after[name] & failed for name in run.skipped)
    assert passed | failed | set(run.skipped) == set(before)


@settings(max_examples=150, deadline=None)
@given(sets())
def test_no_shorter_loop_is_there(set_: Mapping[str, tuple[list[str], list[str]]]) -> None:
    """In steps from package to package, at build time or at run time."""
    found = graph_of(made(set_), AMD64, NOTHING)
    for loop in loops(found):
        inside = (*loop.builds, *loop.others)
        assert len(loop.steps) + len(loop.builds) == min(_shortest(set_, name) for name in inside)


def _shortest(set_: Mapping[str, tuple[list[str], list[str]]], start: str) -> int:
    """Dependencies and builds on the shortest way from a build to itself."""
    best = {("build", start): 0}
    wanted, back = [("build", start)], 10**6
    while wanted:
        kind, name = wanted.pop(0)
        paid = best[kind, name]
        for other in set_[name][0 if kind == "build" else 1]:
            for to, cost in ((("installed", other), paid + 1), (("build", other), paid + 2)):
                if to == ("build", start):
                    back = min(back, cost)
                elif cost < best.get(to, back):
                    best[to] = cost
                    wanted.append(to)
    return back


# ---- Cost


def test_the_work_grows_as_the_set_does() -> None:
    """Calls of functions are counted, from the text to the schedule."""
    work = {}
    for count in (60, 600):
        texts = [bench_packages.control(n) for n in range(count)]
        bench_packages.ordered(iter(texts))  # what is looked up once
        with counted() as done:
            found = bench_packages.ordered(iter(texts))
        assert len(found.builds) == count
        work[count] = done["calls"]
    assert work[600] / work[60] < 11.5, work


@pytest.mark.parametrize("shape", ["chain", "ring", "star", "run-time chain"])
def test_the_worst_shapes(shape: str) -> None:
    """No depth is too deep, and no work is done again for each."""
    work = {}
    for count in (100, 1000):
        packages = list(_shaped(shape, count))
        with counted() as done:
            found = graph_of(packages, AMD64, NOTHING)
        assert len(found.builds) == count
        assert bool(found.problems) is (shape == "ring")
        assert all(len(str(problem)) < 2000 for problem in found.problems)
        work[count] = done["calls"]
    assert work[1000] / work[100] < 11, work


def _shaped(shape: str, count: int) -> Iterator[SourcePackage]:
    for n in range(count):
        build = f"p{n - 1}" if n else f"p{count - 1}" if shape == "ring" else ""
        if shape == "star":
            build = "p0" if n else ""
        run = f"Depends: p{n - 1}" if n and shape == "run-time chain" else ""
        yield package(f"p{n}", build, **{f"p{n}": run})


# ---- Drawings


def test_as_text() -> None:
    found = graph(package("app", "liba"), package("lib", liba="Depends: data"), package("data"))
    assert as_text(found) == "layer 1\n  data\n  lib\nlayer 2\n  app  <- lib (data)\n"
    assert as_text(found, {"app": "waiting"}, {"app"}) == "layer 1\n  app  waiting  <- lib (data)\n"
    drawn = as_svg(found, "some", {"app": "failed"}, {"app", "data"})
    assert re.findall(r'class="build (\w+)"><title>(\w+)', drawn) == [
        ("waiting", "data"), ("failed", "app")
    ]  # fmt: skip
    assert drawn.count("<path class=") == 1
    shown = as_text(found, {"data": "passed", "lib": "running", "app": "waiting"})
    assert shown.splitlines()[1:3] == ["  data  passed", "  lib   running"]
    assert as_text(graph(package("one", "one"))).splitlines()[-1].startswith("one -> one is a loop")


def test_as_svg(tmp_path: Path) -> None:
    found = graph(*RING, package("data"), package("app", "liba"), package("lib", liba="Depends: data"))
    text = as_svg(found, "the set of <me> & you", {"data": "passed", "lib": "failed"})
    top = ElementTree.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    assert not re.search(r"href|<script|url\(|@import", text)
    groups = {each.findtext(f"{svg}text"): each for each in top.iter(f"{svg}g")}
    assert set(groups) == set(found.builds)
    assert groups["data"].get("class") == "build passed"
    assert groups["app"].get("class") == "build waiting"
    assert top.findtext(f"{svg}title") == "the set of <me> & you"
    lines = {
        (line.findtext(f"{svg}title") or "").partition(":")[0]: line for line in top.iter(f"{svg}path")
    }
    assert lines["app needs data"].get("class") == "run"
    assert lines["app needs lib"].get("class") == ""
    assert lines["one needs two"].get("class") == "loop"
    assert len(lines) == sum(len(found.needs(name)) for name in found.builds)
    boxes = [group.find(f"{svg}rect") for group in groups.values()]
    places = [
        tuple(int(box.get(name) or 0) for name in ("x", "y", "width", "height"))
        for box in boxes
        if box is not None
    ]
    for (x, y, width, height), (x2, y2, width2, height2) in combinations(places, 2):
        assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
    _, _, width, height = map(float, (top.get("viewBox") or "").split())
    assert all(x + w <= width and y + h <= height for x, y, w, h in places)
    for line in lines.values():
        numbers = [float(number) for number in re.findall(r"-?\d+", line.get("d") or "")]
        if line.get("class") != "loop":
            assert numbers[0] < numbers[-2]  # from left to right


def test_no_line_goes_behind_a_box() -> None:
    """Each of a column's passing lines has its own place there, however many go on from it."""
    found = bench_packages.ordered(bench_packages.control(n) for n in range(40))
    top = ElementTree.fromstring(as_svg(found, "many"))
    svg = "{http://www.w3.org/2000/svg}"
    columns: dict[int, list[tuple[int, int]]] = {}
    for group in top.iter(f"{svg}g"):
        box = group.find(f"{svg}rect")
        assert box is not None
        y = int(box.get("y") or 0)
        columns.setdefault(int(box.get("x") or 0), []).append((y, y + int(box.get("height") or 0)))
    passing = set()
    for line in top.iter(f"{svg}path"):
        for x, y in re.findall(r" (\d+) (\d+)H", line.get("d") or ""):
            passing.add((int(x), int(y), (line.findtext(f"{svg}title") or "").split()[2]))
            assert not any(low <= int(y) <= high for low, high in columns[int(x)])
    assert len({(x, y) for x, y, _ in passing}) == len(passing) > 40


def test_a_drawing_of_nothing() -> None:
    ElementTree.fromstring(as_svg(graph(), "nothing"))
    assert as_text(graph()) == ""
