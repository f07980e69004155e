"""The command line: invoke's own Program over the same tasks, for what invoke has no words for: names
without a flag, near misses, a version of ours, help with examples, completion in a checkout.

Plain invoke(1) runs the same tasks with their flags: nothing that a task does is in here."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from textwrap import TextWrapper
from typing import TYPE_CHECKING

from invoke.exceptions import Exit, ParseError
from invoke.parser import Parser
from invoke.parser.argument import Argument
from invoke.parser.context import ParserContext
from invoke.program import Program
from invoke.terminals import pty_size

from cli.typed_words import WordReader, context_of
from host.program import CHECKOUT, PROGRAM, ROOT
from inventory.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from invoke.collection import Collection as Tasks
    from invoke.parser import ParseResult

_CORE = {
    "complete", "debug", "help", "list-format", "print-completion-script", "version", "write-pyc",
}  # fmt: skip
"""invoke's flags that do something here. Others are about what its own ``run`` does (with ``--dry`` a
task would act all the same), or about tasks in groups: here are none."""
_PLACE = ("collection", "search-root")
_FORMATS = ("flat", "nested", "json")
_ROOM = 36  # columns for a text and what is around it
_SHOWN = ("help", "list", "version", "print-completion-script")


class _Parser(Parser):
    """Reads what people type."""

    reader: WordReader
    rest: Sequence[str]

    def parse_argv(self, argv: list[str]) -> ParseResult:
        return super().parse_argv(self.reader.plain(argv, self.rest))


class FarmhandProgram(Program):
    """``namespace``: the tasks; None: tasks.py is looked for, as invoke does."""

    parser: _Parser

    def __init__(self, namespace: Tasks | None = None) -> None:
        super().__init__(namespace=namespace, name="farmhand", binary=PROGRAM)

    def core_args(self) -> list[Argument]:
        kept = [argument for argument in super().core_args() if argument.names[0] in _CORE]
        return [*kept, Argument(names=("list", "l"), kind=bool, default=False, help="List the tasks.")]

    def task_args(self) -> list[Argument]:
        """Where the tasks are: --search-root is the wrapper's."""
        return [argument for argument in super().task_args() if argument.names[0] in _PLACE]

    def update_config(self, merge: bool = True) -> None:
        """invoke's settings are for what its ``run`` does; no flag here changes one."""

    # ---- Reading what was typed

    def parse_core(self, argv: list[str] | None) -> None:
        with self._judged():
            try:
                super().parse_core(argv)
            except ParseError:  # what it doesn't know it leaves for later
                flag = self._words()[0][-1]
                raise UsageError(f"{flag} needs a value", remedy=f"{PROGRAM} --help") from None

    def load_collection(self) -> None:
        with self._judged():
            try:
                super().load_collection()
            except Exit:
                name = self.args.collection.value or "tasks"
                remedy = f"leave --collection away: {PROGRAM} --list shows farmhand's tasks"
                raise UsageError(f"there is no file of tasks called {name}", remedy=remedy) from None

    def parse_core_args(self) -> None:
        super().parse_core_args()
        if shell := self.args["print-completion-script"].value:
            from cli.completion import script

            sys.stdout.write(script(shell))
            raise Exit

    def parse_collection(self) -> None:
        super().parse_collection()
        if self.args.complete.value:
            from cli.completion import candidates

            core = ParserContext(args=[a for a in self.core_args() if a.names[0] in _SHOWN])
            for line in candidates(self.collection, core, self._words()[1]):
                sys.stdout.write(line + "\n")
            raise Exit

    def parse_tasks(self) -> None:
        with self._judged():
            super().parse_tasks()

    def parse_cleanup(self) -> None:
        asked = self.args.help.value
        with self._judged():
            if isinstance(asked, str):
                self.parser.reader.begin(asked)
            self.list_format = _format(self.args["list-format"].value)
        if isinstance(asked, str):
            self.print_task_help(asked)
        elif not asked and self.args.list.value:
            self.list_tasks()
        elif asked or not (self.tasks or self.collection.default):
            self.print_help()
        else:
            return
        raise Exit

    def _make_parser(self) -> _Parser:
        """It knows the tasks that are typed: it copies and spells out all that it knows, each time that
        it is used."""
        words, rest = self._words()
        typed = {part for word in words for part in (word, word.partition("=")[2])}
        contexts = [
            context_of(self.collection, name) for name in self.collection.task_names if name in typed
        ]
        core = self.initial_context
        parser = _Parser(initial=core, contexts=contexts)
        parser.reader = WordReader(self.collection.task_names, parser.contexts, core, _known_names)
        parser.rest = rest
        return parser

    def _words(self) -> tuple[list[str], list[str]]:
        """Before and after ``--``."""
        words = self.argv[1:]
        at = words.index("--") if "--" in words else len(words)
        return words[:at], words[at + 1 :]

    @contextmanager
    def _judged(self) -> Iterator[None]:
        """Wrong words end as those do that a task refuses."""
        try:
            yield
        except (ParseError, UsageError) as error:
            from cli import streams
            from cli.command import refuse
            from cli.run import TaskRun

            remedy = f"{PROGRAM} --list shows the tasks, {PROGRAM} TASK --help its flags"
            told = error if isinstance(error, UsageError) else UsageError(str(error), remedy=remedy)
            parser = getattr(self, "parser", None)
            task = parser.reader.task if parser else ""
            atexit.unregister(streams.at_end)
            refuse(TaskRun(task, "", json="--json" in self._words()[0], plan=False), told)

    # ---- What it tells of itself

    def print_version(self) -> None:
        sys.stdout.write(f"farmhand {_version()}\n")

    def print_help(self) -> None:
        sys.stdout.write(
            f"Usage: {PROGRAM} TASK [NAME ...] [--flags]\n\n"
            f"  {PROGRAM} --list                     the tasks\n"
            f"  {PROGRAM} --list --list-format json  the same for a program\n"
            f"  {PROGRAM} --help TASK                what it does, its flags, examples\n"
            f"  {PROGRAM} --version                  farmhand's version\n"
            f"  {PROGRAM} --print-completion-script SHELL\n"
            "             completion for bash, zsh or fish; its first line says where to put it\n\n"
        )
        if self.namespace is not None:
            self.list_tasks()

    def print_columns(self, tuples: Sequence[tuple[str, str | None]]) -> None:
        """As invoke has them where there is room; else each text below its name."""
        name_width = max(len(name) for name, _ in tuples)
        if pty_size()[0] - name_width >= _ROOM:
            super().print_columns(tuples)
            return
        wrapper = TextWrapper(
            max(pty_size()[0] - 1, 20), initial_indent=" " * 6, subsequent_indent=" " * 6
        )
        for name, text in tuples:
            sys.stdout.write("\n".join((f"  {name}", *wrapper.wrap(text or ""))) + "\n")
        sys.stdout.write("\n")

    def print_task_help(self, name: str) -> None:
        from cli.task_help import task_help

        head, parts = task_help(self.parser.contexts[name], self.collection[name])
        sys.stdout.write(head)
        for heading, columns in parts.items():
            if columns:
                sys.stdout.write(f"{heading}:\n\n")
                self.print_columns(columns)


def _format(word: str) -> str:
    """How the tasks are listed. UsageError."""
    if word not in _FORMATS:
        known = f"it is {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
        raise UsageError(
            f"--list-format: there is no format {word!r}", remedy=did_you_mean(word, _FORMATS, known)
        )
    return word


def _known_names(task: str, flag: str, farm: str) -> Collection[str] | None:
    from cli.known_names import known_names  # hardly ever asked

    return known_names(task, flag, farm)


def _version() -> str:
    if CHECKOUT:
        import tomllib

        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return str(project["version"])
    from importlib.metadata import version

    return version("farmhand")
