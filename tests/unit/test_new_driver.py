"""A new driver is one file and one line: here that file is this one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self

import pytest

from host.check import Check
from hypervisors.api import Capabilities, Directories, Hypervisor
from hypervisors.drivers import DRIVERS
from hypervisors.fake.driver import FakeHypervisor
from hypervisors.fake.host import FakeHost, OpenFake
from hypervisors.host import OwnDaemon, Surroundings, all_drivers
from inventory import kinds, plain
from inventory.errors import InventoryError, Unsupported
from inventory.hosts import DriverInfo, Tool, host_section
from inventory.loader import loads
from inventory.schema import json_schema
from provision.doctor import examine
from provision.engine.report import QuietReporter
from provision.member import Member
from provision.operations.checkpoint import check_keeps_memory
from provision.site import open_site
from tests import farm

if TYPE_CHECKING:
    from inventory.fields import Line

FARM = """\
farm: kata
hosts: {here: {driver: mine, room: attic}}
templates: {base: {build: debian-12, size: 64M}}
vms: {prod: {memory: 512M}}
"""


@dataclass(frozen=True, kw_only=True)
class MineHost(FakeHost):
    """A driver of somebody's own."""

    INFO: ClassVar = DriverInfo(
        name="mine", called="a mine host", guests=False, mac_prefix="02:00:00",
        modules=("minecraft",),
        tools=(Tool(command="mine-ctl", package="mine", purpose="digs"),),
    )  # fmt: skip
    NEEDED: ClassVar = {"room": "where it stands"}

    driver: Literal["mine"] = "mine"
    room: Line
    """Where it stands."""

    def opened(self, around: Surroundings) -> OpenMine:
        return OpenMine(around)

    @classmethod
    def daemon_left(cls, directories: Directories) -> OwnDaemon | None:
        left = MineDaemon(directories.farm / "mine")
        return left if left.directory.exists() else None

    @classmethod
    def examine(cls, hosts: Sequence[Self], cache: Path) -> Iterable[Check]:
        del cache
        return [Check("mine", True, "note", f"in the {host.room}") for host in hosts]


class MineDaemon(NamedTuple):
    """A daemon of this driver's own."""

    directory: Path

    def defined(self) -> frozenset[str]:
        return frozenset()

    def running(self) -> bool:
        return False

    def is_anothers(self) -> bool:
        return False

    def stop(self, *, force: bool = False) -> None:
        del force


class OpenMine(OpenFake):
    def _connect(self) -> Hypervisor:
        return Mine(self.around.farm, self.disks(), self.state(), step=self.around.callbacks.step)


class Mine(FakeHypervisor):
    def capabilities(self) -> Capabilities:
        return replace(
            super().capabilities(), driver="mine", notes=("dug",), warm_checkpoints=False,
            why_not_warm="the walls let it cool",
        )  # fmt: skip


@pytest.fixture(autouse=True)
def _line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.hosts, "mine", f"{__name__}:MineHost")
    for name in ("STATE", "RUNTIME", "CACHE"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(tmp_path / name.lower()))


def test_a_farm_of_it_is_loaded_cloned_and_known(tmp_path: Path) -> None:
    file = tmp_path / "kata.yaml"
    file.write_text(FARM)
    for _ in range(2):  # the second one is that which was kept
        with open_site(file, reporter=QuietReporter()) as site:
            assert site.farm.hosts == {"here": MineHost(room="attic")}
            farm.clone_farm(site)
            assert site.hypervisor("here").find("kata-prod").mac.startswith("02:00:00:")
            seen = farm.status(site)
            assert (seen.hosts[0].driver, seen.hosts[0].notes) == ("mine", ("dug",))
            assert [row.state for row in seen.vms] == ["running"]
            with pytest.raises(Unsupported, match="no running machine's memory: the walls let it cool"):
                check_keeps_memory(Member(site, "prod"))
    assert plain.loads(plain.dumps(site.farm)) == site.farm
    checks = {check.name: check for check in examine(file).checks}
    assert checks["mine"].text == "in the attic"
    assert "mine-ctl (digs)" in checks["tools"].text
    assert checks["python"].text.endswith(" lacks minecraft")


def test_its_daemon_is_found_where_the_farm_has_no_such_host_any_more(tmp_path: Path) -> None:
    file = tmp_path / "kata.yaml"
    file.write_text(FARM.replace("{driver: mine, room: attic}", "{driver: fake}"))
    with open_site(file, reporter=QuietReporter()) as site:
        site.prepare()
        assert site.daemon() is None
        (site.paths.root / "mine").mkdir()
        assert site.daemon() == MineDaemon(site.paths.root / "mine")


def test_its_keys_are_judged_as_others_are(tmp_path: Path) -> None:
    def refused(host: str) -> str:
        with pytest.raises(InventoryError) as got:
            loads(FARM.replace("driver: mine, room: attic", host).encode(), Path("f.yaml"))
        return str(got.value)

    assert (
        refused("driver: mine") == "f.yaml:2:24: hosts.here: driver mine needs 'room', where it stands"
    )
    assert "2:16: hosts.here: 'room' is for driver mine; the driver is kvm" in refused("room: attic")
    assert "xenapi, ssh, fake, mine" in refused("driver: main")
    assert "MineHost" in json_schema()["$defs"]


@pytest.mark.parametrize("name", DRIVERS)
def test_a_description_is_of_the_driver_that_it_is_listed_as(name: str) -> None:
    host = host_section(name)
    assert host.INFO.name == name
    assert host in all_drivers()
    assert host.__dataclass_fields__["driver"].default == name
