"""The tasks that ask about packages, as somebody types them; over a farm of real git repositories,
sshds, apts and records that `build` wrote (``package_lab``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.unit.cli_farm import ROOT, CommandLine, command_line
from tests.unit.cycle_farm import environment
from tests.unit.package_lab import PackageLab


class Lab(PackageLab):
    """libfoo <- tool <- ssh, whose package is named as a task is; and lone. All are built."""

    def prepared(self) -> Lab:
        self.build = {"versions": "commits"}
        self.source("libfoo")
        self.source("tool", 'deb tool "tool with $(text_of libfoo)"\n', needs="libfoo")
        self.source("ssh", 'deb ssh "at $(date +%s%N)"\n', needs="tool")
        self.source("lone")
        return self

    def says(self, line: str, status: int = 0) -> str:
        """What a command prints; its error, too, if it is to end with another status."""
        done = self.command(*line.split())
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        if not status:
            return done.stdout.rstrip("\n")
        errors = done.stderr.splitlines()
        at = max(n for n, text in enumerate(errors) if text.startswith("farmhand: "))
        return "\n".join([*done.stdout.splitlines(), *errors[at:]])

    def data(self, line: str) -> Any:
        return json.loads(self.says(f"{line} --json"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    directory = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(directory).items():
            if name.startswith("FARMHAND_"):
                patch.setenv(name, value)
        made = Lab(directory)
        try:
            yield made.prepared()
        finally:
            made.stop()


def test_before_anything_is_built(lab: Lab) -> None:
    assert lab.says("why --package tool") == (
        "tool is built:\n  it was never built\n  libfoo, which it needs, is built first\n"
        "    it was never built"
    )
    assert lab.says("why-not --package libfoo") == (
        "nothing keeps libfoo from being built: ./invoke build --package libfoo"
    )
    assert lab.says("graph --package tool").split() == (
        ["layer", "1", "libfoo", "waiting", "layer", "2", "tool", "waiting", "<-", "libfoo"]
    )


def test_when_all_is_built(lab: Lab) -> None:
    lab.says("build")
    assert lab.says("why --package ssh") == ("ssh: nothing has changed: it is as it was built in ssh/1")
    assert lab.says("why-not --package ssh") == "ssh is built: ssh/1 is as it would be built now"
    found = {one["build"]: one for one in lab.data("packages")["packages"]}
    assert set(found) == {"libfoo", "tool", "ssh", "lone"}
    tool = found["tool"]
    assert (tool["state"], tool["last"], tool["result"]) == ("passed", "tool/1", "passed")
    assert tool["version"] == tool["last_version"]
    heading, *lines = lab.says("packages").splitlines()
    assert heading.split() == ["PACKAGE", "VERSION", "STATE", "LAST", "BUILD", "OF", "ENDED", "WHEN"]
    assert lines[0].split()[:4] == ["libfoo", found["libfoo"]["version"], "passed", "libfoo/1"]


def test_the_graph(lab: Lab) -> None:
    data = lab.data("graph --package tool --with-dependants")
    assert data["layers"] == [["libfoo"], ["tool"], ["ssh"]]
    assert [one["state"] for one in data["builds"]] == ["passed"] * 3
    assert data["builds"][1]["needs"] == [
        {"build": "libfoo", "direct": True, "because": ["Build-Depends of tool: libfoo, from libfoo"]}
    ]
    assert (data["problems"], data["unknown"]) == ([], [])
    drawn = lab.says("graph --svg -")
    assert drawn.count('class="build passed"') == 4
    ET.fromstring(drawn)
    path = lab.root / "some.svg"
    assert lab.says(f"graph --package lone --svg {path}") == f"{path} written"
    boxes = [text for text in ET.parse(path).getroot().itertext() if text.strip() in ("lone", "tool")]
    assert [box.strip() for box in boxes] == ["lone"]


def test_the_record_and_the_log_of_a_build(lab: Lab) -> None:
    shown = lab.says("log --build tool/1")
    first, *_ = shown.splitlines()
    assert first.startswith("build tool/1  tool 1.0-1+1.g")
    assert "because it was never built" in shown
    assert "with 1 package installed, 1 of them from generation " in shown
    assert "its log: ./invoke log --build tool/1 --step build" in shown
    data = lab.data("log --build tool/1")
    assert (data["name"], data["number"], data["verified"]) == ("tool", 1, None)
    assert "dpkg-deb: building package 'tool'" in lab.says("log --build tool/1 --step build")


def test_rebuilds(lab: Lab) -> None:
    assert lab.says("rebuild --build tool --plan").endswith("with 1 package installed")
    same = lab.says("rebuild --build tool/1 --verify")
    assert same.splitlines()[-1] == "identical: 1 file, byte for byte as tool/1 made them"
    assert "built again " in lab.says("log --build tool/1")
    assert lab.data("log --build tool/1")["verified"]["identical"] is True
    text = lab.says("rebuild --build ssh --verify", 1)
    assert "_all.deb: ./usr/share/ssh/text: content" in text
    assert text.endswith("farmhand: ssh/1 does not come out the same: 1 difference")
    assert "came out otherwise" in lab.says("log --build ssh/1")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ("why", 2, "--package is missing"),
        ("why --package tol", 2, "no package is called 'tol'\n  did you mean tool?"),
        ("graph --package tol", 2, "no package is called 'tol'\n  did you mean tool?"),
        ("graph --with-dependants", 2, "of which package?\n  --package NAME"),
        ("graph --svg /nonexistent/x.svg", 1, "cannot write /nonexistent/x.svg"),
        ("why --package tool --revision -x", 2, "'-x' is not a git revision"),
        ("rebuild --build tol", 1, "no build of a package 'tol' is recorded\n  did you mean tool?"),
        ("rebuild --build tool/9", 1, "package tool has no build '9'\n  it has tool/1"),
        ("log --build tol/1", 1, "did you mean tool?"),
        ("log --build tool/1 --step biuld", 2, "has no log of 'biuld'\n  did you mean build?"),
    ],
)
def test_wrong_words(lab: Lab, words: str, status: int, says: str) -> None:
    assert says in lab.says(words, status)


def test_what_changes_and_what_fails(lab: Lab) -> None:
    first = lab.git("libfoo", "rev-parse", "--short=10", "HEAD")
    commit = lab.source("libfoo", 'deb libfoo "libfoo two"\n', subject="Say two")[:10]
    text = lab.says("why --package ssh").splitlines()
    assert text[:2] == [
        "ssh is built if what it needs comes out otherwise; it last passed as ssh/1:",
        "  libfoo, which it needs, is built first",
    ]
    assert text[2].startswith("    the source: ")
    assert text[2].endswith(f"({commit} Say two)")
    broken = lab.source("libfoo", "echo broken; exit 3\n", subject="Break it")[:10]
    assert "libfoo 1.0-1+3.g" in lab.says("build", 3)
    why = [
        "libfoo/2 failed (source): broken",
        f"  it last passed as libfoo/1, of commit {first}; since then:",
        f"    {broken} Break it (Test)",
        f"    {commit} Say two (Test)",
    ]
    assert lab.says("why-not --package libfoo").splitlines() == [
        "libfoo is not built:", *(f"  {line}" for line in why)
    ]  # fmt: skip
    assert lab.says("why-not --package ssh").splitlines() == [
        "ssh is not built:", f"  waits for libfoo: {why[0]}", *(f"  {line}" for line in why[1:]),
        "  waits for tool, too",
    ]  # fmt: skip
    states = {one["build"]: one["state"] for one in lab.data("packages")["packages"]}
    assert states == {"libfoo": "failed", "tool": "skipped", "ssh": "skipped", "lone": "passed"}
    assert "source: broken" in lab.says("packages")
    shown = lab.says("log --build libfoo/2")
    assert "source: broken" in shown
    assert "  | broken" in shown
    assert f"note: it last passed as libfoo/1, of commit {first}; since then:" in shown
    assert f"note:   {broken} Break it (Test)" in shown
    assert "a build that passed can be done again" in lab.says("rebuild --build libfoo/2", 1)


def test_why_follows_what_was_installed(lab: Lab) -> None:
    commit = lab.source("libfoo", 'deb libfoo "libfoo three"\n', subject="Mend it")[:10]
    lab.says("build --package libfoo")
    lines = lab.says("why --package tool").splitlines()
    assert lines[1].startswith("  libfoo: 1.0-1+1.g")
    assert lines[1].endswith(", built as libfoo/3")
    assert lines[2].startswith("    the source: ")
    assert lines[2].endswith(f"({commit} Mend it)")


def test_what_can_not_be_read_is_told(lab: Lab) -> None:
    lab.packages["gone"] = {"git": "src/gone"}
    try:
        text = lab.says("why-not --package gone")
        assert text.startswith("gone is not built:\n  ")
        assert "there is no directory" in text
        assert "there is no directory" in lab.says("why --package gone", 1)
        assert "there is no directory" in lab.says("graph").splitlines()[-1]
        assert "problem of other packages keeps all" in lab.says("why-not --package lone")
        rows = {line.split()[0]: line.split()[1] for line in lab.says("packages").splitlines()}
        assert rows["gone"] == "unread"
    finally:
        del lab.packages["gone"]


def test_a_farm_that_builds_no_packages(tmp_path: Path) -> None:
    for cli in command_line(tmp_path, CommandLine):
        for words in ("why-not --package x", "graph", "packages", "rebuild --build x"):
            done = cli(*words.split())
            what = "farmhand: try.yaml: nothing says how packages are built"
            assert (done.status, done.error) == (1, what)
            assert "docs/packages.md" in done.err


def test_who_asks_for_none_of_them_does_not_load_them() -> None:
    """A package may be called as a task is."""
    script = (
        "import sys; sys.argv = ['invoke', *sys.argv[1:]]; import tasks;"
        "print('cli.package_tasks' in sys.modules, 'cli.package_views' in sys.modules)"
    )
    for words, loads in (
        ("status", "False"), ("log --build hello/7", "False"), ("why --package ssh", "True"),
        ("why-not --package log", "True"), ("graph", "True"), ("rebuild --build console/1", "True"),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", script, *words.split()], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True,
        )  # fmt: skip
        assert done.stdout.split() == [loads, loads], words
