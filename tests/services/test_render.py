"""What is rendered, as the daemons' own checkers and readers see it."""

from __future__ import annotations

import json
import subprocess
from operator import itemgetter
from pathlib import Path
from typing import Any

import dns.rdatatype
import dns.reversename
import dns.zone
import pytest
import yaml
from yard import Yard

from inventory.errors import CommandFailed, TemplateFailed
from provision.network.services import kea as kea_service

SERVICES = (
    "bind", "dhcpd", "kea", "dnsmasq", "hosts", "ssh_config", "nginx", "haproxy", "nftables",
    "shorewall", "ansible",
)  # fmt: skip


def output(*argv: str | Path) -> str:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=True)
    return done.stdout


def zone_of(yard: Yard, name: str, origin: str) -> dns.zone.Zone:
    """As BIND reads it."""
    path = yard.write("bind")[f"bind/db.{name}"]
    return dns.zone.from_text(output("named-compilezone", "-q", "-o", "-", origin, path), origin=origin)


@pytest.mark.parametrize("service", SERVICES)
def test_the_daemons_own_checker_accepts_it(yard: Yard, service: str) -> None:
    yard.check(service)


@pytest.mark.parametrize("service", ["dhcpd", "haproxy"])
def test_as_a_block_in_an_admins_file(yard: Yard, service: str) -> None:
    path = yard.write(service)["dhcp/dhcpd.conf" if service == "dhcpd" else "haproxy/haproxy.cfg"]
    theirs = "".join(line for line in path.read_text().splitlines(True) if "farmhand" not in line)
    keep = theirs.split("host " if service == "dhcpd" else "\tbind ")[0]
    path.write_text(keep.rstrip())  # without a line break at its end
    yard.services[service]["own"] = "block"
    yard.check(service)
    yard.write(service)
    assert path.read_text().startswith(keep.rstrip() + "\n# BEGIN farmhand try-it:")


def test_a_libvirt_network(yard: Yard) -> None:
    yard.network |= {"mode": "network", "network": "farm", "bridge": None}
    del yard.network["bridge"]
    yard.services = {"libvirt": {"config": str(yard.directory / "net.xml")}}
    yard.check("libvirt")
    text = yard.documents()["net.xml"].text
    assert '<host mac="52:54:86:b3:3f:10" name="dev2" ip="10.77.0.6"/>' in text


def test_forward_zone(yard: Yard) -> None:
    zone = zone_of(yard, "try.example", "try.example")
    assert zone.get_rdataset("dev2", "A").to_text().split()[-1] == "10.77.0.6"
    assert zone.get_rdataset("git", "A").to_text().split()[-1] == "10.77.0.6"
    assert zone.get_rdataset("dev2", "AAAA").to_text().split()[-1] == "fd77::6"
    assert zone.get_rdataset("ns", "A").to_text().split()[-1] == "10.77.0.1"


def test_reverse_zones(yard: Yard) -> None:
    four = zone_of(yard, "0.77.10.in-addr.arpa", "0.77.10.in-addr.arpa")
    assert four.get_rdataset("6", "PTR").to_text().split()[-1] == "dev2.try.example."
    origin = ".".join("0" * 12) + ".7.7.d.f.ip6.arpa"
    six = zone_of(yard, origin, origin)
    name = dns.reversename.from_address("fd77::6")
    assert six.get_rdataset(name, "PTR").to_text().split()[-1] == "dev2.try.example."


@pytest.mark.parametrize(
    ("subnet", "zones"),
    {
        "10.77.0.0/16": ["77.10.in-addr.arpa"],
        "10.77.0.0/22": [f"{n}.77.10.in-addr.arpa" for n in range(4)],
        "10.64.0.0/10": [f"{n}.10.in-addr.arpa" for n in range(64, 128)],
        "10.77.0.0/25": ["0/25.0.77.10.in-addr.arpa"],
        "10.0.0.0/8": ["10.in-addr.arpa"],
    }.items(),
)
def test_reverse_zones_of_any_subnet(yard: Yard, subnet: str, zones: list[str]) -> None:
    yard.network["subnet"] = subnet
    yard.network["pool"] = []
    del yard.network["subnet6"]
    reverse = [d for d in yard.documents("bind").values() if "in-addr" in d.zone]
    assert [d.zone for d in reverse] == zones
    pointers = [line for d in reverse for line in d.text.splitlines() if "PTR" in line]
    assert len(pointers) == 2
    yard.check("bind")


