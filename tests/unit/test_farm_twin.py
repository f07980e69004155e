"""farm-twin: a second farm's file from a first one's, with nothing in it that two farms can't both have;
farm-diff: what differs between two."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
import yaml

import cli.composition
from host.paths import FarmPaths
from inventory.errors import Conflict, FarmhandError, NotFound, UsageError, spelled
from inventory.loader import load
from inventory.model import Farm
from provision.allocate import Allocator, lock_file_of, port_free
from provision.engine.report import QuietReporter
from provision.network.render import render
from provision.site import open_site
from provision.twins.asked import TwinAsked, TwinEndpoint
from provision.twins.difference import DifferenceGroup, FarmDifference, FarmFile, differences
from provision.twins.making import Twin, twin_of
from repositories.places import directory
from tests.unit.cli_farm import CommandLine, command_line

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "inventory").glob("*.yaml"))
LISTED = {
    "dev2": TwinEndpoint(IPv4Address("192.0.2.22")),
    "prod": TwinEndpoint(IPv4Address("192.0.2.13"), 2223),
}

# All that can be a farm's own, in every style of YAML.
RICH = """\
farm: kata   # the release manager's

hosts:
  here: {driver: fake, memory: 8G}

network:   # the company's
  mode: bridge
  bridge: br0
  subnet: 10.77.0.0/24
  subnet6: fd77::/64
  gateway: 10.77.0.1
  nameservers: 10.77.0.1
  reserved:
    # printers
    - 10.77.0.2-10.77.0.9   # two of them
    - "10.77.0.250"
  pool: [10.77.0.240-10.77.0.249]
  domain: 'kata.example'
  addressing: dhcp

services:
  bind: {own: file}
  dnsmasq: {dns: no}   # DHCP
  unbound: {port: 5353}
  hosts:
  ssh_config: {config: /srv/kata/ssh_config}
  nginx:
    # its logs are read by awstats
    logs: /var/log/nginx
  haproxy: {port: 8080, tls_port: 8443}
  nftables:
  shorewall:
  ansible: {}

templates:
  base: {build: debian-12}

vms:
  dev2:
    # the builder
    hostname: "ab-kata-dev2"
    aliases: [git, www.kata.example]
    mac: 52:54:86:b3:3f:10   # typed in
    address: 10.77.0.16
    address6: fd77::beef
    nat_port: 22006
    proxy:
      - name: git.example.org
        certificate: /etc/ssl/git.pem
      - {name: kata.example.org, access_log: /var/log/kata.log}
  prod: {address: 10.77.0.17, nat_port: 22007, memory: 512M}
  more: {}
  most:

ssh:
  key: keys/id_ed25519
  authorized_keys: [ssh-keys/aleksi.pub, ~/mine.pub]

source: {repository: ../src}

repositories:
  packages:
    format: deb
    path: /srv/kata/packages
    url: http://packages.example.org/kata
    serve: nginx
    incoming: /srv/incoming
  mirror: {format: rpm, url: "https://mirror.example.org/pub/rpm/"}

