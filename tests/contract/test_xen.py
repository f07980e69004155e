"""What only real guests under a real Xen can show."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import libvirt
import pytest
from rigs import MIB

from hypervisors.api import Owner, Power
from inventory.errors import Conflict, DriverFailed, UsageError, WrongState
from tests.identities import KATA

pytestmark = pytest.mark.xen
NAME = "kata-prod"


def define(xen, options="", stamp="A"):
    hypervisor = xen.hypervisor()
    hypervisor.define(xen.spec("prod", stamp=stamp, options=options), xen.template)
    return hypervisor


def told(xen, after):
    """The guest's own count of its memory, in bytes: the last it said on its console."""
    found = re.findall(r"MEM=(\d+)", xen.wait_for("prod", "MEM=", after=after))
    return int(found[-1]) * 1024


def wait_until(check):
    limit = time.monotonic() + 120
    while not check():
        assert time.monotonic() < limit
        time.sleep(0.1)


def raw(name=NAME):
    """The domain, around our driver."""
    return libvirt.open("xen:///system").lookupByName(name)


def test_the_guest_itself_sees_the_balloon(xen):
    hypervisor = define(xen)
    start = xen.said("prod")
    xen.boot("prod", "A")
    before = told(xen, start)
    hypervisor.balloon(NAME, 128 * MIB, timeout=120)
    wait_until(lambda: before - told(xen, start) > 60 * MIB)
    hypervisor.balloon(NAME, 192 * MIB, timeout=120)
    wait_until(lambda: abs(before - told(xen, start)) < 2 * MIB)


@pytest.mark.parametrize("kind", ["xen", "xen_on_devices"])
def test_a_guest_is_saved_with_its_disk_and_runs_on_from_there(request, kind):
    """By libvirt's own save and restore: libxl maps no memory."""
    rig = request.getfixturevalue(kind)
    hypervisor = define(rig, options="pulse=0.5")
    since = rig.said("prod")
    rig.boot("prod", "A")
    counted(rig, since, 3)
    hypervisor.checkpoint(NAME, "ready", warm=True)
    kept = hypervisor.memories(NAME)["ready"]
    assert (kept.how, kept.trouble) == ("read", "")
    last = counted(rig, since, counted(rig, since, 0) + 4)
    for _ in range(2):
        hypervisor.stop(NAME, grace=0)
        rig.disks().restore(NAME, "ready")
        assert hypervisor.find(NAME).power is Power.SUSPENDED
        since = rig.said("prod")
        hypervisor.start(NAME)
        assert counted(rig, since, 1) < last, "it goes on from the checkpoint"
    assert hypervisor.settle(NAME) == ""
    hypervisor.destroy(NAME)
    assert not (rig.place / "warm" / NAME).exists()


def counted(rig, since, least):
    """What the guest has counted to, in its memory and on its disk alike; at least so far."""
    limit = time.monotonic() + 300
    while True:
        log = rig.hypervisor().console(NAME).log
        text = log.read_bytes()[since:].decode(errors="replace") if log else ""
        found = re.findall(r"PULSE=(\d+) DISK=(\d+) ", text)
        assert all(memory == disk for memory, disk in found), "of two moments"
        if found and int(found[-1][0]) >= least:
            return int(found[-1][0])
        assert time.monotonic() < limit, text
        time.sleep(0.1)


def test_the_guest_reads_its_first_boot_data_and_cannot_write_it(xen, tmp_path):
    """A file, so QEMU in dom0 serves it."""
    seed = tmp_path / "seed.iso"
    seed.write_bytes(b"farmhand-seed 1\n" * 1024)
    before = seed.read_bytes()
    hypervisor = xen.hypervisor()
    spec = replace(xen.spec("prod", stamp="A", options="seed=yes"), seed=seed)
    hypervisor.define(spec, xen.template)
    start = xen.said("prod")
    xen.boot("prod", "A")
    assert "SEED=farmhand-seed 1" in xen.wait_for("prod", "READY", after=start)
    hypervisor.stop(NAME, grace=0)
    assert seed.read_bytes() == before


def test_looks_at_one_that_is_being_destroyed(xen):
    """libvirt calls it running until libxl is through with it, and Xen has it no more by then."""
    hypervisor = define(xen)
    xen.boot("prod", "A")
    looks = []
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(xen.hypervisor().stop, NAME, grace=0)
        while not stopped.done():
            [machine] = hypervisor.list()
            looks.append((machine.power, machine.current))
        stopped.result()
    assert (Power.RUNNING, 0) in looks, looks
    assert {power for power, _ in looks} <= {Power.RUNNING, Power.STOPPED}
    assert hypervisor.find(NAME).power is Power.STOPPED


@pytest.fixture
def half_started(xen):
    """A killed command's: what it asked libvirtd for goes on, and there is no running domain yet."""
    hypervisor = define(xen)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(raw().create)
        time.sleep(0.5)
        assert not raw().isActive() and not asked.done()
        yield hypervisor
        asked.result()


def test_one_that_is_being_started_is_stopped_all_the_same(half_started):
    half_started.stop(NAME, grace=0)
    assert half_started.find(NAME).power is Power.STOPPED
    time.sleep(5)
    assert half_started.find(NAME).power is Power.STOPPED


def test_one_that_is_being_started_is_started_once(half_started):
    half_started.start(NAME)
    machine = half_started.find(NAME)
    assert machine.power is Power.RUNNING and machine.started is not None


