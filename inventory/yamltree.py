"""YAML text as a tree whose scalars are all text, each with its place in the file.

YAML's own reading of values is what makes ``52:54:00:12:34:56`` a number in base 60, ``022`` eighteen
and ``on`` true. Here nothing is read into anything: the model's types do that. What would surprise is
refused with its place: duplicate keys, tags, merge keys, aliases that contain themselves, a second
document, tabs, control characters.

Lines and columns count from 1, columns in characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from inventory.errors import Problem
from inventory.reading import MAX_BYTES

# A farm file is five levels deep. The limits keep hostile files from exhausting the stack or the
# memory, through nesting or through aliases of aliases.
_MAX_DEPTH = 50
_MAX_NODES = 500_000

# What no text of ours may hold, and what YAML 1.1 takes for line breaks but editors don't (then
# lines would be miscounted): C0 without tab and line feed, DEL, C1 with NEL, LS, PS, byte order mark.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


@dataclass(slots=True)
class ScalarNode:
    line: int
    column: int
    text: str
    plain: bool  # written without quotes

    @property
    def missing(self) -> bool:
        """Nothing was written: ``key:`` and the end of the line."""
        return self.plain and not self.text


@dataclass(slots=True)
class SequenceNode:
    """A YAML sequence."""

    line: int
    column: int
    items: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class MappingNode:
    line: int
    column: int
    keys: dict[str, ScalarNode] = field(default_factory=dict)
    values: dict[str, Node] = field(default_factory=dict)


_YAML = "tag:yaml.org,2002:"
_NO_KEY = ScalarNode(0, 0, "", False)
Node = ScalarNode | SequenceNode | MappingNode
ReportFn = Callable[[int, int, str], None]


def plain(node: Node) -> Any:
    """The tree as dicts, lists and strings. Aliases give one object in several places."""
    if isinstance(node, ScalarNode):
        return node.text
    if isinstance(node, SequenceNode):
        return [plain(item) for item in node.items]
    return {key: plain(value) for key, value in node.values.items()}


def parse(data: bytes, file: str) -> tuple[MappingNode | None, list[Problem]]:
    """The tree, and what is wrong with the text. The tree is None where there is none to speak of; there
    may be one although there are problems, such as duplicate keys. Raises nothing."""
    problems: list[Problem] = []

    def report(line: int, column: int, message: str) -> None:
        problems.append(Problem(file, line, column, message))

    text = _decode(data, report)
    if text is None:
        return None, problems
    _check_characters(text, report)
    if problems:
        return None, problems
    try:
        root = _Builder(report).build(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if "end of stream" in (error.problem or "") and error.context_mark:
            mark = error.context_mark  # where it begins says more than that the file ended
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        report(line, column, f"not YAML: {_words(error, text.split(chr(10))[line - 1 : line], column)}")
        return None, problems
    except yaml.YAMLError as error:
        report(1, 1, f"not YAML: {' '.join(str(error).split())}")
        return None, problems
    if root is None or (isinstance(root, ScalarNode) and root.missing):
        if not problems:
            report(1, 1, "the file is empty: a farm file has at least 'farm' and 'vms'")
        return None, problems
    if not isinstance(root, MappingNode):
        kind = "a list" if isinstance(root, SequenceNode) else "text"
        report(root.line, root.column, f"a farm file is made of keys with values, this is {kind}")
        return None, problems
    return root, problems


def _decode(data: bytes, report: ReportFn) -> str | None:
    if len(data) > MAX_BYTES:
        report(1, 1, f"larger than {MAX_BYTES >> 20} MiB: not a farm file")
        return None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        report(1, 1, "the file is UTF-16: save it as UTF-8")
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace").replace("\r\n", "\n")
        report(*_place(before, len(before)), f"byte 0x{data[error.start]:02x} is not UTF-8")
        return None
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _place(text: str, offset: int) -> tuple[int, int]:
    start = text.rfind("\n", 0, offset) + 1
    return text.count("\n", 0, offset) + 1, offset - start + 1


def _check_characters(text: str, report: ReportFn) -> None:
    for match in _FORBIDDEN.finditer(text):
        report(*_place(text, match.start()), f"character U+{ord(match[0]):04X} is not allowed")
        return  # a binary file has thousands


def _words(error: yaml.MarkedYAMLError, lines: list[str], column: int) -> str:
    """What the parser says is wrong, with the usual cause where it doesn't say it."""
    problem = error.problem or error.context or "it can't be read"
    here = lines[0][column - 1 : column] if lines else ""
    if here == "\t":
        return "a tab: indent with spaces"
    if "cannot start any token" in problem:
        return f"nothing can begin with {here!r}: put quotes around text"
    if "mapping values are not allowed" in problem:
        return "a second ':' in one line: put quotes around text that contains ': '"
    if "end of stream" in problem and "quoted" in (error.context or ""):
        return "this quote is never closed"
    if error.context and error.context_mark:
        return f"{problem} ({error.context} that begins in line {error.context_mark.line + 1})"
    return problem


