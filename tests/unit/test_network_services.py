"""A network service is one file: nobody else knows it by its name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from inventory import kinds
from provision.network.service import Service
from provision.network.services import SERVICES

ROOT = Path(__file__).resolve().parents[2]
SAME_WORDS = {"hosts", "ansible", "libvirt", "bind"}
"""Also a key of farm files, a driver's library, a system call."""
TELLS_OF = {"provision/network/importing.py", "provision/network/services/__init__.py", "tasks.py"}
"""A farm file is made from a zone and a dhcpd.conf; the registry."""


@pytest.mark.parametrize("name", SERVICES)
def test_each_is_what_the_registry_says(name: str) -> None:
    place = SERVICES[name]
    kind = kinds.section(place.rpartition(":")[2])
    assert kind is not None and issubclass(kind, Service) and name == kind.NAME
    assert place == f"{kind.__module__}:{kind.__name__}"
    assert {*kind.FILES} <= {field.name for field in fields(kind)}
    taken = {field.name for field in fields(kind)} & {*dir(Service)}
    assert not taken, "a key is called like a method"


@pytest.mark.parametrize("name", SERVICES)
def test_its_templates_are_there(name: str) -> None:
    kind = kinds.section(SERVICES[name].rpartition(":")[2])
    assert kind is not None and issubclass(kind, Service)
    for template in kind.STRINGS:
        assert (ROOT / "templates" / "network" / f"{template}.j2").is_file()


def test_at_most_one_is_told_last() -> None:
    """Two could not both be."""
    sections = [kinds.section(place.rpartition(":")[2]) for place in SERVICES.values()]
    last = [kind.NAME for kind in sections if kind and issubclass(kind, Service) and kind.TOLD_LAST]
    assert len(last) <= 1


def words(path: Path) -> Iterator[tuple[str, int]]:
    """What a module decides by: strings, attributes, names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno


@pytest.mark.parametrize("room", ["tasks.py", "cli", "builds", "provision", "inventory", "host"])
def test_nobody_else_knows_it_by_name(room: str) -> None:
    names = SERVICES.keys() - SAME_WORDS
    for path in [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py")):
        where = str(path.relative_to(ROOT))
        if where in TELLS_OF or path.parent.name == "services":
            continue
        for word, line in words(path):
            assert word not in names, f"{where}:{line} knows {word}"
            assert not (word.startswith("provision.network.services.")), f"{where}:{line}"
