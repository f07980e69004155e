"""What the wrapper runs in a checkout, and an installed farmhand: cli/program.py, begun sooner than
``python -m invoke`` is.

Importing invoke is most of a short command's time, and most of that is for what no task here uses:
unittest.mock, and asyncio with it, for a class that tests of tasks may use; importlib.metadata, and
email with it, to know invoke's version; YAML, for configuration files that hardly anybody has. While
invoke is imported, others stand in for the three.

Standard streams may be closed or full: streams.py.

Python's garbage collector looks through all that importing makes, again and again while it is made
and again at the end: a tenth of a short command's time, and nothing of it is ever garbage. So it waits
for more objects than that, and leaves out the last looks.

A checkout's bytecode is kept in the virtual environment: invoke keeps none by default, so that each
command would compile all of farmhand again, and nothing is to be left there, for it may be another's.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invoke.program import Program

_YAML = "invoke.vendor.yaml"
_OBJECTS = 50_000  # that may be made before the garbage collector looks at them


def _safe_load(stream: Any) -> Any:
    return import_module(_YAML).safe_load(stream)


_USED: dict[str, dict[str, Any]] = {
    "unittest.mock": {"Mock": None},
    "importlib.metadata": {"version": lambda _package: ""},
    _YAML: {"safe_load": _safe_load},
}
"""All that invoke uses of them, in the version of requirements.lock."""


def main() -> None:
    """In a checkout: the tasks are looked for, as invoke does it."""
    if sys.prefix != sys.base_prefix and sys.pycache_prefix is None:
        sys.pycache_prefix = f"{sys.prefix}/bytecode"
    sys.path.insert(0, __file__.rpartition("/")[0] + "/..")  # -P: nothing is found by itself
    with begun():
        from cli.program import FarmhandProgram
    _run(FarmhandProgram(), sys.argv[1:])


def installed(tasks: ModuleType) -> None:
    """The program ``farmhand``: these tasks, wherever it is called."""
    from invoke.collection import Collection

    from cli.program import FarmhandProgram

    _run(FarmhandProgram(Collection.from_module(tasks)), sys.argv[1:] or ["--list"])


@contextmanager
def begun() -> Iterator[None]:
    """While invoke is imported, be it by tasks."""
    gc.set_threshold(_OBJECTS, 20, 20)
    atexit.register(gc.freeze)  # the first one registered is the last one called
    sys.dont_write_bytecode = False
    from cli import streams

    streams.take_over()
    for name, used in _USED.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(used)
    yield
    for name in _USED:
        del sys.modules[name]


def _run(program: Program, words: Sequence[str]) -> None:
    program.run(["farmhand", "--write-pyc", *words])


if __name__ == "__main__":
    main()
