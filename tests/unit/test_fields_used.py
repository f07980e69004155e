"""Every key of a farm file is acted upon: what it says is read somewhere outside ``inventory/``."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import cli.composition  # noqa: F401 - brings the sections of services, steps, drivers and subscribers
from inventory import kinds, model, packages, repositories
from inventory.base import Model

ROOT = Path(__file__).resolve().parents[2]
_ROOMS = ("builds", "cli", "host", "hypervisors", "provision", "repositories")

# Read only through something of the model itself, which is read outside
THROUGH = {
    "Farm.templates": "Farm.template_of", "Farm.events": "Farm.secrets",
    "Network.reserved": "Network.reserved_ranges",
    "PackageBuilds.cloned": "PackageBuilds.all_builders",
    "Source.repository": "Source.place", "Source.example": "Source.place",
    "TemplateSource.firstboot": "TemplateSource.first_boot",
    "Vm.host": "Farm.host_of", "Vm.template": "Farm.template_of", "Vm.hostname": "Farm.hostname_of",
}  # fmt: skip


def sections() -> Iterator[type[Model]]:
    """Every class of the model: those of inventory.model, and those of other rooms."""
    for kind in (kind for room in (model, packages, repositories) for kind in vars(room).values()):
        if isinstance(kind, type) and issubclass(kind, Model) and dataclasses.is_dataclass(kind):
            yield kind
    for name in kinds.places():
        found = kinds.section(name)
        assert found is not None
        yield found


def read() -> set[str]:
    """Names of attributes that the rooms read, or templates of files use."""
    found: set[str] = set()
    for room in _ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found.add(node.attr)
    for path in (ROOT / "templates").rglob("*.j2"):
        found |= set(re.findall(r"\.([a-z_0-9]+)", path.read_text()))
    return found


def test_every_key_is_read_by_somebody_who_acts_on_it() -> None:
    used, idle = read(), []
    for section in dict.fromkeys(sections()):
        for field in dataclasses.fields(section):
            name = f"{section.__name__}.{field.name}"
            if THROUGH.get(name, name).partition(".")[2] not in used:
                idle.append(name)
    assert idle == []
