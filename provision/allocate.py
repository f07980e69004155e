"""MAC, address and ssh port of each VM: unique, and the same each time.

What was given out is recorded in a lock file next to the farm file (as package managers do: keep it
in version control with the farm), or in the state directory for a farm file inside the toolkit.
Ports and MACs are claimed for the whole host besides, in the state directory, for other farms' sake.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from inventory.errors import Conflict, FarmhandError, NotFound, WrongState
from inventory.model import Farm
from provision.files import file_error, make_directory, write_atomic
from provision.paths import FarmPaths, state_dir

PORTS = range(22000, 23000)
"""Loopback ports for ssh in user mode; outside the kernel's ephemeral range (ip(7), 32768-60999)."""

HOLD = timedelta(hours=12)
"""How long an address rests before another VM may have it: leases and ARP caches forget slowly."""

_ABOUT = (
    "Written by farmhand: which MAC, address and ssh port each VM of this farm was given. "
    "Keep it with the farm file; removing it lets VMs not yet made get others."
)


@dataclass(frozen=True, slots=True)
class Allocation:
    """``ssh_port`` is of the host's loopback in user mode, else of the address. ``address`` None:
    user mode, or left to DHCP."""

    vm: str
    mac: str
    address: IPv4Address | None
    ssh_port: int


@dataclass(slots=True)
class _Book:
    vms: dict[str, Allocation] = field(default_factory=dict)
    resting: dict[IPv4Address, datetime] = field(default_factory=dict)  # until when


