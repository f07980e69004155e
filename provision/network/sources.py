"""An admin's own files, read for network-import: with those that they include, and within bounds, for
nobody knows what they are."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from host.files import file_error
from host.printable import plain
from inventory.errors import InventoryError, NotFound, Problem

MAX_BYTES = 4 * 2**20
"""Of all files together."""
_LEAST = 1024
"""What a file counts for at least: there are no more than a few thousand."""
_MAX_DEPTH = 20
"""Of files that include one another."""


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of a file, from 1."""

    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"

    def wrong(self, words: str) -> InventoryError:
        """The error for what stands there."""
        return InventoryError([Problem(one_line(str(self.path)), self.line, 1, one_line(words))])


def one_line(text: str, most: int = 300) -> str:
    """Text of such a file, fit for a comment and a terminal, and not more of it than helps."""
    shown = " ".join(plain(text).split())
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


@dataclass(frozen=True, slots=True)
class Left:
    """What of a file a farm file doesn't say. ``gone``: it stands with lines that are to be taken out;
    else it stays where it is."""

    line: SourceLine
    words: str
    gone: bool = False

    def __str__(self) -> str:
        return one_line(f"{self.line}: {self.words}", 1000)


class Sources:
    """``files``: each that was read, once. ``missing``: includes whose files aren't there."""

    def __init__(self) -> None:
        self.files: dict[Path, None] = {}
        self.missing: list[Left] = []
        self._open: list[str] = []
        self._room = MAX_BYTES

    def included(self, name: str, by: SourceLine, *directories: Path) -> Path | None:
        """The file of that name in the first of these directories that has it. None: none has."""
        paths = [directory / name for directory in directories]
        for path in paths:
            if os.path.exists(path):  # noqa: PTH110 - Path.exists raises where we may not look
                return path
        places = " or ".join(str(path) for path in dict.fromkeys(paths))
        words = f"include of {name}: no file {places}: copy it there, and import again"
        self.missing.append(Left(by, words))
        return None

    @contextmanager
    def text(self, path: Path, by: SourceLine | None = None) -> Iterator[str]:
        """A file's text, its lines ended by line feeds alone; bytes that aren't UTF-8 are U+FFFD. While
        it is in use, whatever includes it again is refused. ``by``: the line that includes it.

        NotFound, InventoryError, WrongState."""
        here = by or SourceLine(path, 1)
        real = os.path.realpath(path)  # Path.resolve raises RuntimeError for a loop of links
        if real in self._open:
            raise here.wrong(f"{path} is included by itself")
        if len(self._open) == _MAX_DEPTH:
            raise here.wrong(f"files include one another more than {_MAX_DEPTH} deep")
        data = self._read(path, here)
        self.files[path] = None
        self._open.append(real)
        try:
            yield data.decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
        finally:
            self._open.pop()

    def _read(self, path: Path, here: SourceLine) -> bytes:
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would be waited for
                raise here.wrong(f"{path} is not a regular file")
            with path.open("rb") as file:
                data = file.read(self._room + 1)
        except FileNotFoundError:
            raise NotFound(f"no file {path}", remedy="give the path of one") from None
        except OSError as error:
            raise file_error(error, path, "read") from error
        self._room -= max(len(data), _LEAST)
        if self._room < 0:
            raise here.wrong(f"{path}: with it there is more than {MAX_BYTES >> 20} MiB to read")
        if (at := data.find(b"\0")) >= 0:
            raise SourceLine(path, data.count(b"\n", 0, at) + 1).wrong("a NUL: this is not a text file")
        return data
