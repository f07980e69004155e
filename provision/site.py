"""One farm, opened: its places, locks, journal, and its hosts' drivers, each connected at first use."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from host.files import check_whose, own_directory
from host.paths import FarmPaths, cache_dir, check_directories, state_dir
from host.run import Runner, withhold
from hypervisors.api import Callbacks, Directories, Disks, Hypervisor, Leases, Template
from hypervisors.host import DrivenHost, ListedMachine, OpenHost, OwnDaemon, Surroundings, daemon_left
from hypervisors.ownership import FarmIdentity
from inventory.errors import UnknownName, did_you_mean, some
from inventory.model import Farm
from inventory.subscribers import EventSubscriber
from provision.allocate import Allocator, lock_file_of
from provision.engine.events import Outbox, Subscriber, SubscriberSection
from provision.engine.journal import Journal, current_step
from provision.engine.lock_wait import LockWait
from provision.engine.locks import Locks, vms_of
from provision.engine.mutex import NamedMutex
from provision.engine.report import Reporter
from provision.engine.requester import Requester
from provision.farm_cache import known_farm
from provision.farm_identity import IdentityKeeper
from provision.guest import identity

if TYPE_CHECKING:
    from hypervisors.far.drivers import FarHypervisor


class Site:
    """An open farm: a context manager that several threads may use. Opening it writes nothing and starts
    nothing; with ``plan`` nothing ever does. ``requester``: who asked; None: whoever runs this
    process. ``adopting``: see ``IdentityKeeper``. ``patience``: seconds to wait for locks that others
    hold."""

    def __init__(
        self,
        farm: Farm,
        *,
        reporter: Reporter,
        plan: bool = False,
        requester: Requester | None = None,
        adopting: bool = False,
        patience: float = 0,
    ) -> None:
        self.farm = farm
        self.paths = FarmPaths(farm.farm)
        self.keeper = IdentityKeeper(farm, self.paths.root, adopting=adopting)
        self.reporter = reporter
        self.patience = LockWait(patience, reporter)
        self.plan = plan
        self.runner = Runner(changes=not plan)
        self.requester = requester or Requester.of_process()
        self.outbox = Outbox(
            farm.farm, farm.events, self.paths.journal, self.paths.locks, self._subscriber
        )
        self.journal = Journal(
            self.paths.journal, writable=not plan, requester=self.requester, outbox=self.outbox
        )
        self.locks = Locks(self.paths.locks, self.requester, beside=self._beside)
        withhold(*farm.secrets)
        self.mutex = NamedMutex(self.locks, self.journal.interrupted)
        self.allocator = Allocator(farm, lock_file_of(farm, self.paths))
        self._guard = threading.RLock()
        self._opened: dict[str, OpenHost] = {}

    def __enter__(self) -> Site:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and journal. Machines and daemons go on."""
        with self._guard:
            self._close_hosts()
        self.outbox.close()
        self.journal.close()

    def _close_hosts(self) -> None:
        for opened in self._opened.values():
            opened.close()
        self._opened.clear()

    @contextlib.contextmanager
    def _beside(self, locks: Sequence[str], doing: str) -> Iterator[None]:
        """The leases of these VMs' machines, where other controllers may change them, too."""
        wanted: dict[Leases, set[str]] = {}
        for vm in vms_of(locks):
            hosts = [self.farm.host_of(vm)] if vm in self.farm.vms else list(self.farm.hosts)
            for leases in (leases for host in hosts for leases in self.opened(host).leases()):
                wanted.setdefault(leases, set()).add(self.farm.machine_of(vm))
        since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S")
        note = (
            f"farm {self.identity}: pid {os.getpid()} of {self.requester}, since {since}, doing: {doing}"
        )
        with contextlib.ExitStack() as stack:
            for leases, names in wanted.items():
                stack.enter_context(leases.hold(sorted(names), note))
            yield

    def templates(self, host: str) -> Sequence[Template]:
        """This farm's own generations in the host's store, which may have other farms', too."""
        return [found for found in self.disks(host).templates() if found.farm == self.identity]

    def prepare(self) -> None:
        """Make the farm's own directory and its identity, before something is changed. QEMU, as another
        user, can pass through it to its disks but can't list it. Events that earlier commands left are
        delivered from now on. NotOurs where the state came to be another farm file's."""
        own_directory(self.paths.root, mode=0o711)
        if self.keeper.keep():  # another process was quicker: what was opened is not what is to be
            with self._guard:
                self._close_hosts()
        self.outbox.start()

    @property
    def identity(self) -> FarmIdentity:
        """What marks name the farm by. WrongState."""
        return self.keeper.identity

    # What the farm file names

    def vms(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """Declared VMs in the farm file's order; all, if none is named. UnknownName names the nearest
        known."""
        wanted = dict.fromkeys(names or self.farm.vms)
        for name in wanted:
            if name not in self.farm.vms:
                raise UnknownName(
                    f"{self.name}: there is no VM {name!r}",
                    remedy=did_you_mean(name, self.farm.vms, f"it has {some(self.farm.vms)}"),
                )
        return tuple(vm for vm in self.farm.vms if vm in wanted)

    @property
    def name(self) -> str:
        """The farm as messages call it: its file, as the user knows it."""
        return self.farm.path.name or self.farm.farm

    def _subscriber(self, section: EventSubscriber) -> Subscriber:
        assert isinstance(section, SubscriberSection)
        return section.opened(self.farm.path.parent, self.runner)

    # Drivers

    def opened(self, host: str) -> OpenHost:
        """The host, for what only some drivers can tell."""
        with self._guard:
            found = self._opened.get(host)
            if found is None:
                found = self._opened[host] = self._open(host)
            return found

    def hypervisor(self, host: str, *, look: bool = False) -> Hypervisor:
        """The host's driver. ``look``: for reading only. A private daemon that never defined anything is
        then not started (nor in a plan)."""
        return self.opened(host).hypervisor(look=look)

    def disconnect(self, host: str) -> None:
        """Close the driver. The next use connects again."""
        self.opened(host).disconnect()

    def disks(self, host: str) -> Disks:
        """The host's disk store. Unsupported if the host stores no disks (driver ssh)."""
        return self.opened(host).disks()

    def has_disks(self, host: str) -> bool:
        return self.farm.hosts[host].INFO.disks

    def daemon(self) -> OwnDaemon | None:
        """The farm's own daemon, running or not; None if no host is served by one, and nothing is there
        of one that served a host before."""
        found = next(filter(None, (self.opened(host).daemon() for host in self.farm.hosts)), None)
        if found is None and self.paths.root.exists():
            return daemon_left(self._directories)
        return found

    def far(self, host: str) -> FarHypervisor | None:
        """The driver, if it works on another machine."""
        return self.opened(host).far()

    def distrust_kvm(self, host: str, why: str) -> None:
        """KVM failed a guest there: from now on machines are defined without it."""
        self.opened(host).distrust(why)
        lost = self.farm.hosts[host]
        if lost.far:  # the agent there sees to that by itself
            return
        for name, declared in self.farm.hosts.items():
            if declared.INFO is lost.INFO and not declared.far:
                self.disconnect(name)

    def _open(self, host: str) -> OpenHost:
        declared = self.farm.hosts[host]
        assert isinstance(declared, DrivenHost)
        return declared.opened(self._surroundings(host))

    def _surroundings(self, host: str) -> Surroundings:
        return Surroundings(
            farm=self.identity,
            farm_file=self.name,
            beside=self.farm.path.parent,
            host=host,
            hosts=self.farm.hosts,
            user_mode=self.farm.network.mode == "user",
            directories=self._directories,
            console_log=lambda machine: identity.console_log(self.paths, machine),
            listed=lambda: self._listed(host),
            runner=self.runner,
            callbacks=Callbacks(
                step=current_step,
                warn=self.reporter.warn,
                working=self.reporter.working,
                interrupted=self.journal.interrupted.is_set,
            ),
            plan=self.plan,
        )

    @property
    def _directories(self) -> Directories:
        return Directories(
            state=state_dir(), farm=self.paths.root, cache=cache_dir(), runtime=self.paths.runtime
        )

    def _listed(self, host: str) -> Mapping[str, ListedMachine]:
        return {
            self.farm.machine_of(name): ListedMachine(str(vm.address), vm.ssh_port or 22, vm.reset)
            for name, vm in self.farm.vms.items()
            if self.farm.host_of(name) == host and vm.address  # the loader saw to that
        }


def open_site(
    farm_file: Path,
    *,
    reporter: Reporter,
    plan: bool = False,
    requester: Requester | None = None,
    adopting: bool = False,
    patience: float = 0,
) -> Site:
    """Load the farm file and open its farm. ``adopting``: also one whose state is another's.
    ``patience``: seconds to wait for locks that others hold. Errors:
    InventoryError, NotFound, UsageError (for what the environment asks for), WrongState where somebody
    else may write in a directory of ours, NotOurs where the state is another farm's or user's."""
    check_directories()
    farm = known_farm(farm_file, cache_dir(), keep=not plan)
    for kind in {type(host) for host in farm.hosts.values()}:
        assert issubclass(kind, DrivenHost)
        kind.check_environment()
    paths = FarmPaths(farm.farm)
    check_whose(paths.root, f"the state of farm {farm.farm}")
    check_whose(paths.runtime, f"where farm {farm.farm} runs")
    site = Site(
        farm, reporter=reporter, plan=plan, requester=requester, adopting=adopting, patience=patience
    )
    if not adopting:
        site.keeper.check()
    return site
