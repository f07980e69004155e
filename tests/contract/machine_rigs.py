"""Rigs for the contract of a hypervisor: the fake, and libvirt with real guests over each disk store;
accelerated where KVM works, as it does in the lab; in the Xen lab PV and PVH guests."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import subprocess
import time
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import libvirt
import pytest
import small_guest
import xenapi_rig
from far_rig import FarMachine
from rigs import (
    FARM,
    IN_THE_LAB,
    MIB,
    MUTE,
    SIZE,
    STORES,
    StoreRig,
    opened,
    sealed,
    short_directory,
    template,
)

from host.paths import cache_dir
from host.run import Runner
from hypervisors.api import Disks, Forward, Hypervisor, MachineSpec, Nic, Owner, Power, no_step
from hypervisors.fake.driver import FakeDisks, FakeHypervisor
from hypervisors.libvirt.domain_types import DomainType, Qemu
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.kvm import KvmVerdict, asked_for, judge
from hypervisors.libvirt.libxl import Xen
from hypervisors.libvirt.private import PrivateLibvirt
from hypervisors.libvirt.warm.place import MemoryPlace
from hypervisors.ownership import FarmIdentity
from tests.identities import KATA

_FIRST_WORD = 120  # seconds: it comes within 5, on a busy machine within 40


def emulated() -> bool:
    """As a lab's kernel is told (tests/lab/kinds.py)."""
    return "clearcpuid=erms" in Path("/proc/cmdline").read_text()


class FakeRig:
    forwards = True  # of ports of the host

    def __init__(self, place: Path) -> None:
        self.place = place
        self.state = place / "world"
        self.template = FakeDisks(KATA, self.state).seal(self._image(), template())

    def _image(self) -> Path:
        path = self.place / "image"
        path.write_bytes(b"T")
        return path

    def disks(self, farm: FarmIdentity = KATA) -> FakeDisks:
        return FakeDisks(farm, self.state)

    def hypervisor(self, farm: FarmIdentity = KATA, step=no_step) -> Hypervisor:
        return FakeHypervisor(farm, self.disks(farm), self.state, step=step)

    def spec(self, vm: str, *, port: int = 0, stamp: str = "", options: str = "") -> MachineSpec:
        return _spec(FARM, vm, port, self.place)

    def boot(self, vm: str, stamp: str = "") -> str:
        """Start, wait until it is up; returns what the guest found on its disk before it wrote."""
        self.hypervisor().start(f"{FARM}-{vm}")
        found = self.disks().content(f"{FARM}-{vm}").decode()
        if stamp:
            self.write(vm, stamp)
        return found

    def write(self, vm: str, letter: str) -> None:
        """The running guest writes to its disk; or somebody does, while it is off."""
        self.disks().write(f"{FARM}-{vm}", letter.encode())

    def read(self, vm: str) -> str:
        """What is on its disk."""
        return self.disks().content(f"{FARM}-{vm}").decode()

    def remember(self, vm: str, word: str) -> None:
        """The running guest holds it in memory, from now on, and nowhere else."""
        FakeHypervisor(KATA, self.disks(), self.state).remember(f"{FARM}-{vm}", word)

    def recall(self, vm: str) -> str:
        """What it holds there; after a boot something else."""
        return FakeHypervisor(KATA, self.disks(), self.state).memory_of(f"{FARM}-{vm}")

    def add_foreign(self, name: str) -> None:
        self.hypervisor().add_foreign(name)

    def foreign_there(self, name: str) -> bool:
        return self.hypervisor().find(name) is not None


