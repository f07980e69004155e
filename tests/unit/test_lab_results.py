"""What is kept of the labs' runs: enough, and nothing that another command is still writing to; how
often they go on where a lab's kernel died; and which tests are run in one lab."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

from host.run import Runner
from inventory.errors import FarmhandError
from tests.lab import run, told
from tests.lab.kinds import KINDS, Kind
from tests.lab.run import Choice, _KernelDied, _results_directory


def test_results_of_the_last_day_are_never_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(tmp_path))
    place = tmp_path / "lab-results"
    place.mkdir()
    old = [place / f"20260101-0000{n:02}-lab" for n in range(12)]
    young = [place / f"20260102-0000{n:02}-lab" for n in range(12)]
    for directory in (*old, *young):
        directory.mkdir()
    for directory in old:
        os.utime(directory, (time.time() - 2 * 86400,) * 2)
    fresh = _results_directory("lab")
    assert sorted(place.iterdir()) == [*young, fresh]


def test_what_a_console_tells_of_tests_is_read_past_what_the_kernel_garbles(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    console.write_bytes(
        b"lab: ready after 3 s\r\nlab: begins tests/a.py::test_one[two fakes]\r\n"
        b"lab: passed tests/a.py::test_one[two fakes]\r\n"
        b"lab: pas[   12.5] zd0: p1\r\nsed tests/a.py::test_two\r\n"
        b"[   13.0] BUG: lab: passed nothing\r\nlab: failed tests/a.py::test_three\r\n"
        b"lab: begins tests/a.py::test_four\r\nlab: died python\r\nlab: passed tests/b"
    )
    assert told.read(console) == told.Told(
        passed=("tests/a.py::test_one[two fakes]",), failed=("tests/a.py::test_three",),
        under_way="tests/a.py::test_four", died=("python",),
    )  # fmt: skip


@pytest.mark.parametrize(("failed", "labs"), [((), 3), (("t",), 1)], ids=["none failed", "one failed"])
def test_where_kernels_die_a_third_lab_goes_on_but_no_fourth(
    monkeypatch: pytest.MonkeyPatch, failed: tuple[str, ...], labs: int
) -> None:
    """Each with what all before it had not been through."""
    given: list[tuple[str, ...]] = []

    def dies(*arguments: object) -> None:
        passed = arguments[6]
        assert isinstance(passed, tuple)
        given.append(passed)
        raise _KernelDied("lab", "panic", Path("results"), told.Told((f"t{len(given)}",), failed))

    monkeypatch.setattr(run, "_run_tests", dies)
    with pytest.raises(FarmhandError, match="the kernel of the lab lab died"):
        run.run_tests(Runner(), lambda _: None, choice=Choice(), show=lambda _: None)
    assert given == [(), ("t1",), ("t1", "t2")][:labs]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_test_is_in_one_portion_and_none_is_empty(kind: Kind) -> None:
    guests = ("guests-zfs", "guests-lvm-thin", "pv-zfs", "pv-qcow2", "pv-lvm-full", "pvh-lvm-thin")
    names = [f"test_hypervisor.py test_a_life[{rig}]" for rig in guests]
    names += [f"test_disks.py test_a_larger_clone[{s}]" for s in ("zfs", "zfs-files", "lvm-linked")]
    names += [f"test_walk.py test_walk[{label}]" for label in ("kvm+zfs", "lvm-full", "xen+lvm-thin")]
    portions = [Expression.compile(words) for words in kind.portions]
    taken = [[name for name in names if p.evaluate(name.__contains__)] for p in portions]
    assert all(taken)
    assert sorted(itertools.chain(*taken)) == sorted(names)
