"""One contract, several drivers: each test runs unchanged on every rig below, the simulated and the
real. The summary at the end says which ran on what."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import lvm_rig
import pytest
import small_guest
import zfs_rig

from hypervisors.api import Disks, Forward, Hypervisor, MachineSpec, Nic, Owner, Template, no_step
from hypervisors.fake import FakeDisks, FakeHypervisor
from hypervisors.kvm import KvmVerdict
from hypervisors.libvirt_driver import LibvirtHypervisor
from hypervisors.private import PrivateLibvirt
from hypervisors.qcow2 import Qcow2Disks
from hypervisors.run import Runner
from provision.paths import cache_dir

MIB = 2**20
SIZE = 64 * MIB
FARM = "kata"
REAL = {
    "fake": "simulated",
    "qcow2": "real qemu-img files",
    "zfs": "real ZFS, a pool on a file",
    "lvm-thin": "real LVM thin volumes",
    "lvm-linked": "real LVM snapshots",
    "lvm-full": "real LVM volumes, copied",
    "libvirt": "real QEMU under a private libvirtd",
    "zvols": "real QEMU on real ZFS",
}


def template(generation: int = 1, name: str = "base") -> Template:
    return Template(
        name=name, generation=generation, ref="", size=SIZE, sha256="", created=datetime.now(UTC),
        origin="contract tests", firstboot="none",
    )  # fmt: skip


class FakeDisksRig:
    kind = "fake"

    def __init__(self, place: Path) -> None:
        self.place = place
        self.state = place / "world"

    def disks(self, farm: str = FARM, **options) -> Disks:
        if "headroom" in options:
            options["reserve"] = options.pop("headroom")
        return FakeDisks(farm, self.state, **options)

    def image(self) -> Path:
        path = self.place / "image"
        path.write_bytes(b"T")
        return path

    def write(self, machine: str, letter: str) -> None:
        FakeDisks(FARM, self.state).write(machine, letter.encode())

    def read(self, machine: str) -> str:
        return FakeDisks(FARM, self.state).content(machine).decode() or "T"


class Qcow2Rig:
    """A letter at 1 MiB stands for a disk's content."""

    kind = "qcow2"

    def __init__(self, place: Path) -> None:
        self.place = place
        self.root = place / "disks"

    def disks(self, farm: str = FARM, **options) -> Disks:
        return Qcow2Disks(self.root, farm, Runner(), **options)

    def image(self) -> Path:
        path = self.place / "image.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
        self._io(path, f"write -P {ord('T')} 1M 64k")
        return path

    def write(self, machine: str, letter: str) -> None:
        self._io(self._path(machine), f"write -P {ord(letter)} 1M 64k")

    def read(self, machine: str) -> str:
        subprocess.run(["qemu-img", "check", "-q", self._path(machine)], check=True)
        out = self._io(self._path(machine), "read -v 1M 512")
        return chr(int(out.split(":")[1].split()[0], 16))

    def _path(self, machine: str) -> Path:
        disk = self.disks().find(machine)
        assert disk
        return disk.path

    @staticmethod
    def _io(path: Path, command: str) -> str:
        argv = ["qemu-io", "-f", "qcow2", "-c", command, path]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def zfs_pool() -> Iterator[str]:
    with zfs_rig.pool() as name:
        yield name


