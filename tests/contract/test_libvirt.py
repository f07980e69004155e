"""What only real guests under a real libvirtd can show."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from machine_rigs import machines
from rigs import MIB, short_directory, template

from host.processes import command_line, parent_of, pids
from host.run import Runner
from hypervisors.api import FileSystem, Nic, Power
from hypervisors.console_log import files_of
from hypervisors.disks.contents import contents
from hypervisors.disks.images import image_info
from hypervisors.libvirt.domain_types import Qemu
from hypervisors.libvirt.domain_xml import domain_xml, read_domain
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.guest_agent import freeze, hears, thaw
from hypervisors.libvirt.kvm import KvmVerdict, kvm_usable
from hypervisors.libvirt.private import PrivateLibvirt
from inventory.errors import DriverFailed, Unsupported, UsageError, WrongState
from provision.guest.remote import tail_of
from tests.identities import KATA

NAME = "kata-prod"


@pytest.fixture
def place():
    path = short_directory()
    yield path
    shutil.rmtree(path)


def define(real, options="", stamp="A"):
    hypervisor = real.hypervisor()
    hypervisor.define(real.spec("prod", stamp=stamp, options=options), real.template)
    return hypervisor


def wait_until(check):
    limit = time.monotonic() + 300  # a guest boots in 2 s; on a busy machine in a minute
    while not check():
        assert time.monotonic() < limit
        time.sleep(0.05)


def kill_daemon(private):
    pid = int(private._pidfile.read_text())
    handle = os.pidfd_open(pid)
    signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)


def test_whoever_ends_is_reaped_in_that_moment(real):
    """libvirt sleeps 0.2 s where it finds a QEMU unreaped whose monitor has closed."""
    real.private.uri()
    parent = parent_of(int(real.private._pidfile.read_text()))
    status = Path(f"/proc/{parent}/status").read_text()
    ignored = int(re.search(r"^SigIgn:\s*(\w+)", status, re.MULTILINE)[1], 16)
    assert ignored >> (signal.SIGCHLD - 1) & 1


def test_a_killed_libvirtd_comes_back_and_finds_its_guests(real, capfd):
    hypervisor = define(real)
    real.boot("prod", "A")
    kill_daemon(real.private)
    machine = hypervisor.find(NAME)
    assert machine.power is Power.RUNNING and machine.started is not None
    kill_daemon(real.private)
    hypervisor.balloon(NAME, 128 * MIB, timeout=60)
    kill_daemon(real.private)
    hypervisor.stop(NAME, grace=60)
    assert hypervisor.find(NAME).power is Power.STOPPED
    assert capfd.readouterr().err == ""


def test_many_find_a_dead_libvirtd_at_once(real, capfd):
    """None frees the lost connection under another's call: libvirt warns of that, when it lives on."""
    hypervisor = define(real)
    for _ in range(40):
        kill_daemon(real.private)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: hypervisor.find(NAME), range(8)))
        assert len(found) == 8 and all(found)
    assert capfd.readouterr().err == ""


def test_a_daemon_that_dies_between_the_look_and_the_call(real, tmp_path):
    """Nobody listens any more where one was seen a moment ago."""
    define(real)
    answers = iter([f"qemu+unix:///system?socket={tmp_path}/gone"])
    hypervisor = LibvirtHypervisor(
        lambda: next(answers, None) or real.private.uri(),
        KATA, real.disks(), Runner(), kind=Qemu(kvm_usable(Runner(), tmp_path)),
    )  # fmt: skip
    assert hypervisor.find(NAME)
    hypervisor.close()


def test_without_a_balloon_driver(real):
    hypervisor = define(real, options="balloon=off")
    real.boot("prod", "A")
    with pytest.raises(Unsupported, match="no balloon driver"):
        hypervisor.balloon(NAME, 128 * MIB, timeout=2)
    with pytest.raises(Unsupported, match="no balloon driver"):
        hypervisor.memory(NAME)


