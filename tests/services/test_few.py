"""A few VMs that come, change or go: only what they concern is written, as the whole would have it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from daemons import Daemons
from test_apply import ask
from test_live_dns import dynamic  # noqa: F401 - a fixture
from yard import Yard

from provision.engine.runner import begin
from provision.network.apply import keep_in_step
from provision.network.services import kea

MANY = 300


def step(yard: Yard, new: Sequence[str] = (), gone: Sequence[str] = ()) -> None:
    """As clone-farm and destroy do it."""
    with yard.site() as site:
        with begin(site, "clone-farm", [*new, *gone]) as run:
            keep_in_step(run, [], [], new=new, gone=gone)
        for vm in gone:
            site.allocator.release(vm)


def test_hosts_of_dnsmasq(yard: Yard, daemons: Daemons) -> None:
    yard.use("dnsmasq")
    yard.network |= {"subnet": "10.77.0.0/16"}
    yard.vms = {f"vm{n}": {"address": f"10.77.{1 + n // 200}.{1 + n % 200}"} for n in range(MANY)}
    yard.apply()
    first = yard.snapshot()

    yard.vms["more"] = {"address": "10.77.100.1"}
    step(yard, new=["more"])
    second = yard.snapshot()
    differ = [path for path in {*first, *second} if first.get(path) != second.get(path)]
    assert len([path for path in differ if "/dnsmasq/hosts/" in path]) == 2  # its DHCP's and its DNS'
    assert not yard.apply().changed  # the whole agrees
    assert ask("more.try.example", "A", port=5301) == ["10.77.100.1"]

    yard.vms["more"]["address"] = "10.77.100.2"
    step(yard, new=["more"])
    assert ask("more.try.example", "A", port=5301) == ["10.77.100.2"]
    assert not yard.apply().changed

    step(yard, gone=["more"])
    assert ask("more.try.example", "A", port=5301) == []
    del yard.vms["more"]
    assert not yard.apply().changed


def test_the_last_host_of_a_file(yard: Yard, daemons: Daemons) -> None:
    yard.use("dnsmasq")
    yard.apply()
    step(yard, gone=["prod"])
    del yard.vms["prod"]
    assert not [path for path, (data, *_) in yard.snapshot().items() if b"10.77.0.7" in data]
    assert not yard.apply().changed


def test_hosts_of_kea(yard: Yard, daemons: Daemons) -> None:
    """Of more files than one has hosts, and of the first and last host of a file."""
    yard.use("kea")
    yard.network |= {"subnet": "10.77.0.0/16"}
    yard.vms = {f"vm{n}": {"address": f"10.77.{1 + n // 200}.{1 + n % 200}"} for n in range(MANY)}
    yard.apply()
    first = yard.snapshot()
    yard.vms["more"] = {"address": "10.77.100.1"}
    step(yard, new=["more"])
    second = yard.snapshot()
    differ = [path for path in {*first, *second} if first.get(path) != second.get(path)]
    ours = [path for path in differ if "/kea/" in path and "leases" not in path]
    assert len(ours) == 2 and all("/kea/hosts/" in path for path in ours)  # one of each of the two
    assert len(reservations(yard)) == MANY + 1
    assert not yard.apply().changed

    yard.vms = {"dev2": {"address": "10.77.0.6"}, "prod": {"address": "10.77.0.7"}}
    yard.apply()
    assert reservations(yard) == {"dev2": "10.77.0.6", "prod": "10.77.0.7"}
    step(yard, gone=["prod"])
    assert reservations(yard) == {"dev2": "10.77.0.6"}
    del yard.vms["prod"]
    assert not yard.apply().changed
    yard.vms["prod"] = {"address": "10.77.0.8"}
    step(yard, new=["prod"])
    assert reservations(yard) == {"dev2": "10.77.0.6", "prod": "10.77.0.8"}
    assert not yard.apply().changed


def test_a_kea_that_was_started_with_another_file(yard: Yard, daemons: Daemons) -> None:
    """It is sent all, with what the files of hosts have."""
    yard.use("kea")
    yard.apply()
    yard.services["kea"] |= {f"config{kind}": f"{yard.directory}/kea/moved{kind}" for kind in "46"}
    yard.vms["more"] = {"address": "10.77.0.9"}
    yard.apply()
    assert reservations(yard) == {"dev2": "10.77.0.6", "prod": "10.77.0.7", "more": "10.77.0.9"}
    step(yard, gone=["dev2"])
    assert reservations(yard) == {"prod": "10.77.0.7", "more": "10.77.0.9"}


def reservations(yard: Yard) -> dict[str, str]:
    """What Kea itself has, of both kinds: the IPv4 addresses."""
    found = {}
    for kind in ("4", "6"):
        told = kea.command(yard.services["kea"][f"socket{kind}"], "config-get")
        assert isinstance(told, dict)
        [subnet] = told[f"Dhcp{kind}"][f"subnet{kind}"]
        found[kind] = {host["hw-address"]: host for host in subnet["reservations"]}
    assert {*found["4"]} == {*found["6"]}
    assert all(len(host["ip-addresses"]) == 1 for host in found["6"].values())
    return {host["hostname"]: host["ip-address"] for host in found["4"].values()}


def test_names_of_a_dynamic_zone(dynamic: Yard) -> None:  # noqa: F811
    yard = dynamic
    yard.apply()
    yard.vms["more"] = {"address": "10.77.0.9", "aliases": ["shop"]}
    step(yard, new=["more"])
    assert ask("shop.try.example", "A") == ["10.77.0.9"]
    assert ask("9.0.77.10.in-addr.arpa", "PTR") == ["more.try.example."]
    assert not yard.apply().changed

    del yard.vms["more"]["aliases"]  # to another VM, and an address besides
    yard.vms["more"]["address"] = "10.77.0.10"
    yard.vms["prod"]["aliases"] = ["shop"]
    step(yard, new=["more", "prod"])
    assert ask("shop.try.example", "A") == ["10.77.0.7"]
    assert ask("more.try.example", "A") == ["10.77.0.10"]
    assert ask("9.0.77.10.in-addr.arpa", "PTR") == []
    assert not yard.apply().changed

    step(yard, gone=["more"])
    assert ask("more.try.example", "A") == []
    assert ask("10.0.77.10.in-addr.arpa", "PTR") == []
    assert ask("shop.try.example", "A") == ["10.77.0.7"]
    del yard.vms["more"]
    assert not yard.apply().changed


def test_a_farm_file_changed_elsewhere_is_looked_at_whole(dynamic: Yard) -> None:  # noqa: F811
    yard = dynamic
    yard.apply()
    yard.network |= {"domain": "other.example"}
    yard.vms["more"] = {"address": "10.77.0.9"}
    step(yard, new=["more"])
    assert ask("more.other.example", "A") == ["10.77.0.9"]
    assert ask("dev2.other.example", "A") == ["10.77.0.6"]


@pytest.mark.parametrize("service", ["dhcpd", "hosts", "nginx", "haproxy", "ansible"])
def test_services_of_one_file(yard: Yard, service: str) -> None:
    """By their files alone: no daemon has to run for them."""
    yard.use(service)
    if service in ("nginx", "haproxy", "dhcpd"):
        yard.services[service] |= {"reload": ["true"], "alive": ["true"]}
    if service == "haproxy":
        yard.write("haproxy")
    yard.apply()
    before = yard.snapshot()
    yard.vms["more"] = {"address": "10.77.0.9", "proxy": [{"name": "more.example.org"}]}
    step(yard, new=["more"])
    after = yard.snapshot()
    differ = [path for path in after if before.get(path) != after[path]]
    assert 1 <= len([path for path in differ if "claims" not in path]) <= 2
    assert not yard.apply().changed
