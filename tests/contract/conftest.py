"""The contract suites' fixtures; what they are made of is in rigs.py and machine_rigs.py, which tests
can import."""

from collections.abc import Iterator

import lvm_rig
import pytest
from machine_rigs import guest, kvm, private, real, rig
from rigs import pytest_terminal_summary, store, zfs_pool

__all__ = ["guest", "kvm", "private", "pytest_terminal_summary", "real", "rig", "store", "zfs_pool"]


@pytest.fixture(scope="package", autouse=True)
def _empty_disks() -> Iterator[None]:
    yield
    lvm_rig.drop_all()
