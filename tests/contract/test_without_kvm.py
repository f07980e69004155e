"""A guest that shows no sign of life under KVM is started once more without it.

The guests are real, under a real libvirtd. What is stood in: that KVM runs them. The driver says so, and
QEMU emulates (or KVM works): no machine's KVM can be told to be half there. The guest is lifeless to
anybody outside, for it has no console and writes nothing. Its patience is shorter than a user's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from machine_rigs import LibvirtRig
from rigs import FARM

from host.run import Runner
from hypervisors.api import Capabilities, Hypervisor, Machine, MachineSpec
from hypervisors.host import OpenHost
from hypervisors.libvirt.domain_types import Qemu
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.kvm import KvmVerdict, kvm_usable
from hypervisors.libvirt.kvm_trust import KvmTrust
from inventory.errors import Several, Text, TimedOut, spelled
from inventory.loader import load
from provision.allocate import Allocation
from provision.engine.journal import current_step
from provision.engine.report import QuietReporter
from provision.member import Member
from provision.power import wait_until_ready, write_identity
from provision.site import Site
from tests import farm
from tests.identities import KATA


class Claiming(LibvirtHypervisor):
    """Says that KVM runs its machines."""

    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), driver="kvm", accelerated=True)

    def find(self, name: str) -> Machine | None:
        found = super().find(name)
        return replace(found, accelerated=True) if found else None


class Heard(QuietReporter):
    def __init__(self) -> None:
        self.warnings: list[tuple[str, str]] = []

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.warnings.append((vm, spelled(text)))


def guest_spec(member: Member, given: Allocation) -> MachineSpec:
    """Its guest is the rig's, without a console."""
    del given
    site = member.site
    assert isinstance(site, ClaimingSite)
    spec = site.guests.spec(member.vm, stamp=site.stamp)
    return replace(spec, cmdline=spec.cmdline.replace("console=ttyS0", "console=tty0"))


class ClaimingSite(Site):
    """Its driver claims KVM until that is distrusted."""

    guests: LibvirtRig
    identity = KATA  # the rig's machines are that farm's
    stamp = ""
    distrusted = ""

    def distrust_kvm(self, host: str, why: str) -> None:
        self.distrusted = why
        super().distrust_kvm(host, why)

    def _open(self, host: str) -> OpenHost:
        opened = super()._open(host)
        opened._connect, opened._open_disks = self._connect, self.guests.disks
        return opened

    def _connect(self) -> Hypervisor:
        guests, kind = self.guests, self.guests.kind
        if self.distrusted:
            kind = Qemu(KvmVerdict(False, self.distrusted))
        return (LibvirtHypervisor if self.distrusted else Claiming)(
            guests.uri, KATA, guests.disks(), Runner(), step=current_step, kind=kind
        )


@pytest.fixture
def site(real: LibvirtRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClaimingSite]:
    for name in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setattr("provision.power.LIFELESS", 3.0)
    monkeypatch.setattr(Member, "spec", guest_spec)
    file = tmp_path / "kata.yaml"
    file.write_text(
        f"farm: {FARM}\nhosts: {{here: {{driver: kvm}}}}\nnetwork: {{mode: user}}\n"
        "templates: {base: {build: debian-12}}\nssh: {ready_timeout: 5s}\n"
        "vms: {one: {memory: 192M}, two: {memory: 192M}}\n"
    )
    with ClaimingSite(load(file), reporter=Heard()) as made:
        made.guests = real
        made.prepare()
        yield made


def define(site: ClaimingSite, *vms: str) -> Hypervisor:
    hypervisor = site.hypervisor("here")
    for vm in vms:
        spec = Member(site, vm).spec(site.allocator.allocate(vm))
        hypervisor.define(spec, site.guests.template)
        write_identity(Member(site, vm))
    return hypervisor


def warned(site: ClaimingSite) -> list[tuple[str, str]]:
    assert isinstance(site.reporter, Heard)
    return site.reporter.warnings


def test_lifeless_ones_are_started_again_without_kvm(site: ClaimingSite, tmp_path: Path) -> None:
    """Each once, and it is told of each; KVM is distrusted from then on. They have no ssh that answers,
    so that the end is a time-out all the same."""
    define(site, "one", "two")
    with pytest.raises(Several, match=r"nothing has gone on in it for 5s"):
        farm.start(site, ["one", "two"])
    assert sorted(vm for vm, _ in warned(site)) == ["one", "two"]
    for _, text in warned(site):
        assert "nothing on its console in 3 s under KVM: started again" in text
        assert "until it boots anew" in text
    assert "sign of life" in site.distrusted
    assert not site.hypervisor("here").capabilities().accelerated
    assert not kvm_usable(Runner(), tmp_path / "cache").usable
    steps = [step for record in site.journal.history(10) for step in record.steps]
    assert sum("cut the power of" in str(step) for step in steps) == 2


@pytest.mark.parametrize("alive", ["it writes", "another answered before"])
def test_others_are_not(site: ClaimingSite, tmp_path: Path, alive: str) -> None:
    if alive == "it writes":
        site.stamp = "A"
    else:
        KvmTrust(tmp_path / "cache").prove()
    hypervisor = define(site, "one")
    hypervisor.start(f"{FARM}-one")
    since, limit = time.monotonic(), time.monotonic() + 120
    while site.stamp and not _wrote(hypervisor):  # before it is judged, for its patience is short here
        assert time.monotonic() < limit
        time.sleep(0.1)
    with pytest.raises(TimedOut, match="was not ready"):
        wait_until_ready(Member(site, "one"), since=since)
    assert warned(site) == []
    assert site.distrusted == ""


def test_one_that_runs_and_never_answered_is_waited_for(site: ClaimingSite) -> None:
    hypervisor = define(site, "one")
    hypervisor.start(f"{FARM}-one")
    with pytest.raises(TimedOut, match="was not ready"):
        farm.start(site, ["one"])
    (action,) = farm.start(site, ["one"], wait=False).actions
    assert action.text == "runs already"
    assert [record.verb for record in site.journal.history(2)] == ["wait"]


def _wrote(hypervisor: Hypervisor) -> bool:
    pulse = hypervisor.pulse(f"{FARM}-one")
    return pulse is not None and bool(pulse.written)


def test_trust_is_of_this_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trust = KvmTrust(tmp_path / "cache")
    assert not trust.proven()
    trust.prove()
    trust.prove()
    assert trust.proven()
    other = tmp_path / "boot_id"
    other.write_text("another boot\n")
    monkeypatch.setattr("host.processes.BOOT_ID", other)
    assert not trust.proven()
