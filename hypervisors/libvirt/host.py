"""Hosts that libvirt drives, here or on another machine: what their sections and openings share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hypervisors.api import Disks, Hypervisor, Leases
from hypervisors.disks.section import DiskStore
from hypervisors.disks.stores import StorePlace
from hypervisors.far.address import is_far
from hypervisors.host import DrivenHost, OpenHost, Surroundings
from inventory.errors import Unsupported, UsageError
from inventory.hosts import Tool

if TYPE_CHECKING:  # the first, for the annotations, which inventory has evaluated
    from hypervisors.far.drivers import FarHypervisor
    from hypervisors.far.link import Link
    from hypervisors.libvirt.opening import Place
    from hypervisors.look import HostLook
    from inventory.fields import Line, Size

TOOLS = (
    Tool(command="qemu-img", package="qemu-utils", purpose="makes disks"),
    Tool(command="libvirtd", package="libvirt-daemon", purpose="manages the VMs"),
    Tool(command="virsh", package="libvirt-clients", purpose="consoles"),
)


@dataclass(frozen=True, kw_only=True)
class LibvirtHost(DrivenHost):
    """A host that libvirt drives."""

    uri: Line
    """libvirt's."""
    disks: DiskStore = field(default_factory=DiskStore)
    """The disk store."""
    memory: Size | None = None
    """What this farm's VMs may have of the host's memory, all together, at any time; absent: no limit of
    ours. Of several farms on a host each keeps to its own."""

    @property
    def far(self) -> bool:
        return is_far(self.uri)

    @property
    def store(self) -> str:
        return self.disks.store

    @property
    def disks_in_state(self) -> bool:
        return self.disks.store == "qcow2" and self.disks.path is None


class OpenLibvirt(OpenHost):
    """A host whose driver and store work here, or both in one agent on another machine, over one
    link."""

    def __init__(self, declared: LibvirtHost, around: Surroundings) -> None:
        super().__init__(around)
        self.declared = declared
        self._link: Link | None = None
        self._looking: Link | None = None

    @abstractmethod
    def place(self) -> Place:
        """What the driver is opened with."""

    def store_place(self) -> StorePlace:
        """What the store is opened with."""
        return self.declared.disks.place(self.around.farm, self.around.beside)

    def _uri(self) -> str | Callable[[], str]:
        """The URI to connect to from here, or a function that returns it, called at each connecting."""
        return self.declared.uri

    def close(self) -> None:
        super().close()
        for link in (self._link, self._looking):
            if link:
                link.close()
        self._link = self._looking = None

    def leases(self) -> Sequence[Leases]:
        if self.declared.far:
            from hypervisors.far.drivers import FarLeases

            return (FarLeases(self._linked()),)
        from hypervisors.libvirt.opening import leases_of

        return leases_of(self.place(), self.around.directories)

    def far(self) -> FarHypervisor | None:
        if not self.declared.far:
            return None
        from hypervisors.far.drivers import FarHypervisor

        driver = self.hypervisor()
        assert isinstance(driver, FarHypervisor)
        return driver

    def reader_uid(self) -> int | None:
        from hypervisors.libvirt.opening import reader_of

        return None if self.declared.far else reader_of(self.declared.driver, self.declared.uri)

    def check_places(self) -> None:
        if (reader := self.reader_uid()) is not None:
            from host.files import reachable

            reachable(self.around.directories.farm, reader)

    def _connect(self) -> Hypervisor:
        around = self.around
        if self.declared.far:
            from hypervisors.far.address import far
            from hypervisors.far.drivers import FarHypervisor

            terminal = far(self.declared.uri).terminal
            return FarHypervisor(self._linked(), terminal, around.console_log, around.callbacks.step)
        from hypervisors.libvirt.opening import open_machines

        return open_machines(
            self.place(),
            self._uri(),
            self.disks(),
            around.directories,
            around.runner,
            around.callbacks,
            self.reader_uid(),
        )

    def _open_disks(self) -> Disks:
        around = self.around
        if self.declared.far:
            from hypervisors.far.drivers import far_disks

            return far_disks(self._linked(), around.callbacks.step)
        from hypervisors.disks.stores import open_disks

        return open_disks(
            self.store_place(), around.directories, around.runner, around.callbacks, self.reader_uid()
        )

    def look(self, names: Sequence[str], proven: Sequence[str]) -> HostLook:
        """Of another machine: in one question, to an agent that can't change anything there, if none is
        there yet."""
        if not self.declared.far:
            return super().look(names, proven)
        from hypervisors.far.drivers import far_look

        with self._guard:
            if self._link is None and self._looking is None:
                self._looking = self._new_link(plan=True)
            link = self._link or self._looking
        assert link
        return far_look(link, names, proven)

    def _linked(self) -> Link:
        """The link to the machine of that host, which its driver and its store share."""
        with self._guard:
            if self._link is None:
                self._link = self._new_link(plan=self.around.plan)
            return self._link

    def _new_link(self, *, plan: bool) -> Link:
        from hypervisors.far.address import far
        from hypervisors.far.link import Link

        self._check_far()
        there = far(self.declared.uri)
        place = replace(self.place(), uri=there.uri)
        return Link(there.name, there.argv, place, self.around.callbacks, plan=plan, login=there.login)

    def _check_far(self) -> None:
        where = f"{self.around.farm_file}: host {self.around.host} is another machine"
        if self.around.user_mode:
            raise Unsupported(
                f"{where}, and user-mode networks have their ports on its loopback",
                remedy="network: {mode: bridge, bridge: NAME}, a bridge of that machine",
            )
        path = self.declared.disks.path
        if path is not None and not path.is_absolute():
            raise UsageError(
                f"{where}: disks.path {path} is not beside a farm file there",
                remedy="give it from / on",
            )
