"""What the wrapper runs in a checkout: invoke(1), as ``python -m invoke`` is, begun sooner; and what an
installed farmhand does, a program of invoke's with these tasks.

Importing invoke is most of a short command's time, and most of that is for what no task here uses:
unittest.mock, and asyncio with it, for a class that tests of tasks may use; importlib.metadata, and
email with it, to know invoke's version; YAML, for configuration files that hardly anybody has. While
invoke is imported, others stand in for the three.

Standard streams may be closed or full: streams.py. Wrong words end as those do that a task refuses.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invoke.parser.context import ParserContext
    from invoke.program import Program

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


def _narrowed(program: Program, words: Sequence[str]) -> Callable[[], None]:
    """``program.parse_collection``, after which the parser knows the tasks that are typed: it copies and
    spells out all that it knows, each time that it is used."""
    parse = program.parse_collection

    def narrowed() -> None:
        parse()
        if "--complete" in words:
            return
        contexts = program.collection.to_contexts
        typed = " ".join(words)

        def to_contexts(*arguments: Any, **named: Any) -> list[ParserContext]:
            found = contexts(*arguments, **named)
            return [
                each for each in found if any(str(name) in typed for name in (each.name, *each.aliases))
            ]

        vars(program.collection)["to_contexts"] = to_contexts

    return narrowed


def main() -> None:
    """In a checkout: invoke's own program, which finds tasks.py there."""
    if sys.prefix != sys.base_prefix and sys.pycache_prefix is None:
        sys.pycache_prefix = f"{sys.prefix}/bytecode"
    sys.path.insert(0, __file__.rpartition("/")[0] + "/..")  # -P: nothing is found by itself
    with begun():
        from invoke.main import program
    _run(program, "invoke", sys.argv[1:])


def installed(tasks: ModuleType) -> None:
    """The program ``farmhand``: these tasks, wherever it is called."""
    from invoke.collection import Collection
    from invoke.program import Program

    version = None
    if _asked_for_version():
        from importlib.metadata import version as version_of

        version = version_of("farmhand")
    program = Program(version, Collection.from_module(tasks), name="farmhand", binary="farmhand")
    _run(program, "farmhand", sys.argv[1:] or ["--list"])


def _asked_for_version() -> bool:
    return not {"-V", "--version"}.isdisjoint(sys.argv)


@contextmanager
def begun() -> Iterator[None]:
    """While invoke is imported, be it by tasks."""
    gc.set_threshold(_OBJECTS, 20, 20)
    atexit.register(gc.freeze)  # the first one registered is the last one called
    sys.dont_write_bytecode = False
    from cli import streams

    streams.take_over()
    names = () if _asked_for_version() else _USED  # invoke is asked for its version
    for name in names:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(_USED[name])
    yield
    for name in names:
        del sys.modules[name]


def _run(program: Program, name: str, words: Sequence[str]) -> None:
    vars(program)["parse_collection"] = _narrowed(program, words)
    for step in ("parse_core", "parse_tasks"):
        setattr(program, step, _judged(getattr(program, step)))
    program.run([name, "--write-pyc", *words])


if __name__ == "__main__":
    main()
