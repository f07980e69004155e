"""Farms to kill things in, each with a state of its own, and the summary of all kills."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import KILLS, Bench

from provision import farm

DRIVERS = ("fake", "kvm")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all farms here: libvirt probes QEMU once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=DRIVERS)
def bench(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> Iterator[Bench]:
    # short, and passable for QEMU's user: pytest's own directories are neither
    directory = Path(tempfile.mkdtemp(prefix="fh-"))
    directory.chmod(0o711)
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(directory / "s"))
    monkeypatch.setenv("FARMHAND_RUNTIME_DIR", str(directory / "r"))
    monkeypatch.setenv("FARMHAND_CACHE_DIR", str(cache))
    made = Bench(directory, request.param)
    made.seal()
    try:
        yield made
    finally:
        made.close()
        with made.site() as site:
            farm.destroy(site)
        assert not (directory / "s" / "farms").exists(), "the whole farm was destroyed"
        shutil.rmtree(directory)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not KILLS.counts:
        return
    operations = list(dict.fromkeys(operation for operation, _ in KILLS.counts))
    drivers = [d for d in DRIVERS if any(driver == d for _, driver in KILLS.counts)]
    width = max(map(len, operations))
    terminalreporter.section("kills")
    terminalreporter.write_line(f"{'':{width}}  " + "  ".join(f"{d:>5}" for d in drivers))
    for operation in operations:
        numbers = "  ".join(f"{KILLS.counts.get((operation, d), 0):5}" for d in drivers)
        terminalreporter.write_line(f"{operation:{width}}  {numbers}")
    lost = [r for r in terminalreporter.stats.get("failed", ()) if "faults" in r.nodeid]
    verdict = f"{len(lost)} tests failed, see above" if lost else "each recovered"
    terminalreporter.write_line(f"{sum(KILLS.counts.values())} kills in all, {verdict}")
