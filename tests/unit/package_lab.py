"""A farm that builds packages: real sshds as builders, each with a real apt and dpkg of its own
directory, real git repositories, a real package repository. What stands in is the builder's inside
alone: packages are made by a script of their own, without isolation
(``tests/unit/test_package_formats.py`` has the real one)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from builds.packages.formats import BUILD_FORMATS
from builds.packages.inputs import InstalledPackage
from builds.packages.operation import BuildPackages, BuildPackagesResult
from builds.packages.order import BuildOrder, Built
from builds.packages.record import BuilderRecord, PackageRecord, PackageRecords
from builds.packages.runs import RunRecord, RunRecords
from builds.step_run import StepFailed, StepLog
from host.printable import last_line
from inventory.loader import load
from inventory.packages import PackageBuilds
from provision.engine.report import Action
from provision.engine.runner import perform
from provision.guest.connection import Connection
from provision.site import Site
from tests.apt_machine import AptMachine
from tests.unit.cycle_farm import GIT, Told, environment
from tests.unit.sshd_machine import Sshd, make_key

ROOT = Path(__file__).parents[2]
STAND_IN = "tests.unit.package_lab:PlainFormat"
# In the builder: what is wanted is installed by its apt, then the source's own script makes packages.
_PREPARE = r"""
rm -rf build; mkdir build; tar -xf source.tar -C build; cd build/source
wanted=$(sed -n 's/^Build-Depends: *//p' debian/control | tr ',' '\n' | while read -r one; do
    case $one in *"<!$PROFILE>"*) ;; *) echo "${one%%<*}" ;; esac
done)
[ -z "$INSTALL" ] || wanted=$INSTALL
[ -z "$wanted" ] || apt-get install -qq -y --no-install-recommends $wanted >../apt.log 2>&1 || {
    cat ../apt.log; exit 100; }
