"""A farm that builds packages on real VMs, in a directory of its own; images come from the cache."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PATIENCE = 900.0  # seconds; a guest on a busy machine


class BuilderFarm:
    """``directory``: a place to type commands at, with what lies in a checkout; ``farm.yaml`` is the
    farm's. ``name``: what it calls itself."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.file = directory / "farm.yaml"
        self._state = directory / "s" / "farms" / name
        self._environment = {
            **{k: v for k, v in os.environ.items() if k != "FARMHAND_FARM"},
            "FARMHAND_STATE_DIR": str(directory / "s"),
            "FARMHAND_RUNTIME_DIR": str(directory / "r"),
        }
        for shipped in ("invoke", "inventory", "examples"):
            (directory / shipped).symlink_to(ROOT / shipped)

    # -- commands -----------------------------------------------------------------------------

    def typed(self, line: str) -> str:
        """What a line of shell prints, which must pass."""
        done = subprocess.run(
            ["sh", "-c", line], cwd=self.directory, env=self._environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
        return done.stdout

    def json(self, *words: str) -> dict[str, Any]:
        done = self._run(*words, "--json")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        data = json.loads(done.stdout)
        assert isinstance(data, dict)
        return data

    @contextlib.contextmanager
    def begun(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A command that goes on; it is killed at the end, if it still does."""
        with (self.directory / "begun.log").open("w") as log:
            process = subprocess.Popen(
                self._argv(*words), env=self._environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, text=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def wait_for(self, what: Callable[[], Any], process: subprocess.Popen[str]) -> None:
        """Until it is so; the process must live."""
        end = time.monotonic() + _PATIENCE
        while not what():
            said = (self.directory / "begun.log").read_text()[-6000:]
            assert process.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.2)

    def close(self) -> None:
        self._run("destroy", "--all", "--purge", "--yes")

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._argv(*words), env=self._environment, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    def _argv(self, *words: str) -> list[str]:
        program = [sys.executable, "-P", str(ROOT / "cli" / "start.py"), "--search-root", str(ROOT)]
        return [*program, *words, "--farm", str(self.file)]

    # -- what there is ------------------------------------------------------------------------

    def record(self, package: str, number: int) -> dict[str, Any]:
        """Of one build; empty as long as there is none."""
        return self._document(self._of(package, number) / "record.json")

    def last_run(self) -> dict[str, Any]:
        top = self._state / "package-runs"
        return self._document(max(top.glob("[!.]*")) / "run.json")

    def log(self, package: str, number: int, directory: str = "") -> str:
        """As far as it goes."""
        try:
            return (self._of(package, number) / directory / "build.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def artifact(self, package: str, number: int, pattern: str) -> Path:
        (found,) = (self._of(package, number) / "artifacts").glob(pattern)
        return found

    def builds(self) -> Mapping[str, int]:
        """How many of each package there were."""
        top = self._state / "packages"
        return {path.name: sum(one.is_dir() for one in path.iterdir()) for path in top.iterdir()}

    def _of(self, package: str, number: int) -> Path:
        return self._state / "packages" / package / str(number)

    def _document(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text())
        except FileNotFoundError:
            return {}
        assert isinstance(found, dict)
        return found

    def qemu(self) -> Mapping[str, int]:
        """The process of each VM that runs."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if "qemu-system" in words[0] and any(str(self.directory) in word for word in words):
                name = words[words.index("-name") + 1].split(",")[0].removeprefix("guest=")
                found[name.rpartition("-")[2]] = int(path.parent.name)
        return found

    def kill_vm(self, vm: str) -> None:
        os.kill(self.qemu()[vm], signal.SIGKILL)


@contextlib.contextmanager
def builder_farm(name: str) -> Iterator[BuilderFarm]:
    """Nothing of it is left."""
    directory = Path(tempfile.mkdtemp(prefix="fhp"))
    directory.chmod(0o711)  # QEMU runs as another user and passes through
    farm = BuilderFarm(directory, name)
    try:
        yield farm
    finally:
        farm.close()
        rmtree(directory, ignore_errors=True)


def became(run: Mapping[str, Any]) -> Mapping[str, set[str]]:
    """Names of a run's builds, by what became of them."""
    found: dict[str, set[str]] = {}
    for entry in run["packages"]:
        found.setdefault(entry["state"], set()).add(entry["name"])
    return found
