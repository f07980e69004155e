"""What a dhcpd.conf says of the network that its hosts are in, as far as a farm file says it too."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network

from inventory.errors import some
from provision.network.dhcpd_source import DhcpdStatement, Scope
from provision.network.sources import Left

_LEASE_TIMES = range(60, 31536000 + 1)  # of network.lease_time

_MOST_NAMESERVERS = 63  # as an option's 255 bytes hold


class ImportedNetwork:
    """``subnet``: that of most of the addresses; ``guessed``: no statement says it. ``values``: keys of
    ``network``, and how a farm file writes them. ``said``: the statements that they are from, by id().
    ``hosts``: their blocks and first addresses; ``find``: the addresses of a word, maybe a name."""

    def __init__(
        self,
        statements: Sequence[tuple[DhcpdStatement, Scope]],
        hosts: Sequence[tuple[Scope, IPv4Address]],
        find: Callable[[str], Sequence[IPv4Address]],
    ) -> None:
        self.left: list[Left] = []
        self.said: set[int] = set()
        self.values: dict[str, str] = {}
        self.gateway: IPv4Address | None = None
        self._find = find
        self._ranges: list[tuple[IPv4Address, IPv4Address]] = []
        declared = {id(s): subnet for s, _ in statements if (subnet := _subnet(s))}
        self.subnet = _most(declared.values(), [address for _, address in hosts])
        self.guessed = self.subnet not in declared.values()
        ours = {place for place, subnet in declared.items() if subnet == self.subnet}
        self.said |= ours
        # The blocks that the subnet is in, and its hosts.
        around = {
            id(outer)
            for blocks in (
                *((*scope, s) for s, scope in statements if id(s) in ours),
                *(scope for scope, address in hosts if address in self.subnet),
            )
            for outer in blocks
            if id(outer) in ours or id(outer) not in declared
        }
        self._take(statements, ours, around)

    def _take(
        self,
        statements: Sequence[tuple[DhcpdStatement, Scope]],
        ours: set[int],
        around: set[int],
    ) -> None:
        """The innermost statement of each key; a range wherever it is."""
        ranks: dict[str, tuple[int, DhcpdStatement, str]] = {}
        for statement, scope in statements:
            if statement.kind == "range" and self._take_range(statement):
                self.said.add(id(statement))
            if statement.inner is not None or not all(id(outer) in around for outer in scope):
                continue
            for key, words, read in (
                ("gateway", ("option", "routers"), self._routers),
                ("nameservers", ("option", "domain-name-servers"), self._nameservers),
                ("lease_time", ("default-lease-time",), _lease_time),
            ):
                if statement.words[: len(words)] == words and (value := read(statement)):
                    rank = len(scope) + 100 * any(id(outer) in ours for outer in scope)
                    if key not in ranks or rank >= ranks[key][0]:
                        ranks[key] = rank, statement, value
        for key, (_, statement, value) in ranks.items():
            self.values[key] = value
            self.said.add(id(statement))
        if "gateway" in self.values:
            self.gateway = IPv4Address(self.values["gateway"])
        for statement in (found for _, found, _ in ranks.values()):
            self._leave_parts(statement)

    def _take_range(self, statement: DhcpdStatement) -> bool:
        words = [word for word in statement.words[1:] if word != "dynamic-bootp"]
        try:
            first, last = IPv4Address(words[0]), IPv4Address(words[-1])
        except (ValueError, IndexError):
            return False
        if len(words) > 2 or first > last or first not in self.subnet or last not in self.subnet:
            return False
        self._ranges.append((first, last))
        return len(words) == len(statement.words) - 1

    def _routers(self, statement: DhcpdStatement) -> str:
        found = self._find(statement.words[2]) if len(statement.words) > 2 else ()
        subnet = self.subnet
        ends = subnet.network_address, subnet.broadcast_address
        fit = [str(address) for address in found if address in subnet and address not in ends]
        return fit[0] if fit else ""

    def _nameservers(self, statement: DhcpdStatement) -> str:
        words = statement.words[2:]
        if len(words) > _MOST_NAMESERVERS:
            return ""
        found = [str(address) for word in words for address in self._find(word)]
        return f"[{', '.join(dict.fromkeys(found))}]" if found else ""

    def _leave_parts(self, statement: DhcpdStatement) -> None:
        """What the value leaves out of a statement that it is from."""
        words = statement.words[2:]
        if statement.words[1:2] == ("routers",) and len(words) > 1:
            self._leave(statement, f"a farm has one gateway, {self.gateway}")
        elif unknown := [word for word in words if not self._find(word)]:
            self._leave(statement, f"the zone has no address for {some(unknown)}")

    def _leave(self, statement: DhcpdStatement, why: str) -> None:
        self.left.append(Left(statement.line, f"{statement.text}: {why}"))

    def pools(self, taken: Iterable[IPv4Address]) -> Iterator[str]:
        """The ranges without these addresses: dhcpd gives nobody else a host's address."""
        fixed = sorted(int(address) for address in taken)
        for first, end in merged((int(first), int(last)) for first, last in self._ranges):
            begin = first
            for address in fixed[bisect_left(fixed, first) : bisect_right(fixed, end)]:
                if begin < address:
                    yield span(begin, address - 1)
                begin = address + 1
            if begin <= end:
                yield span(begin, end)


def merged(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """In order, each number once."""
    open_: tuple[int, int] | None = None
    for first, last in sorted(spans):
        if open_ and first <= open_[1] + 1:
            open_ = open_[0], max(last, open_[1])
            continue
        if open_:
            yield open_
        open_ = first, last
    if open_:
        yield open_


def span(first: int, last: int) -> str:
    """Addresses as `reserved` and `pool` have them."""
    return f"{IPv4Address(first)}" if first == last else f"{IPv4Address(first)}-{IPv4Address(last)}"


def _most(declared: Iterable[IPv4Network], addresses: Sequence[IPv4Address]) -> IPv4Network:
    """The subnet that most of the addresses are in; where none is declared, the /24 around."""
    known = set(declared)
    lengths = sorted({subnet.prefixlen for subnet in known}, reverse=True)
    found: Counter[IPv4Network] = Counter()
    for address in addresses:
        around = (IPv4Network((address, length), strict=False) for length in lengths)
        guess = IPv4Network((address, 24), strict=False)
        found[next((subnet for subnet in around if subnet in known), guess)] += 1
    return found.most_common(1)[0][0]


def _subnet(statement: DhcpdStatement) -> IPv4Network | None:
    """None for what is none, or has no room for a farm's machines."""
    match statement.words:
        case ("subnet", address, "netmask", mask) if statement.inner is not None:
            try:
                subnet = IPv4Network(f"{address}/{mask}")
            except ValueError:
                return None
            return subnet if subnet.prefixlen <= 30 else None
    return None


def _lease_time(statement: DhcpdStatement) -> str:
    value = statement.words[1] if len(statement.words) == 2 else ""
    fits = re.fullmatch("[0-9]{1,9}", value) and int(value) in _LEASE_TIMES
    return str(int(value)) if fits else ""
