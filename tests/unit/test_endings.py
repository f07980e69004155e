"""How commands end: exit statuses as documented, classes in --json, --quiet, and --wait."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host.paths import FarmPaths
from inventory import errors
from inventory.endings import ENDINGS
from inventory.errors import (
    Busy,
    ConnectionLost,
    FarmhandError,
    NotFound,
    Several,
    Unsupported,
)
from provision.engine.locks import Locks, lock_of
from provision.engine.report import QuietReporter
from provision.engine.requester import Requester
from tests.unit.cli_farm import ROOT, CommandLine, command_line

cli = pytest.fixture(command_line)


def test_the_documentation_has_them_all() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \|$", text, re.M)
    assert rows == [(str(one.status), one.word, one.means) for one in ENDINGS]
    assert len({one.status for one in ENDINGS}) == len({one.word for one in ENDINGS}) == len(ENDINGS)


def test_every_error_ends_in_one_of_them() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, FarmhandError) and kind is not Several
    ]
    assert {kind.ending for kind in kinds} <= set(ENDINGS)
    lost, missing = ConnectionLost("gone"), Unsupported("no ssh")
    assert Several({"a": lost, "b": missing}).as_dict()["class"] == "environment"
    assert Several({"a": lost, "b": NotFound("no")}).as_dict()["class"] == "failed"


@contextmanager
def held(cli: CommandLine, vm: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Somebody else's lock on a VM."""
    monkeypatch.setenv("FARMHAND_STATE_DIR", cli.environment["FARMHAND_STATE_DIR"])
    locks = Locks(FarmPaths("try").locks, Requester.of_process())
    with locks.hold(lock_of(vm), doing="what takes long"):
        yield


@pytest.fixture
def made(cli: CommandLine) -> CommandLine:
    assert cli("clone-farm", "--no-wait", "--quiet").status == 0
    return cli


def test_who_is_busy_says_so_by_the_status(made: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(made, "prod", monkeypatch):
        done = made("stop", "prod", "--json")
        waited = made("stop", "prod", "--wait", "1")
        none = made("stop", "prod", "--wait", "0")
    assert (done.status, done.json["error"], done.json["class"]) == (75, "Busy", "busy")
    assert (waited.status, none.status) == (75, 75)
    assert f"waiting: prod is held by pid {os.getpid()} of " in waited.err
    assert "doing: what takes long" in waited.err
    assert "waiting" not in none.err


@pytest.mark.parametrize("words", [["--wait"], ["--wait=600"], ["--wait", "600", "--quiet"]])
def test_waiting_ends_when_the_lock_is_free(
    made: CommandLine, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    with held(made, "prod", monkeypatch):
        waiting = subprocess.Popen(
            made.argv("stop", "prod", "dev2", *words),
            env=made.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if "--quiet" in words:
            time.sleep(1)  # it waits, or has not begun: both end well
        else:
            assert waiting.stderr is not None
            line = waiting.stderr.readline()
            assert "waiting: prod is held by" in line, line
        states = {vm["vm"]: vm["state"] for vm in made("status", "--json").json["vms"]}
        assert states == {"dev2": "running", "prod": "running"}, "nothing is begun meanwhile"
    out, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, err
    assert ("going on, after" in err) is ("--quiet" not in words)
    if "--quiet" in words:
        assert (out, err) == ("", "")
    assert {vm["state"] for vm in made("status", "--json").json["vms"]} == {"stopped"}


def test_the_whole_farm_waits_for_any_of_its_locks(
    made: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is refused by its plan, too."""
    with held(made, "other", monkeypatch):
        assert made("destroy", "--all").status == 75
        waited = made("destroy", "--all", "--wait", "1")
    assert waited.status == 75 and "waiting: try.yaml: the farm is in use by" in waited.err
    assert made("destroy", "--all", "--wait", "1").status == 0


@pytest.mark.parametrize("word", ["soon", "-5", "1.5"])
def test_a_wait_that_is_no_number(cli: CommandLine, word: str) -> None:
    done = cli("stop", "prod", f"--wait={word}", "--json")
    assert (done.status, done.json["class"]) == (2, "usage")


def test_an_operation_within_another_waits_for_nobody(
    made: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep what others wait for: no two wait for each other."""
    import cli.composition  # noqa: F401
    from provision.engine.registry import operation
    from provision.engine.runner import begin, perform
    from provision.site import open_site

    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", made.environment[f"FARMHAND_{name}_DIR"])
    with (
        held(made, "prod", monkeypatch),
        open_site(made.farm, reporter=QuietReporter(), patience=3600) as site,
        begin(site, "outer", ["dev2"]),
        pytest.raises(Busy),
    ):
        perform(site, operation("stop")(vms=("prod",), force=False))


def test_quiet_says_what_is_wrong_alone(cli: CommandLine) -> None:
    done = cli("clone-farm", "--no-wait", "--quiet")
    assert (done.status, done.out, done.err) == (0, "", "")
    look = cli("status", "--quiet")
    assert (look.status, look.out, look.err) == (0, "", "")
    assert cli("status", "--quiet", "--json").json["farm"] == "try"
    wrong = cli("reset", "nobody", "--quiet")
    assert wrong.status == 2 and "nobody" in wrong.error


def test_a_tool_that_is_missing_is_the_environment(made: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    done = made("ssh", "prod", "--json", PATH=str(tmp_path / "bin"))
    assert (done.status, done.json["class"]) == (69, "environment")
    assert done.error == "farmhand: ssh is not installed"
