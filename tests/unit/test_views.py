"""What is shown stays readable: in large farms, and of VMs that are off."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from cli import views
from host.processes import Process
from host.program import PROGRAM, as_typed
from inventory.errors import NotFound, Several, TimedOut, some
from provision.engine.record import Record
from provision.status import _left

MANY = tuple(f"v{number}" for number in range(300))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("", ""),
        ("a", "a"),
        ("abcdefg", "a, b, c, d, e, f, g"),
        ("abcdefgh", "a, b, c, d, e, f and 2 more"),
    ],
)
def test_some(names: str, said: str) -> None:
    assert some(names) == said
    assert some(dict.fromkeys(names)) == said


def test_history_of_many_vms() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    record = Record(
        id=1, verb="reset", vms=tuple(MANY), facts={}, in_its_way="", started=moment, ended=moment,
        outcome="done", error="", process=Process.this(), settled=True,
    )  # fmt: skip
    text = views.history([record], [], 20).text
    assert "v0, v1, v2, v3, v4, v5 and 294 more" in text
    assert max(map(len, text.splitlines())) < 100


def test_what_runs_reads_as_running_and_what_was_killed_as_interrupted() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    record = Record(
        id=1, verb="reset", vms=("prod",), facts={}, in_its_way="", started=moment, ended=None,
        outcome="", error="", process=Process.this(), settled=False,
    )  # fmt: skip
    assert " running" in views.history([record], [], 20).text
    killed = replace(record, process=Process(record.process.pid, "0", record.process.boot))
    assert " interrupted" in views.history([killed], [], 20).text
    assert _left(killed) == "reset prod (interrupted)", "status calls it what history does"


def test_a_command_is_shown_as_it_was_typed() -> None:
    own = ["/x/cli/start.py", "--search-root", "/x", "cycle", "--only", "a b"]
    assert as_typed(own) == f"{PROGRAM} cycle --only 'a b'"
    assert as_typed(["/usr/bin/farmhand", "cycle"]) == "farmhand cycle"


def test_many_that_fail() -> None:
    """In one line; what it leaves out is in the detail."""
    error = Several({vm: NotFound(f"it lacks {vm}s", remedy=f"bring {vm}") for vm in MANY})
    assert len(error.message) < 200
    assert error.message.startswith("300 VMs failed: v0: it lacks v0s; v1: it lacks v1s;")
    assert error.remedy.endswith("bring v5 and 294 more")
    assert error.detail.splitlines()[::293] == ["v6: it lacks v6s", "v299: it lacks v299s"]


def test_what_an_error_is_of_is_left_out_by_who_named_it() -> None:
    """Not by its words, which may begin alike."""
    error = NotFound("kea: not there", vm="a", of="kea")
    assert (error.message, error.bare) == ("kea: a: kea: not there", "a: kea: not there")
    assert NotFound("kea: not there").bare == "kea: not there"


def test_two_that_fail() -> None:
    """Nothing is told twice."""
    tail = TimedOut("not ready", vm="b", detail="Booting\nHalted")
    error = Several({"a": NotFound("not there", vm="a"), "b": tail})
    assert error.message == "2 VMs failed: a: not there; b: not ready"
    assert error.detail == "b: not ready\n    Booting\n    Halted"


def test_those_that_fail_alike_are_told_once() -> None:
    """Each with its own error in the data; the detail names all of them."""
    error = Several({vm: NotFound("host here is gone", detail="no route") for vm in "abc"})
    assert error.message == "3 VMs failed: a, b, c: host here is gone"
    assert error.detail == "a, b, c: host here is gone\n    no route"
    assert list(error.as_dict()["errors"]) == ["a", "b", "c"]  # type: ignore[call-overload]
    many = Several({**{vm: NotFound("gone") for vm in MANY}, "z": NotFound("away")})
    assert many.message == "301 VMs failed: v0, v1, v2, v3, v4, v5 and 294 more: gone; z: away"
    assert many.detail == f"{', '.join(MANY)}: gone"


@pytest.mark.parametrize(
    ("now", "said"), [(None, "1G"), (0, "1G"), (2**30, "1G"), (2**29, "512M of 1G")]
)
def test_memory(now: int | None, said: str) -> None:
    assert views._memory(now, 2**30) == said
