"""Farms of one name of two users of this machine, and of two PCs with one far host."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from controllers import Controller
from neighbour import NEEDS_ROOT, UID, square

from hypervisors.api import Foreign, Owner, Template
from hypervisors.far.drivers import FarLeases
from inventory.errors import Busy, LeaseLost, NotOurs
from provision.engine.locks import lock_of
from tests import farm
from tests.contract import far_rig, xenapi_rig
from tests.identities import KATA, identity

__all__ = ["square"]

SIZE = 64 * 2**20
ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cli", "builds", "provision", "repositories", "hypervisors", "host", "inventory", "templates")
_STRANGER = """
import json, sys
code, file, *asked = sys.argv[1:]
sys.path.insert(0, code)
import cli.composition
from pathlib import Path
from inventory.errors import FarmhandError
from tests import farm
from provision.engine.report import QuietReporter
from provision.engine.runner import perform
from provision.operations.adopt import Adopt
from provision.site import open_site
ways = {
    "reset": lambda site: farm.reset(site, ["prod"], start=False),
    "gc": farm.gc, "destroy": farm.destroy, "adopt": lambda site: perform(site, Adopt()),
}
told = []
for way in asked:
    try:
        with open_site(Path(file), reporter=QuietReporter(), adopting=way == "adopt") as site:
            told.append([way, "done", [action.verb for action in ways[way](site).actions]])
    except FarmhandError as error:
        told.append([way, type(error).__name__, error.message])
