"""Why a guest that is waited for may not be reached: it asks for an address by DHCP, and isn't given the
right one."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address

from inventory.errors import Call, Remedy
from provision.guest.remote import Clue
from provision.member import Member
from provision.network.dhcp_seen import DhcpWatch
from provision.network.service import services


@contextlib.contextmanager
def network_clue(member: Member, wanted: str) -> Iterator[Callable[[], Clue | None]]:
    """What tells it while it is waited for at ``wanted``, an address or a name. It tells nothing where
    its bridge isn't on this machine, or we may not look at packets."""
    mac = _asks_here(member)
    address = None
    with contextlib.suppress(ValueError):
        address = IPv4Address(wanted)
    with DhcpWatch.open(mac) if mac else contextlib.nullcontext() as watch:

        def clue() -> Clue | None:
            if watch is None:
                return None
            watch.look()
            text = watch.told(address)
            return Clue(text, _remedy(member, mac, wanted)) if text else None

        yield clue


def _asks_here(member: Member) -> str:
    """Its MAC, if it is to get its address by DHCP from a bridge of this machine; else ""."""
    network, host = member.site.farm.network, member.declared_host
    if network.addressing != "dhcp" or not network.bridge or not member.info.virtual or host.far:
        return ""
    try:
        socket.if_nametoindex(network.bridge)
    except OSError:
        return ""
    given = member.site.allocator.recorded().get(member.vm)
    return given.mac if given else ""


def _remedy(member: Member, mac: str, wanted: str) -> Remedy:
    farm = member.site.farm
    if any(service.ANSWERS_DHCP for service in services(farm)):
        return (
            "ask as it does: ", Call("network-verify", vm=member.vm), "; then ", Call("network-apply"),
            f", and see that nothing between it and {farm.network.bridge} drops DHCP",
        )  # fmt: skip
    return f"let the DHCP server of {farm.network.bridge} give {wanted} to {mac}"
