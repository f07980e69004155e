"""How often a command has to wait for another machine's answer. Counted in frames, over a real ssh, of a
farm under a real libvirtd: each turn costs what the way costs, and that may be 100 ms."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from far_rig import FarMachine, base_image, far_farm

from host.run import which
from hypervisors.far.frames import Pipe
from hypervisors.libvirt.private import PrivateLibvirt
from provision.doctor import examine
from provision.engine.report import QuietReporter
from provision.member import Member, each, members_of
from provision.site import Site, open_site
from tests import farm
from tests.identities import KATA

VMS = ("a", "b", "c", "d", "e", "f", "g")


class Turns:
    """``count``: how often something was asked after something had been answered. ``asked``: what."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.asked: Counter[str] = Counter()
        self._answered = True
        send, receive = Pipe.send, Pipe.receive

        def sending(pipe: Pipe, frame: Mapping[str, Any], data: bytes = b"") -> None:
            if "ping" not in frame:
                self.count += self._answered
                self._answered = False
            if "call" in frame:
                self.asked[f"{frame['of']}.{frame['method']}"] += 1
            send(pipe, frame, data)

        def receiving(pipe: Pipe) -> tuple[dict[str, Any], bytes] | None:
            received = receive(pipe)
            if received and "ping" not in received[0]:
                self._answered = True
            return received

        patch.setattr(Pipe, "send", sending)
        patch.setattr(Pipe, "receive", receiving)


@pytest.fixture
def file(tmp_path: Path, private: PrivateLibvirt, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A farm of which all but one VM are made, and none runs."""
    place = Path(tempfile.mkdtemp(prefix="fh-"))
    place.chmod(0o711)
    for name in ("STATE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    base_image(tmp_path)
    with FarMachine(place, reader=private.qemu_uid()) as machine:
        [socket] = parse_qs(urlsplit(private.uri()).query)["socket"]
        path = tmp_path / "farm.yaml"
        path.write_text(far_farm(machine.uri(socket), machine.state / "disks", VMS))
        with open_site(path, reporter=QuietReporter()) as site:
            farm.template_import(site, "base")
            farm.clone_farm(site, VMS[:-1], start=False, wait=False)
        yield path
        with open_site(path, reporter=QuietReporter()) as site:
            farm.destroy(site, purge=True)
    shutil.rmtree(place)


def turns(file: Path, work: Callable[[Site], object], *, plan: bool = False) -> Turns:
    with pytest.MonkeyPatch.context() as patch:
        counted = Turns(patch)
        with open_site(file, reporter=QuietReporter(), plan=plan) as site:
            work(site)
    return counted


def test_commands_ask_little(file: Path, tmp_path: Path) -> None:
    seen: list[farm.FarmStatus] = []
    looked = turns(file, lambda site: seen.append(farm.status(site)))
    assert looked.count == 1, "with the agent that it takes"
    assert looked.asked == {"host.look": 1}
    states = {row.vm: (row.state, row.condition, row.error) for row in seen[0].vms}
    assert states == dict.fromkeys(VMS[:-1], ("stopped", "clean", "")) | {"g": ("not made", "", "")}
    [host] = seen[0].hosts
    assert host.free and "on 127.0.0.1, over ssh" in host.notes and not host.error

    planned = turns(file, lambda site: farm.clone_farm(site, start=False), plan=True)
    assert planned.asked["machines.capabilities"] <= 1
    assert planned.asked["host.places"] <= 1
    assert (planned.asked["machines.list"], planned.asked["machines.find"]) == (1, 1), "g isn't there"
    assert planned.asked["disks.find"] == len(VMS)

    with pytest.MonkeyPatch.context() as patch:
        examined = Turns(patch)
        assert list(examine(file).checks)
    assert examined.count <= 6
    assert max(examined.asked.values()) == 1


def test_members_of_another_machine_are_asked_all_at_once(file: Path) -> None:
    """Each waits for the rest: asked one after the other they would wait for ever."""
    together = threading.Barrier(len(VMS))

    def ask(member: Member) -> str:
        together.wait(60)
        return member.vm

    with open_site(file, reporter=QuietReporter()) as site:
        assert list(each(members_of(site), ask).items()) == [(vm, vm) for vm in VMS]


def test_a_look_leaves_nothing_there(file: Path) -> None:
    """Nor does it wait for others, or they for it."""
    with open_site(file, reporter=QuietReporter()) as site:
        place = Path(site.farm.hosts["far"].disks.path).parents[1]  # type: ignore[attr-defined]
        farm.status(site)
        assert not list((place / "run").rglob("far-*"))


# -- a shared connection ------------------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], FarMachine]]:
    """A machine, by an ssh that has so much more in its configuration."""
    place = Path(tempfile.mkdtemp(prefix="fh-"))
    real = which("ssh")
    assert real
    with FarMachine(place) as machine:

        def configured(text: str) -> FarMachine:
            (place / "config").write_text(f"Host *\n  ControlPath {place}/%C\n  {text}\n")
            program = tmp_path / "client" / "ssh"
            program.parent.mkdir()
            program.write_text(f'#!/bin/sh\nexec {real} -F {place}/config "$@"\n')
            program.chmod(0o755)
            monkeypatch.setenv("PATH", str(program.parent), prepend=":")
            return machine

        yield configured
        for control in place.glob("?" * 40):
            subprocess.run([real, "-S", control, "-O", "exit", "x"], check=False, capture_output=True)
    shutil.rmtree(place)


def _logins(machine: FarMachine) -> int:
    return machine.sshd.log.read_text().count("Accepted publickey")


def test_a_connection_that_the_user_s_ssh_shares_is_shared(
    shared: Callable[[str], FarMachine],
) -> None:
    machine = shared("ControlMaster auto\n  ControlPersist yes")
    for _ in range(3):
        link = machine.link(KATA)
        assert link.call("disks", "list") == ()
        link.close()
    assert _logins(machine) == 1


def test_who_serves_others_is_not_ended(shared: Callable[[str], FarMachine]) -> None:
    """Without ControlPersist the first ssh is everybody's connection."""
    machine = shared("ControlMaster auto")
    first, second = machine.link(KATA), machine.link(KATA)
    for link in (first, second):
        assert link.call("disks", "list") == ()
    first.close()
    assert second.call("disks", "list") == ()
    assert _logins(machine) == 1
    second.close()


def test_a_connection_that_it_does_not_share_is_not(shared: Callable[[str], FarMachine]) -> None:
    machine = shared("ControlMaster no")
    for _ in range(2):
        link = machine.link(KATA)
        assert link.call("disks", "list") == ()
        link.close()
    assert _logins(machine) == 2
