"""An apply that fails leaves every daemon as it was, also where an admin's file was in the way."""

from __future__ import annotations

import subprocess
from ipaddress import IPv4Address
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from daemons import Daemons
from dhcp_client import lease
from networks import wait_for
from test_apply import ask
from test_faults import contents, killed
from test_live_dns import KEY
from yard import Yard

from inventory.errors import FarmhandError, NoSpace, NotOurs, calls_in, spelled
from provision.engine.journal import Entry, Journal
from provision.network import apply
from provision.network.apply import RECORD
from provision.network.file_change import FileChange
from provision.network.rollback import APPLY, ApplyFacts, put
from tests import farm

MAC = "52:54:00:00:00:50"
THEIRS = (
    "subnet 10.77.0.0 netmask 255.255.255.0 { }\n"
    f"host printer {{ hardware ethernet {MAC}; fixed-address 10.77.0.50; }}\n"
)


def admins_dhcpd(yard: Yard) -> Path:
    """It runs, with a file of the admin's."""
    path = yard.directory / "dhcp" / "dhcpd.conf"
    path.write_text(THEIRS)
    subprocess.run(yard.services["dhcpd"]["reload"], check=True, capture_output=True)
    wait_for((yard.directory / "dhcp" / "pid").exists)
    return path


def process(yard: Yard) -> str:
    return (yard.directory / "dhcp" / "pid").read_text()


def test_a_running_dhcpd_when_bind_fails(yard: Yard, daemons: Daemons) -> None:
    """What our own remedy leads to, and then BIND refuses: dhcpd isn't even restarted."""
    yard.use("dhcpd", "bind")
    path = admins_dhcpd(yard)
    daemons.start("bind")
    good = yard.services["bind"]["rndc"]
    refusing = yard.directory / "rndc"
    once = yard.directory / "logs" / "refused"
    refuse = f'[ "$1" = reconfig ] && [ ! -e {once} ] && touch {once} && exit 1'
    refusing.write_text(f'#!/bin/sh\n{refuse}\nexec {" ".join(good)} "$@"\n')
    refusing.chmod(0o755)
    yard.services["bind"]["rndc"] = [str(refusing)]
    with pytest.raises(NotOurs) as caught:
        yard.apply()
    assert [call.task for call in calls_in(caught.value.remedy)] == ["network-apply"]
    assert "mv " not in spelled(caught.value.remedy)
    before, running = contents(yard), process(yard)
    with pytest.raises(FarmhandError, match="rndc exited with 1") as failed:
        yard.apply(take_aside=True)
    assert "every file and daemon is as it was before" in spelled(failed.value.remedy)
    assert contents(yard) == before
    assert process(yard) == running
    assert lease(MAC) == IPv4Address("10.77.0.50")

    yard.services["bind"]["rndc"] = good
    yard.apply(take_aside=True)
    assert lease("52:54:86:b3:3f:10") == IPv4Address("10.77.0.6")
    assert path.with_name("dhcpd.conf.before-farmhand").read_text() == THEIRS
    with yard.site() as site:
        farm.destroy(site)
    assert path.read_text() == THEIRS
    assert not path.with_name("dhcpd.conf.before-farmhand").exists()
    assert lease(MAC) == IPv4Address("10.77.0.50")


def test_dhcpd_that_dies_is_put_back_with_all_others(yard: Yard, daemons: Daemons) -> None:
    """Its checker is content; but no interface is in the subnet of its new file. By then BIND was told,
    and its zone updated."""
    key = yard.directory / "bind" / "farmhand.key"
    key.write_text(KEY)
    key.chmod(0o640)
    yard.use("dhcpd", "bind", "hosts")
    yard.services["bind"] |= {"dynamic": "yes", "key": str(key)}
    path = admins_dhcpd(yard)
    daemons.start("bind")
    yard.apply("bind", "hosts")
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    before = (yard.directory / "hosts").read_text()
    yard.network |= {"subnet": "10.78.0.0/24", "gateway": "10.78.0.1", "pool": []}
    yard.services["bind"]["reverse"] = "no"
    for vm, last in (("dev2", 6), ("prod", 7)):
        yard.vms[vm]["address"] = f"10.78.0.{last}"
    with pytest.raises(FarmhandError) as failed:
        yard.apply(take_aside=True)
    assert "dhcp" in failed.value.message
    assert "every file and daemon is as it was before" in spelled(failed.value.remedy)
    assert path.read_text() == THEIRS
    assert (yard.directory / "hosts").read_text() == before
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    wait_for((yard.directory / "dhcp" / "pid").exists)
    assert lease(MAC) == IPv4Address("10.77.0.50")