class Allocator:
    """One farm's. Safe between threads and processes."""

    def __init__(self, farm: Farm, lock_file: Path, claims: Path | None = None) -> None:
        self._farm = farm
        self.lock_file = lock_file
        self._claims = claims or state_dir() / "claims.json"

    def recorded(self) -> Mapping[str, Allocation]:
        """What the lock file says, of VMs that are declared or not."""
        return self._read().vms

    def peek(self, vm: str) -> Allocation:
        """What ``allocate`` would give now; nothing is recorded. Takes no lock."""
        return self._choose(vm, self._read(), self._read_claims())

    def allocate(self, vm: str, *, move_port: bool = False) -> Allocation:
        """The recorded one, or a new one, durably recorded when this returns. ``move_port``: another
        ssh port than the recorded one, which somebody else has taken meanwhile.

        Errors: Conflict (declared, but another VM has it), NotFound (nothing left in the pool)."""
        with self._exclusively():
            book, claims = self._read(), self._read_claims()
            got = self._choose(vm, book, claims, move_port=move_port)
            self._claim(got, claims)  # first the host's, then ours: a kill between leaks no duplicate
            if book.vms.get(vm) != got:
                old = book.vms.get(vm)
                if old and old.address and old.address != got.address:
                    book.resting[old.address] = datetime.now(UTC) + HOLD
                book.vms[vm] = got
                if got.address:
                    book.resting.pop(got.address, None)
                self._write(book)
            return got

    def release(self, vm: str) -> None:
        """Give all back; the address rests for a while. Nothing recorded: nothing done."""
        with self._exclusively():
            book = self._read()
            got = book.vms.pop(vm, None)
            if got is not None:
                if got.address:
                    book.resting[got.address] = datetime.now(UTC) + HOLD
                self._write(book)
            claims = self._read_claims()
            mine = f"{self._farm.farm}/{vm}"
            left = {key: owner for key, owner in claims.items() if owner != mine}
            if left != claims:
                self._write_claims(left)

    def forget(self) -> None:
        """The whole farm goes: its claims and its lock file."""
        with self._exclusively():
            claims = self._read_claims()
            prefix = f"{self._farm.farm}/"
            left = {key: owner for key, owner in claims.items() if not owner.startswith(prefix)}
            if left != claims:
                self._write_claims(left)
            self.lock_file.unlink(missing_ok=True)

    def _choose(
        self, vm: str, book: _Book, claims: Mapping[str, str], *, move_port: bool = False
    ) -> Allocation:
        others = {name: got for name, got in book.vms.items() if name != vm}
        recorded = book.vms.get(vm)
        return Allocation(
            vm,
            self._mac(vm, recorded, others, claims),
            self._address(vm, recorded, others, book.resting),
            self._port(vm, recorded, others, claims, move=move_port),
        )

    def _mac(
        self,
        vm: str,
        recorded: Allocation | None,
        others: Mapping[str, Allocation],
        claims: Mapping[str, str],
    ) -> str:
        taken = {got.mac: name for name, got in others.items()}
        declared = self._farm.vms[vm].mac
        if declared:
            if declared in taken:
                raise self._taken(vm, f"MAC {declared}", taken[declared])
            return declared
        explicit = {v.mac for name, v in self._farm.vms.items() if name != vm and v.mac}
        host = self._farm.hosts[self._farm.host_of(vm)]
        prefix = "00:16:3e" if host.driver in ("xen", "xenapi") else "52:54:00"
        if recorded and recorded.mac.startswith(prefix) and recorded.mac not in explicit:
            return recorded.mac
        mine = f"{self._farm.farm}/{vm}"
        attempt = 0
        while True:
            digest = hashlib.sha256(f"{mine}/{attempt}".encode()).digest()
            mac = f"{prefix}:{digest[0]:02x}:{digest[1]:02x}:{digest[2]:02x}"
            if mac not in taken and mac not in explicit and claims.get(mac, mine) == mine:
                return mac
            attempt += 1

    def _address(
        self,
        vm: str,
        recorded: Allocation | None,
        others: Mapping[str, Allocation],
        resting: Mapping[IPv4Address, datetime],
    ) -> IPv4Address | None:
        taken = {got.address: name for name, got in others.items() if got.address}
        declared = self._farm.vms[vm].address
        if declared:
            if declared in taken:
                raise self._taken(vm, f"address {declared}", taken[declared])
            return declared
        network = self._farm.network
        if network.subnet is None or network.mode == "user":
            return None
        closed = {v.address for name, v in self._farm.vms.items() if name != vm and v.address}
        closed |= {a for a in (network.gateway, *network.nameservers) if a}
        closed |= {network.subnet.network_address, network.subnet.broadcast_address}
        ranges = [_range(text) for text in network.reserved]

        def open_(address: IPv4Address) -> bool:
            return address not in closed and not any(a <= address <= b for a, b in ranges)

        kept = recorded.address if recorded else None
        if kept and kept in network.subnet and kept not in taken and open_(kept):
            return kept
        now = datetime.now(UTC)
        for address in network.subnet.hosts():
            if open_(address) and address not in taken and resting.get(address, now) <= now:
                return address
        asleep = sum(1 for until in resting.values() if until > now)
        raise NotFound(
            f"{self._name}: no address is left for {vm} in {network.subnet}: {len(taken)} given out, "
            f"{asleep} resting for up to {HOLD.total_seconds() / 3600:g} h after a destroy",
            remedy=f"widen 'subnet' or narrow 'reserved', or take resting ones out of {self.lock_file}",
        )

    def _port(
        self,
        vm: str,
        recorded: Allocation | None,
        others: Mapping[str, Allocation],
        claims: Mapping[str, str],
        *,
        move: bool,
    ) -> int:
        declared = self._farm.vms[vm].ssh_port
        host = self._farm.hosts[self._farm.host_of(vm)]
        if self._farm.network.mode != "user" or host.driver == "ssh":
            return declared or 22
        mine = f"{self._farm.farm}/{vm}"
        taken = {got.ssh_port: name for name, got in others.items()}
        if declared:
            owner = claims.get(str(declared), mine)
            if declared in taken or owner != mine:
                raise self._taken(vm, f"ssh port {declared}", taken.get(declared, owner))
            return declared
        explicit = {v.ssh_port for name, v in self._farm.vms.items() if name != vm and v.ssh_port}
        explicit |= {v.nat_port for v in self._farm.vms.values() if v.nat_port}
        if recorded and not move and recorded.ssh_port in PORTS and recorded.ssh_port not in explicit:
            return recorded.ssh_port
        # A lost lock file must not move a running VM's port: the host's claims still know it.
        known = sorted(int(key) for key, owner in claims.items() if owner == mine and key.isdigit())
        if known and not move and known[0] not in taken and known[0] not in explicit:
            return known[0]
        seed = f"{state_dir()}/{mine}".encode()
        first = int.from_bytes(hashlib.sha256(seed).digest()[:4]) % len(PORTS)
        for offset in range(len(PORTS)):
            port = PORTS[(first + offset) % len(PORTS)]
            if port in taken or port in explicit or str(port) in claims:
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
        """The host's claims first, then the lock file's directory: the file itself is replaced, so a
        lock on it would be lost, and this leaves no file of its own beside the admin's."""
        make_directory(self._claims.parent, mode=0o711)
        make_directory(self.lock_file.parent, mode=0o711)
        with contextlib.ExitStack() as stack:
            for directory in dict.fromkeys((self._claims.parent, self.lock_file.parent)):
                try:
                    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError as error:
                    raise file_error(error, directory, "open") from error
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _read(self) -> _Book:
        data = _load(self.lock_file)
        try:
            vms = {
                vm: Allocation(
                    vm, entry["mac"], _maybe_address(entry["address"]), int(entry["ssh_port"])
                )
                for vm, entry in data.get("vms", {}).items()
            }
            resting = {
                IPv4Address(address): datetime.fromisoformat(until)
                for address, until in data.get("resting", {}).items()
            }
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _unreadable(self.lock_file, f"{type(error).__name__} {error}") from error
        return _Book(vms, resting)

    def _write(self, book: _Book) -> None:
        now = datetime.now(UTC)
        data = {
            "about": _ABOUT,
            "farm": self._farm.farm,
            "vms": {
                vm: {"mac": a.mac, "address": a.address and str(a.address), "ssh_port": a.ssh_port}
                for vm, a in sorted(book.vms.items())
            },
            "resting": {
                str(a): until.isoformat(timespec="seconds")
                for a, until in sorted(book.resting.items())
                if until > now
            },
        }
        write_atomic(self.lock_file, (json.dumps(data, indent=2) + "\n").encode())

    def _read_claims(self) -> dict[str, str]:
        claims = _load(self._claims)
        farms = self._claims.parent / "farms"
        kept: dict[str, str] = {}
        for key, owner in claims.items():
            farm = str(owner).split("/")[0]  # of a farm whose state was removed by hand: void
            if farm == self._farm.farm or (farms / farm).exists():
                kept[str(key)] = str(owner)
        return kept

    def _claim(self, got: Allocation, claims: dict[str, str]) -> None:
        mine = f"{self._farm.farm}/{got.vm}"
        wanted = {got.mac}
        if got.ssh_port in PORTS or self._farm.network.mode == "user":
            wanted.add(str(got.ssh_port))
        new = {key: owner for key, owner in claims.items() if owner != mine}
        new |= dict.fromkeys(sorted(wanted), mine)
        if new != claims:
            self._write_claims(new)

    def _write_claims(self, claims: Mapping[str, str]) -> None:
        if not claims:
            self._claims.unlink(missing_ok=True)
            return
        text = json.dumps(dict(sorted(claims.items())), indent=1) + "\n"
        write_atomic(self._claims, text.encode())


