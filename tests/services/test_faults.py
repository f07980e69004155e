"""Failures and kills in the midst of an apply: all of the old, or all of the new."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemons
from dhcp_client import lease
from http_machine import answer_of, machine
from networks import enter, wait_for, within
from test_apply import ask
from yard import Yard

from inventory.errors import FarmhandError, spelled
from provision.engine import journal
from provision.network.apply import RECORD
from provision.network.serial import later, serial_of
from provision.network.services import kea
from tests import farm

DAEMONS = ("bind", "nginx", "haproxy", "nftables", "hosts")


def contents(yard: Yard) -> dict[str, bytes]:
    """Of the services' files, without what daemons write themselves."""
    own = ("pid", ".sock", ".lock", "leases", "serverid", ".csv", "session.key", "mkeys", "managed-keys",
           "libvirt/over/", "shorewall-var/")  # fmt: skip
    return {k: v[0] for k, v in yard.snapshot().items() if not any(part in k for part in own)}


def without_serials(files: dict[str, bytes]) -> dict[str, bytes]:
    """A rolled back zone may have a newer serial number, and its digest with it."""
    import re

    return {
        name: re.sub(rb"\d+ ; serial|farmhand try-it:.* [0-9a-f]{16}", b"", data)
        if "/db." in name
        else data
        for name, data in files.items()
    }


