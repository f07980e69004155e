"""The family of errors: everything an admin can cause, or can put right.

    FarmhandError
    ├── UsageError        the words on the command line are off
    ├── InventoryError    the farm file is wrong: all its problems at once
    ├── TemplateFailed    a template of a service's file is wrong: its name, line, the lines around
    ├── ToolsFailed       what was to be added to a VM's clean could not be
    ├── NotFound          no such checkpoint, build, file, machine
    │   └── UnknownName   ... or a name was asked for that the farm file doesn't have: a VM, a template
    ├── Conflict          the name, address or port is taken
    │   └── NotOurs       ... by something without our ownership mark: never touched
    ├── Busy              somebody else holds the lock
    ├── LeaseLost         somebody else may have changed what was just being changed: nothing more is
    ├── WrongState        not possible while it is running / stopped / dirty
    ├── Unsupported       this driver or host can't do it
    ├── NoSpace           it would not fit, so it was not begun
    ├── Unfit             a guest sent what is not taken: too much, or under a name that can't be kept
    ├── CommandFailed     a host command failed; shown so that it can be pasted
    ├── DriverFailed      the hypervisor or its daemon refused
    │   └── ConnectionLost  ... or what we speak to it, or to a guest, over has gone
    ├── TimedOut          a wait ended; shows the console's tail where there is one
    ├── BuildFailed       a step of the build cycle failed
    ├── Interrupted       Ctrl-C or a signal; says how to go on
    └── Several           more than one VM failed: each with its own error

Each carries one line that says what and where, and a remedy that says what to do. A driver turns
its library's errors into these once; nothing above a driver sees libvirt's or asyncssh's own.

No decision is made by an error's words: what is asked of it is its class, or its ``vm``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from inventory.endings import BUILD, BUSY, ENVIRONMENT, FAILED, INTERRUPTED, USAGE, Ending

Flag: TypeAlias = str | bool | tuple[str, ...]
"""A flag's value: True for a switch, a tuple for one that is repeated."""


@dataclass(frozen=True, slots=True, init=False)
class Call:
    """A task of farmhand with its flags, for somebody to do next. Each face (a command line, a page,
    REST) words it."""

    task: str
    flags: tuple[tuple[str, Flag], ...]

    def __init__(self, task: str, **flags: Flag | Sequence[str] | None) -> None:
        """``Call("reset", vm="prod", to="clean")``. None, False and an empty sequence are left out;
        ``from_`` is ``--from``, and ``keep_going`` is ``--keep-going``."""
        given: list[tuple[str, Flag]] = []
        for name, value in flags.items():
            if isinstance(value, str) or value:
                plain = value if isinstance(value, str | bool) else tuple(value)
                given.append((name.rstrip("_").replace("_", "-"), plain))
        object.__setattr__(self, "task", task)
        object.__setattr__(self, "flags", tuple(given))

    def words(self) -> tuple[str, ...]:
        """As a command line has it, from the task on."""
        found = [self.task]
        for name, value in self.flags:
            for each in value if isinstance(value, tuple) else (value,):
                found += (f"--{name}", each) if isinstance(each, str) else (f"--{name}",)
        return tuple(found)

    def as_dict(self) -> dict[str, object]:
        """Plain JSON values; ``Call(task, **flags)`` reads them."""
        return {"task": self.task, "flags": dict(self.flags)}

    def __str__(self) -> str:
        return shlex.join(self.words())


Text: TypeAlias = "str | Call | tuple[Text, ...]"
"""What somebody is told: strings and calls, in the order in which they are read."""
Remedy: TypeAlias = Text
"""What to do; ``""`` where nothing is known."""


def spelled(text: Text, how: Callable[[Call], str] = str) -> str:
    """As one string, its calls as ``how`` has them."""
    if isinstance(text, str):
        return text
    if isinstance(text, Call):
        return how(text)
    return "".join(spelled(part, how) for part in text)


