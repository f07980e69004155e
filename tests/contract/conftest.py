"""The contract suites' fixtures; what they are made of is in rigs.py and machine_rigs.py, which tests
can import."""

from collections.abc import Iterator

import lvm_rig
import pytest
from machine_rigs import guest, kvm, private, real, rig, warm_rig, xen, xen_on_devices
from rigs import pytest_terminal_summary, store, xenapi, zfs_pool

__all__ = [
    "guest", "kvm", "private", "pytest_terminal_summary", "real", "rig", "store", "warm_rig", "xen",
    "xen_on_devices", "xenapi", "zfs_pool",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _empty_disks() -> Iterator[None]:
    yield
    lvm_rig.drop_all()
