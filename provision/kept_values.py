"""What a machine that runs has otherwise than the farm file says by now. It keeps that until it is
started anew."""

from __future__ import annotations

from collections.abc import Iterator

from hypervisors.api import Machine, Nic, Power
from inventory.sizes import format_size
from provision.member import Member, is_on

_MIB = 2**20


def kept_values(member: Member, machine: Machine) -> tuple[str, ...]:
    """A few words for each; nothing of a machine that is off, for its next start takes the farm
    file's."""
    if not (is_on(machine) or machine.power is Power.SUSPENDED) or not member.can_power:
        return ()
    declared = member.declared
    found: list[tuple[str, str, str]] = []
    if _whole(machine.memory) != _whole(declared.memory):
        found.append(("memory", format_size(machine.memory), format_size(declared.memory)))
    if machine.vcpus != declared.vcpus:
        found.append(("vcpus", str(machine.vcpus), str(declared.vcpus)))
    if declared.address and machine.address and machine.address != declared.address:
        found.append(("address", str(machine.address), str(declared.address)))
    if machine.nic is not None:
        found += _of_network(member, machine.nic)
    return tuple(f"{what} {has}, not {wanted}" for what, has, wanted in found)


def _of_network(member: Member, nic: Nic) -> Iterator[tuple[str, str, str]]:
    network, port = member.site.farm.network, member.declared.ssh_port
    if nic.mode != network.mode:
        yield "network", nic.mode, network.mode
        return
    if nic.mode != "user":
        if nic.target != (wanted := network.bridge or network.network or ""):
            yield nic.mode, nic.target, wanted
        return
    if nic.internet != network.internet:
        yield "internet", _word(nic.internet), _word(network.internet)
    has = next((one.host for one in nic.forwards if one.guest == 22), None)
    if port and has and port != has:
        yield "ssh port", str(has), str(port)


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


def _whole(size: int) -> int:
    """As hypervisors round it."""
    return -(-size // _MIB)
