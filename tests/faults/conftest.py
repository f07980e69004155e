"""The fault suites' fixtures; what they are made of is in benches.py, which tests can import."""

from benches import bench, cache, group, pool, pytest_terminal_summary, xenapi

__all__ = ["bench", "cache", "group", "pool", "pytest_terminal_summary", "xenapi"]