def calls_in(text: object) -> tuple[Call, ...]:
    """The calls that a text names, in its order; none in what is no text."""
    if isinstance(text, Call):
        return (text,)
    return tuple(call for part in text for call in calls_in(part)) if isinstance(text, tuple) else ()


def remedy_as_data(remedy: Remedy) -> object:
    """Plain JSON values."""
    if isinstance(remedy, str):
        return remedy
    if isinstance(remedy, Call):
        return remedy.as_dict()
    return [remedy_as_data(part) for part in remedy]


def remedy_of(data: Any, depth: int = 20) -> Remedy:
    """What ``remedy_as_data`` made. ValueError for anything else."""
    match data:
        case str():
            return data
        case list() if depth:
            return tuple(remedy_of(part, depth - 1) for part in data)
        case {"task": str(task), "flags": dict(flags)} if all(map(_is_flag, flags.values())):
            with suppress(TypeError):  # a flag by the name of one of Call's own
                return Call(task, **flags)
    raise ValueError("what it says to do is no text of farmhand's")


def _is_flag(value: object) -> bool:
    parts = value if isinstance(value, list) else [value]
    return isinstance(value, bool) or all(isinstance(part, str) for part in parts)


def joined(texts: Iterable[Text], by: str = "; ") -> Text:
    """Several as one; a string where all are."""
    found = list(texts)
    strings = [text for text in found if isinstance(text, str)]
    if len(strings) == len(found):
        return by.join(strings)
    return tuple(part for text in found for part in (by, text))[1:]


class FarmhandError(Exception):
    """Base of the family. ``str(error)`` is one line; ``detail`` may hold more (a log's tail).

    ``vm``: the VM that it is about; ``what`` is the line without its name in front, ``message`` with it.
    ``of``: what else is named in front of that, such as a network service or the farm file.
    """

    ending = FAILED
    """How a command ends that ends with it."""
    unfinished = False
    """Whether what it ended is neither done nor undone, and must stay so: recovery goes on with it."""

    def __init__(
        self, what: str, *, vm: str = "", of: str = "", remedy: Remedy = "", detail: str = ""
    ) -> None:
        self.what = what
        self.vm = vm
        self.message = ": ".join(filter(None, (of, vm, what)))
        super().__init__(self.message)
        self.remedy = remedy
        self.detail = detail

    @property
    def bare(self) -> str:
        """The line for somebody who has named what it is ``of``."""
        return f"{self.vm}: {self.what}" if self.vm else self.what

    def as_dict(self) -> Mapping[str, object]:
        """The error as data; its remedy is worded by the face that shows it."""
        return {
            "error": type(self).__name__,
            "class": self.ending.word,
            "message": self.message,
            "vm": self.vm,
            "remedy": self.remedy,
            "detail": self.detail,
        }