class Guests:
    """Real guests under libvirt, on whichever store."""

    forwards = True
    foreign = ""  # the definition of a machine of somebody else's, without its name
    console = ""

    def __init__(
        self,
        place: Path,
        store: StoreRig,
        guest: small_guest.Guest,
        uri: Callable[[], str],
        kind: DomainType,
    ) -> None:
        self.place = place
        self.store = store
        self.guest = guest
        self.uri = uri
        self.kind = kind
        self.reader: int | None = None
        self.opened: list[LibvirtHypervisor] = []

    def seal(self) -> None:
        self.template = sealed(self.store, self.disks())

    def disks(self, farm: FarmIdentity = KATA) -> Disks:
        return self.store.disks(farm, reader_uid=self.reader)

    def hypervisor(self, farm: FarmIdentity = KATA, step=no_step) -> LibvirtHypervisor:
        hypervisor = LibvirtHypervisor(
            self.uri, farm, self.disks(farm), Runner(), step=step, kind=self.kind,
            memory=self.memory(farm),
        )  # fmt: skip
        self.opened.append(hypervisor)
        return hypervisor

    def memory(self, farm: FarmIdentity = KATA) -> MemoryPlace:
        """Where running machines' memory is kept."""
        return MemoryPlace(self.place / "warm", farm, self.reader)

    def spec(self, vm: str, *, port: int = 0, stamp: str = "", options: str = "") -> MachineSpec:
        cmdline = f"console={self.console} quiet panic=-1 {options}"
        return replace(
            _spec(FARM, vm, port, self.place),
            kernel=self.guest.kernel, initrd=self.guest.initrd,
            cmdline=cmdline + (f" stamp={stamp}" if stamp else ""),
        )  # fmt: skip

    def boot(self, vm: str, stamp: str = "") -> str:
        """Start, wait until it is up; returns what the guest found on its disk before it wrote."""
        before = self.said(vm)
        self.start(vm, before)
        text = self.wait_for(vm, "READY", after=before)
        assert not stamp or f"STAMPED={stamp}" in text
        return text.partition("FOUND=")[2].split("\n")[0].strip()

    def start(self, vm: str, before: int) -> None:
        self.hypervisor().start(f"{FARM}-{vm}")

    def said(self, vm: str) -> int:
        """How much of its console log is of earlier starts."""
        return 0

    def wait_for(self, vm: str, word: str, *, after: int = 0) -> str:
        hypervisor = self.hypervisor()
        limit = time.monotonic() + 300
        text = ""
        while time.monotonic() < limit:
            log = hypervisor.console(f"{FARM}-{vm}").log
            text = log.read_bytes()[after:].decode(errors="replace") if log else ""
            if word in text:
                return text
            time.sleep(0.05)
        raise AssertionError(f"the guest never said {word}:\n{text}")

    def add_foreign(self, name: str) -> None:
        connection = libvirt.open(self.uri())
        connection.defineXML(self.foreign.format(name=name))
        connection.close()

    def foreign_there(self, name: str) -> bool:
        connection = libvirt.open(self.uri())
        try:
            return name in [d.name() for d in connection.listAllDomains(0)]
        finally:
            connection.close()

    def close(self) -> None:
        """All machines of this test, also the foreign ones; but not Xen's own, dom0."""
        connection = libvirt.open(self.uri())
        for domain in connection.listAllDomains(0):
            if domain.ID() == 0:
                continue
            with contextlib.suppress(libvirt.libvirtError):  # not running, or it just ended
                domain.destroy()
            domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)
        connection.close()
        for hypervisor in self.opened:
            hypervisor.close()


class LibvirtRig(Guests):
    """Under a private libvirtd, with KVM or without."""

    console = "ttyS0"
    foreign = (
        "<domain type='qemu'><name>{name}</name><memory>65536</memory>"
        "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
    )

    def __init__(
        self,
        place: Path,
        store: StoreRig,
        private: PrivateLibvirt,
        guest: small_guest.Guest,
        kvm: KvmVerdict,
    ) -> None:
        super().__init__(place, store, guest, private.uri, Qemu(kvm))
        self.private = private
        self.reader = private.qemu_uid()
        self.seal()

    def start(self, vm: str, before: int) -> None:
        """Where QEMU emulates the CPU that runs KVM (as in the lab), one nested guest in some hundreds
        hangs before its first word. It has written nothing: it is started again, once, and counted."""
        super().start(vm, before)
        if not (self.kind.capabilities().accelerated and emulated()):
            return
        limit = time.monotonic() + _FIRST_WORD
        while time.monotonic() < limit:
            log = self.hypervisor().console(f"{FARM}-{vm}").log
            if log and log.stat().st_size > before:
                return
            time.sleep(0.05)
        MUTE.append(vm)
        self.hypervisor().stop(f"{FARM}-{vm}", grace=0)
        super().start(vm, before)