def killed(yard: Yard, when: str, number: int, work: Callable[[], object] | None = None) -> str | None:
    """An apply, or other work, in a process of its own, killed at its step of that number: right after
    it was written down, or before the next one is. The step's text; None: it has fewer. The journal
    gets other words: recovery hangs on none."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            _arm(when, number, write)
            (work or yard.apply)()
        except BaseException:  # noqa: BLE001 - of a process that ends here
            traceback.print_exc()
            os._exit(1)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        text = told.read()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if text else 0), "it failed by itself"
    return text or None


def _arm(when: str, number: int, pipe: int) -> None:
    real, noted, settle = journal.Entry.step, journal.Entry.note, journal.Journal._settle
    seen = 0

    def settled(self: journal.Journal, *arguments: Any) -> None:
        if when == "done" and seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        settle(self, *arguments)

    def note(self: journal.Entry[Any], facts: Any) -> None:
        if when == "done" and seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        noted(self, facts)

    def step(self: journal.Entry[Any], text: str) -> None:
        nonlocal seen
        if when == "done" and seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, f"step {seen}")
        seen += 1
        if seen == number:
            os.write(pipe, text.encode())
            if when == "written":
                os.kill(os.getpid(), signal.SIGKILL)

    journal.Entry.step = step  # type: ignore[method-assign]
    journal.Entry.note = note  # type: ignore[method-assign]
    journal.Journal._settle = settled  # type: ignore[method-assign]


def serving(yard: Yard, *, more: bool) -> None:
    """Every daemon has the first VMs; and the one more, or not."""
    assert ask("dev2.try.example", "A") == ["10.77.0.6"]
    assert ask("more.try.example", "A") == (["10.77.0.9"] if more else [])
    for port in (8001, 8003):
        assert answer_of("127.0.0.1", port, "dev2.example.org") == "10.77.0.6:8080"


@pytest.mark.parametrize("when", ["written", "done"])
def test_killed_at_every_step(yard: Yard, daemons: Daemons, when: str) -> None:
    yard.use(*DAEMONS)
    yard.vms["dev2"]["proxy"][0]["port"] = "8080"
    daemons.start("bind", "nginx", "haproxy")
    with machine("10.77.0.6", 8080):
        yard.apply()
        number, texts = 1, []
        while True:
            old = contents(yard)
            yard.vms["more"] = {"address": "10.77.0.9", "nat_port": "22009",
                                "proxy": [{"name": "more.example.org"}]}  # fmt: skip
            text = killed(yard, when, number)
            if text is None:
                break
            texts.append(text)
            new = contents(yard) if text == RECORD else None
            with yard.site() as site:
                farm.recover(site)
                assert site.journal.unfinished() == ()
                assert not any((site.paths.root / "network").iterdir()), text
            found = contents(yard)
            if new is not None:
                assert found == new, text
                serving(yard, more=True)
            else:
                assert without_serials(found) == without_serials(old), text
                serving(yard, more=False)
            del yard.vms["more"]
            yard.apply()  # what it was killed in, undone by the farm file: nothing is in the way
            serving(yard, more=False)
            number += 1
        assert sum(text.startswith("write ") for text in texts) == 8
        assert any("reload nginx" in t or "nginx" in t for t in texts[8:])
        serving(yard, more=True)


def test_serials_go_on_after_a_rollback(yard: Yard, daemons: Daemons) -> None:
    """BIND has the new zone, then another zone of the same apply fails: no serial is seen to go back."""
    yard.use("bind")
    daemons.start("bind")
    yard.apply()
    seen = serial_of((yard.directory / "bind" / "db.try.example").read_text())
    old = contents(yard)
    yard.vms["more"] = {"address": "10.77.0.9"}
    steps = 0
    while (text := killed(yard, "done", steps + 1)) is not None:
        steps += 1
        with yard.site() as site:
            farm.recover(site)
        if text == RECORD:
            break
        [answer] = ask("try.example", "SOA")
        serial = int(answer.split()[2])
        assert serial == seen or later(serial, seen), text
        assert ask("more.try.example", "A") == [], text
        assert without_serials(contents(yard)) == without_serials(old)
        seen = serial
    assert steps >= 5


FAILING = {
    "nginx": ("nginx", "reload", ["false"]),
    "haproxy": ("haproxy", "reload", ["sh", "-c", "echo no >&2; exit 3"]),
    "nginx dies": ("nginx", "alive", ["false"]),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_daemon_that_refuses_its_reload(yard: Yard, daemons: Daemons, case: str) -> None:
    yard.use(*DAEMONS)
    yard.vms["dev2"]["proxy"][0]["port"] = "8080"
    daemons.start("bind", "nginx", "haproxy")
    with machine("10.77.0.6", 8080):
        yard.apply()
        old = contents(yard)
        service, key, command = FAILING[case]
        good = yard.services[service][key]
        yard.services[service][key] = command
        yard.vms["more"] = {"address": "10.77.0.9", "proxy": [{"name": "more.example.org"}]}
        with pytest.raises(FarmhandError) as caught:
            yard.apply()
        assert service in caught.value.message or command[0] in caught.value.message
        assert without_serials(contents(yard)) == without_serials(old)
        yard.services[service][key] = good
        serving(yard, more=False)
        yard.apply()
        serving(yard, more=True)


def test_what_could_not_be_put_back_is_kept(yard: Yard) -> None:
    """Somebody writes the file while the daemon is told: theirs stays, the old one is kept."""
    yard.use("hosts", "nginx")
    (yard.directory / "hosts").write_text("127.0.0.1 localhost\n")
    thief = f"echo mine >{yard.directory}/hosts; exit 1"
    yard.services["nginx"] |= {"reload": ["sh", "-c", thief], "alive": ["true"]}
    with pytest.raises(FarmhandError) as caught:
        yard.apply()
    assert "was changed by somebody else meanwhile" in spelled(caught.value.remedy)
    assert (yard.directory / "hosts").read_text() == "mine\n"
    with yard.site() as site:
        [kept] = (site.paths.root / "network").iterdir()
    assert str(kept) in spelled(caught.value.remedy)
    assert "127.0.0.1 localhost\n" in [path.read_text() for path in kept.iterdir()]


def test_a_file_that_somebody_writes_meanwhile_is_theirs(yard: Yard) -> None:
    yard.use("hosts", "ansible")
    (yard.directory / "hosts").write_text("127.0.0.1 localhost\n")
    assert killed(yard, "done", 1) == f"write {yard.directory}/hosts"
    (yard.directory / "hosts").write_text("all mine\n")
    with yard.site() as site:
        farm.recover(site)
        [kept] = (site.paths.root / "network").iterdir()
    assert (yard.directory / "hosts").read_text() == "all mine\n"
    assert "127.0.0.1 localhost\n" in [path.read_text() for path in kept.iterdir()]


def live(yard: Yard) -> tuple[list[str], list[str], bool]:
    """What the daemons themselves have: Kea's reservations, dnsmasq's address of more, nft's map."""
    told = kea.command(yard.services["kea"]["socket4"], "config-get")
    assert isinstance(told, dict)
    [subnet] = told["Dhcp4"]["subnet4"]
    nft = ["nft", "list", "map", "ip", "farmhand_try_it", "ssh"]
    ports = subprocess.run(nft, capture_output=True, text=True, check=True).stdout
    names = ask("more.try.example", "A", 5301, "10.77.0.1")
    return sorted(host["ip-address"] for host in subnet["reservations"]), names, "22009" in ports