events:
  chat: {webhook: https://chat.example/hooks/sesame, secret_variable: CHAT}
  log: {command: [./tell, --all]}

cycle:
  lock: {webdav: https://dav.example/locks/kata}
  steps:
    - name: reset
      reset: dev2
    - {name: package, vm: dev2, run: make}
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("state", "cache", "run"):
        monkeypatch.setenv(
            f"FARMHAND_{'RUNTIME' if name == 'run' else name.upper()}_DIR", str(tmp_path / name)
        )
    return tmp_path / "state"


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    (tmp_path / "farms").mkdir()
    (tmp_path / "farms" / "kata.yaml").write_text(RICH)
    return tmp_path / "farms" / "kata.yaml"


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[CommandLine]:
    yield from command_line(tmp_path)


def made(first: Path, name: str = "kata-dev", out: Path | None = None, **asked: object) -> Twin:
    twin = twin_of(first, TwinAsked(name=name, out=out or first.with_name(f"{name}.yaml"), **asked))  # type: ignore[arg-type]
    twin.write()
    return twin


def known_here(farm: Farm) -> None:
    """As after its first command that changes something; what its VMs are given is claimed."""
    with open_site(farm.path, reporter=QuietReporter()) as site:
        site.prepare()
        site.allocator.allocate_all([vm for vm in farm.vms if farm.driver_of(vm).virtual])


def unique(farm: Farm) -> Mapping[str, set[object]]:
    """What no other farm may have, found in what is made of the file."""
    virtual = [vm for vm in farm.vms if farm.driver_of(vm).virtual]
    names = [n for vm in farm.vms for n in (farm.hostname_of(vm), *farm.vms[vm].aliases)]
    given = Allocator(farm, lock_file_of(farm, FarmPaths(farm.farm))).peek_all(virtual)
    user = farm.network.mode == "user"
    documents = render(farm, given)
    text = {d.service: d.text for d in documents}
    records = {
        line.split()[0] for d in documents if d.zone for line in d.text.splitlines() if " IN A" in line
    }
    params = {
        line.split("=")[0]
        for d in documents
        if d.path.endswith("/params")
        for line in d.text.splitlines()
    }
    urls = {section.url for section in farm.repositories.values()}
    return {
        "state": {FarmPaths(farm.farm).root},
        "machines": {farm.machine_of(vm) for vm in farm.vms},
        "names": set(map(farm.qualified, names)),
        "short names": set(names),
        "proxies": {proxy.name for vm in farm.vms.values() for proxy in vm.proxy},
        "macs": {one.mac for one in given.values()},
        "addresses": {one.address for one in given.values() if one.address and not user}
        | {(farm.vms[vm].address, farm.vms[vm].ssh_port) for vm in farm.vms if vm not in given},
        "ipv6": {vm.address6 for vm in farm.vms.values() if vm.address6},
        "ports": {one.ssh_port for one in given.values() if user}
        | {vm.nat_port for vm in farm.vms.values() if vm.nat_port},
        "resets": {vm.reset for vm in farm.vms.values() if vm.reset},
        "files": {d.path for d in documents if d.own == "file"},
        "logs": {proxy.access_log for vm in farm.vms.values() for proxy in vm.proxy if proxy.access_log},
        "zones": {d.zone for d in documents if d.zone and d.own == "file"},
        "records": records - {"ns"},
        "params": params,
        "tables": {line for line in text.get("nftables", "").splitlines() if line.startswith("table")},
        "repositories": {directory(farm, name) for name in farm.repositories},
        "incoming": {section.incoming for section in farm.repositories.values() if section.incoming},
        "urls": urls - {None},
        "locks": {farm.cycle.lock.webdav} if farm.cycle and farm.cycle.lock else set(),
    }  # fmt: skip


def nothing_shared(*farms: Farm) -> None:
    found = [unique(farm) for farm in farms]
    for kind in found[0]:
        all_ = [value for one in found for value in one[kind]]
        assert len(all_) == len(set(all_)), kind


def grouped(first: Path, second: Path) -> Mapping[DifferenceGroup, tuple[FarmDifference, ...]]:
    found = differences(FarmFile.read(first), FarmFile.read(second))
    return {group: tuple(one for one in found if one.group is group) for group in DifferenceGroup}


# ---- Nothing shared


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_a_twin_of_each_farm_that_ships(shipped: Path, tmp_path: Path) -> None:
    first = load(shipped)
    known_here(first)
    name = f"{first.farm}-dev"
    endpoints = LISTED if shipped.stem == "ssh-only" else {}
    twin = made(shipped, name, tmp_path / "twin.yaml", endpoints=endpoints, revision="v2.0.7")
    second = load(tmp_path / "twin.yaml")
    known_here(second)
    nothing_shared(first, second)
    built = [section for section in (second.source, second.build) if section is not None]
    assert built and all(section.revision == "v2.0.7" for section in built)
    found = grouped(shipped, twin.file)
    assert found[DifferenceGroup.DIFFERS] == ()
    assert {one.what for one in found[DifferenceGroup.CLASH]} <= {"addresses that both may give out"}
    assert found[DifferenceGroup.OWN] == twin.own
    lines = twin.text.splitlines()
    assert lines[0] == "# yaml-language-server: $schema=farm.schema.json"
    assert lines[1].startswith(f"# Made by farm-twin from {shipped}, 20")


def test_a_twin_of_all_that_can_be_its_own(rich: Path) -> None:
    first = load(rich)
    known_here(first)
    twin = made(rich)
    second = load(twin.file)
    nothing_shared(first, second)
    found = grouped(rich, twin.file)
    assert found[DifferenceGroup.DIFFERS] == ()
    [clash] = found[DifferenceGroup.CLASH]
    assert clash.first.value == "10.77.0.129-10.77.0.239"
    assert (
        f"{rich}: both farms may give out {clash.first.value}: add that to 'reserved' there"
        in twin.notes
    )
    assert second.network.domain == "kata-dev.example"
    assert second.vms["dev2"].aliases == ("git-kata-dev", "www-kata-dev.kata-dev.example")
    assert second.vms["dev2"].address6 not in (None, *(vm.address6 for vm in first.vms.values()))
    assert [second.vms[vm].nat_port for vm in ("dev2", "prod")] == [22106, 22107]
    assert second.vms["dev2"].mac and second.vms["dev2"].mac.startswith("52:54:86:")
    urls = {name: section.url for name, section in second.repositories.items()}
    assert urls == {
        "packages": "http://packages-kata-dev.example.org/kata",
        "mirror": "https://mirror.example.org/pub/rpm-kata-dev",
    }
    assert second.repositories["packages"].path == "/srv/kata-dev/packages"
    assert second.cycle and second.cycle.lock
    assert second.cycle.lock.webdav == "https://dav.example/locks/kata-dev"
    assert second.ssh == first.ssh and second.events == first.events, "what may be shared is"


def test_only_the_lines_of_what_is_its_own_are_changed(rich: Path) -> None:
    twin = made(rich)
    assert twin.own
    changed = {one.second.line for one in twin.own}
    before, after = RICH.splitlines(), twin.text.splitlines()
    kept = 0
    for tag, low, high, first, last in difflib.SequenceMatcher(None, before, after).get_opcodes():
        if tag == "equal":
            kept += high - low
            continue
        for number in range(first, last):
            line = after[number]
            assert number + 1 in changed or line.startswith("#") or "- 10.77.0." in line, line
    assert kept > 50
    for comment in ("# typed in", "# two of them", "# the builder", "# its logs are read by awstats",
                    "# DHCP\n", "# the company's", "# printers", "# the release manager's"):  # fmt: skip
        assert twin.text.count(comment) == 1
    for line in ('hostname: "ab-kata-dev-dev2"', "domain: 'kata-dev.example'",
                 "  most: {hostname: most-kata-dev}", "  more: {hostname: more-kata-dev}",
                 "    - 10.77.0.10-10.77.0.128",
                 "farm: kata-dev   # the release manager's"):  # fmt: skip
        assert line in twin.text


@pytest.mark.parametrize(
    "style",
    [
        {"default_flow_style": True},
        {"default_flow_style": False, "indent": 7},
        {"default_style": '"'},
        {"default_style": "'", "width": 20},
    ],
    ids=str,
)
def test_the_same_farm_in_every_style(rich: Path, style: dict[str, object]) -> None:
    content = yaml.load(RICH, yaml.BaseLoader)
    for section in (content["services"], content["vms"]):
        section.update({key: {} for key, value in section.items() if value == ""})
    farms = []
    for text in (RICH, yaml.dump(content, sort_keys=False, **style)):
        rich.write_text(text)
        twin = made(rich)
        farms.append(load(twin.file))
        twin.file.unlink()
    assert farms[0] == farms[1]


def test_windows_line_ends_stay(rich: Path) -> None:
    rich.write_bytes(b"\xef\xbb\xbf" + RICH.replace("\n", "\r\n").encode())
    text = made(rich).text
    assert text.count("\n") == text.count("\r\n")


def test_a_twin_elsewhere_has_paths_that_still_lead_there(rich: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    twin = made(rich, out=tmp_path / "elsewhere" / "x.yaml")
    second, here = load(twin.file), rich.parent
    assert second.ssh.key == here / "keys" / "id_ed25519"
    assert second.ssh.authorized_keys == (f"{here}/ssh-keys/aleksi.pub", "~/mine.pub")
    assert second.source and second.source.repository == f"{here}/../src"
    assert f"[{here}/./tell, --all]" in twin.text or f"[{here}/tell, --all]" in twin.text
    assert grouped(rich, twin.file)[DifferenceGroup.DIFFERS] == ()


def test_a_subnet_of_its_own(rich: Path) -> None:
    twin = made(rich, subnet=IPv4Network("10.78.0.0/24"))
    first, second = load(rich), load(twin.file)
    nothing_shared(first, second)
    net = second.network
    assert [str(net.gateway), str(net.subnet6), net.pool] == [
        "10.78.0.1",
        "fd77:0:0:1::/64",
        ("10.78.0.240-10.78.0.249",),
    ]
    assert net.reserved == ("10.78.0.2-10.78.0.9", "10.78.0.250")
    assert [str(second.vms[vm].address) for vm in ("dev2", "prod")] == ["10.78.0.16", "10.78.0.17"]
    found = grouped(rich, twin.file)
    assert not found[DifferenceGroup.DIFFERS] and not found[DifferenceGroup.CLASH]
    assert "network: br0 must lead to 10.78.0.0/24 by 10.78.0.1" in twin.notes
    assert not any("reverse" in note for note in twin.notes)


def test_a_libvirt_network_is_the_farms_own(rich: Path) -> None:
    rich.write_text(
        "farm: kata\nhosts: {here: {driver: fake}}\ntemplates: {t: {build: x}}\nvms: {a: {}}\n"
        "network: {mode: network, network: kata, subnet: 10.79.0.0/24, gateway: 10.79.0.1}\n"
        "services: {libvirt: {bridge: virbr-release}}\n"
    )
    first, second = load(rich), load(made(rich).file)
    nothing_shared(first, second)
    assert second.network.network == "kata-dev"
    assert second.network.subnet == IPv4Network("10.79.1.0/24")
    assert first.services.sections[0].bridge != second.services.sections[0].bridge  # type: ignore[attr-defined]
    assert grouped(rich, second.path)[DifferenceGroup.CLASH] == ()


def test_what_a_service_can_not_share_is_written_in_the_file(rich: Path) -> None:
    rich.write_text(
        "farm: kata\nhosts: {here: {driver: fake}}\ntemplates: {t: {build: x}}\nvms: {a: {}}\n"
        "network: {mode: bridge, bridge: br0, subnet: 10.79.0.0/24, domain: kata.example}\n"
        "services: {bind: , dhcpd: , kea: , haproxy: }\n"
    )
    twin = made(rich)
    nothing_shared(load(rich), load(twin.file))
    for service, words in (
        ("bind", "the reverse zones of its subnet are the first farm's"),
        ("dhcpd", "/etc/dhcp/dhcpd.conf is its daemon's one file"),
        ("kea", "each Kea reads one file"),
        ("haproxy", "/etc/haproxy/haproxy.cfg is its daemon's one file"),
    ):
        assert f"# {service}: {words}" in twin.text


def test_in_mode_user_ports_that_were_given_are_others(rich: Path) -> None:
    rich.write_text(
        "farm: a\ntemplates: {t: {build: x}}\nvms: {x: {ssh_port: 22222, address: 10.0.0.1}, y: {}}\n"
    )
    first = load(rich)
    known_here(first)
    twin = made(rich, "a-dev")
    second = load(twin.file)
    known_here(second)
    nothing_shared(first, second)
    assert second.vms["x"].ssh_port == 22322
    assert grouped(rich, twin.file)[DifferenceGroup.CLASH] == ()


def test_only_the_farms_own_directory_is_renamed(rich: Path) -> None:
    """A farm may be called as a directory of the system's, or a service."""
    text = RICH.replace("farm: kata ", "farm: srv ").replace(
        "/srv/kata/packages", "/srv/nginx/srv/packages"
    )
    rich.write_text(text)
    second = load(made(rich, "srv-dev").file)
    assert second.repositories["packages"].path == "/srv/nginx/srv-dev/packages"
    assert second.repositories["packages"].incoming == "/srv/incoming-srv-dev"
    assert "{config: /srv/kata/ssh_config-srv-dev}" in second.path.read_text()


def test_a_paths_line_breaks_write_no_lines(tmp_path: Path) -> None:
    directory = tmp_path / "x\nfarm: other\n#"
    directory.mkdir()
    (directory / "kata.yaml").write_text(RICH)
    twin = made(directory / "kata.yaml")
    assert load(twin.file).farm == "kata-dev"
    assert "\nfarm: other" not in twin.text


# ---- What is taken


def test_what_other_farms_of_this_machine_have_is_avoided(rich: Path) -> None:
    """Three farms of one source; the second and the third keep off each other, made or not."""
    known_here(load(rich))
    second = load(made(rich).file)
    known_here(second)
    third = load(made(rich, "kata-test").file)
    nothing_shared(load(rich), second, third)
    assert [third.vms[vm].nat_port for vm in ("dev2", "prod")] == [22206, 22207]


@pytest.mark.parametrize("busy", ["declared", "claimed", "listening"])
def test_a_port_that_is_taken(rich: Path, busy: str) -> None:
    rich.write_text("farm: a\ntemplates: {t: {build: x}}\nvms: {x: {ssh_port: 29801}}\n")
    assert port_free(29901)
    other = rich.with_name("other.yaml")
    other.write_text("farm: other\ntemplates: {t: {build: x}}\nvms: {x: {ssh_port: 29901}}\n")
    with socket.socket() as listener:
        if busy == "listening":
            listener.bind(("127.0.0.1", 29901))
            listener.listen()
        else:
            known_here(load(other))
        if busy == "claimed":  # as where its file was edited since
            other.write_text("farm: other\ntemplates: {t: {build: x}}\nvms: {x: {}}\n")
        with pytest.raises(Conflict, match="port 29901, for 29801, is taken"):
            made(rich, "b", shift=100)
        assert load(made(rich, "b").file).vms["x"].ssh_port == 30001


def test_a_farm_whose_file_is_gone_is_told(rich: Path) -> None:
    other = rich.with_name("other.yaml")
    other.write_text("farm: other\ntemplates: {t: {build: x}}\nvms: {x: {}}\n")
    known_here(load(other))
    other.unlink()
    [note] = [note for note in made(rich).notes if note.startswith("not looked at")]
    assert "farm other: no farm file" in note


def test_a_subnet_without_room(rich: Path) -> None:
    text = RICH.replace('"10.77.0.250"', "10.77.0.18-10.77.0.239")
    text = text.replace("-10.77.0.249", "-10.77.0.254").replace(
        "servers: 10.77.0.1", "servers: 10.77.0.13"
    )
    rich.write_text(text)
    with pytest.raises(Conflict, match="no 4 addresses in a row left") as caught:
        made(rich)
    assert "--subnet" in spelled(caught.value.remedy)


def at(address: str) -> Mapping[str, object]:
    return {"endpoints": {"dev2": TwinEndpoint(IPv4Address(address))}}


def between(low: int, high: int) -> Mapping[str, object]:
    return {"range": (IPv4Address(f"10.77.0.{low}"), IPv4Address(f"10.77.0.{high}"))}


REFUSED: Mapping[str, tuple[Mapping[str, object], type[FarmhandError], str]] = {
    "its own name": ({"name": "kata"}, Conflict, "there is a farm kata here already"),
    "no revision to build": ({"revision": "v1"}, UsageError, "it has neither 'source' nor 'build'"),
    "another's address": (at("10.77.0.17"), Conflict, "10.77.0.17 is farm kata's"),
    "a reserved address": (at("10.77.0.2"), UsageError, "would not load.*reserved"),
    "the first one's addresses": (between(10, 30), Conflict, "10.77.0.1. is another"),
    "addresses elsewhere": ({"range": (IPv4Address("10.1.0.1"),) * 2}, UsageError, "is outside of"),
    "too few addresses": (between(30, 30), Conflict, "not enough"),
    "an overlapping subnet": ({"subnet": IPv4Network("10.77.0.0/16")}, Conflict, "overlaps 10.77.0.0"),
    "a small subnet": ({"subnet": IPv4Network("10.78.0.0/25")}, UsageError, "is smaller than"),
    "a VM that isn't there": ({"hostnames": {"dev3": "x"}}, NotFound, "there is no VM 'dev3'"),
    "a taken host name": ({"hostnames": {"dev2": "www.kata.example"}}, UsageError, "is outside of"),
    "a port too high": ({"shift": 60000}, Conflict, "port 82006, for 22006, is taken"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be(rich: Path, case: str) -> None:
    asked, kind, words = REFUSED[case]
    if "source" in words:
        rich.write_text(RICH.replace("source: {repository: ../src}\n", ""))
    with pytest.raises(kind, match=words):
        made(rich, **{"name": "kata-dev", **asked})  # type: ignore[arg-type]
    assert sorted(path.name for path in rich.parent.iterdir()) == ["kata.yaml"]


def test_machine_names_that_would_meet(rich: Path) -> None:
    """kata's VM dev-x and kata-dev's VM x."""
    rich.write_text("farm: kata\ntemplates: {t: {build: x}}\nvms: {x: {}, dev-x: {}}\n")
    with pytest.raises(Conflict, match="machine's name kata-dev-x is farm kata's already"):
        made(rich)


def test_a_value_that_stands_for_several_things(rich: Path) -> None:
    rich.write_text(
        "farm: kata\ntemplates: {t: {build: x}}\nvms:\n  a: &small {memory: 1G}\n  b: *small\n"
    )
    with pytest.raises(UsageError, match=r"kata.yaml:4: this stands for several things"):
        made(rich)
    rich.write_text(
        "farm: &name kata\nnetwork: {mode: bridge, bridge: b, subnet: 10.0.0.0/24,\n"
        "  gateway: &gw 10.0.0.1, nameservers: [*gw]}\ntemplates: {t: {build: x}}\nvms: {a: {}}\n"
    )
    second = load(made(rich, subnet=IPv4Network("10.0.1.0/24")).file)
    assert second.network.nameservers == (second.network.gateway,) == (IPv4Address("10.0.1.1"),)


# ---- Listed machines


def listed(rich: Path, reset: str) -> Path:
    rich.write_text(
        "farm: kata\nhosts: {pcs: {driver: ssh}}\n"
        f"vms:\n  pc:\n    address: 192.0.2.1\n    reset: {reset}\n  pc12: {{address: 192.0.2.12}}\n"
    )
    return rich


MACHINES = {"pc": TwinEndpoint(IPv4Address("192.0.2.3")), "pc12": TwinEndpoint(IPv4Address("192.0.2.4"))}


def test_listed_machines_are_there_already(rich: Path) -> None:
    with pytest.raises(UsageError, match="which machines are the twins of pc, pc12") as caught:
        made(listed(rich, "[pxe, pc]"))
    assert spelled(caught.value.remedy) == "--address pc=ADDRESS --address pc12=ADDRESS"


@pytest.mark.parametrize(
    ("reset", "becomes"),
    [
        ("[pxe, root@192.0.2.1, 192.0.2.12]", ("pxe", "root@192.0.2.3", "192.0.2.12")),
        ("[pxe, --host=pc, pc12, pc.img]", ("pxe", "--host=pc-kata-dev", "pc12", "pc.img")),
        ("pc", ("pc-kata-dev",)),
    ],
)
def test_a_reset_is_that_of_its_own_machine(rich: Path, reset: str, becomes: tuple[str, ...]) -> None:
    twin = made(listed(rich, reset), endpoints=MACHINES)
    assert load(twin.file).vms["pc"].reset == becomes
    assert grouped(rich, twin.file)[DifferenceGroup.DIFFERS] == ()


def test_a_reset_that_names_no_machine_is_no_twins(rich: Path) -> None:
    with pytest.raises(UsageError, match=r"kata.yaml:6: it names neither address nor host name of pc"):
        made(listed(rich, "[./reset-the-pc]"), endpoints=MACHINES)


# ---- What differs later


def test_what_differs_by_meaning(rich: Path) -> None:
    """Not by text: order of keys and defaults that are written out are the same."""
    twin = made(rich)
    text = twin.text.replace("memory: 512M", "vcpus: 1, memory: 0.5G").replace(
        "addressing: dhcp\n", "lease_time: 12h\n  addressing: dhcp\n"
    )
    twin.file.write_text(text)
    assert grouped(rich, twin.file)[DifferenceGroup.DIFFERS] == ()
    changes = {
        "memory: 0.5G": "memory: 1G",
        "{build: debian-12}": "{build: debian-12, packages: [debhelper]}",
        "{name: package, vm: dev2, run: make}": "{name: package, vm: dev2, timeout: 1h, run: make}",
        "unbound: {": "unbound: {ttl: 60, ",
        "  most: ": "  fresh: {}\n  most: ",
        "mirror: {format: rpm": "mirror: {keep: 3, format: rpm",
        "ansible: {": "kea: {}\n  ansible: {",
        "aliases: [git-kata-dev,": "aliases: [one-more, git-kata-dev,",
        "nat_port: 22107, ": "",
        "events:": "  # none:",
        "  chat:": "  # chat:",
        "  log:": "  # log:",
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    twin.file.write_text(text)
    found = grouped(rich, twin.file)[DifferenceGroup.DIFFERS]
    told = {one.what: (one.first.value, one.second.value) for one in found}
    assert told == {
        "vms.prod.memory": ("512M", "1G"),
        "vms.prod.nat_port": ("22007", ""),
        "vms.dev2.aliases": (
            "[git, www.kata.example]",
            "[one-more, git-kata-dev, www-kata-dev.kata-dev.example]",
        ),
        "vms.fresh": ("", "there"),
        "templates.base.packages": ("[]", "[debhelper]"),
        "cycle.steps.package.timeout": ("30m", "1h"),
        "services.unbound.ttl": ("1h", "60"),
        "services.kea": ("", "there"),
        "repositories.mirror.keep": ("10", "3"),
        "events": ("there", ""),
    }
    for one in found:
        lines = (rich.read_text().splitlines(), text.splitlines())
        for side, there in zip((one.first, one.second), lines, strict=True):
            parts = one.what.split(".")
            near = there[side.line - 1]
            whole = near.startswith("farm: ")  # of what stands by itself, and isn't there
            assert whole or any(part in near for part in parts), (one.what, side.line, near)


def test_a_vm_may_be_called_as_a_key(rich: Path) -> None:
    twin = made(rich)
    twin.file.write_text(twin.text.replace("  most: ", "  mac: {}\n  most: "))
    [found] = grouped(rich, twin.file)[DifferenceGroup.DIFFERS]
    assert (found.what, found.second.value) == ("vms.mac", "there")


def test_long_scripts_are_shown_where_they_part(cli: CommandLine) -> None:
    script = "".join(f"      echo line {number}\n" for number in range(30))
    steps = f"cycle:\n  steps:\n  - name: build\n    vm: dev2\n    run: |\n{script}"
    cli.farm.write_text(f"{cli.farm.read_text()}{steps}")
    assert cli("farm-twin", "--as", "try-dev").status == 0
    other = cli.directory / "try-dev.yaml"
    other.write_text(other.read_text().replace("line 25", "line twenty-five"))
    out = cli("farm-diff", "--with", str(other)).out
    assert "line 25" in out and "line twenty-five" in out and "line 3" not in out
    [found] = cli("farm-diff", "--with", str(other), "--json").json["differs"]
    assert found["what"] == "cycle.steps.build.run" and found["first"]["value"].startswith(
        "echo line 0\n"
    )


def test_steps_in_another_order(rich: Path) -> None:
    twin = made(rich)
    reset = "    - name: reset\n      reset: dev2\n"
    text = twin.text.replace(reset, "")
    twin.file.write_text(text.rstrip("\n") + f"\n{reset}")
    [found] = grouped(rich, twin.file)[DifferenceGroup.DIFFERS]
    assert (found.what, found.first.value, found.second.value) == (
        "order of cycle.steps", "reset, package", "package, reset",
    )  # fmt: skip


def test_what_is_the_same_and_must_not_be(rich: Path) -> None:
    twin = made(rich)
    twin.file.write_text(
        twin.text.replace("22106", "22006").replace("/srv/kata-dev/packages", "/srv/kata/packages")
    )
    found = grouped(rich, twin.file)[DifferenceGroup.CLASH]
    assert [one.what for one in found] == [
        "port (vms.dev2.nat_port)", "path (repositories.packages.path)",
        "addresses that both may give out",
    ]  # fmt: skip
    assert "nat_port: 22006" in twin.file.read_text().splitlines()[found[0].second.line - 1]


def test_no_secret_is_shown(rich: Path) -> None:
    """A login in a URL, and what of a webhook's URL is one."""
    rich.write_text(RICH.replace("../src", '"https://ann:sesame@git.example.org/x?token=sesame"'))
    rich.chmod(0o600)
    twin = made(rich)
    assert twin.file.stat().st_mode & 0o777 == 0o600, "as who wrote the first one wanted it"
    twin.file.write_text(twin.text.replace("sesame", "sesame2"))
    found = grouped(rich, twin.file)[DifferenceGroup.DIFFERS]
    assert {one.what: one.first.value for one in found} == {
        "source.repository": "https://…@git.example.org/x?…",
        "events.chat.webhook": "https://chat.example/…",
    }
    assert "sesame" not in str(found)


# ---- The command line


def test_the_tasks(cli: CommandLine) -> None:
    cli.farm.write_text(cli.farm.read_text().replace("prod: {", "prod: {ssh_port: 22031, "))
    out = cli.directory / "try-dev.yaml"
    planned = cli("farm-twin", "--as", "try-dev", "--plan")
    assert planned.status == 0 and not out.exists()
    assert "farm: try-dev\n" in planned.out and "its own (4)" in planned.out
    assert not (cli.directory / "state").exists(), "a plan makes nothing"
    told = cli("farm-twin", "--as", "try-dev", "--revision", "", "--json").json
    assert (told["farm"], told["file"], told["planned"]) == ("try-dev", str(out), False)
    assert told["text"] == out.read_text()
    assert {one["what"] for one in told["own"]} == {
        "farm", "vms.dev2.hostname", "vms.prod.hostname", "vms.prod.ssh_port",
    }  # fmt: skip
    assert cli("status", "--farm", str(out), "--json").json["farm"] == "try-dev"

    before = out.read_bytes()
    again = cli("farm-twin", "--as", "other", "--out", str(out))
    assert again.status == 1 and "is there already: nothing is overwritten" in again.error
    assert out.read_bytes() == before

    same = cli("farm-diff", "--with", str(out), "--check")
    assert same.status == 0 and "in step" in same.out
    out.write_text(before.decode().replace("memory: 1G", "memory: 2G"))
    assert cli("farm-diff", "--with", str(out)).status == 0
    differs = cli("farm-diff", "--with", str(out), "--check")
    assert differs.status == 1
    assert differs.error == "farmhand: try and try-dev are not in step: 2 places"
    assert "vms.dev2.memory" in differs.out and "try.yaml:6" in differs.out
    data = cli("farm-diff", "--with", str(out), "--json").json
    assert [one["what"] for one in data["differs"]] == ["vms.dev2.memory", "vms.prod.memory"]
    assert data["differs"][0]["second"]["file"] == str(out)
    assert (data["in_step"], len(data["own"]), data["clash"]) == (False, 4, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("farm-twin",), "--as is missing"),
        (("farm-twin", "--as", "Dev"), "--as: 'Dev' is not a host name label"),
        (
            ("farm-twin", "--as", "d", "--subnet", "10.0.0.1/24"),
            "--subnet: '10.0.0.1/24' is not a subnet",
        ),
        (("farm-twin", "--as", "d", "--addresses", "10.0.0.9-x"), "--addresses: '10.0.0.9-x' is not"),
        (("farm-twin", "--as", "d", "--address", "dev2"), "--address: 'dev2' names no VM"),
        (("farm-twin", "--as", "d", "--address", "dev2=1.2.3.4:0"), "--address: '0' is not a port"),
        (("farm-twin", "--as", "d", "--port-shift", "x"), "--port-shift: 'x' is not a whole number"),
        (("farm-twin", "--as", "d", "--out", "/nowhere/d.yaml"), "there is no directory /nowhere"),
        (("farm-diff",), "--with is missing"),
        (("farm-diff", "--with", "/nowhere/d.yaml"), "no farm file /nowhere/d.yaml"),
    ],
)
def test_wrong_words(cli: CommandLine, words: tuple[str, ...], said: str) -> None:
    done = cli(*words)
    assert done.status in (1, 2)
    assert said in done.error
