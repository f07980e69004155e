"""What versions packages are built as: judged by dpkg and rpm themselves."""

from __future__ import annotations

import subprocess
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st
from package_farm import (
    PackageFarm,
    changelog,
    commit,
    deb_files,
    farm,  # noqa: F401 - a fixture
    repository,
    rpm_files,
)

from builds.packages.record import RecordKey
from builds.packages.source import SourceState
from builds.packages.sources import pack
from builds.packages.spec import spec_of, with_release
from builds.packages.versions import (
    again,
    contradicted,
    foreign_versions,
    given,
    ungiven,
    with_version,
)
from builds.record import FileRecord
from host.run import Runner
from inventory.errors import WrongState
from inventory.packages import PackageSource
from repositories.deb.changelog import newest, parsed
from repositories.deb.control import compare, is_version
from repositories.package import Package
from repositories.rpm.format import RpmFormat

# ruff: noqa: F811 - the fixture's name

TREE, COMMIT = "a" * 40, "abc12345" + "0" * 32


def state(stated: str = "1.0-1", format_: str = "deb", **more) -> SourceState:
    facts = {
        "name": "hello", "format": format_, "declared": PackageSource(git="/src"), "place": "/src",
        "tree": TREE, "stated": stated, "given": stated, "when": 1769940000, "commit": COMMIT,
        "commits": 42, "repository": Path("/src/.git"), "spec": "hello.spec" * (format_ == "rpm"),
    }  # fmt: skip
    return SourceState(**{**facts, **more})


def build(version: str, tree: str = TREE, number: int = 1, packages=()) -> RecordKey:
    return RecordKey("hello", number, "hello", True, version, tree, "", {}, packages, Path("/records"))


def sorts(less: str, more: str) -> bool:
    """By dpkg, which would say so if one were no version."""
    done = subprocess.run(
        ["dpkg", "--compare-versions", less, "lt", more], capture_output=True, text=True, check=False
    )
    assert not done.stderr, done.stderr
    return done.returncode == 0


