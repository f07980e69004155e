"""A network service is one file: nobody else knows it by its name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import pytest

from inventory import kinds
from provision.network.service import Service
from provision.network.services import SERVICES

ROOT = Path(__file__).resolve().parents[2]
SAME_WORDS = {"hosts", "ansible", "libvirt", "bind"}
"""Also a key of farm files, a driver's library, a system call."""
TELLS_OF = {
    "provision/network/importing.py", "provision/network/services/__init__.py", "tasks.py",
    "inventory/repositories.py",
}  # fmt: skip
"""A farm file is made from a zone and a dhcpd.conf; the registry; a repository says what serves it."""


@pytest.mark.parametrize("name", SERVICES)
def test_each_is_what_the_registry_says(name: str) -> None:
    place = SERVICES[name]
    kind = kinds.section(place.rpartition(":")[2])
    assert kind is not None and issubclass(kind, Service) and name == kind.NAME
    assert place == f"{kind.__module__}:{kind.__name__}"
    assert {*kind.FILES} <= {field.name for field in fields(kind)}
    taken = {field.name for field in fields(kind)} & {*dir(Service)}
    assert not taken, "a key is called like a method"


FARM = """\
farm: try
network: {mode: network, network: br0, subnet: 10.0.0.0/24, gateway: 10.0.0.1, domain: try.example}
templates: {t: {build: debian-12}}
vms: {a: {}}
services:
"""
HEAVY = {"sqlite3", "ssl", "jinja2", "dns", "xml", "email", "concurrent.futures", "libvirt"}


@pytest.mark.parametrize("used", [("dnsmasq", "hosts"), tuple(SERVICES)], ids=["two", "all"])
def test_a_farm_imports_its_own_services_alone(used: Sequence[str], tmp_path: Path) -> None:
    """Whether it is read or known already; and they are light: each command on the farm begins so."""
    keys = {"dnsmasq": "{port: 54}", "unbound": "{port: 55}", "haproxy": "{port: 81, tls_port: 444}"}
    text = FARM + "".join(f"  {name}: {keys.get(name, '')}\n" for name in used)
    (tmp_path / "farm.yaml").write_text(text)
    code = (
        "import sys, cli.composition, provision.farm_cache\n"
        "before = {*sys.modules}\n"
        "from pathlib import Path\n"
        f"farm = provision.farm_cache.known_farm(Path('farm.yaml'), Path({str(tmp_path)!r}))\n"
        f"assert farm.services.used == {tuple(used)}, farm.services.used\n"
        "print(*sorted({*sys.modules} - before))"
    )
    for known in (False, True):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = {*done.stdout.split()}
        places = {SERVICES[name].partition(":")[0] for name in used}
        assert {name for name in found if name.startswith("provision.network.services.")} == places
        if known:
            assert not found & HEAVY
        assert known == ("inventory.loader" not in found)


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