class _Builder:
    """Builds the tree from the parser's events without recursion: no file can exhaust the stack."""

    def __init__(self, report: ReportFn) -> None:
        self._report = report
        self._root: Node | None = None
        self._open: list[
            tuple[SequenceNode | MappingNode, str]
        ] = []  # what is being filled, and its anchor
        self._keys: list[ScalarNode | None] = []  # the key whose value comes next, for each mapping
        self._anchors: dict[str, tuple[Node, int, int]] = {}  # with its nodes and depth
        self._counts: list[int] = []  # nodes in each open one
        self._depths: list[int] = []  # levels below each open one
        self._nodes = 0

    def build(self, text: str) -> Node | None:
        documents = 0
        events: Iterable[Any] = yaml.parse(text, Loader=yaml.CBaseLoader)
        for event in events:
            match event:
                case yaml.ScalarEvent():
                    self._tag(event)
                    style = event.style  # None or "" is plain for the C parser
                    scalar = ScalarNode(*_start(event), event.value, not style)
                    self._value(scalar)
                    self._add(scalar, event.anchor or "", 1, 0)
                case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                    self._tag(event)
                    mapping = isinstance(event, yaml.MappingStartEvent)
                    kind = MappingNode if mapping else SequenceNode
                    if len(self._open) == _MAX_DEPTH:
                        self._report(*_start(event), "nested too deeply")
                        return None
                    self._open.append((kind(*_start(event)), event.anchor or ""))
                    self._keys.append(None)
                    self._counts.append(1)
                    self._depths.append(0)
                case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                    node, anchor = self._open.pop()
                    self._keys.pop()
                    self._add(node, anchor, self._counts.pop(), self._depths.pop())
                case yaml.AliasEvent():
                    if not self._alias(event):
                        return None
                case yaml.DocumentStartEvent():
                    documents += 1
                    if documents == 2:
                        self._report(*_start(event), "a second document: one farm file, one farm")
                        return self._root
        return self._root

    def _tag(self, event: Any) -> None:
        if event.tag is not None:
            tag = _quote(event.tag.replace(_YAML, "!!"))
            self._report(*_start(event), f"tag {tag}: tags are not allowed here")

    def _value(self, scalar: ScalarNode) -> None:
        # Escapes in double quotes can bring in what the file's own text may not hold.
        match = _FORBIDDEN.search(scalar.text)
        if match:
            self._report(
                scalar.line,
                scalar.column,
                f"character U+{ord(match[0]):04X}, written as an escape, is not allowed",
            )
            scalar.text = _FORBIDDEN.sub("?", scalar.text)
        elif scalar.plain and scalar.text in ("~", "null", "Null", "NULL"):
            self._report(
                scalar.line,
                scalar.column,
                f"{scalar.text} says nothing: leave the key out (or quote it, if it is meant as text)",
            )
            scalar.text = ""

    def _alias(self, event: Any) -> bool:
        place = _start(event)
        if any(anchor == event.anchor for _, anchor in self._open):
            self._report(*place, f"alias *{event.anchor} stands inside what it stands for")
            return False
        if event.anchor not in self._anchors:
            self._report(*place, f"alias *{event.anchor}: there is no &{event.anchor} before it")
            return False
        node, count, depth = self._anchors[event.anchor]
        self._nodes += count
        if self._nodes > _MAX_NODES or len(self._open) + depth > _MAX_DEPTH:
            self._report(*place, "aliases of aliases: too many values, or nested too deeply")
            return False
        self._add(node, "", count, depth)
        return True

    def _add(self, node: Node, anchor: str, count: int, depth: int) -> None:
        if anchor:
            self._anchors[anchor] = node, count, depth
        if not self._open:
            self._root = node
            return
        self._counts[-1] += count
        self._depths[-1] = max(self._depths[-1], depth + 1)
        parent = self._open[-1][0]
        if isinstance(parent, SequenceNode):
            parent.items.append(node)
        elif self._keys[-1] is None:
            self._keys[-1] = self._key(parent, node)
        else:
            key = self._keys[-1]
            self._keys[-1] = None
            if key is _NO_KEY or key.text in parent.values:  # reported; of two, the first one stays
                return
            parent.keys[key.text] = key
            parent.values[key.text] = node

    def _key(self, parent: MappingNode, node: Node) -> ScalarNode:
        if not isinstance(node, ScalarNode):
            self._report(node.line, node.column, "a key must be a word, not a list or mapping")
        elif node.text == "<<" and node.plain:
            self._report(node.line, node.column, "merge keys ('<<') are not supported: write it out")
        elif node.missing:
            self._report(node.line, node.column, "a key is missing before ':'")
        elif node.text in parent.keys:
            first = parent.keys[node.text]
            self._report(
                node.line,
                node.column,
                f"duplicate key {_quote(node.text)}: "
                f"it is in line {first.line}, column {first.column} already",
            )
            return node
        else:
            return node
        return _NO_KEY


def _start(event: Any) -> tuple[int, int]:
    mark = event.start_mark
    return mark.line + 1, mark.column + 1


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
