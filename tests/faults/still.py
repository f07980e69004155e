"""A farm whose machines run nothing, on the disk store that its file names: the driver that kills need
is the store's, and starting QEMU takes most of the time."""

from __future__ import annotations

from hypervisors.api import Hypervisor
from hypervisors.fake.driver import FakeHypervisor
from provision.engine.journal import current_step
from provision.site import Site


class StillSite(Site):
    def _connect(self, host: str) -> Hypervisor:
        return FakeHypervisor(
            self.farm.farm, self.disks(host), self._fake_state(host), step=current_step
        )
