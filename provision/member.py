"""A VM of a farm, with all that is looked up for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from host.ports import listener
from host.ssh_options import path_option
from hypervisors.api import (
    CLEAN,
    ON,
    Disk,
    Disks,
    Forward,
    Hypervisor,
    KeptMemory,
    Machine,
    MachineSpec,
    Nic,
    Owner,
    Power,
    WarmMachines,
    not_ours,
)
from inventory.errors import Call, Conflict, FarmhandError, Interrupted, NotFound
from inventory.hosts import DriverInfo, Host
from inventory.model import Vm
from inventory.sizes import format_size
from provision.allocate import Allocation
from provision.guest import identity

if TYPE_CHECKING:
    from provision.guest.remote import Endpoint
    from provision.site import Site


_T = TypeVar("_T")
_AT_ONCE = 16


class Member:
    """A declared VM. It is resolved once for an operation (``members_of``) and handed on, and is valid
    for that operation only. Its host is connected at first use. What it was given is asked once."""

    def __init__(self, site: Site, vm: str) -> None:
        farm = site.farm
        self.site = site
        self.vm = vm
        self.declared: Vm = farm.vms[vm]
        self.host: str = farm.host_of(vm)
        self.machine: str = farm.machine_of(vm)
        """The name of its machine on the host."""
        self._allocation: Allocation | None = None
        self._looked = False
        self._address: IPv4Address | None = None
        self._port: int | None = None

    def __repr__(self) -> str:
        return f"Member({self.vm!r} on {self.host!r})"

    @property
    def declared_host(self) -> Host:
        return self.site.farm.hosts[self.host]

    @property
    def info(self) -> DriverInfo:
        """What its host's driver can do."""
        return self.declared_host.INFO

    @property
    def owner(self) -> Owner:
        """Our mark on what is its."""
        return Owner(self.site.identity, self.vm)

    @property
    def can_power(self) -> bool:
        """Whether it can be switched on and off from here. Not so for a machine that nobody
        virtualizes."""
        return self.info.power

    @property
    def idles(self) -> bool:
        """Whether it is to have less memory while nothing is built in it."""
        return self.can_power and self.declared.idle_memory not in (None, self.declared.memory)

    # What is there

    @property
    def driver(self) -> Hypervisor:
        return self.site.hypervisor(self.host)

    @property
    def has_store(self) -> bool:
        return self.site.has_disks(self.host)

    @property
    def store(self) -> Disks:
        """Its disk store. Unsupported if its host keeps no disks of ours."""
        return self.site.disks(self.host)

    def look(self) -> Machine | None:
        """Its machine as it is now; None if it isn't made. NotOurs if another's machine has its name."""
        return self._looked_at(self.site.hypervisor(self.host, look=True).find(self.machine))

    def _looked_at(self, machine: Machine | None) -> Machine | None:
        if machine is not None and machine.owner != self.owner:
            what = f"{self.site.name}: machine {machine.name} on host {self.host}"
            raise not_ours(what, machine.owner, self.site.identity)
        self.was_seen(machine)
        return machine

    def was_seen(self, machine: Machine | None) -> None:
        """Where it is, from now on: a machine tells that by its mark; and its port, if it is up. Both
        are as it was started, whatever the farm file says by now. The caller has looked at it."""
        self._looked = True
        self._address = machine.address if machine else None
        nic = machine.nic if machine and machine.power in (*ON, Power.SUSPENDED) else None
        self._port = next((one.host for one in nic.forwards if one.guest == 22), None) if nic else None

    def present(self) -> Machine:
        """As ``look``, but NotFound if it isn't made."""
        machine = self.look()
        if machine is None:
            raise NotFound(
                f"{self.site.name}: {self.vm} is not made yet",
                remedy=("make it: ", Call("clone-farm", vm=self.vm)),
            )
        return machine

    def disk(self) -> Disk | None:
        """Its disk, with those of its checkpoints marked as warm that have memory; None if there is
        none, or its host keeps no disks of ours. NotOurs if another farm's disk has its name."""
        disk = self.store.find(self.machine) if self.has_store else None
        if disk is not None and disk.owner.farm != self.site.identity:
            what = f"{self.site.name}: the disk of {self.machine} on host {self.host}"
            raise not_ours(what, disk.owner, self.site.identity)
        if disk is None or all(kept.name == CLEAN for kept in disk.checkpoints):
            return disk
        return with_memories(disk, self.memories())

    def memories(self) -> Mapping[str, KeptMemory]:
        """What its hypervisor keeps of its memory, by checkpoint, also where it can't be used now;
        nothing where the store does that, or nobody."""
        driver = self.site.hypervisor(self.host, look=True)
        if not isinstance(driver, WarmMachines):
            return {}
        return for_declared(driver.memories(self.machine), self.declared)

    def why_unusable(self, name: str) -> str:
        """Why the memory of a checkpoint could not be given back now, though ``memories`` tells of no
        trouble; "": it could. See ``WarmMachines.why_unusable``."""
        driver = self.site.hypervisor(self.host, look=True)
        return driver.why_unusable(self.machine, name) if isinstance(driver, WarmMachines) else ""

    # What it was given

    def allocate(self, *, move_port: bool = False) -> Allocation:
        """What it was given, durably recorded; asked once. ``move_port``: give it another ssh port from
        now on. Errors: as ``Allocator.allocate``."""
        if self._allocation is None or move_port:
            told = told_by({self.vm: self._address})
            self._allocation = self.site.allocator.allocate(self.vm, move_port=move_port, told=told)
        return self._allocation

    def was_given(self, allocation: Allocation) -> None:
        """Set what ``allocate`` returns from now on. The caller has recorded it, for many VMs at
        once."""
        self._allocation = allocation

    def spec(self, given: Allocation) -> MachineSpec:
        """Its machine as the farm file asks for it."""
        site, declared, network = self.site, self.declared, self.site.farm.network
        user_mode = network.mode == "user"
        boot = site.farm.boot_of(self.vm)
        spec = MachineSpec(
            name=self.machine,
            owner=self.owner,
            memory=declared.memory,
            vcpus=declared.vcpus,
            disk_size=declared.disk or 0,
            nic=Nic(
                mac=given.mac,
                mode=network.mode,
                target=network.bridge or network.network or "",
                forwards=(Forward(given.ssh_port, 22),) if user_mode else (),
                internet=network.internet,
            ),
            address=given.address,
            ssh_port=given.ssh_port,
            seed=None if self.keeps_own_key else identity.seed_file(site.paths, self.machine),
            console_log=identity.console_log(site.paths, self.machine),
            kernel=Path(boot.kernel) if boot else None,
            initrd=Path(boot.initrd) if boot and boot.initrd else None,
            cmdline=boot.cmdline if boot else "",
            firmware=site.farm.firmware_of(self.vm),
        )
        far = site.far(self.host)
        return far.at_home(spec) if far else spec

    @property
    def keeps_own_key(self) -> bool:
        """Whether it was cloned as one that nobody tells anything at its first boot: it has no seed, and
        its image's host key."""
        return self.info.virtual and identity.keeps_own_key(self.site.paths, self.vm)

    # How it is reached

    def check_key(self) -> None:
        """UsageError if nobody told it whose key to let in, and the farm file names none that its image
        lets in."""
        farm = self.site.farm
        if farm.ssh.key is None and self.info.guests and self.keeps_own_key:
            raise identity.no_key(farm, farm.template_of(self.vm) or "")

    def address(self) -> tuple[str, int]:
        """Host and port of its ssh: what its machine's mark tells, before what is recorded or would be
        given."""
        if not self.info.virtual:
            return self._name_or_address(), self.declared.ssh_port or 22
        allocator = self.site.allocator
        got = self._allocation or allocator.recorded().get(self.vm) or allocator.peek(self.vm)
        address = self._marked() or got.address
        if self.site.farm.network.mode == "user":
            return "127.0.0.1", self._port or got.ssh_port
        return (str(address) if address else self._name_or_address()), got.ssh_port

    def _marked(self) -> IPv4Address | None:
        """None also where its host doesn't answer now: it may be reached all the same."""
        if not self._looked:
            try:
                self.look()
            except Interrupted:
                raise
            except FarmhandError:
                self.was_seen(None)
        return self._address

    def endpoint(self, *, runs: bool = False, seen: bool = False) -> Endpoint:
        """Where its ssh answers and as whom. ``runs``: its machine is known to, and so holds its port.
        ``seen``: its machine has just been looked at (``was_seen``).
        NotFound if it is a VM that isn't made, or whose host key isn't there, Conflict if a stranger
        holds its port; as ``check_key``."""
        from provision.guest.remote import Endpoint

        self.check_key()
        if not (runs or seen) and self.site.farm.network.mode == "user":
            self._looked = False  # it may have been started anew since, with another port
        host, port = self.address()
        if not runs:
            self.check_port(port)
        own = self.keeps_own_key
        given = self.info.virtual and not own
        key = identity.host_key(self.site.paths, self.vm) if given else ""
        learnt = self.site.reporter.say if own else self.site.reporter.warn  # of its own it is meant
        if given and not key:
            self.present()
            file = identity.host_key_file(self.site.paths, self.vm)
            raise NotFound(
                f"there is no host key {file}: it can't be told from others that answer in its place",
                vm=self.vm,
                remedy=("give it another one: ", Call("reset", vm=self.vm)),
            )
        return Endpoint(
            vm=self.vm,
            host=host,
            port=port,
            user=self.site.farm.ssh.user,
            key=identity.controller_key(self.site.farm, self.site.paths),
            host_key=key,
            known_hosts=identity.learnt_hosts(self.site.paths, self.vm) if own else None,
            alias=self.machine if own else "",
            pinned=None if key else partial(learnt, vm=self.vm),
        )

    def check_port(self, port: int) -> None:
        """Conflict if a stranger holds it, where it is one of this machine's loopback."""
        if self.site.farm.network.mode != "user" or not self.info.forwards:
            return
        ours, found = self.site.opened(self.host).forwards_as(), listener(port)
        if ours is not None and found is not None and found.uid != ours:
            raise Conflict(
                f"a stranger holds port {port} of this machine's loopback: {found}; "
                "it is not taken for the VM",
                vm=self.vm,
                remedy=(
                    "end that, or start the VM, which gets another port: ",
                    Call("start", vm=self.vm),
                ),
            )

    def ssh_argv(self, endpoint: Endpoint, command: str = "") -> tuple[str, ...]:
        """The OpenSSH command line that logs in, or runs a command there. It accepts the VM's own host
        key only; for a machine that nobody gave one, the first key that it shows, from then on, and says
        so. It uses no ssh configuration of the user or the host."""
        options = {
            "IdentitiesOnly": "yes", "GlobalKnownHostsFile": "/dev/null", "LogLevel": "ERROR",
            # A VM that is reset doesn't say goodbye, and on a bridge nothing else does.
            "ServerAliveInterval": "5", "ServerAliveCountMax": "3",
            # To connect, and for keys: one that hangs would be waited for without end.
            "ConnectTimeout": "30",
        }  # fmt: skip
        if endpoint.host_key:
            identity.write_known_hosts(self.site.paths, self.vm, self.machine, endpoint.host_key)
            known = identity.known_hosts(self.site.paths, self.vm)
            options["HostKeyAlias"] = self.machine
            options["StrictHostKeyChecking"] = "yes"
        else:
            known = endpoint.known_hosts or endpoint.key.with_name("known_hosts")
            if endpoint.alias:
                options["HostKeyAlias"] = endpoint.alias
            options["StrictHostKeyChecking"] = "accept-new"
            options["LogLevel"] = "INFO"  # "Permanently added ..."
        argv = ["ssh", "-F", "/dev/null", "-p", str(endpoint.port)]
        argv += path_option("IdentityFile", endpoint.key)
        argv += path_option("UserKnownHostsFile", known)
        for key, value in options.items():
            argv += ["-o", f"{key}={value}"]
        return (*argv, f"{endpoint.user}@{endpoint.host}", *([command] if command else []))

    def _name_or_address(self) -> str:
        if self.declared.address:
            return str(self.declared.address)
        hostname, domain = self.site.farm.hostname_of(self.vm), self.site.farm.network.domain
        return f"{hostname}.{domain}" if domain and "." not in hostname else hostname


