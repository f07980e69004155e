"""Two controllers that each have a farm of the same name on one host: state directories, farm files and
users of their own, and one hypervisor with one store."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from hypervisors.api import Disks, Template
from hypervisors.fake.driver import FakeDisks
from hypervisors.fake.host import OpenFake
from hypervisors.host import OpenHost
from inventory.errors import Text, spelled
from provision.engine.report import QuietReporter
from provision.site import Site, open_site
from tests.faults.still import Still

MIB = 2**20
VMS = "  dev2: {memory: 64M}\n  prod: {memory: 64M}\n"


class Heard(QuietReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.warnings.append(f"{vm}: {spelled(text)}")


class SharedStill(Still):
    """Machines that run nothing, of all controllers in one file."""

    def __init__(self, real: OpenHost, world: Path) -> None:
        super().__init__(real)
        self._world = world

    def state(self) -> Path:
        return self._world

    def _open_disks(self) -> Disks:
        if isinstance(self.real, OpenFake):
            return FakeDisks(self.around.farm, self._world, step=self.around.callbacks.step)
        return super()._open_disks()

    def reader_uid(self) -> int | None:
        return None


class Controller:
    """One of them. ``host``: its section of the farm file, with ``more`` sections; ``world``: where the
    machines are, if nothing has any but our fake."""

    def __init__(self, place: Path, host: str, world: Path | None, more: str = "") -> None:
        place.mkdir(exist_ok=True)
        self.place, self.host, self.world, self.more = place, host, world, more
        self.state, self.run = place / "state", place / "run"
        self.heard = Heard()
        self.file = place / "farm.yaml"
        self.write(self.file)

    def write(self, file: Path, vms: str = VMS) -> None:
        file.write_text(
            f"farm: kata\nhosts: {{here: {{{self.host}}}}}\n{self.more}\n"
            f"templates: {{base: {{build: debian-12, size: 1M}}}}\nvms:\n{vms}"
        )

    def site(self, file: Path | None = None, *, plan: bool = False, adopting: bool = False) -> Site:
        os.environ["FARMHAND_STATE_DIR"] = str(self.state)
        os.environ["FARMHAND_RUNTIME_DIR"] = str(self.run)
        site = open_site(file or self.file, reporter=self.heard, plan=plan, adopting=adopting)
        if self.world:
            world, real = self.world, site._open
            site._open = lambda host: SharedStill(real(host), world)  # type: ignore[method-assign]
        return site

    def seal(self) -> None:
        """A template of its own, unless it has one."""
        image = self.place / "image"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(MIB)], check=True)
        template = Template(
            name="base", generation=1, ref="", size=MIB, sha256="", created=datetime.now(UTC),
            origin="nothing", firstboot="farmhand",
        )  # fmt: skip
        with self.site() as site:
            site.prepare()
            there = site.disks("here").templates()
            if not site.templates("here"):
                number = max((sealed.generation for sealed in there), default=0) + 1
                site.disks("here").seal(image, replace(template, generation=number))
