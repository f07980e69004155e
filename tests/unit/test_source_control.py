"""debian/control is read and judged as dpkg does it: its own modules are asked."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dpkg_perl import DpkgPerl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builds.packages import architectures
from builds.packages.archive import KnownPackages
from builds.packages.control import SourceControl, control_of_source
from builds.packages.graph import SourcePackage, graph_of
from builds.packages.problems import Lacking
from builds.packages.relations import BuildTarget, applying, clauses_of, holds, shown
from inventory.errors import Unfit, WrongState
from repositories.packed import Damaged

AMD64 = BuildTarget("amd64")
WHOLE = """\
# Generated from control.in: edit that.

Source: asterisk-chan-sccp
Section: net
Priority: optional
Maintainer: Pkg VoIP <voip@example.org>
Uploaders: One <one@example.org>,
# Two has left
           Three <three@example.org>,
Build-Depends:
 debhelper-compat (= 13),
# comments stand anywhere
 asterisk-dev (>= 1:16.2.0~dfsg-1) | asterisk16-dev,
\tlibfoo-dev:native (<< 2.0+really1.9~),
 gcc-multilib [amd64 i386],
 libasound2-dev [linux-any !armhf],
 libkqueue-dev [!linux-any],
 dh-python:any <!nocheck> <cross>,
 g++ (>>4:8) [any-amd64] <!stage1 !nodoc>,
Build-Depends-Arch: libtool (>= 2.4) , pkg-config(>=0.29),
build-depends-indep: doxygen (>= 1.9) <!nodoc>, graphviz <!nodoc>
Build-Conflicts: autoconf2.13, libbar-dev (<= 3) [armhf]
Build-Conflicts-Indep: texlive-full
Standards-Version: 4.6.2
XS-Python-Version: >= 3.9
Vcs-Git: https://example.org/x.git -b debian [sub]

Package: asterisk-chan-sccp
Architecture: any
Pre-Depends: ${misc:Pre-Depends}, dpkg (>= 1.17.5)
Depends: ${shlibs:Depends}, ${misc:Depends}, asterisk-${abi},
# the rest comes from the build
         chan-common (= ${source:Version}), adduser | base-passwd:any (>= 3.5) [linux-any] <!cross>,
         libfoo1 ${foo:Version}
Provides: asterisk-channel, chan-api (= ${binary:Version}), chan-sccp-abi (= 2), ${python3:Provides}
Description: SCCP
 Text with Field: colons.
 .
   verbatim

Package: chan-common
Architecture: all
Multi-Arch: foreign
Build-Profiles: <!nodoc> <pkg.chan.docs stage2>
Description: data
   \t
