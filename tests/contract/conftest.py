"""The contract suites' fixtures; what they are made of is in rigs.py, which tests can import."""

from rigs import guest, private, pytest_terminal_summary, real, rig, store, zfs_pool, zvols

__all__ = ["guest", "private", "pytest_terminal_summary", "real", "rig", "store", "zfs_pool", "zvols"]