def lock_file_of(farm: Farm, paths: FarmPaths) -> Path:
    """Next to the farm file; in the state directory for those inside the toolkit's own tree, where
    nothing is ever written."""
    import inventory

    name = f"{farm.path.name or 'farm.yaml'}.lock"
    toolkit = Path(inventory.__file__).resolve().parent.parent
    if not farm.path.name or farm.path.resolve().is_relative_to(toolkit):
        return paths.root / name
    return farm.path.with_name(name)


def port_free(port: int) -> bool:
    """Whether a listener could be put on the host's loopback now. SO_REUSEADDR as QEMU does it:
    connections that ended a moment ago are no obstacle (socket(7))."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _range(text: str) -> tuple[IPv4Address, IPv4Address]:
    first, _, last = text.partition("-")
    low = IPv4Address(first.strip())
    return low, IPv4Address(last.strip()) if last else low


def _maybe_address(text: str | None) -> IPv4Address | None:
    return IPv4Address(text) if text else None


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise file_error(error, path, "read") from error
    if not text.strip():
        return {}
    try:
        data = json.loads(text)
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(data, dict):
        raise _unreadable(path, "not an object")
    return data


def _unreadable(path: Path, why: str) -> WrongState:
    return WrongState(
        f"{path} is not readable as farmhand's record of what was given out: {why}",
        remedy="put it back from version control, or mend it; each VM's entry is one short block",
    )
