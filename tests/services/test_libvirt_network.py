"""A libvirt network: defined, started, and changed while it runs, by a real libvirtd and its dnsmasq."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemons import Daemons
from dhcp_client import lease
from networks import enter
from test_apply import ask
from test_served import put_right, refused
from yard import Yard

from inventory.errors import FarmhandError

MAC = "52:54:00:00:00:09"


class Inside:
    """Asks from the place that the network is in."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, initializer=enter, initargs=(name,))

    def names(self, name: str) -> list[str]:
        return self._thread.submit(ask, name, "A", 53, "10.77.0.1").result()

    def lease(self, mac: str) -> str:
        return str(self._thread.submit(lease, mac).result())


@pytest.fixture
def inside(yard: Yard, daemons: Daemons) -> Iterator[Inside]:
    del yard.network["bridge"]
    yard.network |= {"mode": "network", "network": "try"}
    with contextlib.ExitStack() as stack:
        stack.callback(daemons.stop)
        yield Inside(daemons.apart(stack, "libvirt")["libvirt"])


def test_hosts_are_changed_while_it_runs(yard: Yard, inside: Inside) -> None:
    yard.use("libvirt")
    yard.apply()
    assert inside.names("dev2.try.example") == ["10.77.0.6"]
    assert inside.lease("52:54:86:b3:3f:10") == "10.77.0.6"
    assert not yard.apply().changed
    for address in ("10.77.0.9", "10.77.0.10"):
        yard.vms["more"] = {"address": address, "mac": MAC}
        yard.apply()
        assert inside.names("more.try.example") == [address]
        assert inside.lease(MAC) == address
    yard.vms["dev2"]["address"] = "10.77.0.9"  # another's, before
    yard.apply()
    assert inside.names("git.try.example") == ["10.77.0.9"]
    del yard.vms["prod"]
    yard.apply()
    assert inside.names("prod.try.example") == []


def test_a_refusal_of_another_takes_it_back(yard: Yard, inside: Inside) -> None:
    """The first time the network goes again; later its hosts are as before."""
    bind = yard.services["bind"] | {"rndc": ["false"]}  # told after libvirt
    yard.use("libvirt")
    config = Path(yard.services["libvirt"]["config"])
    yard.services["bind"] = bind
    with pytest.raises(FarmhandError, match="false"):
        yard.apply()
    assert not config.exists()
    with pytest.raises(OSError, match="unreachable"):  # its bridge is gone
        inside.names("dev2.try.example")
    yard.use("libvirt")
    yard.apply()
    old = config.read_text()
    yard.services["bind"] = bind
    yard.vms["more"] = {"address": "10.77.0.10", "mac": MAC}
    yard.vms["dev2"]["address"] = "10.77.0.9"
    with pytest.raises(FarmhandError, match="false"):
        yard.apply()
    assert config.read_text() == old
    assert inside.names("dev2.try.example") == ["10.77.0.6"]
    assert inside.names("more.try.example") == []


def test_a_network_that_is_down_or_gone(yard: Yard, inside: Inside) -> None:
    """Seen, and put right; and a boot starts it."""
    yard.use("libvirt")
    yard.apply()
    virsh = ["virsh", "--connect", yard.services["libvirt"]["uri"]]
    for order, seen in (
        (["net-destroy"], "libvirt's network try is down"),
        (["net-autostart", "--disable"], "libvirt's network try isn't started at a boot"),
    ):
        subprocess.run([*virsh, *order, "try"], check=True, stdout=subprocess.DEVNULL)
        put_right(yard, seen)
        assert inside.names("dev2.try.example") == ["10.77.0.6"]
    for order in ("net-destroy", "net-undefine"):
        subprocess.run([*virsh, order, "try"], check=True, stdout=subprocess.DEVNULL)
    put_right(yard, "libvirt has no network try")
    assert inside.names("dev2.try.example") == ["10.77.0.6"]
    subprocess.run([*virsh, "net-destroy", "try"], check=True, stdout=subprocess.DEVNULL)
    yard.vms["more"] = {"address": "10.77.0.9", "mac": MAC}
    yard.apply()  # its file changes: it is started as well
    assert inside.names("more.try.example") == ["10.77.0.9"]


def test_a_libvirt_that_is_not_there(yard: Yard) -> None:
    del yard.network["bridge"]
    yard.network |= {"mode": "network", "network": "try"}
    config = f"{yard.directory}/network.xml"
    uri = f"network+unix:///system?socket={yard.directory}/none"
    yard.services = {"libvirt": {"config": config, "bridge": "br0", "uri": uri}}
    refused(yard, FarmhandError)
