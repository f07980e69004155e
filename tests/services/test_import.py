"""network-import: the seed's own files, and what admins have beside."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest

from inventory.errors import Conflict, InventoryError, NotFound, UsageError
from inventory.loader import loads
from provision.network.importing import network_import
from provision.network.services.bind import Bind

# As in the XiVO article: a line of db.farm, a block of dhcpd.conf.
ZONE = "gallifrey-dev.xivo.vm\tIN\tA\t10.10.60.6\n"
DHCPD = """\
host gallifrey-dev.xivo.vm.farm {
        hardware ethernet 52:54:86:b3:3f:10;
        fixed-address gallifrey-dev.xivo.vm.farm;
        option subnet-mask 255.255.255.0;
    }
"""
RICH_ZONE = """\
$TTL 600
@ IN SOA ns root ( 2011072501 ; serial
  3600 600 604800 300 )
  IN NS ns
ns IN A 10.10.60.1
printer IN A 10.10.60.50
gallifrey.xivo.vm IN A 10.10.60.5
gallifrey-dev.xivo.vm IN A 10.10.60.6
www IN CNAME gallifrey.xivo.vm
other IN A 10.10.60.9
"""
RICH_DHCPD = """\
# the farm's
authoritative;
option domain-name-servers 10.10.60.1, ns.example.org;
subnet 10.10.60.0 netmask 255.255.255.0 {
  option routers 10.10.60.1;
  range 10.10.60.200 10.10.60.220;
  group { # } in a comment
    host gallifrey { hardware ethernet 52:54:0:1:2:3; fixed-address 10.10.60.5; }
  }
}
host gallifrey-dev.xivo.vm.farm { hardware ethernet 52:54:86:B3:3F:10;
  fixed-address gallifrey-dev.xivo.vm.farm; option host-name "a; } b"; }
