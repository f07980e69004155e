"""A farm of real sshds for the cycle's tests: driver ssh, real git, real files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from builds.operation import RunCycle
from builds.record import BuildRecord, find_record
from inventory.errors import Text, spelled
from inventory.loader import load
from provision.engine.report import Action, QuietReporter
from provision.engine.runner import perform
from provision.site import Site
from tests.unit.sshd_machine import Sshd, make_key

GIT = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org")


def run_cycle(site: Site, **options) -> BuildRecord:
    """The record of a cycle that passed."""
    build = perform(site, RunCycle(**options)).result.build
    return find_record(site.paths, build)


def plan_cycle(site: Site, **options) -> tuple[Action, ...]:
    """The lines of ``--plan``."""
    with Site(site.farm, reporter=site.reporter, plan=True) as planning:
        return perform(planning, RunCycle(**options)).actions


class Told(QuietReporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: Text, *, vm: str = "") -> None:
        self.said.append(f"{vm}: {spelled(text)}")

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.warned.append(f"{vm}: {spelled(text)}")


class Lab:
    """Two machines, a source repository, a farm file. ``dev2`` and ``prod``: what these are like."""

    def __init__(self, root: Path, *, dev2: dict | None = None, prod: dict | None = None) -> None:
        self.root = root
        make_key(root / "key")
        self.dev2 = Sshd("dev2", root / "dev2", root / "key", **(dev2 or {})).prepare().start()
        self.prod = Sshd("prod", root / "prod", root / "key", **(prod or {})).prepare().start()
        self.source = root / "kata"
        self.source.mkdir()
        self.git("init", "-q", "-b", "master")
        self.commit("One", program="echo one\n")
        self.told = Told()
        self.output: list[tuple[str, bytes]] = []

    def git(self, *args: str) -> str:
        done = subprocess.run(
            [*GIT, "-C", self.source, *args], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def commit(self, subject: str, **files: str) -> str:
        for name, text in files.items():
            (self.source / name).write_text(text)
        self.git("add", "-A")
        self.git("commit", "-qm", subject, "--allow-empty")
        return self.git("rev-parse", "HEAD")

    def farm_file(
        self,
        steps: list[dict],
        *,
        source: str | None = "kata",
        keep: int = 200,
        limits: dict | None = None,
    ) -> Path:
        """JSON is YAML."""
        vms = {
            machine.name: {
                "host": "lab",
                "address": "127.0.0.1",
                "ssh_port": str(machine.port),
                "reset": ["/bin/sh", "-c", f"rm -rf '{machine.home}'; mkdir '{machine.home}'"],
            }
            for machine in (self.dev2, self.prod)
        }
        farm: dict = {
            "farm": "lab",
            "hosts": {"lab": {"driver": "ssh"}},
            "ssh": {"key": str(self.root / "key"), "ready_timeout": "20s", "user": self.user},
            "vms": vms,
            "cycle": {"steps": steps, "keep_records": str(keep), "limits": limits or {}},
        }
        if source is not None:
            farm["source"] = {"repository": source}
        path = self.root / "farm.yaml"
        path.write_text(json.dumps(farm, indent=1))
        return path

    def site(self, steps: list[dict], *, plan: bool = False, **changes) -> Site:
        return Site(load(self.farm_file(steps, **changes)), reporter=self.told, plan=plan)

    @property
    def user(self) -> str:
        return self.dev2.endpoint().user

    def keep(self, vm: str, data: bytes) -> None:
        self.output.append((vm, data))

    def stop(self) -> None:
        self.dev2.stop()
        self.prod.stop()


def reset(vm: str) -> dict:
    return {"name": f"reset-{vm}", "reset": vm, "timeout": "60s"}


def run(name: str, script: str | list[str], vm: str = "dev2", **more) -> dict:
    return {"name": name, "vm": vm, "run": script, "timeout": "60s", **more}


FETCH = 'git clone -q "$SOURCE_URL" src; cd src; git checkout -q "$GIT_REVISION"'
STEPS = [
    reset("dev2"),
    reset("prod"),
    run("fetch", FETCH),
    run("build", "mkdir out; sh src/program > out/prod.rpm; cat out/prod.rpm", artifacts="out/*.rpm"),
    {"name": "transfer", "transfer": ["out/*.rpm"], "from": "dev2", "to": "prod", "into": "incoming",
     "timeout": "60s"},
    run("install", "test -s incoming/prod.rpm; touch installed", vm="prod"),
]  # fmt: skip


def environment(root: Path) -> dict[str, str]:
    return {
        **os.environ,
        "FARMHAND_STATE_DIR": str(root / "state"),
        "FARMHAND_CACHE_DIR": str(root / "cache"),
        "FARMHAND_RUNTIME_DIR": str(root / "run"),
    }


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in environment(tmp_path).items():
        if name.startswith("FARMHAND_"):
            monkeypatch.setenv(name, value)
    laboratory = Lab(tmp_path)
    yield laboratory
    laboratory.stop()
