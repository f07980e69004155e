"""The demo of an installed copy: the wheel's own program, without a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.system.test_demo import Place, place
from tests.unit.test_installed import environment, wheel

__all__ = ["environment", "place", "wheel"]
pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


def test_the_demo_of_an_installed_copy(environment: Path, place: Place, tmp_path: Path) -> None:
    def farmhand(*words: str) -> str:
        done = subprocess.run(
            [environment / "bin" / "farmhand", *words],
            env=place.environment, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    assert "passed" in farmhand("demo")
    assert "running" in farmhand("status")
    assert farmhand("ssh", "--vm", "prod", "--command", "hostname") == "ab-kata-prod\n"
    assert place.processes()
    farmhand("demo", "--destroy")
    assert place.processes() == []
    assert list(tmp_path.iterdir()) == []