host other { hardware ethernet 52:54:00:00:00:09; fixed-address other.farm; }
host nobody { hardware ethernet 52:54:00:00:00:0a; }
"""


def files(tmp_path: Path, zone: str, dhcpd: str) -> tuple[Path, Path]:
    paths = tmp_path / "db.farm", tmp_path / "dhcpd.conf"
    for path, text in zip(paths, (zone, dhcpd), strict=True):
        path.write_text(text)
    return paths


def test_the_seeds_files(tmp_path: Path) -> None:
    out = tmp_path / "farm.yaml"
    network_import(*files(tmp_path, ZONE, DHCPD), name="xivo", out=out)
    farm = loads(out.read_bytes(), out)
    vm = farm.vms["gallifrey-dev"]
    assert (vm.mac, vm.address) == ("52:54:86:b3:3f:10", IPv4Address("10.10.60.6"))
    assert farm.qualified("gallifrey-dev") == "gallifrey-dev.xivo.vm.farm"
    bind = farm.services.get(Bind)
    assert bind is not None
    assert (bind.zone, bind.own) == ("farm", "block")
    assert str(farm.network.subnet) == "10.10.60.0/24"


def test_what_else_admins_have(tmp_path: Path) -> None:
    found = network_import(*files(tmp_path, RICH_ZONE, RICH_DHCPD))
    farm = loads(found.text.encode(), tmp_path / "farm.yaml")
    assert list(farm.vms) == ["gallifrey", "gallifrey-dev", "other"]
    assert farm.vms["gallifrey"].mac == "52:54:00:01:02:03"
    assert farm.vms["gallifrey"].aliases == ("www.farm",)
    assert farm.vms["other"].hostname == "other.farm"
    assert farm.network.gateway == IPv4Address("10.10.60.1")
    assert farm.network.pool == ("10.10.60.200-10.10.60.220",)
    assert farm.network.nameservers == (IPv4Address("10.10.60.1"),)
    left = "\n".join(found.left)
    assert "printer.farm A 10.10.60.50" in left
    assert "host nobody" in left and "no address" in left
    assert "authoritative" in left
    assert "printer" in found.text


def test_then_applied_beside_the_admins_lines(tmp_path: Path) -> None:
    """Blocks of ours in both files; every line of the admin's is as it was but the zone's serial."""
    from datetime import date

    from provision.allocate import Allocator
    from provision.network.changes import Examiner
    from provision.network.state import NetworkState
    from tests.identities import KATA

    zone, dhcpd = files(tmp_path, RICH_ZONE, RICH_DHCPD)
    found = network_import(zone, dhcpd)
    farm = loads(found.text.encode(), tmp_path / "farm.yaml")
    given = Allocator(farm, tmp_path / "l", tmp_path / "c").peek_all(farm.vms)
    examiner = Examiner(farm, KATA, NetworkState(), today=date(2026, 11, 21))
    changes = examiner.examine(given, ("bind", "dhcpd"))
    for change in changes.files:
        assert change.before is not None and change.after is not None
        kept = change.after.partition("; BEGIN" if change.zone else "# BEGIN")[0]
        assert kept == change.before.replace("2011072501", "2026112100")
    assert len(changes.files) == 2


BAD = {
    "host a {\n hardware ethernet 1;\n": "dhcpd.conf:1:1: a '{' that is never closed",
    "\n}\n": "dhcpd.conf:2:1: a '}' without its '{'",
}


@pytest.mark.parametrize("text", BAD, ids=repr)
def test_a_dhcpd_conf_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(InventoryError) as caught:
        network_import(*files(tmp_path, ZONE, text))
    assert str(caught.value).endswith(BAD[text])


def test_a_zone_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match=r"db\.farm:2:1: not a zone"):
        network_import(*files(tmp_path, "a IN A 10.0.0.1\nb IN A rubbish\n", DHCPD))


def test_refusals(tmp_path: Path) -> None:
    zone, dhcpd = files(tmp_path, ZONE, DHCPD)
    with pytest.raises(NotFound, match="no file"):
        network_import(tmp_path / "db.none", dhcpd)
    with pytest.raises(UsageError, match="which zone"):
        network_import(dhcpd, dhcpd)
    with pytest.raises(Conflict, match="is there already"):
        network_import(zone, dhcpd, out=zone)
    dhcpd.write_text("authoritative;\n")
    with pytest.raises(NotFound, match="no host with a MAC"):
        network_import(zone, dhcpd)


@pytest.mark.parametrize(
    ("zone", "dhcpd", "why"),
    [
        (RICH_ZONE + "$GENERATE 1-9999999999 h$ A 10.10.60.1\n", RICH_DHCPD, "more than 65536 records"),
        (RICH_ZONE + "$GENERATE 1-2 h${0,99999999,d} A 10.10.60.1\n", RICH_DHCPD, "more than 65536"),
        (RICH_ZONE, "group { " * 5000, "braces are open"),
        (RICH_ZONE, '\\"' * 300_000 + "{", "never closed"),
    ],
    ids=["many records", "wide numbers", "deep", "quotes"],
)
def test_what_would_take_for_ever_is_refused_at_its_line(
    tmp_path: Path, zone: str, dhcpd: str, why: str
) -> None:
    with pytest.raises((InventoryError, NotFound)) as refused:
        network_import(*files(tmp_path, zone, dhcpd))
    assert why in refused.value.message or "no host" in refused.value.message


def test_nothing_gets_out_of_its_line_in_the_farm_file(tmp_path: Path) -> None:
    """Names and values with ends of lines, and such as YAML reads otherwise."""
    evil = 'host "a\nEVIL: x" { hardware ethernet 52:54:00:00:00:0b; fixed-address 10.10.60.7; }\n'
    evil += 'host b { hardware ethernet "52:54:00:00:00:0c\nEVIL: x"; fixed-address 10.10.60.8; }\n'
    evil += (
        'subnet 10.10.60.0 netmask 255.255.255.0 { range 10.10.60.100 "x\nEVIL: x"; "o\nEVIL: x"; }\n'
    )
    zone = RICH_ZONE + "a]\\,EVIL IN CNAME gallifrey.xivo.vm\n"
    found = network_import(*files(tmp_path, zone, RICH_DHCPD + evil))
    assert not [line for line in found.text.splitlines() if line.lstrip().startswith("EVIL")]
    assert "a" not in found.vms and "b" not in found.vms
    farm = loads(found.text.encode(), tmp_path / "farm.yaml")
    assert set(farm.vms) == set(found.vms)
    for name in ("a\nEVIL: x", "a b", "../x"):
        with pytest.raises(UsageError, match="is no name"):
            network_import(*files(tmp_path, RICH_ZONE, RICH_DHCPD), name=name)
