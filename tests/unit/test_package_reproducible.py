"""`rebuild --verify` of a deb and of an rpm, built as they really are in a builder (``build_machine``):
what is reproducible comes out the same, and of what isn't the very file is named."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from builds.packages.operation import BuildPackages
from builds.packages.rebuild import Rebuild
from builds.packages.record import PackageRecords
from builds.packages.verified import RebuildResult
from inventory.loader import load
from provision.engine.runner import perform
from provision.site import Site
from tests.build_machine import USER, BuildMachine, deb_source
from tests.unit.cycle_farm import GIT, Told, environment

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can give a builder a root of its own"
)
SPEC = """\
Name: NAME
Version: 1.0
Release: 1
Summary: x
License: MIT
BuildArch: noarch
%description
x
%build
TOLD >when
%install
mkdir -p %{buildroot}/usr/share/NAME
cp when %{buildroot}/usr/share/NAME/
%files
/usr/share/NAME/when
"""
SAME, OTHER = "date -d @SOURCE_DATE_EPOCH", "date +%s%N"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BuildMachine]:
    for name, value in environment(tmp_path).items():
        if name.startswith("FARMHAND_"):
            monkeypatch.setenv(name, value)
    with BuildMachine.running(tmp_path) as made:
        yield made


def source(kind: str, top: Path, told: str) -> None:
    """A git repository of a package of its directory's name, which has what a command tells."""
    if kind == "deb":
        told = told.replace("SOURCE_DATE_EPOCH", "$$SOURCE_DATE_EPOCH")
        files = deb_source(top.name, rules=f"{told} >out/when")
    else:
        told = told.replace("SOURCE_DATE_EPOCH", "$SOURCE_DATE_EPOCH").replace("%", "%%")
        files = {f"{top.name}.spec": SPEC.replace("NAME", top.name).replace("TOLD", told)}
    for name, text in files.items():
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
    for words in (("init", "-q", "-b", "main"), ("add", "-A"), ("commit", "-qm", "It")):
        subprocess.run([*GIT, "-C", top, *words], check=True)


def farm(machine: BuildMachine, top: Path, kind: str, packages: Mapping[str, str]) -> Site:
    """JSON is YAML."""
    for name, told in packages.items():
        source(kind, top / name, told)
    values = {
        "farm": "lab",
        "hosts": {"lab": {"driver": "ssh"}},
        "ssh": {"key": str(top / "key"), "ready_timeout": "20s", "user": machine.endpoint().user},
        "vms": {
            "builder": {
                "host": "lab", "address": "127.0.0.1", "ssh_port": str(machine.port), "reset": ["true"]
            }
        },
        "repositories": {"made": {"format": kind, "channels": ["experimental"]}},
        "packages": {name: {"git": name} for name in packages},
        "build": {"builders": ["builder"], "repository": "made", "user": USER},
    }  # fmt: skip
    path = top / "farm.yaml"
    path.write_text(json.dumps(values))
    return Site(load(path), reporter=Told())


@pytest.mark.parametrize(
    ("kind", "differs"),
    [
        ("deb", "odd_1.0-1_all.deb: ./usr/share/odd/out/when: content"),
        ("rpm", "odd-1.0-1.noarch.rpm: /usr/share/odd/when: content"),
    ],
)
def test_rebuilds_of_real_builds(machine: BuildMachine, tmp_path: Path, kind: str, differs: str) -> None:
    with farm(machine, tmp_path, kind, {"even": SAME, "odd": OTHER}) as site:

        def again(build: str) -> RebuildResult:
            return perform(site, Rebuild(build=build, verify=True)).result

        perform(site, BuildPackages())
        even, odd = again("even/1"), again("odd/1")
        assert (even.compared, even.differences, even.notes) == (True, (), ())
        assert odd.differences == (differs,)
        record = PackageRecords(site.paths).find("even/1")
    log = (record.directory / "rebuilds" / "1" / "build.log").read_text()
    assert "to be installed" not in log, "just what was installed then is there"
