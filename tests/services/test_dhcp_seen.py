"""A guest that is waited for, and isn't given the address that it is waited for at: that is told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from daemons import Daemons
from dhcp_client import asking
from networks import ip, place, unique, wait_for, within
from yard import Yard

from host.progress import Progress
from inventory.errors import TimedOut, calls_in
from provision.guest.network_clue import network_clue
from provision.guest.remote import Endpoint, Ready
from provision.guest.ssh_connection import wait_ready
from provision.member import Member
from provision.network.dhcp_seen import DhcpWatch

MAC = "52:54:86:b3:3f:10"
HERE = IPv4Address("10.77.0.6")


def _waited_for(yard: Yard, host: str, seconds: float) -> Ready:
    with yard.site() as site:
        member = Member(site, "dev2")
        member.allocate()
        endpoint = Endpoint("dev2", host, 22, "root", yard.directory / "key", "ssh-ed25519 AAAA")
        progress = Progress(lambda: None, seconds)
        with network_clue(member, host) as clue:
            return asyncio.run(
                wait_ready(
                    endpoint, since=0.0, progress=progress, running=lambda: True, tail=lambda: "",
                    working=lambda text: None, clue=clue,
                )
            )  # fmt: skip


def test_an_unanswered_guest_is_told(yard: Yard, daemons: Daemons) -> None:
    yard.use("dhcpd")  # which doesn't run
    with asking(MAC), pytest.raises(TimedOut) as caught:
        _waited_for(yard, str(HERE), 3)
    assert "nothing answers at that address yet" in caught.value.message
    assert "it asked for an address by DHCP" in caught.value.message
    assert "no server answered" in caught.value.message
    assert {call.task for call in calls_in(caught.value.remedy)} == {"network-verify", "network-apply"}
    assert "ready_timeout" not in str(caught.value.remedy)


def test_without_a_server_of_ours_the_admin_is_told_what_theirs_must_know(
    yard: Yard, daemons: Daemons
) -> None:
    yard.use("hosts")
    with asking(MAC), pytest.raises(TimedOut) as caught:
        _waited_for(yard, str(HERE), 3)
    assert caught.value.remedy == f"let the DHCP server of br0 give {HERE} to {MAC}"


def test_a_guest_that_asks_nothing_is_another_matter(yard: Yard, daemons: Daemons) -> None:
    with asking("52:54:00:00:00:77"), pytest.raises(TimedOut) as caught:
        _waited_for(yard, str(HERE), 3)
    assert "DHCP" not in caught.value.message
    assert "nothing answers at that address yet" in caught.value.message
    assert "open" not in caught.value.message


def test_an_address_of_this_machine_is_named_as_such(yard: Yard, daemons: Daemons) -> None:
    with pytest.raises(TimedOut, match=r"\(Connection refused; that address is this machine's own\)"):
        _waited_for(yard, "10.77.0.1", 1)


@contextlib.contextmanager
def _server_beyond_a_port(directory: Path) -> Iterator[None]:
    """dnsmasq on another machine of the bridge: what it sends straight to a client passes no further
    than from port to port."""
    link = unique("d")
    with place(bridge=False) as name:
        ip(f"link add {link} type veth peer name eth0 netns {name}")
        ip(f"link set {link} master br0 up")
        ip(f"-n {name} link set eth0 up")
        ip(f"-n {name} addr add 10.77.0.9/24 dev eth0")
        argv = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--no-ping"]
        argv += ["--dhcp-range=10.77.0.200,10.77.0.200", f"--dhcp-leasefile={directory}/leases"]
        argv += ["--interface=eth0", "--user=root", f"--pid-file={directory}/pid"]
        server = subprocess.Popen([*within(name), *argv], stderr=subprocess.DEVNULL)
        try:
            wait_for((directory / "pid").exists)
            yield
        finally:
            server.terminate()
            server.wait()


def test_a_strangers_address_is_told(tmp_path: Path, yard: Yard, daemons: Daemons) -> None:
    gave = "DHCP server 10.77.0.9 gave it 10.77.0.200"
    with DhcpWatch.open(MAC) as watch, _server_beyond_a_port(tmp_path), asking(MAC):
        assert watch is not None

        def seen(wanted: str) -> str:
            watch.look()
            return watch.told(IPv4Address(wanted))

        wait_for(lambda: seen(str(HERE)) == f"{gave}, and it is waited for at {HERE}")
        assert seen("10.77.0.200") == ""
        assert watch.told(None) == ""
        assert watch.asked == 2, "each packet counts once, though it passes several interfaces"


def test_a_refused_guest_is_told(tmp_path: Path, yard: Yard, daemons: Daemons) -> None:
    """By the packets of a server that takes its offer back."""
    yard.use("dhcpd")
    with DhcpWatch.open(MAC) as watch:
        assert watch is not None
        for kind, told in ((2, "offered it 10.77.0.6, but no more"), (6, "refuses it an address")):
            watch._take(_reply(kind), "port0")
            assert watch.told(HERE) == f"DHCP server 10.77.0.1 {told}"


def test_cut_packets_are_no_defect(daemons: Daemons) -> None:
    whole = _reply(5)
    with DhcpWatch.open(MAC) as watch:
        assert watch is not None
        for length in range(len(whole)):
            watch._take(whole[:length], "port0")
        for _ in range(2000):
            watch._take(whole[:268] + os.urandom(40), "port0")


def _reply(kind: int) -> bytes:
    """As a packet socket gives it: IP header first."""
    from provision.network._dhcp_probe import HEAD

    none, mac = bytes(4), bytes.fromhex(MAC.replace(":", "")).ljust(16, b"\0")
    head = HEAD.pack(2, 1, 6, 0, 1, 0, 0, none, HERE.packed, none, none, mac, bytes(64), bytes(128))
    options = bytes((99, 130, 83, 99, 53, 1, kind, 54, 4, 10, 77, 0, 1, 255))
    return bytes((0x45,)) + bytes(19 + 8) + head + options
