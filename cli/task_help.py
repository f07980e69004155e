"""What ``--help TASK`` shows, as a manual page does: what it does, how it is typed, flags, examples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.command import COMMON
from cli.examples import EXAMPLES
from cli.task_words import TaskWords, task_words
from host.program import PROGRAM

if TYPE_CHECKING:
    from invoke.parser.context import ParserContext
    from invoke.tasks import Task

Columns = Sequence[tuple[str, str]]
_COMMON = (*COMMON, "plan", "wait")


def task_help(context: ParserContext, task: Task[Any]) -> tuple[str, Mapping[str, Columns]]:
    """The head, and the columns below each heading."""
    name = str(context.name)
    first, _, more = (inspect.getdoc(task) or "").partition("\n")
    takes = task_words.get(name, TaskWords())
    noun = takes.bare.upper()
    words = [takes.shown or (f"[{noun} ...]" if takes.many else f"[{noun}]")] if noun else []
    words += ["[--flags]"] + (["[-- COMMAND ...]"] if takes.rest else [])
    head = f"{name}: {first}\n\nUsage: {PROGRAM} {name} {' '.join(words)}\n\n"
    if more.strip():
        head += "\n".join(f"  {line}".rstrip() for line in more.strip().splitlines()) + "\n\n"
    if noun:
        head += f"  {noun} without a flag is the same as --{takes.bare} {noun}.\n\n"
    flags = [argument.name for argument in context.args.values()]
    own = [flag for flag in flags if flag not in _COMMON]
    examples = [(f"{PROGRAM} {words}", means) for words, means in EXAMPLES.get(name, ())]
    return head, {
        "Flags": [_flag(context, flag) for flag in own],
        "Common flags": [_flag(context, flag) for flag in flags if flag in _COMMON],
        "Examples": examples,
    }


def _flag(context: ParserContext, name: str) -> tuple[str, str]:
    argument = context.args[name]
    flag = f"--{argument.names[0]}"
    text = argument.help or ""
    if not argument.takes_value:
        return (f"--[no-]{flag[2:]}" if flag in context.inverse_flags.values() else flag), text
    value = "SECONDS" if argument.optional else argument.names[0].upper()
    return (f"{flag} [{value}]" if argument.optional else f"{flag} {value}"), text
