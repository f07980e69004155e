"""Tests marked ``lab`` want a host with KVM, ZFS and LVM to themselves, and run only in the lab; there
the contract suites count as such too, to be held on a real host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

IN_LAB = Path("/etc/lab/load").exists()
# What of the lab's tests ./invoke test runs: real stores, guests and kills, but a few minutes only
BRIEF = re.compile(
    r"test_disks\.py.*\b(zfs|lvm-thin)\]$|test_a_life\[guests-(zfs|lvm-thin)\]|test_walk\[zfs\]|/test_smoke\.py"
)
_left_out: list[str] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if IN_LAB:
        for item in items:
            if "tests/contract/" in item.nodeid:
                item.add_marker("lab")
            if BRIEF.search(item.nodeid):
                item.add_marker("brief")
        return
    lab = [item for item in items if item.get_closest_marker("lab")]
    if lab:
        _left_out.extend(item.nodeid for item in lab)
        items[:] = [item for item in items if not item.get_closest_marker("lab")]
        config.hook.pytest_deselected(items=lab)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _left_out:
        terminalreporter.write_line(
            f"not run here: {len(_left_out)} lab tests (./invoke lab-test runs them)"
        )
