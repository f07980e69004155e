"""VMs and farms that go while a service is dead, or for good: nobody is kept, nothing is forgotten; and
a farm that goes takes all that is its out of every service."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

import pytest
from daemons import Daemons
from http_machine import answer_of, machine
from networks import wait_for
from test_apply import ask
from test_farm_network import seal
from test_faults import killed
from test_live_dns import KEY
from yard import Yard

from inventory.errors import Text, WrongState, spelled
from provision.engine.report import QuietReporter
from provision.network.apply import RECORD
from provision.network.services import kea
from provision.site import open_site
from tests import farm


class Heard(QuietReporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.warnings.append(spelled(text))


def destroy(yard: Yard, vms: Sequence[str] = (), *, live: str = "") -> list[str]:
    """The warnings. ``live``: services that may still have something of it, which is an error."""
    heard = Heard()
    (yard.directory / "farm.yaml").write_text(yard.text())
    fails = f", but {live} may still have something live of what is gone"
    expected = pytest.raises(WrongState, match=fails) if live else contextlib.nullcontext()
    with open_site(yard.directory / "farm.yaml", reporter=heard) as site, expected:
        farm.destroy(site, vms, purge=True)
    return heard.warnings


def ours(yard: Yard) -> list[str]:
    """What is left with a mark of ours, or by a name of ours, in the services' files."""
    skip = ("logs/", "restart-", "farm.yaml", "bind/named.conf", "main.conf", "/leases")
    return [
        name
        for path, (data, *_) in yard.snapshot().items()
        if not any(part in (name := path.removeprefix(f"{yard.directory}/")) for part in skip)
        and (b"farmhand try-it" in data or b"dev2" in data)
    ]


def test_a_proxy_that_cant_be_told_is_told_by_the_next_apply(yard: Yard, daemons: Daemons) -> None:
    """nginx runs on with what it had, and its file has nothing of the VM any more."""
    yard.use("nginx", "hosts")
    yard.vms["dev2"]["proxy"][0]["port"] = "8080"
    daemons.start("nginx")
    with machine("10.77.0.6", 8080):
        yard.apply()
        assert answer_of("127.0.0.1", 8001, "dev2.example.org") == "10.77.0.6:8080"
        good = yard.services["nginx"]["reload"]
        yard.services["nginx"]["reload"] = ["false"]
        [said] = destroy(yard, ["dev2"], live="nginx")
        assert said.startswith("nginx: ") and "gone on without it" in said
        assert "network-apply" in said
        assert "dev2" not in (yard.directory / "hosts").read_text()
        assert "dev2" not in (yard.directory / "nginx" / "farm").read_text()
        assert answer_of("127.0.0.1", 8001, "dev2.example.org") == "10.77.0.6:8080"
        yard.services["nginx"]["reload"] = good
        gone = yard.vms.pop("dev2")
        assert [a.text for a in yard.plan("nginx").actions if a.verb == "tell"] != []
        assert yard.apply("nginx").changed
        wait_for(lambda: _whatever("127.0.0.1", 8001) != "10.77.0.6:8080")
        assert not yard.apply().changed
        yard.vms["dev2"] = gone


def test_a_dead_bind_keeps_no_vm(yard: Yard, daemons: Daemons) -> None:
    """Its records go with the next apply, though nothing else is to be done."""
    key = yard.directory / "bind" / "farmhand.key"
    key.write_text(KEY)
    key.chmod(0o640)
    yard.use("bind", "hosts")
    yard.services["bind"] |= {"dynamic": "yes", "key": str(key)}
    daemons.start("bind")
    yard.apply()
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    daemons.stop()
    [said] = destroy(yard, ["dev2"])
    assert said.startswith("bind: ")
    assert "dev2" not in (yard.directory / "hosts").read_text()
    daemons.start("bind")
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    del yard.vms["dev2"]
    assert yard.apply().changed
    assert ask("dev2.try.example", "A") == []
    assert ask("prod.try.example", "A") == ["10.77.0.7"]
    assert not yard.apply().changed


def spoil_edit(yard: Yard) -> None:
    path = yard.directory / "ssh_config"
    path.write_text(path.read_text() + "# mine\n")


