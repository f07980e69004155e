"""The second farm's addresses, in the first one's subnet or one of its own; its MACs and ports."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import count
from pathlib import Path

from inventory.base import parse_range
from inventory.errors import Conflict, FarmhandError, UsageError
from inventory.model import Farm
from inventory.places import Path as Place
from provision.network.service import services
from provision.twins.asked import OTHERS, TwinAsked
from provision.twins.neighbours import TakenHere, addresses_of
from provision.twins.own_values import OwnKind, Stretch, common, left_of, pool_of

_STEP = 100  # between a port and its twin
_SUBNETS = 256  # that are looked at for a free one


class TwinAddresses:
    """Chosen when it is made. ``others``: the other farms that are known here. ``notes``: what could not
    be looked at. Errors: UsageError (what was asked can't be), Conflict (it is taken)."""

    def __init__(self, first: Farm, others: Sequence[Farm], asked: TwinAsked, taken: TakenHere) -> None:
        self._first, self._others, self._asked, self._taken = first, others, asked, taken
        self._net = first.network
        self.notes: list[str] = []
        self._pooled = self._net.subnet is not None and self._net.mode != "user"
        self.makes_network = any(service.MAKES_NETWORK for service in services(first))
        self._check_asked()
        self.subnet = asked.subnet or (self._free_subnet() if self.makes_network else None)
        self.subnet6 = self._free_subnet6() if self.subnet else None
        self._range = self._own_range()
        self._given = {one.address for one in asked.endpoints.values()}
        self._free = self._free_ones()

    # ---- The network

    def network(self) -> Iterator[tuple[Place, str]]:
        """What the section says, in a subnet of its own."""
        net = self._net
        if self.subnet is None:
            return
        yield ("network", "subnet"), str(self.subnet)
        if net.gateway:
            yield ("network", "gateway"), str(self._moved(net.gateway))
        for number, server in enumerate(net.nameservers):
            yield ("network", "nameservers", number), str(self._moved(server))
        for key in ("reserved", "pool"):
            for number, entry in enumerate(getattr(net, key)):
                low, high = parse_range(entry)
                yield ("network", key, number), stretch(self._moved(low), self._moved(high))
        if self.subnet6:
            yield ("network", "subnet6"), str(self.subnet6)
        if net.gateway6:
            yield ("network", "gateway6"), str(self._moved6(net.gateway6))

    def reserved(self) -> list[str]:
        """What of the first farm's subnet isn't the twin's."""
        if self._range is None:
            return []
        its = [self._range, *((int(one), int(one)) for one in self._given)]
        closed = (run for part in pool_of(self._first) for run in left_of(part, its))
        return [stretch(IPv4Address(low), IPv4Address(high)) for low, high in closed]

    def _check_asked(self) -> None:
        new, old, asked = self._asked.subnet, self._net.subnet, self._asked.range
        if asked and (new or not self._pooled):
            words = "--addresses is for a farm in the first one's subnet"
            raise UsageError(words, remedy="leave it out")
        if asked and old and not (asked[0] in old and asked[1] in old):
            raise UsageError(f"--addresses: {stretch(*asked)} is outside of {old}", remedy="give others")
        if self._asked.endpoints and self._net.mode == "user":
            for vm in self._asked.endpoints:
                if vm in self._first.vms and self._first.driver_of(vm).virtual:
                    words = f"--address: {vm} has none, in mode user"
                    raise UsageError(words, remedy="leave it out")
        if new is None:
            return
        if old is None or not self._pooled:
            raise UsageError("--subnet: the first farm has no subnet", remedy="leave it out")
        if new.prefixlen > old.prefixlen:
            raise UsageError(f"--subnet: {new} is smaller than {old}", remedy=f"one of /{old.prefixlen}")
        for farm in (self._first, *self._others):
            known = farm.network.subnet
            if known is not None and known.overlaps(new):
                words = f"--subnet: {new} overlaps {known}, which farm {farm.farm} has"
                raise Conflict(words, remedy="--subnet ANOTHER")

    def _free_subnet(self) -> IPv4Network | None:
        old = self._net.subnet
        if old is None:
            return None
        known = [farm.network.subnet for farm in self._others if farm.network.subnet] + _routes()
        begin, size = int(old.network_address), old.num_addresses
        for number in range(1, _SUBNETS):
            if begin + (number + 1) * size > 2**32:
                break
            new = IPv4Network((begin + number * size, old.prefixlen))
            if new.is_private and not any(new.overlaps(one) for one in known):
                return new
        raise Conflict(f"no subnet after {old} is free", remedy="--subnet ADDRESS/LENGTH")

    def _free_subnet6(self) -> IPv6Network | None:
        old = self._net.subnet6
        if old is None:
            return None
        known = [farm.network.subnet6 for farm in self._others if farm.network.subnet6]
        for number in range(1, _SUBNETS):
            begin = (int(old.network_address) + number * old.num_addresses) % 2**128
            new = IPv6Network((begin, old.prefixlen))
            if not any(new.overlaps(one) for one in known):
                return new
        raise Conflict(f"no subnet after {old} is free", remedy="take 'subnet6' out, and write it later")

    def _own_range(self) -> Stretch | None:
        """What is to be the twin's of the first farm's subnet; None: it has another one, or none."""
        subnet, wanted = self._net.subnet, self._virtual()
        if self.subnet or subnet is None or not self._pooled or not wanted:
            return None
        taken = self._taken_of(subnet)
        if self._asked.range:
            low, high = map(int, self._asked.range)
            if found := sorted(common([(low, high)], taken)):
                words = f"--addresses: {IPv4Address(found[0][0])} is another farm's"
                raise Conflict(words, remedy="--addresses FIRST-LAST")
            return low, high
        free = [run for part in pool_of(self._first) for run in left_of(part, taken)]
        low, high = max(free, key=lambda run: run[1] - run[0], default=(1, 0))
        room = high - low + 1
        if room < wanted:
            raise Conflict(
                f"{subnet} has no {wanted} addresses in a row left for another farm",
                remedy="--subnet ADDRESS/LENGTH, for one of its own; or --addresses FIRST-LAST",
            )
        return high - max(wanted, room // 2) + 1, high  # the other half is left for others

    def _free_ones(self) -> Iterator[IPv4Address]:
        low, high = self._range or (1, 0)
        for found in map(IPv4Address, range(low, high + 1)):
            if found not in self._given and not self._taken.holder(OwnKind.ADDRESS, str(found)):
                yield found

    def _taken_of(self, subnet: IPv4Network) -> list[Stretch]:
        ours = addresses_of(self._first)
        taken = [(one, one) for one in ours]
        for mate in self._others:
            if not overlap(mate, subnet):
                continue
            try:
                taken += ((one, one) for one in addresses_of(mate))
            except FarmhandError as error:
                self.notes.append(f"not looked at: addresses of farm {mate.farm}: {error.message}")
            # what it may give out is its own, if it keeps off the first farm's
            if not any(low <= one <= high for low, high in pool_of(mate) for one in ours):
                taken += pool_of(mate)
        return taken

    def _virtual(self) -> int:
        return sum(self._first.driver_of(vm).virtual for vm in self._first.vms)

    def _moved(self, address: IPv4Address) -> IPv4Address:
        """The same host number in the new subnet; others are as they were."""
        old = self._net.subnet
        if old is None or self.subnet is None or address not in old:
            return address
        return self.subnet.network_address + (int(address) - int(old.network_address))

    def _moved6(self, address: IPv6Address) -> IPv6Address:
        assert self._net.subnet6 and self.subnet6
        return self.subnet6.network_address + (int(address) - int(self._net.subnet6.network_address))

    # ---- A VM's

    def address(self, name: str) -> IPv4Address | None:
        """In place of the declared one; None: none is declared."""
        old, virtual = self._first.vms[name].address, self._first.driver_of(name).virtual
        if endpoint := self._asked.endpoints.get(name):
            return self._take(endpoint.address) if virtual else endpoint.address
        if old is None or not self._pooled:
            return old
        if self._range is None:
            return self._moved(old)
        if (found := next(self._free, None)) is None:
            raise Conflict("--addresses: there are not enough for the VMs", remedy="give more of them")
        return self._take(found)

    def address6(self, old: IPv6Address) -> IPv6Address:
        """In the same subnet, one that follows from no IPv4 address."""
        if self.subnet6:
            return self._moved6(old)
        net = self._net
        assert net.subnet6 and net.subnet
        for number in range(net.subnet.num_addresses, net.subnet6.num_addresses):
            found = net.subnet6.network_address + number
            if not self._taken.holder(OwnKind.ADDRESS, str(found)):
                self._taken.add(OwnKind.ADDRESS, str(found), self._asked.name)
                return found
        raise Conflict(f"{net.subnet6} has no address left", remedy="--subnet, for one of its own")

    def mac(self, vm: str, old: str) -> str:
        """Of the same maker."""
        for attempt in count():
            seed = hashlib.sha256(f"{self._asked.name}/{vm}/{attempt}".encode()).digest()
            mac = f"{old[:8]}:{seed[0]:02x}:{seed[1]:02x}:{seed[2]:02x}"
            if not self._taken.mac(mac):
                self._taken.add(OwnKind.MAC, mac, self._asked.name)
                return mac
        raise AssertionError

    def port(self, port: int) -> str:
        """A port of this machine that nobody has."""
        if self._asked.shift is not None:
            found = port + self._asked.shift
            if not 0 < found < 65536 or self._taken.port(found):
                raise Conflict(f"port {found}, for {port}, is taken", remedy="--port-shift ANOTHER")
        else:
            candidates = (*range(port + _STEP, 65536, _STEP), *range(1024, 65536))
            found = next(one for one in candidates if not self._taken.port(one))
        self._taken.add(OwnKind.PORT, str(found), self._asked.name)
        return str(found)

    def _take(self, address: IPv4Address) -> IPv4Address:
        if holder := self._taken.holder(OwnKind.ADDRESS, str(address)):
            raise Conflict(f"address {address} is farm {holder}'s", remedy=OTHERS)
        self._taken.add(OwnKind.ADDRESS, str(address), self._asked.name)
        return address


def stretch(low: IPv4Address, high: IPv4Address) -> str:
    """As ``reserved`` has it."""
    return f"{low}-{high}" if low != high else str(low)


def overlap(farm: Farm, subnet: IPv4Network) -> bool:
    """Whether the farm has addresses in that subnet, or may have."""
    its = farm.network.subnet
    return its is not None and farm.network.mode != "user" and its.overlaps(subnet)


def _routes() -> list[IPv4Network]:
    """The subnets that this machine's kernel has routes to, but for the default ones (proc(5))."""
    found = []
    for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]:
        fields = line.split()
        address, mask = (int.from_bytes(bytes.fromhex(fields[at]), sys.byteorder) for at in (1, 7))
        if mask:
            found.append(IPv4Network((address, mask.bit_count())))
    return found
