"""network-apply on real daemons: add, change, remove, refuse, put back."""

from __future__ import annotations

import os
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import dns.message
import dns.query
import dns.rdatatype
import pytest
from daemons import Daemons
from yard import Yard

from inventory.errors import CommandFailed, NotOurs, WrongState, spelled
from provision.network.serial import later, serial_of

FILES_ONLY = ("hosts", "ssh_config", "ansible")


def ask(name: str, kind: str, port: int = 5300, server: str = "127.0.0.1") -> list[str]:
    answer = dns.query.udp(dns.message.make_query(name, kind), server, port=port, timeout=5)
    return [rdata.to_text() for rrset in answer.answer for rdata in rrset]


def test_a_second_apply_does_nothing(yard: Yard) -> None:
    yard.use(*FILES_ONLY)
    assert yard.plan().changed
    assert not (yard.directory / "hosts").exists()
    assert yard.apply().changed
    before = yard.snapshot()
    assert not yard.apply().changed
    assert yard.snapshot() == before


def test_the_plan_is_what_is_done(yard: Yard) -> None:
    yard.use(*FILES_ONLY)
    planned = yard.plan()
    done = yard.apply()
    assert planned.actions == done.actions
    assert planned.result.diff == done.result.diff


def test_an_admins_lines_owner_and_mode_stay(yard: Yard) -> None:
    yard.use("hosts")
    path = yard.directory / "hosts"
    theirs = b"127.0.0.1\tlocalhost # caf\xe9\r\n\n# no line break at the end"
    path.write_bytes(theirs)
    path.chmod(0o640)
    os.chown(path, 65534, 65534)
    yard.apply()
    assert path.read_bytes().startswith(theirs + b"\n# BEGIN farmhand try-it:")
    assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o640, 65534)
    yard.vms["more"] = {}
    path.write_bytes(path.read_bytes() + b"# below\n")
    yard.apply()
    assert path.read_bytes().startswith(theirs)
    assert path.read_bytes().endswith(b"# below\n")
    assert b"10.77.0.2 more.try.example" in path.read_bytes()


def test_through_a_symbolic_link(yard: Yard) -> None:
    yard.use("hosts")
    (yard.directory / "real").write_text("")
    (yard.directory / "hosts").symlink_to("real")
    yard.apply()
    assert (yard.directory / "hosts").is_symlink()
    assert "dev2" in (yard.directory / "real").read_text()


@pytest.mark.parametrize("service", ["hosts", "ssh_config"], ids=["block", "file"])
def test_an_edit_of_what_is_ours_is_noticed(yard: Yard, service: str) -> None:
    yard.use(service)
    yard.apply()
    path = Path(yard.services[service]["config"])
    path.write_text(path.read_text().replace("10.77.0.6", "10.77.0.66"))
    edited = path.read_text()
    with pytest.raises(WrongState, match="edited by hand") as caught:
        yard.apply()
    assert "-" in caught.value.detail and "10.77.0.66" in caught.value.detail
    assert path.read_text() == edited
    yard.apply(force=True)
    assert "10.77.0.66" not in path.read_text()
    assert not yard.apply().changed


def test_what_to_do_with_a_file_of_anothers(yard: Yard) -> None:
    """Of haproxy's files one alone may be shared."""
    yard.use("haproxy")
    yard.services["haproxy"]["alive"] = ["true"]
    for key, remedy in (("map", "give the service another path"), ("config", "set 'own: block'")):
        path = Path(yard.services["haproxy"][key])
        path.write_text("mine\n")
        with pytest.raises(NotOurs) as caught:
            yard.apply()
        assert remedy in str(caught.value.remedy)
        path.unlink()


def test_a_file_of_another_is_never_touched(yard: Yard) -> None:
    yard.use("ssh_config")
    path = yard.directory / "ssh_config"
    path.write_text("Host mine\n")
    for force in (False, True):
        with pytest.raises(NotOurs, match="is not farmhand's"):
            yard.apply(force=force)
    assert path.read_text() == "Host mine\n"
    yard.services["ssh_config"]["own"] = "block"
    yard.apply()
    assert path.read_text().startswith("Host mine\n# BEGIN farmhand")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text + "# END farmhand try-it\n",
        lambda text: text.replace("# END farmhand try-it\n", ""),
        lambda text: text + text,
    ],
)
def test_marks_in_disorder_are_refused(yard: Yard, spoil) -> None:
    yard.use("hosts")
    yard.apply()
    path = yard.directory / "hosts"
    path.write_text(spoil(path.read_text()))
    left = path.read_text()
    with pytest.raises(WrongState, match="in disorder"):
        yard.apply(force=True)
    assert path.read_text() == left


def test_a_service_given_up_is_taken_away(yard: Yard) -> None:
    yard.use(*FILES_ONLY)
    (yard.directory / "hosts").write_text("127.0.0.1 localhost\n")
    yard.apply()
    yard.use("ansible")
    yard.apply()
    assert (yard.directory / "hosts").read_text() == "127.0.0.1 localhost\n"
    assert not (yard.directory / "ssh_config").exists()
    assert (yard.directory / "ansible.yaml").exists()


def test_bind(yard: Yard, daemons: Daemons) -> None:
    yard.use("bind")
    daemons.start("bind")
    yard.apply()
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    assert ask("git.try.example", "AAAA") == ["fd77::6"]
    assert ask("6.0.77.10.in-addr.arpa", "PTR") == ["dev2.try.example."]
    zone = yard.directory / "bind" / "db.try.example"
    serial = serial_of(zone.read_text())
    assert not yard.apply().changed
    assert serial_of(zone.read_text()) == serial

    yard.vms["more"] = {"address": "10.77.0.9"}
    yard.apply()
    assert ask("more.try.example", "A") == ["10.77.0.9"]
    assert later(serial_of(zone.read_text()), serial)

    yard.vms["more"]["address"] = "10.77.0.10"
    yard.apply()
    assert ask("more.try.example", "A") == ["10.77.0.10"]
    assert ask("9.0.77.10.in-addr.arpa", "PTR") == []

    del yard.vms["more"]
    yard.apply()
    assert ask("more.try.example", "A") == []


