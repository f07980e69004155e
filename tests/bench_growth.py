"""What each operation costs in a farm of a hundred VMs and in one of a thousand: whole commands, as
typed, on the fake host and on qcow2 files under a private libvirtd. Nothing is started there.

CPU time, of the command with all that it ran, and of libvirtd: on a busy machine the clock says little.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from host.run import Runner
from inventory.errors import DriverFailed
from tests import boot_sector
from tests.figures import Figure

ROOT = Path(__file__).resolve().parents[1]
SMALL, LARGE = 100, 1000
LIMIT = 12.0
"""Times the CPU time, with ten times the VMs."""

_FARM = """\
farm: grown
hosts: {{here: {{driver: {driver}}}}}
templates: {{empty: {{import: empty.img}}}}
vms:
{vms}
"""
_MAKE = ("clone-farm", "--no-start")
_OF_ALL = {
    "clone-farm": _MAKE,
    "clone-farm, nothing to do": _MAKE,
    "status": ("status",),
    "checkpoint": ("checkpoint", "--all", "--name", "kept"),
    "reset": ("reset", "--all", "--no-start"),
    "gc --plan": ("gc", "--plan"),
}
_POWER = {"start": ("start", "--all"), "stop": ("stop", "--all")}
_END = {"destroy": ("destroy", "--all")}


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds."""

    cpu: float
    wall: float


def measure(say: Callable[[str], None]) -> Iterator[Figure]:
    for driver in ("fake", "kvm"):
        costs = {count: grown(driver, count, say) for count in (SMALL, LARGE)}
        for name in costs[SMALL]:
            small, large = costs[SMALL][name], costs[LARGE][name]
            label = f"{name}, {driver}"
            floor = f"{label}, {SMALL} VMs, CPU"
            yield Figure(floor, (small.cpu,))
            yield Figure(f"{label}, {LARGE} VMs, CPU", (large.cpu,), LIMIT, floor)
            yield Figure(f"{label}, {LARGE} VMs", (large.wall,))


def grown(driver: str, count: int, say: Callable[[str], None]) -> Mapping[str, Cost]:
    """A farm of so many VMs, from its making to its end."""
    with tempfile.TemporaryDirectory(prefix="fhg") as name:
        directory = Path(name)
        directory.chmod(0o711)  # QEMU's user is to pass
        farm = _Farm(directory, driver)
        image = directory / "empty.img"
        image.write_bytes(boot_sector.IDLE)
        os.truncate(image, 64 * 2**20)
        power = _POWER if driver == "fake" else {}
        costs = {}
        farm.declare(1)
        farm.run(_MAKE)  # the template, and what libvirt finds out about QEMU
        try:
            for what, words in {**_OF_ALL, **power, **_END}.items():
                say(f"{driver}, {count} VMs: {what}")
                farm.declare(count)
                costs[what] = farm.run(words)
                if what == "clone-farm":
                    farm.declare(count + 1)
                    costs["clone-farm, one more"] = farm.run(_MAKE)
                    farm.run(("destroy", "--vm", f"v{count:04}"))
        finally:
            with suppress(DriverFailed):
                farm.run(("destroy", "--all", "--purge"))
    return costs


class _Farm:
    def __init__(self, directory: Path, driver: str) -> None:
        self._directory = directory
        self._driver = driver
        self._file = directory / "farm.yaml"
        self._environment = {
            **os.environ,
            "FARMHAND_STATE_DIR": str(directory / "s"),
            "FARMHAND_RUNTIME_DIR": str(directory / "t"),
            "FARMHAND_FARM": str(self._file),
        }

    def declare(self, count: int) -> None:
        vms = "\n".join(f"  v{n:04}: {{memory: 32M}}" for n in range(count))
        self._file.write_text(_FARM.format(driver=self._driver, vms=vms), encoding="utf-8")

    def run(self, words: Sequence[str]) -> Cost:
        """DriverFailed, with what it said."""
        argv = [sys.executable, "-P", "-m", "invoke", "--search-root", str(ROOT), *words]
        daemon = self._daemon()
        began, before = time.perf_counter(), _ticks(daemon)
        with (self._directory / "said").open("w+") as said:
            child = subprocess.Popen(
                argv, env=self._environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            wall = time.perf_counter() - began
            if child.returncode:
                said.seek(0)
                raise DriverFailed(f"{Runner().show(argv)} failed", detail=said.read()[-2000:])
        of_daemon = max(_ticks(daemon) - before, 0.0)
        return Cost(used.ru_utime + used.ru_stime + of_daemon, wall)

    def _daemon(self) -> int | None:
        """The private libvirtd, which is nobody's child."""
        for note in (self._directory / "t").rglob("libvirtd.pid"):
            with suppress(OSError, ValueError):
                return int(note.read_text())
        return None


def _ticks(pid: int | None) -> float:
    """Seconds of CPU time that it used; 0: it is gone (proc(5), stat: utime and stime)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
