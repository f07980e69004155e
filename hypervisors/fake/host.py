"""Hosts of driver fake: their section and its opening."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from host.leases import FileLeases
from hypervisors.api import Disks, Hypervisor, Leases
from hypervisors.host import DrivenHost, OpenHost, Surroundings
from inventory.hosts import DriverInfo

if TYPE_CHECKING:  # for the annotations, which inventory has evaluated
    from inventory.fields import Size


@dataclass(frozen=True, kw_only=True)
class FakeHost(DrivenHost):
    """An in-memory hypervisor, to try commands out."""

    INFO: ClassVar = DriverInfo(name="fake", called="a fake host", guests=False)

    driver: Literal["fake"] = "fake"
    memory: Size | None = None
    """What this farm's VMs may have of it, all together, at any time; absent: no limit."""

    def opened(self, around: Surroundings) -> OpenFake:
        return OpenFake(around)


class OpenFake(OpenHost):
    """Its machines and disks are in one file, which all processes see."""

    def _connect(self) -> Hypervisor:
        from hypervisors.fake.driver import FakeHypervisor

        around = self.around
        return FakeHypervisor(around.farm, self.disks(), self.state(), step=around.callbacks.step)

    def _open_disks(self) -> Disks:
        from hypervisors.fake.driver import FakeDisks

        return FakeDisks(self.around.farm, self.state(), step=self.around.callbacks.step)

    def leases(self) -> Sequence[Leases]:
        state = self.state()
        return (FileLeases(state.with_name(f"{state.name}.leases")),) if state else ()

    def state(self) -> Path | None:
        """In memory only for a plan over nothing: the fake would make its file by looking."""
        state = self.around.directories.farm / f"fake-{self.around.host}.state"
        return None if self.around.plan and not state.exists() else state
