"""What is asked of the agent in a guest, where it has one (qemu-ga(8)). All of it may be done without:
most guests have none, and one that doesn't answer is as good as none."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import TYPE_CHECKING, Any

from hypervisors.api import FileSystem
from hypervisors.libvirt.errors import connection_lost

if TYPE_CHECKING:
    import libvirt

_PATIENCE = 5
"""Seconds for an agent that is there. One that isn't costs nothing: libvirt sees that nobody has opened
the channel."""
THAWS = 60.0
"""Seconds for an agent that was asked to freeze: it writes out all that its guest has not written."""
_POLL = 0.02
_LOOK, _GIVEN_UP = 0.5, 1
"""Seconds for what is only looked at: for all guests together; and until libvirt gives one up, which it
counts in whole ones."""
_PLACES = 1000  # file systems of a guest that count
_LONGEST = 4096  # a path (limits.h, PATH_MAX)
_KEYS = ("mountpoint", "fstype", "total-bytes", "used-bytes")
_READ_ONLY = frozenset({"cramfs", "erofs", "iso9660", "romfs", "squashfs", "udf"})
"""File systems that are always full. An agent doesn't tell how one is mounted."""


def hears(domain: libvirt.virDomain) -> bool:
    """Whether there is an agent that answers now."""
    import libvirt
    import libvirt_qemu

    try:
        libvirt_qemu.qemuAgentCommand(domain, '{"execute": "guest-ping"}', _PATIENCE, 0)
    except libvirt.libvirtError:
        return False
    return True


def freeze(domain: libvirt.virDomain) -> bool | None:
    """Have a running guest write out its file systems and write nothing more to them until ``thaw``.
    Returns whether they are frozen; False: its agent has none, or won't. None: it didn't say in time. It
    may do so yet, and hears nothing meanwhile: ``thaw`` has to be called as after a True, and after an
    exception."""
    import libvirt

    try:
        domain.agentSetResponseTimeout(_PATIENCE)
        return bool(domain.fsFreeze() > 0)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_AGENT_UNRESPONSIVE or connection_lost(error):
            return None
        thaw([domain], patience=0)
        return False


def thaw(
    domains: Sequence[libvirt.virDomain], *, patience: float | None = None
) -> Sequence[libvirt.virDomain]:
    """Undo ``freeze``. The guests run: libvirt asks nobody in a paused one. Returns those whose agent
    did not say that nothing is frozen any more; of a machine that is off nothing is. ``patience``:
    seconds, if not ``THAWS``, for agents that aren't heard yet: busy with the freeze, or in a guest that
    has just been given back the memory of a moment when it was frozen. libvirtError if the connection is
    lost."""
    end = time.monotonic() + (THAWS if patience is None else patience)
    left = list(domains)
    while True:  # in turn, so that one that hangs keeps no other one frozen
        left = [domain for domain in left if not _thaws(domain)]
        if not left or time.monotonic() >= end:
            return left
        time.sleep(_POLL)


def _thaws(domain: libvirt.virDomain) -> bool:
    import libvirt

    try:
        if not domain.isActive():
            return True
        domain.agentSetResponseTimeout(_PATIENCE)
        domain.fsThaw()
    except libvirt.libvirtError as error:
        if connection_lost(error):
            raise
        return False
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