def test_classless_delegation_resolves(yard: Yard) -> None:
    """RFC 2317: the parent's CNAME leads into our zone."""
    parent = yard.directory / "bind" / "db.parent"
    head = "$TTL 3600\n@ IN SOA ns.x. h.x. ( 7 3600 600 604800 300 )\n@ IN NS ns.x.\n5 IN PTR mine.x.\n"
    parent.write_text(head)
    yard.network |= {"subnet": "10.77.0.0/25", "pool": []}
    yard.services["bind"]["parent"] = str(parent)
    yard.write("bind")
    assert parent.read_text().startswith(head)
    text = output("named-compilezone", "-q", "-o", "-", "0.77.10.in-addr.arpa", parent)
    above = dns.zone.from_text(text, origin="0.77.10.in-addr.arpa")
    assert above.get_rdataset("6", "CNAME").to_text().split()[-1] == "6.0/25"
    ours = zone_of(yard, "0-25.0.77.10.in-addr.arpa", "0/25.0.77.10.in-addr.arpa")
    assert ours.get_rdataset("6", "PTR").to_text().split()[-1] == "dev2.try.example."


def test_kea_reads_the_values_back(yard: Yard) -> None:
    kea: Any = kea_service.configuration(yard.write("kea")["kea/kea4.conf"])
    [subnet] = kea["Dhcp4"]["subnet4"]
    first, second = sorted(subnet["reservations"], key=itemgetter("hostname"))
    assert first["user-context"]["description"] == yard.vms["dev2"]["description"]
    assert (first["ip-address"], first["hw-address"]) == ("10.77.0.6", "525486b33f10")
    assert second["hostname"] == "prod"


def test_ansible_reads_the_values_back(yard: Yard) -> None:
    path = yard.write("ansible")["ansible.yaml"]
    hosts = json.loads(output("ansible-inventory", "-i", path, "--list", "--export"))
    variables = hosts["_meta"]["hostvars"]["dev2.try.example"]
    assert variables["ansible_host"] == "10.77.0.6"
    said = variables["description"]
    assert said == {"__ansible_unsafe": yard.vms["dev2"]["description"]} or (
        said == yard.vms["dev2"]["description"]
    )


def test_ssh_reads_the_values_back(yard: Yard) -> None:
    path = yard.write("ssh_config")["ssh_config"]
    for name in ("dev2", "git", "dev2.try.example", "try-it-dev2"):
        lines = output("ssh", "-G", "-F", path, name).splitlines()
        assert "hostname 10.77.0.6" in lines
        assert "hostkeyalias try-it-dev2" in lines
        assert "serveraliveinterval 5" in lines  # a VM that is reset doesn't say goodbye


def test_ssh_asks_about_a_vms_unknown_key_whatever_the_host_does(yard: Yard) -> None:
    path = yard.write("ssh_config")["ssh_config"]
    with Path(path).open("a") as file:
        file.write("Host *\n\tStrictHostKeyChecking accept-new\n")
    assert "stricthostkeychecking ask" in output("ssh", "-G", "-F", path, "dev2").splitlines()
    assert "stricthostkeychecking accept-new" in output("ssh", "-G", "-F", path, "other").splitlines()


def test_hosts_block(yard: Yard) -> None:
    path = yard.directory / "hosts"
    path.write_bytes(b"127.0.0.1 localhost # caf\xe9")
    document = yard.documents("hosts")["hosts"]
    from provision.network.document import embed

    text = embed(document, yard.identity, path.read_bytes().decode(errors="surrogateescape"))
    assert text.encode(errors="surrogateescape").startswith(b"127.0.0.1 localhost # caf\xe9\n# BEGIN")
    assert "10.77.0.6 dev2.try.example git.try.example dev2 git\n" in text