def members_of(site: Site, names: Sequence[str] | None = None) -> tuple[Member, ...]:
    """Declared VMs, for one operation; chosen as by ``Site.vms``."""
    return tuple(Member(site, vm) for vm in site.vms(names))


def told_by(addresses: Mapping[str, IPv4Address | None]) -> Mapping[str, IPv4Address]:
    """Those of the VMs whose machines tell where they are."""
    return {vm: address for vm, address in addresses.items() if address}


def told_without_record(site: Site, *, but: Collection[str] = ()) -> Mapping[str, IPv4Address]:
    """Where the machines of the farm's VMs (``but`` these, which the caller has looked at) say that they
    are, as long as there is no record at all: it was lost, or left in another place, and what they have
    is not free. With a record, or where the farm file says where each is: nothing, and no host is asked.
    A host that can't be is passed by: what it has is put right when it is."""
    missed = [
        one for one in members_of(site)
        if one.vm not in but and one.info.virtual and not one.declared.address
    ]  # fmt: skip
    if not missed or site.farm.network.mode == "user" or site.allocator.recorded():
        return {}
    machines: list[Machine] = []
    for host in dict.fromkeys(member.host for member in missed):
        try:
            machines += site.hypervisor(host, look=True).list()
        except FarmhandError as error:
            site.reporter.warn(f"host {host} can't tell which addresses its VMs have: {error.message}")
    return told_by({one.owner.vm: one.address for one in machines if one.owner})


