"""Tests marked ``lab`` want a host with KVM, ZFS and LVM to themselves, those marked ``xen`` one with
Xen, and run only in the lab of that kind. The contract suites count as such there too, to be held on a
real host: in the Xen lab those of real disk stores, and of hypervisors what is marked. Not those of
XenAPI: to its server, simulated or real, it is all the same which host asks."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.dev import lanes
from tests.lab import told

IN_LAB = Path("/etc/lab/load").exists()
IN_XEN_LAB = Path("/etc/lab-kind").exists()
_STORES = ("tests/contract/test_disks.py", "tests/contract/test_lvm.py")
# What of the lab's tests ./invoke test runs: real stores, guests and kills, but a few minutes only
BRIEF = re.compile(
    r"test_disks\.py.*\bzfs\]$|test_a_life\[guests-zfs\]|test_walk\[zfs\]|/test_smoke\.py"
    r"|test_(writing_ends|any_checkpoint|ten_clones|several_go).*\[lvm-(thin|linked|full)\]"
)
_ELSEWHERE = re.compile(r"\[.*\b(fake|far|xenapi)\b")
"""Stores to which it is all the same whether the host runs under Xen."""
_FAR = re.compile(r"\[.*\bfar\b")
"""What is asked for over ssh is what the host's own tests have; the way there ./invoke test has."""
_left_out: list[str] = []
_unpassed: dict[str, str] = {}  # tests of which some phase did not pass: how it ended


def pytest_configure(config: pytest.Config) -> None:
    # Whoever runs the tests may ignore these, as nohup(1) and a shell's & do: a program that ignores a
    # signal when it starts goes on to, and these programs are to be ended by them.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings

        # A busy machine takes its time, for inputs and for what is done with them.
        settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
        settings.load_profile("busy")
    if lane := lanes.lane():
        config.pluginmanager.register(lane)


def _of_hosts(item: pytest.Item) -> bool:
    return "tests/contract/" in item.nodeid and "xenapi" not in item.nodeid


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if before := told.passed_before():
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in before])
        items[:] = [item for item in items if item.nodeid not in before]
    if IN_XEN_LAB:
        for item in items:
            if item.nodeid.startswith(_STORES) and not _ELSEWHERE.search(item.nodeid):
                item.add_marker("xen")
        return
    if IN_LAB:
        for item in items:
            of_kvm = _of_hosts(item) and not _FAR.search(item.nodeid)
            if of_kvm and not item.get_closest_marker("xen"):
                item.add_marker("lab")
            if BRIEF.search(item.nodeid):
                item.add_marker("brief")
        return
    lab = [item for item in items if any(item.iter_markers("lab")) or any(item.iter_markers("xen"))]
    if lab:
        _left_out.extend(item.nodeid for item in lab)
        items[:] = [item for item in items if item not in lab]
        config.hook.pytest_deselected(items=lab)


def pytest_runtest_logstart(nodeid: str) -> None:
    if IN_LAB or IN_XEN_LAB:
        told.tell(nodeid, "begins")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not (IN_LAB or IN_XEN_LAB):
        return
    if not report.passed:
        _unpassed[report.nodeid] = report.outcome
    if report.when == "teardown" and _unpassed.get(report.nodeid) != "skipped":
        told.tell(report.nodeid, "failed" if report.nodeid in _unpassed else "passed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if before := told.passed_before():
        terminalreporter.write_line(
            f"not run again: {len(before)} tests that had passed when the kernel of the lab before died"
        )
    if _left_out:
        terminalreporter.write_line(
            f"not run here: {len(_left_out)} lab tests (./invoke lab-test runs them)"
        )
