"""A host of a farm, as those that use it see it: its section, which opens it, and the host, opened.

A new driver is one file with its section (a ``DrivenHost``), its ``OpenHost`` and the driver itself; a
line in ``hypervisors.drivers``; and the contract suite.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, Self

from host.run import Runner
from hypervisors.api import Callbacks, Directories, Disks, Hypervisor, Leases
from hypervisors.null import NullHypervisor
from hypervisors.ownership import FarmIdentity
from inventory import kinds
from inventory.errors import Unsupported
from inventory.hosts import Host, host_section

if TYPE_CHECKING:
    from host.check import Check
    from hypervisors.far.drivers import FarHypervisor
    from hypervisors.look import HostLook


class ListedMachine(NamedTuple):
    """One that the farm file lists because nobody virtualizes it. ``address``: a name or an address.
    ``reset_argv``: run on this host, never through a shell; empty: it can't be reset."""

    address: str
    port: int
    reset_argv: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a driver is opened in. ``farm_file``: as messages call it; ``beside``: its directory.
    ``host``: the name there, among ``hosts``. ``user_mode``: whether the VMs' ports are on the host's
    loopback. ``console_log``: where to keep a copy of a machine's, by its name. ``listed``: the host's
    machines, by their names, where nobody virtualizes them."""

    farm: FarmIdentity
    farm_file: str
    beside: Path
    host: str
    hosts: Mapping[str, Host]
    user_mode: bool
    directories: Directories
    console_log: Callable[[str], Path]
    listed: Callable[[], Mapping[str, ListedMachine]]
    runner: Runner
    callbacks: Callbacks
    plan: bool


class OwnDaemon(Protocol):
    """A daemon of farmhand's own, that one farm's machines are in."""

    @property
    def directory(self) -> Path:
        """It is there once something was made."""

    def defined(self) -> frozenset[str]:
        """Names of machines that it has, running or not."""

    def running(self) -> bool:
        """Whether it, or another in its place, listens."""

    def is_anothers(self) -> bool:
        """Whether what runs in its place is of another state directory."""

    def stop(self, *, force: bool = False) -> None:
        """WrongState while machines run; ``force`` cuts their power instead."""


class OpenHost(ABC):
    """Driver and store, each opened at first use. May be used by several threads. The methods that are
    not abstract are for what only some drivers have to tell."""

    loopback_closed_by: ClassVar[str] = ""
    """What ``close_loopback`` makes, in messages."""

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self._guard = threading.RLock()
        self._hypervisor: Hypervisor | None = None
        self._disks: Disks | None = None

    @abstractmethod
    def _connect(self) -> Hypervisor:
        """The driver. It connects by itself when it is used."""

    @abstractmethod
    def _open_disks(self) -> Disks:
        """The store. Unsupported where there is none."""

    def hypervisor(self, *, look: bool = False) -> Hypervisor:
        """``look``: for reading only; nothing is then started (in a plan always so)."""
        with self._guard:
            if self._hypervisor is None:
                if (look or self.around.plan) and self._untouched():
                    return NullHypervisor()
                self._hypervisor = self._connect()
            return self._hypervisor

    def disks(self) -> Disks:
        with self._guard:
            if self._disks is None:
                self._disks = self._open_disks()
            return self._disks

    def look(self, names: Sequence[str], proven: Sequence[str]) -> HostLook:
        """As ``hypervisors.look.look_at``. Starts nothing."""
        from hypervisors.look import look_at

        disks = self.disks() if self.around.hosts[self.around.host].INFO.disks else None
        return look_at(self.hypervisor(look=True), disks, names, proven)

    def disconnect(self) -> None:
        """Close the driver; the next use connects again."""
        with self._guard:
            if self._hypervisor is not None:
                self._hypervisor.close()
                self._hypervisor = None

    def close(self) -> None:
        """Machines and daemons go on."""
        with self._guard:
            self.disconnect()
            self._disks = None

    def leases(self) -> Sequence[Leases]:
        """What of it other controllers may be changing, too. None where nobody else can."""
        return ()

    def daemon(self) -> OwnDaemon | None:
        """Running or not; None: the host is served by its own."""
        return None

    def _untouched(self) -> bool:
        """Whether it can be told without starting anything that there is nothing yet."""
        return False

    def far(self) -> FarHypervisor | None:
        """The driver, where it works on another machine."""
        return None

    def reader_uid(self) -> int | None:
        """Who must be able to read disks and seeds here: QEMU's user, where that isn't ours and we may
        give files away (root)."""
        return None

    def forwards_as(self) -> int | None:
        """The uid whose programs listen on this machine's loopback for the machines; None: it isn't
        known."""
        return None

    def check_places(self) -> None:
        """That the host's programs can use our directories. DriverFailed, saying which is in the way."""
        return

    def demand_accelerator(self) -> None:
        """Unsupported where the section asks for one that doesn't work."""
        return

    def check_loopback(self) -> None:
        """Unsupported where guests of a user network that leads out can't be kept off what listens on
        this machine's loopback."""
        return

    def close_loopback(self) -> None:
        """Keep them off it, before one of them starts. Errors: Unsupported, Conflict."""
        return

    def loopback_is_closed(self) -> bool:
        """Whether they are kept off it now."""
        return True

    def on_trial(self) -> bool:
        """Whether machines run accelerated though no guest has shown yet that this works."""
        return False

    def prove(self) -> None:
        """A guest has."""
        return

    def distrust(self, why: str) -> None:
        """It failed a guest: machines are defined without it from now on, by drivers that are connected
        anew."""
        del why


@dataclass(frozen=True, kw_only=True)
class DrivenHost(Host, ABC):
    """A host's section, beside its driver."""

    @abstractmethod
    def opened(self, around: Surroundings) -> OpenHost:
        """Nothing is connected to, read or made yet."""

    @classmethod
    def check_environment(cls) -> None:
        """UsageError for environment variables that say what can't be."""

    @classmethod
    def daemon_left(cls, directories: Directories) -> OwnDaemon | None:
        """What is there of the daemon of a farm that had such a host; its file need not have it now."""
        del directories
        return None

    @classmethod
    def examine(cls, hosts: Sequence[Self], cache: Path) -> Iterable[Check]:
        """What of this machine decides whether its driver works, and how well. ``hosts``: those of a
        farm that are this machine; none: of a farm that isn't known. ``cache``: for what was found
        out."""
        del hosts, cache
        return ()


def all_drivers() -> tuple[type[DrivenHost], ...]:
    """The kinds of hosts that there are."""
    found = []
    for name in kinds.hosts:
        section = host_section(name)
        assert issubclass(section, DrivenHost)
        found.append(section)
    return tuple(found)


def daemon_left(directories: Directories) -> OwnDaemon | None:
    """The farm's own daemon, of whichever driver, if anything of it is there."""
    return next(filter(None, (kind.daemon_left(directories) for kind in all_drivers())), None)


def no_disks(around: Surroundings, driver: str) -> Unsupported:
    """What an ``OpenHost`` without a store raises."""
    return Unsupported(
        f"{around.farm_file}: host {around.host} (driver {driver}) keeps no disks of ours",
        remedy="its machines are not cloned, checkpointed or destroyed here",
    )