"""
_INSTALLED = r"""dpkg-query --admindir="$ADMIN" -W -f '${Package} ${Version} ${Architecture}\n' || :"""
_BUILD = r"""
cd build/source
export version=$(sed -n '1s/.*(\(.*\)).*/\1/p' debian/changelog)
mkdir -p out
. ./build
"""
DEB = r"""
deb() { # name, text of its file, control fields...
    name=$1 text=$2; shift 2
    mkdir -p "tree-$name/DEBIAN" "tree-$name/usr/share/$name"
    printf '%s\n' "$text" >"tree-$name/usr/share/$name/text"
    printf "Package: $name\nVersion: $version\nArchitecture: all\n" >"tree-$name/DEBIAN/control"
    echo 'Maintainer: A <a@example.org>' >>"tree-$name/DEBIAN/control"
    for field; do echo "$field" >>"tree-$name/DEBIAN/control"; done
    echo 'Description: x' >>"tree-$name/DEBIAN/control"
    dpkg-deb --root-owner-group -b "tree-$name" "out/${name}_${version}_all.deb"
}
text_of() { cat "$ROOT/usr/share/$1/text"; }
"""


class PlainFormat:
    """A stand-in for ``builds.packages.formats.deb``."""

    NAME: ClassVar = "deb"

    def recipe(self, settings: PackageBuilds) -> str:
        return f"{_PREPARE}{_BUILD}{settings.user}"

    def listed(self, one: InstalledPackage) -> str | None:
        """As ``InstalledPackage.listed``."""
        del one
        return None

    async def build(
        self,
        connection: Connection,
        order: BuildOrder,
        log: StepLog,
        before: Callable[[tuple[InstalledPackage, ...]], Awaitable[None]],
    ) -> Built:
        where = {key: await connection.output(f'printf %s "${key}"') for key in ("ADMIN", "ROOT")}
        await connection.put([order.source], "incoming")
        await connection.output(f"mv incoming/{order.source.name} source.tar")
        install = {"INSTALL": " ".join(order.install or ())}
        env = {**install, "PROFILE": " ".join(order.profiles)}
        prepared = await connection.run(_PREPARE, env=env, timeout=60, log=log.write)
        if prepared.status:
            raise StepFailed("dependencies", last_line(log.text(), 200), exit=prepared.status)
        text = await connection.output(_INSTALLED)
        entries = (InstalledPackage(**_entry(line)) for line in text.splitlines())
        installed = tuple(replace(one, listed=self.listed(one)) for one in entries)
        await before(installed)
        log.mark()
        built = await connection.run(
            DEB + _BUILD, env={**where, **order.environment}, timeout=order.seconds, log=log.write
        )
        if built.timed_out:
            raise StepFailed("time-out", "not done in time", exit=built.status)
        if built.status:
            raise StepFailed("source", last_line(log.text(), 200), exit=built.status)
        files = await connection.list(["build/source/out/*deb"], order.limits)
        builder = BuilderRecord(vm="", user=order.settings.user, environment=order.environment)
        return Built(installed=installed, files=files, builder=builder)


def _entry(line: str) -> Mapping[str, str]:
    name, version, architecture = line.split()
    return {"name": name, "version": version, "architecture": architecture}


class PackageLab:
    """``farm``: sections of the farm file that differ."""

    def __init__(self, root: Path, builders: int = 2) -> None:
        self.root = root
        make_key(root / "key")
        self.machines: dict[str, Sshd] = {}
        self.apts: dict[str, AptMachine] = {}
        for number in range(1, builders + 1):
            name = f"b{number}"
            apt = self.apts[name] = AptMachine(root / f"apt-{name}")
            env = {
                "APT_CONFIG": str(apt.top / "apt.conf"), "ROOT": str(apt.top / "root"),
                "ADMIN": str(apt.top / "root/var/lib/dpkg"),
            }  # fmt: skip
            sshd = Sshd(name, root / name, root / "key", environment=env)
            self.machines[name] = sshd.prepare().start()
        self.told = Told()
        self.packages: dict[str, dict[str, object]] = {}
        self.build: dict[str, object] = {}
        self.retest = "yes"
        self.events: dict[str, object] = {}

    def stop(self) -> None:
        for machine in self.machines.values():
            machine.stop()

    # -- sources ----------------------------------------------------------------------------------

    def git(self, name: str, *args: str) -> str:
        done = subprocess.run(
            [*GIT, "-C", self.root / "src" / name, *args], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def source(
        self, name: str, script: str = "", *, needs: str = "", version: str = "1.0-1",
        binaries: str = "", subject: str = "",
    ) -> str:  # fmt: skip
        """Make, or change, a package's repository. Returns the commit."""
        top = self.root / "src" / name
        fresh = not top.exists()
        (top / "debian").mkdir(parents=True, exist_ok=True)
        if fresh:
            self.git(name, "init", "-q", "-b", "master")
        stanzas = "".join(
            f"\nPackage: {binary}\nArchitecture: all\nDescription: x\n"
            for binary in (binaries or name).split()
        )
        depends = f"Build-Depends: {needs}\n" if needs else ""
        (top / "debian/control").write_text(
            f"Source: {name}\nMaintainer: A <a@example.org>\n{depends}{stanzas}"
        )
        (top / "debian/changelog").write_text(
            f"{name} ({version}) unstable; urgency=medium\n\n  * Change.\n\n"
            " -- A <a@example.org>  Fri, 20 Nov 2026 10:00:00 +0000\n"
        )
        (top / "build").write_text(script or f'deb {name} "{name} one"\n')
        self.git(name, "add", "-A")
        self.git(name, "commit", "-qm", subject or f"{name} {version}", "--allow-empty")
        self.packages.setdefault(name, {"git": f"src/{name}"})
        return self.git(name, "rev-parse", "HEAD")

    # -- the farm ---------------------------------------------------------------------------------

    def farm_file(self) -> Path:
        """JSON is YAML."""
        vms = {
            name: {
                "host": "lab", "address": "127.0.0.1", "ssh_port": str(machine.port),
                "reset": ["/bin/sh", "-c", self._reset(name)],
            }
            for name, machine in self.machines.items()
        }  # fmt: skip
        first = next(iter(self.machines.values()))
        farm = {
            "farm": "lab",
            "hosts": {"lab": {"driver": "ssh"}},
            "ssh": {
                "key": str(self.root / "key"), "ready_timeout": "20s", "user": first.endpoint().user,
            },
            "vms": vms,
            "repositories": {
                "debs": {
                    "format": "deb", "channels": ["experimental", "tested"], "retest": self.retest,
                }
            },
            "packages": self.packages,
            "build": {"builders": list(self.machines), "repository": "debs", **self.build},
            "events": self.events,
        }  # fmt: skip
        path = self.root / "farm.yaml"
        path.write_text(json.dumps(farm, indent=1))
        return path

    def _reset(self, name: str) -> str:
        home, root = self.machines[name].home, self.apts[name].top / "root"
        lists = self.apts[name].top
        return (
            f"rm -rf '{home}' '{root}'; mkdir '{home}';"
            f"mkdir -p '{root}/var/lib/dpkg/info' '{root}/var/lib/dpkg/updates';"
            f": >'{root}/var/lib/dpkg/status';"
            f"rm -f '{lists}'/etc/apt/sources.list.d/* '{lists}'/var/lib/apt/lists/*Packages*"
        )

    def site(self, *, plan: bool = False) -> Site:
        return Site(load(self.farm_file()), reporter=self.told, plan=plan)

    def run(self, **options) -> BuildPackagesResult:
        with self.site() as site:
            return perform(site, BuildPackages(**options)).result

    def plan(self, **options) -> tuple[Action, ...]:
        with self.site(plan=True) as site:
            return perform(site, BuildPackages(**options)).actions

    @property
    def records(self) -> PackageRecords:
        with self.site(plan=True) as site:
            return PackageRecords(site.paths)

    def last(self, package: str) -> PackageRecord:
        return next(self.records.of(package))

    def last_run(self) -> RunRecord:
        with self.site(plan=True) as site:
            return RunRecords(site.paths).find("last")

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The real command line, with the stand-in put in."""
        argv = [sys.executable, "-P", Path(__file__).with_name("package_command.py"), *words]
        own = {**environment(self.root), "FARMHAND_FARM": str(self.farm_file()), "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            argv, env={**os.environ, **own}, cwd=self.root, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILD_FORMATS, "deb", STAND_IN)
