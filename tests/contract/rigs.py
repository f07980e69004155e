"""One contract, several drivers: each test runs unchanged on every rig below, the simulated and the
real. The summary at the end says which ran on what."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import far_rig
import lvm_rig
import pytest
import xenapi_rig
import zfs_rig
from _pytest.mark import ParameterSet

from host.run import Runner
from hypervisors.api import Disks, Owner, Template, no_step
from hypervisors.disks.qcow2.disks import Qcow2Disks
from hypervisors.disks.zfs.disks import ZfsDisks
from hypervisors.fake.driver import FakeDisks
from hypervisors.ownership import FarmIdentity
from tests.identities import KATA

MIB = 2**20
SIZE = 64 * MIB
FARM = "kata"
PROD, DEV = Owner(KATA, "prod"), Owner(KATA, "dev2")
REAL = {
    "fake": "simulated",
    "xenapi": xenapi_rig.HOW,
    "qcow2": "real qemu-img files",
    "far": "real qemu-img files, over ssh",
    "zfs": "real ZFS, a pool on a file",
    "zfs-files": "real ZFS, raw files on datasets",
    "lvm-thin": "real LVM thin volumes",
    "lvm-linked": "real LVM snapshots",
    "lvm-full": "real LVM volumes, copied",
    "libvirt": "real guests under a private libvirtd, on qcow2 files",
    "libvirt-far": "real guests under a libvirtd that is reached over ssh",
    "guests-zfs": "real guests on ZFS volumes",
    "guests-zfs-files": "real guests on raw files on ZFS datasets",
    "guests-lvm-thin": "real guests on LVM thin volumes",
    "guests-lvm-linked": "real guests on LVM snapshots",
    "guests-lvm-full": "real guests on copied LVM volumes",
    "pv-lvm-thin": "real Xen PV guests on LVM thin volumes",
    "pv-lvm-linked": "real Xen PV guests on LVM snapshots",
    "pv-lvm-full": "real Xen PV guests on copied LVM volumes",
    "pv-zfs": "real Xen PV guests on ZFS volumes",
    "pv-qcow2": "real Xen PV guests on qcow2 files",
    "pvh-lvm-thin": "real Xen PVH guests on LVM thin volumes",
    "pv-far": "real Xen PV guests on LVM thin volumes, over ssh",
    "xen": "real Xen",
}

MUTE: list[str] = []
"""Nested guests, and QEMU's daemons, that hung before their first word or answer, see
``machine_rigs.LibvirtRig.start``."""
NOT_RUN: list[str] = []
"""What was left out, and what this machine lacks for it."""


def template(generation: int = 1, name: str = "base") -> Template:
    return Template(
        name=name, generation=generation, ref="", size=SIZE, sha256="", created=datetime.now(UTC),
        origin="contract tests", firstboot="none",
    )  # fmt: skip


class StoreRig(Protocol):
    """A disk store to test on. A letter stands for a disk's content."""

    kind: str

    def disks(self, farm: FarmIdentity = KATA, **options) -> Disks: ...
    def image(self) -> Path: ...
    def write(self, machine: str, letter: str) -> None: ...
    def read(self, machine: str) -> str: ...


def sealed(store: StoreRig, disks: Disks) -> Template:
    """base@1 of its image; on LVM, where that takes longer than most tests, maybe of a test before."""
    if isinstance(store, lvm_rig.LvmRig):
        return store.sealed(disks, template())
    return disks.seal(store.image(), template())


def with_two_disks(rig: zfs_rig.ZfsRig) -> ZfsDisks:
    """Of kata-prod and kata-dev2, just cloned."""
    disks = rig.disks()
    sealed = disks.seal(rig.image(), template())
    disks.clone(sealed, "kata-prod", PROD, SIZE)
    disks.clone(sealed, "kata-dev2", DEV, SIZE)
    return disks


class FakeDisksRig:
    kind = "fake"

    def __init__(self, place: Path) -> None:
        self.place = place
        self.state = place / "world"

    def disks(self, farm: FarmIdentity = KATA, **options) -> Disks:
        if "headroom" in options:
            options["reserve"] = options.pop("headroom")
        return FakeDisks(farm, self.state, **options)

    def image(self) -> Path:
        path = self.place / "image"
        path.write_bytes(b"T")
        return path

    def write(self, machine: str, letter: str) -> None:
        FakeDisks(KATA, self.state).write(machine, letter.encode())

    def read(self, machine: str) -> str:
        return FakeDisks(KATA, self.state).content(machine).decode() or "T"


