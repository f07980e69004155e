"""network-import: the seed's own files, and what admins have beside."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from inventory.errors import Conflict, FarmhandError, InventoryError, NotFound, UsageError
from inventory.loader import loads
from provision.network.importing import Imported, network_import
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
    (bind,) = (one for one in farm.services.sections if isinstance(one, Bind))
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
    zone, dhcpd = files(tmp_path, RICH_ZONE, RICH_DHCPD)
    found = network_import(zone, dhcpd)
    before = {path: path.read_text() for path in (zone, dhcpd)}
    apply(found, tmp_path)
    for path, text in before.items():
        kept = path.read_text().partition("; BEGIN" if path == zone else "# BEGIN")[0]
        assert kept == text.replace("2011072501", "2026112100")


def apply(found: Imported, tmp_path: Path) -> None:
    """As network-apply writes the two files."""
    from datetime import date

    from provision.allocate import Allocator
    from provision.network.changes import Examiner
    from provision.network.state import NetworkState
    from tests.identities import KATA

    farm = loads(found.text.encode(), tmp_path / "farm.yaml")
    given = Allocator(farm, tmp_path / "l", tmp_path / "c").peek_all(farm.vms)
    examiner = Examiner(farm, KATA, NetworkState(), today=date(2026, 11, 21))
    changes = examiner.examine(given, ("bind", "dhcpd"))
    assert len(changes.files) == 2
    for change in changes.files:
        assert change.after is not None
        Path(change.path).write_text(change.after)


# ---- Nothing vanishes

SHARED_ZONE = """\
$TTL 1D
@\tIN\tSOA\tns1 admin ( 1 1H 15M 1W 1D )
\tNS\tns1
@\tA\t10.1.0.50
ns1\tA\t10.1.0.1
www\tA\t10.1.0.50
web\t300 A\t10.1.0.50
\tMX\t10 mail
zabbix\tA\t10.1.0.50
under_score A 10.1.0.50
ftp CNAME www
db\tA\t10.1.0.51
\tA\t10.1.0.52
mail.other. A 10.1.0.50
gone CNAME nowhere.example.
$GENERATE 60-61 h$ A 10.1.0.$
smtp CNAME web
"""
SHARED_DHCPD = """\
option domain-name-servers 10.1.0.1;
key omapi { algorithm hmac-md5; secret "c2VjcmV0"; };
subnet 10.1.0.0 netmask 255.255.255.0 {
  option routers 10.1.0.1, 10.1.0.2;
  range 10.1.0.100 10.1.0.149;
}
subnet 10.2.0.0 netmask 255.255.255.0 { option routers 10.2.0.1; }
host Web { hardware ethernet 02:00:00:00:00:50; fixed-address 10.1.0.50; option host-name "web"; }
group {
  filename "installer/pxelinux.0";
  on commit { execute("/usr/local/sbin/hook", host-decl-name); }
  host w00 { hardware ethernet 02:b2:c3:d4:e5:03; fixed-address 10.1.0.60; next-server 10.1.0.9; }
}
host db { hardware ethernet 02:00:00:00:00:51; fixed-address db; option root-path "10.1.0.9:/db"; }
host inside { hardware ethernet 02:00:00:00:00:52; fixed-address 10.1.0.120; }
host away { hardware ethernet 02:00:00:00:00:53; fixed-address 10.2.0.9; }
host again { hardware ethernet 02:00:00:00:00:50; fixed-address 10.1.0.70; }
host router { hardware ethernet 02:00:00:00:00:54; fixed-address 10.1.0.1; }
host far { hardware ethernet 02:00:00:00:00:55; fixed-address 999.1.1.1; }
host elsewhere { hardware ethernet 02:00:00:00:00:56; fixed-address not.there; }
host many { hardware ethernet 03:00:00:00:00:57; fixed-address 10.1.0.71; }
host zabbix { hardware ethernet 02:00:00:00:00:58; fixed-address 10.1.0.72; }
"""
LEFT = {
    "db:5": "ns1.lab.example A 10.1.0.1",
    "db:7": "web.lab.example: its TTL is 86400, as most have it, and not 300",
    "db:8": "web.lab.example MX 10 mail.lab.example.",
    "db:10": "under_score.lab.example A 10.1.0.50: VM web's address, but no name that a farm file can "
    "say",
    "db:13": "db.lab.example A 10.1.0.52",
    "db:14": "mail.other A 10.1.0.50: outside of lab.example",
    "db:15": "gone.lab.example CNAME nowhere.example",
    "db:16": "2 records, the last of h61.lab.example, the first h60.lab.example A 10.1.0.60",
    "db:17": "smtp.lab.example CNAME web.lab.example: that has more than VM web's address",
    "dhcpd:2": "key omapi { ... }",
    "dhcpd:4": "option routers 10.1.0.1, 10.1.0.2: a farm has one gateway, 10.1.0.1",
    "dhcpd:7": "option routers 10.2.0.1 (in subnet 10.2.0.0 netmask 255.255.255.0)",
    "dhcpd:8": "host Web: it is VM web here, web.lab.example",
    "dhcpd:10": 'filename "installer/pxelinux.0" (in group)',
    "dhcpd:11": "on commit { ... } (in group)",
    "dhcpd:12": "host w00: next-server 10.1.0.9",
    "dhcpd:14": "host db: a VM has one address, 10.1.0.51, and not 10.1.0.52; "
    'option root-path "10.1.0.9:/db"',
    "dhcpd:15": "host inside: its address has no name in the zone: it gets inside.lab.example",
    "dhcpd:16": "host away: 10.2.0.9 is outside of 10.1.0.0/24: a farm has one subnet",
    "dhcpd:17": "host again: 02:00:00:00:00:50 is taken: VM web has it",
    "dhcpd:18": "host router: 10.1.0.1 is the gateway's address",
    "dhcpd:19": "host far: Octet 999 (> 255) not permitted in '999.1.1.1'",
    "dhcpd:20": "host elsewhere: no address of 'not.there' is in the zone",
    "dhcpd:21": "host many: 03:00:00:00:00:57 is a multicast address; a machine's own has an even "
    "first pair",
    "dhcpd:22": "host zabbix: 10.1.0.72 has no name in the zone, and zabbix.lab.example leads elsewhere",
}


def shared(tmp_path: Path) -> tuple[Path, Path]:
    zone, dhcpd = tmp_path / "db.lab.example", tmp_path / "dhcpd.conf"
    zone.write_text(SHARED_ZONE)
    dhcpd.write_text(SHARED_DHCPD)
    return zone, dhcpd


def test_what_is_taken_over(tmp_path: Path) -> None:
    found = network_import(*shared(tmp_path))
    farm = loads(found.text.encode(), tmp_path / "farm.yaml")
    assert list(farm.vms) == ["web", "w00", "db", "inside"]
    assert [farm.qualified(farm.hostname_of(vm)) for vm in farm.vms] == [
        "web.lab.example", "h60.lab.example", "db.lab.example", "inside.lab.example",
    ]  # fmt: skip
    aliases = ("lab.example", "www.lab.example", "zabbix.lab.example", "ftp.lab.example")
    assert farm.vms["web"].aliases == aliases
    assert farm.network.nameservers == (IPv4Address("10.1.0.1"),)
    assert farm.network.pool == ("10.1.0.100-10.1.0.119", "10.1.0.121-10.1.0.149")
    assert farm.network.reserved == ("10.1.0.1", "10.1.0.52", "10.1.0.61", "10.1.0.70-10.1.0.72")
    (bind,) = (one for one in farm.services.sections if isinstance(one, Bind))
    assert bind.ttl == 86400


@pytest.mark.parametrize("place", LEFT)
def test_what_is_not_is_named_with_its_line(tmp_path: Path, place: str) -> None:
    zone, dhcpd = shared(tmp_path)
    found = network_import(zone, dhcpd)
    file, line = place.split(":")
    entry = f"{zone if file == 'db' else dhcpd}:{line}: {LEFT[place]}"
    assert entry in found.left
    assert f"#   {entry}\n" in found.text


def test_nothing_else_is_named_and_no_secret(tmp_path: Path) -> None:
    found = network_import(*shared(tmp_path))
    more = {"MX has its name, web.lab.example, from line 7", "subnet 10.2.0.0", "A has its name, db"}
    assert len(found.left) == len(LEFT) + len(more)
    assert all(any(words in left for left in found.left) for words in more)
    assert "c2VjcmV0" not in found.text


# What the zone says, with the lines taken out that the farm file names, and its block put in.
BESIDE = {
    "shared": (SHARED_ZONE, SHARED_DHCPD),
    "a name with other records": (
        "$TTL 60\n@ SOA ns a 1 2 3 4 5\n@ NS ns\nns A 10.1.0.1\nc CNAME web\nweb TXT x\n",
        "host web { hardware ethernet 02:00:00:00:00:01; fixed-address 10.1.0.5; }\n",
    ),
    "blank owners": (
        "$TTL 60\n@ SOA ns a 1 2 3 4 5\n@ A 10.1.0.5\n NS ns\n NS b\n"
        "ns A 10.1.0.1\nb A 10.1.0.6\n TXT x\n",
        "host a { hardware ethernet 02:00:00:00:00:01; fixed-address 10.1.0.5; }\n"
        "host b { hardware ethernet 02:00:00:00:00:02; fixed-address b; }\n",
    ),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_the_zone_answers_as_before(tmp_path: Path, kind: str) -> None:
    """By BIND's own reading; and dhcpd takes its file."""
    zone, dhcpd = tmp_path / "db.lab.example", tmp_path / "dhcpd.conf"
    zone.write_text(BESIDE[kind][0])
    subnet = "subnet 10.1.0.0 netmask 255.255.255.0 {}\n" if "subnet" not in BESIDE[kind][1] else ""
    # A zone may not have what is outside of it, nor bad names; dhcpd looks names up where it is.
    dhcpd.write_text(re.sub("host (db|elsewhere|far) .*\n", "", BESIDE[kind][1]) + subnet)
    zone.write_text(re.sub("(mail.other|under_score).*\n", "", zone.read_text()))
    as_before(zone, network_import(zone, dhcpd))
    done = subprocess.run(
        ["dhcpd", "-t", "-4", "-cf", dhcpd], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def as_before(zone: Path, found: Imported) -> None:
    """Do what the comments say, write the blocks: the zone's answers are the same, or it was told."""
    before = answers(zone)
    assert before is not None
    for left in found.left:
        if match := re.search(r":(\d+): \w+ has its name, (\S+), from line", left):
            begin(zone, int(match[1]), f"{match[2]}.")
    for place in places("\n".join(own_lines(found))):
        path, _, line = place.rpartition(":")
        begin(Path(path), int(line), ";" if Path(path) == zone else "#")
    apply(found, zone.parent)
    after = answers(zone)
    assert after is not None, (zone.read_text(), found.text)
    told = re.findall(r"in the zone: it gets ([^;\s]+)", found.text)
    gained = {record for name in told for record in after[f"{name}."]}
    for name in {*before, *after}:
        had, has = before.get(name, set()), after.get(name, set())
        if all(" " in record for record in had):  # no CNAME record that leads nowhere
            assert had <= has <= had | gained, (name, zone.read_text(), found.text)


def own_lines(found: Imported) -> list[str]:
    return re.findall(r"# your lines: (.*)", found.text)


def begin(path: Path, line: int, text: str) -> None:
    """The line begins with that, too."""
    lines = path.read_text().splitlines()
    lines[line - 1] = text + lines[line - 1]
    path.write_text("".join(f"{text}\n" for text in lines))


def answers(zone: Path) -> Mapping[str, set[str]] | None:
    """What BIND has of each name: its addresses and other records, or those of the name that a CNAME
    record leads to. None: it doesn't take the zone."""
    done = subprocess.run(
        ["named-compilezone", "-i", "none", "-o", "-", "lab.example", zone],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return None
    found: dict[str, set[str]] = {}
    targets = {}
    for line in done.stdout.splitlines():
        name, _, _, kind, *value = line.split()
        if kind == "CNAME":
            targets[name] = value[0]
        elif kind != "SOA":
            found.setdefault(name, set()).add(f"{kind} {' '.join(value)}")
    for name, target in targets.items():
        found[name] = found.get(targets.get(target, target), {target})
    return found


# ---- Included files


def test_included_files_are_read(tmp_path: Path) -> None:
    """Origin and owner are afterwards as before (RFC 1035); relative names begin at the first file."""
    (tmp_path / "more").mkdir()
    zone, dhcpd = tmp_path / "db.lab.example", tmp_path / "dhcpd.conf"
    zone.write_text(
        "$ORIGIN x.lab.example.\na A 10.1.0.1\n$INCLUDE more/in.zone build ; words\n A 10.1.0.2\n"
        "b A 10.1.0.3\n$include more/in.zone\n"
    )
    (tmp_path / "more" / "in.zone").write_text("c A 10.1.0.4\n$ORIGIN y\nd A 10.1.0.5\n")
    dhcpd.write_text('group {\n include "more/hosts.conf";\n}\ninclude "more/last.conf";\n')
    (tmp_path / "more" / "hosts.conf").write_text(
        "host c { hardware ethernet 02:00:00:00:00:01; fixed-address 10.1.0.4; }\nfilename x;\n"
    )
    (tmp_path / "more" / "last.conf").write_text(
        "host d { hardware ethernet 02:00:00:00:00:02; fixed-address 10.1.0.5; }\n"
    )
    found = network_import(zone, dhcpd)
    farm = loads(found.text.encode(), tmp_path / "farm.yaml")
    names = {farm.qualified(farm.hostname_of(vm)): farm.vms[vm].aliases for vm in farm.vms}
    assert names == {
        "c.build.x.lab.example": ("c.x.lab.example",),
        "d.y.build.x.lab.example": ("d.y.x.lab.example",),
    }
    assert f"{zone}:4: a.x.lab.example A 10.1.0.2" in found.left
    assert f"{tmp_path}/more/hosts.conf:2: filename x (in group)" in found.left
    assert f"{tmp_path}/more/in.zone" in found.text.splitlines()[0]
    assert own_lines(found)[1] == f"{tmp_path}/more/last.conf:1; {tmp_path}/more/in.zone:3"


def test_included_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    zone, dhcpd = files(tmp_path, f"{ZONE}$INCLUDE no.zone\n", f'{DHCPD}include "{tmp_path}/no.conf";\n')
    left = network_import(zone, dhcpd).left
    places = f"{tmp_path}/no.zone or /var/cache/bind/no.zone"
    assert f"{zone}:2: include of no.zone: no file {places}: copy it there, and import again" in left
    assert any(f"{dhcpd}:6: include of {tmp_path}/no.conf: no file" in words for words in left)


def includes(tmp_path: Path, name: str) -> tuple[Path, Path, Path]:
    """A zone and a dhcpd.conf that include a file of that name; it."""
    zone, dhcpd = tmp_path / "db.farm", tmp_path / "dhcpd.conf"
    zone.write_text(f"{ZONE}$INCLUDE {name}\n")
    dhcpd.write_text(f'{DHCPD}include "{name}";\n')
    return zone, dhcpd, tmp_path / name


@pytest.mark.parametrize("which", ["zone", "dhcpd"])
@pytest.mark.parametrize("kind", ["loop", "far loop", "fifo", "device", "directory", "large", "nul"])
def test_included_files_that_cannot_be(tmp_path: Path, which: str, kind: str) -> None:
    name = "/dev/zero" if kind == "device" else "inner"
    zone, dhcpd, inner = includes(tmp_path, name)
    match kind:
        case "loop":
            inner.symlink_to(zone if which == "zone" else dhcpd)
            why = "is included by itself"
        case "far loop":
            inner.write_text("$INCLUDE other" if which == "zone" else 'include "other";')
            (tmp_path / "other").write_text("$INCLUDE inner" if which == "zone" else 'include "inner";')
            why = "is included by itself"
        case "fifo":
            os.mkfifo(inner)
            why = "is not a regular file"
        case "directory":
            inner.mkdir()
            why = "is not a regular file"
        case "device":
            why = "is not a regular file"
        case "large":
            with inner.open("w") as file:
                file.truncate(1 << 40)
            why = "more than 4 MiB to read"
        case _:
            inner.write_bytes(b"; words\n\0")
            why = f"{inner}:2:1: a NUL: this is not a text file"
    (dhcpd if which == "zone" else zone).write_text(DHCPD if which == "zone" else ZONE)
    with pytest.raises(InventoryError, match=re.escape(why)):
        network_import(zone, dhcpd)


def test_files_that_include_one_another_for_ever(tmp_path: Path) -> None:
    """Each twice: two to the power of their number."""
    zone, dhcpd, inner = includes(tmp_path, "0")
    for number in range(19):
        (tmp_path / f"{number}").write_text(f"$INCLUDE {number + 1}\n" * 2)
    (tmp_path / "19").write_text("")
    dhcpd.write_text(DHCPD)
    assert inner.exists()
    with pytest.raises(InventoryError, match=r"more than 20 deep|more than 4 MiB"):
        network_import(zone, dhcpd)


# ---- What is hostile

HOSTILE = {
    "far too many": (ZONE + "$GENERATE 1-100000000 h$ A 10.0.0.7\n", DHCPD, "db.farm:2:1: .*more than"),
    "much text": (ZONE + f"$GENERATE 1-60000 h$ TXT {'a' * 250}\n", DHCPD, "db.farm:2:1: .*more than"),
    "wide numbers": (
        ZONE + "$GENERATE 1-2 h${0,99999999,d} A 10.0.0.7\n",
        DHCPD,
        "db.farm:2:1: .*width",
    ),
    "one name's": (ZONE + "$GENERATE 1-60000 h A 10.0.${0}.7\n", DHCPD, "db.farm:2:1"),
    "brackets": (ZONE + "a TXT " + "(" * 50000, DHCPD, "db.farm:2:1: .*unbalanced"),
    "no address": (ZONE + "b A 999.1.1.1\n", DHCPD, "db.farm:2:1: not a zone: 'b A 999.1.1.1'"),
    "no ASCII": (ZONE + "für A 10.0.0.1\n", DHCPD, "db.farm:2:1: not a zone: .*xn--"),
    "NUL": (ZONE + "b A 10.0.0.1\0\n", DHCPD, "db.farm:2:1: a NUL"),
    "deep": (
        ZONE,
        "group {" * 5000 + DHCPD + "}" * 5000,
        "dhcpd.conf:1:1: more than 50 braces are open",
    ),
    "empty blocks": (ZONE, DHCPD + "{}" * 200000, "dhcpd.conf:6:1: .*more than 100000 statements"),
    "quotes": (ZONE, '\\"' * 300000 + "{", "never closed"),
    "an open quote": (ZONE, DHCPD + 'filename "x;\n', "dhcpd.conf:6:1: .*never closed"),
    "no semicolon": (ZONE, "group { filename x }\n", "dhcpd.conf:1:1: 'filename x' has no ';'"),
    "no end": (ZONE, DHCPD + "\nauthoritative\n", "dhcpd.conf:7:1: 'authoritative' has no ';'"),
    "large": (ZONE, "# words\n" * 600000, "more than 4 MiB to read"),
    "hosts": (ZONE, "host a {}\n" * 20001, "dhcpd.conf:20001:1: .*more than 20000 hosts"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_would_take_for_ever_is_refused_at_its_line(tmp_path: Path, kind: str) -> None:
    zone, dhcpd, why = HOSTILE[kind]
    with pytest.raises(InventoryError, match=why):
        network_import(*files(tmp_path, zone, dhcpd))


def test_bytes_that_are_no_utf8_are_of_no_matter_in_words(tmp_path: Path) -> None:
    zone, dhcpd = files(tmp_path, "", "")
    zone.write_bytes(b"; f\xfcr\n" + ZONE.encode() + b'b TXT "\xfc"\n')
    dhcpd.write_bytes(b"# f\xfcr\n" + DHCPD.encode())
    assert network_import(zone, dhcpd).vms == ("gallifrey-dev",)


def test_nothing_gets_out_of_its_line_in_the_farm_file(tmp_path: Path) -> None:
    """Names and values with ends of lines, and such as YAML reads otherwise."""
    evil = 'host "a\nEVIL: x" { hardware ethernet 52:54:00:00:00:0b; fixed-address 10.10.60.7; }\n'
    evil += 'host b { hardware ethernet "52:54:00:00:00:0c\nEVIL: x"; fixed-address 10.10.60.8; }\n'
    evil += "host c { hardware ethernet 52:54:00:00:00:0d; fixed-address 10.10.60.11; "
    evil += 'x "\x1b\n\u2028EVIL: x"; }\n'
    evil += (
        'subnet 10.10.60.0 netmask 255.255.255.0 { range 10.10.60.100 "x\nEVIL: x"; "o\nEVIL: x"; }\n'
    )
    evil += 'include "no\nEVIL: x";\n'
    zone = RICH_ZONE + "a]\\,EVIL IN CNAME gallifrey.xivo.vm\n"
    (tmp_path / "a: b\nEVIL: x").mkdir()
    found = network_import(*files(tmp_path / "a: b\nEVIL: x", zone, RICH_DHCPD + evil))
    assert not [line for line in found.text.splitlines() if line.lstrip().startswith("EVIL")]
    assert set(loads(found.text.encode(), tmp_path / "farm.yaml").vms) == set(found.vms)
    assert found.vms == ("gallifrey", "gallifrey-dev", "other", "c")


# ---- Whatever is imported loads, and names each line

LABELS = ["a", "b", "web", "www", "12", "x_y", "Web", "*", "a.b", "-", "very-" + "l" * 55, "ß"]
NAMES = [*LABELS, "@", "lab.example.", "web.lab.example.", "other.", "a.b.lab.example.", "lab.example"]
ADDRESSES = ["10.1.0.0", "10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.255", "10.2.0.1", "10.1.0.77"]
MACS = ["2:0:0:0:0:1", "02:00:00:00:00:02", "02:00:00:00:00:03", "01:00:00:00:00:03", "0:0:0:0:0:0", "x"]
SUBNETS = [
    "10.1.0.0 netmask 255.255.255.0", "10.1.0.0 netmask 255.255.0.0", "10.1.0.2 netmask 255.255.255.254",
    "10.2.0.0 netmask 255.255.255.0", "10.1.0.0 netmask 255.255.255.252", "10.1.0.9 netmask 255.0.0.0",
]  # fmt: skip
_name, _address = st.sampled_from(NAMES), st.sampled_from(ADDRESSES)
_record = st.one_of(
    st.builds("{} A {}".format, _name, _address),
    st.builds("{} A {}".format, _name, _address),
    st.builds(" {} A {}".format, st.sampled_from(["", "60", "0"]), _address),
    st.builds("{} {} A {}".format, _name, st.sampled_from(["0", "300", "1W", "9999999"]), _address),
    st.builds("{} CNAME {}".format, _name, _name),
    st.builds("{} MX 10 {}".format, _name, _name),
    st.builds("$ORIGIN {}".format, _name),
    st.builds("$GENERATE 1-3 {} A 10.1.0.$".format, st.sampled_from(["a$", "a", "*", "$", "@"])),
)
_statement = st.one_of(
    st.builds("option routers {};".format, st.one_of(_address, _name)),
    st.builds("option domain-name-servers {}, {};".format, _address, st.one_of(_address, _name)),
    st.builds("range {} {};".format, _address, _address),
    st.builds("default-lease-time {};".format, st.sampled_from(["1", "600", "99999999", "x"])),
    st.sampled_from(['filename "a\tb";', "authoritative;", "key k { secret x; }", ";"]),
)
_host = st.builds(
    "host {} {{ {}; {} {} }}".format,
    st.one_of(st.sampled_from(LABELS), st.sampled_from(["web.lab.example", "a.other", '"a b"', ""])),
    st.builds("hardware ethernet {}".format, st.sampled_from(MACS)),
    st.one_of(
        st.just(""),
        st.builds("fixed-address {};".format, st.one_of(_address, _name, st.just("999.1.1.1"))),
        st.builds("fixed-address {}, {};".format, _address, st.one_of(_address, _name)),
    ),
    st.one_of(
        st.just(""), st.builds("option {} {};".format, st.sampled_from(["host-name", "x"]), _name)
    ),
)
_plain = st.one_of(_host, _host, _statement)
_block = st.builds(
    "{} {{\n{}\n}}".format,
    st.one_of(
        st.just("group"), st.just("shared-network s"), st.sampled_from([f"subnet {s}" for s in SUBNETS])
    ),
    st.lists(_plain, max_size=4).map("\n".join),
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    zone=st.lists(_record, max_size=10).map("\n".join),
    dhcpd=st.lists(st.one_of(_plain, _block), min_size=1, max_size=8).map("\n".join),
    name=st.sampled_from(["farm", "f" * 60, "12"]),
)
def test_whatever_is_imported_loads(tmp_path: Path, zone: str, dhcpd: str, name: str) -> None:
    first, second = tmp_path / "db.lab.example", tmp_path / "dhcpd.conf"
    first.write_text(zone)
    second.write_text(dhcpd)
    try:
        found = network_import(first, second, name=name)
    except FarmhandError:
        return
    farm = loads(found.text.encode(), tmp_path / "farm.yaml")
    assert tuple(farm.vms) == found.vms
    named = places("\n".join(found.left))
    taken = places("\n".join(own_lines(found)))
    for number, line in enumerate(zone.splitlines(), 1):
        assert line.startswith("$O") or f"{first}:{number}" in named | taken, (line, found.text)
    silent = []
    for number, line in enumerate(dhcpd.splitlines(), 1):
        place = f"{second}:{number}"
        if line.startswith("host") and place in taken and "option x" in line:
            assert any(left.startswith(place) and "option x" in left for left in found.left)
        elif place not in named | taken:
            silent.append(line)
    assert all(re.match("option|range|default|group|subnet|[;}]|$", line) for line in silent), found.text
    for start in ("option routers", "option domain-name-servers", "default-lease-time"):
        assert sum(line.startswith(start) for line in silent) <= 1, found.text


_host_of_zone = st.builds(
    "host {} {{ hardware ethernet 2:0:0:0:0:{}; fixed-address {}; }}".format,
    st.sampled_from(["a", "b", "web", "w.x", "h2"]),
    st.integers(1, 9),
    st.one_of(_address, st.sampled_from(["a", "b", "web", "h2"])),
)
_record_of_zone = st.one_of(
    st.builds("{} A {}".format, st.sampled_from(["a", "b", "web", "*", "a.b", "@", "12"]), _address),
    st.builds(
        "{} CNAME {}".format, st.sampled_from(["c", "d", "b"]), st.sampled_from(["a", "web", "c"])
    ),
    st.builds(" {} {}".format, st.sampled_from(["60 A", "A"]), _address),
    st.builds("{} TXT x".format, st.sampled_from(["", "web", "a"])),
    st.builds("$ORIGIN {}".format, st.sampled_from(["s", "lab.example.", "web"])),
    st.builds("$GENERATE 1-3 {} A 10.1.0.$".format, st.sampled_from(["h$", "b"])),
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much,
    ],
)  # fmt: skip
@given(
    records=st.lists(_record_of_zone, min_size=2, max_size=9).map("\n".join),
    hosts=st.lists(_host_of_zone, min_size=1, max_size=4).map("\n".join),
)
def test_any_zone_answers_as_before(tmp_path: Path, records: str, hosts: str) -> None:
    zone, dhcpd = tmp_path / "db.lab.example", tmp_path / "dhcpd.conf"
    zone.write_text(f"$TTL 60\n@ SOA ns a 1 2 3 4 5\n@ NS ns.other.\n{records}\n")
    dhcpd.write_text(f"subnet 10.1.0.0 netmask 255.255.255.0 {{}}\n{hosts}\n")
    assume(answers(zone))
    try:
        found = network_import(zone, dhcpd)
    except FarmhandError:
        reject()
    as_before(zone, found)


def places(text: str) -> set[str]:
    """FILE:LINE of each that is named as FILE:LINE or FILE:LINE, LINE."""
    found = re.findall(r"([^\s;]+?):((?:\d+, )*\d+)\b", text)
    return {f"{path}:{line}" for path, lines in found for line in lines.split(", ")}


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
    for name in ("a\nEVIL: x", "a b", "../x", ""):
        with pytest.raises(UsageError, match=r"--name: .* is not a host name label"):
            network_import(zone, dhcpd, name=name)
        if name:
            with pytest.raises(UsageError, match=r"--origin: .* is not a host name label"):
                network_import(zone, dhcpd, origin=name)
    dhcpd.write_text("authoritative;\n")
    with pytest.raises(NotFound, match="no host with a MAC"):
        network_import(zone, dhcpd)