class ToldGuests(LibvirtRig):
    """Guests that do what they are told on their console: what ``FakeRig`` has for warm checkpoints."""

    def hypervisor(self, farm: FarmIdentity = KATA, step=no_step) -> LibvirtHypervisor:
        """Its store's steps are told, too."""
        made = super().hypervisor(farm, step)
        made._disks._step = step
        return made

    def spec(self, vm: str, *, port: int = 0, stamp: str = "", options: str = "") -> MachineSpec:
        """``stamp``: written by ``boot``, for a guest that is told by its command line does it again at
        each start."""
        return super().spec(vm, port=port, options=f"obey=yes {options}")

    def boot(self, vm: str, stamp: str = "") -> str:
        found = super().boot(vm)
        if stamp:
            self.write(vm, stamp)
        return found

    def write(self, vm: str, letter: str) -> None:
        if self.hypervisor().find(f"{FARM}-{vm}").power is Power.RUNNING:
            self._tell(vm, f"write {letter}")
            return
        disk = self.disks().find(f"{FARM}-{vm}")
        change = f"write -P {ord(letter)} 8M 512"
        subprocess.run(["qemu-io", "-f", disk.format, "-c", change, disk.path], check=True)

    def read(self, vm: str) -> str:
        return self._tell(vm, "read")[:1]

    def remember(self, vm: str, word: str) -> None:
        self._tell(vm, f"remember {word}")

    def recall(self, vm: str) -> str:
        return self._tell(vm, "recall")

    def _tell(self, vm: str, words: str) -> str:
        """What the guest answers. It may just have begun to run on, and miss the first words."""
        domain = libvirt.open(self.uri()).lookupByName(f"{FARM}-{vm}")
        path = ET.fromstring(domain.XMLDesc(0)).find("devices/serial/source").get("path")
        log = self.hypervisor().console(f"{FARM}-{vm}").log
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            number = next(_NUMBERS)
            with Path(path).open("wb", buffering=0) as console:  # QEMU looks for readers by the second
                console.write(f"{number} {words}\n".encode())
                again = time.monotonic() + 5
                while time.monotonic() < again:
                    answer = re.search(rf"SAID{number}=(.*?) *\.", log.read_text(errors="replace"))
                    if answer:
                        return answer[1]
                    time.sleep(0.02)
        raise AssertionError(f"{vm} does not answer on its console")


_NUMBERS = itertools.count(1)


class OverSsh(Guests):
    """What a rig of guests has in common where they are asked for as another machine's."""

    machine: FarMachine

    def _there(self) -> dict[str, Any]:
        """What its place has beside the farm, see ``FarMachine.link``."""
        return {}

    def disks(self, farm: FarmIdentity = KATA) -> Disks:
        return self.machine.disks(farm, **self._there())

    def hypervisor(self, farm: FarmIdentity = KATA, step=no_step) -> Hypervisor:
        return self.machine.hypervisor(farm, step, **self._there())

    def seal(self) -> None:
        """One of its own, whatever the store has."""
        image = self.place / "image.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
        self.template = self.disks().seal(image, template(name="far"))

    def close(self) -> None:
        super().close()
        self.machine.__exit__()


class FarGuests(OverSsh, LibvirtRig):
    """The same libvirtd, and the same store, over ssh."""

    def __init__(self, place: Path, store: StoreRig, private: PrivateLibvirt, *parts: Any) -> None:
        self.machine = FarMachine(place, reader=private.qemu_uid()).__enter__()
        super().__init__(place, store, private, *parts)

    def _there(self) -> dict[str, Any]:
        uri = self.machine.uri(parse_qs(urlsplit(self.uri()).query)["socket"][0])
        return {"uri": uri, "path": self.store.root}