def test_a_daemon_that_did_not_run_is_told_of(yard: Yard, daemons: Daemons) -> None:
    """We can start it, and not stop it."""
    yard.use("dhcpd", "dnsmasq")
    yard.services["dnsmasq"]["restart"] = ["false"]
    with pytest.raises(FarmhandError) as failed:
        (yard.directory / "dhcp" / "dhcpd.conf").write_text(THEIRS)
        yard.apply(take_aside=True)
    assert "dhcpd didn't run before, and runs now with its old files" in spelled(failed.value.remedy)


@pytest.mark.parametrize("when", ["written", "done"])
def test_killed_while_a_file_is_taken_aside_or_put_back(yard: Yard, daemons: Daemons, when: str) -> None:
    yard.use("dhcpd", "hosts")
    (yard.directory / "hosts").write_text("127.0.0.1 localhost\n")
    path = admins_dhcpd(yard)
    before, number = contents(yard), 1
    while (text := killed(yard, when, number, lambda: yard.apply(take_aside=True))) != RECORD:
        assert text is not None
        with yard.site() as site:
            farm.recover(site)
        assert contents(yard) == before, text
        assert lease(MAC) == IPv4Address("10.77.0.50"), text
        number += 1
    assert number == 5
    with yard.site() as site:
        farm.recover(site)
    applied = contents(yard)
    assert lease("52:54:86:b3:3f:10") == IPv4Address("10.77.0.6")

    def destroy() -> None:
        with yard.site() as site:
            farm.destroy(site)

    number = 1
    while (text := killed(yard, when, number, destroy)) != RECORD:
        assert text is not None
        with yard.site() as site:
            farm.recover(site)
        assert contents(yard) == applied, text
        number += 1
    assert number == 5
    destroy()
    assert contents(yard) == before
    assert path.read_text() == THEIRS
    assert lease(MAC) == IPv4Address("10.77.0.50")


def test_what_was_undone_whole_is_not_undone_again(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes of its entry in the journal: the old files are no longer kept."""
    yard.use("hosts")
    yard.apply()
    before = contents(yard)
    yard.vms["more"] = {"address": "10.77.0.9"}

    def broken(change: FileChange) -> None:
        put(change)
        raise RuntimeError("nobody foresaw it")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(apply, "put", broken)
        yard.apply()
    assert contents(yard) == before
    with yard.site() as site:
        (record,) = site.journal.history(1)
        assert not any((site.paths.root / "network").iterdir())
        assert APPLY.facts_of(record) == ApplyFacts()
        assert APPLY.recover(site, record, ApplyFacts()).text == "nothing of it was written"


def cut_at_removal(yard: Yard) -> tuple[dict[str, bytes], Path]:
    """Killed right after a destroy has removed a file. What there was; and that file."""
    yard.use("ansible")
    yard.apply()
    before, path = contents(yard), yard.directory / "ansible.yaml"

    def destroy() -> None:
        with yard.site() as site:
            farm.destroy(site)

    assert killed(yard, "done", 1, destroy) == f"write {path}"
    assert not path.exists()
    return before, path


def test_a_recovery_that_is_cut_off_at_its_end_is_done_again(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has put back stays."""
    before, _ = cut_at_removal(yard)

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, yard.site() as site, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "settle", cut)
        farm.recover(site)
    assert contents(yard) == before
    with yard.site() as site:
        farm.recover(site)
        assert not site.journal.unfinished()
        assert not any((site.paths.root / "network").iterdir())
    assert contents(yard) == before


def test_a_file_whose_old_text_is_gone_is_left_as_it_is(yard: Yard) -> None:
    _, path = cut_at_removal(yard)
    path.write_text("put back by hand\n")
    with yard.site() as site:
        (kept,) = (site.paths.root / "network").iterdir()
        rmtree(kept)
        farm.recover(site)
        (record,) = site.journal.history(1)
    assert path.read_text() == "put back by hand\n"
    assert record.settled


def test_what_was_undone_and_could_not_be_noted_is_kept(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next command puts it back again, then."""
    yard.use("ansible")
    yard.apply()
    before = contents(yard)
    yard.vms["more"] = {"address": "10.77.0.9"}
    note = Entry.note

    def full(entry: Entry[Any], facts: Any) -> None:
        if facts == ApplyFacts():
            raise NoSpace("no room for the journal")
        note(entry, facts)

    def broken(change: FileChange) -> None:
        put(change)
        raise RuntimeError("nobody foresaw it")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(apply, "put", broken)
        patch.setattr(Entry, "note", full)
        yard.apply()
    assert contents(yard) == before
    with yard.site() as site:
        (kept,) = (site.paths.root / "network").iterdir()
        assert any(kept.iterdir())
        farm.recover(site)
        assert not kept.exists()
    assert contents(yard) == before
