"""The family of errors: everything an admin can cause, or can put right.

    FarmhandError
    ├── UsageError        the words on the command line are off
    ├── InventoryError    the farm file is wrong: all its problems at once
    ├── TemplateFailed    a template of a service's file is wrong: its name, line, the lines around
    ├── NotFound          no such VM, template, checkpoint, build, file
    ├── Conflict          the name, address or port is taken
    │   └── NotOurs       ... by something without our ownership mark: never touched
    ├── Busy              somebody else holds the lock
    ├── WrongState        not possible while it is running / stopped / dirty
    ├── Unsupported       this driver or host can't do it
    ├── NoSpace           it would not fit, so it was not begun
    ├── CommandFailed     a host command failed; shown so that it can be pasted
    ├── DriverFailed      the hypervisor or its daemon refused
    ├── TimedOut          a wait ended; shows the console's tail where there is one
    ├── BuildFailed       a step of the build cycle failed
    ├── Interrupted       Ctrl-C or a signal; says how to go on
    └── Several           more than one VM failed: each with its own error

Each carries one line that says what and where, and a remedy that says what to do. A driver turns
its library's errors into these once; nothing above a driver sees libvirt's or asyncssh's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice


class FarmhandError(Exception):
    """Base of the family. ``str(error)`` is one line; ``detail`` may hold more (a log's tail)."""

    exit_status = 1

    def __init__(self, message: str, *, remedy: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.detail = detail

    def as_dict(self) -> Mapping[str, object]:
        """The error as ``--json`` shows it."""
        return {
            "error": type(self).__name__,
            "message": self.message,
            "remedy": self.remedy,
            "detail": self.detail,
        }


class UsageError(FarmhandError):
    exit_status = 2


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

    exit_status = 2

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


class NotFound(FarmhandError):
    pass


class Conflict(FarmhandError):
    pass


class NotOurs(Conflict):
    pass


class Busy(FarmhandError):
    pass


class WrongState(FarmhandError):
    pass


class Unsupported(FarmhandError):
    pass


class NoSpace(FarmhandError):
    pass


class CommandFailed(FarmhandError):
    """``argv`` is already masked: it may be shown."""

    def __init__(
        self,
        message: str,
        *,
        argv: Sequence[str] = (),
        status: int | None = None,
        stderr: str = "",
        remedy: str = "",
        detail: str = "",
    ) -> None:
        super().__init__(message, remedy=remedy, detail=detail)
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr


class DriverFailed(FarmhandError):
    pass


class TimedOut(FarmhandError):
    pass


class BuildFailed(FarmhandError):
    """``build`` is the id of its record."""

    build = ""

    def as_dict(self) -> Mapping[str, object]:
        return {**super().as_dict(), "build": self.build}


class Interrupted(FarmhandError):
    """``build`` is the id of the build that was interrupted, if one was."""

    exit_status = 130
    build = ""


def some(names: Collection[str], most: int = 6, *, by: str = ", ") -> str:
    """Names, or other short texts, few of them however many there are: ``a, b, c and 97 more``."""
    more = len(names) - most
    if more < 2:  # one is as short as to say that it's there
        return by.join(names)
    return f"{by.join(islice(names, most))} and {more} more"


class Several(FarmhandError):
    """More than one VM failed; what went well with the others stands. Its one line names them, or some
    of many; ``detail`` has what that leaves out."""

    def __init__(self, errors: Mapping[str, FarmhandError]) -> None:
        self.errors = dict(errors)
        told, more = [], []
        for vm, error in self.errors.items():
            first, *rest = error.message.removeprefix(f"{vm}: ").splitlines() or [""]
            told.append(f"{vm}: {first}")
            more.append("\n    ".join((told[-1], *rest, *error.detail.splitlines())))
        remedies = tuple(dict.fromkeys(e.remedy for e in self.errors.values() if e.remedy))
        line = some(told, by="; ")
        super().__init__(
            f"{len(self.errors)} VMs failed: {line}",
            remedy=some(remedies, by="; "),
            detail="\n".join(text for text in more if text not in line),
        )

    def as_dict(self) -> Mapping[str, object]:
        return {
            **super().as_dict(),
            "errors": {vm: dict(error.as_dict()) for vm, error in self.errors.items()},
        }
