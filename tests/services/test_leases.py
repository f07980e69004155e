"""A removed VM's lease goes with it; whoever has its address next is given it at once."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from daemons import Daemons
from dhcp_client import lease, lease6
from yard import Yard

from inventory.errors import DriverFailed
from provision.network.service import services
from provision.network.services import kea

MORE, OTHER = "52:54:00:00:00:09", "52:54:00:00:00:0a"


def _not_live(yard: Yard) -> set[tuple[str, str]]:
    return {(service.NAME, why) for service in services(yard.farm()) for why in service.not_live()}


def test_a_reset_lease_is_of_the_new_address(yard: Yard, daemons: Daemons) -> None:
    yard.use("dnsmasq")
    yard.apply()
    assert str(lease("52:54:86:b3:3f:10")) == "10.77.0.6"
    yard.vms["dev2"]["address"] = "10.77.0.16"
    yard.apply()
    assert str(lease("52:54:86:b3:3f:10")) == "10.77.0.16"
    assert "10.77.0.6 " not in (yard.directory / "dnsmasq" / "leases").read_text()


def test_dnsmasq(yard: Yard, daemons: Daemons) -> None:
    yard.use("dnsmasq")
    yard.vms["more"] = {"address": "10.77.0.9", "mac": MORE}
    yard.apply()
    leases = yard.directory / "dnsmasq" / "leases"
    assert lease(MORE) == IPv4Address("10.77.0.9")
    assert MORE in leases.read_text()
    del yard.vms["more"]
    yard.apply()
    assert MORE not in leases.read_text()


@pytest.mark.parametrize("number", ["4", "6"])
def test_kea(yard: Yard, daemons: Daemons, number: str) -> None:
    yard.use("kea")
    without = _not_live(yard)
    [library] = Path("/usr/lib").glob("*/kea/hooks/libdhcp_lease_cmds.so")
    yard.services["kea"]["lease_commands"] = str(library)
    [(service, lost)] = without - _not_live(yard)
    assert service == "kea" and "lease runs out by itself" in lost
    yard.vms["more"] = {"address": "10.77.0.9", "mac": MORE}
    yard.apply()
    address = {"4": IPv4Address("10.77.0.9"), "6": IPv6Address("fd77::9")}[number]
    exchange = {"4": lease, "6": lease6}[number]
    asked = yard.services["kea"][f"socket{number}"], f"lease{number}-get", {"ip-address": str(address)}
    assert exchange(MORE) == address
    assert isinstance(kea.command(*asked), dict)
    yard.vms["more"]["mac"] = OTHER  # as it would for the next VM with this address
    yard.apply()
    with pytest.raises(DriverFailed, match="not found"):
        kea.command(*asked)
    assert exchange(OTHER) == address
    del yard.vms["more"]
    done = yard.apply()
    assert any(f"lease{number}-del" in action.text for action in done.actions)
    with pytest.raises(DriverFailed, match="not found"):
        kea.command(*asked)


def test_a_mac_in_another_notation_keeps_its_lease(yard: Yard, daemons: Daemons) -> None:
    """As an earlier farmhand wrote them, with colons."""
    yard.use("kea")
    [library] = Path("/usr/lib").glob("*/kea/hooks/libdhcp_lease_cmds.so")
    yard.services["kea"]["lease_commands"] = str(library)
    ours = Path("templates/network/kea4-hosts.j2").read_text()
    theirs = yard.directory / "theirs"
    theirs.mkdir()
    (theirs / "kea4-hosts.j2").write_text(ours.replace("vm.mac | hex", "vm.mac"))
    yard.services["templates"] = str(theirs)
    yard.apply()
    assert lease("52:54:86:b3:3f:10") == IPv4Address("10.77.0.6")
    del yard.services["templates"]
    done = yard.apply()
    assert done.changed
    assert not any("lease4-del" in action.text for action in done.actions)
    asked = yard.services["kea"]["socket4"], "lease4-get", {"ip-address": "10.77.0.6"}
    assert isinstance(kea.command(*asked), dict)
