"""A network service is one file: nobody else knows it by its name."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest

from inventory import kinds
from inventory.errors import InventoryError
from inventory.loader import loads
from inventory.model import Farm
from provision.network.service import Service
from provision.network.services import SERVICES
from provision.twins.own_values import OwnKind, own_values

if TYPE_CHECKING:
    from provision.network.document import Document
    from provision.network.renderer import Renderer

ROOT = Path(__file__).resolve().parents[2]
SAME_WORDS = {"hosts", "ansible", "libvirt", "bind"}
"""Also a key of farm files, a driver's library, a system call."""
TELLS_OF = {
    "provision/network/importing.py", "provision/network/services/__init__.py", "tasks.py",
    "cli/examples.py",
}  # fmt: skip
"""A farm file is made from a zone and a dhcpd.conf, as tasks and examples say; the registry."""


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
    """What a module decides by, or says: strings, but for those that explain it, attributes, names."""
    tree = ast.parse(path.read_text())
    explain = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in explain:
            yield from ((word, node.lineno) for word in (node.value, *re.findall(r"\w+", node.value)))
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno


@dataclass(frozen=True, kw_only=True)
class Gopher(Service):
    """A service of somebody's own, that serves repositories."""

    NAME: ClassVar = "gopher"
    FILES: ClassVar = ()
    SERVES_REPOSITORIES: ClassVar = True

    def documents(self, r: Renderer) -> Iterator[Document]:
        del r
        yield from ()

    def variables(self, farm: Farm) -> Iterator[tuple[str, str]]:
        return ((vm, f"{farm.farm}-{vm}") for vm in farm.vms)


def test_a_repository_is_served_by_any_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.services, "gopher", f"{__name__}:Gopher")
    url = "https://packages.example/kata"
    text = (
        FARM + "  gopher:\n  ansible:\nrepositories: {packages: {format: deb, serve: SERVICE, MORE}}\n"
    )

    def read(service: str, more: str) -> Farm:
        given = text.replace("SERVICE", service).replace("MORE", more)
        return loads(given.encode(), tmp_path / "f.yaml")

    farm = read("gopher", f"url: '{url}', certificate: /etc/x.pem")
    assert farm.repositories["packages"].served.host == "packages.example"
    with pytest.raises(InventoryError, match="gopher needs a 'url' such as"):
        read("gopher", "path: /srv/packages")
    with pytest.raises(InventoryError, match="'services' has no nginx"):
        read("nginx", f"url: '{url}', certificate: /etc/x.pem")
    with pytest.raises(InventoryError, match="serve: 'ansible' is not one of none, nginx, gopher"):
        read("ansible", f"url: '{url}'")
    found = [one.value for one in own_values(farm) if one.kind is OwnKind.VARIABLE]
    assert found == ["try-a"], "and no other service's"


def test_a_variable_of_a_port_is_the_farms_where_a_service_has_one(tmp_path: Path) -> None:
    text = FARM.replace("{a: {}}", "{a: {nat_port: 22001}, b: {}}")
    for service, wanted in (("shorewall", ["VM_A_TRY"]), ("nftables", [])):
        farm = loads(f"{text}  {service}:\n".encode(), tmp_path / "f.yaml")
        found = [one.value for one in own_values(farm) if one.kind is OwnKind.VARIABLE]
        assert found == wanted


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