Package: chan-debug
Package-Type: deb
Architecture: linux-any kfreebsd-amd64
Description: last line without an end"""


@pytest.fixture(scope="module")
def dpkg() -> Iterator[DpkgPerl]:
    with DpkgPerl() as found:
        yield found


def test_unmet_build_dependencies_are_what_dpkg_checkbuilddeps_says(tmp_path: Path) -> None:
    """The program itself, on the whole file: what is installed there is what the archive has here."""
    there = {
        "debhelper-compat": "13",
        "libfoo-dev": "2.0",
        "asterisk16-dev": "1",
        "g++": "4:8",
        "libtool": "2.4",
    }
    for sub in ("updates", "info", "debian"):
        (tmp_path / sub).mkdir()
    (tmp_path / "status").write_text(
        "".join(
            f"Package: {name}\nStatus: install ok installed\nVersion: {version}\nArchitecture: amd64\n\n"
            for name, version in there.items()
        )
    )
    (tmp_path / "debian/control").write_text(WHOLE)
    said = subprocess.run(
        ["dpkg-checkbuilddeps", "-I", "-aamd64", f"--admindir={tmp_path}", tmp_path / "debian/control"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C", "DEB_BUILD_PROFILES": ""},
    )
    _, _, unmet = said.stderr.strip().partition("Unmet build dependencies: ")
    archive = KnownPackages({name: (version,) for name, version in there.items()})
    package = SourcePackage(control_of_source(WHOLE.encode(), "x"))
    missing = [
        each.what for each in graph_of([package], AMD64, archive).problems if isinstance(each, Lacking)
    ]
    assert missing
    assert sorted(_items(unmet)) == sorted(missing)


def _items(unmet: str) -> list[str]:
    """Each with its version, without its conditions."""
    plain = re.sub(r" \[[^]]*\]| <[^>=<][^>]*>", "", unmet)
    return re.findall(r"\S+(?: \([^)]*\))?", plain)


def wants(control: SourceControl, target: BuildTarget) -> list[str]:
    return [f"{field}: {shown(clause)}" for field, clause in control.wants(target)]


def test_a_whole_file() -> None:
    control = control_of_source(WHOLE.encode(), "x")
    assert control.name == "asterisk-chan-sccp"
    assert wants(control, AMD64) == [
        "Build-Depends: debhelper-compat (= 13)",
        "Build-Depends: asterisk-dev (>= 1:16.2.0~dfsg-1) | asterisk16-dev",
        "Build-Depends: libfoo-dev:native (<< 2.0+really1.9~)",
        "Build-Depends: gcc-multilib",
        "Build-Depends: libasound2-dev",
        "Build-Depends: dh-python:any",
        "Build-Depends: g++ (>> 4:8)",
        "Build-Depends-Arch: libtool (>= 2.4)",
        "Build-Depends-Arch: pkg-config (>= 0.29)",
        "Build-Depends-Indep: doxygen (>= 1.9)",
        "Build-Depends-Indep: graphviz",
    ]
    hurd = BuildTarget("hurd-i386", frozenset(("nocheck", "nodoc")), indep=False)
    assert wants(control, hurd)[3:] == [
        "Build-Depends: libasound2-dev",  # for dpkg !armhf is whatever isn't, also after linux-any
        "Build-Depends: libkqueue-dev",
        "Build-Depends-Arch: libtool (>= 2.4)",
        "Build-Depends-Arch: pkg-config (>= 0.29)",
    ]
    assert [shown(clause) for _, clause in control.forbids(AMD64)] == ["autoconf2.13", "texlive-full"]
    assert [shown(c) for _, c in control.forbids(BuildTarget("armhf", indep=False))] == [
        "autoconf2.13", "libbar-dev (<= 3)",
    ]  # fmt: skip
    chan, common, debug = control.binaries
    assert [shown(clause) for clauses in chan.depends.values() for clause in clauses] == [
        "dpkg (>= 1.17.5)",
        "chan-common (= ${source:Version})",
        "adduser | base-passwd:any (>= 3.5)",
        "libfoo1",
    ]
    assert [shown(clause) for clause in chan.provides] == [
        "asterisk-channel", "chan-api (= ${binary:Version})", "chan-sccp-abi (= 2)",
    ]  # fmt: skip
    assert common.multi_arch == "foreign"
    for profiles, made in (("", True), ("nodoc", False), ("nodoc stage2 pkg.chan.docs", True)):
        assert common.made_for(BuildTarget("amd64", frozenset(profiles.split()))) is made
    assert [debug.made_for(BuildTarget(name)) for name in ("armhf", "kfreebsd-amd64", "hurd-i386")] == [
        True, True, False,
    ]  # fmt: skip
    assert not common.made_for(BuildTarget("amd64", indep=False))
    assert not chan.made_for(BuildTarget("amd64", arch=False))


GOOD = {
    "whole": WHOLE,
    "lines end as DOS has them": "Source: xx\r\n\r\nPackage: yy\r\nArchitecture: any\r\n",
    "comments alone": "# a\n\n# b\nSource: xx\n#\n\n#c\n\nPackage: yy\nArchitecture: all\n#end\n",
    "blanks part stanzas": "Source: xx\n \t\nPackage: yy\nArchitecture: any\n\n\n \n",
    "fields in any case": "SOURCE: xx\n\npackage: yy\narchitecture: any\n",
}
BAD = {
    "empty": ("", "its control file's first stanza has no field Source"),
    "no source": ("Package: xx\nArchitecture: any\n", "first stanza has no field Source"),
    "no architecture": ("Source: xx\n\nPackage: xx\n", "package's stanza has no field Architecture"),
    "no package": ("Source: xx\n\nArchitecture: all\n", "package's stanza has no field Package"),
    "twice": ("Source: xx\nsource: yy\n\nPackage: y\n", r"two fields source \(line 2\)"),
    "begun by a blank": ("# a\n b\nSource: xx\n", "line 2 of its control file is no field"),
    "hyphen": ("Source: xx\n-A: b\n\nPackage: yy\nArchitecture: any\n", "line 2 of its"),
}  # fmt: skip
OURS_ALONE = {
    "no field": ("Source: xx\nwords\n\nPackage: yy\nArch: any\n", "line 2 of .* is no field: words"),
    "two packages": ("Source: xx\n" + "\nPackage: yy\nArchitecture: any\n" * 2, "two packages yy"),
    "no binaries": ("Source: xx\n", "no binary package"),
    "path": ("Source: ../x\n\nPackage: yy\nArchitecture: any\n", "its Source has '../x'"),
    "path of a package": ("Source: xx\n\nPackage: yy/z\nArchitecture: any\n", "its Package has 'yy/z'"),
    "control character": ("Source: x\x1b[2J\n", r"control character: '\\x1b' in line 1"),
    "no text": ("Source: \udcff\n", "no UTF-8 at byte 8"),
    "profiles": ("Source: xx\n\nPackage: yy\nArchitecture: any\nBuild-Profiles: nodoc\n",
                 "its Build-Profiles of yy has 'nodoc'"),
    "substvar": ("Source: xx\nBuild-Depends: ${a:B}\n\nPackage: yy\nArchitecture: any\n",
                 r"its Build-Depends has '\$\{a:B\}', which dpkg can't read"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_dpkg_takes_is_taken(name: str, tmp_path: Path, dpkg: DpkgPerl) -> None:
    (tmp_path / "control").write_bytes(GOOD[name].encode())
    control = control_of_source(GOOD[name].encode(), "x")
    found = [f"{each.name}={' '.join(each.architectures)}" for each in control.binaries]
    assert " ".join((control.name, *found)) == dpkg.ask("control", str(tmp_path / "control"))


@pytest.mark.parametrize("name", BAD)
def test_what_dpkg_refuses_is_refused(name: str, tmp_path: Path, dpkg: DpkgPerl) -> None:
    text, why = BAD[name]
    (tmp_path / "control").write_bytes(text.encode())
    if name != "empty":  # of which dpkg makes nothing
        assert dpkg.ask("control", str(tmp_path / "control")) == "!"
    with pytest.raises(Unfit, match=f"^deb of me: .*{why}"):
        control_of_source(text.encode(), "deb of me")


@pytest.mark.parametrize("name", OURS_ALONE)
def test_what_nobody_can_build_is_refused(name: str) -> None:
    text, why = OURS_ALONE[name]
    with pytest.raises(Unfit, match=why) as refused:
        control_of_source(text.encode(errors="surrogateescape"), "me")
    assert str(refused.value).isprintable()


def test_sizes_are_bounded() -> None:
    begin = "Source: xx\n\nPackage: yy\nArchitecture: any\nDescription: "
    control_of_source((begin + "a" * 4_000_000).encode(), "me")
    with pytest.raises(Unfit, match="larger than 4M"):
        control_of_source((begin + "a" * 5_000_000).encode(), "me")
    many = "".join(f"\nPackage: y{n}\nArchitecture: all\n" for n in range(5001))
    with pytest.raises(Unfit, match="its Build-Depends has more than 10000 packages"):
        control_of_source(
            f"Source: xx\nBuild-Depends: {'a,' * 10_001}\n\nPackage: yy\nArchitecture: all\n".encode(),
            "me",
        )
    with pytest.raises(Unfit, match="more than 5000 packages"):
        control_of_source(f"Source: xx\n{many}".encode(), "me")


@pytest.mark.parametrize(
    "part", ["x ", "(", "x (= 1", "x [", "x <", "<!a> ", " ", "x:a", "[a", "x,", "x|", "${"]
)
def test_no_text_takes_long(part: str) -> None:
    """What is almost a relation; where parts of it were tried again and again, this would never end."""
    for text in (part * 200_000, "x (>= 1) " + part * 200_000, "x <a " + part * 200_000):
        for binary in (False, True):
            try:
                clauses_of(text, "Depends", binary=binary)
            except Damaged as error:
                assert len(str(error)) < 200


NAMES = ("foo", "libbar-dev", "g++", "x11")
ARCHITECTURES = (
    "amd64", "i386", "armhf", "x32", "arm64", "hurd-i386", "kfreebsd-amd64", "musl-linux-armhf", "none",
    "any", "linux-any", "any-amd64", "any-arm", "musl-any-any", "gnu-linux-any", "any-any-any-any",
    "linux-amd64", "hurd-any", "kfreebsd-any", "base-gnu-linux-amd64", "eabihf-any-any-any", "all",
    "Linux-ANY",
)  # fmt: skip
PROFILES = ("nocheck", "nodoc", "cross", "stage1", "pkg.foo.bar")
TARGETS = [
    BuildTarget(architecture, frozenset(profiles))
    for architecture in ("amd64", "armhf", "hurd-i386", "x32", "musl-linux-armhf")
    for profiles in ((), ("nocheck",), ("stage1", "cross", "nodoc"))
]
VERSIONS = st.from_regex(r"([0-2]:)?[0-2][0-2.+~a-]{0,3}[0-2a+~](-[0-2~]{1,2})?", fullmatch=True)
bangs = st.sampled_from(("", "!"))


@st.composite
def relations(draw: st.DrawFn, *, conditions: bool = True) -> str:
    blank = st.sampled_from(("", " ", "  "))
    text = draw(st.sampled_from(NAMES))
    text += draw(st.sampled_from(("", "", ":any", ":native", ":amd64", ":armhf")))
    if draw(st.booleans()):
        operator = draw(st.sampled_from(("<<", "<=", "=", ">=", ">>", "<", ">")))
        text += f"{draw(blank)}({draw(blank)}{operator}{draw(blank)}{draw(VERSIONS)}{draw(blank)})"
    if not conditions:
        return text
    if draw(st.booleans()):
        names = draw(st.lists(st.tuples(bangs, st.sampled_from(ARCHITECTURES)), min_size=1, max_size=3))
        text += f"{draw(blank)}[{draw(blank)}{' '.join(map(''.join, names))}{draw(blank)}]"
    for _ in range(draw(st.integers(0, 3))):
        terms = draw(st.lists(st.tuples(bangs, st.sampled_from(PROFILES)), min_size=1, max_size=3))
        text += f" <{draw(blank)}{' '.join(map(''.join, terms))}{draw(blank)}>"
    return text


GROUPS = st.lists(relations(), min_size=1, max_size=3).map(" | ".join)
FIELDS = st.lists(GROUPS, max_size=4).map(" , ".join)


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(FIELDS, st.sampled_from(TARGETS))
def test_conditions_are_judged_as_dpkg_does(dpkg: DpkgPerl, text: str, target: BuildTarget) -> None:
    left = applying(clauses_of(text, "Build-Depends"), target)
    said = dpkg.ask("left", target.architecture, " ".join(sorted(target.profiles)), text)
    assert ", ".join(map(shown, left)) == said


def test_every_architecture_is_matched_as_dpkg_does(dpkg: DpkgPerl) -> None:
    known = dpkg.ask("valid").split()
    assert len(known) > 400
    for real in (*known[::7], "amd64", "arm64ilp32", "powerpcspe", "mips64r6el", "uclibc-linux-armel"):
        for alias in (*ARCHITECTURES[:-1], *known[::41], real):
            said = dpkg.ask("is", real, alias) == "1"
            assert architectures.matches(real, alias) is said, (real, alias)


@given(st.lists(st.tuples(bangs, st.sampled_from(ARCHITECTURES)).map("".join), min_size=1, max_size=4))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_lists_of_architectures(dpkg: DpkgPerl, names: list[str]) -> None:
    for real in ("amd64", "armhf", "hurd-i386", "kfreebsd-amd64"):
        said = dpkg.ask("concerned", real, " ".join(names)) == "1"
        assert architectures.concerned(real, names) is said


def test_without_dpkgs_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_TABLES", tmp_path)
    architectures._tuples.cache_clear()
    with pytest.raises(WrongState, match="cputable can't be read: No such file") as refused:
        architectures.matches("amd64", "some-any")
    assert "dpkg" in str(refused.value.remedy)


def test_an_empty_formula_holds() -> None:
    assert holds((), ())


binaries = st.fixed_dictionaries(
    {
        "name": st.sampled_from(NAMES),
        "architecture": st.sampled_from(("any", "all")),
        "multi": st.sampled_from(("no", "same", "foreign", "allowed")),
        "version": VERSIONS,
        "provides": st.lists(
            st.tuples(st.sampled_from((*NAMES, "virtual")), st.none() | VERSIONS), max_size=2
        ),
    }
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(binaries, min_size=1, max_size=3, unique_by=lambda one: one["name"]),
    st.lists(relations(conditions=False), min_size=1, max_size=6),
)
def test_what_the_set_makes_answers_as_if_it_was_installed(
    dpkg: DpkgPerl, made: list[dict[str, object]], texts: list[str]
) -> None:
    """Names, versions, architectures and virtual packages: dpkg-checkbuilddeps' own evaluation."""
    dpkg.ask("forget")
    packages = []
    for number, one in enumerate(made):
        provides = ", ".join(
            name + (f" (= {version})" if version else "")
            for name, version in one["provides"]  # type: ignore[attr-defined]
        )
        multi = "foreign" if (one["architecture"], one["multi"]) == ("all", "same") else one["multi"]
        control = (
            f"Source: s{number}\n\nPackage: {one['name']}\nArchitecture: {one['architecture']}\n"
            f"Multi-Arch: {multi}\n" + (f"Provides: {provides}\n" if provides else "")
        )
        packages.append(SourcePackage(control_of_source(control.encode(), "x"), str(one["version"])))
        real = "all" if one["architecture"] == "all" else "amd64"
        dpkg.ask("package", str(one["name"]), str(one["version"]), real, str(multi))
        if provides:
            dpkg.ask("provides", provides, str(one["name"]))
    for text in texts:
        user = f"Source: user\nBuild-Depends: {text}\n\nPackage: user-bin\nArchitecture: all\n"
        packages.append(SourcePackage(control_of_source(user.encode(), "x"), "1"))
        graph = graph_of(packages, AMD64, KnownPackages({}))
        packages.pop()
        assert bool(graph.problems) is (dpkg.ask("met", "amd64", text) == "0"), (made, text)
        assert bool(graph.needs("user")) is not bool(graph.problems)
