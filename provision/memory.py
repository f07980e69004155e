"""A host's memory and the farm's VMs on it: who may have how much. This is calculation only:
``provision.memory_budget`` looks at what there is, and carries out what is decided here.

It follows xapi's squeezed (doc/content/squeezed of xapi-project/xen-api). Whoever needs memory gets what
is left. If that is too little, VMs that idle give what they have above their ``idle_memory``, but none
falls below what its guest needs. A VM in use gives nothing.

All sizes are bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from inventory.sizes import brief

_MIB = 2**20
SLACK = _MIB
"""A balloon that came so close has arrived: what one gives is counted as so much less."""
_NAMED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """One of the farm's VMs, as it is now."""

    vm: str
    on: bool
    now: int  # what counts: it has so much, or a command that was killed may be giving it so much
    maximum: int  # declared; while it runs, no more than it can be given without a stop
    idle: int | None = None  # declared; None: it keeps what it has
    least: int | None = None  # what its guest needs; None: nobody tells, so it gives nothing
    user: str = ""  # who uses it now
    fixed: str = ""  # why nobody can change its memory while it runs

    @property
    def gives(self) -> int:
        """What may be taken from it."""
        if not self.on or self.user or self.fixed or self.idle is None or self.least is None:
            return 0
        return max(0, self.now - max(self.idle, self.least)) // _MIB * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """``limit``: what the farm's VMs may have together, as declared; None: no limit. ``free``: what the
    machine itself has for more of them; None: only the hypervisor can say."""

    host: str
    limit: int | None
    free: int | None
    guests: tuple[Guest, ...]

    @property
    def in_use(self) -> int:
        return sum(guest.now for guest in self.guests)

    @property
    def left(self) -> int | None:
        """What is left for more; negative if they have too much already. None: there is no bound."""
        bounds = [] if self.limit is None else [self.limit - self.in_use]
        if self.free is not None:
            bounds.append(self.free)
        return min(bounds, default=None)

    def short_of(self, more: int) -> int:
        """How much is missing to have that; 0: nothing."""
        return 0 if self.left is None or more <= 0 else max(0, more - self.left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """What one VM may become. ``grow_to``: what it may have now if it alone asks (stopped: 0, or the
    maximum it would start with). ``target``: what ``balloon --all`` gives it."""

    guest: Guest
    grow_to: int
    target: int
    why: str  # why it may have no more, or won't be changed; "" where nothing is in the way


def squeeze(host: HostMemory, short: int, *, but: Collection[str] = ()) -> Mapping[str, int] | None:
    """Targets for VMs that idle, so that together they give ``short`` bytes: as few VMs as possible,
    none giving more than needed. None if they don't have that much. ``but``: VMs to leave alone."""
    targets: dict[str, int] = {}
    givers = [g for g in host.guests if g.vm not in but and g.gives > SLACK]
    for guest in sorted(givers, key=lambda g: -g.gives):
        if short <= 0:
            break
        taken = min(guest.gives, -(-(short + SLACK) // _MIB) * _MIB)
        targets[guest.vm] = guest.now - taken
        short -= taken - SLACK
    return targets if short <= 0 else None


def at_once(starting: Iterable[tuple[int, int]]) -> int:
    """The most that VMs take while they are started, each given as (what it starts with, what it falls
    to). One that doesn't fit yet waits until others have fallen. The order in which they come doesn't
    matter."""
    pairs = list(starting)
    return sum(low for _, low in pairs) + max((high - low for high, low in pairs), default=0)


def plan(host: HostMemory) -> tuple[Prospect, ...]:
    """Each VM's prospects, in the farm's order."""
    targets = _targets(host)
    return tuple(_prospect(host, guest, targets.get(guest.vm, guest.now)) for guest in host.guests)


def shared(host: HostMemory) -> str:
    """Who has how much, the largest first, in a few words."""
    having = sorted((g for g in host.guests if g.now), key=lambda g: -g.now)
    named = [f"{g.vm} has {brief(g.now)}{f' ({g.user})' if g.user else ''}" for g in having[:_NAMED]]
    if rest := having[_NAMED:]:
        named.append(f"{len(rest)} others have {brief(sum(g.now for g in rest))}")
    return ", ".join(named) or "no VM has any"


def _targets(host: HostMemory) -> Mapping[str, int]:
    """VMs that idle fall to their idle memory, or to what they need. Then the others come up to what
    they are declared with, in the farm's order, as far as the memory goes. A VM in use stays as it
    is."""
    targets: dict[str, int] = {}
    left = host.left
    for guest in host.guests:
        if guest.gives > SLACK:
            targets[guest.vm] = guest.now - guest.gives
            left = None if left is None else left + guest.gives - SLACK
    for guest in host.guests:
        wanted = guest.maximum if guest.idle is None else min(guest.idle, guest.maximum)
        if not guest.on or guest.user or guest.fixed or wanted - guest.now <= SLACK:
            continue
        more = wanted - guest.now if left is None else min(wanted - guest.now, left // _MIB * _MIB)
        if more > SLACK:
            targets[guest.vm] = guest.now + more
            left = None if left is None else left - more
    return targets


def _prospect(host: HostMemory, guest: Guest, target: int) -> Prospect:
    others = _givers(host.guests, guest)
    wanted = guest.maximum - guest.now
    short = host.short_of(wanted)
    most = guest.maximum if short <= others else max(guest.now, guest.maximum - short + others)
    if not guest.on:
        if short <= others:
            return Prospect(guest=guest, grow_to=guest.maximum, target=0, why="stopped")
        why = f"stopped; {brief(short - others)} are missing to start it"
        return Prospect(guest=guest, grow_to=0, target=0, why=why)
    if guest.fixed:
        return Prospect(guest=guest, grow_to=guest.now, target=guest.now, why=guest.fixed)
    most = max(guest.now, most // _MIB * _MIB)
    missing = f"{brief(guest.maximum - most)} are missing" if most < guest.maximum else ""
    why = "; ".join(filter(None, (guest.user, missing)))
    return Prospect(guest=guest, grow_to=most, target=target, why=why)


def _givers(guests: Sequence[Guest], but: Guest) -> int:
    """What the others would give, each less the inaccuracy of a balloon."""
    return sum(g.gives - SLACK for g in guests if g is not but and g.gives > SLACK)
