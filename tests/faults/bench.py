"""A small farm to kill things in, on a driver of choice, and what must hold after each kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypervisors.api import Template
from hypervisors.fake import FakeDisks
from inventory.loader import load
from provision import farm
from provision.identity import host_key, seed_file
from provision.report import QuietReporter
from provision.site import Site
from provision.work import is_on, look

ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("child.py")
SIZE = 64 * 2**20
PATTERN = "0xab"

FARM = """\
farm: kill
hosts: {{here: {{driver: {driver}}}}}
templates: {{base: {{build: debian-12, size: 64M}}}}
vms:
  dev2: {{memory: 64M}}
  prod: {{memory: 64M}}
"""


@dataclass
class Kills:
    """What happened, for the summary."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, operation: str, driver: str) -> None:
        self.counts[operation, driver] = self.counts.get((operation, driver), 0) + 1


KILLS = Kills()


class Bench:
    def __init__(self, directory: Path, driver: str) -> None:
        self.driver = driver
        self.file = directory / "kill.yaml"
        self.file.write_text(FARM.format(driver=driver), encoding="utf-8")

    def site(self, *, plan: bool = False) -> Site:
        return Site(load(self.file), reporter=QuietReporter(), plan=plan)

    def seal(self) -> None:
        """A template with nothing on it: its guests run, and boot nothing."""
        with self.site() as site:
            site.prepare()
            if site.disks("here").templates():
                return
            image = self.file.with_name("empty.qcow2")
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
            site.disks("here").seal(
                image,
                Template(
                    name="base",
                    generation=1,
                    ref="",
                    size=SIZE,
                    sha256="",
                    created=datetime.now(UTC),
                    origin="nothing",
                    firstboot="farmhand",
                ),
            )

    def kills(
        self,
        operation: str,
        verb: str,
        arguments: Mapping[str, Any],
        put_back: Callable[[], None],
    ) -> Iterator[str]:
        """Run it again and again, each time killed one step later, until it comes through. After each
        kill the caller looks and recovers; ``put_back`` then makes all as it was before."""
        for when in ("written", "done"):
            put_back()
            for number in range(1, 100):
                text = self.killed_at(when, number, verb, arguments)
                if text is None:
                    break
                KILLS.add(operation, self.driver)
                yield f"{operation}, killed when step {number} was {when}: {text}"
                put_back()

    def killed_at(self, when: str, number: int, verb: str, arguments: Mapping[str, Any]) -> str | None:
        """The step's text; None if the run ended before it came that far."""
        done = subprocess.run(
            [sys.executable, CHILD, self.file, when, str(number), json.dumps([verb, arguments])],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            return None
        assert done.returncode == -signal.SIGKILL, done.stderr
        return done.stdout.strip()

    # -- what must hold ---------------------------------------------------------------------------

    def nothing_half_made(self, site: Site, context: str) -> None:
        """Right after the kill, before anything is recovered: a machine that can be started is
        complete, with a sound disk and its identity."""
        for vm in site.farm.vms:
            machine = look(site, vm)
            if machine is None:
                continue
            disk = site.disks("here").find(machine.name)
            if disk is None:
                assert not is_on(machine), context
                continue
            assert disk.template == "base@1", context
            assert next(c.name for c in disk.checkpoints) == "clean", context
            assert seed_file(site.paths, machine.name).exists(), context
            assert host_key(site.paths, vm), context
            if self.driver == "kvm":
                subprocess.run(["qemu-img", "check", "-q", "-U", disk.path], check=True)

    def recovered(self, context: str) -> list[str]:
        """Recover, as planned, to the end; nothing is left. What was done."""
        with self.site(plan=True) as site:
            planned = farm.recover(site).actions
        with self.site() as site:
            done = farm.recover(site).actions
        assert done == planned, context
        with self.site() as site:
            assert farm.recover(site).changed is False, f"{context}: twice"
            assert site.journal.unfinished() == (), context
        with self.site(plan=True) as site:
            left = farm.gc(site)
            assert not left.changed, f"{context}: {[str(a) for a in left.actions]}"
            assert site.locks.held() == (), context
        return [str(action) for action in done]

    def usable(self, context: str) -> None:
        """The names are free for what was meant: all VMs can be made, and then all is as declared."""
        with self.site() as site:
            farm.clone_farm(site, wait=False)
            again = farm.clone_farm(site, wait=False)
            assert not again.changed, f"{context}: {[str(a) for a in again.actions]}"
            assert all(is_on(look(site, vm)) for vm in site.farm.vms), context

    # -- a disk's content -------------------------------------------------------------------------

    def write_on(self, site: Site, vm: str) -> None:
        """So that the old disk can be told from a fresh one; the VM is stopped."""
        store = site.disks("here")
        if isinstance(store, FakeDisks):
            store.write(site.machine(vm), b"old")
            return
        disk = store.find(site.machine(vm))
        assert disk
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", f"write -q -P {PATTERN} 1M 64k", disk.path],
            check=True,
            capture_output=True,
        )

    def content(self, site: Site, vm: str) -> str:
        """ "old": what was written is there, all of it; "new": provably the checkpoint."""
        machine, store = site.machine(vm), site.disks("here")
        if store.pristine(machine, "clean"):
            return "new"
        if isinstance(store, FakeDisks):
            return "old" if store.content(machine) == b"old" else "torn"
        disk = store.find(machine)
        assert disk
        read = subprocess.run(
            ["qemu-io", "-r", "-U", "-f", "qcow2", "-c", f"read -q -P {PATTERN} 1M 64k", disk.path],
            check=True,
            capture_output=True,
            text=True,
        )
        return "torn" if "fail" in read.stdout else "old"
