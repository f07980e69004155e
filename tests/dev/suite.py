"""Tests, linters and the benchmark of farmhand itself. Starts ruff, mypy and pytest directly: they
are the developer's tools, they own the terminal, and nothing of a farm's is at stake."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from cli.run import TaskResult, TaskRun
from host.files import make_directory
from host.paths import cache_dir
from host.program import ROOT
from host.run import which
from inventory.errors import UsageError
from tests.dev import lanes

_SUITES = ("unit", "contract", "services", "system", "hostile", "faults")
_OF_THE_LAB = [ROOT / "tests" / "system" / name for name in ("test_lab.py", "test_power_cuts.py")]
_SLOW = [
    ROOT / "tests" / "system" / name
    for name in (
        "test_debian_13.py",
        "test_debian_set.py",
        "test_flows_on_vms.py",
        "test_installed_demo.py",
        "test_tutorial.py",
        "test_warm_rounds.py",
    )
]
"""Run where they are named: --only."""
_NOT_RUN = "not run: {} (minutes each: ./invoke test --only PATH)"
_CACHE = ("-o", f"cache_dir={cache_dir() / 'tests' / 'pytest'}")
_LAB_MINUTES = 40
_MOST_BESIDE = 4  # each lane has machines of its own: some hundred MiB


def _tool(run: TaskRun, name: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run one of the tools: on the terminal, or with --json with its output kept."""
    with _begin(subprocess.PIPE if run.json else None, name, *arguments, **environment) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            _end(process)
            raise
    return process.returncode, (output or b"").decode(errors="replace")


