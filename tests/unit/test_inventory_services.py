# ruff: noqa: E501 - messages as they are shown, each on its line
"""The network services in a farm file: defaults, and what is refused with its place."""

from pathlib import Path

import pytest

from inventory.errors import InventoryError
from inventory.loader import loads
from inventory.model import Farm
from provision.network.services.bind import Bind

BASE = """\
farm: try
network: {mode: bridge, bridge: br0, subnet: 10.0.0.0/24, gateway: 10.0.0.1, domain: try.example,
          subnet6: "fd00::/64", pool: 10.0.0.100-10.0.0.120}
templates: {t: {build: debian-12}}
vms:
  dev2: {address: 10.0.0.6, nat_port: 22006, description: a "b"; c}
  prod: {VM}
services:
  SERVICES
"""


def load(services: str = "hosts:", vm: str = "", base: str = BASE) -> Farm:
    text = base.replace("{VM}", "{" + vm + "}").replace("SERVICES", services)
    return loads(text.encode(), Path("f.yaml"))


def refused(services: str = "hosts:", vm: str = "", base: str = BASE) -> list[str]:
    with pytest.raises(InventoryError) as caught:
        load(services, vm, base)
    return [str(problem).removeprefix("f.yaml:") for problem in caught.value.problems]


def test_a_service_by_its_name_alone() -> None:
    services = load("{bind: , hosts: , kea: {interfaces: [br0]}}").services
    assert services.used == ("bind", "kea", "hosts")
    bind = services.sections[0]
    assert isinstance(bind, Bind)
    assert bind.config == "/etc/bind/named.conf.farmhand"


def test_no_services() -> None:
    assert load("{}").services.used == ()


PATH = (
    "is not an absolute path as taken here: begin with '/', use letters, digits and '_', '@', '+', '.', '-', "
    "and no '..'"
)
SERVICES = {
    "bnd:": "9:3: services: unknown key 'bnd'; did you mean 'bind'?",
    "hosts: {config: etc/hosts}": f"9:19: services.hosts.config: 'etc/hosts' {PATH}",
    "hosts: {config: /etc/../shadow}": f"9:19: services.hosts.config: '/etc/../shadow' {PATH}",
    "hosts: {config: '/etc/a b'}": f"9:19: services.hosts.config: '/etc/a b' {PATH}",
    "hosts: {config: '/etc/a;b'}": f"9:19: services.hosts.config: '/etc/a;b' {PATH}",
    'hosts: {config: "/etc/a\\nb"}': f"9:19: services.hosts.config: '/etc/a\\nb' {PATH}",
    'hosts: {config: "/etc/a\\0b"}': "9:19: character U+0000, written as an escape, is not allowed",
    "bind: {zone: other.example}": "9:16: services.bind.zone: the network's domain, try.example, is outside of other.example",
    "bind: {own: block, dynamic: yes}": "9:15: services.bind.own: a dynamic zone's file is the server's: 'own: block' can't be",
    "{nginx: , haproxy: }": "9:13: services.haproxy.port: port 80 of 127.0.0.1 is services.nginx.port already",
    "{bind: , dnsmasq: }": "9:12: services.dnsmasq.port: port 53 of 127.0.0.1 is services.bind.port already",
    "{hosts: , ansible: {config: /etc/hosts}}": "9:31: services.ansible.config: '/etc/hosts' is services.hosts.config already",
    "kea: {interfaces: ['br0;']}": "9:22: services.kea.interfaces[0]: 'br0;' is not the name of a network interface",
    "libvirt:": "9:3: services.libvirt: it is for mode network; the mode is bridge",
}  # fmt: skip


@pytest.mark.parametrize("services", SERVICES, ids=repr)
def test_services_refused(services: str) -> None:
    assert SERVICES[services] in refused(services)


VMS = {
    "hostname: prod.elsewhere.example": "7:20: vms.prod.hostname: 'prod.elsewhere.example' is outside of try.example, the zone that BIND serves",
    "aliases: [x.example]": "7:20: vms.prod.aliases[0]: 'x.example' is outside of try.example, the zone that BIND serves",
    'address6: "fd01::1"': "7:20: vms.prod.address6: fd01::1 is outside the subnet, fd00::/64",
    'address6: "fd00::6"': "6:19: vms.dev2.address: its IPv6 address would be fd00::6, which vms.prod.address6 has: give it an 'address6'",
    'address6: "fd00::1%eth0"': "7:20: vms.prod.address6: 'fd00::1%eth0' is not an IPv6 address such as fd00:10:60::6",
    "address: 10.0.0.110": "7:19: vms.prod.address: 10.0.0.110 is reserved (10.0.0.100-10.0.0.120)",
    "proxy: [{name: a, key: /k}]": "7:33: vms.prod.proxy[0].key: a key without 'certificate'",
    "proxy: [{name: 'büro.example'}]": "7:25: vms.prod.proxy[0].name: 'büro.example' is not ASCII: write xn--bro-hoa.example (IDNA)",
    'description: "a\\nb"': "7:23: vms.prod.description: control characters and line breaks are not allowed here",
    f"hostname: {'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 60}.try.example": "7:20: vms.prod.hostname: a host name has at most 253 characters (RFC 1035)",
}  # fmt: skip


@pytest.mark.parametrize("vm", VMS, ids=repr)
def test_vms_refused(vm: str) -> None:
    assert VMS[vm] in refused("bind:", vm)


def test_without_addresses_only_what_needs_none() -> None:
    base = "farm: try\ntemplates: {t: {build: x}}\nvms: {a: {}}\nservices:\n  SERVICES\n"
    assert load("{ssh_config: , ansible: }", base=base).services.used == ("ssh_config", "ansible")
    assert refused("hosts:", base=base) == [
        "5:3: services.hosts: in mode user the VMs have no addresses: 'network' needs another mode"
    ]


def test_a_subnet6_that_is_too_small() -> None:
    base = BASE.replace("fd00::/64", "fd00::/124")
    assert refused(base=base) == [
        "3:20: network.subnet6: fd00::/124: a length from 16 to 120 that 4 divides, for the reverse zone"
    ]