class XenRig(Guests):
    """Under Xen's libxl."""

    forwards = False
    console = "hvc0"
    foreign = (
        "<domain type='xen'><name>{name}</name><memory>65536</memory><os><type arch='x86_64' "
        "machine='xenpv'>linux</type><kernel>/boot/none</kernel></os></domain>"
    )

    def __init__(
        self, place: Path, store: StoreRig, guest: small_guest.Guest, guests: Literal["pv", "pvh"]
    ) -> None:
        super().__init__(place, store, guest, lambda: "xen:///system", Xen(Runner(), guests))
        self.seal()

    def spec(self, vm: str, *, port: int = 0, stamp: str = "", options: str = "") -> MachineSpec:
        spec = super().spec(vm, port=port, stamp=stamp, options=options)
        last = zlib.crc32(vm.encode()).to_bytes(4, "big").hex(":")[3:]
        nic = Nic(mac=f"00:16:3e:{last}", mode="bridge", target="xenbr0")
        return spec if port else replace(spec, nic=nic)

    def raw_copy(self, name: str, other: str) -> libvirt.virDomain:
        """A machine of somebody else's with the same disk, for it was made by copying a definition."""
        connection = libvirt.open(self.uri())
        definition = ET.fromstring(
            connection.lookupByName(name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        )
        definition.find("name").text = other
        for tag in ("uuid", "metadata"):
            definition.remove(definition.find(tag))
        definition.find("devices").remove(definition.find("devices/interface"))
        return connection.defineXML(ET.tostring(definition, encoding="unicode"))

    def said(self, vm: str) -> int:
        """xenconsoled goes on with the log of the last machine of that name."""
        log = Path(f"/var/log/xen/console/guest-{FARM}-{vm}.log")
        return log.stat().st_size if log.exists() else 0


class FarXen(OverSsh, XenRig):
    """PV guests on thin volumes, asked for as another machine's."""

    def __init__(self, place: Path, store: StoreRig, guest: small_guest.Guest) -> None:
        self.machine = FarMachine(place).__enter__()
        super().__init__(place, store, guest, "pv")

    def _there(self) -> dict[str, Any]:
        return {
            "uri": self.machine.uri(driver="xen"), "driver": "xen", "store": "lvm-thin",
            "pool": self.store.vg, "dataset": self.store.pool,
        }  # fmt: skip


def _spec(farm: str, vm: str, port: int, place: Path) -> MachineSpec:
    return MachineSpec(
        name=f"{farm}-{vm}", owner=Owner(KATA, vm), memory=192 * MIB, vcpus=1, disk_size=SIZE,
        nic=Nic(mac="52:54:00:0a:0b:0c", mode="user", forwards=(Forward(port, 22),) if port else ()),
        console_log=place / f"{vm}.log",
    )  # fmt: skip


@pytest.fixture(scope="session")
def kvm() -> KvmVerdict:
    return judge(asked_for(), Runner(), cache_dir())


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
    store: str,
    private: PrivateLibvirt,
    guest: small_guest.Guest,
    kvm: KvmVerdict,
    kind: type[LibvirtRig] = LibvirtRig,
) -> Iterator[LibvirtRig]:
    place = short_directory()
    with opened(store, place) as disks:
        rig = kind(place, disks, private, guest, kvm)
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
XEN = ("pv-lvm-thin", "pv-lvm-linked", "pv-lvm-full", "pv-zfs", "pv-qcow2", "pvh-lvm-thin", "pv-far")


@contextlib.contextmanager
def xen_machines(kind: str, guest: small_guest.Guest) -> Iterator[XenRig]:
    """``kind``: one of XEN."""
    guests, _, store = kind.partition("-")
    place = short_directory()
    with opened("lvm-thin" if store == "far" else store, place) as disks:
        if store == "far":
            rig: XenRig = FarXen(place, disks, guest)
        else:
            rig = XenRig(place, disks, guest, "pvh" if guests == "pvh" else "pv")
        try:
            yield rig
        finally:
            rig.close()
    shutil.rmtree(place)


@pytest.fixture
def xen(guest: small_guest.Guest) -> Iterator[XenRig]:
    with xen_machines("pv-qcow2", guest) as rig:
        yield rig


@pytest.fixture
def xen_on_devices(guest: small_guest.Guest) -> Iterator[XenRig]:
    with xen_machines("pv-lvm-linked", guest) as rig:
        yield rig


WITH_PORTS = [
    "fake",
    "libvirt",
    "libvirt-far",
    *(pytest.param(g, marks=pytest.mark.lab) for g in GUESTS),
]
"""Those with user-mode networks, whose guests answer at ports of this host."""


WARM = ["fake", "libvirt-told"]
"""Those whose hypervisor keeps running machines' memory itself."""


@pytest.fixture(params=WARM)
def warm_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A rig with ``write``, ``read``, ``remember`` and ``recall``, see ``FakeRig``."""
    yield from _rig(request, tmp_path)


@pytest.fixture(params=[*WITH_PORTS, "xenapi", *(pytest.param(x, marks=pytest.mark.xen) for x in XEN)])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    yield from _rig(request, tmp_path)


def _rig(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[FakeRig | Guests | xenapi_rig.XenApiMachines]:
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
    if "zfs" in request.param:
        request.getfixturevalue("zfs_pool")
    if request.param in XEN:
        with xen_machines(request.param, request.getfixturevalue("guest")) as xen:
            yield xen
        return
    parts = (request.getfixturevalue(name) for name in ("private", "guest", "kvm"))
    kinds = {"libvirt-far": FarGuests, "libvirt-told": ToldGuests}
    kind = kinds.get(request.param, LibvirtRig)
    with machines(store, *parts, kind) as made:
        yield made
