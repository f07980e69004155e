"""A XenAPI server for the contract's tests, and both protocols on it.

By default the test server, tests/xenapi/server.py: simulated, no machine runs. With FARMHAND_XENAPI_URL
in the environment a real one, its credentials (user, password: two lines, mode 0600) in the file that
FARMHAND_XENAPI_CREDENTIALS names; FARMHAND_XENAPI_CA or FARMHAND_XENAPI_FINGERPRINT for its certificate,
FARMHAND_XENAPI_SR and FARMHAND_XENAPI_NETWORK for where. There a test begins only where no VM's name
begins with "kata-"; afterwards all that carries the marks of its farms is removed, and nothing else is
touched."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from host.run import Runner
from hypervisors.api import MachineSpec, Nic, Owner, Template, no_step
from hypervisors.ownership import FarmIdentity
from hypervisors.xenapi.disks import XenApiDisks
from hypervisors.xenapi.driver import XenApiHypervisor
from hypervisors.xenapi.notes import Notes
from hypervisors.xenapi.pool import Pool
from hypervisors.xenapi.session import Sessions, XenApiServer, connection
from inventory.loader import loads
from inventory.model import Farm
from tests.identities import KATA, identity

MIB = 2**20
SIZE = 64 * MIB
FARM = "kata"
REAL_URL = os.environ.get("FARMHAND_XENAPI_URL", "")
HOW = "a real XenAPI server" if REAL_URL else "simulated: the XenAPI test server"
MOST_CALLS = {"clone": 9, "start": 5, "reset": 11}  # a VM: see docs/xenapi.md
MOST_CALLS_WARM = {"checkpoint, warm": 15, "reset to a warm one": 30, "start, suspended": 10}
"""With tasks that change as often as a real server's."""
REAL_SECONDS = {"slow": 1.4, "in_turn": 19.0}
"""Knobs of the test server: what a storage change took a real one, and what one that met another in its
storage repository waited at most."""
NETWORK = "Pool-wide network associated with eth0"
"""As a server calls its own."""
_SERVER = Path(__file__).parents[1] / "xenapi" / "server.py"