def spoil_marks(yard: Yard) -> None:
    path = yard.directory / "hosts"
    path.write_text(path.read_text() + "# END farmhand try-it\n")


def spoil_place(yard: Yard) -> None:
    pid = int((yard.directory / "nginx" / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not (yard.directory / "nginx" / "pid").exists())
    shutil.rmtree(yard.directory / "nginx")


def spoil_admins(yard: Yard) -> None:
    (yard.directory / "ssh_config").write_text("Host mine\n")


GONE = {
    "edited": (spoil_edit, "ssh_config: ", "ssh_config"),
    "marks in disorder": (spoil_marks, "hosts: ", "hosts"),
    "removed for good": (spoil_place, "nginx: ", ""),
    "an admin's by now": (spoil_admins, "ssh_config: ", ""),
}


@pytest.mark.parametrize("how", GONE)
def test_what_is_in_a_bad_state_keeps_no_vm(how: str, yard: Yard, daemons: Daemons) -> None:
    spoil, said, live = GONE[how]
    yard.use("hosts", "ssh_config", "nginx", "ansible")
    daemons.start("nginx")
    yard.apply()
    spoil(yard)
    warnings = destroy(yard, ["dev2"], live=live)
    assert [text for text in warnings if text.startswith(said)], warnings
    assert "dev2" not in (yard.directory / "ansible.yaml").read_text()


def test_a_farm_takes_all_out_of_every_service(yard: Yard, daemons: Daemons) -> None:
    """Live ones are asked; where nothing is to be there, a restart finds it so."""
    yard.use("bind", "kea", "hosts", "ssh_config", "nginx", "haproxy", "nftables", "ansible")
    (yard.directory / "hosts").write_text("127.0.0.1 localhost\n")
    haproxy = yard.directory / "haproxy" / "haproxy.cfg"
    haproxy.write_text("defaults\n\tmode http\n\ttimeout client 1s\n\ttimeout server 1s\n"
                       "\ttimeout connect 1s\nlisten mine\n\tbind 127.0.0.1:8009\n")  # fmt: skip
    mine = haproxy.read_text()
    yard.vms["dev2"]["proxy"][0]["port"] = "8080"
    daemons.start("bind", "nginx", "haproxy")
    with machine("10.77.0.6", 8080):
        yard.apply(take_aside=True)
        for port in (8001, 8003):
            assert answer_of("127.0.0.1", port, "dev2.example.org") == "10.77.0.6:8080"
        assert kea.command(yard.services["kea"]["socket4"], "config-get")
        assert destroy(yard) == []
        with pytest.raises(OSError):
            answer_of("127.0.0.1", 8003, "dev2.example.org", patience=0)
        answered = _whatever("127.0.0.1", 8001)
        assert "10.77.0.6" not in answered
    assert ask("dev2.try.example", "A") == []
    assert ask("6.0.77.10.in-addr.arpa", "PTR") == []
    assert _tables() == []
    with pytest.raises(FileNotFoundError):
        kea.command(yard.services["kea"]["socket4"], "config-get")
    assert ours(yard) == []
    assert (yard.directory / "hosts").read_text() == "127.0.0.1 localhost\n"
    assert haproxy.read_text() == mine
    assert (yard.directory / "bind" / "farm.conf").read_text() == ""  # named.conf includes it
    subprocess.run(["named-checkconf", f"{yard.directory}/bind/named.conf"], check=True)
    assert not (yard.directory / "state" / "farms" / "try-it").exists()


def _whatever(address: str, port: int) -> str:
    try:
        return answer_of(address, port, "dev2.example.org", patience=0)
    except OSError:
        return ""


def _tables() -> list[object]:
    done = subprocess.run(["nft", "-j", "list", "tables"], capture_output=True, check=True)
    return [t for t in json.loads(done.stdout)["nftables"] if "table" in t]


@pytest.mark.parametrize("service", ["dhcpd", "dnsmasq"])
def test_a_dhcp_server_of_ours_answers_nobody_any_more(
    yard: Yard, daemons: Daemons, service: str
) -> None:
    from dhcp_client import lease

    yard.use(service)
    yard.apply()
    assert str(lease("52:54:86:b3:3f:10")) == "10.77.0.6"
    assert destroy(yard) == []
    assert ours(yard) == []
    assert lease("52:54:86:b3:3f:10") is None


def test_services_given_up_lose_all_of_ours(yard: Yard, daemons: Daemons) -> None:
    """By the commands that the farm file had for them. One that runs on is an error, and is told by the
    next apply."""
    every = dict(yard.services)
    told = every["nginx"]["reload"]
    yard.use("bind", "nginx", "nftables", "hosts")
    daemons.start("bind", "nginx")
    yard.apply()
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    served = _whatever("127.0.0.1", 8001)
    yard.services = {"hosts": every["hosts"]}
    (yard.directory / "nginx" / "pid").rename(yard.directory / "nginx" / "pid.away")
    for _ in range(2):
        with pytest.raises(WrongState, match="applied, but nginx may still have something live"):
            yard.apply()
    assert _whatever("127.0.0.1", 8001) == served
    (yard.directory / "nginx" / "pid.away").rename(yard.directory / "nginx" / "pid")
    assert [action.text for action in yard.apply().actions] == [f"nginx: {' '.join(told)}"]
    wait_for(lambda: _whatever("127.0.0.1", 8001) != served)
    assert ask("dev2.try.example", "A") == []
    assert _tables() == []
    assert [name for name in ours(yard) if name != "hosts"] == []
    subprocess.run(["named-checkconf", f"{yard.directory}/bind/named.conf"], check=True)
    assert not yard.apply().changed


def test_a_haproxy_that_had_nothing_before_us(yard: Yard, daemons: Daemons) -> None:
    """There is no way to end it: it is said, until it is ended."""
    yard.use("haproxy")
    daemons.start("haproxy")
    yard.apply()
    for _ in range(2):
        [said] = destroy(yard, live="haproxy")
        assert said.startswith(f"haproxy: {yard.directory}/haproxy/haproxy.cfg is gone, and it runs on")
        assert ours(yard) == []
    daemons.stop()
    assert destroy(yard) == []
    assert not (yard.directory / "state" / "farms" / "try-it").exists()


def test_a_farm_is_not_forgotten_while_a_service_has_it(yard: Yard, daemons: Daemons) -> None:
    """All else goes; what couldn't be told is told by the next destroy, also by one after a kill."""
    yard.use("nginx", "nftables", "hosts")
    yard.vms["dev2"]["proxy"][0]["port"] = "8080"
    daemons.start("nginx")
    good = {name: dict(yard.services[name]) for name in ("nginx", "nftables")}
    root = yard.directory / "state" / "farms" / "try-it"
    with machine("10.77.0.6", 8080):
        yard.apply()
        yard.services["nginx"]["reload"] = yard.services["nftables"]["nft"] = ["false"]
        said = destroy(yard, live="nginx, nftables")
        assert [text.partition(":")[0] for text in said] == ["nginx", "nftables"]
        assert ours(yard) == []
        assert answer_of("127.0.0.1", 8001, "dev2.example.org") == "10.77.0.6:8080"
        assert len(_tables()) == 1
        kept = {path.name for path in root.iterdir()}
        assert kept >= {"network.db", "identity.json"} and not kept & {"keys", "disks", "network"}
        yard.services["nginx"] = good["nginx"]
        assert killed(yard, "written", 1, lambda: destroy(yard))
        assert destroy(yard, live="nftables")[-1].startswith("nftables: ")
        wait_for(lambda: _whatever("127.0.0.1", 8001) != "10.77.0.6:8080")
    yard.services["nftables"] = good["nftables"]
    assert destroy(yard) == []
    assert _tables() == []
    assert not root.exists()


def test_a_dynamic_zone_is_served_no_longer(yard: Yard, daemons: Daemons) -> None:
    """Its file is the server's: it stays, and is named."""
    key = yard.directory / "bind" / "farmhand.key"
    key.write_text(KEY)
    key.chmod(0o640)
    yard.use("bind")
    yard.services["bind"] |= {"dynamic": "yes", "key": str(key), "reverse": "no"}
    daemons.start("bind")
    yard.apply()
    zone = yard.directory / "bind" / "db.try.example"
    [said] = destroy(yard)
    assert said.startswith(f"stays: {zone}: ")
    assert ask("dev2.try.example", "A") == []
    yard.apply()
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    del yard.vms["dev2"]
    yard.apply()
    assert ask("dev2.try.example", "A") == []


def test_a_dynamic_zone_is_served_no_longer_without_its_key_either(yard: Yard, daemons: Daemons) -> None:
    """Its records can't be taken away: the zone is."""
    key = yard.directory / "bind" / "farmhand.key"
    key.write_text(KEY)
    key.chmod(0o640)
    yard.use("bind")
    yard.services["bind"] |= {"dynamic": "yes", "key": str(key), "reverse": "no"}
    daemons.start("bind")
    yard.apply()
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    key.write_text("")
    said = destroy(yard)
    assert [text for text in said if text.startswith("bind: a dynamic zone needs a TSIG key")], said
    assert ask("dev2.try.example", "A") == []
    assert not (yard.directory / "state" / "farms" / "try-it").exists()


def test_all_daemons_dead(yard: Yard, daemons: Daemons) -> None:
    """Each that was to be told is said, once; nothing is served when they come back."""
    yard.use("bind", "kea", "nginx", "haproxy", "hosts")
    daemons.start("bind", "nginx", "haproxy")
    yard.apply()
    daemons.stop()
    yard.services["kea"]["reload"] = yard.services["kea"]["reload6"] = ["false"]
    warnings = destroy(yard)
    assert sorted(text.partition(":")[0] for text in warnings) == ["bind", "kea", "nginx"]
    assert ours(yard) == []
    assert not (yard.directory / "state" / "farms" / "try-it").exists()
    daemons.start("bind", "nginx")
    assert ask("dev2.try.example", "A") == []


def test_killed_at_every_step_of_leaving(yard: Yard, daemons: Daemons) -> None:
    """Undone by the next command, all live again; then it goes for good."""
    yard.use("bind", "nginx", "nftables", "hosts")
    daemons.start("bind", "nginx")
    yard.apply()
    number, texts = 1, []
    while (text := killed(yard, "done", number, lambda: destroy(yard))) != RECORD:
        assert text is not None
        texts.append(text)
        with yard.site() as site:
            farm.recover(site)
            assert site.journal.unfinished() == ()
        assert ask("dev2.try.example", "A") == ["10.77.0.6"], text
        assert len(_tables()) == 1, text
        assert "dev2" in (yard.directory / "hosts").read_text(), text
        number += 1
    assert any("nginx: " in text for text in texts)
    assert any("take the table away" in text for text in texts)
    destroy(yard)
    assert ours(yard) == []
    assert _tables() == []


def test_killed_while_a_dead_service_is_gone_on_without(yard: Yard, daemons: Daemons) -> None:
    """Recovery can't tell it either, and comes to its end."""
    yard.use("nginx", "hosts")
    daemons.start("nginx")
    yard.apply()
    daemons.stop()
    number = 1
    while (text := killed(yard, "done", number, lambda: destroy(yard, ["dev2"]))) != RECORD:
        assert text is not None
        with yard.site() as site:
            farm.recover(site)
            assert site.journal.unfinished() == ()
        for name in ("hosts", "nginx/farm"):
            assert "dev2" in (yard.directory / name).read_text(), text
        number += 1
    assert number == 4
    destroy(yard, ["dev2"])
    for name in ("hosts", "nginx/farm"):
        assert "dev2" not in (yard.directory / name).read_text()


def test_a_farm_never_applied_goes_whatever_is_there(yard: Yard) -> None:
    """Files of the admin's at its places, and no program of any service that would run."""
    yard.vms["dev2"]["proxy"] = yard.vms["prod"]["proxy"] = []
    for name in ("dhcp/dhcpd.conf", "ssh_config", "nginx/farm", "bind/farm.conf", "haproxy/haproxy.cfg"):
        (yard.directory / name).write_text("mine\n")
    before = yard.snapshot()
    seal(yard)
    destroy(yard)
    assert {k: v for k, v in yard.snapshot().items() if k in before} == before
    assert not (yard.directory / "state" / "farms" / "try-it").exists()