def test_a_balloon_driver_that_never_was_is_noted(real, monkeypatch):
    hypervisor = define(real, options="balloon=off")
    real.boot("prod", "A")
    assert hypervisor.notes() == {}, "it may be booting still"
    monkeypatch.setattr("hypervisors.libvirt.balloon._BOOTING", 0.0)
    assert "not told yet" in hypervisor.notes()[NAME]
    hypervisor.stop(NAME, grace=0)
    assert hypervisor.notes() == {}


def test_a_pulse_is_what_a_guest_wrote_and_read(real):
    hypervisor = define(real, options="balloon=2")
    assert hypervisor.pulse(NAME) is None
    real.boot("prod", "A")
    pulse = hypervisor.pulse(NAME)
    assert pulse.console == (real.place / "prod.log").stat().st_size
    assert pulse.said.rstrip().endswith("READY")
    assert pulse.read > 0 and pulse.written > 0
    real.wait_for("prod", "UNLOADED")
    assert hypervisor.pulse(NAME).console > pulse.console
    hypervisor.stop(NAME, grace=0)
    assert hypervisor.pulse(NAME) is None


def test_a_guest_that_is_seen_to_shut_down_keeps_its_power(real):
    """It takes 6 s, with a word each second: longer than what one that shows nothing gets."""
    define(real, options="down=6")
    real.boot("prod", "A")
    said: list[str] = []
    hypervisor = LibvirtHypervisor(
        real.uri, KATA, real.disks(), Runner(), kind=real.kind, working=said.append
    )
    hypervisor.stop(NAME, grace=3)
    assert "DOWN 6" in (real.place / "prod.log").read_text()
    assert any("console" in text and "DOWN" in text for text in said)
    hypervisor.close()


def test_the_floor_follows_what_the_guest_uses(real):
    hypervisor = define(real, options="hog=64")
    real.boot("prod", "A")
    time.sleep(1.2)  # the statistics' period
    with pytest.raises(UsageError, match="needs"):
        hypervisor.balloon(NAME, 112 * MIB, timeout=20)
    assert hypervisor.memory(NAME).least > 112 * MIB
    assert hypervisor.find(NAME).power is Power.RUNNING


def test_a_guest_that_does_not_listen_loses_its_power(real):
    hypervisor = define(real, options="acpi=ignore")
    real.boot("prod", "A")
    hypervisor.stop(NAME, grace=1)
    assert hypervisor.find(NAME).power is Power.STOPPED


def test_a_guest_that_ends_stays_stopped(real):
    hypervisor = define(real, options="then=poweroff panic=0")
    hypervisor.start(NAME)
    wait_until(lambda: hypervisor.find(NAME).power is Power.STOPPED)


def test_a_guest_that_panics_is_kept_as_it_was_then(real):
    """Though its kernel would start anew; also by a libvirtd that was killed and is another one."""
    hypervisor = define(real, options="then=crash")
    hypervisor.start(NAME)
    wait_until(lambda: hypervisor.find(NAME).power is Power.PANICKED)
    assert "Kernel panic" in (real.place / "prod.log").read_text(errors="replace")
    with pytest.raises(WrongState, match="panicked"):
        hypervisor.start(NAME)
    kill_daemon(real.private)
    assert hypervisor.find(NAME).power is Power.PANICKED
    steps: list[str] = []
    real.hypervisor(step=steps.append).stop(NAME, grace=600)
    assert steps == [f"cut the power of {NAME}"], "it isn't asked: it hears nothing"
    assert hypervisor.find(NAME).power is Power.STOPPED


def test_the_console_of_the_last_start_is_kept(real):
    hypervisor = define(real)
    real.boot("prod", "A")
    console = hypervisor.console(NAME)
    assert console.argv[0] == "virsh" and console.argv[-1] == NAME
    first = console.log.read_text(errors="replace")
    hypervisor.stop(NAME, grace=0)
    hypervisor.start(NAME)
    kept = console.log.with_name("prod.log.1").read_text(errors="replace")
    assert kept.startswith(first[:100]) and "READY" in kept