def test_rendering_is_pure(yard: Yard) -> None:
    assert yard.documents() == yard.documents()


def test_a_name_taken_out_and_put_in_leaves_the_rest(yard: Yard) -> None:
    """One VM more: nobody else's line moves."""
    before = yard.documents("bind")["bind/db.try.example"].text.splitlines()
    yard.vms["more"] = {}
    after = yard.documents("bind")["bind/db.try.example"].text.splitlines()
    assert [line for line in after if line not in before] == [
        "more.try.example. 3600 IN A 10.77.0.2",
        "more.try.example. 3600 IN AAAA fd77::2",
    ]
    assert [line for line in before if line not in after] == []


# ---- Templates of the admin's own.


def own(yard: Yard, name: str, text: str) -> Path:
    directory = yard.directory / "templates"
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    yard.services["templates"] = str(directory)
    return directory / name


def test_an_own_template_is_used_instead(yard: Yard) -> None:
    own(yard, "hosts.j2", "{% for vm in net.vms %}{{ vm.address }} only-{{ vm.vm }}\n{% endfor %}")
    assert yard.documents("hosts")["hosts"].text == "10.77.0.6 only-dev2\n10.77.0.7 only-prod\n"


def test_an_own_template_around_ours(yard: Yard) -> None:
    own(yard, "hosts.j2", '10.77.0.250 printer\n{% include "farmhand/hosts.j2" %}')
    text = yard.documents("hosts")["hosts"].text
    assert text.startswith("10.77.0.250 printer\n10.77.0.6 dev2.try.example")


BROKEN = {
    "{{ net.hots }}": "has no attribute 'hots'",
    "{% for vm in net.vms %}{{ vm.adress }}{% endfor %}": "has no attribute 'adress'",
    "{% for vm in net.vms %}": "Unexpected end of template",
    "{{ net.vms }}": "a tuple can't be written as it is: name one of its parts, or use a filter",
    "{{ net.vms[0].description }}": "is not a plain word: write it with | string or | comment",
    "{{ net.vms[0].description | string }}": "this format has no quoted strings",
    "{{ 1 / 0 }}": "division by zero",
    '{% include "none.j2" %}': "there is no template none.j2",
    "{{ net.vms[0].address | safe }}": "No filter named 'safe'.",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_template_error_shows_where(yard: Yard, line: str) -> None:
    path = own(yard, "hosts.j2", f"# one\n# two\n{line}\n# four\n")
    with pytest.raises(TemplateFailed) as caught:
        yard.documents("hosts")
    assert BROKEN[line] in caught.value.message
    if "include" not in line:
        number = int(caught.value.message.removeprefix(f"{path}:").split(":")[0])
        assert number in (3, 4)
        assert f">    {number} | " in caught.value.detail
        assert "     2 | # two" in caught.value.detail


@pytest.mark.parametrize(
    ("service", "template"),
    {
        "bind": "zone",
        "dhcpd": "dhcpd",
        "kea": "kea4",
        "dnsmasq": "dnsmasq",
        "nginx": "nginx",
        "haproxy": "haproxy",
        "nftables": "nftables",
        "shorewall": "shorewall-rules",
        "ssh_config": "ssh_config",
    }.items(),
)
def test_the_checker_refuses_what_a_template_spoils(yard: Yard, service: str, template: str) -> None:
    own(yard, f"{template}.j2", f'{{% include "farmhand/{template}.j2" %}}\n}} rubbish ( here ;\n')
    with pytest.raises(CommandFailed, match="refuses"):
        yard.check(service)
    for path in yard.documents(service).values():
        assert not Path(path.path).exists() or service == "shorewall", "nothing live was written"


def test_a_directory_of_templates_that_is_not_there(yard: Yard) -> None:
    yard.services["templates"] = "/nowhere/templates"
    with pytest.raises(TemplateFailed, match="there is no directory /nowhere/templates"):
        yard.documents("hosts")


def test_the_farm_file_is_yaml_as_others_read_it(yard: Yard) -> None:
    assert yaml.safe_load(yard.text())["services"]["bind"]["port"] == "5300"