class TestServer:
    """A process of its own, so that its state outlives a killed client."""

    __test__ = False

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="fh-xenapi-", dir="/dev/shm"))
        self._process = subprocess.Popen(
            [sys.executable, _SERVER, self.directory],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout
        told = json.loads(self._process.stdout.readline())
        self.http = f"http://127.0.0.1:{told['http']}"
        self.https = f"https://127.0.0.1:{told['https']}"
        self.fingerprint = str(told["fingerprint"])
        self.credentials = self.directory / "credentials"
        self.ca = self.directory / "ca.pem"
        self.sr, self.network = "", NETWORK

    def server(self, **options: Any) -> XenApiServer:
        return XenApiServer(url=self.https, credentials=self.credentials, **({"ca": self.ca} | options))

    def tell(self, **request: Any) -> Any:
        """See server.py, /test-control."""
        with urllib.request.urlopen(
            f"{self.http}/test-control", json.dumps(request).encode(), timeout=60
        ) as answer:
            return json.loads(answer.read())

    def fail(self, call: str, how: list[object], nth: int = 1) -> None:
        self.tell(fail=[{"call": call, "nth": nth, "how": how}])

    def log(self) -> list[str]:
        return list(self.tell(log=True))

    def close(self) -> None:
        with self._process:
            assert self._process.stdin
            self._process.stdin.close()
        for path in sorted(self.directory.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self.directory.rmdir()


class RealServer:
    """It can't be told how to fail, nor how to be: a test that wants it is skipped there, and said to be
    not run."""

    def __init__(self) -> None:
        env = os.environ
        self.https = REAL_URL
        self._called: list[str] = []
        self.credentials = Path(env["FARMHAND_XENAPI_CREDENTIALS"])
        self.ca = Path(env["FARMHAND_XENAPI_CA"]) if "FARMHAND_XENAPI_CA" in env else None
        self.fingerprint = env.get("FARMHAND_XENAPI_FINGERPRINT", "")
        self.sr = env.get("FARMHAND_XENAPI_SR", "")
        self.network = env.get("FARMHAND_XENAPI_NETWORK", NETWORK)

    def server(self, **options: Any) -> XenApiServer:
        trust = {"ca": self.ca, "fingerprint": self.fingerprint}
        return XenApiServer(url=self.https, credentials=self.credentials, **(trust | options))

    def tell(self, **request: Any) -> Any:
        if set(request) != {"world"}:
            pytest.skip(f"not run from here on: a real server can't be told {sorted(request)}")
        with contextlib.closing(Sessions(self.server())) as sessions:
            return world(sessions)

    def fail(self, call: str, how: list[object], nth: int = 1) -> None:
        pytest.skip(f"not run from here on: a real server can't be told how {call} fails")

    @property
    def http(self) -> str:
        return pytest.skip("not run from here on: of the test server's own http")

    @property
    def directory(self) -> Path:
        return pytest.skip("not run from here on: a real server's storage is out of reach")

    def count(self, call: str) -> None:
        self._called.append(call.removeprefix("Async."))

    def log(self) -> list[str]:
        """What the rig's sessions called since it was asked last."""
        called, self._called = self._called, []
        return called

    def close(self) -> None:
        """It was there before."""


def world(sessions: Sessions) -> list[str]:
    """All there is but what is the server's own, a line each: as the test server tells it."""
    vms = sessions.call("VM.get_all_records")
    kinds = {
        ref: "snapshot" if vm["is_a_snapshot"] else "template" if vm["is_a_template"] else "VM"
        for ref, vm in vms.items()
        if not (vm["is_control_domain"] or vm["is_default_template"])
    }
    found = [
        f"{kind} {vms[ref]['name_label']} {vms[ref]['other_config'].get('farmhand:kind', '')}"
        for ref, kind in kinds.items()
    ]
    for class_ in ("VBD", "VIF"):
        for device in sessions.call(f"{class_}.get_all_records").values():
            if device["VM"] in kinds:
                at = device.get("userdevice") or device["device"]
                of = f"{kinds[device['VM']]} {vms[device['VM']]['name_label']}"
                found.append(f"{class_} {at} of {of}")
    for vdi in sessions.call("VDI.get_all_records").values():
        found.append(f"VDI {vdi['name_label']} snapshot {vdi['is_a_snapshot']}")
    return sorted(found)


@contextlib.contextmanager
def xenapi_server() -> Iterator[TestServer | RealServer]:
    server = RealServer() if REAL_URL else TestServer()
    try:
        yield server
    finally:
        server.close()


def declared(server: TestServer | RealServer) -> Farm:
    """Such a server's names as a farm file gives them."""
    host = {"driver": "xenapi", "uri": server.https, "credentials": str(server.credentials)}
    farm = {
        "farm": FARM, "hosts": {"xen": host | ({"sr": server.sr} if server.sr else {})},
        "network": {"mode": "network", "network": server.network, "addressing": "dhcp"},
        "templates": {"base": {"build": "debian-12"}}, "vms": {"prod": {}},
    }  # fmt: skip
    return loads(json.dumps(farm).encode(), Path("farm.yaml"))  # JSON is YAML


class XenApiRig:
    """Implements the contract's StoreRig; a letter at 1 MiB stands for a disk's content."""

    kind = "xenapi"

    def __init__(self, place: Path, server: TestServer | RealServer) -> None:
        self.place, self.server = place, server
        self.farm = declared(server)
        self._sessions: list[Sessions] = []
        self._foreign: list[str] = []
        if REAL_URL:
            taken = [vm.name for vm in self.pool().all_vms() if vm.name.startswith(f"{FARM}-")]
            self._vdis = set(self.pool().all_vdis())
            assert not taken, f"{REAL_URL} has VMs that the tests would take for theirs: {taken}"

    def sessions(self, **options: Any) -> Sessions:
        count = self.server.count if isinstance(self.server, RealServer) else None
        made = Sessions(self.server.server(**options), count=count)
        self._sessions.append(made)
        return made

    def pool(self, farm: FarmIdentity = KATA, **options: Any) -> Pool:
        notes = Notes(self.place / "notes")
        sr = self.farm.hosts["xen"].sr or ""
        return Pool(self.sessions(), farm, sr=sr, notes=notes, **options)

    def disks(self, farm: FarmIdentity = KATA, *, step=no_step, **options: Any) -> XenApiDisks:
        return XenApiDisks(self.pool(farm), Runner(), step=step, **options)

    def image(self, letter: str = "T", name: str = "image") -> Path:
        path = self.place / name
        with path.open("wb") as file:
            file.truncate(SIZE)
            file.seek(MIB)
            file.write(letter.encode() * 65536)
        return path

    def write(self, machine: str, letter: str) -> None:
        sessions = self.sessions()
        ref = sessions.call("VDI.get_by_uuid", self._uuid(machine))
        image = self.image(letter, f"content-{secrets.token_hex(4)}")
        sessions.put(ref, image, 2 * MIB)
        image.unlink()

    def read(self, machine: str) -> str:
        data = self.export(self._uuid(machine), 2 * MIB)
        letter = data[MIB : MIB + 1]
        assert data[MIB : MIB + 65536] == letter * 65536
        return letter.decode()

    def export(self, uuid: str, count: int = SIZE) -> bytes:
        """GET /export_raw_vdi, its first bytes."""
        with (
            contextlib.closing(self.sessions()) as sessions,
            sessions._session() as session,
            contextlib.closing(connection(self.server.server(), self.server.https)) as link,
        ):
            ref = sessions.call("VDI.get_by_uuid", uuid)
            link.request("GET", f"/export_raw_vdi?session_id={session.handle}&vdi={ref}&format=raw")
            answer = link.getresponse()
            data = answer.read(count)
            assert answer.status == 200, data
            return data

    def _uuid(self, machine: str) -> str:
        disk = self.disks().find(machine)
        assert disk
        return disk.path.name

    def close(self) -> None:
        """All that this test made, on a real server; the test server is thrown away."""
        if REAL_URL:
            for farm in (KATA, identity("other")):
                self._remove(self.disks(farm))
        for sessions in self._sessions:
            sessions.close()

    def _remove(self, disks: XenApiDisks) -> None:
        vms = {vm.ref: vm for vm in disks.pool.all_vms()}
        disks.pool.raze([vms[ref] for ref in self._foreign if ref in vms])
        hypervisor = XenApiHypervisor(disks)
        for vm in disks.pool.all_vms():
            if vm.kind == "machine" and vm.belongs(disks.pool.farm):
                hypervisor.destroy(vm.name)
        for left in hypervisor.leftovers():
            hypervisor.discard(left)
        for template in disks.templates():
            if template.farm == disks.pool.farm:
                disks.remove_template(template.label)
        # nothing was called so when the test began
        rest = [vm for vm in disks.pool.all_vms() if vm.name.startswith(f"{FARM}-")]
        disks.pool.raze(rest)
        for vdi in disks.pool.all_vdis().values():  # as an admin's revert leaves them
            ours = vdi.record["name_label"].startswith(f"{FARM}-") and vdi.ref not in self._vdis
            if ours and not vdi.record["VBDs"]:
                disks.pool.destroy_vdi(vdi.ref)


class XenApiMachines(XenApiRig):
    """The rig for hypervisors: what the guest would do to its disk is done through the server."""

    def __init__(self, place: Path, server: TestServer | RealServer) -> None:
        super().__init__(place, server)
        disks = self.disks()
        path = self.place / "empty"
        with path.open("wb") as file:
            file.truncate(SIZE)
        self.template: Template = disks.seal(path, _template())

    def hypervisor(self, farm: FarmIdentity = KATA, step=no_step) -> XenApiHypervisor:
        return XenApiHypervisor(self.disks(farm, step=step), step=step)

    def spec(self, vm: str, *, port: int = 0, stamp: str = "", options: str = "") -> MachineSpec:
        assert not port, "no user-mode network here"
        return MachineSpec(
            name=f"{FARM}-{vm}", owner=Owner(KATA, vm), memory=192 * MIB, vcpus=1, disk_size=SIZE,
            nic=Nic(mac="00:16:3e:0a:0b:0c", mode="network", target=self.farm.network.network or ""),
        )  # fmt: skip

    def boot(self, vm: str, stamp: str = "") -> str:
        """Start; what the guest found on its disk. It writes when it is up: here, while it is off, for
        the server lets nobody else at a disk in use; the proof of being pristine is gone by then."""
        machine = f"{FARM}-{vm}"
        found = self.read(machine).strip("\0")
        if stamp and not found:
            self.write(machine, stamp)
        self.hypervisor().start(machine)
        return found

    def calls_a_vm(self, vms: int) -> dict[str, float]:
        """By operation, of each of so many; without what is looked up once for all of them."""
        hypervisor = self.hypervisor()
        names = [f"v{vms}x{n}" for n in range(vms)]
        counted = {}
        self.server.log()
        for what, do in (
            ("clone", lambda vm: hypervisor.define(self.spec(vm), self.template)),
            ("start", lambda vm: hypervisor.start(f"{FARM}-{vm}")),
            ("reset", lambda vm: hypervisor.reset(f"{FARM}-{vm}", "clean")),
        ):
            for vm in names:
                do(vm)
            once = ("session.", "SR.", "pool.get_", "network.")
            calls = [call for call in self.server.log() if not call.startswith(once)]
            counted[what] = round(len(calls) / vms, 2)
        return counted

    def two_clones(self, *, at_once: bool, turns: bool, scale: float = 0.05) -> float:
        """Seconds; the server's own times are a real one's, scaled."""
        self.server.tell(knobs={knob: scale * seconds for knob, seconds in REAL_SECONDS.items()})
        sessions = self.sessions(turns=self.place / "turns" if turns else None)
        hypervisor = XenApiHypervisor(XenApiDisks(Pool(sessions, KATA), Runner()))
        hypervisor.list()  # logged in
        began = time.monotonic()
        with ThreadPoolExecutor(2 if at_once else 1) as pool:
            define = partial(hypervisor.define, template=self.template)
            list(pool.map(define, [self.spec("left"), self.spec("right")]))
        took = time.monotonic() - began
        for vm in ("left", "right"):
            hypervisor.destroy(f"{FARM}-{vm}")
        return took

    def calls_warm(self) -> dict[str, int]:
        """Of a VM with a warm checkpoint; without what is looked up once."""
        self.server.tell(knobs={"suspend_sr": True, "task_time": 1.5})
        hypervisor, name, counted = self.hypervisor(), f"{FARM}-warm", {}
        hypervisor.define(self.spec("warm"), self.template)
        hypervisor.start(name)
        for what, do in (
            ("checkpoint, warm", lambda: hypervisor.checkpoint(name, "now", warm=True)),
            ("reset to a warm one", lambda: hypervisor.reset(name, "now")),
            ("start, suspended", lambda: hypervisor.start(name)),
        ):
            self.server.log()
            do()
            counted[what] = sum(not call.startswith("session.") for call in self.server.log())
        return counted

    def add_foreign(self, name: str) -> None:
        sessions = self.sessions()
        (default,) = sessions.call("VM.get_by_name_label", "Other install media")
        ref = sessions.call("VM.clone", default, name)
        sessions.call("VM.provision", ref)
        self._foreign.append(ref)

    def foreign_there(self, name: str) -> bool:
        return bool(self.sessions().call("VM.get_by_name_label", name))


def _template() -> Template:
    from rigs import template

    return replace(template(), firstboot="none")


_Rig = TypeVar("_Rig", bound=XenApiRig)


@contextlib.contextmanager
def opened(kind: type[_Rig], place: Path, server: TestServer | RealServer) -> Iterator[_Rig]:
    """The test server with nothing on it yet; or the real one, left as it was."""
    if isinstance(server, TestServer):
        server.tell(begin=True)
    rig = kind(place, server)
    try:
        yield rig
    finally:
        rig.close()


# -- fixtures; the suites give them their own names -----------------------------------------------------


@pytest.fixture
def machines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[XenApiMachines]:
    with opened(XenApiMachines, tmp_path, request.getfixturevalue("xenapi")) as made:
        yield made


@pytest.fixture
def its_server(rig: XenApiMachines) -> TestServer | RealServer:
    return rig.server


@pytest.fixture
def kept(rig: XenApiMachines) -> XenApiHypervisor:
    """kata-prod has a checkpoint "one" of content A, on which it is."""
    hypervisor, name = rig.hypervisor(), f"{FARM}-prod"
    hypervisor.define(rig.spec("prod"), rig.template)
    rig.write(name, "A")
    hypervisor.checkpoint(name, "one")
    return hypervisor