def with_memories(disk: Disk, memories: Mapping[str, KeptMemory]) -> Disk:
    """The disk with those checkpoints marked as warm that have memory."""
    if not memories:
        return disk
    marked = (replace(kept, warm=kept.warm or kept.name in memories) for kept in disk.checkpoints)
    return replace(disk, checkpoints=tuple(marked))


def for_declared(memories: Mapping[str, KeptMemory], declared: Vm) -> Mapping[str, KeptMemory]:
    """With the trouble of those of another machine than the farm file has now: it would run with what it
    had then, and what the host's ``memory`` leaves is counted by the farm file."""

    def trouble(kept: KeptMemory) -> str:
        # libvirt rounds up to whole MiB
        if kept.trouble or (abs(kept.size - declared.memory) < 2**20 and kept.vcpus == declared.vcpus):
            return kept.trouble
        return (
            f"it is of a machine of {format_size(kept.size)} and {kept.vcpus} vCPU, which has "
            f"{format_size(declared.memory)} and {declared.vcpus} now"
        )

    return {name: replace(kept, trouble=trouble(kept)) for name, kept in memories.items()}


def is_on(machine: Machine | None) -> bool:
    return machine is not None and machine.power in ON


def is_half_started(member: Member, machine: Machine | None) -> bool:
    """Whether it stands still and never ran, for all that is known: whoever gave it its memory back was
    cut off. ``settle`` knows for certain, and ends that, or lets it run on; what an admin has suspended
    stays as it is."""
    if machine is None or machine.power is not Power.PAUSED or machine.started is not None:
        return False
    return isinstance(member.site.hypervisor(member.host, look=True), WarmMachines)