class UsageError(FarmhandError):
    ending = USAGE


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a farm file. Lines and columns count from 1."""

    file: str
    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class InventoryError(FarmhandError):
    """Everything wrong in one farm file, in the order of its lines."""

    ending = USAGE

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.file, p.line, p.column)))
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def as_dict(self) -> Mapping[str, object]:
        return {
            **super().as_dict(),
            "problems": [
                {"file": p.file, "line": p.line, "column": p.column, "message": p.message}
                for p in self.problems
            ],
        }


class TemplateFailed(FarmhandError):
    pass


class ToolsFailed(FarmhandError):
    pass


class NotFound(FarmhandError):
    pass


class UnknownName(NotFound):
    """Of a name that was asked for, and that the farm file, or a build's record, says nothing of; or of
    the farm file itself. What is declared and gone, or is not made, is NotFound."""

    ending = USAGE


class Conflict(FarmhandError):
    pass


class NotOurs(Conflict):
    pass


class Busy(FarmhandError):
    ending = BUSY


class LeaseLost(FarmhandError):
    unfinished = True


class WrongState(FarmhandError):
    pass


class Unsupported(FarmhandError):
    ending = ENVIRONMENT


class NoSpace(FarmhandError):
    ending = ENVIRONMENT


class Unfit(FarmhandError):
    pass


class CommandFailed(FarmhandError):
    """``argv`` is already masked: it may be shown."""

    ending = ENVIRONMENT

    def __init__(
        self,
        message: str,
        *,
        vm: str = "",
        argv: Sequence[str] = (),
        status: int | None = None,
        stderr: str = "",
        remedy: Remedy = "",
        detail: str = "",
    ) -> None:
        super().__init__(message, vm=vm, remedy=remedy, detail=detail)
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr


class DriverFailed(FarmhandError):
    ending = ENVIRONMENT


class ConnectionLost(DriverFailed):
    pass


class TimedOut(FarmhandError):
    pass


class BuildFailed(FarmhandError):
    """``build`` is the id of its record."""

    ending = BUILD
    build = ""

    def as_dict(self) -> Mapping[str, object]:
        return {**super().as_dict(), "build": self.build}


class Interrupted(FarmhandError):
    """``build`` is the id of the build that was interrupted, if one was."""

    ending = INTERRUPTED
    build = ""


def some(names: Collection[str], most: int = 6, *, by: str = ", ") -> str:
    """Names, or other short texts, few of them however many there are: ``a, b, c and 97 more``."""
    more = len(names) - most
    if more < 2:  # one is as short as to say that it's there
        return by.join(names)
    return f"{by.join(islice(names, most))} and {more} more"


def did_you_mean(word: str, known: Iterable[str], otherwise: str, *, before: str = "") -> str:
    """The remedy for a name that isn't among ``known``: the nearest one, or ``otherwise``. ``before``:
    what all of them begin with, as flags do; it makes none the nearer."""
    from difflib import get_close_matches  # only when something is wrong

    near = get_close_matches(word.removeprefix(before), [one.removeprefix(before) for one in known], 1)
    return f"did you mean {before}{near[0]}?" if near else otherwise


def some_remedies(errors: Iterable[FarmhandError], most: int = 6) -> Remedy:
    """The remedies of several errors, each once, few of them however many there are."""
    found = tuple(dict.fromkeys(error.remedy for error in errors if error.remedy))
    more = len(found) - most
    return joined(found) if more < 2 else joined((joined(found[:most]), f" and {more} more"), "")


class Several(FarmhandError):
    """More than one VM failed; what went well with the others stands. Its one line names them, or some
    of many, those that failed alike together; ``detail`` has what that leaves out."""

    def __init__(self, errors: Mapping[str, FarmhandError]) -> None:
        self.errors = dict(errors)
        alike: dict[tuple[str, ...], list[str]] = {}
        for vm, error in self.errors.items():
            line = error.what if error.vm == vm else error.message
            lines = (*(line.splitlines() or [""]), *error.detail.splitlines())
            alike.setdefault(lines, []).append(vm)
        told, more = [], []
        for (first, *rest), vms in alike.items():
            told.append(f"{some(vms)}: {first}")
            more.append("\n    ".join((f"{', '.join(vms)}: {first}", *rest)))
        names = some(told, by="; ")
        super().__init__(
            f"{len(self.errors)} VMs failed: {names}",
            remedy=some_remedies(self.errors.values()),
            detail="\n".join(text for text in more if text not in names),
        )

    @property
    def ending(self) -> Ending:  # type: ignore[override]
        """That of all of them, where they have one in common."""
        found = {error.ending for error in self.errors.values()}
        return found.pop() if len(found) == 1 else FAILED

    @property
    def unfinished(self) -> bool:  # type: ignore[override]
        return any(error.unfinished for error in self.errors.values())

    def as_dict(self) -> Mapping[str, object]:
        return {
            **super().as_dict(),
            "errors": {vm: dict(error.as_dict()) for vm, error in self.errors.items()},
        }
