"""A farm whose machines run nothing, on the disk store that its file names: the driver that kills need
is the store's, and starting QEMU takes most of the time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypervisors.api import Disks, Hypervisor, Leases
from hypervisors.fake.driver import FakeHypervisor
from hypervisors.fake.host import OpenFake
from hypervisors.host import OpenHost
from provision.site import Site


class Still(OpenHost):
    """``real``: has the store."""

    def __init__(self, real: OpenHost) -> None:
        super().__init__(real.around)
        self.real = real

    def _connect(self) -> Hypervisor:
        return FakeHypervisor(
            self.around.farm, self.disks(), self.state(), step=self.around.callbacks.step
        )

    def _open_disks(self) -> Disks:
        return self.real.disks()

    def state(self) -> Path | None:
        return OpenFake(self.around).state()

    def leases(self) -> Sequence[Leases]:
        return (*self.real.leases(), *OpenFake.leases(self))  # type: ignore[arg-type]

    def reader_uid(self) -> int | None:
        return self.real.reader_uid()

    def check_places(self) -> None:
        self.real.check_places()


class StillSite(Site):
    def _open(self, host: str) -> OpenHost:
        return Still(super()._open(host))