@pytest.mark.parametrize("when", ["written", "done"])
def test_killed_at_every_live_change(yard: Yard, daemons: Daemons, when: str) -> None:
    """Kea over its socket, with the leases it frees; dnsmasq by its directory; nft's elements."""
    [library] = Path("/usr/lib").glob("*/kea/hooks/libdhcp_lease_cmds.so")
    with contextlib.ExitStack() as stack:
        daemons.apart(stack, "kea")
        stack.callback(daemons.stop)
        yard.use("kea", "dnsmasq", "nftables")
        yard.services["kea"]["lease_commands"] = str(library)
        yard.vms["gone"] = {"address": "10.77.0.11", "mac": "52:54:00:00:00:11"}
        yard.apply()
        before, after = ["10.77.0.11", "10.77.0.6", "10.77.0.7"], ["10.77.0.6", "10.77.0.7", "10.77.0.9"]
        assert live(yard) == (before, [], False)
        number, texts = 1, []
        while True:
            old = contents(yard)
            gone = yard.vms.pop("gone")
            yard.vms["more"] = {"address": "10.77.0.9", "nat_port": "22009"}
            text = killed(yard, when, number)
            if text is None:
                break
            texts.append(text)
            with yard.site() as site:
                farm.recover(site)
                assert site.journal.unfinished() == ()
            if text == RECORD:
                assert live(yard) == (after, ["10.77.0.9"], True), text
            else:
                assert contents(yard) == old, text
                assert live(yard) == (before, [], False), text
            del yard.vms["more"]
            yard.vms["gone"] = gone
            yard.apply()
            wait_for(lambda: live(yard) == (before, [], False))  # dnsmasq heeds a signal when it can
            number += 1
        for part in ("Dhcp4", "Dhcp6", "lease4-del", "lease6-del", "dnsmasq:", "the map's elements"):
            assert any(part in text for text in texts), (part, texts)
        assert live(yard) == (after, ["10.77.0.9"], True)


def told(daemons: Daemons, places: Mapping[str, str]) -> tuple[bool, bool, bool]:
    """Whether dhcpd, shorewall's kernel and libvirt's network have more."""

    def there(service: str, work: Callable[..., object], *arguments: object) -> object:
        with ThreadPoolExecutor(1, initializer=enter, initargs=(places[service],)) as thread:
            return thread.submit(work, *arguments).result()

    nat = [*within(daemons.router), "iptables-save", "-t", "nat"]
    ports = subprocess.run(nat, capture_output=True, text=True, check=True).stdout
    assert "22006" in ports
    return (
        str(there("dhcpd", lease, "52:54:00:00:00:09")) == "10.77.0.9",
        "22009" in ports,
        there("libvirt", ask, "more.try.example", "A", 53, "10.77.0.1") == ["10.77.0.9"],
    )


def test_killed_at_every_restart(yard: Yard, daemons: Daemons) -> None:
    """shorewall, libvirt's network and dhcpd, which comes last: each is told once more what it had.
    Killed before the first of them, and after each."""
    del yard.network["bridge"]
    yard.network |= {"mode": "network", "network": "try"}
    with contextlib.ExitStack() as stack:
        stack.callback(daemons.stop)
        places = daemons.apart(stack, "dhcpd", "shorewall", "libvirt")
        yard.use("dhcpd", "shorewall", "libvirt")
        yard.apply()
        writes, texts = 4, []
        for number in range(4):
            old = contents(yard)
            yard.vms["more"] = {"address": "10.77.0.9", "mac": "52:54:00:00:00:09", "nat_port": "22009"}
            text = killed(yard, "written", writes + 1 + number)
            texts.append(str(text))
            with yard.site() as site:
                farm.recover(site)
                assert site.journal.unfinished() == ()
            new = number == 3
            assert (contents(yard) == old) is not new
            assert told(daemons, places) == (new, new, new), text
            del yard.vms["more"]
        yard.apply()
        assert told(daemons, places) == (False, False, False)
        for text, part in zip(texts, ("shorewall", "libvirt", "dhcpd", RECORD), strict=True):
            assert part in text and not text.startswith("write "), texts