FLOOD = "ignore_loglevel dyndbg=+p"  # the kernel's own words: some 50 KiB


def test_a_guest_that_floods_its_console_fills_no_disk(place, guest, kvm, private, monkeypatch):
    """What it says last is there all the same, through turned over files, a killed libvirtd, and the
    next start."""
    most = 8192
    monkeypatch.setattr("hypervisors.libvirt.private._CONSOLE_MAX", most)
    own = PrivateLibvirt(place / "s", place / "r", private._cache, hide_kvm=not kvm.usable)
    with contextlib.ExitStack() as stack:
        stack.callback(own.stop, force=True)
        real = stack.enter_context(machines("qcow2", own, guest, kvm))
        hypervisor = define(real, options=f"{FLOOD} down=3")
        log = real.place / "prod.log"

        def end(of=log):
            return tail_of(of, lines=1000)

        def bounded():
            return all(path.stat().st_size <= most for path in files_of(log) if path.exists())

        real.start("prod", 0)
        wait_until(lambda: "READY" in end())
        assert bounded() and log.with_name("prod.log.0").stat().st_size > most // 2
        assert len(end()) > log.stat().st_size, "what is before the last turn is shown, too"
        assert hypervisor.pulse(NAME).console > most // 2
        assert "READY" in hypervisor.pulse(NAME).said
        kill_daemon(own)
        hypervisor.stop(NAME, grace=60)
        assert "DOWN 3" in end(), "the guest was followed while there was no libvirtd, and after"
        os.kill(int(own._keeper_pidfile.read_text()), signal.SIGKILL)
        wait_until(lambda: not own._is_up())
        real.start("prod", 0)
        assert "DOWN 3" in end(log.with_name("prod.log.1")), "the last start's is kept"
        wait_until(lambda: "READY" in end())
        assert bounded()
        keeper = int(own._keeper_pidfile.read_text())
    assert not Path(f"/proc/{keeper}").exists()
    assert list(place.iterdir()) == []


def test_a_bridge_and_a_network_are_plain_libvirt(real):
    spec = real.spec("prod")
    for mode in ("bridge", "network"):
        nic = Nic(mac="52:54:00:01:02:03", mode=mode, target='br"0<&>')
        xml = domain_xml(replace(spec, nic=nic), Path("/x"), "qcow2", "base@1", kvm=True, system=True)
        assert read_domain(xml).mac == "52:54:00:01:02:03"
        assert "br&quot;0&lt;&amp;&gt;" in xml


def running(real):
    return real.hypervisor()._look_up(NAME)


def test_a_guest_can_be_told_that_it_lives_once_more(real):
    hypervisor = define(real)
    hypervisor.start(NAME)
    domain = running(real)
    ids = re.findall("<genid>(.*)</genid>", domain.XMLDesc(0))
    assert re.findall('"vmgenid","guid":"([^"]*)"', qemu_line(domain.UUIDString())) == ids


def test_memory_that_an_admin_had_saved_is_never_given_to_another_disk(real):
    """Whoever wants it stopped is refused, or told that it is given up."""
    define(real)
    warned: list[str] = []
    hypervisor = LibvirtHypervisor(
        real.uri, KATA, real.disks(), Runner(), kind=real.kind, warn=warned.append
    )
    real.boot("prod", "A")
    domain = running(real)
    domain.managedSave(0)
    for wants in (
        lambda: hypervisor.stop(NAME, grace=60),
        lambda: hypervisor.checkpoint(NAME, "one"),
    ):
        with pytest.raises(WrongState, match="is saved, not stopped"):
            wants()
    assert domain.hasManagedSaveImage(0)
    hypervisor.stop(NAME, grace=0)
    assert not domain.hasManagedSaveImage(0)
    hypervisor.stop(NAME, grace=0)
    assert warned == [f"{NAME} was saved (virsh managedsave): that memory is given up with its disk"]
    domain.create()
    domain.managedSave(0)
    hypervisor.reset(NAME, "clean")
    assert not domain.hasManagedSaveImage(0)
    assert len(warned) == 2
    hypervisor.close()


