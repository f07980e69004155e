"""A name of a type means one thing in the whole house."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "builds", "provision", "repositories", "hypervisors", "host", "inventory", "installed")


def types(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Name and line of every class, nested ones too, and of every alias of a type."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield node.name, node.lineno
    yield from aliases(tree.body)


def aliases(body: list[ast.stmt]) -> Iterator[tuple[str, int]]:
    """What a module calls a type; also for type checkers alone. It is written as a class is, and no
    other value of a module is."""
    for node in body:
        if isinstance(node, ast.If):
            yield from aliases([*node.body, *node.orelse])
            continue
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        for name in (target.id for target in targets if isinstance(target, ast.Name)):
            if name.lstrip("_")[0].isupper() and not name.isupper():
                yield name, node.lineno


def of_the_house() -> Iterator[tuple[str, str]]:
    """Name and place of each type of the product."""
    for path in (ROOT / "tasks.py", *(p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py")))):
        where = path.relative_to(ROOT)
        for name, line in types(ast.parse(path.read_text(), str(where))):
            yield name, f"{where}:{line}"


def test_aliases_are_seen() -> None:
    tree = ast.parse(
        "Words = Sequence[str] | None\nTree: TypeAlias = 'int | Tree'\n_Id = NewType('_Id', int)\n"
        "if TYPE_CHECKING:\n    Steps = tuple[int, ...]\nclass Outer:\n    class Inner: ...\n"
        "T = TypeVar('T')\n_LIMIT = 3\nmade = Outer()\n"
    )
    assert {name for name, _ in types(tree)} == {"Words", "Tree", "_Id", "Steps", "Outer", "Inner"}


def test_a_types_name_means_one_thing() -> None:
    """Private ones count, too: ``_Zone`` beside ``Zone`` reads as the same thing."""
    places = defaultdict(list)
    for name, place in of_the_house():
        places[name.lstrip("_")].append(place)
    assert places
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_a_test_files_name_is_there_once() -> None:
    """pytest imports them by it, as top modules: two of one name can't be collected together."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []
