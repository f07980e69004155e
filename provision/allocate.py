"""MAC, address and ssh port of each VM: unique, and the same each time.

What was given out is recorded in a lock file next to the farm file (as package managers do: keep it
in version control with the farm), or in the state directory for a farm file inside the toolkit.
Ports and MACs are claimed for the whole host besides, in the state directory, for other farms' sake.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, cast

from host.file_lock import FileLock, directory_lock
from host.files import make_directory
from host.paths import FarmPaths, state_dir
from inventory.errors import Conflict, FarmhandError, NotFound
from inventory.model import Farm
from provision.claims import Claims, OpenClaims
from provision.lockfile import LockFile, LockFileContent, LockFileEntry, Resting

PORTS = range(22000, 30000)
"""Loopback ports for ssh in user mode, of all farms of the host; outside the kernel's ephemeral range
(ip(7), 32768-60999)."""
_NOTHING: Mapping[str, IPv4Address] = {}


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a VM was given. ``ssh_port``: in user mode a port of the host's loopback, else of the
    address. ``address``: None in user mode, or if DHCP gives it."""

    vm: str
    mac: str
    address: IPv4Address | None
    ssh_port: int


class _Given(Mapping[str, Allocation]):
    """The lock file's entries as values. They are made when they are asked for: of ten thousand few
    are."""

    def __init__(self, entries: Mapping[str, LockFileEntry]) -> None:
        self._entries = entries

    def __getitem__(self, vm: str) -> Allocation:
        return _allocation(vm, self._entries[vm])

    def __contains__(self, vm: object) -> bool:
        return vm in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _allocation(vm: str, entry: LockFileEntry) -> Allocation:
    address = entry["address"]
    return Allocation(vm, entry["mac"], IPv4Address(address) if address else None, entry["ssh_port"])


def _entry(got: Allocation) -> LockFileEntry:
    return {"mac": got.mac, "address": str(got.address or "") or None, "ssh_port": got.ssh_port}


class _Declared:
    """What the farm file gives by name, and so nobody else. Each value is looked up when it is asked
    for, once."""

    def __init__(self, farm: Farm) -> None:
        self._vms, self._network = farm.vms.values(), farm.network

    @cached_property
    def macs(self) -> set[str]:
        return {vm.mac for vm in self._vms if vm.mac}

    @cached_property
    def ports(self) -> set[int]:
        return {port for vm in self._vms for port in (vm.ssh_port, vm.nat_port) if port}

    @cached_property
    def addresses(self) -> set[IPv4Address]:
        network = self._network
        others = {a for a in (network.gateway, *network.nameservers) if a}
        return {vm.address for vm in self._vms if vm.address} | others


class _Index:
    """Who has what and what is free, for any number of VMs. Addresses are texts in their one form."""

    def __init__(
        self, farm: Farm, declared: _Declared, book: LockFileContent, claims: OpenClaims
    ) -> None:
        self._recorded, self._given = book.vms, dict[str, Allocation]()
        self.declared, self.resting, self.claims = declared, book.resting, claims
        self.now = datetime.now(UTC)
        self.macs = _over(book.by("mac"))
        self.addresses = _over(book.by("address"))  # and somebody by None
        self.ports = _over(book.by("ssh_port") if farm.network.mode == "user" else {})
        self._subnet = farm.network.subnet
        self._ranges = farm.network.reserved_ranges
        self._free = self._walk()

    def displace(self, told: Mapping[str, IPv4Address]) -> Iterator[str]:
        """Count what machines say of themselves for more than what is recorded. Yields the VMs that were
        recorded with such an address and don't say so."""
        for address, vm in {address: vm for vm, address in told.items()}.items():
            holder = self.holder(address)
            if not self.may_be_given(address):
                continue
            entry = self._recorded.get(vm)
            recorded = _allocation(vm, entry) if entry else Allocation(vm, "", None, 0)
            self._given[vm] = replace(recorded, address=address)
            self.addresses[str(address)] = vm
            if holder is not None and holder not in told:
                yield holder

    def recorded(self, vm: str) -> Allocation | None:
        entry = self._recorded.get(vm)
        return self._given.get(vm) or (_allocation(vm, entry) if entry else None)

    def rested(self, vm: str) -> IPv4Address | None:
        """What the VM had before and may have again: the latest."""
        its = ((one.until, address) for address, one in self.resting.items() if one.vm == vm)
        free = (item for item in its if not self.holder(item[1]) and self.may_be_given(item[1]))
        return max(free, default=(None, None))[1]

    def holder(self, address: IPv4Address) -> str | None:
        return self.addresses.get(str(address))

    def add(self, got: Allocation) -> None:
        self._given[got.vm] = got
        self.macs[got.mac] = self.ports[got.ssh_port] = got.vm
        if got.address:
            self.addresses[str(got.address)] = got.vm

    def may_be_given(self, address: IPv4Address) -> bool:
        """Whether the farm file leaves it to the pool."""
        net = self._subnet
        return (
            net is not None
            and address not in (net.network_address, net.broadcast_address)
            and address in net
            and address not in self.declared.addresses
            and not any(first <= address <= last for first, last in self._ranges)
        )

    def next_free(self) -> IPv4Address | None:
        return next(self._free, None)

    def _walk(self) -> Iterator[IPv4Address]:
        """What is taken meanwhile was behind us or is closed: no address comes twice."""
        for address in self._subnet.hosts() if self._subnet else ():
            resting = self.resting.get(address)
            if self.holder(address) or (resting and resting.until > self.now):
                continue
            if self.may_be_given(address):
                yield address


def _over(recorded: Mapping[Any, str]) -> ChainMap[Any, str]:
    """A view of one mapping over another: additions don't change the lower one."""
    return ChainMap({}, cast("dict[Any, str]", recorded))


class Allocator:
    """One farm's allocations. Safe between threads and processes."""

    def __init__(self, farm: Farm, lock_file: Path, claims: Path | None = None) -> None:
        self._farm = farm
        self._declared = _Declared(farm)
        self._file = LockFile(farm.farm, lock_file)
        self._claims = Claims(claims or state_dir() / "claims.db")

    @property
    def lock_file(self) -> Path:
        return self._file.path

    def recorded(self, *, without: Iterable[str] = ()) -> Mapping[str, Allocation]:
        """What the lock file says, of declared VMs and others, except those ``without``."""
        entries = self._file.read().vms
        gone = frozenset(without)
        return _Given(
            {vm: entry for vm, entry in entries.items() if vm not in gone} if gone else entries
        )

    def peek(self, vm: str) -> Allocation:
        """What ``allocate`` would give now. Records nothing, takes no lock."""
        return self.peek_all([vm])[vm]

    def peek_all(
        self, vms: Collection[str], *, told: Mapping[str, IPv4Address] = _NOTHING
    ) -> dict[str, Allocation]:
        """What ``allocate_all`` would give now. Records nothing, takes no lock."""
        with self._claims.reading() as claims:
            index = _Index(self._farm, self._declared, self._file.read(), claims)
            return self._choose_all(vms, index, told)

    def allocate(
        self, vm: str, *, move_port: bool = False, told: Mapping[str, IPv4Address] = _NOTHING
    ) -> Allocation:
        """What the VM was given; if nothing, something new, which is durably recorded when this returns.
        ``move_port``: give another ssh port than the recorded one, which somebody else has taken
        meanwhile. ``told``: addresses that machines which exist have by their marks. These count for
        more than the record, which may be lost, or another controller's.

        Errors: Conflict (declared, but another VM has it), NotFound (nothing left in the pool)."""
        return self._allocate([vm], told, move_port=move_port)[vm]

    def allocate_all(
        self, vms: Collection[str], *, told: Mapping[str, IPv4Address] = _NOTHING
    ) -> dict[str, Allocation]:
        """As ``allocate``, for many VMs at once."""
        return self._allocate(vms, told)

    def _allocate(
        self, vms: Collection[str], told: Mapping[str, IPv4Address], *, move_port: bool = False
    ) -> dict[str, Allocation]:
        with self._exclusively():
            book = self._file.read()
            with self._claims.writing() as claims:
                index = _Index(self._farm, self._declared, book, claims)
                given = self._choose_all(vms, index, told, move_port=move_port)
                claims.give({self._owner(got.vm): self._keys(got) for got in given.values()})
            # first the host's, then ours: a kill between leaks no duplicate
            changed = {vm: got for vm, got in given.items() if book.vms.get(vm) != _entry(got)}
            if not changed:
                return given
            book = book.copy()
            for vm, got in changed.items():
                old = book.vms.get(vm)
                if old and old["address"] != str(got.address):
                    self._rest(book, vm, old)
                book.vms[vm] = _entry(got)
            for got in changed.values():
                if got.address:
                    book.resting.pop(got.address, None)
            self._file.write(book, changed)
            return given

    def release(self, *vms: str) -> None:
        """Give back all that these VMs have. Leased addresses rest until the leases end, for others.
        Does nothing if nothing is recorded."""
        with self._exclusively():
            book = self._file.read().copy()
            got = {vm: book.vms.pop(vm) for vm in vms if vm in book.vms}
            if self._farm.network.addressing == "dhcp":  # nobody leases static ones: free at once
                for vm, entry in got.items():
                    self._rest(book, vm, entry)
            if got:
                self._file.write(book, got)
            with self._claims.writing() as claims:
                for vm in vms:
                    claims.drop(self._owner(vm))

    def rename(self, vm: str, to: str) -> None:
        """All that a VM was given is the other's from now on; what that was given before is given back.
        Safe to do again."""
        with self._exclusively():
            book = self._file.read().copy()
            entry, before = book.vms.pop(vm, None), book.vms.get(to)
            with self._claims.writing() as claims:
                keys = self._keys(_allocation(to, entry)) if entry else claims.of(self._owner(vm))
                claims.drop(self._owner(vm))
                if keys:
                    claims.give({self._owner(to): keys})
            if entry is None:
                return
            if before and self._farm.network.addressing == "dhcp":
                self._rest(book, to, before)
            book.vms[to] = entry
            for address, rest in book.resting.items():
                if rest.vm == vm:
                    book.resting[address] = replace(rest, vm=to)
            self._file.write(book, [vm, to])

    def forget(self) -> None:
        """Remove the whole farm's claims and its lock file."""
        with self._exclusively():
            with self._claims.writing() as claims:
                claims.drop(self._owner(""))
            self.lock_file.unlink(missing_ok=True)

    def _rest(self, book: LockFileContent, vm: str, entry: LockFileEntry) -> None:
        """A DHCP server may go on leasing the address to the MAC that had it, and a VM that was given
        another may run with the old one still: others wait for as long as a lease lasts."""
        if entry["address"]:
            until = datetime.now(UTC) + timedelta(seconds=self._farm.network.lease_time)
            book.resting[IPv4Address(entry["address"])] = Resting(vm, until)

    def _choose_all(
        self,
        vms: Iterable[str],
        index: _Index,
        told: Mapping[str, IPv4Address],
        *,
        move_port: bool = False,
    ) -> dict[str, Allocation]:
        displaced = [vm for vm in index.displace(told) if vm in self._farm.vms]
        wanted = dict.fromkeys((*vms, *displaced))
        return {vm: self._choose(vm, index, move_port=move_port) for vm in wanted}

    def _choose(self, vm: str, index: _Index, *, move_port: bool = False) -> Allocation:
        got = Allocation(
            vm, self._mac(vm, index), self._address(vm, index), self._port(vm, index, move=move_port)
        )
        index.add(got)
        return got

    def _mac(self, vm: str, index: _Index) -> str:
        declared = self._farm.vms[vm].mac
        if declared:
            if index.macs.get(declared, vm) != vm:
                raise self._taken(vm, f"MAC {declared}", index.macs[declared])
            return declared
        prefix = self._farm.driver_of(vm).mac_prefix
        mine = self._owner(vm)

        def unclaimed(mac: str) -> bool:
            return mac not in index.declared.macs and index.claims.owner(mac) in (None, mine)

        recorded = index.recorded(vm)
        # One that was recorded may be another farm's: its file was copied, and given another name.
        if recorded and recorded.mac.startswith(prefix) and unclaimed(recorded.mac):
            return recorded.mac
        attempt = 0
        while True:
            digest = hashlib.sha256(f"{mine}/{attempt}".encode()).digest()
            mac = f"{prefix}:{digest[0]:02x}:{digest[1]:02x}:{digest[2]:02x}"
            if index.macs.get(mac, vm) == vm and unclaimed(mac):
                return mac
            attempt += 1

    def _address(self, vm: str, index: _Index) -> IPv4Address | None:
        declared = self._farm.vms[vm].address
        if declared:
            holder = index.holder(declared)
            if holder not in (None, vm):
                raise self._taken(vm, f"address {declared}", str(holder))
            return declared
        network = self._farm.network
        if network.subnet is None or network.mode == "user":
            return None
        recorded = index.recorded(vm)
        kept = recorded.address if recorded else None
        if (
            kept
            and kept in network.subnet
            and index.holder(kept) in (None, vm)
            and index.may_be_given(kept)
        ):
            return kept
        found = index.rested(vm) or index.next_free()
        if found is not None:
            return found
        asleep = sum(1 for one in index.resting.values() if one.until > index.now)
        given = sum(1 for address, other in index.addresses.items() if address and other != vm)
        raise NotFound(
            f"{self._name}: no address is left for {vm} in {network.subnet}: {given} given out, "
            f"{asleep} resting until leases of VMs that had them end",
            remedy=f"widen 'subnet' or narrow 'reserved', or take resting ones out of {self.lock_file}",
        )

    def _port(self, vm: str, index: _Index, *, move: bool) -> int:
        declared = self._farm.vms[vm].ssh_port
        if self._farm.network.mode != "user" or not self._farm.driver_of(vm).virtual:
            return declared or 22
        mine = self._owner(vm)
        claims = index.claims
        if declared:
            holder, owner = index.ports.get(declared, vm), claims.owner(str(declared)) or mine
            if holder != vm or owner != mine:
                raise self._taken(vm, f"ssh port {declared}", holder if holder != vm else owner)
            return declared

        def open_(port: int) -> bool:
            return index.ports.get(port, vm) == vm and port not in index.declared.ports

        recorded = index.recorded(vm)
        kept = recorded.ssh_port if recorded and not move else None
        if (
            kept is not None
            and kept in PORTS
            and kept not in index.declared.ports
            and claims.owner(str(kept)) in (None, mine)
        ):
            return kept
        # A lost lock file must not move a running VM's port: the host's claims still know it.
        known = min((int(key) for key in claims.of(mine) if key.isdigit()), default=None)
        if known and not move and open_(known):
            return known
        seed = f"{state_dir()}/{mine}".encode()
        first = int.from_bytes(hashlib.sha256(seed).digest()[:4]) % len(PORTS)
        for offset in range(len(PORTS)):
            port = PORTS[(first + offset) % len(PORTS)]
            if port in index.ports or port in index.declared.ports or claims.owner(str(port)):
                continue
            if port_free(port):
                return port
        raise Conflict(
            f"{self._name}: no free port for {vm}'s ssh in {PORTS.start}-{PORTS.stop - 1}",
            remedy="destroy farms no longer needed, or give the VM an 'ssh_port'",
        )

    def _taken(self, vm: str, what: str, other: str) -> FarmhandError:
        return Conflict(
            f"{self._name}: {vm} is declared with {what}, which {other} was given before",
            remedy=f"declare another, or destroy {other} first (see {self.lock_file})",
        )

    @property
    def _name(self) -> str:
        return self._farm.path.name or self._farm.farm

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Hold the host's claims first, then the lock file's directory: another state directory may have
        the same farm file. The lock file itself is replaced, so a lock on it would be lost; and a lock
        on the directory leaves no file of ours beside the admin's."""
        claims = self._claims.path
        make_directory(claims.parent, mode=0o711)
        make_directory(self.lock_file.parent, mode=0o711)
        with FileLock(claims.with_name(".claims.lock")).hold(), directory_lock(self.lock_file.parent):
            yield

    def _owner(self, vm: str) -> str:
        return f"{self._farm.farm}/{vm}"

    def _keys(self, got: Allocation) -> set[str]:
        loopback = got.ssh_port in PORTS or self._farm.network.mode == "user"
        return {got.mac, str(got.ssh_port)} if loopback else {got.mac}


def lock_file_of(farm: Farm, paths: FarmPaths) -> Path:
    """The lock file's place: next to the farm file. For a farm file inside the toolkit's own tree, where
    nothing is ever written, it is in the state directory."""
    import inventory

    name = f"{farm.path.name or 'farm.yaml'}.lock"
    toolkit = Path(inventory.__file__).resolve().parent.parent
    if not farm.path.name or farm.path.resolve().is_relative_to(toolkit):
        return paths.root / name
    return farm.path.with_name(name)


def port_free(port: int) -> bool:
    """Whether a listener could be put on the host's loopback now. With SO_REUSEADDR, as QEMU does it:
    connections that ended a moment ago don't count (socket(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True
