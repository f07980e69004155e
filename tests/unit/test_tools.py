"""Packages and a script added to a machine for its ``clean``: by a real apt-get and sh, over a real
sshd, on a root of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from builds.step_run import StepLog
from builds.tools import ToolsOrder, add_tools
from inventory.errors import ToolsFailed
from provision.guest.connection import Connection
from tests import debs
from tests.build_machine import BuildMachine, index

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a machine a root of its own"
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    with BuildMachine.running(tmp_path_factory.mktemp("builder")) as made:
        for name, version, more in (
            ("fh-lib", "2.0", ""),
            ("fh-tool", "1.0", "Depends: fh-lib (>= 2)\n"),
        ):
            control = (
                f"Package: {name}\nVersion: {version}\nArchitecture: all\n{more}"
                "Maintainer: A <a@example.org>\nDescription: it\n"
            )
            data = debs.deb(control, {f"usr/share/{name}": b"it\n"})
            (made.repo / f"{name}_{version}_all.deb").write_bytes(data)
        index(made.repo)
        yield made


def added(machine: BuildMachine, log: Path, *packages: str, script: str = "") -> Sequence[str]:
    async def add() -> Sequence[str]:
        written = StepLog(log, "builder", None)
        order = ToolsOrder(packages, script, "/root/ca.sh" if script else "")
        try:
            async with await Connection.open(machine.endpoint()) as connection:
                return await add_tools(connection, order, {"FARM": "kata"}, written, log)
        finally:
            written.close()

    return asyncio.run(add())


def test_packages_come_with_what_they_need(machine, tmp_path):
    came = added(machine, tmp_path / "log", "fh-tool", script='echo "$FARM" >/etc/ca; id -u')
    assert came == ["fh-lib 2.0 all", "fh-tool 1.0 all"]
    assert machine.prints("cat /etc/ca") == "kata\n"
    assert (tmp_path / "log").read_text().endswith("\n0\n")
    assert added(machine, tmp_path / "log2", "fh-tool") == []


def test_a_script_may_name_its_interpreter(machine, tmp_path):
    script = "#!/usr/bin/env python3\nimport os\nprint('by', os.environ['FARM'])\nraise SystemExit(%d)\n"
    assert added(machine, tmp_path / "log", script=script % 0) == []
    assert (tmp_path / "log").read_text() == "by kata\n"
    with pytest.raises(ToolsFailed, match=r"could not run ca\.sh: by kata"):
        added(machine, tmp_path / "log", script=script % 1)
    assert machine.prints("ls -A | grep tools || :") == ""


def test_a_wrong_name_is_told_in_the_guests_words(machine, tmp_path):
    with pytest.raises(ToolsFailed) as failed:
        added(machine, tmp_path / "log", "fh-lib", "fh-tol")
    assert failed.value.message == (
        "builder: could not install fh-lib, fh-tol: E: Unable to locate package fh-tol"
    )
    assert failed.value.remedy == f"all that it said: {tmp_path / 'log'}"
    assert failed.value.vm == "builder"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo fetching; echo 'no CA here' >&2; exit 3", "no CA here"),
        ("cat /etc/none; echo on", "cat: /etc/none: No such file or directory"),
        ("exit 4", "status 4, without a word"),
    ],
)
def test_a_failing_script(machine, tmp_path, script, why):
    with pytest.raises(ToolsFailed) as failed:
        added(machine, tmp_path / "log", script=script)
    assert failed.value.message == f"builder: could not run ca.sh: {why}"


def test_a_guest_that_lies_about_its_packages(machine, tmp_path):
    liar = r"""
cat >/usr/local/bin/dpkg-query <<'END'
#!/bin/sh
printf 'fine 1.0 all\n\033]0;title\007 1.0 all\nnothing\n%400s 1 all\n' | tr -s x
END
chmod +x /usr/local/bin/dpkg-query
"""
    try:
        assert added(machine, tmp_path / "log", script=liar) == ["fine 1.0 all"]
    finally:
        machine.prints("rm -f /usr/local/bin/dpkg-query")
