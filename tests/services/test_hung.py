"""Daemons that are there and never answer, and tables of our name that others use."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Daemons
from networks import own_network, wait_for
from test_apply import ask
from test_leaving import destroy
from yard import Yard

from inventory.errors import DriverFailed, NotOurs, TimedOut, spelled
from provision.network import daemons as daemons_of
from provision.network import questions
from provision.network.services import dnsmasq, kea
from provision.network.verify import network_verify

MORE = {"address": "10.77.0.9", "nat_port": "22009"}


@contextlib.contextmanager
def stopped(pidfile: Path) -> Iterator[None]:
    pid = int(pidfile.read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def files(yard: Yard) -> dict[str, bytes]:
    """Those that are ours to write."""
    return {
        path: seen[0]
        for path, seen in yard.snapshot().items()
        if b"farmhand" in seen[0] and "pid" not in path
    }


def test_kea_that_hangs(yard: Yard, daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.use("kea")
    del yard.network["subnet6"]
    yard.apply()
    before = files(yard)
    socket4 = yard.services["kea"]["socket4"]
    with monkeypatch.context() as patch, stopped(yard.directory / "kea" / "kea4.kea-dhcp4.pid"):
        patch.setattr(kea, "_LIMIT", 1.0)
        yard.vms["more"] = MORE
        with pytest.raises(TimedOut) as caught:
            yard.apply()
        text = f"kea: it hangs: no answer on its control socket {socket4} in 1 s"
        assert caught.value.message.endswith(text)
        assert "whether it is stopped" in spelled(caught.value.remedy)
        assert files(yard) == before
    yard.apply()
    told = kea.command(socket4, "config-get")
    assert isinstance(told, dict)
    [subnet] = told["Dhcp4"]["subnet4"]
    assert "10.77.0.9" in [host["ip-address"] for host in subnet["reservations"]]


def test_dnsmasq_that_hangs(yard: Yard, daemons: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.use("dnsmasq")
    yard.apply()
    before = files(yard)
    monkeypatch.setattr(dnsmasq, "_PATIENCE", 0.3)
    monkeypatch.setattr(questions, "_PATIENCE", 0.3)
    with stopped(yard.directory / "dnsmasq" / "pid"):
        gone = yard.vms.pop("prod")
        for change in ({"more": MORE}, {}):  # read by itself; told by a signal
            yard.vms.update(change)
            if change:
                yard.vms["prod"] = gone
            with pytest.raises(
                TimedOut, match=r"dnsmasq: it hangs: no answer on 10\.77\.0\.1 port 5301 in"
            ):
                yard.apply()
            assert files(yard) == before
            yard.vms.pop("more", None)
            yard.vms.pop("prod", None)
        yard.vms["prod"] = gone
        with yard.site() as site:
            found = network_verify(site, vms=["prod"])
        assert not found.ok
        assert all(answer.seen.startswith("no answer") for answer in found.answers)
    yard.vms["more"] = MORE
    yard.apply()
    wait_for(lambda: ask("more.try.example", "A", 5301, "10.77.0.1") == ["10.77.0.9"])


def _silent(_channel: socket.socket, end: threading.Event) -> None:
    end.wait()


def _dripping(channel: socket.socket, end: threading.Event) -> None:
    while not end.wait(0.05):
        channel.sendall(b" ")


def _endless(channel: socket.socket, end: threading.Event) -> None:
    while not end.is_set():
        channel.sendall(b" " * 65536)


def _garbage(channel: socket.socket, _end: threading.Event) -> None:
    channel.sendall(b"220 ready\r\n")


def _no_object(channel: socket.socket, _end: threading.Event) -> None:
    channel.sendall(b"[1]")


def _nothing(_channel: socket.socket, _end: threading.Event) -> None:
    pass


HANGS, NO_ANSWER, ENDLESS = "kea: it hangs: no answer", "gives no answer of Kea's", "has no end"
ANSWERS: dict[str, tuple[Callable[[socket.socket, threading.Event], None] | None, str]] = {
    "accepts nobody": (None, HANGS),
    "is silent": (_silent, HANGS),
    "drips": (_dripping, HANGS),
    "never ends": (_endless, ENDLESS),
    "is another program": (_garbage, NO_ANSWER),
    "answers with no object": (_no_object, NO_ANSWER),
    "hangs up": (_nothing, NO_ANSWER),
}


@pytest.mark.parametrize("how", ANSWERS)
def test_whatever_listens_on_keas_socket(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, said = ANSWERS[how]
    monkeypatch.setattr(kea, "_LIMIT", 0.5)
    monkeypatch.setattr(kea, "_LONGEST", 2**18)
    monkeypatch.chdir(tmp_path)
    end = threading.Event()
    with socket.socket(socket.AF_UNIX) as service:
        service.bind("kea.sock")
        service.listen(0)

        def serve() -> None:
            channel, _ = service.accept()
            with channel, contextlib.suppress(OSError):
                while channel.recv(65536) and answer is not _silent:
                    pass
                if answer:
                    answer(channel, end)

        thread = threading.Thread(target=serve)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        if answer:
            thread.start()
        else:  # its queue is full
            for one in waiting:
                one.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    one.connect("kea.sock")
        try:
            with pytest.raises((TimedOut, DriverFailed)) as caught:
                kea.command("kea.sock", "config-reload")
        finally:
            end.set()
            for one in waiting:
                one.close()
            if answer:
                thread.join()
    assert said in caught.value.message
    assert isinstance(caught.value, TimedOut) == (said == HANGS)


# ---- nftables

TABLE = "table ip farmhand_try_it"
THEIRS = {
    "a chain": ("chain theirs {\n counter\n}", "chain theirs"),
    "a set": ("set theirs {\n type ipv4_addr\n}", "set theirs"),
    "a rule": ("chain prerouting {\n counter\n}", "a rule in prerouting"),
    "an element": ("map ssh {\n type inet_service : ipv4_addr . inet_service\n"
                   " elements = { 2222 : 10.1.2.3 . 22 }\n}", "2222 : 10.1.2.3 . 22"),
}  # fmt: skip


def _ruleset() -> str:
    return subprocess.run(["nft", "list", "ruleset"], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("made", ["before us", "in ours"])
@pytest.mark.parametrize("what", THEIRS)
def test_what_others_have_in_a_table_of_our_name_stays(what: str, made: str, yard: Yard) -> None:
    yard.use("nftables")
    text, said = THEIRS[what]
    with own_network():
        if made == "in ours":
            yard.apply()
        script = f"{TABLE} {{\n{text}\n}}\n"
        subprocess.run(["nft", "-f", "-"], input=script.encode(), check=True)
        before, written = _ruleset(), files(yard)
        if made == "in ours":
            yard.services["nftables"]["interface"] = "br0"  # all of it is to be written anew
        with pytest.raises(NotOurs) as caught:
            yard.apply()
        assert f"in {TABLE} is what farmhand didn't put there: {said}" in caught.value.message
        assert _ruleset() == before
        assert files(yard) == written
        warnings = destroy(yard)
        assert any("didn't put there" in text for text in warnings) == (made == "in ours")
        assert (_ruleset() == before) == (made == "before us")
        assert "10.77.0." not in _ruleset()
        assert ("counter" if what == "a rule" else said) in _ruleset()
        subprocess.run(["nft", "delete", *TABLE.split()], check=True)
        assert yard.apply().changed


def test_elements_beside_what_others_have_go_on(yard: Yard) -> None:
    """One VM more is one element more: nothing else is touched."""
    yard.use("nftables")
    with own_network():
        yard.apply()
        subprocess.run(
            ["nft", "-f", "-"], input=f"{TABLE} {{\nchain theirs {{\n}}\n}}\n".encode(), check=True
        )
        yard.vms["more"] = MORE
        yard.apply()
        assert "chain theirs" in _ruleset()
        assert "22009 : 10.77.0.9 . 22" in _ruleset()


def test_a_reload_that_takes_long_is_waited_for_while_it_works(
    yard: Yard, daemons: Daemons, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs isn't: all goes back, by a reload that doesn't."""
    yard.use("nginx")
    daemons.start("nginx")
    yard.apply()
    before = files(yard)
    monkeypatch.setattr(daemons_of, "_LIMIT", 2)
    reload, once = yard.services["nginx"]["reload"], yard.directory / "logs" / "once"
    hangs = f'[ -e {once} ] || {{ : >{once}; sleep 600; }}; exec "$@"'
    yard.services["nginx"]["reload"] = ["sh", "-c", hangs, "sh", *reload]
    gone = yard.vms.pop("prod")
    with pytest.raises(TimedOut, match=r"still running after \d+ s, ended: sh -c") as caught:
        yard.apply()
    assert spelled(caught.value.remedy).endswith("every file and daemon is as it was before")
    assert files(yard) == before
    works = 'end=$(($(date +%s) + 5)); while [ $(date +%s) -lt $end ]; do :; done; exec "$@"'
    yard.services["nginx"]["reload"] = ["sh", "-c", works, "sh", *reload]
    assert yard.apply().changed
    assert files(yard) != before
    yard.vms["prod"] = gone