print(json.dumps(told))
"""


class Neighbour:
    """A real other user, with a state directory, a farm file and a copy of the program of its own."""

    def __init__(self, place: Path, text: str) -> None:
        self.home = place / "neighbour"
        for name in ("state", "run", "cache"):
            (self.home / name).mkdir(parents=True, mode=0o700)
        self.code = place / "code"
        for room in ROOMS:
            shutil.copytree(ROOT / room, self.code / room, ignore=shutil.ignore_patterns("__pycache__"))
        (self.code / "tests").mkdir()
        shutil.copy(ROOT / "tests" / "farm.py", self.code / "tests")
        self.file = self.home / "farm.yaml"
        self.file.write_text(text)

    def give(self, *files: Path) -> list[Path]:
        """Copies that are its own."""
        made = [Path(shutil.copy(file, self.home / file.name)) for file in files]
        for path in (self.home, *self.home.iterdir()):
            os.chown(path, UID, UID)
        return made

    def does(self, *asked: str) -> list[list[str]]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        for name, directory in (("STATE", "state"), ("RUNTIME", "run"), ("CACHE", "cache")):
            environment[f"FARMHAND_{name}_DIR"] = str(self.home / directory)
        done = subprocess.run(
            [sys.executable, "-P", "-c", _STRANGER, self.code, self.file, *asked], cwd="/",
            env=environment, user=UID, group=UID, extra_groups=[], capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))


@NEEDS_ROOT
def test_root_and_another_user_with_one_farm_name_on_one_server(
    square: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name))
    server = xenapi_rig.TestServer()
    try:
        more = f"network: {{mode: network, network: '{server.network}', addressing: dhcp}}"
        host = f"driver: xenapi, uri: '{server.https}', ca: {{ca}}, credentials: {{credentials}}"
        ours = Controller(
            tmp_path / "ours", host.format(ca=server.ca, credentials=server.credentials), None, more
        )
        ours.seal()
        with ours.site() as site:
            farm.clone_farm(site, start=False)
        other = Neighbour(square, "")
        ca, credentials = other.give(server.ca, server.credentials)
        theirs = host.format(ca=ca, credentials=credentials)
        other.file.write_text(ours.file.read_text().replace(ours.host, theirs))

        reset, gc, destroy = other.does("reset", "gc", "destroy")
        assert reset[1] == "NotOurs"
        assert str(ours.file) in reset[2] and str(other.file) in reset[2]
        assert gc[1] == destroy[1] == "done"
        assert "discard" not in gc[2]
        with ours.site() as site, site.locks.hold(lock_of("prod"), doing="reset prod"):
            [adopt] = other.does("adopt")
            assert adopt[1] == "Busy"
            assert str(ours.file) in adopt[2] and "doing: reset prod" in adopt[2]
        with ours.site() as site:
            assert len(site.disks("here").list()) == 2
            farm.reset(site, ["prod"], start=False)
        [adopt] = other.does("adopt")
        assert adopt[1] == "done"
        with ours.site() as site, pytest.raises(NotOurs):
            farm.reset(site, ["prod"], start=False)
    finally:
        server.close()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[far_rig.FarMachine]:
    with far_rig.FarMachine(tmp_path) as made:
        yield made


def test_two_pcs_and_one_far_host(machine: far_rig.FarMachine, tmp_path: Path) -> None:
    there = identity("kata", "/home/bob/farm.yaml", "bob@pc2")
    mine, others = machine.disks(KATA), machine.disks(there)
    image = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    template = Template(
        name="base", generation=1, ref="", size=SIZE, sha256="", created=datetime.now(UTC),
        origin="nothing", firstboot="none",
    )  # fmt: skip
    mine.clone(mine.seal(image, template), "kata-prod", Owner(KATA, "prod"), SIZE)
    assert list(others.list()) == []
    assert list(others.others()) == [Foreign("kata-prod", Owner(KATA, "prod"))]
    with pytest.raises(NotOurs, match="bob@pc2"):
        others.restore("kata-prod", "clean")

    first, second = FarLeases(machine.link(KATA)), FarLeases(machine.link(there))
    with first.hold(["kata-prod"], "pid 7 of ann@pc1, doing: reset prod"):
        with pytest.raises(Busy, match="kata-prod is held by pid 7 of ann@pc1, doing: reset prod"):
            second.link.call("leases", "take", ["kata-dev2", "kata-prod"], "the other")
        with second.hold(["kata-dev2"], "the other"):
            pass
    with second.hold(["kata-prod"], "the other"):
        pass
    assert not list((machine.place / "run").rglob("leases"))


def taken(leases: FarLeases, stack: contextlib.ExitStack) -> None:
    """As soon as an agent that was cut off has ended."""
    limit = time.monotonic() + 60
    while True:
        try:
            stack.enter_context(leases.hold(["kata-prod"], "pid 8 of bob@pc2"))
            return
        except Busy:
            assert time.monotonic() < limit
            time.sleep(0.05)


def test_a_far_lease_is_taken_again_after_a_lost_connection(machine: far_rig.FarMachine) -> None:
    there = identity("kata", "/home/bob/farm.yaml", "bob@pc2")
    first, second = FarLeases(machine.link(KATA)), FarLeases(machine.link(there))
    with first.hold(["kata-prod"], "pid 7 of ann@pc1"), first.hold(["kata-dev2"], "pid 7 of ann@pc1"):
        line = first.link._line
        assert line
        machine.sshd.cut()
        while not line.lost:
            time.sleep(0.01)
        assert list(first.link.call("disks", "list")) == []
        for name in ("kata-prod", "kata-dev2"):
            with pytest.raises(Busy, match=f"{name} is held by pid 7"), second.hold([name], "the other"):
                pass
    with second.hold(["kata-dev2", "kata-prod"], "the other"):
        pass
    assert not list((machine.place / "run").rglob("leases"))


def test_a_far_lease_that_another_took_meanwhile_ends_the_command(machine: far_rig.FarMachine) -> None:
    there = identity("kata", "/home/bob/farm.yaml", "bob@pc2")
    first, second = FarLeases(machine.link(KATA)), FarLeases(machine.link(there))
    disks = machine.disks(KATA)
    disks._link = first.link
    with contextlib.ExitStack() as stack:
        stack.enter_context(first.hold(["kata-prod"], "pid 7 of ann@pc1"))
        line = first.link._line
        assert line
        machine.sshd.cut()
        while not line.lost:
            time.sleep(0.01)
        with contextlib.ExitStack() as other:
            taken(second, other)
            for _ in range(2):
                with pytest.raises(LeaseLost, match="kata-prod is held by pid 8 of bob@pc2") as lost:
                    disks.destroy("kata-prod")
                assert "\n" not in lost.value.message and "nothing more" in lost.value.message
        disks.destroy("kata-prod")  # it has ended, and is had again


def test_a_far_lease_ends_with_its_agent(machine: far_rig.FarMachine) -> None:
    there = identity("kata", "/home/bob/farm.yaml", "bob@pc2")
    first, second = FarLeases(machine.link(KATA)), FarLeases(machine.link(there))
    first.link.call("leases", "take", ["kata-prod"], "one that is cut off")
    first.link.close()
    limit = time.monotonic() + 60
    while True:
        try:
            with second.hold(["kata-prod"], "the other"):
                break
        except Busy:
            assert time.monotonic() < limit