def _begin(
    output: int | IO[bytes] | None, name: str, *arguments: str, **environment: str
) -> subprocess.Popen[bytes]:
    """Its caches stay out of the checkout."""
    cache = cache_dir() / "tests"
    make_directory(cache, mode=0o755)
    environment = {
        **os.environ,
        "RUFF_CACHE_DIR": str(cache / "ruff"),
        "MYPY_CACHE_DIR": str(cache / "mypy"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(cache / "hypothesis"),
        "PYTHONDONTWRITEBYTECODE": "1",
        **environment,
    }
    # What the admin has set for a farm of their own must not leak into the tests.
    environment.pop("FARMHAND_FARM", None)
    with _interruptible():
        return subprocess.Popen(
            [sys.executable, "-P", "-m", name, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            process_group=0,
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """We are interrupted. The terminal reached us alone: pytest tidies up at the first SIGINT, and stops
    doing so at a second one."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate()
    except BaseException:
        process.kill()
        raise


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """What is started within heeds SIGINT, by which we end it, also where we ignore it (``&`` in a
    script): only what is ignored stays so in another program."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _need_tools() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("ruff", "mypy", "pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the test tools are not installed here: {', '.join(missing)}",
            remedy="./invoke test installs them, from tests/dev/requirements-dev.lock",
        )


def _linters(run: TaskRun) -> list[dict[str, object]]:
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


def _result(steps: list[dict[str, object]], text: str = "") -> TaskResult:
    bad = [str(step["name"]) for step in steps if not step["ok"]]
    if bad:
        sys.stderr.write(f"farmhand: failed: {', '.join(bad)}\n")
    return TaskResult({"steps": steps}, text, ok=not bad)


def lint(run: TaskRun) -> TaskResult:
    """ruff and mypy. UsageError where they are not installed."""
    return _result(_linters(run))


def security(run: TaskRun) -> TaskResult:
    """bandit on the program, by pyproject.toml, and pip-audit on what is pinned. They are nobody's need
    but for this, and so aren't pinned themselves. What cannot be audited is a failure, too. UsageError
    where they are missing."""
    tools = {
        "bandit": ("-q", "-r", ".", "-c", "pyproject.toml"),
        "pip-audit": ("--strict", "--disable-pip", "--require-hashes", "-r", "requirements.lock"),
    }
    if missing := [name for name in tools if which(name) is None]:
        raise UsageError(
            f"not found: {', '.join(missing)}",
            remedy="python3 -m venv DIR; DIR/bin/pip install bandit pip-audit; put DIR/bin into PATH",
        )
    steps: list[dict[str, object]] = []
    for name, arguments in tools.items():
        done = subprocess.run(
            [name, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, check=False, text=True,
            stdout=subprocess.PIPE if run.json else None, stderr=subprocess.STDOUT if run.json else None,
        )  # fmt: skip
        steps.append({"name": name, "ok": done.returncode == 0, "output": done.stdout or ""})
    return _result(steps)


def test(run: TaskRun, *, fast: bool, only: tuple[str, ...], match: str) -> TaskResult:
    """ruff and mypy, then pytest in one lane more than there are cores, and but with ``fast`` one in a
    lab beside them. A choice of tests has one lane, and no lab. The closing lines of all, and how the
    tests of all lanes ended, are the last on stdout. UsageError."""
    chosen = [str(ROOT / "tests" / suite) for suite in _SUITES if (ROOT / "tests" / suite).is_dir()]
    if only:
        missing = [path for path in only if not Path(path.partition("::")[0]).exists()]
        if missing:
            raise UsageError(
                f"--only: no such file: {', '.join(missing)}", remedy="give paths below tests/"
            )
        chosen = [str(Path(path).absolute()) for path in only]
    steps = _linters(run)
    options = [*_CACHE]
    if fast:
        options += ["-m", "not system"]
    if match:
        options += ["-k", match]
    if not only:
        options += _each("--ignore", [*_OF_THE_LAB, *_SLOW])
    if only or match:
        return _result([*steps, _pytest(run, [*chosen, *options])])
    with contextlib.ExitStack() as stack:
        others = None
        if not fast:
            from tests.dev import labs

            labs.prepare(run)  # minutes, the first time
            lab = ("lab-test", "--brief", "--minutes", str(_LAB_MINUTES))
            others = stack.enter_context(Aside(run, [lab]))
        claims = stack.enter_context(tempfile.TemporaryDirectory(prefix="farmhand-lanes-"))
        # One for each core, for a third of its time a test waits. From the other end: the longest files
        # are there, and none is to be begun last.
        beside = [
            stack.enter_context(_beside([*reversed(chosen), *options], **{lanes.CLAIMS: claims}))
            for _ in range(min(len(os.sched_getaffinity(0)), _MOST_BESIDE))
        ]
        steps.append(_pytest(run, [*chosen, *options], **{lanes.CLAIMS: claims}))
        steps += [finish(run) for finish in beside]
        for found in others.finish() if others else ():
            steps.append({"name": found.problem or "aside", "ok": found.ok, **found.data})
        left = _NOT_RUN.format(", ".join(str(path.relative_to(ROOT)) for path in _SLOW))
        return _result(steps, f"{left}\n{lanes.ends(Path(claims))}")


@contextlib.contextmanager
def _beside(
    arguments: list[str], **environment: str
) -> Iterator[Callable[[TaskRun], dict[str, object]]]:
    """pytest in a process of its own, while this one does something else. Gives what waits for it, and
    then shows what it says. Left by an error, it is ended."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as log, _begin(log, "pytest", *arguments, **environment) as process:

        def finish(run: TaskRun) -> dict[str, object]:
            status = process.wait()
            seconds = round(time.monotonic() - started, 2)
            log.seek(0)
            output = log.read().decode(errors="replace")
            if not run.json:
                sys.stdout.write(output)
                sys.stdout.flush()
            return {"name": "pytest", "ok": status == 0, "seconds": seconds, "output": output}

        try:
            yield finish
        except BaseException:
            _end(process)
            raise


def _each(option: str, paths: Iterable[Path]) -> list[str]:
    return [word for path in paths for word in (option, str(path))]


class Aside:
    """Tasks with their options, one after another, in processes of their own, while this one does
    something else. What pytest says there is shown when all are through. Ctrl-C reaches them too; left
    by an error, the one under way is ended."""

    def __init__(self, run: TaskRun, tasks: Iterable[Sequence[str]]) -> None:
        self._run = run
        self._tasks = tasks
        self._guard = threading.Lock()
        self._left = False
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: list[tuple[int, bytes]] = []
        self._lane = threading.Thread(target=self._work)
        self._lane.start()

    def _work(self) -> None:
        for task, *options in self._tasks:
            with self._guard:
                if self._left:
                    return
                self._process = process = subprocess.Popen(
                    [ROOT / "invoke", task, "--json", *options], cwd=ROOT,
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            answer, _ = process.communicate()
            self._answers.append((process.returncode, answer))

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._left = True
            if self._process and self._process.poll() is None:
                self._process.terminate()
        self._lane.join()

    def finish(self) -> list[TaskResult]:
        """Waits for them."""
        self._lane.join()
        return [self._told(status, json.loads(answer or "{}")) for status, answer in self._answers]

    def _told(self, status: int, data: dict[str, Any]) -> TaskResult:
        if not self._run.json:
            if results := data.get("results"):
                sys.stdout.write(Path(results, "pytest.log").read_text(errors="replace"))
            sys.stdout.flush()
        if status == 0:
            return TaskResult(data, "")
        said = "; ".join(str(data[key]) for key in ("message", "remedy") if data.get(key))
        return TaskResult(data, "", ok=False, problem=said or "tests aside failed")


def of_the_lab(run: TaskRun) -> TaskResult:
    """The tests that start labs of their own, on this host: power cuts, saved states."""
    step = _pytest(run, [*map(str, _OF_THE_LAB), *_CACHE])
    return TaskResult(
        step, "", ok=bool(step["ok"]), problem="" if step["ok"] else "the tests of the lab failed"
    )


def _pytest(run: TaskRun, arguments: list[str], **environment: str) -> dict[str, object]:
    started = time.monotonic()
    status, output = _tool(run, "pytest", *arguments, **environment)
    seconds = round(time.monotonic() - started, 2)
    return {"name": "pytest", "ok": status == 0, "seconds": seconds, "output": output}


def bench(run: TaskRun, *, rounds: int, repositories: bool = False) -> TaskResult:
    """The figures of the toolkit, side by side with the bare tools in the same run."""
    from tests import bench as figures_of

    measure = figures_of.repositories if repositories else figures_of.measure
    figures = measure(rounds=rounds, say=run.screen.working)
    return TaskResult(figures.as_dict(), figures.text(), ok=True)


def bench_warm(run: TaskRun, *, rounds: int, plot: str) -> TaskResult:
    """Those of warm resets. ``plot``: a file for a drawing of them; "": none."""
    from tests import bench as figures_of

    figures, drawing = figures_of.warm(rounds=rounds, say=run.screen.working)
    if plot:
        Path(plot).expanduser().write_text(drawing, encoding="utf-8")
    return TaskResult(figures.as_dict(), figures.text(), ok=True)
