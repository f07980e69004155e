"""Two farms on one machine, with one another's paths: they share, or the second is told whose a file is
and what to choose."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from daemons import Daemons
from test_apply import ask
from test_leaving import Heard
from yard import Yard

from host.run import Runner
from hypervisors.ownership import FarmIdentity
from inventory.errors import FarmhandError, NotOurs, calls_in, spelled
from provision.network import checkers
from provision.network.document import Document, Ownership, embed, read, whole
from provision.network.readiness import NotReady
from provision.network.render import render
from provision.network.rendered import full_text
from provision.site import Site, open_site
from provision.twins.asked import TwinAsked
from provision.twins.making import twin_of
from tests import farm
from tests.identities import identity


class Second:
    """Another farm, with the same services at the same places."""

    def __init__(self, yard: Yard, name: str = "other", file: str = "other.yaml") -> None:
        self.name, self.file = name, yard.directory / file
        self._yard = yard

    def site(self, *, plan: bool = False) -> Site:
        text = self._yard.text().replace("farm: try-it", f"farm: {self.name}")
        for old, new in (("10.77.0.6", "10.77.0.16"), ("10.77.0.7", "10.77.0.17"), ("dev2", "dev3"),
                         ("prod", "prod3"), ("git", "git3"), ("2200", "2300"),
                         ("52:54:86:b3:3f:10", "52:54:86:b3:3f:11")):  # fmt: skip
            text = text.replace(old, new)
        self.file.write_text(text)
        return open_site(self.file, reporter=Heard(), plan=plan)

    def apply(self, *, plan: bool = False, force: bool = False, take_aside: bool = False) -> None:
        with self.site(plan=plan) as site:
            farm.network_apply(site, force=force, take_aside=take_aside)

    def destroy(self) -> None:
        with self.site() as site:
            site.prepare()
            farm.destroy(site, purge=True)


def every(error: FarmhandError) -> tuple[FarmhandError, ...]:
    return error.errors if isinstance(error, NotReady) else (error,)


CHOICES = {
    "nftables": "another file (services.nftables.config: {d}/nft/farm-other.nft)",
    "nginx": "another file (services.nginx.config: {d}/nginx/farm-other)",
    "dnsmasq": "another file (services.dnsmasq.config: {d}/dnsmasq/dnsmasq-other.conf)",
    "kea": "another file (services.kea.config4: {d}/kea/kea4-other.conf)",
    "dhcpd": "a file of yours, with 'own: block' in both farm files, which they share",
    "haproxy": "another file (services.haproxy.map: {d}/haproxy/farm-other.map)",
}


@pytest.mark.parametrize("service", CHOICES)
def test_whose_a_file_is_and_what_to_choose(yard: Yard, service: str) -> None:
    """By plan and apply alike; nothing takes another farm's live file away, whatever is asked."""
    yard.use(service)
    for path in yard.write(service).values():
        assert path.exists()
    before = yard.snapshot()
    second = Second(yard)
    for flags in ({"plan": True}, {}, {"force": True}, {"take_aside": True}):
        with pytest.raises(FarmhandError) as caught:
            second.apply(**flags)
        told = [error for error in every(caught.value) if isinstance(error, NotOurs)]
        assert all(f"is that of farm {yard.identity}: it is not touched" in e.message for e in told)
        remedy = "; ".join(spelled(error.remedy) for error in told)
        assert CHOICES[service].format(d=yard.directory) in remedy
        assert "mv " not in remedy and "aside" not in remedy
    second.destroy()
    after = yard.snapshot()
    assert {k: v for k, v in after.items() if k in before} == before
    assert {Path(path).suffix for path in set(after) - set(before)} <= {".yaml", ".lock"}


