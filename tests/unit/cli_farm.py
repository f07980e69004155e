"""A farm on the in-memory driver, and the real command line on it, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]

FARM = """\
farm: try
hosts:
  here:
    driver: fake
vms:
  dev2: {memory: 1G}
  prod: {memory: 1G}
templates:
  base:
    build: debian-12
"""


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout; any second one, or stray text, fails."""
        data = json.loads(self.out)
        assert isinstance(data, dict)
        return data

    @property
    def error(self) -> str:
        """The line that says what is wrong."""
        return next(line for line in self.err.splitlines() if line.startswith("farmhand: "))


Line = TypeVar("Line", bound="CommandLine")


class CommandLine:
    def __init__(self, directory: Path, runtime: Path) -> None:
        self.directory = directory
        self.farm = directory / "try.yaml"
        self.farm.write_text(FARM)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("FARMHAND_")},
            "FARMHAND_STATE_DIR": str(directory / "state"),
            "FARMHAND_CACHE_DIR": str(directory / "cache"),
            "FARMHAND_RUNTIME_DIR": str(runtime),
            "FARMHAND_FARM": str(self.farm),
        }

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-P", ROOT / "cli" / "start.py", "--search-root", str(ROOT), *words]

    def __call__(self, *words: str, cwd: Path | None = None, **environment: str) -> Done:
        done = subprocess.run(
            self.argv(*words),
            cwd=cwd or self.directory,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
            text=True,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)


def command_line(tmp_path: Path, kind: type[Line] = CommandLine) -> Iterator[Line]:  # type: ignore[assignment]
    runtime = Path(tempfile.mkdtemp(prefix="fh"))
    try:
        yield kind(tmp_path, runtime)
    finally:
        rmtree(runtime, ignore_errors=True)