def test_not_above_the_maximum_that_it_was_booted_with(xen):
    """The definition's may have been raised meanwhile: the guest would stop at the old one."""
    hypervisor = define(xen)
    xen.boot("prod", "A")
    raw().setMemoryFlags(256 * 1024, libvirt.VIR_DOMAIN_AFFECT_CONFIG | libvirt.VIR_DOMAIN_MEM_MAXIMUM)
    with pytest.raises(UsageError, match="maximum"):
        hypervisor.balloon(NAME, 256 * MIB, timeout=5)
    assert abs(hypervisor.find(NAME).current - 192 * MIB) < MIB


def test_the_floor_follows_what_the_guest_uses(xen):
    hypervisor = define(xen, options="hog=64")
    start = xen.said("prod")
    xen.boot("prod", "A")
    told(xen, start)  # by then it has told its free memory, too
    with pytest.raises(UsageError, match="with what it uses now it needs"):
        hypervisor.balloon(NAME, 112 * MIB, timeout=20)


def test_what_a_guest_told_before_it_gave_is_not_taken_for_now(xen):
    """As XenServer's agents, it tells only now and then."""
    hypervisor = define(xen, options="hog=32 period=8")
    start = xen.said("prod")
    xen.boot("prod", "A")
    told(xen, start)
    before = hypervisor.memory(NAME).least
    hypervisor.balloon(NAME, 152 * MIB, timeout=120)
    assert hypervisor.memory(NAME).least > before - 16 * MIB  # it gave 40


def test_a_guest_that_tells_nothing_is_left_what_its_kernel_needs(xen):
    hypervisor = define(xen, options="agent=off")
    xen.boot("prod", "A")
    with pytest.raises(UsageError, match="it should keep 88M"):
        hypervisor.balloon(NAME, 80 * MIB, timeout=20)
    assert abs(hypervisor.balloon(NAME, 96 * MIB, timeout=120) - 96 * MIB) < MIB


def test_where_libxl_alone_knows_why_nothing_started_its_log_is_named(xen, tmp_path):
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"no kernel at all")
    hypervisor = xen.hypervisor()
    hypervisor.define(replace(xen.spec("prod", stamp="A"), kernel=kernel), xen.template)
    with pytest.raises(DriverFailed) as failed:
        hypervisor.start(NAME)
    log = Path(failed.value.remedy.split()[-1])
    assert "Invalid kernel" in log.read_text()[-2000:]
    assert hypervisor.find(NAME).power is Power.STOPPED


def test_a_device_in_use_is_named_with_who_has_it(xen_on_devices):
    hypervisor = define(xen_on_devices)
    xen_on_devices.boot("prod", "A")
    other = xen_on_devices.raw_copy(NAME, "borrower")
    with pytest.raises(libvirt.libvirtError):
        other.create()
    hypervisor.stop(NAME, grace=0)
    other.create()
    with pytest.raises(Conflict, match="borrower has"):
        hypervisor.start(NAME)
    assert hypervisor.find(NAME).power is Power.STOPPED


def test_wrong_states_are_told_apart(xen):
    hypervisor = define(xen)
    xen.boot("prod", "A")
    with pytest.raises(WrongState, match="running"):
        hypervisor.start(NAME)
    hypervisor.stop(NAME, grace=0)
    with pytest.raises(WrongState, match="stopped"):
        hypervisor.balloon(NAME, 128 * MIB, timeout=5)


def test_a_saved_guest_goes_on_where_it_was(xen):
    hypervisor = define(xen)
    start = xen.said("prod")
    xen.boot("prod", "A")
    raw().managedSave(0)
    assert hypervisor.find(NAME).power is Power.STOPPED
    with pytest.raises(WrongState, match="saved"):
        hypervisor.checkpoint(NAME, "one")
    hypervisor.start(NAME)
    assert hypervisor.find(NAME).power is Power.RUNNING
    assert xen.wait_for("prod", "READY", after=start).count("READY") == 1  # it didn't boot
    hypervisor.stop(NAME, grace=120)  # and it listens


def test_a_reset_forgets_the_saved_memory(xen):
    """It belongs to the disk that is gone."""
    hypervisor = define(xen)
    xen.boot("prod", "A")
    raw().managedSave(0)
    hypervisor.reset(NAME, "clean")
    assert not raw().hasManagedSaveImage(0)
    assert xen.boot("prod", "A") == ""


def test_a_guest_that_does_not_listen_loses_its_power(xen):
    hypervisor = define(xen, options="acpi=ignore")
    xen.boot("prod", "A")
    hypervisor.stop(NAME, grace=1)
    assert hypervisor.find(NAME).power is Power.STOPPED


@pytest.mark.parametrize("end", ["poweroff", "crash"])
def test_a_guest_that_ends_stays_stopped(xen, end):
    hypervisor = define(xen, options=f"then={end}")
    hypervisor.start(NAME)
    wait_until(lambda: hypervisor.find(NAME).power is Power.STOPPED)


def test_the_console_is_xenconsoled_s(xen):
    hypervisor = define(xen)
    xen.boot("prod", "A")
    console = hypervisor.console(NAME)
    assert console.argv[:3] == ("virsh", "-c", "xen:///system") and console.argv[-1] == NAME
    assert "READY" in console.log.read_text(errors="replace")


def test_dom0_is_nobody_s(xen):
    hypervisor = xen.hypervisor()
    assert hypervisor.find("Domain-0").owner is None
    assert list(hypervisor.list()) == []


def test_macs_are_of_xen_s_range(xen):
    spec = xen.spec("prod")
    machine = xen.hypervisor().define(replace(spec, owner=Owner(KATA, "prod")), xen.template)
    assert machine.mac == spec.nic.mac and machine.mac.startswith("00:16:3e:")