def test_one_zone(yard: Yard, daemons: Daemons) -> None:
    """As a file of the first farm's; then as the admin's own, with a block of each in it."""
    yard.use("bind")
    daemons.start("bind")
    yard.apply()
    second = Second(yard)
    with pytest.raises(NotReady) as caught:
        second.apply()
    told = every(caught.value)
    assert "another file (services.bind.config" in spelled(told[0].remedy)
    assert f"db.try.example is that of farm {yard.identity}" in told[1].message
    remedy = spelled(told[1].remedy)
    assert "another zone (services.bind.zone)" in remedy and "'own: block'" in remedy
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]

    with yard.site() as site:
        farm.destroy(site, purge=True)
    assert ask("dev2.try.example", "A") == []
    zone = yard.directory / "bind" / "db.try.example"
    theirs = "$TTL 600\n@ IN SOA ns h 7 3600 600 604800 300\n@ IN NS ns\nns IN A 10.77.0.1\n"
    zone.write_text(theirs)
    (yard.directory / "bind" / "farm.conf").write_text(
        f'zone "try.example" {{ type primary; file "{zone}"; }};\n'
    )
    yard.services["bind"] |= {"own": "block", "reverse": "no"}
    daemons.stop()
    daemons.start("bind")
    yard.apply()
    second.apply()
    names = ("dev2.try.example", "dev3.try.example", "ns.try.example")
    assert [ask(name, "A") for name in names] == [["10.77.0.6"], ["10.77.0.16"], ["10.77.0.1"]]
    assert not yard.apply().changed
    second.destroy()
    assert [ask(name, "A") for name in names] == [["10.77.0.6"], [], ["10.77.0.1"]]
    with yard.site() as site:
        farm.destroy(site, purge=True)
    assert [ask(name, "A") for name in names] == [[], [], ["10.77.0.1"]]
    kept = zone.read_text().split()
    assert [word for word in kept if not word.isdigit()] == [
        word for word in theirs.split() if not word.isdigit()
    ]


