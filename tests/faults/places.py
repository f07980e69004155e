"""Where a bench keeps its disks: each store, and how to look at it and at a disk with bare tools."""

from __future__ import annotations

import abc
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from host.files import open_node
from host.paths import cache_dir, state_dir
from host.run import Runner
from hypervisors.api import Disk
from hypervisors.fake.driver import FakeDisks
from hypervisors.libvirt.kvm import asked_for, judge
from hypervisors.libvirt.private import PrivateLibvirt
from provision.member import Member
from provision.site import Site
from tests import boot_sector
from tests.contract import small_guest, xenapi_rig
from tests.contract.far_rig import FarMachine

_BRIDGE = f"fhkill{os.getpid()}"  # other tests run beside these
MIB = 2**20
SIZE = 16 * MIB
SPOTS = (len(boot_sector.IDLE), MIB, 5 * MIB + 12288, SIZE - 65536)
SPOT = 65536
TEMPLATE, OLD = "T", "O"  # what the template holds, and what a VM wrote


def image(letter: str) -> bytes:
    """A whole disk: a boot sector, zeros, and the letter in some spots, the first and the last bytes
    among them."""
    data = bytearray(boot_sector.IDLE.ljust(SIZE, b"\0"))
    for spot in SPOTS:
        data[spot : spot + SPOT] = letter.encode() * SPOT
    return bytes(data)


def letter_of(disk: bytes) -> str:
    """The one whose image this is, bytes beyond it zero (a store may round up); else "torn"."""
    letter = disk[len(boot_sector.IDLE) :][:1].decode(errors="replace")
    same = disk[:SIZE] == image(letter) and disk.count(0, SIZE) == len(disk) - SIZE
    return letter if letter.isupper() and same else "torn"


