"""The command line itself, a fork for each command of one process that has imported all of it: hundreds
of commands would else be mostly hundreds of starts of Python.

As a program: one JSON object a line on standard input (words, directory, environment, and "still":
machines run nothing, whatever their disks are on), one back: status, out, err."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.unit.cli_farm import Done

ROOT = Path(__file__).parents[2]
_LIMIT = 120  # seconds of one command; alarm(2)


class Forked:
    """A context manager: commands of one environment."""

    def __init__(
        self, directory: Path, environment: Mapping[str, str], *, still: bool = False, mounts: str = ""
    ) -> None:
        """``mounts``: a shell script that is run before, as root, in a mount namespace of their own."""
        self._mounts = mounts
        self._order: dict[str, Any] = {
            "directory": str(directory), "environment": dict(environment), "still": still,
        }  # fmt: skip

    def __enter__(self) -> Forked:
        argv = [sys.executable, "-P", __file__]
        if self._mounts:
            shell = f'set -e; {self._mounts}\nexec "$@"'
            argv = ["unshare", "--mount", "sh", "-c", shell, "sh", *argv]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def inside(self, path: Path) -> Path:
        """That place as the commands see it."""
        return Path(f"/proc/{self._process.pid}/root", *path.parts[1:])

    def __call__(self, *words: str, **environment: str) -> Done:
        assert self._process.stdin and self._process.stdout
        more = {**self._order["environment"], **environment}
        order = {**self._order, "environment": more, "words": words}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        done = json.loads(self._process.stdout.readline())
        return Done(done["status"], done["out"], done["err"])


def _serve() -> None:
    from cli.start import begun

    with begun():
        from cli.program import FarmhandProgram
    import cli.start
    from builds import checkup, record  # noqa: F401
    from provision import doctor, site, status  # noqa: F401
    from provision.operations import clone, recover  # noqa: F401

    import tasks  # noqa: F401 - with what the tasks import late:

    def run(words: Sequence[str]) -> None:
        cli.start._run(FarmhandProgram(), ["--search-root", str(ROOT), *words])

    sys.__stdout__.write("ready\n")
    sys.__stdout__.flush()
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            if not (pid := os.fork()):
                _become(order, out.fileno(), err.fileno())
                run(order["words"])
                sys.exit(0)
            _, status = os.waitpid(pid, 0)
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read().decode(errors="surrogateescape"))
        code = os.waitstatus_to_exitcode(status)
        sys.__stdout__.write(json.dumps({"status": code, "out": said[0], "err": said[1]}) + "\n")
        sys.__stdout__.flush()


def _become(order: Mapping[str, Any], out: int, err: int) -> None:
    import signal

    signal.alarm(_LIMIT)
    null = os.open(os.devnull, os.O_RDONLY)
    for handle, number in ((null, 0), (out, 1), (err, 2)):
        os.dup2(handle, number)
    os.chdir(order["directory"])
    os.environ.update(order["environment"])
    if order["still"]:
        from provision.site import Site
        from tests.faults.still import Still

        opened = Site._open
        Site._open = lambda site, host: Still(opened(site, host))


if __name__ == "__main__":
    _serve()
