"""What people type, made the words that invoke reads: names without their flag (``reset prod``), and a
command after ``--`` (``ssh build -- ls -l``). What is none of a task's words is refused here, with what
could be meant: invoke has no idea then, and takes flags such as ``--dry`` that do nothing here.

One word may be a name and a task's, too (a VM called ``build``). After a task that takes names it is the
name, if the farm has it; only else it is the next task. What only looks is not followed by what changes
something in that way: ``history build`` never builds."""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from invoke.parser.context import ParserContext

from cli.task_words import TaskWords, task_words
from host.program import PROGRAM
from inventory.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from invoke.collection import Collection as Tasks

NamesFn = Callable[[str, str, str], Collection[str] | None]
"""The farm's names that a flag's value can be: of a task, its flag, in a farm file ("": the usual one).
None: not known."""


class WordReader:
    """``tasks``: all of them. ``contexts``: at least those of the tasks that are typed. ``core``: flags
    that stand before a task, or after it."""

    def __init__(
        self,
        tasks: Collection[str],
        contexts: Mapping[str, ParserContext],
        core: ParserContext,
        names: NamesFn,
    ) -> None:
        self.tasks = tasks
        self.contexts = contexts
        self.core = core
        self.names = names
        self.task = ""
        """The one whose words are read."""
        self._taken: set[str] = set()
        """Its flags that have a value."""

    def plain(self, words: Sequence[str], rest: Sequence[str]) -> list[str]:
        """As invoke reads them. ``rest``: the words after ``--``. UsageError."""
        found: list[str] = []
        left = deque(words)
        while left:
            word = left.popleft()
            if word.startswith("-"):
                found += self._flag(word, left)
            elif not self.task or self._is_next_task(word, words):
                found.append(self.begin(word))
            else:
                found += self._bare(word)
        return [*found, *self._command(rest)] if rest else found

    @property
    def _takes(self) -> TaskWords:
        return task_words.get(self.task, TaskWords())

    def begin(self, word: str) -> str:
        """Begin to read this task's words. UsageError where there is none, with the nearest."""
        if word not in self.tasks:
            known = f"{PROGRAM} --list shows the tasks, {PROGRAM} TASK --help its flags"
            raise UsageError(f"no task {word!r}", remedy=did_you_mean(word, self.tasks, known))
        self.task = word
        self._taken = set()
        return word

    def _is_next_task(self, word: str, words: Sequence[str]) -> bool:
        bare = self._takes.bare
        if not bare:
            return word in self.tasks
        if word not in self.tasks:
            return False
        known = self.names(self.task, bare, farm_in(words))
        if known is None or word in known:
            return False
        if task_words.get(word, TaskWords()).changes and not self._takes.changes:
            raise UsageError(
                f"{self.task}: the farm has no {bare} {word!r}, and the task {word} changes something",
                remedy=f"to have both done: {PROGRAM} {self.task}; then {PROGRAM} {word}",
            )
        return True

    def _flag(self, word: str, left: deque[str]) -> list[str]:
        name, equals, _ = word.partition("=")
        own = self.contexts[self.task] if self.task else self.core
        flags = own.flags if name in own.flags else self.core.flags
        if name not in flags:
            if name in own.inverse_flags and not equals:
                return [word]
            if not name.startswith("--") and name[:2] in self.core.flags:
                return [word]  # -hl
            raise self._unknown(name, own)
        argument = flags[name]
        if not argument.takes_value:
            if equals:
                raise UsageError(f"{name} takes no value", remedy=self._help())
            return [word]
        if argument.name in self._taken and argument.kind is not list:
            raise UsageError(f"{self.task} takes {name} once", remedy=self._help())
        self._taken.add(argument.name)
        if equals:
            return [word]
        if argument.optional:
            # A number, never a name: "reset --wait prod".
            number = left and left[0].isdecimal() and name not in self.core.flags
            return [name, left.popleft()] if number else [name]
        if not left or left[0] in own.flags or left[0] in own.inverse_flags:
            raise UsageError(f"{name} needs a value", remedy=self._help())
        return [name, left.popleft()]

    def _unknown(self, name: str, own: ParserContext) -> UsageError:
        known = [flag for flag in (*own.flags, *own.inverse_flags) if flag.startswith("--")]
        if not self.task:
            if name in _OF_TASKS:
                remedy = f"flags of a task stand after it: {PROGRAM} TASK {name}"
                if name == "--json":
                    remedy += f"; of the tasks: {PROGRAM} --list --list-format json"
            else:
                others = f"flags of a task stand after it; {PROGRAM} --help shows the others"
                remedy = did_you_mean(name, known, others, before="--")
            return UsageError(f"no flag {name} before a task", remedy=remedy)
        if name in _FOREIGN and "--plan" in known:
            return UsageError(f"{self.task} has no flag {name}", remedy="did you mean --plan?")
        return UsageError(
            f"{self.task} has no flag {name}",
            remedy=did_you_mean(name, known, self._help(), before="--"),
        )

    def _bare(self, word: str) -> list[str]:
        takes = self._takes
        if not takes.bare:
            raise UsageError(
                f"{self.task} takes no word {word!r}",
                remedy=did_you_mean(word, self.tasks, self._help()),
            )
        if not takes.many and takes.bare in self._taken:
            command = f"{PROGRAM} {self.task} NAME -- COMMAND"
            raise UsageError(
                f"{self.task} takes one name: {word!r} is one too many",
                remedy=f"what to run there stands after --: {command}" if takes.rest else self._help(),
            )
        self._taken.add(takes.bare)
        return [f"--{takes.bare}", word]

    def _command(self, rest: Sequence[str]) -> list[str]:
        """One word is a line for the shell there. Several are a command and its arguments, which reach
        it as they are."""
        flag = self._takes.rest
        if not flag:
            task = self.task or "no task"
            raise UsageError(f"{task} takes nothing after --", remedy=self._help())
        if flag in self._taken:
            raise UsageError(f"--{flag} and words after --: which is meant?", remedy="give one of them")
        return [f"--{flag}={rest[0] if len(rest) == 1 else shlex.join(rest)}"]

    def _help(self) -> str:
        return f"{PROGRAM} --help {self.task}".rstrip()


_OF_TASKS = ("--farm", "--json", "--plan", "--quiet", "--vm", "--wait")
_FOREIGN = ("--dry", "--dry-run", "--simulate", "--noop", "--check")  # what others call a plan


def context_of(tasks: Tasks, name: str) -> ParserContext:
    """A task's flags."""
    return ParserContext(name, args=tasks[name].get_arguments())


def farm_in(words: Sequence[str]) -> str:
    """The farm file that the words name; "" for none."""
    for word, value in zip(words, (*words[1:], ""), strict=True):
        flag, equals, joined = word.partition("=")
        if flag == "--farm":
            return joined if equals else value
    return ""
