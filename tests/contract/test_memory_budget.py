"""A host's memory, shared among real guests: what idles gives for what starts, and none gives what it
needs. That nobody gets ahead of another is shown by tests/faults/test_at_once.py."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_rigs import Guests
from rigs import FARM, MIB

from cli.views import farm_status, memory_plan
from hypervisors.api import Hypervisor, Power
from hypervisors.host import OpenHost
from inventory.errors import NoSpace, Unsupported
from inventory.loader import load
from provision.engine.journal import current_step
from provision.engine.report import QuietReporter
from provision.member import Member
from provision.memory_budget import room_for
from provision.site import Site
from tests import farm
from tests.identities import KATA

HOSTS = {
    "real": ("driver: kvm", "mode: user"),
    "xen": ("driver: xen, uri: 'xen:///system'", "mode: bridge, bridge: xenbr0, addressing: dhcp"),
}
ROOM = 340 * MIB


class GuestsSite(Site):
    """A farm whose guests are the rig's."""

    guests: Guests
    identity = KATA

    def _open(self, host: str) -> OpenHost:
        opened = super()._open(host)
        opened._connect = lambda: self.guests.hypervisor(step=current_step)
        opened._open_disks = self.guests.disks
        return opened


@pytest.fixture(params=["real", pytest.param("xen", marks=pytest.mark.xen)])
def site(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[GuestsSite]:
    for name in ("STATE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))
    host, network = HOSTS[request.param]
    file = tmp_path / "kata.yaml"
    file.write_text(
        f"farm: {FARM}\nhosts: {{here: {{{host}, memory: {ROOM // MIB}M}}}}\n"
        f"network: {{{network}}}\ntemplates: {{base: {{build: debian-12}}}}\n"
        "vms:\n  idle: {memory: 192M, idle_memory: 96M}\n  new: {memory: 192M}\n"
    )
    with GuestsSite(load(file), reporter=QuietReporter()) as made:
        made.guests = request.getfixturevalue(request.param)
        made.prepare()
        yield made


def define(site: GuestsSite, options: str) -> Hypervisor:
    """``options`` are the idle guest's; it runs, and it has told what it needs."""
    hypervisor = site.guests.hypervisor()
    for vm, words in (("idle", options), ("new", "")):
        hypervisor.define(site.guests.spec(vm, options=words), site.guests.template)
    site.guests.boot("idle")
    time.sleep(1.2)  # the statistics' period
    return hypervisor


def given(hypervisor: Hypervisor) -> int:
    """Bytes, as the hypervisor itself counts them."""
    on = [m.name for m in hypervisor.list() if m.power is Power.RUNNING]
    return sum(hypervisor.memory(name).actual for name in on)


def test_a_guest_that_idles_falls_grows_and_gives_for_one_that_starts(site: GuestsSite) -> None:
    hypervisor = define(site, "")
    farm.balloon_all(site)
    low = hypervisor.memory(f"{FARM}-idle").actual
    assert 96 * MIB - MIB < low < 192 * MIB - MIB
    assert hypervisor.find(f"{FARM}-new").power is Power.STOPPED
    farm.balloon(site, "idle", 192 * MIB)
    assert abs(given(hypervisor) - 192 * MIB) < MIB
    with room_for(Member(site, "new"), 192 * MIB, "starting new"):
        assert low - MIB < given(hypervisor) <= ROOM - 192 * MIB
        site.guests.boot("new")
    assert 192 * MIB < given(hypervisor) <= ROOM
    (seen,) = farm.memory_plan(site).hosts.values()
    assert seen.in_use <= ROOM


def test_a_guest_that_needs_what_it_has_keeps_it(site: GuestsSite) -> None:
    hypervisor = define(site, "hog=96")
    before = hypervisor.memory(f"{FARM}-idle")
    new = Member(site, "new")
    with pytest.raises(NoSpace, match="idle has 192M"), room_for(new, 192 * MIB, "starting new"):
        raise AssertionError("there was none")
    after = hypervisor.memory(f"{FARM}-idle")
    assert abs(before.actual - after.actual) < MIB
    (prospect, _) = farm.memory_plan(site).prospects("here")
    assert prospect.guest.least is not None and prospect.guest.least > ROOM - 192 * MIB


@pytest.mark.parametrize("site", ["real"], indirect=True)
def test_a_guest_that_stopped_telling_is_no_guest_that_tells(
    site: GuestsSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its balloon driver is unloaded, and its last numbers stand. It is told in status, in the plan, and
    to who would balloon it, at once."""
    define(site, "balloon=4")
    (before, _) = farm.memory_plan(site).prospects("here")
    assert before.guest.gives > 0
    assert [vm.note for vm in farm.status(site).vms] == ["", ""]
    site.guests.wait_for("idle", "UNLOADED")
    monkeypatch.setattr("hypervisors.libvirt.balloon._STALE", 4.0)
    limit = time.monotonic() + 60
    while not (note := farm.status(site).vms[0].note):
        assert time.monotonic() < limit
        time.sleep(0.2)
    untold = r"its guest has not told for [\d.]+s what memory it needs: no balloon driver answers.*"
    assert re.fullmatch(untold, note)
    assert re.search(f"^idle: {untold}$", farm_status(farm.status(site)).text, re.MULTILINE)
    (after, _) = farm.memory_plan(site).prospects("here")
    assert (after.guest.least, after.guest.gives, after.target) == (None, 0, 192 * MIB)
    assert re.search(untold, after.why)
    assert re.search(untold, memory_plan(farm.memory_plan(site)).text)
    monkeypatch.setattr("provision.operations.balloon.PATIENCE", 600.0)
    with pytest.raises(Unsupported, match=untold) as caught:
        farm.balloon(site, "idle", 128 * MIB)
    assert "modprobe virtio_balloon" in caught.value.remedy
    steps = [str(step) for record in site.journal.history(10) for step in record.steps]
    assert not [step for step in steps if "set the memory of" in step], "the guest was not even asked"