class Qcow2Rig:
    """A letter at 1 MiB stands for a disk's content."""

    kind = "qcow2"

    def __init__(self, place: Path) -> None:
        self.place = place
        self.root = place / "disks"

    def disks(self, farm: FarmIdentity = KATA, **options) -> Disks:
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


class FarRig(Qcow2Rig):
    """The same, made and asked for over ssh."""

    kind = "far"

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.machine = far_rig.FarMachine(place).__enter__()

    def disks(self, farm: FarmIdentity = KATA, *, step=no_step, headroom: int = 0) -> Disks:
        spoil = f"Qcow2Disks.__init__.__kwdefaults__['headroom'] = {headroom}" if headroom else ""
        spoil = spoil and f"from hypervisors.disks.qcow2.disks import Qcow2Disks\n{spoil}"
        return self.machine.disks(farm, step, spoil=spoil, path=self.root)

    def close(self) -> None:
        self.machine.__exit__()


@pytest.fixture(scope="module")
def zfs_pool() -> Iterator[str]:
    with zfs_rig.pool() as name:
        yield name


STORES = {
    "fake": FakeDisksRig,
    "qcow2": Qcow2Rig,
    "far": FarRig,
    "zfs": zfs_rig.ZfsRig,
    "zfs-files": zfs_rig.ZfsFilesRig,
    **{rig.kind: rig for rig in lvm_rig.RIGS},
}
SERVED = ("xenapi",)  # they own their storage: no hypervisor of ours is put over it
IN_THE_LAB = ("zfs", "lvm")  # how the names begin of stores that need it


@contextlib.contextmanager
def opened(kind: str, place: Path) -> Iterator[StoreRig]:
    """A store of its own; its place is where QEMU's user may come, if that of ``place`` is."""
    if kind.startswith("lvm"):
        with STORES[kind]() as rig:
            yield rig
        return
    rig = STORES[kind](place)
    try:
        yield rig
    finally:
        if kind in ("zfs-files", "far"):
            rig.close()


@pytest.fixture(scope="session")
def xenapi() -> Iterator[xenapi_rig.TestServer | xenapi_rig.RealServer]:
    with xenapi_rig.xenapi_server() as server:
        yield server


def params(kinds: Iterable[str]) -> list[ParameterSet]:
    return [
        pytest.param(kind, marks=[pytest.mark.lab] if kind.startswith(IN_THE_LAB) else [])
        for kind in kinds
    ]


@pytest.fixture(params=params([*STORES, *SERVED]))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreRig]:
    if request.param == "xenapi":
        with xenapi_rig.opened(
            xenapi_rig.XenApiRig, tmp_path, request.getfixturevalue("xenapi")
        ) as served:
            yield served
        return
    if request.param.startswith("zfs"):
        request.getfixturevalue("zfs_pool")
    with opened(request.param, tmp_path) as rig:
        yield rig


def short_directory() -> Path:
    """Where QEMU's own user may pass through, and short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="fh-"))
    path.chmod(0o711)
    return path


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What ran on what."""
    counts: Counter[tuple[str, str]] = Counter()
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call" and "tests/contract/" in report.nodeid:
            counts[_kind(report.nodeid), report.outcome] += 1
    if counts:
        terminalreporter.section("contract: what ran on what")
    for (kind, outcome), number in sorted(counts.items()):
        terminalreporter.write_line(f"{number:4} {outcome} on {kind} ({REAL.get(kind, 'real')})")
    for report in terminalreporter.getreports("skipped") if xenapi_rig.REAL_URL else ():
        if isinstance(report.longrepr, tuple):
            name, why = report.nodeid.rpartition("/")[2], report.longrepr[2].removeprefix("Skipped: ")
            terminalreporter.write_line(f"on {xenapi_rig.HOW}: {name}: {why}")
    for left_out in NOT_RUN:
        terminalreporter.write_line(f"not run: {left_out}")
    if MUTE:
        terminalreporter.write_line(
            f"{len(MUTE)} nested guests or daemons hung before their first word, under an emulated CPU, "
            f"and were started again: {', '.join(MUTE)}"
        )


def _kind(nodeid: str) -> str:
    """Of the rig it ran on; tests of one driver's own are in files named for it."""
    place, _, parameters = nodeid.partition("[")
    found = [kind for kind in REAL if f"-{parameters.rstrip(']')}-".startswith(f"-{kind}-")]
    found = found or [kind for kind in REAL if f"test_{kind}" in place]
    return max(found, key=len, default="host")
