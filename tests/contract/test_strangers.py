"""gc and destroy beside what isn't ours, on real stores and a real libvirtd: other farms' machines,
copies of ours, things without a mark, names that begin like ours. Prints of it all, before and after."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from shutil import rmtree

import lvm_rig
import pytest
from rigs import SIZE, short_directory, template
from strangers_rig import LvmNeighbours, Qcow2Neighbours, ZfsNeighbours

from inventory.errors import NotOurs, Text, spelled
from inventory.loader import load
from provision.engine.report import QuietReporter
from provision.site import Site
from tests import farm

pytestmark = pytest.mark.system


class Told(QuietReporter):
    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, text: Text, *, vm: str = "") -> None:
        self.warned.append(f"{vm}: {spelled(text)}")


class Town:
    """Farms kata and kata-2 on one store, each with a libvirtd of its own."""

    def __init__(self, place: Path, store) -> None:
        self.place = place
        self.store = store
        self.told = Told()
        (place / "key").touch(0o600)
        for name, vms in (("kata", ("dev2", "prod")), ("kata-2", ("prod",))):
            document = {
                "farm": name,
                "hosts": {"here": {"driver": "kvm", "disks": store.section}},
                "templates": {"base": {"build": "debian-12", "size": "64M"}},
                "ssh": {"key": "key"},  # as for an image that nobody tells whom to let in
                "vms": {vm: {"memory": "64M"} for vm in vms},
            }
            (place / f"{name}.yaml").write_text(json.dumps(document))

    @contextmanager
    def site(self, name: str = "kata", *, plan: bool = False) -> Iterator[Site]:
        with Site(load(self.place / f"{name}.yaml"), reporter=self.told, plan=plan) as site:
            yield site

    def make(self) -> None:
        for number, name in enumerate(("kata", "kata-2"), 1):  # each has a template of its own
            with self.site(name) as site:
                site.prepare()
                image = self.place / "empty.qcow2"
                subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
                site.disks("here").seal(image, template(generation=number))
                farm.clone_farm(site, start=False)

    @contextmanager
    def libvirt(self, name: str = "kata") -> Iterator:
        import libvirt

        with self.site(name) as site:
            connection = libvirt.open(site.daemon().uri())
            try:
                yield connection
            finally:
                connection.close()

    def put_domains(self) -> None:
        """In kata's own libvirtd: one made by hand, a virt-clone of prod with its metadata, one marked
        as another farm's."""
        with self.libvirt() as connection:
            text = connection.lookupByName("kata-prod").XMLDesc(0)
            head, _, rest = text.partition("<uuid>")
            text = head + rest.partition("</uuid>")[2]
            connection.defineXML(text.replace("<name>kata-prod<", "<name>kata-prod-clone<"))
            other = text.replace("<name>kata-prod<", "<name>kata-2-prod<")
            other = other.replace('name="kata-prod"', 'name="kata-2-prod"')
            connection.defineXML(other.replace('farm="kata:', 'farm="kata-2:'))
            connection.defineXML(
                "<domain type='qemu'><name>kata-by-hand</name><memory>65536</memory>"
                "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
            )

    def prints(self) -> dict[str, str]:
        found = dict(self.store.prints())
        with self.libvirt() as connection:
            for name in ("kata-prod-clone", "kata-2-prod", "kata-by-hand"):
                text = connection.lookupByName(name).XMLDesc(0)
                found[f"domain {name}"] = hashlib.sha256(text.encode()).hexdigest()
        return found

    def other_farm(self) -> tuple[object, ...]:
        with self.site("kata-2") as site:
            (row,) = farm.status(site).vms
            disk = site.disks("here").find("kata-2-prod")
            return row.state, row.condition, row.checkpoints, disk

    def has_daemon(self, name: str) -> bool:
        with self.site(name) as site:
            return site.daemon().directory.exists()

    def drop_domain(self, name: str) -> None:
        with self.libvirt() as connection:
            connection.lookupByName(name).undefine()


@pytest.fixture(
    params=[
        pytest.param("qcow2"),
        pytest.param("zfs", marks=pytest.mark.lab),
        pytest.param(lvm_rig.ThinRig, id="lvm-thin", marks=pytest.mark.lab),
        pytest.param(lvm_rig.ClassicRig, id="lvm-linked", marks=pytest.mark.lab),
    ]
)
def town(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Town]:
    place = short_directory()
    for name in ("STATE", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"FARMHAND_{name}_DIR", str(place / name[0].lower()))
    if request.param == "zfs":
        request.getfixturevalue("zfs_pool")
        store = ZfsNeighbours(place)
    elif request.param == "qcow2":
        store = Qcow2Neighbours(place)
    else:
        store = LvmNeighbours(place, request.param())
    town = Town(place, store)
    town.make()
    try:
        yield town
    finally:
        for name in ("kata", "kata-2"):
            if town.has_daemon(name):  # also what a failed test left
                with town.libvirt(name) as connection:
                    for domain in connection.listAllDomains(0):
                        domain.undefine()
            with town.site(name) as site:
                farm.destroy(site)
        store.close()
        rmtree(place)