def rpm_sorts(less: str, more: str) -> bool:
    one, other = (v if ":" in v else f"0:{v}" for v in (less, more))
    done = subprocess.run(
        ["rpm", "-E", f'%{{lua: print(rpm.vercmp("{one}", "{other}"))}}'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout) < 0


STATED = ["1.0-1", "1.0", "2:1.0-1", "1.0~rc1-1", "1.0~rc1", "1.0-1~bpo12+1", "1.0+dfsg-1",
          "1.0-0ubuntu1", "20260101", "1.0-1.1", "0~git20260101.abc-1"]  # fmt: skip


@pytest.mark.parametrize("stated", STATED)
def test_appended_versions_sort_as_they_should(stated: str) -> None:
    """After the stated one, by the number of commits, before the next one; again after the first try."""
    base = state(stated)
    at = [given("commits", replace(base, commits=n), ()) for n in (1, 9, 10, 42, 1000)]
    rebuilt = again("commits", base, at[-1])
    third = again("commits", base, rebuilt or "")
    for less, more in pairwise([stated, *at, rebuilt or "", third or "", f"{stated}.1"]):
        assert is_version(more)
        assert sorts(less, more)
        assert compare(less, more) < 0
    assert at[3] == f"{stated}+42.gabc12345"
    numbered = [stated, given("increment", state(stated), ())]
    for _ in range(10):
        numbered.append(again("increment", base, numbered[-1]) or "")
    assert numbered[1] == f"{stated}+1"
    assert numbered[-1] == f"{stated}+11"
    assert all(sorts(less, more) for less, more in pairwise([*numbered, f"{stated}.1"]))


@pytest.mark.parametrize("stated", ["1.0-1", "3:1.0-1", "1.0~rc1-0.1", "1.0^git1-1", "2024.1-12"])
@pytest.mark.parametrize("dist", ["", ".fc40", ".el9_3", ".mga9"])
def test_appended_releases_sort_as_they_should(stated: str, dist: str) -> None:
    base = state(stated, "rpm")
    at = [given("commits", replace(base, commits=n), ()) for n in (1, 9, 10, 42, 1000)]
    rebuilt = again("commits", base, at[-1]) or ""
    head, _, release = stated.rpartition("-")
    after = f"{head}-{int(release.split('.')[0]) + 1}"
    for less, more in pairwise([stated, *at, rebuilt, again("commits", base, rebuilt) or "", after]):
        assert rpm_sorts(less + dist, more + dist), (less, more, dist)
        assert RpmFormat().compare(less + dist, more + dist) < 0
    assert at[3] == f"{stated}.42.gabc12345"
    numbered = [stated, given("increment", base, ())]
    for _ in range(10):
        numbered.append(again("increment", base, numbered[-1]) or "")
    assert all(rpm_sorts(a + dist, b + dist) for a, b in pairwise([*numbered, after]))


@given_(st.from_regex(r"([0-9]:)?[0-9][0-9a-z.+~]{0,8}(-[0-9a-z.+~]{1,5})?", fullmatch=True),
        st.integers(1, 10**6), st.integers(1, 10**6))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_version_grows_with_its_commits(stated: str, one: int, more: int) -> None:
    first = given("commits", replace(state(stated), commits=one), ())
    later = given("commits", replace(state(stated), commits=one + more), ())
    assert compare(stated, first) < 0
    assert compare(first, later) < 0


# ---- Which one.


def test_what_did_not_change_keeps_its_version() -> None:
    """Other commits of the repository that lead to the same tree are no reason to build."""
    later = replace(state(), commits=50, commit="b" * 40)
    for version in ("1.0-1+42.gabc12345", "1.0-1+42.gabc12345+b3"):
        assert given("commits", later, [build(version)]) == version
    assert given("commits", later, [build("1.0-1+42.gabc12345", "b" * 40)]) == "1.0-1+50.gbbbbbbbb"
    # back to what was built before the last one: a version of its own, for versions only grow
    both = [build("1.0-1+49.gcccccccc", "b" * 40, 2), build("1.0-1+42.gabc12345")]
    assert given("commits", later, both) == "1.0-1+50.gbbbbbbbb"
    # the policy was another one
    assert given("commits", later, [build("1.0-1")]) == "1.0-1+50.gbbbbbbbb"


def test_the_number_is_one_more_than_the_last_one_used() -> None:
    other = "b" * 40
    assert given("increment", state(), [build("1.0-1+7")]) == "1.0-1+7"
    assert given("increment", state(), [build("1.0-1+7", other)]) == "1.0-1+8"
    assert given("increment", state(), [build("1.0-1+2", other, 9), build("1.0-1+11")]) == "1.0-1+12"
    assert given("increment", state("1.0-2"), [build("1.0-1+7", other)]) == "1.0-2+1"
    assert given("increment", state(), [], {"1.0-1+4", "1.0-1", "1.0-1+9x"}) == "1.0-1+5"
    assert given("increment", state("1.0-1", "rpm"), [build("1.0-1.3", other)]) == "1.0-1.4"


def test_only_the_newest_record_is_read_where_that_tells_all() -> None:
    def endless(version: str):
        yield build(version)
        raise AssertionError("a second one is read")

    assert given("increment", state(), endless("1.0-1+7")) == "1.0-1+7"
    assert given("commits", state(), endless("1.0-1+1.gabc12345")) == "1.0-1+1.gabc12345"
    assert contradicted(state(), endless("1.0-1")) is None


def test_next_versions() -> None:
    deb, rpm = state(), state("1.0-1", "rpm")
    first = "1.0-1+42.gabc12345"
    assert again("keep", deb, "1.0-1") is None
    assert again("commits", state(repository=None), "1.0-1") is None
    assert again("commits", deb, first) == f"{first}+b2"
    assert again("commits", deb, f"{first}+b9", {f"{first}+b10"}) == f"{first}+b11"
    assert again("commits", rpm, "1.0-1.42.gabc12345") == "1.0-1.42.gabc12345.2"
    assert again("commits", rpm, "1.0-1.42.gabc12345.2") == "1.0-1.42.gabc12345.3"
    assert again("increment", deb, "1.0-1+9", {"1.0-1+10"}) == "1.0-1+11"
    assert again("increment", rpm, "1.0-1.9") == "1.0-1.10"


def test_source_packages_keep_theirs() -> None:
    dsc = state(repository=None, commit="", commits=0)
    assert [given(policy, dsc, ()) for policy in ("keep", "commits", "increment")] == ["1.0-1"] * 3
    assert ungiven("commits", dsc) is None


def test_what_no_policy_can_give_is_said() -> None:
    assert ungiven("keep", state("", "rpm")) is None
    assert "macros or conditions in hello.spec" in ungiven("increment", state("", "rpm")).what
    assert "cut off" in ungiven("commits", state(commits=0)).what
    assert ungiven("increment", state(commits=0)) is None


# ---- The law.


def test_one_version_for_other_contents_is_a_contradiction() -> None:
    assert contradicted(state(), []) is None
    assert contradicted(state(), [build("1.0-1")]) is None
    other = build("1.0-1", "b" * 40, 8)
    assert contradicted(state(), [build("2.0-1", "c" * 40, 9), other]) is other
    assert contradicted(state("", "rpm"), [build("", "b" * 40)]) is None


def _published(version: str, sha256: str = "1" * 64, source: str = "hello") -> Package:
    return Package("libhello", version, "amd64", sha256, 1, "x", source=source)


def test_a_version_that_came_from_elsewhere_is_found(farm: PackageFarm) -> None:
    repository(farm.all / "hello", deb_files())
    found = farm.read().states["hello"]
    other, same = _published("1.0-1", "2" * 64), _published("1.0-1")
    assert foreign_versions(found, [_published("1.0-2"), _published("1.0-1", source="x")], []) == ()
    assert foreign_versions(found, [same], []) == (same,)
    made = build("1.0-1", found.tree, packages=(FileRecord(name="x", size=1, sha256="1" * 64),))
    assert foreign_versions(found, [same], [made]) == ()
    assert foreign_versions(found, [same, other], [made]) == (other,)


@pytest.mark.parametrize(
    ("version", "same"),
    [
        ("1.0-1", True),
        ("1.0-1.fc40", True),
        ("1.0-1.el9_3", True),
        ("1.0-1.2", False),
        ("1.0-11", False),
    ],
)
def test_the_tag_of_a_distribution_makes_no_other_version(version: str, same: bool) -> None:
    assert bool(foreign_versions(state("1.0-1", "rpm"), [_published(version)], [])) is same


# ---- What differs in what is built.


def _parsed(changelog: bytes, *more: str) -> str:
    done = subprocess.run(
        ["dpkg-parsechangelog", "-l-", *more], input=changelog, capture_output=True, check=True
    )
    assert not done.stderr, done.stderr
    return done.stdout.decode()


def test_the_changelog_has_an_entry_in_front() -> None:
    before = changelog(distribution="bookworm unstable").replace("medium", "HIGH").encode() + b"\xff\n"
    version = "1.0-1+42.gabc12345"
    found = with_version(state(given=version), before)
    assert found.endswith(before)
    said = _parsed(found)
    for line in (
        "Source: hello", f"Version: {version}", "Distribution: bookworm unstable", "Urgency: high",
        "Maintainer: Some Body <some@example.org>", "Date: Sun, 01 Feb 2026 10:00:00 +0000",
        "Timestamp: 1769940000", f"   * Built by farmhand from {COMMIT}.",
    ):  # fmt: skip
        assert line in said.splitlines(), (line, said)
    assert next(parsed(found)).version == version
    assert found == with_version(state(given=version), before)


@pytest.mark.parametrize("text", [
    changelog(), changelog(version="2:1.0~rc1-1", distribution="UNRELEASED"), f"\n\n{changelog()}",
    changelog().partition(" -- ")[0],
    changelog().replace("urgency=medium", "urgency=low, binary-only=yes"),
    changelog().replace(";", " experimental;") + "\n" + changelog(version="0.9-1"),
    changelog().replace("  * As it is.", "  * hello (9-9) unstable; urgency=low"),
    "hello (1.0-1) unstable; urgency=low\n\n  * x\n\nhello (0.9-1) unstable; urgency=low\n\n  * y\n",
])  # fmt: skip
def test_the_newest_entry_is_that_of_dpkg(text: str) -> None:
    done = subprocess.run(
        ["dpkg-parsechangelog", "-l-"], input=text.encode(), capture_output=True, check=True
    )
    told = dict(line.split(": ", 1) for line in done.stdout.decode().splitlines() if line[:1].isalpha()
                and ": " in line)  # fmt: skip
    found = newest(text.encode())
    assert found
    assert (found.source, found.version, found.distributions, found.urgency) == (
        told["Source"], told["Version"], told["Distribution"], told["Urgency"]
    )  # fmt: skip
    assert found.author == told.get("Maintainer", "")


def test_a_changelog_without_an_entry_has_none() -> None:
    assert newest(b"nothing\n") is None
    with pytest.raises(WrongState):
        with_version(state(given="2"), b"nothing\n")


SPEC = """\
# Release: 9
%global foo \\
  bar
Name:           tool
Epoch: 2
Version:\t1.0~rc1
release :  3%{?dist}
Summary: x\xe9

%description
Release: 7
"""


def test_the_release_changes_and_nothing_else() -> None:
    data = SPEC.encode("latin-1")
    assert spec_of(SPEC).stated == "2:1.0~rc1-3"
    found = with_release(data, "3.42.gabc12345")
    assert found == data.replace(b"3%{?dist}", b"3.42.gabc12345%{?dist}")
    numbered = replace(state("2:1.0~rc1-3", "rpm"), given="2:1.0~rc1-3.5")
    assert with_version(numbered, data) == data.replace(b"3%{?dist}", b"3.5%{?dist}")
    crlf = data.replace(b"\n", b"\r\n")
    assert with_release(crlf, "4") == crlf.replace(b"3%{?dist}", b"4%{?dist}")


@pytest.mark.parametrize("change", [
    ("1.0~rc1", "%{ver}"), ("3%{?dist}", "%{rel}%{?dist}"), ("3%{?dist}", "%autorelease"),
    ("3%{?dist}", "3%{?dist}.1"), ("Epoch: 2", "Epoch: %{e}"), ("Epoch: 2", "Version: 2"),
    ("Epoch: 2", "%if 1\nEpoch: 2\n%endif"), ("Version:\t1.0~rc1\n", ""), ("release :  3%{?dist}\n", ""),
    ("3%{?dist}", "%(touch /nowhere)"), ("1.0~rc1", "1.0 rc1"),
])  # fmt: skip
def test_a_spec_is_taken_as_written_or_not_at_all(change: tuple[str, str]) -> None:
    text = SPEC.replace(*change)
    assert text != SPEC
    assert spec_of(text).stated == ""
    with pytest.raises(ValueError, match="macros"):
        with_release(text.encode(), "4")


def test_what_is_built_has_the_version(farm: PackageFarm, tmp_path: Path) -> None:
    """By the farm's policy. The source repositories don't change; dpkg and rpm see the version."""
    deb = repository(farm.all / "hello", deb_files())
    commit(deb, "Two")
    repository(farm.all / "tool", rpm_files())
    farm.declare("", ", versions: commits")
    found = farm.read()
    assert not found.problems
    for name, version in (("hello", "1.0-1+2.g"), ("tool", "2.0-1.1.g")):
        one = found.states[name]
        assert one.given == f"{version}{one.commit[:8]}"
        pack(Runner(), one, tmp_path / "source.tar")
        with tarfile.open(tmp_path / "source.tar") as tar:
            tar.extractall(tmp_path / name)
    said = _parsed((tmp_path / "hello/source/debian/changelog").read_bytes(), "-S", "Version")
    assert said.strip() == found.states["hello"].given
    asked = subprocess.run(
        ["rpmspec", "-q", "--srpm", "--define", "dist .fc40", "--qf", "%{VERSION}-%{RELEASE}",
         tmp_path / "tool/source/tool.spec"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert asked.stdout == f"{found.states['tool'].given}.fc40"
    assert (deb / "debian/changelog").read_text() == changelog()


def test_a_policy_that_can_give_no_version_is_a_problem(farm: PackageFarm) -> None:
    repository(farm.all / "tool", rpm_files(release="%autorelease"))
    farm.declare("", ", versions: increment")
    (problem,) = farm.read().problems
    assert "macros or conditions in tool.spec" in problem.what
    _, line, column = problem.where.rsplit(":", 2)
    assert farm.file.read_text().splitlines()[int(line) - 1][int(column) - 1 :].startswith("increment")
    farm.declare("")
    assert farm.read().states["tool"].given == ""
