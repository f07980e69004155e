"""One farm, opened: its places, locks, journal, and its hosts' drivers, each connected at first use."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from host.files import make_directory
from host.paths import FarmPaths, cache_dir, state_dir
from host.run import Runner
from host.ssh_words import path_option
from hypervisors.api import (
    Directories,
    Disks,
    Forward,
    Hypervisor,
    MachineSpec,
    Nic,
    Owner,
    Voices,
)
from hypervisors.host import DrivenHost, ListedMachine, OpenHost, OwnDaemon, Surroundings
from inventory.errors import NotFound, some
from inventory.hosts import DriverInfo, Host
from inventory.model import Farm
from provision.allocate import Allocation, Allocator, lock_file_of
from provision.engine.journal import Journal, current_step
from provision.engine.locks import Locks
from provision.engine.mutex import Turns
from provision.engine.report import Reporter
from provision.guest import identity
from provision.known import known_farm

if TYPE_CHECKING:
    from hypervisors.far.drivers import FarHypervisor
    from provision.guest.remote import Endpoint


class Site:
    """A context manager; may be used by several threads. Nothing is written and nothing started by
    opening it; with ``plan`` nothing ever is."""

    def __init__(self, farm: Farm, *, reporter: Reporter, plan: bool = False) -> None:
        self.farm = farm
        self.paths = FarmPaths(farm.farm)
        self.reporter = reporter
        self.plan = plan
        self.runner = Runner(changes=not plan)
        self.journal = Journal(self.paths.journal, writable=not plan)
        self.locks = Locks(self.paths.locks)
        self.turns = Turns(self.locks, self.journal.interrupted)
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
        """Connections and journal; machines and daemons go on."""
        with self._guard:
            for opened in self._opened.values():
                opened.close()
            self._opened.clear()
            self.journal.close()

    def prepare(self) -> None:
        """Make the farm's own directory, for those about to change something. QEMU, under another
        user, passes through it to its disks; it can't list it."""
        make_directory(self.paths.root, mode=0o711)

    # What the farm file names

    def vms(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """Declared VMs, in the farm file's order; none named: all. NotFound with the nearest known."""
        wanted = dict.fromkeys(names or self.farm.vms)
        for name in wanted:
            if name not in self.farm.vms:
                from difflib import get_close_matches

                near = get_close_matches(name, self.farm.vms, 1)
                raise NotFound(
                    f"{self.name}: there is no VM {name!r}",
                    remedy=f"did you mean {near[0]}?" if near else f"it has {some(self.farm.vms)}",
                )
        return tuple(vm for vm in self.farm.vms if vm in wanted)

    @property
    def name(self) -> str:
        """The farm as messages call it: its file, as it is known."""
        return self.farm.path.name or self.farm.farm

    def machine(self, vm: str) -> str:
        return self.farm.machine_of(vm)

    def host(self, vm: str) -> Host:
        return self.farm.hosts[self.farm.host_of(vm)]

    def driver_of(self, vm: str) -> DriverInfo:
        """What its host's driver can, and can't."""
        return self.farm.driver_of(vm)

    # Drivers

    def opened(self, host: str) -> OpenHost:
        """The host, for what only some drivers have to tell."""
        with self._guard:
            found = self._opened.get(host)
            if found is None:
                found = self._opened[host] = self._open(host)
            return found

    def hypervisor_of(self, vm: str) -> Hypervisor:
        return self.hypervisor(self.farm.host_of(vm))

    def hypervisor(self, host: str, *, look: bool = False) -> Hypervisor:
        """The host's driver. ``look``: for reading only; a private daemon that never defined anything
        is then not started (in a plan always so)."""
        return self.opened(host).hypervisor(look=look)

    def disconnect(self, host: str) -> None:
        """Close the driver; the next use connects again."""
        self.opened(host).disconnect()

    def disks(self, host: str) -> Disks:
        """The host's disk store. Unsupported where nobody stores disks (driver ssh)."""
        return self.opened(host).disks()

    def has_disks(self, host: str) -> bool:
        return self.farm.hosts[host].INFO.disks

    def daemon(self) -> OwnDaemon | None:
        """The farm's own, running or not; None: no host of it is served by one."""
        return next(filter(None, (self.opened(host).daemon() for host in self.farm.hosts)), None)

    def far(self, host: str) -> FarHypervisor | None:
        """The driver, where it works on another machine."""
        return self.opened(host).far()

    def distrust_kvm(self, host: str, why: str) -> None:
        """It failed a guest: from now on machines there are defined without it."""
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
            farm=self.farm.farm,
            farm_file=self.name,
            beside=self.farm.path.parent,
            host=host,
            hosts=self.farm.hosts,
            user_mode=self.farm.network.mode == "user",
            directories=Directories(
                state=state_dir(), farm=self.paths.root, cache=cache_dir(), runtime=self.paths.runtime
            ),
            console_log=lambda machine: identity.console_log(self.paths, machine),
            listed=lambda: self._listed(host),
            runner=self.runner,
            voices=Voices(step=current_step, warn=self.reporter.warn, working=self.reporter.working),
            plan=self.plan,
        )

    def _listed(self, host: str) -> Mapping[str, ListedMachine]:
        return {
            self.machine(name): ListedMachine(str(vm.address), vm.ssh_port or 22, vm.reset)
            for name, vm in self.farm.vms.items()
            if self.farm.host_of(name) == host and vm.address  # the loader saw to that
        }

    def _ssh_address(self, vm: str) -> str:
        declared = self.farm.vms[vm]
        if declared.address:
            return str(declared.address)
        hostname = self.farm.hostname_of(vm)
        domain = self.farm.network.domain
        return f"{hostname}.{domain}" if domain and "." not in hostname else hostname

    # Each VM

    def spec(self, vm: str, allocation: Allocation) -> MachineSpec:
        """The machine as the farm file wants it."""
        declared, network = self.farm.vms[vm], self.farm.network
        machine = self.machine(vm)
        user_mode = network.mode == "user"
        boot = self.farm.boot_of(vm)
        spec = MachineSpec(
            name=machine,
            owner=Owner(self.farm.farm, vm),
            memory=declared.memory,
            vcpus=declared.vcpus,
            disk_size=declared.disk or 0,
            nic=Nic(
                mac=allocation.mac,
                mode=network.mode,
                target=network.bridge or network.network or "",
                forwards=(Forward(allocation.ssh_port, 22),) if user_mode else (),
                internet=network.internet,
            ),
            address=allocation.address,
            ssh_port=allocation.ssh_port,
            seed=identity.seed_file(self.paths, machine),
            console_log=identity.console_log(self.paths, machine),
            kernel=Path(boot.kernel) if boot else None,
            initrd=Path(boot.initrd) if boot and boot.initrd else None,
            cmdline=boot.cmdline if boot else "",
        )
        far = self.far(self.farm.host_of(vm))
        return far.at_home(spec) if far else spec

    def endpoint(self, vm: str) -> Endpoint:
        """Where the VM's ssh answers and as whom."""
        from provision.guest.remote import Endpoint

        host, port = self.address(vm)
        return Endpoint(
            vm=vm,
            host=host,
            port=port,
            user=self.farm.ssh.user,
            key=identity.controller_key(self.farm, self.paths),
            host_key=identity.host_key(self.paths, vm),
        )

    def address(self, vm: str) -> tuple[str, int]:
        """Host and port of the VM's ssh, as recorded or as they would be given."""
        if not self.driver_of(vm).virtual:
            return self._ssh_address(vm), self.farm.vms[vm].ssh_port or 22
        got = self.allocator.recorded().get(vm) or self.allocator.peek(vm)
        if self.farm.network.mode == "user":
            return "127.0.0.1", got.ssh_port
        return (str(got.address) if got.address else self._ssh_address(vm)), got.ssh_port

    def ssh_argv(self, vm: str, command: str = "") -> tuple[str, ...]:
        """The OpenSSH client's command line that logs in, or runs a command there. Exactly the VM's
        own host key is accepted; of a machine nobody cloned, the first key seen from then on. Nothing
        of the user's or the host's ssh configuration is used."""
        endpoint = self.endpoint(vm)
        options = {"IdentitiesOnly": "yes", "GlobalKnownHostsFile": "/dev/null", "LogLevel": "ERROR"}
        if endpoint.host_key:
            known = identity.known_hosts(self.paths, vm)
            options["HostKeyAlias"] = self.machine(vm)
            options["StrictHostKeyChecking"] = "yes"
        else:
            known = endpoint.known_hosts or endpoint.key.with_name("known_hosts")
            options["StrictHostKeyChecking"] = "accept-new"
        argv = ["ssh", "-F", "/dev/null", "-p", str(endpoint.port)]
        argv += path_option("IdentityFile", endpoint.key)
        argv += path_option("UserKnownHostsFile", known)
        for key, value in options.items():
            argv += ["-o", f"{key}={value}"]
        return (*argv, f"{endpoint.user}@{endpoint.host}", *([command] if command else []))


def open_site(farm_file: Path, *, reporter: Reporter, plan: bool = False) -> Site:
    """Load the farm file and open its farm. Errors: InventoryError, NotFound, UsageError for what the
    environment asks for."""
    farm = known_farm(farm_file, cache_dir(), keep=not plan)
    for kind in {type(host) for host in farm.hosts.values()}:
        assert issubclass(kind, DrivenHost)
        kind.check_environment()
    return Site(farm, reporter=reporter, plan=plan)