@pytest.fixture(
    params=[
        pytest.param(FakeDisksRig, id="fake"),
        pytest.param(Qcow2Rig, id="qcow2"),
        pytest.param(zfs_rig.ZfsRig, id="zfs", marks=pytest.mark.lab),
        *(pytest.param(rig, id=rig.kind, marks=pytest.mark.lab) for rig in lvm_rig.RIGS),
    ]
)
def store(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param is zfs_rig.ZfsRig:
        request.getfixturevalue("zfs_pool")
    if request.param in lvm_rig.RIGS:
        with request.param() as made:
            yield made
    else:
        yield request.param(tmp_path)


class FakeRig:
    kind = "fake"

    def __init__(self, place: Path) -> None:
        self.place = place
        self.state = place / "world"
        self.template = FakeDisks(FARM, self.state).seal(self._image(), template())

    def _image(self) -> Path:
        path = self.place / "image"
        path.write_bytes(b"T")
        return path

    def disks(self, farm: str = FARM) -> FakeDisks:
        return FakeDisks(farm, self.state)

    def hypervisor(self, farm: str = FARM, step=no_step) -> Hypervisor:
        return FakeHypervisor(farm, self.disks(farm), self.state, step=step)

    def spec(self, vm: str, *, port: int = 0, stamp: str = "", options: str = "") -> MachineSpec:
        return _spec(FARM, vm, port, self.place)

    def boot(self, vm: str, stamp: str = "") -> str:
        """Start, wait until it is up; returns what the guest found on its disk before it wrote."""
        self.hypervisor().start(f"{FARM}-{vm}")
        found = self.disks().content(f"{FARM}-{vm}").decode()
        if stamp:
            self.disks().write(f"{FARM}-{vm}", stamp.encode())
        return found

    def add_foreign(self, name: str) -> None:
        self.hypervisor().add_foreign(name)

    def foreign_there(self, name: str) -> bool:
        return self.hypervisor().find(name) is not None


class LibvirtRig:
    kind = "libvirt"

    def __init__(self, place: Path, private: PrivateLibvirt, guest: small_guest.Guest) -> None:
        self.place = place
        self.private = private
        self.guest = guest
        self.opened: list[LibvirtHypervisor] = []
        image = place / "image.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
        self.template = self.disks().seal(image, template())

    def disks(self, farm: str = FARM) -> Disks:
        return Qcow2Disks(self.place / "disks", farm, Runner(), reader_uid=self.private.qemu_uid())

    def hypervisor(self, farm: str = FARM, step=no_step) -> LibvirtHypervisor:
        hypervisor = LibvirtHypervisor(
            self.private.uri, farm, self.disks(farm), Runner(), step=step,
            kvm=KvmVerdict(False, "the contract is held to under emulation"),
        )  # fmt: skip
        self.opened.append(hypervisor)
        return hypervisor

    def spec(self, vm: str, *, port: int = 0, stamp: str = "", options: str = "") -> MachineSpec:
        cmdline = f"console=ttyS0 quiet panic=-1 {options}" + (f" stamp={stamp}" if stamp else "")
        return replace(
            _spec(FARM, vm, port, self.place),
            kernel=self.guest.kernel, initrd=self.guest.initrd, cmdline=cmdline,
        )  # fmt: skip

    def boot(self, vm: str, stamp: str = "") -> str:
        hypervisor = self.hypervisor()
        hypervisor.start(f"{FARM}-{vm}")
        text = self.wait_for(vm, "READY")
        assert not stamp or f"STAMPED={stamp}" in text
        return text.partition("FOUND=")[2].split("\n")[0].strip()

    def wait_for(self, vm: str, word: str) -> str:
        log = self.place / f"{vm}.log"
        limit = time.monotonic() + 120
        while time.monotonic() < limit:
            text = log.read_text(errors="replace")
            if word in text:
                return text
            time.sleep(0.05)
        raise AssertionError(f"the guest never said {word}:\n{text}")

    def add_foreign(self, name: str) -> None:
        import libvirt

        connection = libvirt.open(self.private.uri())
        connection.defineXML(
            f"<domain type='qemu'><name>{name}</name><memory>65536</memory>"
            "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
        )
        connection.close()

    def foreign_there(self, name: str) -> bool:
        import libvirt

        connection = libvirt.open(self.private.uri())
        try:
            return name in [d.name() for d in connection.listAllDomains(0)]
        finally:
            connection.close()

    def close(self) -> None:
        """All machines of this test, also the foreign ones."""
        import libvirt

        connection = libvirt.open(self.private.uri())
        for domain in connection.listAllDomains(0):
            with contextlib.suppress(libvirt.libvirtError):  # not running, or it just ended
                domain.destroy()
            domain.undefine()
        connection.close()
        for hypervisor in self.opened:
            hypervisor.close()


def _spec(farm: str, vm: str, port: int, place: Path) -> MachineSpec:
    return MachineSpec(
        name=f"{farm}-{vm}", owner=Owner(farm, vm), memory=192 * MIB, vcpus=1, disk_size=SIZE,
        nic=Nic(mac="52:54:00:0a:0b:0c", mode="user", forwards=(Forward(port, 22),) if port else ()),
        console_log=place / f"{vm}.log",
    )  # fmt: skip


def short_directory() -> Path:
    """Where QEMU's own user may pass through, and short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="fh-"))
    path.chmod(0o711)
    return path


@pytest.fixture(scope="session")
def private() -> Iterator[PrivateLibvirt]:
    place = short_directory()
    daemon = PrivateLibvirt(place / "s", place / "r", cache_dir() / "libvirt", hide_kvm=True)
    yield daemon
    daemon.stop(force=True)
    assert not (place / "r").exists() and not (place / "s").exists()
    shutil.rmtree(place)


@pytest.fixture(scope="session")
def guest() -> Iterator[small_guest.Guest]:
    kept = small_guest.build(cache_dir())
    place = short_directory()  # the cache may be where QEMU's user can't reach
    yield small_guest.Guest(Path(shutil.copy(kept.kernel, place)), Path(shutil.copy(kept.initrd, place)))
    shutil.rmtree(place)


@pytest.fixture
def real(private: PrivateLibvirt, guest: small_guest.Guest) -> Iterator[LibvirtRig]:
    place = short_directory()
    rig = LibvirtRig(place, private, guest)
    yield rig
    rig.close()
    shutil.rmtree(place)


class ZvolsRig(LibvirtRig):
    """The same machines on ZFS volumes."""

    kind = "zvols"

    def __init__(self, place: Path, private: PrivateLibvirt, guest: small_guest.Guest) -> None:
        self.zfs = zfs_rig.ZfsRig(place)
        super().__init__(place, private, guest)

    def disks(self, farm: str = FARM) -> Disks:
        return self.zfs.disks(farm, reader_uid=self.private.qemu_uid())


@pytest.fixture
def zvols(zfs_pool: str, private: PrivateLibvirt, guest: small_guest.Guest) -> Iterator[ZvolsRig]:
    place = short_directory()
    rig = ZvolsRig(place, private, guest)
    yield rig
    rig.close()
    shutil.rmtree(place)


@pytest.fixture(params=["fake", "libvirt", pytest.param("zvols", marks=pytest.mark.lab)])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> FakeRig | LibvirtRig:
    names = {"libvirt": "real", "zvols": "zvols"}
    return (
        FakeRig(tmp_path) if request.param == "fake" else request.getfixturevalue(names[request.param])
    )


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What ran on what."""
    counts: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call" and "tests/contract/" in report.nodeid:
            kind = report.nodeid.partition("[")[2].rstrip("]").partition("-")[0]
            kind = kind if kind in REAL else _alone(report.nodeid)
            counts[kind, report.outcome] += 1
    if counts:
        terminalreporter.section("contract: what ran on what")
    for (kind, outcome), number in sorted(counts.items()):
        terminalreporter.write_line(f"{number:4} {outcome} on {kind} ({REAL.get(kind, 'real')})")


def _alone(nodeid: str) -> str:
    """Tests of one driver's own are in files named for it."""
    return next((kind for kind in REAL if f"test_{kind}" in nodeid), "host")
