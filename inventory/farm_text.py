"""A farm file's text, changed at single places: comments, order and all other formatting stay.

Values are written in the style that they had. A key that isn't there yet comes first in its section, in
the style of that: there no comment of a neighbour's is torn off.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import yaml

from inventory.errors import UsageError
from inventory.places import Path as Place

_PLAIN = re.compile(r"[A-Za-z0-9/][A-Za-z0-9._/~+@-]*(?::[A-Za-z0-9._/~+@-]+)*")
_NOTHING = ("null", "Null", "NULL")  # would say nothing, were it plain
_ANCHOR = re.compile(r"&\S+\s+")


class FarmText:
    """The text of a farm file that loads. UsageError from each method where one place of it stands for
    several things (an alias) that are to become different."""

    def __init__(self, data: bytes, file: Path) -> None:
        self._file = file
        text = data.decode().removeprefix("\ufeff")
        self._ends = "\r\n" if "\r\n" in text else "\n"
        self._text = text.replace("\r\n", "\n")
        root = yaml.compose(self._text, Loader=yaml.CBaseLoader)
        assert root is not None
        self._root: yaml.Node = root
        self._lines = [0, *accumulate(len(line) + 1 for line in self._text.split("\n"))]
        self._known: dict[int, dict[str | int, list[yaml.Node]]] = {}
        self._edits: dict[tuple[int, int], str] = {}
        self._keys: dict[int, tuple[yaml.Node, dict[str, str]]] = {}

    def has(self, place: Place) -> bool:
        """Whether the file says something there."""
        return self._node(place) is not None

    def set(self, place: Place, value: str) -> None:
        """Make this the value there. Its section is there."""
        node = self._node(place)
        if node is None:
            self._insert(place, _written(value))
        else:
            assert isinstance(node, yaml.ScalarNode), place
            self._replace(node, _written(value, node.style))

    def add(self, place: Place, values: Sequence[str]) -> None:
        """Put these first in the list there, which may be one value alone, or absent."""
        new = [_written(value) for value in values]
        node = self._node(place)
        if node is None:
            self._insert(place, f"[{', '.join(new)}]")
        elif isinstance(node, yaml.ScalarNode):
            old = [_written(node.value)] if node.value else []
            self._replace(node, f"[{', '.join([*new, *old])}]")
        elif isinstance(node, yaml.SequenceNode) and node.flow_style:
            start = self._text.index("[", self._start(node)) + 1
            self._edit(start, start, ", ".join(new) + (", " if node.value else ""))
        else:
            dash = self._text.rindex("-", 0, self._start(node.value[0]))
            margin = "\n" + " " * (dash - self._line_start(dash))
            self._edit(dash, dash, "".join(f"- {one}{margin}" for one in new))

    def text(self, head: Sequence[str] = ()) -> str:
        """The whole text. ``head``: its first comments; what editors read stays before them."""
        for node, given in self._keys.values():
            self._write_keys(node, given)
        self._keys.clear()
        parts, at = [], 0
        for (start, end), new in sorted(self._edits.items()):
            parts += [self._text[at:start], new]
            at = end
        whole = "".join((*parts, self._text[at:]))
        first, line_break, rest = whole.partition("\n")
        comments = "".join(f"# {line}".rstrip() + "\n" for line in head)
        if head and first.startswith("# yaml-language-server:"):
            whole = f"{first}{line_break}{comments}{rest}"
        else:
            whole = f"{comments}{whole}"
        return whole.replace("\n", self._ends)

    # ---- Places

    def _node(self, place: Place) -> yaml.Node | None:
        """None: nothing is there. Where one value stands for a list of it, that is its first."""
        node = self._root
        for part in place:
            if isinstance(node, yaml.MappingNode):
                found = self._values(node).get(part, [])
            elif isinstance(node, yaml.SequenceNode):
                found = node.value[part : part + 1] if isinstance(part, int) else []
            else:
                found = [node] if part == 0 else []
            if not found:
                return None
            node = found[0]
        return node

    def _values(self, node: yaml.MappingNode) -> dict[str | int, list[yaml.Node]]:
        """By their keys; made once, for there may be thousands of VMs."""
        if id(node) not in self._known:
            self._known[id(node)] = {key.value: [value] for key, value in node.value}
        return self._known[id(node)]

    def _start(self, node: yaml.Node) -> int:
        return self._lines[node.start_mark.line] + int(node.start_mark.column)

    def _line_start(self, offset: int) -> int:
        return self._lines[bisect_right(self._lines, offset) - 1]

    # ---- Edits

    def _replace(self, node: yaml.ScalarNode, new: str) -> None:
        start, end = self._start(node), self._lines[node.end_mark.line] + int(node.end_mark.column)
        if anchor := _ANCHOR.match(self._text, start, end):
            start = anchor.end()
        if start == end:
            new = f" {new}"  # right behind its key's colon
        elif node.style in ("|", ">"):
            new += "\n"
        self._edit(start, end, new)

    def _edit(self, start: int, end: int, new: str) -> None:
        if self._edits.setdefault((start, end), new) != new:
            raise self._shared(start)

    def _insert(self, place: Place, new: str) -> None:
        section, key = self._node(place[:-1]), str(place[-1])
        assert section is not None, place
        _, given = self._keys.setdefault(id(section), (section, {}))
        if given.setdefault(key, new) != new:
            raise self._shared(self._start(section))

    def _write_keys(self, section: yaml.Node, given: dict[str, str]) -> None:
        inner = ", ".join(f"{key}: {value}" for key, value in given.items())
        if isinstance(section, yaml.ScalarNode):  # nothing is written there yet
            self._replace(section, f"{{{inner}}}")
        elif isinstance(section, yaml.MappingNode) and section.flow_style:
            start = self._text.index("{", self._start(section)) + 1
            self._edit(start, start, inner + (", " if section.value else ""))
        else:
            first = self._start(section.value[0][0])
            margin = "\n" + " " * (first - self._line_start(first))
            self._edit(first, first, "".join(f"{key}: {new}{margin}" for key, new in given.items()))

    def _shared(self, offset: int) -> UsageError:
        line = bisect_right(self._lines, offset)
        return UsageError(
            f"{self._file}:{line}: this stands for several things (an alias, *) that are to differ",
            remedy="write it out at each place, then again",
        )


def _written(value: str, style: str | None = None) -> str:
    """As YAML has it, in that style where it can be."""
    if style == "'" and "'" not in value:
        return f"'{value}'"
    if style == '"' or not _PLAIN.fullmatch(value) or value in _NOTHING:
        return json.dumps(value, ensure_ascii=False)
    return value
