"""What is asked of the agent in a guest, where it has one (qemu-ga(8)). All of it may be done without:
most guests have none, and one that doesn't answer is as good as none."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import TYPE_CHECKING, Any

from hypervisors.api import FileSystem

if TYPE_CHECKING:
    import libvirt

_PATIENCE = 5
"""Seconds for an agent that is there. One that isn't costs nothing: libvirt sees that nobody has opened
the channel."""
_POLL = 0.02
_LOOK, _GIVEN_UP = 0.5, 1
"""Seconds for what is only looked at: for all guests together; and until libvirt gives one up, which it
counts in whole ones."""
_PLACES = 1000  # file systems of a guest that count
_LONGEST = 4096  # a path (limits.h, PATH_MAX)
_KEYS = ("mountpoint", "fstype", "total-bytes", "used-bytes")
_READ_ONLY = frozenset({"cramfs", "erofs", "iso9660", "romfs", "squashfs", "udf"})
"""File systems that are always full. An agent doesn't tell how one is mounted."""


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


def file_systems(domains: Sequence[libvirt.virDomain]) -> Mapping[str, Sequence[FileSystem]]:
    """What may be written to in running guests, all asked at once; of those that tell in time. Nobody
    waits for an agent that hangs, nor for a domain that is being saved."""
    asked: dict[str, Future[Sequence[FileSystem]]] = {}
    for domain in domains:
        answer: Future[Sequence[FileSystem]] = Future()
        asked[domain.name()] = answer
        Thread(target=_tell, args=(domain, answer), daemon=True).start()
    done, _ = wait(asked.values(), timeout=_LOOK)
    return {name: told for name, answer in asked.items() if answer in done and (told := answer.result())}


def _tell(domain: libvirt.virDomain, answer: Future[Sequence[FileSystem]]) -> None:
    import libvirt

    try:
        domain.agentSetResponseTimeout(_GIVEN_UP)
        told = domain.guestInfo(libvirt.VIR_DOMAIN_GUEST_INFO_FILESYSTEM, 0)
    except (libvirt.libvirtError, UnicodeDecodeError):  # a path may be any bytes
        told = {}
    answer.set_result(tuple(file_systems_told(told)))


def file_systems_told(told: Mapping[str, Any]) -> Iterator[FileSystem]:
    """What virDomainGetGuestInfo() has of them. An old agent doesn't tell their sizes."""
    for number in range(min(int(told.get("fs.count", 0)), _PLACES)):
        one = {key: told.get(f"fs.{number}.{key}") for key in _KEYS}
        place, kind, size, used = one.values()
        if not (isinstance(place, str) and isinstance(size, int) and isinstance(used, int)):
            continue
        if len(place) < _LONGEST and 0 <= used <= size and kind not in _READ_ONLY:
            yield FileSystem(place, size, size - used)