def qemu_line(uuid: str) -> str:
    lines = (command_line(pid) for pid in pids())
    return next(" ".join(line) for line in lines if "-uuid" in line and uuid in line)


def test_a_guest_with_an_agent_is_frozen_and_thawed(real):
    define(real, options="agent=qemu")
    real.boot("prod", "A")
    wait_until(lambda: freeze(running(real)))
    text = real.wait_for("prod", "fsfreeze-freeze")
    assert "fsfreeze-thaw" not in text
    assert not thaw([running(real)])
    real.wait_for("prod", "fsfreeze-thaw")


def test_a_guest_without_an_agent_goes_on(real):
    hypervisor = define(real)
    real.boot("prod", "A")
    assert not hears(running(real)) and not freeze(running(real))
    assert len(thaw([running(real)], patience=0)) == 1
    assert not hypervisor.find(NAME).agent
    assert hypervisor.file_systems([NAME]) == {}
    assert hypervisor.find(NAME).power is Power.RUNNING


def test_a_guest_with_an_agent_tells_how_full_it_is(real):
    hypervisor = define(real, options="agent=qemu full=8")
    real.boot("prod", "A")
    wait_until(lambda: hypervisor.find(NAME).agent)
    wait_until(lambda: hypervisor.file_systems([NAME]))
    assert hypervisor.file_systems([NAME]) == {NAME: (FileSystem("/data", 8 * 2**20, 0),)}
    assert hypervisor.file_systems([]) == {}
    running(real).suspend()
    assert hypervisor.file_systems([NAME]) == {}, "one that hangs is not waited for"


def efi_image(real) -> Path:
    """A disk without boot code for a BIOS; its EFI system partition has the small guest, and what OVMF's
    shell is to do: to show a variable, set it, show it again, and start the guest."""
    files, image = real.place / "esp", real.place / "efi.img"
    files.mkdir()
    shutil.copy(real.guest.kernel, files / "vmlinuz.efi")
    shutil.copy(real.guest.initrd, files / "initrd.gz")
    show = "setvar Mark -guid 5c1f6e0a-3f0e-4d5c-9b7e-0d9a1c2b3e4f"
    start = "vmlinuz.efi initrd=\\initrd.gz console=ttyS0 quiet panic=-1"
    lines = ("fs0:", show, f'{show} -nv -bs -rt ="set"', show, start, "")
    (files / "startup.nsh").write_text("\r\n".join(lines))
    made = Runner()
    made.change("qemu-img", "convert", "-f", "vvfat", "-O", "raw", f"fat:{files}", image)
    made.change("sfdisk", "-q", "--part-type", image, "1", "ef")
    return image


def test_a_disk_that_starts_by_efi_alone_and_is_all_the_machines_state(real):
    """What sets a variable of the firmware's finds it as long as the machine runs; it is gone after a
    stop and after a reset. So nothing of it is beside the disk, or missing from a checkpoint."""
    image = efi_image(real)
    seen = contents(Runner(), image, image_info(Runner(), image))
    assert seen.efi and not seen.bios
    sealed = real.disks().seal(image, template(name="efi"))
    plain = replace(real.spec("prod"), kernel=None, initrd=None, cmdline="", disk_size=sealed.size)
    hypervisor = real.hypervisor()
    hypervisor.define(replace(plain, memory=256 * MIB, firmware="efi"), sealed)
    before = set(real.place.rglob("*"))
    boot_and_set(real, "READY")
    hypervisor.stop(NAME, grace=0)
    assert {path.name for path in set(real.place.rglob("*")) - before} <= {"prod.log"}
    boot_and_set(real, SET)
    hypervisor.reset(NAME, "clean")
    boot_and_set(real, SET)


SET = "73 65 74"
"""A variable's value, as OVMF's shell shows it."""