def test_a_lost_zone_file_takes_no_serial_back(yard: Yard, daemons: Daemons) -> None:
    yard.use("bind")
    daemons.start("bind")
    yard.apply()
    zone = yard.directory / "bind" / "db.try.example"
    for number in range(3):
        yard.vms[f"more{number}"] = {}
        yard.apply()
    serial = serial_of(zone.read_text())
    zone.unlink()
    yard.apply()
    assert later(serial_of(zone.read_text()), serial)


def test_a_block_in_an_admins_zone(yard: Yard, daemons: Daemons) -> None:
    """The seed's way: db.farm with records by hand."""
    yard.use("bind")
    yard.services["bind"] |= {"own": "block", "reverse": "no"}
    zone = yard.directory / "bind" / "db.try.example"
    theirs = (
        "$TTL 600\n@ IN SOA ns h (\n  7 ; serial\n  3600 600 604800 300 )\n@ IN NS ns\n"
        "ns IN A 10.77.0.1\nprinter IN A 10.77.0.50\n"
    )
    zone.write_text(theirs)
    (yard.directory / "bind" / "farm.conf").write_text(
        f'zone "try.example" {{ type primary; file "{zone}"; }};\n'
    )
    daemons.start("bind")
    yard.apply()
    assert zone.read_text().startswith(theirs.replace("7 ;", "8 ;") + "; BEGIN farmhand try-it")
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    assert ask("printer.try.example", "A") == ["10.77.0.50"]
    assert not yard.apply().changed


def test_bind_that_refuses_leaves_everything(yard: Yard, daemons: Daemons) -> None:
    """The server was started with another file than the one that is checked, without the zones."""
    yard.use("hosts", "bind")
    main = yard.directory / "bind" / "named.conf"
    checked = yard.directory / "bind" / "checked.conf"
    checked.write_text(main.read_text())
    yard.services["bind"]["main"] = str(checked)
    main.write_text(main.read_text().split("include")[0])
    daemons.start("bind")
    before = yard.snapshot()
    with pytest.raises(Exception, match=r"does not serve try\.example") as caught:
        yard.apply()
    assert "every file and daemon is as it was before" in spelled(caught.value.remedy)
    after = yard.snapshot()
    assert {k: v[:2] for k, v in after.items()} == {k: v[:2] for k, v in before.items()}


def test_nginx_and_haproxy(yard: Yard, daemons: Daemons) -> None:
    from http_machine import answer_of, machine

    yard.use("nginx", "haproxy")
    yard.vms["dev2"]["proxy"][0]["port"] = "8080"
    daemons.start("nginx", "haproxy")
    with machine("10.77.0.6", 8080):
        yard.apply()
        for port in (8001, 8003):
            assert answer_of("127.0.0.1", port, "dev2.example.org") == "10.77.0.6:8080"
        assert not yard.apply().changed


def test_nat(yard: Yard, daemons: Daemons) -> None:
    from http_machine import answer_of, machine

    yard.use("nftables")
    yard.vms["dev2"]["ssh_port"] = "8022"
    with machine("10.77.0.6", 8022):
        yard.apply()
        assert answer_of("10.77.0.1", 22006, "x") == "10.77.0.6:8022"
        yard.vms["dev2"]["nat_port"] = "22008"
        done = yard.apply()
        assert any("change the map's elements" in action.text for action in done.actions)
        assert answer_of("10.77.0.1", 22008, "x") == "10.77.0.6:8022"
        with pytest.raises(OSError):
            answer_of("10.77.0.1", 22006, "x", patience=0)


@pytest.mark.parametrize("service", ["dhcpd", "kea", "dnsmasq"])
def test_dhcp(yard: Yard, daemons: Daemons, service: str) -> None:
    from dhcp_client import lease

    yard.use(service)
    yard.apply()
    assert lease("52:54:86:b3:3f:10") == IPv4Address("10.77.0.6")
    assert not yard.apply().changed
    yard.vms["more"] = {"address": "10.77.0.9", "mac": "52:54:00:00:00:09"}
    yard.apply()
    assert lease("52:54:00:00:00:09") == IPv4Address("10.77.0.9")
    yard.vms["more"]["address"] = "10.77.0.10"
    yard.apply()
    assert lease("52:54:00:00:00:09") == IPv4Address("10.77.0.10")
    del yard.vms["more"]
    yard.apply()
    got = lease("52:54:00:00:00:09")
    assert got is None or IPv4Address("10.77.0.200") <= got <= IPv4Address("10.77.0.210")


@pytest.mark.parametrize("service", ["kea", "dnsmasq"])
def test_dhcp6(yard: Yard, daemons: Daemons, service: str) -> None:
    from dhcp_client import lease6

    yard.use(service)
    yard.apply()
    assert lease6("52:54:86:b3:3f:10") == IPv6Address("fd77::6")


def test_a_checker_that_refuses_stops_everything(yard: Yard) -> None:
    yard.use("hosts", "nginx")
    yard.services["nginx"]["alive"] = ["true"]
    (yard.directory / "nginx" / "farm-other").write_text("rubbish;\n")
    before = yard.snapshot()
    with pytest.raises(CommandFailed, match=r"nginx: nginx refuses: .*unknown directive"):
        yard.apply()
    assert yard.snapshot() == before
