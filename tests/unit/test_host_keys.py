"""A VM's host key: when its files are lost, and when another machine answers in its place."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sshd_machine import Sshd, make_key

from inventory.errors import NotFound, Text, calls_in, spelled
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.guest import identity
from provision.member import Member
from provision.power import until_ready
from provision.site import Site
from tests import farm

FARM = """\
farm: kata
hosts: {here: {driver: fake}}
templates: {base: {build: debian-12, size: 64M}}
vms: {prod: {memory: 512M}}
"""


class Heard(QuietReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.warnings.append(f"{vm}: {spelled(text)}")


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: Heard) -> Iterator[Site]:
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    file = tmp_path / "kata.yaml"
    file.write_text(FARM)
    with Site(load(file), reporter=heard) as opened:
        farm.clone_farm(opened)
        yield opened


@pytest.fixture
def prod(site: Site) -> Member:
    return Member(site, "prod")


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Sshd]:
    make_key(tmp_path / "key")
    machine = Sshd("prod", tmp_path / "machine", tmp_path / "key").prepare().start()
    yield machine
    machine.stop()


def files(member: Member) -> tuple[Path, Path, Path]:
    """The private half, the public one, and what the OpenSSH client reads."""
    private = identity.host_key_file(member.site.paths, member.vm)
    known = identity.known_hosts(member.site.paths, member.vm)
    return private, private.with_name(f"{member.vm}.pub"), known


def test_what_follows_from_the_private_key_is_made_again(prod: Member, heard: Heard) -> None:
    private, public, known = files(prod)
    before = [path.read_bytes() for path in (private, public, known)]
    key = prod.endpoint().host_key
    for damage in (Path.unlink, lambda path: path.write_bytes(b"")):
        damage(public)
        damage(known)
        assert prod.endpoint().host_key == key
        prod.ssh_argv(prod.endpoint())
        assert known.read_bytes() == before[2]
        farm.reset(prod.site, ["prod"], to="clean")
        assert [path.read_bytes() for path in (private, public, known)] == before
    assert heard.warnings == []


def test_a_lost_key_is_a_refusal_until_the_vm_is_given_another(
    site: Site, prod: Member, heard: Heard
) -> None:
    old = prod.endpoint().host_key
    for path in files(prod)[:2]:  # what the OpenSSH client was told stays: it is no proof
        path.unlink()
    with pytest.raises(NotFound, match="no host key") as refused:
        prod.endpoint()
    assert [call.task for call in calls_in(refused.value.remedy)] == ["reset"]
    (shown,) = farm.status(site).vms
    assert "no host key" in spelled(shown.error) and shown.ssh == ""
    farm.reset(site, ["prod"], to="clean")
    assert heard.warnings == ["prod: its host key was lost: it gets another one at its start"]
    assert prod.endpoint().host_key not in ("", old)


def test_the_one_that_was_started_answers_whatever_its_clock_says(
    prod: Member, guest: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was off before. On a busy host an emulated guest's uptime has been half a minute ahead; this
    one's is this machine's."""
    monkeypatch.setattr(Member, "endpoint", lambda _: guest.endpoint())
    asyncio.run(until_ready(prod, since=time.monotonic()))


def test_the_openssh_client_takes_the_vm_and_nobody_else(prod: Member, guest: Sshd) -> None:
    _, public, known = files(prod)

    def log_in() -> subprocess.CompletedProcess[str]:
        there = guest.endpoint()
        here = replace(prod.endpoint(), port=guest.port, user=there.user, key=guest.client_key)
        return subprocess.run(
            prod.ssh_argv(here, "echo in"), capture_output=True, text=True, timeout=60, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    refused = log_in()
    assert refused.returncode == 255 and "verification failed" in refused.stderr
    public.write_text(f"{guest.host_key}\n")
    assert (done := log_in()).stdout == "in\n", done.stderr
    known.unlink()
    assert log_in().stdout == "in\n"
    make_key(guest.root / "another")
    public.write_bytes((guest.root / "another.pub").read_bytes())
    assert log_in().returncode == 255