def boot_and_set(real, until: str) -> None:
    """At its start no such variable is there; then there is one."""
    real.start("prod", 0)
    text = real.wait_for("prod", until)
    assert "Unable to get" in text.partition(SET)[0] and SET in text


def test_an_absent_libvirtd_is_one_line_with_a_remedy(real, tmp_path):
    where = f"qemu+unix:///system?socket={tmp_path}/none"
    lost = LibvirtHypervisor(
        where, KATA, real.disks(), Runner(), kind=Qemu(kvm_usable(Runner(), tmp_path))
    )
    with pytest.raises(DriverFailed) as caught:
        lost.list()
    assert caught.value.remedy and "\n" not in str(caught.value)


# -- the private daemon itself ----------------------------------------------------------------------


def test_a_daemon_started_by_many_is_one_and_ends_without_a_trace(place, private):
    mounts = _mounts()
    daemons = [PrivateLibvirt(place / "s", place / "r", private._cache, True) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda d: d.uri(), daemons))) == 1
    pid = int(daemons[0]._pidfile.read_text())
    assert daemons[3].running()
    daemons[5].stop()
    daemons[6].stop()
    assert not daemons[0].running() and not Path(f"/proc/{pid}").exists()
    assert list(place.iterdir()) == []
    assert _mounts() == mounts


def _mounts():
    """But for the networks by name of tests that run beside this one."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if not line.split()[4].startswith("/run/netns")]


def test_stale_files_of_a_dead_daemon_are_no_obstacle(place, private):
    daemon = PrivateLibvirt(place / "s", place / "r", private._cache, True)
    daemon.uri()
    kill_daemon(daemon)
    wait_until(lambda: not daemon.running())
    assert daemon._socket.exists()
    daemon.uri()
    assert daemon.running()
    daemon.stop()


def test_a_daemon_with_guests_is_not_stopped_unless_forced(real):
    hypervisor = define(real)
    real.boot("prod", "A")
    with pytest.raises(WrongState, match=NAME):
        real.private.stop()
    kill_daemon(real.private)
    with pytest.raises(WrongState, match=NAME):
        real.private.stop()
    real.private.stop(force=True)
    assert real.private.machines_running() == ()
    assert hypervisor.find(NAME).power is Power.STOPPED  # its definition was kept


def test_a_daemon_that_was_not_to_see_kvm_is_started_anew_when_it_is(real):
    """Its guests don't notice."""
    place = real.place
    blind, seeing = (
        PrivateLibvirt(place / "s", place / "r", real.private._cache, h) for h in (True, False)
    )
    hypervisor = LibvirtHypervisor(
        blind.uri, KATA, real.disks(), Runner(), kind=Qemu(KvmVerdict(False, ""))
    )  # fmt: skip
    hypervisor.define(real.spec("prod", stamp="A"), real.template)
    hypervisor.start(NAME)
    first, guest = int(blind._pidfile.read_text()), blind._guests
    [(_, qemu)] = guest()
    try:
        blind.uri()
        assert int(blind._pidfile.read_text()) == first
        seeing.uri()
        second = int(seeing._pidfile.read_text())
        assert second != first and not Path(f"/proc/{first}").exists()
        assert hypervisor.find(NAME).power is Power.RUNNING
        assert list(guest()) == [(NAME, qemu)]
        blind.uri()  # nothing is gained by hiding it now
        assert int(seeing._pidfile.read_text()) == second
    finally:
        hypervisor.destroy(NAME)
        hypervisor.close()
        seeing.stop(force=True)


def test_too_long_a_runtime_directory_is_refused_in_words(place):
    daemon = PrivateLibvirt(place / "s", place / ("r" * 100), place / "c", True)
    with pytest.raises(DriverFailed, match="too long"):
        daemon.uri()


def test_only_its_owner_may_talk_to_it(private):
    private.uri()
    for path in private._socket.parent.glob("libvirt-sock*"):
        assert path.stat().st_mode & 0o077 == 0
