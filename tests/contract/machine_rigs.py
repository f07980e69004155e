"""Rigs for the contract of a hypervisor: the fake, and libvirt with real guests over each disk store;
accelerated where KVM works, as it does in the lab."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import small_guest
import xenapi_rig
from rigs import FARM, IN_THE_LAB, MIB, SIZE, STORES, StoreRig, opened, short_directory, template

from hypervisors.api import Disks, Forward, Hypervisor, MachineSpec, Nic, Owner, no_step
from hypervisors.fake import FakeDisks, FakeHypervisor
from hypervisors.kvm import KvmVerdict, kvm_usable
from hypervisors.libvirt_driver import LibvirtHypervisor
from hypervisors.private import PrivateLibvirt
from hypervisors.run import Runner
from provision.paths import cache_dir


class FakeRig:
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
    """Real guests, on whichever store."""

    def __init__(
        self,
        place: Path,
        store: StoreRig,
        private: PrivateLibvirt,
        guest: small_guest.Guest,
        kvm: KvmVerdict,
    ) -> None:
        self.place = place
        self.store = store
        self.private = private
        self.guest = guest
        self.kvm = kvm
        self.opened: list[LibvirtHypervisor] = []
        image = place / "image.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
        self.template = self.disks().seal(image, template())

    def disks(self, farm: str = FARM) -> Disks:
        return self.store.disks(farm, reader_uid=self.private.qemu_uid())

    def hypervisor(self, farm: str = FARM, step=no_step) -> LibvirtHypervisor:
        hypervisor = LibvirtHypervisor(
            self.private.uri, farm, self.disks(farm), Runner(), step=step, kvm=self.kvm
        )
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
        limit = time.monotonic() + 300
        while time.monotonic() < limit:
            text = log.read_text(errors="replace")
            if word in text:
                return text
            time.sleep(0.05)
        raise AssertionError(f"the guest ({self.kvm.why}) never said {word}:\n{text}")

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


@pytest.fixture(scope="session")
def kvm() -> KvmVerdict:
    return kvm_usable(Runner(), cache_dir())


@pytest.fixture(scope="session")
def private(kvm: KvmVerdict) -> Iterator[PrivateLibvirt]:
    place = short_directory()
    daemon = PrivateLibvirt(place / "s", place / "r", cache_dir() / "libvirt", hide_kvm=not kvm.usable)
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


@contextlib.contextmanager
def machines(
    store: str, private: PrivateLibvirt, guest: small_guest.Guest, kvm: KvmVerdict
) -> Iterator[LibvirtRig]:
    place = short_directory()
    with opened(store, place) as disks:
        rig = LibvirtRig(place, disks, private, guest, kvm)
        try:
            yield rig
        finally:
            rig.close()
    shutil.rmtree(place)


@pytest.fixture
def real(private: PrivateLibvirt, guest: small_guest.Guest, kvm: KvmVerdict) -> Iterator[LibvirtRig]:
    with machines("qcow2", private, guest, kvm) as rig:
        yield rig


GUESTS = tuple(f"guests-{kind}" for kind in STORES if kind.startswith(IN_THE_LAB))


WITH_PORTS = ["fake", "libvirt", *(pytest.param(g, marks=pytest.mark.lab) for g in GUESTS)]
"""Those with user-mode networks, whose guests answer at ports of this host."""


@pytest.fixture(params=[*WITH_PORTS, "xenapi"])
def rig(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[FakeRig | LibvirtRig | xenapi_rig.XenApiMachines]:
    if request.param == "xenapi":
        with xenapi_rig.opened(
            xenapi_rig.XenApiMachines, tmp_path, request.getfixturevalue("xenapi")
        ) as served:
            yield served
        return
    if request.param == "fake":
        yield FakeRig(tmp_path)
        return
    store = request.param.removeprefix("guests-") if request.param in GUESTS else "qcow2"
    if store.startswith("zfs"):
        request.getfixturevalue("zfs_pool")
    parts = (request.getfixturevalue(name) for name in ("private", "guest", "kvm"))
    with machines(store, *parts) as made:
        yield made