def run(*argv: str | Path) -> str:
    """A command that must succeed."""
    done = subprocess.run(
        [str(a) for a in argv], check=False, capture_output=True, text=True,
        env={**os.environ, "LVM_SUPPRESS_FD_WARNINGS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


class Place(abc.ABC):
    """``host`` is what the farm file says of each of ``hosts``, ``template`` of the template. ``still``:
    its machines are the fake's, so that a kill costs no more than what the store takes. ``listens``: its
    guests shut down when they are asked to. ``gradual``: they give and take memory bit by bit."""

    label = ""
    host = ""
    template = ""
    memory = (32, 64)  # what a guest may be ballooned to, and its maximum, in MiB
    more = ""  # lines of the farm file
    hosts: tuple[str, ...] = ("here",)
    still = False
    listens = False
    gradual = False

    def open(self) -> None:  # noqa: B027 - not every place has to
        """Before anything of the tests' is made."""

    def close(self) -> None:  # noqa: B027
        """Nothing of it stays."""

    def make_image(self, path: Path) -> None:
        """An image for a template, as qcow2."""
        raw = path.with_suffix(".raw")
        raw.write_bytes(image(TEMPLATE))
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
        raw.unlink()

    @abc.abstractmethod
    def write(self, disk: Disk, site: Site, letter: str = OLD) -> None:
        """Make its content ``image(letter)``."""

    @abc.abstractmethod
    def read(self, disk: Disk, site: Site) -> str:
        """The letter it was written with last, or "torn"."""

    def content(self, site: Site, vm: str) -> str:
        """ "old": what was written is there, all of it, and nothing else; "new": provably the template;
        "torn": neither."""
        store = site.disks(site.farm.host_of(vm))
        disk = store.find(Member(site, vm).machine)
        assert disk
        seen = self.read(disk, site)
        if seen == OLD:
            return "old" if disk.base != "clean" or not store.pristine(disk.machine, "clean") else "torn"
        return "new" if seen == TEMPLATE and store.pristine(disk.machine, "clean") else "torn"

    def lose(self, disk: Disk, site: Site) -> None:
        """Remove it by hand, under its machine."""
        raise NotImplementedError(self.label)

    def check(self, disk: Disk) -> None:  # noqa: B027
        """That it is sound in itself."""

    def everything(self) -> list[str]:
        """Every object of the store's, by bare tools; numbers and random parts of names left out."""
        return []

    def running(self, directory: Path) -> list[str]:
        """Machines of the bench in that directory that really run, by bare tools."""
        return []

    def booted(self, machine: str) -> None:  # noqa: B027
        """Wait until what was started there has a balloon."""


class FakePlace(Place):
    label = "fake"
    host = "driver: fake"

    def write(self, disk: Disk, site: Site, letter: str = OLD) -> None:
        store = site.disks(site.farm.host_of(disk.owner.vm))
        assert isinstance(store, FakeDisks)
        store.write(disk.machine, letter.encode())

    def read(self, disk: Disk, site: Site) -> str:
        store = site.disks(site.farm.host_of(disk.owner.vm))
        assert isinstance(store, FakeDisks)
        return store.content(disk.machine).decode() or TEMPLATE

    def lose(self, disk: Disk, site: Site) -> None:
        store = site.disks(site.farm.host_of(disk.owner.vm))
        assert isinstance(store, FakeDisks)
        with store.store.change() as world:
            del world.disks[disk.machine]


class TwoFakes(FakePlace):
    """Each VM on a host with a store of its own."""

    label = "two fakes"
    hosts = ("here", "there")


class Qcow2Place(Place):
    label = "kvm"
    host = "driver: kvm"

    def running(self, directory: Path) -> list[str]:
        return _of_qemu(directory)

    def write(self, disk: Disk, site: Site, letter: str = OLD) -> None:
        spots = [f"write -q -P {ord(letter)} {spot} {SPOT}" for spot in SPOTS]
        run("qemu-io", "-f", "qcow2", *(word for spot in spots for word in ("-c", spot)), disk.path)

    def read(self, disk: Disk, site: Site) -> str:
        out = state_dir() / f".content-{os.getpid()}-{threading.get_ident()}"  # others read too
        try:
            run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", disk.path, out)
            return letter_of(out.read_bytes())
        finally:
            out.unlink(missing_ok=True)

    def lose(self, disk: Disk, site: Site) -> None:
        disk.path.unlink()

    def check(self, disk: Disk) -> None:
        run("qemu-img", "check", "-q", "-U", disk.path)


class StillQcow2Place(Qcow2Place):
    """The same files under machines that run nothing."""

    label = "qcow2"
    still = True


class FarPlace(Qcow2Place):
    """Another machine, over ssh: its libvirtd, its qcow2 store, its copy of the seeds. A machine there
    has the state that the farm has here, but for its own libvirtd, which lives longer than the farm."""

    label = "far"
    more = f"network: {{mode: bridge, bridge: {_BRIDGE}, subnet: 10.10.61.0/24, gateway: 10.10.61.1}}"

    def open(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fh-"))
        self.directory.chmod(0o711)
        verdict = judge(asked_for(), Runner(), cache_dir())
        self.private = PrivateLibvirt(
            self.directory / "s", self.directory / "r", cache_dir() / "libvirt", not verdict.usable
        )
        self.machine = FarMachine(self.directory, reader=self.private.qemu_uid()).__enter__()
        [socket] = parse_qs(urlsplit(self.private.uri()).query)["socket"]
        disks = f"{{path: {self.machine.state}/disks}}"
        self.host = f"driver: kvm, uri: '{self.machine.uri(socket)}', disks: {disks}"
        run("ip", "link", "add", _BRIDGE, "type", "bridge")
        run("ip", "link", "set", _BRIDGE, "up")

    def close(self) -> None:
        left = [line for line in self.everything() if "template" not in line]
        self.machine.__exit__()
        self.private.stop(force=True)
        run("ip", "link", "del", _BRIDGE)
        shutil.rmtree(self.directory)
        assert not left, left

    def running(self, directory: Path) -> list[str]:
        return _of_qemu(self.directory)

    def everything(self) -> list[str]:
        found = []
        for path in sorted(self.machine.state.rglob("*")):
            name = str(path.relative_to(self.machine.state))
            if not path.is_dir() and not re.search(r"\.lock$|\.log(\.\d)?$", name):
                found.append(re.sub(r"[0-9a-f]{8,}|@\d+", "N", f"there {name}"))
        for path in (self.directory / "s").rglob("qemu/*.xml"):
            found.append(f"definition {path.stem}")
        return found


class XenApiPlace(Place):
    """The XenAPI test server: machines and disks are its own."""

    label = "xenapi"
    more = f"network: {{mode: network, network: '{xenapi_rig.NETWORK}', addressing: dhcp}}"

    def __init__(self, rig: xenapi_rig.XenApiRig, server: xenapi_rig.TestServer) -> None:
        self._rig, self._server = rig, server
        self.host = (
            f"driver: xenapi, uri: '{server.https}', credentials: {server.credentials}, "
            f"fingerprint: '{server.fingerprint}'"
        )

    def write(self, disk: Disk, site: Site, letter: str = OLD) -> None:
        """As its guest does; but the server lets nobody at the disk of one that runs, so that one is
        without power meanwhile."""
        path = state_dir() / f".content-{os.getpid()}-{threading.get_ident()}"
        path.write_bytes(image(letter))
        with contextlib.closing(self._rig.sessions()) as sessions:
            vms = sessions.call("VM.get_by_name_label", disk.machine)
            runs = [vm for vm in vms if sessions.call("VM.get_power_state", vm) == "Running"]
            for vm in runs:
                sessions.call("VM.hard_shutdown", vm)
            sessions.put(sessions.call("VDI.get_by_uuid", disk.path.name), path, SIZE)
            for vm in runs:
                sessions.call("VM.start", vm, False, False)
        path.unlink()

    def read(self, disk: Disk, site: Site) -> str:
        return letter_of(self._rig.export(disk.path.name, SIZE))

    def content(self, site: Site, vm: str) -> str:
        """The driver can't prove of a disk that it is pristine once its machine was told to start; of
        such a one all its bytes alone say whose it is."""
        store = site.disks(site.farm.host_of(vm))
        disk = store.find(Member(site, vm).machine)
        assert disk
        seen, proven = self.read(disk, site), store.pristine(disk.machine, "clean")
        if seen == TEMPLATE and not proven and self._was_started(disk.machine):
            return "new"
        return super().content(site, vm)

    def _was_started(self, machine: str) -> bool:
        """By bare calls: it runs, or the mark of its fresh disk is gone."""
        with contextlib.closing(self._rig.sessions()) as sessions:
            (ref,) = sessions.call("VM.get_by_name_label", machine)
            record = sessions.call("VM.get_record", ref)
        return record["power_state"] != "Halted" or "farmhand:fresh" not in record["other_config"]

    def keeps_memory(self) -> None:
        """From now on it can: see tests/xenapi."""
        self._server.tell(knobs={"suspend_sr": True})

    def settle(self) -> None:
        """Until it has done all that it was told to."""
        self._server.tell(settle=True)

    def dies(self, call: str, parts: int) -> None:
        """Its host's power fails when so many parts of the next such call are done."""
        self._server.fail(call, ["dies", parts])

    def calls(self) -> list[str]:
        """Since it was asked last."""
        return self._server.log()

    def fails(self, call: str, code: str, *parameters: str) -> None:
        """The next such call is refused."""
        self._server.fail(call, ["error", code, *parameters])

    def loses_power_at(self, number: int, parts: int) -> None:
        """When so many parts of that call from now on are done; with all that isn't on its disk."""
        self._server.fail("*", ["cut", parts], nth=number)

    def lasts(self) -> None:
        """It fails no more."""
        self._server.tell(fail=[])

    def loses_power(self) -> None:
        """Now."""
        self._server.tell(settle=True)
        self._server.tell(cut=True)

    def lose_disk(self, disk: Disk) -> None:
        """Of a stopped machine; not by us."""
        with contextlib.closing(self._rig.sessions()) as sessions:
            sessions.call("VDI.destroy", sessions.call("VDI.get_by_uuid", disk.path.name))

    def remove_nobodys(self) -> None:
        """The disks of its own death within a clone, see docs/xenapi.md."""
        with contextlib.closing(self._rig.sessions()) as sessions:
            vms = sessions.call("VM.get_all_records").values()
            images = {vm["suspend_VDI"] for vm in vms}
            for ref, vdi in sessions.call("VDI.get_all_records").items():
                if not vdi["VBDs"] and ref not in images:
                    sessions.call("VDI.destroy", ref)

    def harm(self) -> list[str]:
        """Memory that was resumed on a disk which it isn't of."""
        return list(self._server.tell(harm=True))

    def everything(self) -> list[str]:
        """Every VM, template, snapshot, disk and device of the server's, with what it is to us."""
        world = self._server.tell(world=True)
        numbers = r"[0-9a-f]{8}-[0-9a-f-]{27}|:\d+:\d+:\d+:\d+|(?<=@)\d+"
        return [re.sub(numbers, "N", line) for line in world]

    def close(self) -> None:
        found = [line for line in self.everything() if not line.startswith("server's")]
        assert not found, found
        self._rig.close()


class BlockPlace(Place):
    """Disks are block devices."""

    still = True

    def write(self, disk: Disk, site: Site, letter: str = OLD) -> None:
        handle = open_node(self._present(disk), os.O_WRONLY)
        try:
            for spot in SPOTS:
                os.pwrite(handle, letter.encode() * SPOT, spot)
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self, disk: Disk, site: Site) -> str:
        with os.fdopen(open_node(self._present(disk), os.O_RDONLY), "rb") as file:
            return letter_of(file.read())

    @staticmethod
    def _present(disk: Disk) -> Path:
        limit = time.monotonic() + 60
        while not disk.path.exists():  # udev makes it
            assert time.monotonic() < limit, f"{disk.path} never came"
            time.sleep(0.01)
        return disk.path


class ZfsPlace(BlockPlace):
    label = "zfs"

    def __init__(self, pool: str, number: int) -> None:
        self.root = f"{pool}/kills{number}"
        self.host = f"driver: kvm, uri: 'qemu:///system', disks: {{store: zfs, pool: {pool}, "
        self.host += f"dataset: kills{number}}}"

    def everything(self) -> list[str]:
        """With holds and what our marks say."""
        columns = "name,userrefs,farmhand:state"
        done = subprocess.run(
            ["zfs", "list", "-H", "-t", "all", "-o", columns, "-r", self.root],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 or "does not exist" in done.stderr, done.stderr
        return [re.sub(r"\.\d+(?=[@\t])", ".N", line) for line in done.stdout.splitlines()]

    def close(self) -> None:
        assert set(self.everything()) <= {
            f"{self.root}{end}\t-\t-" for end in ("", "/templates", "/vms")
        }


class LvmPlace(BlockPlace):
    """``kind``: "lvm-thin", "lvm-linked" or "lvm-full"."""

    def __init__(self, vg: str, pool: str, kind: str) -> None:
        self.label = kind
        self.vg = vg
        store = f"store: lvm-thin, pool: {vg}, dataset: {pool}"
        if kind != "lvm-thin":
            store = f"store: lvm, pool: {vg}, copy: {kind.removeprefix('lvm-')}"
        self.host = f"driver: kvm, uri: 'qemu:///system', disks: {{{store}}}"
        self._untouched: list[str] = []

    def open(self) -> None:
        self._untouched = self.everything()

    def everything(self) -> list[str]:
        """Volumes with their kind, mappings and whether they are suspended, links and files beside."""
        found = []
        for line in run("lvs", "-a", "--noheadings", "-o", "lv_name,lv_tags", self.vg).splitlines():
            name, *tags = line.split()
            kind = re.search(r"fh\.kind=(\w+)", "".join(tags))
            found.append(f"volume {name} {kind[1] if kind else ''}")
        for line in run("dmsetup", "info", "-C", "--noheadings", "-o", "name,suspended").splitlines():
            # a pool gets "-tpool" when its first volume is made
            if line.startswith(self.vg.replace("-", "--")) and "-tpool:" not in line:
                found.append(f"mapping {line}")
        links = state_dir() / "lvm" / self.vg
        found += [f"file {p.name}" for p in links.glob("*")]
        locks = Path("/run/farmhand/stores", f"lvm-{self.vg}")
        found += [f"file {p.name}" for p in locks.glob("fh.*")]
        assert not [line for line in found if line.endswith("Suspended")], found
        return sorted(re.sub(r"(\.\d+)?\.[0-9a-f]{8}(?=[ :-]|$)", ".N", line) for line in found)

    def close(self) -> None:
        now = self.everything()
        assert now == self._untouched, f"{now}, before: {self._untouched}"


class Machines(Place):
    """The same store with real machines: the farm's own libvirtd and QEMU."""

    still = False

    def __init__(self, place: Place) -> None:
        self._place = place
        self.label = f"kvm+{place.label}"
        self.host = place.host.replace("uri: 'qemu:///system', ", "")

    def open(self) -> None:
        self._place.open()

    def close(self) -> None:
        self._place.close()

    def make_image(self, path: Path) -> None:
        self._place.make_image(path)

    def write(self, disk: Disk, site: Site, letter: str = OLD) -> None:
        self._place.write(disk, site, letter)

    def read(self, disk: Disk, site: Site) -> str:
        return self._place.read(disk, site)

    def everything(self) -> list[str]:
        return self._place.everything()

    def running(self, directory: Path) -> list[str]:
        return _of_qemu(directory)


class XenMachines(Machines):
    """The same with Xen, and PV guests that boot, so that they have a balloon, and wait then."""

    memory = (128, 192)
    listens = True
    gradual = True
    more = "network: {mode: bridge, bridge: xenbr0, subnet: 10.10.60.0/24, gateway: 10.10.60.1}"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.label = f"xen+{place.label}"
        xen = "driver: xen, uri: 'xen:///system'"
        self.host = place.host.replace("driver: kvm, uri: 'qemu:///system'", xen)
        guest = small_guest.build(cache_dir())
        kernel = f"kernel: {guest.kernel}, initrd: {guest.initrd}, cmdline: console=hvc0 quiet"
        self.template = f", boot: {{{kernel}}}"

    def booted(self, machine: str) -> None:
        domain = run("xl", "domid", machine).strip()
        limit = time.monotonic() + 120
        while "meminfo_free" not in run("xenstore-ls", f"/local/domain/{domain}/data"):
            assert time.monotonic() < limit, f"{machine} has not booted"
            time.sleep(0.2)

    def everything(self) -> list[str]:
        """With libvirt's definitions, which are outside of the farm's state."""
        names = run("virsh", "-c", "xen:///system", "list", "--all", "--name").split()
        return [*super().everything(), *(f"definition {n}" for n in names if n.startswith("kill-"))]

    def running(self, directory: Path) -> list[str]:
        names = [line.split()[0] for line in run("xl", "list").splitlines()]
        return [name for name in names if name.startswith("kill-")]


def _of_qemu(directory: Path) -> list[str]:
    """What QEMU runs, by its own command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"qemu-system" in words[0] and any(os.fsencode(directory) in word for word in words):
            found += re.findall(r"guest=(kill-\w+)", " ".join(w.decode() for w in words))
    return found
