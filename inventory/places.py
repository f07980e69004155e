"""Where in the file something of the farm stands, and how it is called in a message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from inventory.base import quote
from inventory.errors import Problem
from inventory.yamltree import MappingNode, Node, ScalarNode, SequenceNode

Path = tuple[str | int, ...]
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,63}")


@dataclass(slots=True)
class Places:
    """Places of a farm's parts by their path, such as ("vms", "prod", "proxy", 0, "port")."""

    tree: MappingNode
    file: str
    bad: set[Path] = field(default_factory=set)
    """What the model didn't accept: it is not in the farm, and nothing more is said about it."""
    kept: dict[Path, list[int]] = field(default_factory=dict)
    """For lists that items were taken out of: what number in the file each remaining one has."""

    def in_file(self, path: Sequence[str | int]) -> Path:
        """The farm's path as a path of the file."""
        result: Path = ()
        for part in path:
            kept = self.kept.get(result) if isinstance(part, int) else None
            result += (kept[part] if kept and isinstance(part, int) and part < len(kept) else part,)
        return result

    def is_bad(self, path: Sequence[str | int]) -> bool:
        """Whether this, something that holds it, or something in it was not accepted."""
        if not self.bad:
            return False
        whole = self.in_file(path)
        return self.is_gone(path) or any(bad[: len(whole)] == whole for bad in self.bad)

    def is_gone(self, path: Sequence[str | int]) -> bool:
        """Whether this or something that holds it was not accepted."""
        if not self.bad:
            return False
        whole = self.in_file(path)
        return any(whole[: len(bad)] == bad for bad in self.bad)

    def node(self, path: Path) -> Node | None:
        """The node at a path of the file; None if there is none."""
        node: Node = self.tree
        for part in path:
            if isinstance(node, MappingNode) and isinstance(part, str) and part in node.values:
                node = node.values[part]
            elif isinstance(node, SequenceNode) and isinstance(part, int) and part < len(node.items):
                node = node.items[part]
            else:
                return None
        return node

    def of_value(self, path: Path) -> tuple[int, int]:
        """Line and column of the value at a path of the file. If there is none, those of what would hold
        it."""
        node = self.node(path)
        if node is None:
            return self.of_key(path[:-1])
        if isinstance(node, ScalarNode) and node.missing:
            return self.of_key(path)
        return node.line, node.column

    def of_key(self, path: Path) -> tuple[int, int]:
        """Line and column of the key at a path of the file; for an item of a list, of the item."""
        if not path:
            return self.tree.line, self.tree.column
        parent = self.node(path[:-1])
        if isinstance(parent, MappingNode) and path[-1] in parent.keys:
            key = parent.keys[str(path[-1])]
            return key.line, key.column
        return self.of_value(path)

    def problem(
        self, path: Sequence[str | int], message: str, *, key: bool = False, named: bool = True
    ) -> Problem:
        """A problem of the value at a path of the farm, or with ``key`` of its key. ``named``: the
        message begins with the path."""
        whole = self.in_file(path)
        line, column = self.of_key(whole) if key else self.of_value(whole)
        name = self.name(whole) if named else ""
        return Problem(self.file, line, column, f"{name}: {message}" if name else message)

    def name(self, path: Path) -> str:
        """A path of the file as messages have it: ``vms.prod.proxy[0].port``, ``step build-dev:
        timeout``."""
        if path[:2] == ("cycle", "steps") and len(path) > 2 and isinstance(path[2], int):
            name = self.node((*path[:3], "name"))
            known = isinstance(name, ScalarNode) and name.text
            step = (
                f"step {shown(name.text)}"
                if known and isinstance(name, ScalarNode)
                else (f"step {path[2] + 1}")
            )
            rest = _dotted(path[3:])
            return f"{step}: {rest}" if rest else step
        return _dotted(path)


def shown(part: str) -> str:
    """A name as it is if it is short and plain, else as Python quotes it."""
    return part if _WORD.fullmatch(part) else quote(part)


def _dotted(path: Path) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{shown(part)}" if text else shown(part)
    return text
