"""Tests, linters and the benchmark of farmhand itself. Starts ruff, mypy and pytest directly: they
are the developer's tools, they own the terminal, and nothing of a farm's is at stake."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from inventory.errors import UsageError
from provision.paths import cache_dir

from cli import ROOT, Result, Run

_SUITES = ("unit", "contract", "services", "faults", "system")
_OF_THE_LAB = [ROOT / "tests" / "system" / name for name in ("test_lab.py", "test_power_cuts.py")]


def _tool(run: Run, name: str, *arguments: str) -> tuple[int, str]:
    """Run one of the tools: on the terminal, or with --json with its output kept. Its caches stay out
    of the checkout."""
    cache = cache_dir() / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "RUFF_CACHE_DIR": str(cache / "ruff"),
        "MYPY_CACHE_DIR": str(cache / "mypy"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(cache / "hypothesis"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    # What the admin has set for a farm of their own must not leak into the tests.
    environment.pop("FARMHAND_FARM", None)
    done = subprocess.run(
        [sys.executable, "-P", "-m", name, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if run.json else None,
        stderr=subprocess.STDOUT if run.json else None,
        check=False,
    )
    return done.returncode, (done.stdout or b"").decode(errors="replace")


def _need_tools() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("ruff", "mypy", "pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the test tools are not installed here: {', '.join(missing)}",
            remedy="./invoke test installs them, from requirements-dev.lock",
        )


def _linters(run: Run) -> list[dict[str, object]]:
    _need_tools()
    steps: list[dict[str, object]] = []
    for name, arguments in (("ruff", ("check", "--quiet", ".")), ("mypy", ())):
        started = time.monotonic()
        status, output = _tool(run, name, *arguments)
        seconds = round(time.monotonic() - started, 2)
        steps.append({"name": name, "ok": status == 0, "seconds": seconds, "output": output})
        if name == "ruff" and status == 0 and not run.json:
            sys.stdout.write("ruff: all checks passed\n")
            sys.stdout.flush()
    return steps


def _result(steps: list[dict[str, object]]) -> Result:
    bad = [str(step["name"]) for step in steps if not step["ok"]]
    if bad and sys.stderr:
        sys.stderr.write(f"farmhand: failed: {', '.join(bad)}\n")
    return Result({"steps": steps}, "", ok=not bad)


def lint(run: Run) -> Result:
    """ruff and mypy. UsageError where they are not installed."""
    return _result(_linters(run))


def test(run: Run, *, fast: bool, lab: bool, only: tuple[str, ...], match: str) -> Result:
    """ruff, mypy, pytest here, then with ``lab`` pytest in the lab: its closing line is the last on
    stdout. UsageError for a lab together with a choice of tests."""
    if lab and (fast or only or match):
        raise UsageError(
            "--lab is all the tests",
            remedy="./invoke lab-test takes --only and --match",
        )
    chosen = [str(ROOT / "tests" / suite) for suite in _SUITES if (ROOT / "tests" / suite).is_dir()]
    if only:
        missing = [path for path in only if not Path(path.partition("::")[0]).exists()]
        if missing:
            raise UsageError(
                f"--only: no such file: {', '.join(missing)}", remedy="give paths below tests/"
            )
        chosen = [str(Path(path).absolute()) for path in only]
    steps = _linters(run)
    if lab:  # minutes, the first time: before pytest, which shows no progress
        import labhouse

        labhouse.prepare(run)
    arguments = [*chosen, "-o", f"cache_dir={cache_dir() / 'tests' / 'pytest'}"]
    if fast:
        arguments += ["-m", "not system"]
    if not lab and not only:
        arguments += [word for path in _OF_THE_LAB for word in ("--ignore", str(path))]
    if match:
        arguments += ["-k", match]
    started = time.monotonic()
    status, output = _tool(run, "pytest", *arguments)
    seconds = round(time.monotonic() - started, 2)
    steps.append({"name": "pytest", "ok": status == 0, "seconds": seconds, "output": output})
    if lab:
        steps.append(_lab(run))
    return _result(steps)


def _lab(run: Run) -> dict[str, object]:
    """The tests that need KVM, ZFS and LVM, in a lab of their own."""
    import labhouse

    started = time.monotonic()
    found = labhouse.test(run, "", cold=False, only=(), match="", minutes=90)
    seconds = round(time.monotonic() - started, 2)
    return {"name": "lab-test", "ok": found.ok, "seconds": seconds, **found.data}


def bench(run: Run, *, rounds: int) -> Result:
    """The figures of the toolkit, side by side with the bare tools in the same run."""
    from tests.bench import measure

    figures = measure(rounds=rounds, say=run.screen.working)
    return Result(figures.as_dict(), figures.text(), ok=True)
