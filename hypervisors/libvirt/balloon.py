"""Ballooning through libvirt: ask, then wait for what the guest itself says it reached.

``setMemory`` returns at once, and also when nobody in the guest listens. What counts is in
``memoryStats``, kept fresh by the definition's ``<stats period='1'/>``: ``actual`` is the balloon's
size as the guest's driver reported it, ``last_update`` is 0 until a driver has answered, then when it
last did. One that is gone (``modprobe -r virtio_balloon``) leaves its last numbers standing, which say
nothing any more: old ones are no answer.

The floor. A guest that is squeezed under what it uses starts swapping, then killing, then panics. What
it needs now is what it has (``actual``) less what it could give without swapping (``usable``, the
guest's MemAvailable; ``unused``, its MemFree, where an old guest doesn't tell). On top comes a
reserve of a sixteenth of its maximum, at least 32 MiB, for what is asked for between two looks.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from hypervisors.api import MemoryUse, StepFn
from hypervisors.libvirt.domain_xml import read_domain
from inventory.errors import TimedOut, Unsupported, UsageError, WrongState
from inventory.sizes import format_duration, format_size

if TYPE_CHECKING:
    import libvirt

_MIB = 2**20
_RESERVE = 32 * _MIB
_CLOSE_ENOUGH = _MIB  # the balloon works in pages; libvirt rounds to KiB
_DRIVER_PATIENCE = 5.0  # seconds for a driver to answer: it is asked every second
_LOOK = 0.1
_EVENT_PATIENCE = 1.5
_STATISTICS_PATIENCE = 5.0
_STALE = 20.0  # seconds: told every second, on a busy host later
_BOOTING = 120.0  # seconds that a machine runs before it is worth a note that its driver never answered


def floor(stats: dict[str, int], maximum: int) -> int | None:
    """Bytes below which the guest is not squeezed, by its own statistics; None while it hasn't told
    enough."""
    spare = stats.get("usable", stats.get("unused"))
    if spare is None:
        return None
    need = (stats["actual"] - spare) * 1024
    return need + max(_RESERVE, maximum // 16)


def memory(domain: libvirt.virDomain, name: str) -> MemoryUse:
    """See ``Hypervisor.memory``. Unsupported if no driver answers in the guest, be it not yet or no
    more."""
    if not domain.isActive():
        raise stopped(name)
    maximum, stats = domain.maxMemory() * 1024, _listening(domain, name, 0)
    return MemoryUse(actual=stats["actual"] * 1024, maximum=maximum, least=floor(stats, maximum))


def stopped(name: str) -> WrongState:
    return WrongState(f"{name} is stopped: only a running guest's memory can change", remedy="start it")


def above_maximum(name: str, target: int, maximum: int) -> UsageError:
    return UsageError(
        f"{name} can't have {format_size(target)}: its maximum is {format_size(maximum)}",
        remedy="raise 'memory' in the farm file; it takes effect when the VM is stopped and started",
    )


def set_memory(domain: libvirt.virDomain, name: str, target: int, timeout: float, step: StepFn) -> int:
    """See ``Hypervisor.balloon``. On TimedOut the target becomes what was reached, so that the guest is
    pressed no further."""
    import libvirt

    if not domain.isActive():
        raise stopped(name)
    maximum = domain.maxMemory() * 1024
    if target > maximum:
        raise above_maximum(name, target, maximum)
    stats = _listening(domain, name, min(timeout, _DRIVER_PATIENCE))
    least = floor(stats, maximum)
    if target < stats["actual"] * 1024 and least is not None and target < least:
        raise UsageError(
            f"{name} can't go down to {format_size(target)}: with what it uses now it needs "
            f"{format_size(-(-least // _MIB) * _MIB)}",
            remedy="ask for more, or end programs in the guest first",
        )
    step(f"set the memory of {name} to {format_size(target)}")
    domain.setMemoryFlags(target // 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    reached = follow(lambda: domain.memoryStats()["actual"] * 1024, target, timeout)
    if near(reached, target):
        _wait_for_libvirt(domain, reached)
        _wait_for_statistics(domain, time.time())
        return reached
    domain.setMemoryFlags(reached // 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    _wait_for_libvirt(domain, reached)
    if silence := _silence(domain.memoryStats()):
        raise _deaf(name, silence)
    raise stuck(name, reached, target, timeout)


def notes(connection: libvirt.virConnect) -> dict[str, str]:
    """See ``WatchedMachines.notes``: running machines whose guests don't tell what memory they need. One
    look at all of them, which waits for none that is busy."""
    import libvirt

    found: dict[str, str] = {}
    options = (
        libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_RUNNING
        | libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT
    )
    for domain, stats in connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_BALLOON, options):
        if "balloon.last-update" not in stats:  # busy, or without a balloon
            continue
        silence = _silence({"last_update": stats["balloon.last-update"]})
        if silence is None:
            continue
        if silence == math.inf:
            with contextlib.suppress(libvirt.libvirtError):  # it ended meanwhile
                started = read_domain(domain.XMLDesc(0)).started
                if started is None or (datetime.now(UTC) - started).total_seconds() < _BOOTING:
                    continue
        found[domain.name()] = _untold(silence)
    return found


def near(reached: int, target: int) -> bool:
    return abs(reached - target) < _CLOSE_ENOUGH


class Approach:
    """The patience with a guest on its way to ``target`` bytes: ``patience`` seconds since it last came
    nearer. A big one that gives a gigabyte on a busy host takes its time."""

    def __init__(self, target: int, patience: float) -> None:
        self._target, self._patience = target, patience
        self._nearest: int | None = None
        self._limit = time.monotonic() + patience

    def saw(self, reached: int) -> None:
        """Tell how many bytes the guest has now."""
        away = abs(reached - self._target)
        if self._nearest is None or away <= self._nearest - _CLOSE_ENOUGH:
            self._nearest, self._limit = away, time.monotonic() + self._patience

    def left(self) -> float:
        """Seconds that are left; at 0 or less the guest is given up."""
        return self._limit - time.monotonic()


def follow(actual: Callable[[], int], target: int, patience: float) -> int:
    """Wait until the guest is near ``target`` bytes, or is given up (``Approach``). Returns the bytes
    that it has then."""
    approach = Approach(target, patience)
    while not near(reached := actual(), target):
        approach.saw(reached)
        if approach.left() <= 0:
            break
        time.sleep(_LOOK)
    return reached


def stuck(name: str, reached: int, target: int, patience: float) -> TimedOut:
    return TimedOut(
        f"{name} reached {format_size(reached)} of {format_size(target)}, and no more in {patience:g} s",
        remedy="the guest gives no more now: end programs in it, or ask for less",
    )


def _listening(domain: libvirt.virDomain, name: str, patience: float) -> dict[str, int]:
    """The statistics that the guest's driver told just now. A driver that never told any gets
    ``patience`` seconds, one that fell silent none: Unsupported."""
    limit = time.monotonic() + patience
    while True:
        stats: dict[str, int] = domain.memoryStats()
        silence = _silence(stats)
        if silence is None:
            return stats
        if silence < math.inf or time.monotonic() >= limit:
            raise _deaf(name, silence)
        time.sleep(_LOOK)


def _silence(stats: Mapping[str, int]) -> float | None:
    """Seconds since the guest's driver last told anything, by this host's clock, as ``last_update`` is;
    infinite if it never did. None: it tells."""
    told = stats.get("last_update", 0)
    if told == 0:
        return math.inf
    silence = time.time() - told
    return silence if silence > _STALE else None


def _untold(silence: float) -> str:
    """The silence in words."""
    if silence == math.inf:
        return "its guest has not told yet what memory it needs: no balloon driver, or it still boots"
    ago = format_duration(silence)
    return f"its guest has not told for {ago} what memory it needs: no balloon driver answers any more"


def _deaf(name: str, silence: float) -> Unsupported:
    if silence == math.inf:
        return Unsupported(
            f"{name}: no balloon driver answers in the guest",
            remedy="load virtio_balloon in it (modprobe virtio_balloon), or wait for its boot",
        )
    return Unsupported(
        f"{name}: {_untold(silence)}",
        remedy="load virtio_balloon in it (modprobe virtio_balloon); if it hangs, see its console",
    )


def _wait_for_libvirt(domain: libvirt.virDomain, reached: int) -> None:
    """Wait until libvirt knows of the change, so that ``find`` reports it: QEMU tells it in an event, at
    most one a second. ``find`` itself asks no guest's QEMU, and so never waits for one."""
    limit = time.monotonic() + _EVENT_PATIENCE
    while abs(domain.info()[2] * 1024 - reached) >= _CLOSE_ENOUGH and time.monotonic() < limit:
        time.sleep(_LOOK / 4)


def _wait_for_statistics(domain: libvirt.virDomain, since: float) -> None:
    """Wait for statistics that are newer than the balloon's move. They come once a second, later on a
    busy host; older ones look as if the guest used all that it was just given."""
    limit = time.monotonic() + _STATISTICS_PATIENCE
    while domain.memoryStats().get("last_update", 0) <= since and time.monotonic() < limit:
        time.sleep(_LOOK)