def test_two_farms_of_one_name_share_a_hosts_file(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two state directories: each has its own block."""
    yard.use("hosts")
    yard.apply()
    second = Second(yard, name="try-it")
    with monkeypatch.context() as patch:
        patch.setenv("FARMHAND_STATE_DIR", str(yard.directory / "state2"))
        second.apply()
    text = (yard.directory / "hosts").read_text()
    assert "dev2.try.example" in text and "dev3.try.example" in text
    assert text.count("# BEGIN farmhand try-it:") == text.count("# END farmhand try-it\n") == 2
    assert not yard.apply().changed
    with yard.site() as site:
        farm.destroy(site, purge=True)
    text = (yard.directory / "hosts").read_text()
    assert "dev2.try.example" not in text and "dev3.try.example" in text


@pytest.mark.parametrize("service", ["hosts", "nftables"], ids=["block", "file"])
def test_this_farm_files_own_after_its_state_is_lost(
    yard: Yard, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It isn't known whether that state is in use elsewhere, so it is asked."""
    yard.use(service)
    for path in yard.write(service).values():
        before = path.read_text()
    monkeypatch.setenv("FARMHAND_STATE_DIR", str(yard.directory / "state2"))
    yard.vms["more"] = {"address": "10.77.0.9", "nat_port": "22009"}
    with pytest.raises(NotOurs) as caught:
        yard.plan()
    assert "this farm file and another state" in spelled(caught.value.remedy)
    [call] = calls_in(caught.value.remedy)
    assert (call.task, dict(call.flags)) == ("network-apply", {"force": True})
    assert path.read_text() == before
    yard.plan(force=True)


KATA = identity("kata", file="/home/ann/a--b (1)/kata.yaml")
DOCUMENTS = (
    Document("libvirt", "/x", "<network/>\n", comment=("<!-- ", " -->")),
    Document("bind", "/x", "@ IN A 10.0.0.1\n", comment=("; ", "")),
    Document("hosts", "/x", "10.0.0.1 a\n"),
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.service)
def test_a_mark_says_whose_it_is(document: Document) -> None:
    text = whole(document, KATA)
    first = text.splitlines()[0].removeprefix(document.comment[0])
    assert "--" not in first.removesuffix(document.comment[1])
    live = read(document, KATA, text)
    assert (live.whose, live.body, live.farm) == (Ownership.OURS, document.text, KATA)
    assert live.farm is not None and live.farm.file == KATA.file
    assert read(document, KATA, text + "more\n").whose is Ownership.EDITED
    for other, whose in (
        (identity("kata", file=KATA.file, controller="bob@pc2"), Ownership.FORMER),
        (identity("kata", file="/b.yaml"), Ownership.FARMS),
        (identity("other", file=KATA.file), Ownership.FARMS),
        (FarmIdentity("kat", KATA.id, KATA.file), Ownership.FARMS),
    ):
        assert read(document, other, text).whose is whose


def test_blocks_of_farms_whose_names_begin_alike() -> None:
    document = Document("hosts", "/x", "10.0.0.1 a\n", own="block")
    farms = [identity("kata"), identity("kata-2"), identity("kata", file="/b.yaml"), identity("k")]
    text = "127.0.0.1 localhost\n"
    for one in farms:
        text = embed(document, one, text)
    assert text.count("BEGIN") == text.count("END") == 4
    for one in farms:
        assert read(document, one, text).whose is Ownership.OURS
        assert embed(document, one, text) == text
    for one in farms:
        text = embed(Document("hosts", "/x", "", own="block"), one, text)
    assert text == "127.0.0.1 localhost\n"


# ---- A second farm's file as farm-twin makes it

BLOCKS = {
    "dhcpd": ("dhcp/dhcpd.conf", "authoritative;\nsubnet 10.77.0.0 netmask 255.255.255.0 { }\n"),
    "haproxy": (
        "haproxy/haproxy.cfg",
        "defaults\n\tmode http\n\ttimeout connect 5s\n\ttimeout client 1m\n\ttimeout server 1m\n",
    ),
}
"""Files of the admin's that two farms share."""
APART = {
    "nginx": "nginx -t -c {d}/nginx/nginx.conf",
    "dnsmasq": "dnsmasq --test -C {d}/both",
    "unbound": "unbound-checkconf {d}/both",
    "nftables": "nft -c -f {d}/both",
    "ssh_config": "ssh -G -F {d}/both try-it-dev2",
    "bind": "named-checkconf -z {d}/bind/named.conf",
    "ansible": "ansible-inventory -i {d}/ansible.yaml -i {d}/ansible-try-dev.yaml --list",
}
"""What reads both farms' files, each its own."""
INCLUDE = {
    "dnsmasq": "conf-file={}",
    "unbound": 'include-toplevel: "{}"',
    "nftables": 'include "{}"',
    "ssh_config": "Include {}",
}


def twin_of_yard(yard: Yard) -> Path:
    with yard.site() as site:
        site.prepare()
    out = yard.directory / "try-dev.yaml"
    twin_of(yard.directory / "farm.yaml", TwinAsked(name="try-dev", out=out)).write()
    return out


def written(site: Site) -> list[Document]:
    """A farm's documents, written at their places."""
    site.prepare()
    documents = render(site.farm, site.allocator.allocate_all(list(site.farm.vms)))
    for document in documents:
        path = Path(document.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if document.own == "block" and path.exists():
            text = embed(document, site.identity, path.read_text())
        else:
            text = full_text(document, site.identity)
        path.write_text(text)
    return list(documents)


@pytest.mark.parametrize("service", [*APART, *BLOCKS, "hosts", "shorewall"])
def test_daemons_take_a_farm_and_its_twin_together(yard: Yard, service: str) -> None:
    if service == "unbound":
        yard.services["unbound"] = {"config": f"{yard.directory}/unbound-farm", "main": "/none"}
    if service == "dnsmasq":
        del yard.services["dnsmasq"]["port"]
    if service in BLOCKS:
        name, text = BLOCKS[service]
        (yard.directory / name).write_text(text)
        yard.services[service]["own"] = "block"
    yard.use(service)
    out = twin_of_yard(yard)
    with yard.site() as first, open_site(out, reporter=Heard()) as second:
        ours, theirs = written(first), written(second)
        both = {d.path for d in ours} & {d.path for d in theirs}
        assert all(d.own == "block" for d in (*ours, *theirs) if d.path in both)
        for site, documents in ((first, ours), (second, theirs)):  # each as network-apply has it checked
            texts: dict[str, str | None] = {d.path: Path(d.path).read_text() for d in documents}
            for error in checkers.refusals(Runner(), site.farm, documents, texts):
                raise error
    if service == "bind":
        with (yard.directory / "bind" / "named.conf").open("a") as main:
            main.write(f'include "{theirs[0].path}";\n')
    if line := INCLUDE.get(service):
        paths = [next(d.path for d in of if d.path.count("hosts/") == 0) for of in (ours, theirs)]
        (yard.directory / "both").write_text("".join(f"{line.format(path)}\n" for path in paths))
    if service in APART:
        said = Runner().read(*APART[service].format(d=yard.directory).split())
        assert "conflicting" not in said.stderr and "duplicate" not in said.stderr
    if service == "ansible":
        assert {"dev2.try.example", "dev2-try-dev.try.example"} <= set(
            json.loads(said.stdout)["_meta"]["hostvars"]
        )
    if service == "haproxy":
        text = (yard.directory / "haproxy" / "haproxy.cfg").read_text()
        ports = re.findall(r"bind \*:(\d+)", text)
        assert len(ports) == len(set(ports)) == 2
    if service == "shorewall":
        params = (yard.directory / "shorewall" / "params").read_text()
        assert "VM_DEV2_TRY_IT=10.77.0.6\n" in params and "VM_DEV2_TRY_DEV=" in params


@pytest.mark.parametrize("service", BLOCKS)
def test_a_whole_file_is_no_place_for_another_farms_block(yard: Yard, service: str) -> None:
    """As the twin's file says; it is the first farm's until both have a block in a file of yours."""
    yard.use(service)
    yard.write(service)
    out = twin_of_yard(yard)
    name, _ = BLOCKS[service]
    assert f"# {service}: {yard.directory / name} is its daemon's one file" in out.read_text()
    before = (yard.directory / name).read_text()
    for flags in ({}, {"force": True}, {"take_aside": True}):
        with open_site(out, reporter=Heard()) as site, pytest.raises(FarmhandError) as caught:
            farm.network_apply(site, **flags)
        told = [error for error in every(caught.value) if isinstance(error, NotOurs)]
        assert [f"{yard.directory / name} is that of farm try-it" in one.message for one in told] == [
            True
        ]
        assert "'own: block' in both farm files" in spelled(told[0].remedy)
    assert (yard.directory / name).read_text() == before


def test_keas_twin_says_that_it_takes_another_kea(yard: Yard) -> None:
    yard.use("kea")
    out = twin_of_yard(yard)
    assert "# kea: each Kea reads one file" in out.read_text()
    with yard.site() as first, open_site(out, reporter=Heard()) as second:
        ours, theirs = written(first), written(second)
        assert not {d.path for d in ours} & {d.path for d in theirs}
        (yard.directory / "kea-try-dev").mkdir()
        texts: dict[str, str | None] = {d.path: Path(d.path).read_text() for d in theirs}
        assert not list(checkers.refusals(Runner(), second.farm, theirs, texts))
        words = [
            set(re.findall(r'"socket-name": "([^"]+)"', "".join(d.text for d in of)))
            for of in (ours, theirs)
        ]
        assert words[0] and not words[0] & words[1]


def test_a_dnsmasq_with_a_port_of_its_own_is_one_farms(yard: Yard) -> None:
    """It takes the port once: the twin's file says so."""
    yard.use("dnsmasq")
    out = twin_of_yard(yard)
    assert "# dnsmasq: one dnsmasq takes its port once" in out.read_text()
    with yard.site() as first, open_site(out, reporter=Heard()) as second:
        files = [site.farm.services.sections[0].config for site in (first, second) if written(site)]  # type: ignore[attr-defined]
        (yard.directory / "both").write_text("".join(f"conf-file={file}\n" for file in files))
        for file in files:
            Runner().read("dnsmasq", "--test", "-C", file)
        said = Runner().read("dnsmasq", "--test", "-C", f"{yard.directory}/both", ok=range(256))
        assert said.status and "illegal repeated keyword" in said.stderr


def test_two_farms_names_are_served_by_one_bind(yard: Yard, daemons: Daemons) -> None:
    """Each farm's in a zone of its own; the addresses lead to the first one's names."""
    yard.use("bind")
    out = twin_of_yard(yard)
    bind = yard.directory / "bind"
    with (bind / "named.conf").open("a") as main:
        main.write(f'include "{bind}/farm-try-dev.conf";\n')
    (bind / "farm-try-dev.conf").touch()
    daemons.start("bind")
    yard.apply()
    with open_site(out, reporter=Heard()) as site:
        given = site.farm.vms["dev2"].address
        farm.network_apply(site)
        assert not farm.network_apply(site).changed
    assert not yard.apply().changed
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    assert ask("dev2-try-dev.try-dev.try.example", "A") == [str(given)]
    assert ask("git-try-dev.try-dev.try.example", "A") == [str(given)]
    with yard.site() as site:
        farm.destroy(site, purge=True)
    assert ask("dev2.try.example", "A") == []
    assert ask("dev2-try-dev.try-dev.try.example", "A") == [str(given)]
