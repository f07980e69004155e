"""Standard input, output and errors, as whoever started us left them: closed, full, or read by nobody.

Writing to them never raises: work is not stopped because somebody stopped reading. What could not be
written is dropped, and ``unwritten`` tells why.

Much of what is written was a guest's, a tool's or another host's first: all of it is made safe to be
shown here (``host.printable``), whoever prints it.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import select
import stat
import sys
from typing import TYPE_CHECKING, TextIO

from host.printable import printable
from inventory.endings import UNWRITTEN

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Output(io.FileIO):
    """Keeps its first error, and is silent from then on."""

    failure: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        if self.failure is None:
            try:
                while (written := super().write(data)) is None:
                    select.select((), (self,), ())  # made non-blocking by another who has it open
            except OSError as error:
                self.failure = error
            else:
                return written
        return memoryview(data).nbytes


class _ForPeople(io.TextIOWrapper):
    """Text for people: ``printable``."""

    def write(self, text: str, /) -> int:
        super().write(printable(text))
        return len(text)

    def steer(self, sequence: str, text: str) -> None:
        super().write(sequence + printable(text))


def steer(stream: TextIO, sequence: str, text: str) -> None:
    """Write a control sequence of our own, which ``write`` would only show, and text, in one go."""
    if isinstance(stream, _ForPeople):
        stream.steer(sequence, text)
    else:
        stream.write(sequence + text)


def take_over() -> None:
    """Before a file that stays open is opened: it would take the place of a closed one of the three,
    and get what is printed. A closed one is /dev/null from here on, for what we start too."""
    if _output() is not None:
        return
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            os.set_inheritable(null, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process lives
    sys.stdout, sys.stderr = _opened(1, sys.stdout), _opened(2, sys.stderr)
    atexit.register(at_end)


def at_end() -> None:
    """invoke prints lists and help by itself, and ends well whatever became of them."""
    if why := unwritten():
        sys.stderr.write(f"farmhand: it could not be written: {why}\n")
        os._exit(UNWRITTEN.status)


def _opened(number: int, known: TextIO | None) -> TextIO:
    """Characters that its encoding lacks, or bytes of a file's name that are no text, are escaped."""
    return _ForPeople(
        io.BufferedWriter(_Output(number, "wb", closefd=False)),
        encoding=known.encoding if known else "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or os.isatty(number),
    )


def unwritten() -> str:
    """Why some of what was printed on standard output is lost, but for want of a reader; "" where
    nothing is."""
    sys.stdout.flush()
    output = _output()
    failure = output.failure if output else None
    return "" if failure is None or _nobody(failure) else failure.strerror or str(failure)


def _output() -> _Output | None:
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Output) else None


def _nobody(failure: OSError) -> bool:
    """The reader has enough (head, less), or its terminal hung up."""
    if failure.errno == errno.EIO:
        return stat.S_ISCHR(os.fstat(1).st_mode)  # else a broken disk
    return failure.errno in (errno.EPIPE, errno.ECONNRESET)


def columns(stream: TextIO, default: int) -> int:
    """Of the terminal that the stream is; ``default`` where it is none, or doesn't say."""
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and int(told):
        return int(told)
    with contextlib.suppress(OSError):  # no terminal, or no file
        return os.get_terminal_size(stream.fileno()).columns or default
    return default
