"""A dhcpd.conf as statements, dhcpd.conf(5): each ends with ';', or holds more in braces. Which of them
means what is for others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from provision.network.sources import SourceLine, Sources, one_line

_MAX_STATEMENTS = 100_000
_MAX_DEPTH = 50
_TOKEN = re.compile(r'\s+|#[^\n]*|"[^"\\]*(?:\\.[^"\\]*)*"|"|[{};,]|[^\s{};,"#]+', re.DOTALL)
_SERVER_DIRECTORY = Path("/")
"""Where systemd starts it: its relative names begin there."""


@dataclass(frozen=True, slots=True)
class DhcpdStatement:
    """``words``: without commas and quotes, the first in lower case. ``text``: as written, on one line,
    without what it holds. ``inner``: that; None where it ends with ';'."""

    words: tuple[str, ...]
    text: str
    line: SourceLine
    inner: list[DhcpdStatement] | None = None

    @property
    def kind(self) -> str:
        """Its keyword."""
        return self.words[0] if self.words else ""

    @property
    def head(self) -> str:
        """As written; of a block, what stands before the braces."""
        return self.text if self.inner is None else f"{self.text} {{ ... }}"


Scope = tuple[DhcpdStatement, ...]
"""The blocks that a statement is in, the outermost first."""


def read_statements(sources: Sources, path: Path) -> list[DhcpdStatement]:
    """InventoryError, and as ``Sources.text``."""
    top: list[DhcpdStatement] = []
    _StatementReader(sources, path.parent).read(path, top)
    return top


def walk(
    statements: Sequence[DhcpdStatement], scope: Scope = ()
) -> Iterator[tuple[DhcpdStatement, Scope]]:
    """Each, and each that it holds."""
    for statement in statements:
        yield statement, scope
        yield from walk(statement.inner or (), (*scope, statement))


class _StatementReader:
    def __init__(self, sources: Sources, directory: Path) -> None:
        self._sources = sources
        self._directories = directory, _SERVER_DIRECTORY
        self._count = 0

    def read(
        self,
        path: Path,
        into: list[DhcpdStatement],
        by: SourceLine | None = None,
        depth: int = 0,
    ) -> None:
        """An include stands for its file's statements, in their place."""
        line = 1
        parts: list[str] = []
        words: list[str] = []
        begun = SourceLine(path, line)
        open_: list[tuple[list[DhcpdStatement], SourceLine]] = [(into, begun)]

        def statement(inner: list[DhcpdStatement] | None) -> DhcpdStatement:
            self._count += 1
            if self._count > _MAX_STATEMENTS:
                raise begun.wrong(f"with this there are more than {_MAX_STATEMENTS} statements")
            text = one_line("".join(parts))
            return DhcpdStatement((words[0].lower(), *words[1:]) if words else (), text, begun, inner)

        with self._sources.text(path, by) as text:
            for match in _TOKEN.finditer(text):
                part = match[0]
                if part == '"':
                    raise SourceLine(path, line).wrong("a '\"' that is never closed")
                if part == ";":
                    if len(words) == 2 and words[0].lower() == "include":
                        self._include(words[1], open_[-1][0], begun, depth + len(open_) - 1)
                    elif words:
                        open_[-1][0].append(statement(None))
                    parts, words = [], []
                elif part == "{":
                    inner: list[DhcpdStatement] = []
                    begun = begun if words else SourceLine(path, line)
                    open_[-1][0].append(statement(inner))
                    open_.append((inner, begun))
                    if depth + len(open_) > _MAX_DEPTH:
                        raise begun.wrong(f"more than {_MAX_DEPTH} braces are open")
                    parts, words = [], []
                elif part == "}":
                    if words:
                        raise begun.wrong(f"{_short(words)!r} has no ';' at its end")
                    if len(open_) == 1:
                        raise SourceLine(path, line).wrong("a '}' without its '{'")
                    open_.pop()
                    parts = []
                elif part.isspace():
                    parts.append(" ")
                elif not part.startswith("#"):
                    if not words:
                        begun = SourceLine(path, line)
                    parts.append(part)
                    if part != ",":
                        words.append(part.strip('"'))
                line += part.count("\n")
            if len(open_) > 1:
                raise open_[-1][1].wrong("a '{' that is never closed")
            if words:
                raise begun.wrong(f"{_short(words)!r} has no ';' at its end")

    def _include(self, name: str, into: list[DhcpdStatement], by: SourceLine, depth: int) -> None:
        if found := self._sources.included(name, by, *self._directories):
            self.read(found, into, by, depth)


def _short(words: Sequence[str]) -> str:
    return " ".join(words[:3])[:60]
