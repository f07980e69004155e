"""Whatever is wrong with one service's template, or changes in them all: clients of the others get an
answer each time. Every daemon there is a renderer for, at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import pytest
from clients import MAC, Clients
from daemons import Daemons
from http_machine import answer_of, machine
from test_apply import ask
from test_faults import contents
from yard import Yard

from inventory.errors import FarmhandError

TEMPLATES = {
    "bind": ("named", "zone", "reverse"),
    "dhcpd": ("dhcpd",),
    "kea": ("kea4", "kea6"),
    "dnsmasq": ("dnsmasq", "dnsmasq-dhcp", "dnsmasq-dns"),
    "hosts": ("hosts",),
    "ssh_config": ("ssh_config",),
    "nginx": ("nginx",),
    "haproxy": ("haproxy", "haproxy-map"),
    "nftables": ("nftables",),
    "shorewall": ("shorewall-params", "shorewall-rules"),
    "libvirt": ("libvirt",),
    "ansible": ("ansible",),
}
READ_WITHOUT_A_CHECK = ("dnsmasq-dhcp", "dnsmasq-dns", "hosts", "haproxy-map", "ansible")
"""Lists that no daemon's checker reads, or that it takes with anything in them."""


@pytest.fixture
def served(yard: Yard, daemons: Daemons) -> Iterator[tuple[Yard, Mapping[str, str]]]:
    """All services, serving, and the places of those that are apart."""
    del yard.network["bridge"]
    yard.network |= {"mode": "network", "network": "try"}
    yard.vms["dev2"] |= {"proxy": [{"name": "dev2.example.org", "port": "8080"}], "ssh_port": "8080"}
    yard.vms["prod"]["mac"] = MAC
    with contextlib.ExitStack() as stack:
        stack.callback(daemons.stop)  # before the places go
        places = daemons.apart(stack, "dhcpd", "kea", "shorewall", "libvirt")
        yard.use(*TEMPLATES)
        daemons.start("bind", "nginx", "haproxy")
        stack.enter_context(machine("10.77.0.6", 8080))
        stack.enter_context(machine("10.77.0.6", 8080, where=daemons.router))
        yard.apply()
        assert answer_of("127.0.0.1", 8003, "dev2.example.org") == "10.77.0.6:8080"
        yield yard, places


def pids(yard: Yard) -> dict[str, str]:
    """Of every daemon that writes its own down."""
    found = {str(path): path.read_text() for path in yard.directory.glob("*/*pid")}
    assert len(found) >= 7, found
    return found


def test_a_broken_template_disturbs_nobody(served: tuple[Yard, Mapping[str, str]]) -> None:
    """Every service's templates broken in turn: one that can't be rendered, one that the daemon's
    checker refuses."""
    yard, places = served
    assert set(TEMPLATES) == set(yard.farm().services.used)
    directory = yard.directory / "templates"
    directory.mkdir()
    yard.services["templates"] = str(directory)
    yard.vms["more"] = {"address": "10.77.0.9", "nat_port": "22009",
                        "proxy": [{"name": "more.example.org"}]}  # fmt: skip
    old, running = contents(yard), pids(yard)
    with Clients(places) as clients:
        clients.round()
        for service, templates in TEMPLATES.items():
            for template in templates:
                path = directory / f"{template}.j2"
                for spoilt in ("{{ nothing.there }}", "\n} rubbish ( here ;\n"):
                    rubbish = "rubbish" in spoilt
                    if rubbish and template in READ_WITHOUT_A_CHECK:
                        continue
                    path.write_text(f'{{% include "farmhand/{template}.j2" %}}{spoilt}')
                    with pytest.raises(FarmhandError) as caught:
                        yard.apply()
                    said = caught.value.message
                    assert f"{service}: " in said if rubbish else str(path) in said, said
                path.unlink()
                clients.round()
                assert contents(yard) == old
                assert pids(yard) == running
    assert clients.failed == []
    assert all(count > 3 for count in clients.answers.values()), clients.answers


def test_changes_disturb_nobody(served: tuple[Yard, Mapping[str, str]]) -> None:
    """dhcpd is restarted: its clients ask again for some seconds, as all do."""
    yard, places = served
    with Clients(places) as clients:
        for number in range(3):
            yard.vms["more"] = {"address": f"10.77.0.{9 + number}", "nat_port": str(23000 + number),
                                "proxy": [{"name": "more.example.org"}]}  # fmt: skip
            yard.apply()
            assert ask("more.try.example", "A") == [f"10.77.0.{9 + number}"]
        clients.round()
    assert clients.failed == []
