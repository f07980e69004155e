"""A class name means one thing in the whole house."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "builds", "provision", "repositories", "hypervisors", "host", "inventory", "installed")


def classes() -> Iterator[tuple[str, str]]:
    """Name and place of every class of the product, nested ones too."""
    for path in (ROOT / "tasks.py", *(p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py")))):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.ClassDef):
                yield node.name, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_a_class_name_means_one_thing() -> None:
    """Private ones count, too: ``_Zone`` beside ``Zone`` reads as the same thing."""
    places = defaultdict(list)
    for name, place in classes():
        places[name.lstrip("_")].append(place)
    assert places
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_a_test_files_name_is_there_once() -> None:
    """pytest imports them by it, as top modules: two of one name can't be collected together."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []
