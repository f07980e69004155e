"""One farm, opened: its places, locks, journal, and its hosts' drivers, each connected at first use."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from hypervisors.api import Disks, Forward, Hypervisor, MachineSpec, Nic, Owner
from hypervisors.run import Runner
from inventory.errors import NotFound, Unsupported
from inventory.model import Farm, Host
from provision import identity
from provision.absent import NoMachines
from provision.allocate import Allocation, Allocator, lock_file_of
from provision.files import make_directory
from provision.journal import Journal, current_step
from provision.locks import Locks
from provision.paths import FarmPaths, cache_dir, state_dir
from provision.report import Reporter
from provision.turns import Turns

if TYPE_CHECKING:
    from hypervisors.libvirt_kinds import Kind
    from hypervisors.private import PrivateLibvirt
    from provision.remote import Endpoint


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
        self._hypervisors: dict[str, Hypervisor] = {}
        self._disks: dict[str, Disks] = {}
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
            self._disks.clear()
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
                near = get_close_matches(name, self.farm.vms, 1)
                raise NotFound(
                    f"{self.name}: there is no VM {name!r}",
                    remedy=f"did you mean {near[0]}?" if near else f"it has {', '.join(self.farm.vms)}",
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
                from hypervisors.kvm import kvm_usable
                from hypervisors.private import PrivateLibvirt

                verdict = kvm_usable(Runner(), cache_dir())
                self._private = PrivateLibvirt(
                    self.private_directory,
                    self.paths.runtime,
                    cache_dir() / "libvirt",
                    not verdict.usable,
                )
            return self._private

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
        if declared.driver != "kvm" or os.geteuid() != 0:
            return None
        if declared.uri == "private":
            from hypervisors.private import qemu_user

            return qemu_user()
        if "/system" in declared.uri:
            import pwd

            with contextlib.suppress(KeyError):
                return pwd.getpwnam("libvirt-qemu").pw_uid
        return None

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
        if declared.driver in ("kvm", "xen"):
            from hypervisors.libvirt_driver import LibvirtHypervisor

            if is_remote(declared.uri):
                raise self._not_yet(host, f"the libvirt URI {declared.uri} of another machine")
            return LibvirtHypervisor(
                self.private().uri if declared.uri == "private" else declared.uri,
                self.farm.farm,
                self.disks(host),
                self.runner,
                step=current_step,
                kind=self._kind(host),
            )
        if declared.driver == "fake":
            from hypervisors.fake import FakeDisks, FakeHypervisor

            store = self.disks(host)
            assert isinstance(store, FakeDisks)
            return FakeHypervisor(self.farm.farm, store, self._fake_state(host), step=current_step)
        if declared.driver == "ssh":
            from hypervisors.ssh_driver import SshHypervisor, SshMachine

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
        raise self._not_yet(host, f"driver {declared.driver}")

    def _kind(self, host: str) -> Kind:
        declared = self.farm.hosts[host]
        if declared.driver == "xen":
            from hypervisors.libxl import Xen

            return Xen(Runner(), declared.guests or "pv")
        from hypervisors.kvm import kvm_usable
        from hypervisors.libvirt_kinds import Qemu

        return Qemu(kvm_usable(Runner(), cache_dir()))

    def _open_store(self, host: str) -> Disks:
        declared = self.farm.hosts[host]
        if declared.driver == "fake":
            from hypervisors.fake import FakeDisks

            return FakeDisks(self.farm.farm, self._fake_state(host), step=current_step)
        if not self.has_disks(host):
            raise Unsupported(
                f"{self.name}: host {host} (driver {declared.driver}) keeps no disks of ours",
                remedy="its machines are not cloned, checkpointed or destroyed here",
            )
        if declared.driver == "xenapi":
            return self._open_xenapi(host)
        if declared.driver not in ("kvm", "xen"):
            raise self._not_yet(host, f"driver {declared.driver}")
        if declared.disks.store in ("zfs", "zfs-files"):
            from hypervisors.zfs import ZfsDisks

            return ZfsDisks(
                declared.disks.pool or "", declared.disks.dataset or "farmhand", self.farm.farm,
                self.runner, step=current_step, reader_uid=self.reader_uid(host),
                files=state_dir() / "zfs" if declared.disks.store == "zfs-files" else None,
            )  # fmt: skip
        if declared.disks.store in ("lvm-thin", "lvm"):
            return self._open_lvm(host)
        from hypervisors.qcow2 import Qcow2Disks

        root = self.paths.disks
        if declared.disks.path is not None:
            root = self.farm.path.parent / declared.disks.path
        return Qcow2Disks(
            root, self.farm.farm, self.runner, step=current_step, reader_uid=self.reader_uid(host)
        )

    def _fake_state(self, host: str) -> Path | None:
        """In memory only for a plan over nothing: the fake would make its file by looking."""
        state = self.paths.root / f"fake-{host}.state"
        return None if self.plan and not state.exists() else state

    def _open_lvm(self, host: str) -> Disks:
        from hypervisors.lvm_classic import LvmClassicDisks
        from hypervisors.lvm_thin import LvmThinDisks

        disks, reader = self.farm.hosts[host].disks, self.reader_uid(host)
        group, links = disks.pool or "", state_dir() / "lvm"
        if disks.store == "lvm-thin":
            return LvmThinDisks(
                group, disks.dataset or "", self.farm.farm, self.runner, links=links,
                step=current_step, reader_uid=reader, warn=self.reporter.warn,
            )  # fmt: skip
        return LvmClassicDisks(
            group, self.farm.farm, self.runner, links=links, copy=disks.copy_mode,
            step=current_step, reader_uid=reader, warn=self.reporter.warn,
            progress=lambda what, done, total: self.reporter.working(f"{what}: {done * 100 // total} %"),
        )  # fmt: skip

    def _open_xenapi(self, host: str) -> Disks:
        from hypervisors.xenapi.disks import XenApiDisks
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
        )
        pool = Pool(
            Sessions(server), self.farm.farm, sr=declared.sr or "",
            copy=declared.copy_mode == "full",
            progress=lambda what, part: self.reporter.working(f"{what}: {part:.0%}"),
        )  # fmt: skip
        return XenApiDisks(pool, self.runner, step=current_step)

    def _not_yet(self, host: str, what: str) -> Unsupported:
        return Unsupported(
            f"{self.name}: host {host}: {what} is not in this version",
            remedy="this version drives kvm (uri private, or a libvirt URI of this machine) and xen "
            "(xen:///system) on qcow2 files, zfs or LVM, xenapi, ssh and fake; the farm file itself is "
            "fine",
        )

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
        return MachineSpec(
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
        )

    def endpoint(self, vm: str) -> Endpoint:
        """Where the VM's ssh answers and as whom."""
        from provision.remote import Endpoint

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
            options["UserKnownHostsFile"] = f'"{identity.known_hosts(self.paths)}"'
            options["HostKeyAlias"] = self.machine(vm)
            options["StrictHostKeyChecking"] = "yes"
        else:
            known = endpoint.known_hosts or endpoint.key.with_name("known_hosts")
            options["UserKnownHostsFile"] = f'"{known}"'
            options["StrictHostKeyChecking"] = "accept-new"
        argv = ["ssh", "-F", "/dev/null", "-i", str(endpoint.key), "-p", str(endpoint.port)]
        for key, value in options.items():
            argv += ["-o", f"{key}={value}"]
        return (*argv, f"{endpoint.user}@{endpoint.host}", *([command] if command else []))


def open_site(farm_file: Path, *, reporter: Reporter, plan: bool = False) -> Site:
    """Load the farm file and open its farm. Errors: InventoryError, NotFound."""
    from inventory.loader import load

    return Site(load(farm_file), reporter=reporter, plan=plan)


def is_remote(uri: str) -> bool:
    """A libvirt URI of another machine: qemu+ssh://HOST/..., but not "private", qemu:///system or
    qemu+unix:///system?socket=..."""
    from urllib.parse import urlsplit

    return urlsplit(uri).hostname not in (None, "", "localhost")
