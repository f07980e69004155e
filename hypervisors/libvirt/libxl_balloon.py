"""Ballooning a Xen guest: ask, then wait until Xen itself counts the pages.

``setMemory`` writes the target for the guest's driver (memory/target in xenstore) and returns at once.
What counts is ``memoryStats``' ``actual``: the pages that Xen has given to the domain, so it follows
what the driver in the guest really gave back or took.

Two maxima. The definition's is what we or an admin last set. A guest can't grow over the one that it was
booted with all the same (memory/static-max in xenstore): its kernel sized itself for that, and
stays there without a word.

The floor. Xen knows nothing of what a guest uses. A guest that tells its free memory, as XenServer's
guest agents do (data/meminfo_free, in KiB), keeps what it uses and a reserve, as under KVM. Of others we
know the maximum only, and keep to what the balloon driver of Xen's own kernels took for the least that a
kernel of that size needs (minimum_target() in drivers/xen/balloon.c of linux-2.6.18-xen).

What a guest told before the balloon moved is not true after it: taken for now, it looks after a squeeze
as if what was taken were free still, and the next squeeze would starve it. So a balloon is done when
the guest has told anew.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from host.run import Runner, which
from hypervisors.api import MemoryUse, StepFn
from hypervisors.libvirt.balloon import above_maximum, floor, follow, near, stopped, stuck
from inventory.errors import UsageError
from inventory.sizes import format_size

if TYPE_CHECKING:
    import libvirt

_MIB = 2**20
_FREE = "data/meminfo_free"
# Seconds for a guest to tell anew. XenServer's agents do once a minute, and are waited for where it had
# to give: after a growth an old word is on the safe side.
_GAVE_PATIENCE, _GOT_PATIENCE = 65.0, 5.0
_ASK = 0.5  # each time a process
# Up to so many MiB of maximum: a base in MiB, and the part of the maximum that comes on top.
_LEAST = ((128, 8, 2), (512, 40, 4), (2048, 104, 8), (None, 296, 32))


@dataclass(frozen=True, slots=True)
class Xenstore:
    """What xenstore has of a running domain. It can be read in dom0 only; elsewhere there is nothing."""

    runner: Runner
    domain: int

    def read(self, key: str) -> int | None:
        """The number at a key below the domain's own path; None if there is none, or no xenstore."""
        if which("xenstore-read") is None:
            return None
        path = f"/local/domain/{self.domain}/{key}"
        text = self.runner.read("xenstore-read", path, ok=(0, 1), timeout=30).stdout.strip()
        return int(text) if text.isascii() and text.isdigit() else None


def least(maximum: int) -> int:
    """Bytes that a kernel with that maximum keeps, whatever it uses."""
    mebibytes = maximum // _MIB
    base, part = next((b, p) for limit, b, p in _LEAST if limit is None or mebibytes < limit)
    return (base + mebibytes // part) * _MIB


def memory(domain: libvirt.virDomain, name: str, store: Xenstore) -> MemoryUse:
    """See ``Hypervisor.memory``."""
    if not domain.isActive():
        raise stopped(name)
    actual, maximum = _actual(domain), domain.maxMemory() * 1024
    booted = store.read("memory/static-max")
    top = maximum if booted is None else min(maximum, booted * 1024)
    return MemoryUse(actual=actual, maximum=top, least=_floor(store, actual, maximum)[0])


def _floor(store: Xenstore, actual: int, maximum: int) -> tuple[int, bool]:
    """Bytes below which this guest is not squeezed, and whether it told so itself."""
    keep, free = least(maximum), store.read(_FREE)
    if free is None:
        return keep, False
    return floor({"actual": actual // 1024, "usable": free}, maximum) or keep, True


def set_memory(
    domain: libvirt.virDomain, name: str, target: int, timeout: float, step: StepFn, store: Xenstore
) -> int:
    """See ``Hypervisor.balloon``. On TimedOut the target becomes what was reached."""
    import libvirt

    if not domain.isActive():
        raise stopped(name)
    maximum = domain.maxMemory() * 1024
    if target > maximum:
        raise above_maximum(name, target, maximum)
    booted = store.read("memory/static-max")
    if booted is not None and target > booted * 1024:
        raise UsageError(
            f"{name} can't have {format_size(target)}: the maximum it was booted with is "
            f"{format_size(booted * 1024)}",
            remedy="stop it and start it: then its new maximum holds",
        )
    actual = _actual(domain)
    keep, told = _floor(store, actual, maximum)
    if target < actual and target < keep:
        why = "with what it uses now it needs" if told else "it should keep"
        raise UsageError(
            f"{name} can't go down to {format_size(target)}: {why} "
            f"{format_size(-(-keep // _MIB) * _MIB)}",
            remedy="ask for more, or end programs in the guest first",
        )
    step(f"set the memory of {name} to {format_size(target)}")
    domain.setMemoryFlags(target // 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    reached = follow(lambda: _actual(domain), target, timeout)
    if not near(reached, target):
        domain.setMemoryFlags(reached // 1024, libvirt.VIR_DOMAIN_AFFECT_LIVE)
    if told and not near(reached, actual):
        _wait_until_told(store, _GAVE_PATIENCE if reached < actual else _GOT_PATIENCE)
    if not near(reached, target):
        raise stuck(name, reached, target, timeout)
    return reached


def _wait_until_told(store: Xenstore, patience: float) -> None:
    before, limit = store.read(_FREE), time.monotonic() + patience
    while store.read(_FREE) == before and time.monotonic() < limit:
        time.sleep(_ASK)


def _actual(domain: libvirt.virDomain) -> int:
    found: int = domain.memoryStats()["actual"] * 1024
    return found