def test_gc_and_destroy_leave_strangers_alone(town: Town) -> None:
    town.store.put()
    town.put_domains()
    strangers, other = town.prints(), town.other_farm()
    assert len(strangers) > 3
    assert other[:2] == ("stopped", "clean")

    with town.site() as site:
        assert not farm.gc(site).changed, "all is in use, or not ours"
    town.drop_domain("kata-dev2")  # a lost definition: its disk is ours and nobody has it
    began = datetime.now(UTC)
    with town.site(plan=True) as site:
        planned = farm.gc(site)
        found = planned.result.leftovers
        (disk,) = [item for item in found if item.kind == "disk"]
        assert (disk.farm, disk.owner, disk.why) == ("kata", "dev2", "no machine has it")
        assert 0 <= disk.age < 3600
        assert disk.created <= began
        assert disk.bytes >= 0
        assert {item.owner for item in found} == {"dev2"}
    assert town.prints() == strangers, "a plan touches nothing at all"
    with town.site() as site:  # the farm file has dev2: what is on its disk may be missed
        (left,) = [line for line in map(str, farm.gc(site).actions) if "disk kata-dev2" in line]
        assert left.startswith(
            "dev2: left alone, for the farm file has dev2: disk kata-dev2 (of kata/dev2; "
        )
        assert site.disks("here").find("kata-dev2") is not None
    assert town.prints() == strangers
    assert town.other_farm() == other

    with town.site() as site:
        with pytest.raises(NotOurs, match="kata-2-prod, kata-by-hand, kata-prod-clone, without our"):
            farm.destroy(site)
        farm.destroy(site, ["dev2", "prod"])
        assert site.hypervisor("here").list() == []
        assert site.disks("here").list() == []
    assert town.prints() == strangers
    assert town.other_farm() == other

    for name in ("kata-2-prod", "kata-by-hand", "kata-prod-clone"):
        town.drop_domain(name)
    strangers = town.store.prints()
    with town.site() as site:
        farm.destroy(site)
        assert not site.paths.root.exists()
    with town.site("kata-2") as site:
        assert [kept.label for kept in site.disks("here").templates()] == ["base@2"]
    assert town.store.prints() == strangers
    assert town.other_farm() == other


def test_a_disk_that_somebody_elses_machine_uses_is_no_leftover(town: Town) -> None:
    """An admin renamed our machine: the mark speaks of another then, and the disk is in use."""
    with town.libvirt() as connection:
        connection.lookupByName("kata-prod").rename("prod-of-mine")
    with town.site() as site:
        disk = site.disks("here").find("kata-prod")
        assert not farm.gc(site).changed
        assert site.disks("here").find("kata-prod") == disk
    with town.libvirt() as connection:
        connection.lookupByName("prod-of-mine").rename("kata-prod")
    with town.site() as site:
        assert [row.state for row in farm.status(site).vms] == ["stopped", "stopped"], "ours again"


@pytest.mark.parametrize("town", ["qcow2"], indirect=True)  # only files lie in the farm's own directory
def test_a_file_of_somebodys_among_the_farms_own_disks_outlives_the_farm(town: Town) -> None:
    town.store.root = town.place / "s/farms/kata/disks"  # where no path was given
    farm_file = town.place / "kata.yaml"
    with town.site() as site:
        farm.destroy(site)
    document = json.loads(farm_file.read_text())
    del document["hosts"]["here"]["disks"]
    farm_file.write_text(json.dumps(document))
    with town.site() as site:
        site.prepare()
        image = town.place / "empty.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
        site.disks("here").seal(image, template())
        farm.clone_farm(site, start=False)
    town.store.put()
    before = town.store.prints()
    with town.site(plan=True) as site:
        lines = [a.text for a in farm.destroy(site).actions if a.verb == "note"]
        assert lines
        assert lines[0].startswith("stays: files that aren't this farm's, such as ")
    with town.site() as site:
        farm.destroy(site)
        assert town.store.prints() == before
        assert [p.name for p in site.paths.root.iterdir()] == ["disks"]
        rmtree(site.paths.root)
