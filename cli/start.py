"""What ./invoke runs: invoke(1), as ``python -m invoke`` is, begun sooner.

Importing invoke is most of a short command's time, and most of that is for what no task here uses:
unittest.mock, and asyncio with it, for a class that tests of tasks may use; importlib.metadata, and
email with it, to know invoke's version; YAML, for configuration files that hardly anybody has. While
invoke is imported, others stand in for the three.

Standard streams may be closed or full: streams.py. Wrong words end as those do that a task refuses.

Python's garbage collector looks through all that importing makes, again and again while it is made
and again at the end: a tenth of a short command's time, and nothing of it is ever garbage. So it waits
for more objects than that, and leaves out the last looks.

Bytecode is kept in the virtual environment: invoke keeps none by default, so that each command would
compile all of farmhand again, and nothing is to be left in the checkout, which may be another's.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

_YAML = "invoke.vendor.yaml"
_WRONG_WORDS = 2  # UsageError's exit status
_OBJECTS = 50_000  # that may be made before the garbage collector looks at them


def _safe_load(stream: Any) -> Any:
    return import_module(_YAML).safe_load(stream)


_USED: dict[str, dict[str, Any]] = {
    "unittest.mock": {"Mock": None},
    "importlib.metadata": {"version": lambda _package: ""},
    _YAML: {"safe_load": _safe_load},
}
"""All that invoke uses of them, in the version of requirements.lock."""


def _judged(parse: Callable[..., None]) -> Callable[..., None]:
    """With the exit status of wrong words that a task refuses, for 1 means that something failed."""

    def judged(*arguments: Any) -> None:
        from invoke.exceptions import Exit, ParseError

        try:
            parse(*arguments)
        except ParseError as error:
            from host.program import PROGRAM

            remedy = f"{PROGRAM} --list shows the tasks, {PROGRAM} TASK --help its flags"
            raise Exit(f"farmhand: {error}\n  {remedy}", code=_WRONG_WORDS) from None

    return judged


def main() -> None:
    gc.set_threshold(_OBJECTS, 20, 20)
    atexit.register(gc.freeze)  # the first one registered is the last one called
    if sys.prefix != sys.base_prefix and sys.pycache_prefix is None:
        sys.pycache_prefix = f"{sys.prefix}/bytecode"
    sys.dont_write_bytecode = False
    sys.path.insert(0, __file__.rpartition("/")[0] + "/..")  # -P: nothing is found by itself
    from cli import streams

    streams.take_over()
    names = _USED if {"-V", "--version"}.isdisjoint(sys.argv) else ()  # it is asked for its version
    for name in names:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(_USED[name])
    from invoke.main import program

    for name in names:
        del sys.modules[name]
    for step in ("parse_core", "parse_tasks"):
        setattr(program, step, _judged(getattr(program, step)))
    program.run(["invoke", "--write-pyc", *sys.argv[1:]])


if __name__ == "__main__":
    main()
