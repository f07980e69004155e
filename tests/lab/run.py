"""The tests inside a lab of their own: started, filled, run under a time limit, results brought back.

STATE/lab-results/TIME-NAME/    pytest.log, junit.xml, console.log, dmesg, and what the tests left:
                                journals, console logs, daemons' logs; in died/ the last words of
                                processes that a signal ended, and where their threads were
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host.paths import state_dir
from host.run import Runner
from inventory.errors import CommandFailed, DriverFailed, FarmhandError, TimedOut
from tests.lab import machine as machines
from tests.lab import qemu, told
from tests.lab.away import Away
from tests.lab.image import Say
from tests.lab.kinds import KVM, Kind
from tests.lab.machine import Machine
from tests.lab.parcel import CHECKOUT

LIMIT = 180  # minutes
_LABS = 3  # as many may a run of the tests take, where their kernels die
_KEPT = 10  # results, and all of the last _DAY: another command may have use for its own still
_DAY = 86400  # seconds
_OUT = "/root/results"
_PASSED = f"{_OUT}/passed"
_GUEST = "/var/cache/farmhand/test-guest"  # where tests/lab/parcel.py puts it
# ZFS's udev rule for disks in numbered slots: a shell script at every event of every block device, which
# under emulation is a third of an lvcreate. bench --lab's hosts have it, as any.
_LIGHTER = "ln -sf /dev/null /etc/udev/rules.d/69-vdev.rules && udevadm control --reload"
# Guests that spin, as in GRUB, left dom0 a third of its CPU: what it does for them comes first.
_DOM0_FIRST = "xl sched-credit2 -d Domain-0 -w 8192"
_BENCHES = {
    "kvm": ("tests.bench_stores", "ZFS and LVM, beside the bare commands: about 15 minutes"),
    "xen": ("tests.bench_xen", "Xen and its disks, beside the bare commands: about 10 minutes"),
}
_HANDED_ON = ("FARMHAND_KILLS", "FARMHAND_SEED")  # see tests/faults/bench.py
_TIDY_UP = 90.0  # seconds that pytest gets to end in order where this command is interrupted
_SIGNALLED = 128  # sh(1): the status of what signal n killed is that, plus n
_DIED_LINES = 60  # of a dead process's report, in the error
_LARGEST = "2M"  # of the logs and journals brought back, each
_CRASH = re.compile(r"Kernel panic - not syncing|soft lockup - CPU|rcu_\w+ detected stalls")
_CLOSING = re.compile(r"^=*\s*(\d+ .*|no tests ran.*) in [\d.]+s.*$")


@dataclass(frozen=True, slots=True)
class Report:
    """``status`` is pytest's. ``closing`` its last line, empty where it has none."""

    name: str
    status: int
    closing: str
    results: Path
    seconds: float
    kind: str

    @property
    def ok(self) -> bool:
        return self.status == 0

    def as_dict(self) -> Mapping[str, object]:
        return {
            "lab": self.name, "kind": self.kind, "status": self.status, "closing": self.closing,
            "results": str(self.results), "seconds": round(self.seconds, 1),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tests. ``only``: files or directories; ``match``: as pytest's -k; ``brief``: the share
    of ./invoke test."""

    only: tuple[str, ...] = ()
    match: str = ""
    brief: bool = False


def run_tests(
    runner: Runner,
    say: Say,
    *,
    name: str = "",
    kind: Kind = KVM,
    warm: bool = True,
    choice: Choice,
    limit: float = LIMIT * 60,
    show: Callable[[bytes], None],
) -> Report:
    """Run the tests marked for the kind of lab, and the contract suites, in the running lab ``name``,
    or, without a name, in a lab of their own, ended afterwards. ``show`` gets pytest's output as it is
    made.

    A lab that hangs is ended after ``limit`` seconds: TimedOut, with what could be brought back. Nested
    guests can crash an emulated lab's kernel (see docs/lab.md): where that ended the tests, those that
    it had not been through run in a new lab, three labs in all; a failed test is never run again."""
    passed: tuple[str, ...] = ()
    for left in reversed(range(_LABS)):
        try:
            return _run_tests(runner, say, name, kind, warm, choice, passed, limit, show)
        except _KernelDied as died:
            if name or not left or died.told.failed:
                raise
            passed += died.told.passed
            say(f"{died.message}; {len(passed)} tests had passed, the others run in a new lab")
    raise AssertionError("the last one returns or raises")


class _KernelDied(FarmhandError):
    """The lab's own kernel, not a test. ``told``: what it had been through."""

    def __init__(self, name: str, why: str, results: Path, through: told.Told) -> None:
        message = f"the kernel of the lab {name} died under emulation ({why})"
        if through.failed:
            message += f", and before that there had failed {', '.join(through.failed)}"
        super().__init__(message, remedy=f"see {results}/console.log")
        self.told = through


def _run_tests(
    runner: Runner, say: Say, name: str, kind: Kind, warm: bool, choice: Choice,
    passed: tuple[str, ...], limit: float, show: Callable[[bytes], None],
) -> Report:  # fmt: skip
    started = time.monotonic()
    with _lab(runner, say, name, kind, warm=warm, beside=True) as machine:
        results = _results_directory(machine.name)
        log = results / "pytest.log"
        if not name:
            machine.run(_LIGHTER)
            if machine.kind.hypervisor:
                machine.run(_DOM0_FIRST)
        if passed:
            machine.run(f"mkdir -p {_OUT} && cat >{_PASSED}", input="\n".join(passed).encode())
        pytest = Away(machine, f"{_OUT}/pytest", log, show, say)
        try:
            pytest.begin(_script(machine.kind, choice, go_on=bool(passed)))
            status = pytest.follow(limit)
        except (TimedOut, DriverFailed) as error:
            _look_for_a_crash(machine, results)
            raise _gone(machine, results, error) from error
        except KeyboardInterrupt:
            say("interrupted: pytest in the lab is asked to end")
            pytest.interrupt(_TIDY_UP)
            raise
        finally:
            _bring_back(machine, results, say)
            through = told.read(machine.console)
    lines = log.read_text(errors="replace").splitlines()
    closing = next((line for line in reversed(lines) if _CLOSING.match(_plain(line))), "")
    if status > _SIGNALLED and not closing:
        raise _died(machine.name, status - _SIGNALLED, through, results)
    if through.died:
        say(f"died of a signal in the lab: {', '.join(through.died)}; see {results}/died")
    return Report(machine.name, status, _plain(closing), results, time.monotonic() - started, kind.name)


def _gone(machine: Machine, results: Path, error: FarmhandError) -> FarmhandError:
    """What ended the tests from outside, its kernel being well: time, the connection, or its QEMU."""
    if isinstance(error, TimedOut):
        return error
    if not machine.running():
        return FarmhandError(
            f"the QEMU of the lab {machine.name} ended under the tests",
            remedy=f"see {results}/console.log",
        )
    return FarmhandError(
        f"the connection to the lab {machine.name} was lost, and no new one came: {error.message}",
        remedy=f"what the tests had said: {results}/pytest.log",
    )


def _died(name: str, number: int, through: told.Told, results: Path) -> FarmhandError:
    """pytest itself, of a signal: its last words, and where its threads were."""
    where = f" in {through.under_way}" if through.under_way else ""
    reports = sorted((results / "died").glob("*.txt"), key=lambda path: path.stat().st_mtime)
    words = [report.read_text(errors="replace") for report in reports if "pytest" in report.read_text()]
    return FarmhandError(
        f"pytest died of {signal.Signals(number).name}{where} in the lab {name}",
        remedy=f"all that is known: {results}/died, and pytest.log beside it",
        detail="\n".join(words[-1].splitlines()[:_DIED_LINES]) if words else "",
    )


def run_bench(runner: Runner, say: Say, *, name: str, kind: Kind, rounds: int) -> Mapping[str, Any]:
    """What the kind's tests/bench_*.py found in the running lab ``name``, or in a lab of its own."""
    with _lab(runner, say, name, kind, warm=True, beside=False) as machine:
        module, what = _BENCHES[machine.kind.name]
        say(f"measuring {what} under emulation")
        python = f"env FARMHAND_TEST_GUEST={_GUEST} /opt/venv/bin/python"
        script = f"cd /{CHECKOUT} && exec {python} -m {module} --rounds {rounds}"
        log = _results_directory(machine.name) / "bench.log"

        def show(data: bytes) -> None:
            for line in data.decode(errors="replace").splitlines():
                if not line.startswith("{"):
                    say(line)

        away = Away(machine, f"{_OUT}/bench", log, show, say)
        away.begin(script)
        status = away.follow(LIMIT * 60)
        lines = log.read_text(errors="replace").splitlines() or [""]
        if status:
            raise FarmhandError(f"measuring failed in the lab: {lines[-1].strip()}", remedy=f"see {log}")
        found: Mapping[str, Any] = json.loads(lines[-1])
        return found


@contextlib.contextmanager
def _lab(
    runner: Runner, say: Say, name: str, kind: Kind, *, warm: bool, beside: bool
) -> Iterator[Machine]:
    """The running lab ``name``, or one that is ended afterwards; with the working tree as it is now."""
    started = time.monotonic()
    machines.sweep(runner, say)
    machine = Machine(name or f"test-{kind.name}-{os.getpid()}", runner, say)
    if not name:
        machine.start(kind, warm=warm, temporary=True, beside=beside)
        seconds = time.monotonic() - started
        how = "from its saved state" if machine.facts.warm else "from cold"
        say(f"{machine.name}: up {how} after {seconds:.1f} s ({machine.facts.engine})")
    try:
        machine.deliver_tree()
        yield machine
    finally:
        if not name:
            machine.remove()


def _script(kind: Kind, choice: Choice, *, go_on: bool) -> str:
    marks = f"{kind.marker} and brief" if choice.brief else kind.marker
    pytest = [
        "/opt/venv/bin/python", "-P", "-m", "pytest", *(choice.only or ["tests"]), "-m", marks,
        f"--junit-xml={_OUT}/junit.xml", "--basetemp=/var/tmp/tests", "-o", "cache_dir=/var/tmp/pytest",
        *(["-k", choice.match] if choice.match else []),
    ]  # fmt: skip
    environment = {
        "FARMHAND_TEST_GUEST": _GUEST,
        "HYPOTHESIS_STORAGE_DIRECTORY": "/var/tmp/hypothesis",
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        **({"FARMHAND_KILLS": "few"} if choice.brief else {}),
        **({told.LIST: _PASSED} if go_on else {}),
        **{name: os.environ[name] for name in _HANDED_ON if name in os.environ},
    }
    settings = " ".join(f"{key}={value}" for key, value in environment.items())
    return f"cd /{CHECKOUT} && exec env {settings} {shlex.join(pytest)}"


def _look_for_a_crash(machine: Machine, results: Path) -> None:
    """_KernelDied where its console tells of it, or where it is there and doesn't answer."""
    if not machine.facts.engine.startswith(qemu.EMULATED):
        return
    found = _CRASH.search(machine.console.read_text(errors="replace"))
    why = found[0] if found else ""
    if not found and machine.running():
        try:
            machine.run("true", timeout=60)
        except (CommandFailed, TimedOut):
            why = "it doesn't answer"
    if why:
        raise _KernelDied(machine.name, why, results, told.read(machine.console))


def _bring_back(machine: Machine, results: Path, say: Say) -> None:
    """What helps to understand a failure; never itself the reason of one."""
    with contextlib.suppress(OSError):
        shutil.copy(machine.console, results / "console.log")
    names = " -o ".join(f"-name '{name}'" for name in ("journal.db*", "*.log", "record.json", "*.xml"))
    source = (
        f"mkdir -p {_OUT}; dmesg >{_OUT}/dmesg.log 2>&1; "
        f"{{ find {_OUT} -type f; find /var/tmp/tests /var/lib/farmhand -type f -size -{_LARGEST} "
        f"\\( {names} \\); }} 2>/dev/null | tar -C / -c --ignore-failed-read -T - 2>/dev/null || :"
    )
    if not machine.running():
        return
    try:
        machine.collect(source, results, timeout=120)
        inside = results / _OUT.lstrip("/")
        for path in inside.glob("*"):
            path.replace(results / path.name)
        shutil.rmtree(results / "root", ignore_errors=True)
    except FarmhandError as error:
        say(f"{machine.name}: {error.message}")


def _results_directory(name: str) -> Path:
    place = state_dir() / "lab-results"
    place.mkdir(parents=True, exist_ok=True)
    for old in sorted(p for p in place.iterdir() if p.is_dir())[: -(_KEPT - 1)]:
        if time.time() - old.stat().st_mtime > _DAY:
            shutil.rmtree(old, ignore_errors=True)
    fresh = place / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    fresh.mkdir()
    return fresh


def _plain(line: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", line).strip()


def to_terminal(data: bytes) -> None:
    """pytest's lines as they come."""
    sys.stdout.buffer.write(data)
    sys.stdout.flush()
