"""One farm, opened: its places, locks, journal, and its hosts' drivers, each connected at first use."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from host.files import make_directory
from host.paths import FarmPaths, cache_dir, state_dir
from host.run import Runner
from host.ssh_words import path_option
from hypervisors.api import Disks, Forward, Hypervisor, MachineSpec, Nic, Owner
from hypervisors.far.address import is_far
from hypervisors.null import NoMachines
from inventory.base import Model
from inventory.errors import NotFound, Unsupported, UsageError, some
from inventory.model import Farm, Host
from provision.allocate import Allocation, Allocator, lock_file_of
from provision.engine.events import Outbox, Subscriber
from provision.engine.journal import Journal, current_step
from provision.engine.locks import Locks
from provision.engine.mutex import Turns
from provision.engine.report import Reporter
from provision.engine.requester import Requester
from provision.guest import identity
from provision.known import known_farm

if TYPE_CHECKING:
    from hypervisors.far.drivers import FarHypervisor, FarKvmTrust
    from hypervisors.far.link import Link
    from hypervisors.libvirt.kvm import Accelerator, KvmVerdict
    from hypervisors.libvirt.kvm_trust import KvmTrust
    from hypervisors.libvirt.private import PrivateLibvirt
    from hypervisors.opening import Directories, Place, Voices
    from provision.guest.remote import Endpoint

_LIBVIRT: Final = ("kvm", "xen")


class Site:
    """A context manager; may be used by several threads. Nothing is written and nothing started by
    opening it; with ``plan`` nothing ever is. ``requester``: who asked; absent: who runs this
    process."""

    def __init__(
        self,
        farm: Farm,
        *,
        reporter: Reporter,
        plan: bool = False,
        requester: Requester | None = None,
    ) -> None:
        self.farm = farm
        self.paths = FarmPaths(farm.farm)
        self.reporter = reporter
        self.plan = plan
        self.runner = Runner(changes=not plan)
        self.requester = requester or Requester.of_process()
        self.outbox = Outbox(
            farm.farm, farm.events.subscribers, self.paths.journal, self.paths.locks, self._subscriber
        )
        self.journal = Journal(
            self.paths.journal, writable=not plan, requester=self.requester, outbox=self.outbox
        )
        self.locks = Locks(self.paths.locks, self.requester)
        self.turns = Turns(self.locks, self.journal.interrupted)
        self.allocator = Allocator(farm, lock_file_of(farm, self.paths))
        self._guard = threading.RLock()
        self._hypervisors: dict[str, Hypervisor] = {}
        self._disks: dict[str, Disks] = {}
        self._links: dict[str, Link] = {}
        self._private: PrivateLibvirt | None = None

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
            for hypervisor in self._hypervisors.values():
                hypervisor.close()
            self._hypervisors.clear()
            for link in self._links.values():
                link.close()
            self._links.clear()
            self._disks.clear()
        self.outbox.close()
        self.journal.close()

    def prepare(self) -> None:
        """Make the farm's own directory, for those about to change something. QEMU, under another
        user, passes through it to its disks; it can't list it. What earlier commands left to be told to
        subscribers is told from now on."""
        make_directory(self.paths.root, mode=0o711)
        self.outbox.start()

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

    def _subscriber(self, section: Model) -> Subscriber:
        from provision.events import open_subscriber

        return open_subscriber(section, self.farm.path.parent, self.runner)

    # Drivers

    def hypervisor_of(self, vm: str) -> Hypervisor:
        return self.hypervisor(self.farm.host_of(vm))

    def hypervisor(self, host: str, *, look: bool = False) -> Hypervisor:
        """The host's driver. ``look``: for reading only; a private daemon that never defined anything
        is then not started (in a plan always so)."""
        with self._guard:
            driver = self._hypervisors.get(host)
            if driver is None:
                if (look or self.plan) and self._untouched(host):
                    return NoMachines()
                driver = self._hypervisors[host] = self._connect(host)
            return driver

    def disconnect(self, host: str) -> None:
        """Close the driver; the next use connects again."""
        with self._guard:
            driver = self._hypervisors.pop(host, None)
            if driver is not None:
                driver.close()

    def disks(self, host: str) -> Disks:
        """The host's disk store. Unsupported where nobody stores disks (driver ssh)."""
        with self._guard:
            store = self._disks.get(host)
            if store is None:
                store = self._disks[host] = self._open_store(host)
            return store

    def has_disks(self, host: str) -> bool:
        return self.farm.hosts[host].driver != "ssh"

    def private(self) -> PrivateLibvirt:
        """The farm's own libvirtd, running or not."""
        with self._guard:
            if self._private is None:
                from hypervisors.libvirt.private import PrivateLibvirt

                here = [self.kvm(host) for host in self.farm.hosts if self.uses_private(host)]
                self._private = PrivateLibvirt(
                    self.private_directory,
                    self.paths.runtime,
                    cache_dir() / "libvirt",
                    not any(verdict.usable for verdict in here),
                )
            return self._private

    def accelerator(self, host: str) -> Accelerator:
        """Of a host with driver kvm. UsageError for what the environment has in its place."""
        from hypervisors.libvirt.kvm import asked_for

        return asked_for(self.farm.hosts[host].accelerator)

    def kvm(self, host: str) -> KvmVerdict:
        """Whether KVM runs the VMs of a host with driver kvm: there, if that is another machine."""
        from hypervisors.libvirt.kvm import KvmVerdict, judge

        if not self._is_far(host):
            return judge(self.accelerator(host), Runner(), cache_dir())
        able = self.hypervisor(host).capabilities()
        return KvmVerdict(able.accelerated, "; ".join(able.notes))

    def demand_kvm(self, host: str) -> None:
        """Unsupported where KVM is asked for and doesn't work."""
        if self.farm.hosts[host].driver != "kvm" or self.accelerator(host) != "kvm":
            return
        verdict = self.kvm(host)
        if not verdict.usable:
            from hypervisors.libvirt.kvm import DO_WITHOUT

            raise Unsupported(
                f"{self.name}: host {host} is to use KVM (accelerator: kvm): {verdict.why}",
                remedy=verdict.remedy or DO_WITHOUT,
            )

    @property
    def private_directory(self) -> Path:
        return self.paths.root / "libvirt"

    def uses_private(self, host: str) -> bool:
        declared = self.farm.hosts[host]
        return declared.driver == "kvm" and declared.uri == "private"

    def reader_uid(self, host: str) -> int | None:
        """Who must be able to read disks and seeds: QEMU's user, where that isn't ours and we may
        give files away (root)."""
        declared = self.farm.hosts[host]
        if self.uses_private(host) and os.geteuid() == 0:
            from hypervisors.libvirt.private import qemu_user

            return qemu_user()
        from hypervisors.opening import reader_of

        return None if self._is_far(host) else reader_of(declared.driver, declared.uri)

    def check_places(self, host: str) -> None:
        """That the host's programs can use our directories. DriverFailed, saying which is in the way."""
        if self.uses_private(host):
            from hypervisors.libvirt.private import check_runtime

            check_runtime(self.paths.runtime)
        if (reader := self.reader_uid(host)) is not None:
            from host.files import reachable

            reachable(self.paths.root, reader)

    def _is_far(self, host: str) -> bool:
        declared = self.farm.hosts[host]
        return declared.driver in _LIBVIRT and is_far(declared.uri)

    def far(self, host: str) -> FarHypervisor | None:
        """The driver, where it works on another machine."""
        if not self._is_far(host):
            return None
        from hypervisors.far.drivers import FarHypervisor

        driver = self.hypervisor(host)
        assert isinstance(driver, FarHypervisor)
        return driver

    def kvm_trust(self, host: str) -> KvmTrust | FarKvmTrust:
        """What guests have shown of the KVM of that host's machine."""
        if far := self.far(host):
            return far.kvm_trust()
        from hypervisors.libvirt.kvm_trust import KvmTrust

        return KvmTrust(cache_dir())

    def distrust_kvm(self, host: str, why: str) -> None:
        """It failed a guest: from now on machines there are defined without it."""
        self.kvm_trust(host).distrust(why)
        if self._is_far(host):  # the agent there sees to that by itself
            return
        for name, declared in self.farm.hosts.items():
            if declared.driver == "kvm" and not self._is_far(name):
                self.disconnect(name)

    def _untouched(self, host: str) -> bool:
        """A private daemon that isn't needed to know that there is nothing: it has no directory, or
        holds no definition and no disk."""
        if not self.uses_private(host):
            return False
        if any(self.private_directory.rglob("qemu/*.xml")):
            return False
        return not self.disks(host).list()

    def _connect(self, host: str) -> Hypervisor:
        declared = self.farm.hosts[host]
        if self._is_far(host):
            from hypervisors.far.address import far
            from hypervisors.far.drivers import FarHypervisor

            return FarHypervisor(
                self._link(host), far(declared.uri).terminal,
                lambda machine: identity.console_log(self.paths, machine), current_step,
            )  # fmt: skip
        if declared.driver in _LIBVIRT:
            from hypervisors.libvirt.driver import LibvirtHypervisor
            from hypervisors.opening import open_kind

            return LibvirtHypervisor(
                self.private().uri if declared.uri == "private" else declared.uri,
                self.farm.farm,
                self.disks(host),
                self.runner,
                step=current_step,
                kind=open_kind(self._place(host), self._directories()),
                working=self.reporter.working,
            )
        if declared.driver == "fake":
            from hypervisors.fake.driver import FakeDisks, FakeHypervisor

            store = self.disks(host)
            assert isinstance(store, FakeDisks)
            return FakeHypervisor(self.farm.farm, store, self._fake_state(host), step=current_step)
        if declared.driver == "ssh":
            from hypervisors.ssh import SshHypervisor, SshMachine

            machines = {
                self.machine(name): SshMachine(
                    address=str(vm.address), port=vm.ssh_port or 22, reset_argv=vm.reset
                )
                for name, vm in self.farm.vms.items()
                if self.farm.host_of(name) == host and vm.address  # the loader saw to that
            }
            return SshHypervisor(self.farm.farm, machines, self.runner, step=current_step)
        if declared.driver == "xenapi":
            from hypervisors.xenapi.disks import XenApiDisks
            from hypervisors.xenapi.driver import XenApiHypervisor

            served = self.disks(host)
            assert isinstance(served, XenApiDisks)
            return XenApiHypervisor(served, step=current_step)
        raise AssertionError(declared.driver)

    def _open_store(self, host: str) -> Disks:
        declared = self.farm.hosts[host]
        if declared.driver == "fake":
            from hypervisors.fake.driver import FakeDisks

            return FakeDisks(self.farm.farm, self._fake_state(host), step=current_step)
        if not self.has_disks(host):
            raise Unsupported(
                f"{self.name}: host {host} (driver {declared.driver}) keeps no disks of ours",
                remedy="its machines are not cloned, checkpointed or destroyed here",
            )
        if declared.driver == "xenapi":
            return self._open_xenapi(host)
        if self._is_far(host):
            from hypervisors.far.drivers import far_disks

            return far_disks(self._link(host), current_step)
        from hypervisors.opening import open_disks

        return open_disks(
            self._place(host), self._directories(), self.runner, self._voices(),
            reader_uid=self.reader_uid(host),
        )  # fmt: skip

    def _place(self, host: str) -> Place:
        from hypervisors.opening import Place

        declared = self.farm.hosts[host]
        disks, path = declared.disks, declared.disks.path
        assert declared.driver in _LIBVIRT
        return Place(
            farm=self.farm.farm, driver=declared.driver, uri=declared.uri,
            accelerator=self.accelerator(host) if declared.driver == "kvm" else "auto",
            guests=declared.guests or "pv", store=disks.store,
            path=self.farm.path.parent / path if path else None, pool=disks.pool or "",
            dataset=disks.dataset or "", copy=disks.copy_mode,
        )  # fmt: skip

    def _directories(self) -> Directories:
        from hypervisors.opening import Directories

        return Directories(state=state_dir(), farm=self.paths.root, cache=cache_dir())

    def _voices(self) -> Voices:
        from hypervisors.opening import Voices

        return Voices(step=current_step, warn=self.reporter.warn, working=self.reporter.working)

    def _link(self, host: str) -> Link:
        """To the machine of that host: one for its driver and its store."""
        with self._guard:
            if host not in self._links:
                from hypervisors.far.address import far
                from hypervisors.far.link import Link

                declared = self.farm.hosts[host]
                if self.farm.network.mode == "user":
                    raise Unsupported(
                        f"{self.name}: host {host} is another machine, and user-mode networks have "
                        "their ports on its loopback",
                        remedy="network: {mode: bridge, bridge: NAME}, a bridge of that machine",
                    )
                path = declared.disks.path
                if path is not None and not path.is_absolute():
                    raise UsageError(
                        f"{self.name}: host {host} is another machine: disks.path {path} is not "
                        "beside a farm file there",
                        remedy="give it from / on",
                    )
                there = far(declared.uri)
                self._links[host] = Link(
                    there.name, there.argv, replace(self._place(host), uri=there.uri),
                    self._voices(), plan=self.plan,
                )  # fmt: skip
            return self._links[host]

    def _fake_state(self, host: str) -> Path | None:
        """In memory only for a plan over nothing: the fake would make its file by looking."""
        state = self.paths.root / f"fake-{host}.state"
        return None if self.plan and not state.exists() else state

    def _open_xenapi(self, host: str) -> Disks:
        from hypervisors.xenapi.disks import XenApiDisks
        from hypervisors.xenapi.notes import Notes
        from hypervisors.xenapi.pool import Pool
        from hypervisors.xenapi.session import Server, Sessions

        declared, beside = self.farm.hosts[host], self.farm.path.parent
        if declared.insecure:
            self.reporter.warn(
                f"host {host}: 'insecure': whoever answers at {declared.uri} gets the password"
            )
        assert declared.credentials  # the loader saw to that
        server = Server(
            url=declared.uri,
            credentials=beside / declared.credentials.expanduser(),
            ca=beside / declared.ca.expanduser() if declared.ca else None,
            fingerprint=declared.fingerprint or "",
            insecure=declared.insecure,
            turns=self._turns(declared),
        )
        pool = Pool(
            Sessions(server), self.farm.farm, sr=declared.sr or "",
            copy=declared.copy_mode == "full",
            progress=lambda what, part: self.reporter.working(f"{what}: {part:.0%}"),
            notes=Notes(self.paths.root / f"xenapi-{host}", plan=self.plan),
        )  # fmt: skip
        return XenApiDisks(pool, self.runner, step=current_step)

    @staticmethod
    def _turns(host: Host) -> Path:
        """The lock of all this user's commands for one storage repository, whatever their farms."""
        import hashlib

        place = hashlib.sha256(f"{host.uri.rstrip('/')} {host.sr or ''}".encode()).hexdigest()[:16]
        return state_dir() / f"xenapi-{place}.lock"

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
        if self.host(vm).driver == "ssh":
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


def open_site(
    farm_file: Path, *, reporter: Reporter, plan: bool = False, requester: Requester | None = None
) -> Site:
    """Load the farm file and open its farm. Errors: InventoryError, NotFound, UsageError for what the
    environment asks for."""
    farm = known_farm(farm_file, cache_dir(), keep=not plan)
    if any(host.driver == "kvm" for host in farm.hosts.values()):
        from hypervisors.libvirt.kvm import asked_for

        asked_for()
    return Site(farm, reporter=reporter, plan=plan, requester=requester)