def runs_unnoted(machine: Machine) -> bool:
    """Whether it runs, and nobody noted that it was started: whoever gave it its memory back may have
    been cut off right then. ``settle`` finishes that."""
    return machine.power is Power.RUNNING and machine.started is None


def settle(*members: Member) -> None:
    """``WarmMachines.settle`` of each, and say what was done."""
    for member in members:
        driver = member.driver
        if isinstance(driver, WarmMachines) and (done := driver.settle(member.machine)):
            member.site.reporter.say(done, vm=member.vm)


def look_at_all(members: Sequence[Member]) -> dict[str, Machine | None]:
    """``Member.look`` of each, by VM, in their order. A host all of whose VMs are among them is asked
    for its machines once; those that it doesn't list are looked for."""
    if not members:
        return {}
    site = members[0].site
    asked, there = Counter(one.host for one in members), Counter(map(site.farm.host_of, site.farm.vms))
    whole = [host for host, count in asked.items() if 1 < count == there[host]]
    drivers = {host: site.hypervisor(host, look=True) for host in whole}
    listed = {(host, one.name): one for host, driver in drivers.items() for one in driver.list()}

    def look(member: Member) -> Machine | None:
        machine = listed.get((member.host, member.machine))
        return member._looked_at(machine) if machine else member.look()

    return each(members, look)


def each(members: Sequence[Member], ask: Callable[[Member], _T]) -> dict[str, _T]:
    """What is asked of each, by VM, in their order. Where another machine answers all are asked at once,
    for an answer takes as long as the way there. The first one's error."""
    if len(members) < 2 or not any(member.declared_host.far for member in members):
        return {member.vm: ask(member) for member in members}
    from concurrent.futures import ThreadPoolExecutor

    names = [member.vm for member in members]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            return dict(zip(names, pool.map(ask, members), strict=True))
        except KeyboardInterrupt:
            members[0].site.journal.interrupted.set()
            raise
