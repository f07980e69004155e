"""network-verify sees what clients see: right answers, and each kind of wrong one."""

from __future__ import annotations

import contextlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemons import Daemons
from http_machine import machine
from networks import enter, ip, within
from yard import Yard

from inventory.errors import DriverFailed
from provision.network.services import kea
from provision.network.verify import VerifyReport, network_verify
from tests import farm


def verify(yard: Yard, *services: str) -> VerifyReport:
    with yard.site() as site:
        return network_verify(site, services)


def kinds(report: VerifyReport) -> set[tuple[str, bool | None]]:
    return {(answer.service, answer.ok) for answer in report.answers}


@pytest.mark.parametrize("service", ["dhcpd", "kea", "dnsmasq"])
def test_dhcp(yard: Yard, daemons: Daemons, service: str) -> None:
    yard.use(service)
    yard.apply()
    report = verify(yard)
    assert report.ok, report.wrong
    exchanged = [answer.seen for answer in report.answers if answer.text.startswith("exchange")]
    assert exchanged == ["10.77.0.6", "10.77.0.7"]
    names = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split()
    assert f"fhv{os.getpid()}" not in names


@pytest.mark.parametrize("service", ["dhcpd", "kea", "dnsmasq"])
def test_only_those_that_are_made_keep_a_lease(yard: Yard, daemons: Daemons, service: str) -> None:
    yard.use(service)
    if service == "kea":
        [library] = Path("/usr/lib").glob("*/kea/hooks/libdhcp_lease_cmds.so")
        yard.services["kea"]["lease_commands"] = str(library)
    with yard.site() as site:
        farm.clone_farm(site, ["dev2"], start=False)
    yard.apply()

    def leases() -> set[str]:
        return {address for address in ("10.77.0.6", "10.77.0.7") if _leased(yard, service, address)}

    for _ in range(2):  # as if it had never asked
        report = verify(yard)
        assert report.ok, report.wrong
        # dhcpd notes nothing of those with a fixed address
        assert leases() == (set() if service == "dhcpd" else {"10.77.0.6"})


def _leased(yard: Yard, service: str, address: str) -> bool:
    if service == "kea":
        asked = yard.services["kea"]["socket4"], "lease4-get", {"ip-address": address}
        try:
            return isinstance(kea.command(*asked), dict)
        except DriverFailed:
            return False
    file = yard.directory / {"dnsmasq": "dnsmasq/leases", "dhcpd": "dhcp/leases"}[service]
    return f"{address} " in file.read_text()


def test_no_dhcp_server(yard: Yard, daemons: Daemons) -> None:
    yard.use("dhcpd")
    yard.apply()
    daemons.stop()
    (yard.directory / "dhcp" / "pid").unlink(missing_ok=True)
    [stopped, first, _] = verify(yard).wrong
    assert (stopped.service, stopped.vm, stopped.seen) == ("dhcpd", "", "dhcpd doesn't run")
    assert (first.service, first.vm, first.expected, first.seen) == (
        "dhcpd", "dev2", "10.77.0.6", "no answer",
    )  # fmt: skip


def test_dns(yard: Yard, daemons: Daemons) -> None:
    yard.use("bind")
    daemons.start("bind")
    yard.apply()
    report = verify(yard)
    assert report.ok, report.wrong
    assert len(report.answers) == 2 * 3 + 2 * 2  # two addresses of three names, and back from four
    zone = yard.directory / "bind" / "db.try.example"
    zone.write_text(zone.read_text().replace("10.77.0.6", "10.77.0.66").replace("00 ; s", "50 ; s"))
    subprocess.run([*yard.services["bind"]["rndc"], "reload"], check=True)
    wrong = verify(yard).wrong
    assert {(a.vm, a.expected, a.seen) for a in wrong} == {("dev2", "10.77.0.6", "10.77.0.66")}


def test_classless_reverse(yard: Yard, daemons: Daemons) -> None:
    yard.network |= {"subnet": "10.77.0.0/25", "pool": []}
    yard.use("bind")
    daemons.start("bind")
    yard.apply()
    assert verify(yard).ok
    assert any("PTR" in answer.text for answer in verify(yard).answers)


def test_proxies_and_nat(yard: Yard, daemons: Daemons) -> None:
    yard.use("nginx", "haproxy", "nftables")
    yard.vms["dev2"] |= {"proxy": [{"name": "dev2.example.org", "port": "8080"}], "ssh_port": "8080"}
    daemons.start("nginx", "haproxy")
    with machine("10.77.0.6", 8080):
        yard.apply()
        report = verify(yard)
        assert report.ok, report.wrong
        right = {(a.service, a.vm) for a in report.answers if a.ok}
        assert right == {("nginx", "dev2"), ("haproxy", "dev2"), ("nftables", "dev2")}
        assert {a.vm for a in report.unknown} == {"prod"}, "it is off: nothing can be told"
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        config = Path(yard.services["nginx"]["config"])
        config.write_text(config.read_text().replace("10.77.0.6:8080", "10.77.0.6:8081"))
        subprocess.run(yard.services["nginx"]["reload"], check=True)
        wrong = verify(yard).wrong
        assert {(a.service, a.vm) for a in wrong} >= {("nftables", "dev2")}


def test_a_plan_asks_nothing(yard: Yard) -> None:
    yard.use("bind", "dhcpd", "nginx", "nftables")
    with yard.site() as site:
        site.allocator.allocate_all(site.farm.vms)
    with yard.site(plan=True) as site:
        report = network_verify(site)
    assert report.answers == ()
    assert "dhcp: dev2: exchange for 52:54:86:b3:3f:10, expect 10.77.0.6" in report.planned
    assert "bind: dev2: dev2.try.example A, expect 10.77.0.6" in report.planned


def test_shorewall_from_outside(yard: Yard, daemons: Daemons) -> None:
    """A client beyond a router with shorewall, a VM behind it; and what it says on the router."""
    yard.vms["dev2"]["ssh_port"] = "8080"
    with contextlib.ExitStack() as stack:
        outside = daemons.apart(stack, "shorewall")["shorewall"]
        # The VM's own answer, to compare with: this client may ask it too.
        (yard.directory / "shorewall" / "policy").write_text("net loc ACCEPT\nall all REJECT\n")
        ip(f"-n {outside} route add 10.77.0.0/24 via 192.0.2.7")
        stack.enter_context(machine("10.77.0.6", 8080, where=daemons.router))
        yard.use("shorewall")
        yard.apply()

        def seen(where: str) -> list[tuple[str, str, bool | None]]:
            with ThreadPoolExecutor(1, initializer=enter, initargs=(where,)) as thread:
                report = thread.submit(verify, yard).result()
            return [(a.vm, a.text.split()[0], a.ok) for a in report.answers]

        assert seen(outside) == [("dev2", "connect", True), ("prod", "connect", None)]
        assert seen(daemons.router) == [("dev2", "the", True), ("prod", "the", True)]
        subprocess.run([*within(daemons.router), "iptables", "-t", "nat", "-F"], check=True)
        assert seen(outside)[0] == ("dev2", "connect", False)
        assert seen(daemons.router)[0] == ("dev2", "the", False)
