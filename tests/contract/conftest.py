"""The contract suites' fixtures; what they are made of is in rigs.py and machine_rigs.py, which tests
can import."""

from machine_rigs import guest, kvm, private, real, rig
from rigs import pytest_terminal_summary, store, xenapi, zfs_pool

__all__ = [
    "guest",
    "kvm",
    "private",
    "pytest_terminal_summary",
    "real",
    "rig",
    "store",
    "xenapi",
    "zfs_pool",
]
