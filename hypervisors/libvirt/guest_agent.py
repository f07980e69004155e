"""What is asked of the agent in a guest, where it has one (qemu-ga(8)). All of it may be done without:
most guests have none, and one that doesn't answer is as good as none."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import libvirt

_PATIENCE = 5
"""Seconds for an agent that is there. One that isn't costs nothing: libvirt sees that nobody has opened
the channel."""
_POLL = 0.02


def freeze(domain: libvirt.virDomain) -> bool:
    """Have a running guest write out its file systems and write nothing more to them until ``thaw``.
    Returns whether they are frozen. Without an agent they are not; where one refuses, or takes too long,
    what it has frozen is thawed."""
    import libvirt

    try:
        domain.agentSetResponseTimeout(_PATIENCE)
        return bool(domain.fsFreeze() > 0)
    except libvirt.libvirtError:
        thaw(domain)
        return False


def thaw(domain: libvirt.virDomain, *, patience: float = 0.0) -> bool:
    """Undo ``freeze``. Returns whether the agent said that nothing is frozen any more. ``patience``:
    seconds for an agent that isn't heard yet, as in a guest that has just been given back the memory of
    a moment when it was frozen."""
    import libvirt

    end = time.monotonic() + patience
    while True:
        try:
            domain.agentSetResponseTimeout(_PATIENCE)
            domain.fsThaw()
        except libvirt.libvirtError:
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL)
        else:
            return True
