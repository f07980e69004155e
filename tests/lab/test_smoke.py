"""The labs are what they are said to be: hosts on which ZFS, LVM, KVM and libvirt really work (Xen:
test_smoke_xen.py). Each test takes spare disks, and gives them back empty."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.libvirt.kvm import kvm_usable
from hypervisors.ownership import FarmIdentity

pytestmark = pytest.mark.lab
in_both = pytest.mark.xen

SPARE = ("/dev/vdb", "/dev/vdc", "/dev/vdd")


SMOKE = FarmIdentity("smoke", "0" * 32)


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


def wait_for(path: str) -> Path:
    """udev makes links a moment after the command that asks for them has ended."""
    for _ in range(200):
        if Path(path).exists():
            break
        time.sleep(0.1)
    return Path(path).resolve(strict=True)


@pytest.fixture
def pool() -> Iterator[str]:
    name = f"smoke{random.SystemRandom().randrange(10**6)}"
    run("zpool", "create", "-f", name, SPARE[0])
    yield name
    run("zpool", "destroy", name)
    run("wipefs", "-qaf", SPARE[0])


@pytest.fixture
def group() -> Iterator[str]:
    name = f"smoke{random.SystemRandom().randrange(10**6)}"
    run("vgcreate", "-q", name, SPARE[1])
    yield name
    run("vgremove", "-qq", "-y", name)
    run("pvremove", "-qq", "-y", SPARE[1])


@in_both
def test_zfs_clones_a_volume_and_goes_back(pool: str) -> None:
    run("zfs", "create", "-V", "64M", f"{pool}/golden")
    golden = wait_for(f"/dev/zvol/{pool}/golden")
    with golden.open("r+b") as disk:
        disk.write(b"golden")
    run("zfs", "snapshot", f"{pool}/golden@sealed")
    run("zfs", "clone", f"{pool}/golden@sealed", f"{pool}/vm")
    clone = wait_for(f"/dev/zvol/{pool}/vm")
    assert clone.open("rb").read(6) == b"golden"
    written = run("zfs", "get", "-Hp", "-o", "value", "written@sealed", f"{pool}/golden").strip()
    assert written.isdigit()


@in_both
def test_pyzfs_snapshots_two_datasets_at_one_txg(pool: str) -> None:
    import libzfs_core

    for name in ("dev2", "prod"):
        run("zfs", "create", f"{pool}/{name}")
    libzfs_core.lzc_snapshot([f"{pool}/{name}@clean".encode() for name in ("dev2", "prod")])
    txgs = run(
        "zfs", "get", "-Hp", "-o", "value", "createtxg", f"{pool}/dev2@clean", f"{pool}/prod@clean"
    )
    assert len(set(txgs.split())) == 1


@in_both
def test_lvm_makes_thin_snapshots(group: str) -> None:
    run("lvcreate", "-qq", "-y", "--type", "thin-pool", "-L", "256M", "-n", "thin", group)
    run("lvcreate", "-qq", "-y", "-V", "128M", "--thinpool", "thin", "-n", "golden", group)
    with wait_for(f"/dev/{group}/golden").open("r+b") as disk:
        disk.write(b"golden")
    run("lvcreate", "-qq", "-y", "-s", "-kn", "-n", "vm", f"{group}/golden")
    assert wait_for(f"/dev/{group}/vm").open("rb").read(6) == b"golden"


@in_both
def test_lvm_makes_classic_snapshots(group: str) -> None:
    run("lvcreate", "-qq", "-y", "-L", "64M", "-n", "golden", group)
    run("lvcreate", "-qq", "-y", "-s", "-L", "32M", "-n", "vm", f"{group}/golden")
    wait_for(f"/dev/{group}/vm")
    assert run("lvs", "--noheadings", "-o", "lv_attr", f"{group}/vm").strip().startswith("s")


@in_both
@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_files_can_share_their_blocks(kind: str, tmp_path: Path) -> None:
    run(f"mkfs.{kind}", "-q", "-f", SPARE[2])
    run("mount", SPARE[2], str(tmp_path))
    try:
        (tmp_path / "a").write_bytes(b"x" * 2**20)
        run("cp", "--reflink=always", str(tmp_path / "a"), str(tmp_path / "b"))
    finally:
        run("umount", str(tmp_path))
        run("wipefs", "-qaf", SPARE[2])


def test_kvm_runs_a_guest(tmp_path: Path) -> None:
    verdict = kvm_usable(Runner(), tmp_path)
    assert verdict.usable, verdict.why


def test_farmhand_s_own_libvirtd_runs_a_guest_under_kvm(tmp_path: Path) -> None:
    """Our libvirtd, our driver, our disks; the guest is the small one of the contract suites."""
    from datetime import UTC, datetime
    from tempfile import mkdtemp

    from host.paths import cache_dir
    from hypervisors.api import MachineSpec, Nic, Owner, Template
    from hypervisors.disks.qcow2.disks import Qcow2Disks
    from hypervisors.libvirt.domain_types import Qemu
    from hypervisors.libvirt.driver import LibvirtHypervisor
    from hypervisors.libvirt.private import PrivateLibvirt
    from tests.contract import small_guest

    place = Path(mkdtemp(prefix="fh-"))
    place.chmod(0o711)
    kept = small_guest.build(cache_dir())
    kernel, initrd = (Path(shutil.copy(path, place)) for path in (kept.kernel, kept.initrd))
    log = place / "vm.log"
    private = PrivateLibvirt(place / "s", place / "r", place / "c", hide_kvm=False)
    runner = Runner()
    disks = Qcow2Disks(place / "disks", SMOKE, runner, reader_uid=private.qemu_uid())
    hypervisor = LibvirtHypervisor(
        private.uri, SMOKE, disks, runner, kind=Qemu(kvm_usable(runner, tmp_path))
    )
    try:
        image = place / "image.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "64M")
        template = disks.seal(image, Template(
            name="base", generation=1, ref="", size=64 * 2**20, sha256="", created=datetime.now(UTC),
            origin="smoke test", firstboot="none",
        ))  # fmt: skip
        owner = Owner(SMOKE, "vm")
        spec = MachineSpec(
            name="smoke-vm", owner=owner, memory=192 * 2**20, vcpus=1, disk_size=64 * 2**20,
            nic=Nic(mac="52:54:00:0a:0b:0d", mode="user", forwards=()), console_log=log,
            kernel=kernel, initrd=initrd, cmdline="console=ttyS0 quiet panic=-1",
        )  # fmt: skip
        hypervisor.define(spec, template)
        hypervisor.start("smoke-vm")
        end = time.monotonic() + 180
        while "READY" not in (text := log.read_text(errors="replace") if log.exists() else ""):
            assert time.monotonic() < end, text
            time.sleep(0.2)
        assert hypervisor.capabilities().accelerated
    finally:
        hypervisor.close()
        private.stop(force=True)
        shutil.rmtree(place, ignore_errors=True)


_DIES = """
import os, signal, sys
open("/proc/self/comm", "w").write("meant-to")
sys.stderr.write("these are its last words")
sys.stderr.flush()
os.kill(os.getpid(), signal.SIGTRAP)
"""


@in_both
def test_a_process_that_dies_leaves_its_last_words_and_its_threads(tmp_path: Path) -> None:
    """Also where it wrote them to a file without a name, as pytest's are."""
    nameless = tmp_path / "words"
    with nameless.open("wb") as words:
        nameless.unlink()
        process = subprocess.Popen([sys.executable, "-c", _DIES], stderr=words)
        assert process.wait(timeout=120) == -signal.SIGTRAP
    report = Path(f"/root/results/died/meant-to-{process.pid}.txt")
    text = report.read_text()
    report.unlink()
    assert f"died of signal {signal.SIGTRAP:d}" in text
    assert "these are its last words" in text
    assert "Thread 1 " in text
    assert "kill" in text.partition("-- its threads")[2]
