"""Marks that somebody else wrote, and answers that no tool gives: an object with such a mark is
nobody's, is named and left alone; nothing of it is a traceback, a loop, or a path."""

from __future__ import annotations

import json
import os
import socket
import string
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.run import Runner
from hypervisors.api import (
    Checkpoint,
    Disk,
    Disks,
    Forward,
    Machine,
    MachineSpec,
    Nic,
    Owner,
    Power,
    Template,
)
from hypervisors.disks.images import image_info
from hypervisors.disks.lvm.command import Lvm, encode, marked
from hypervisors.disks.lvm.thin import LvmThinDisks
from hypervisors.disks.qcow2.disks import Qcow2Disks
from hypervisors.disks.zfs.disks import ZfsDisks
from hypervisors.disks.zfs.state import find_leftovers, read_disk, read_state
from hypervisors.far import wire
from hypervisors.libvirt.domain_types import Qemu
from hypervisors.libvirt.domain_xml import domain_xml, read_domain
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.kvm import KvmVerdict
from hypervisors.marks import DamagedMark, is_name, moment, read_fields
from hypervisors.ownership import FarmIdentity
from hypervisors.xenapi.records import PREFIX, Vdi, XenApiVm, capacity_of, started
from inventory.errors import (
    Call,
    CommandFailed,
    DriverFailed,
    FarmhandError,
    NotOurs,
    WrongState,
    remedy_of,
)
from tests.identities import KATA

VICTIM = "../../../victim"
WRONG = [VICTIM, "..", ".", "", "/etc", "a/b", "a b", "-x", "\x1b[2J", "\u202eprod", "prod\n", "x" * 200]
FIELDS = ("farm", "vm", "machine", "name", "template", "label", "generation", "size", "created", "kind",
          "sha256", "origin", "checkpoint", "base", "seq", "spec", "mac", "whatever")  # fmt: skip
NOW = datetime(2026, 11, 1, tzinfo=UTC).isoformat()
SOUND = {"machine": "kata-prod", "farm": KATA.mark, "vm": "prod", "template": "base@1", "size": 2**24,
         "created": NOW}  # fmt: skip
foreign = st.one_of(
    st.text(st.characters()), st.sampled_from([*WRONG, "kata", "prod", "base@1", NOW, "7"]),
    st.integers(), st.floats(), st.none(), st.booleans(), st.lists(st.integers(), max_size=2),
)  # fmt: skip


class Warned(list[str]):
    def __call__(self, text: object) -> None:
        assert isinstance(text, str)
        self.append(text)


# -- the reader -----------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from(FIELDS), foreign), st.sets(st.sampled_from(FIELDS), max_size=3))
def test_what_is_read_has_its_fields_grammar_or_is_damaged(
    found: dict[str, Any], needed: set[str]
) -> None:
    try:
        fields = read_fields(found, needed)
    except DamagedMark as error:
        assert str(error).isprintable()
        assert len(str(error)) < 200
        return
    assert needed <= fields.keys() == found.keys()
    for key, text in fields.items():
        if key in ("farm", "machine", "name", "checkpoint"):
            assert set(text) <= {*string.ascii_letters, *string.digits, *"._-"}
            assert text[0] not in ".-"
        if key in ("size", "generation", "seq"):
            assert 0 <= int(text) < 10**18
        if key == "created":
            assert moment(text).astimezone() > datetime(1970, 1, 1).astimezone()


@pytest.mark.parametrize("name", WRONG)
def test_no_name(name: str) -> None:
    assert not is_name(name)


@pytest.mark.parametrize("time", ["2026-11-01", "2026-11-01T00:00:00", "now",
                                  "0001-01-01T00:00:00+23:59",
                                  "9999-12-31T23:59:59-12:00"])  # fmt: skip
def test_no_moment(time: str) -> None:
    with pytest.raises(DamagedMark):
        read_fields({"created": time})


# -- qcow2 files ----------------------------------------------------------------------------------------


class Files:
    """A store with one machine."""

    def __init__(self, root: Path) -> None:
        self.root, self.warned = root / "store", Warned()
        self.disks = Qcow2Disks(self.root, KATA, Runner(), warn=self.warned, headroom=0)
        image = root / "image.raw"
        image.write_bytes(bytes(2**20))
        sealed = self.disks.seal(image, _template())
        self.disks.clone(sealed, "kata-prod", Owner(KATA, "prod"), 2**24)
        self.mark = self.root / "vms" / "kata-prod" / "owner.json"
        self.template = self.root / "templates" / "base@1.json"

    def everything(self) -> dict[str, tuple[int, bytes]]:
        return {
            str(path.relative_to(self.root)): (path.stat().st_ino, path.read_bytes())
            for path in sorted(self.root.rglob("*")) if path.is_file() and path.name != ".lock"
        }  # fmt: skip


def _template() -> Template:
    return Template(
        name="base", generation=1, ref="", size=2**20, sha256="", created=datetime.now(UTC),
        origin="a test", firstboot="none",
    )  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.mark.parametrize("change", [
    *({"vm": name} for name in WRONG if name), {"farm": VICTIM}, {"machine": "../kata-prod"},
    {"size": "many"}, {"size": -1}, {"size": 1e99}, {"created": "0001-01-01"}, {"template": "../x@1"},
    {"vm": None}, {"vm": ["prod"]}, {"size": True},
])  # fmt: skip
def test_a_sidecar(files: Files, change: dict[str, Any]) -> None:
    before = files.everything()
    text = json.dumps(json.loads(files.mark.read_bytes()) | change)
    files.mark.write_text(text)
    assert list(files.disks.list()) == []
    assert files.disks.find("kata-prod") is None
    assert list(files.disks.leftovers()) == []
    files.disks.list()
    (told,) = files.warned
    assert str(files.mark) in told
    assert told.isprintable()
    with pytest.raises(FarmhandError):
        files.disks.restore("kata-prod", "clean")
    files.disks.destroy("kata-prod")
    with pytest.raises(WrongState, match="in use by kata-prod"):
        files.disks.remove_template("base@1")
    assert files.everything() == before | {
        "vms/kata-prod/owner.json": (files.mark.stat().st_ino, text.encode())
    }


@pytest.mark.parametrize(
    "data", [b"", b"\x00\xff", b"[]" * 9, b"{" * 100_000, b"[" * 100_000, b"9" * 9999]
)
def test_a_sidecar_that_is_no_json(files: Files, data: bytes) -> None:
    files.mark.write_bytes(data)
    files.template.write_bytes(data)
    assert list(files.disks.list()) == list(files.disks.templates()) == []
    assert list(files.disks.leftovers()) == []


@pytest.mark.parametrize("change", [{"name": VICTIM}, {"name": "other"}, {"generation": 2},
                                    {"size": "x"},
                                    {"created": "x"}, {"firstboot": "\x1b[2J"}])  # fmt: skip
def test_a_templates_description(files: Files, change: dict[str, Any]) -> None:
    files.template.write_text(json.dumps(json.loads(files.template.read_bytes()) | change))
    assert list(files.disks.templates()) == []


# -- libvirt --------------------------------------------------------------------------------------------


class NoDisks:
    """A store without any."""

    def find(self, _machine: str) -> None:
        return None

    def list(self) -> tuple[Disk, ...]:
        return ()

    leftovers = list

    def destroy(self, machine: str) -> None:
        raise AssertionError(machine)


def definition(**marks: str) -> str:
    spec = MachineSpec(
        name="kata-prod", owner=Owner(KATA, "prod"), memory=2**27, vcpus=1, disk_size=2**24,
        nic=Nic(mac="52:54:00:00:00:01", mode="network", target="default"),
    )  # fmt: skip
    domain = ET.fromstring(
        domain_xml(spec, Path("/nowhere/disk"), "raw", "base@1", kvm=False, system=True)
    )
    domain.set("type", "test")
    mark = domain.find("metadata")[0]
    mark.attrib.update(marks)
    for element in (domain.find("cpu"), domain.find("os/boot")):
        holder = domain.find("os") if element.tag == "boot" else domain
        holder.remove(element)
    return ET.tostring(domain, encoding="unicode")


@pytest.fixture
def libvirtd(tmp_path: Path) -> Iterator[tuple[libvirt.virConnect, LibvirtHypervisor, Warned]]:
    """libvirt's own test driver."""
    node = tmp_path / "node.xml"
    node.write_text("<node/>")
    warned = Warned()
    disks: Any = NoDisks()
    hypervisor = LibvirtHypervisor(
        f"test://{node}", KATA, disks, Runner(), kind=Qemu(KvmVerdict(False, "a test")), warn=warned
    )
    yield hypervisor._connect(), hypervisor, warned
    hypervisor.close()


def test_a_sound_mark_in_libvirt(libvirtd) -> None:
    connection, hypervisor, warned = libvirtd
    connection.defineXML(definition())
    (machine,) = hypervisor.list()
    assert machine.owner == Owner(KATA, "prod")
    assert not warned


@pytest.mark.parametrize("marks", [{"vm": VICTIM}, {"vm": ".."}, {"farm": "../kata"}, {"template": "/x"},
                                   {"spec": "\u202e"}, {"vm": "a\tb"}])  # fmt: skip
def test_metadata_in_libvirt(libvirtd, marks: dict[str, str]) -> None:
    connection, hypervisor, warned = libvirtd
    connection.defineXML(definition(**marks))
    assert hypervisor.list() == []
    assert hypervisor.find("kata-prod").owner is None
    assert list(hypervisor.leftovers()) == []
    for change in (hypervisor.destroy, hypervisor.start, lambda name: hypervisor.stop(name, grace=0)):
        with pytest.raises(NotOurs):
            change("kata-prod")
    assert connection.lookupByName("kata-prod")
    (told,) = warned
    assert "domain kata-prod" in told
    assert told.isprintable()


@given(
    st.dictionaries(
        st.sampled_from(["name", "farm", "vm", "spec", "template"]), st.text(string.printable)
    )
)
def test_any_metadata_is_read(marks: dict[str, str]) -> None:
    domain = ET.fromstring(definition())
    domain.find("metadata")[0].attrib.update(marks)
    try:
        text = ET.tostring(domain, encoding="unicode")
        ET.fromstring(text)
    except ET.ParseError:
        return  # not in XML
    owner = read_domain(text).owner
    assert owner is None or (is_name(owner.farm.name) and (is_name(owner.vm) or not owner.vm))


@pytest.mark.parametrize("xml", ["", "<domain>", "<domain><memory>lots</memory></domain>", "\x00"])
def test_no_definition(xml: str) -> None:
    with pytest.raises(DriverFailed, match=f"libvirt on {socket.gethostname()}"):
        read_domain(xml)


def test_a_start_mark_is_no_time() -> None:
    mark = '<m:start xmlns:m="urn:farmhand:start:1" at="soon"/>'
    assert read_domain(definition().replace("</metadata>", f"{mark}</metadata>")).started is None


# -- ZFS and LVM, as their tools report -----------------------------------------------------------------

VOLUME = {
    "marks": {"state": "disk", "machine": "kata-prod", "farm": KATA.mark, "vm": "prod",
              "template": "base@1", "base": "clean", "size": "16777216",
              "created": NOW, "maker": "", "token": "00"},
    "snapshots": {}, "used": 4096, "written": 0,
}  # fmt: skip


def zfs_report(marks: dict[str, Any], snapshots: dict[str, Any] | None = None) -> dict[str, Any]:
    volume = VOLUME | {"marks": VOLUME["marks"] | marks, "snapshots": snapshots or {}}
    return {"volumes": {"tank/kata/vms/kata-prod.1": volume}, "space": {"used": 1, "available": 2}}


def test_a_sound_volume() -> None:
    disk = read_disk(read_state(zfs_report({})), "kata-prod", Path)
    assert disk and disk.owner == Owner(KATA, "prod")


@given(st.dictionaries(st.sampled_from(list(VOLUME["marks"])), foreign, min_size=1))
def test_properties_of_a_volume(marks: dict[str, Any]) -> None:
    look = read_state(zfs_report(marks))
    (volume,) = look.volumes
    disk = read_disk(look, "kata-prod", Path)
    left = find_leftovers(look, KATA)
    if volume.damaged:
        assert disk is None
        assert not left
        assert not look.machines()
    if volume.owner:
        assert is_name(volume.owner.farm.name)
        assert is_name(volume.owner.vm) or not volume.owner.vm


def test_a_damaged_checkpoint_keeps_its_volume() -> None:
    """Else it would count as one without checkpoints, and go."""
    snapshot = {"marks": {"kind": "checkpoint", "name": VICTIM}, "txg": 1, "created": 1}
    report = zfs_report({"state": "kept"}, {"one": snapshot})
    report["volumes"]["tank/kata/vms/kata-prod.2"] = VOLUME
    look = read_state(report)
    assert "kata-prod.1" in [v.name.rpartition("/")[2] for v in look.volumes if v.damaged]
    assert find_leftovers(look, KATA) == []


def test_a_damaged_seal_is_no_half_made_template() -> None:
    seal = {"txg": 1, "marks": {"kind": "template", "name": VICTIM}}
    volume = {"marks": {"state": "new", "maker": "", "token": "0"}, "used": 1, "created": 1,
              "snapshots": {"sealed": seal}}  # fmt: skip
    look = read_state({"templates": {"tank/kata/templates/base.1": volume}})
    assert find_leftovers(look, KATA) == []


class Tools:
    """Commands on PATH that answer as told."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place = place
        monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")

    def answer(self, name: str, text: str) -> None:
        (self.place / f"{name}.said").write_text(text)
        command = self.place / name
        command.write_text(f"#!/bin/sh\ncat > /dev/null < /dev/null\ncat {self.place}/{name}.said\n")
        command.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    return Tools(tmp_path, monkeypatch)


ROW = {
    "lv_name": "fh.kata-prod.00", "lv_size": "16777216", "origin": "", "origin_size": "",
    "pool_lv": "pool",
    "lv_role": "public", "data_percent": "0.00", "metadata_percent": "", "lv_metadata_size": "",
    "thin_id": "1", "lv_active": "active", "lv_device_open": "", "lv_permissions": "writeable",
    "lv_snapshot_invalid": "", "lv_health_status": "", "vg_size": "99999999", "vg_free": "0",
    "vg_extent_size": "4194304",
}  # fmt: skip
FACTS = {
    "kind": "disk", "farm": KATA.mark, "vm": "prod", "machine": "kata-prod", "template": "base@1",
    "size": "16777216", "cloned": NOW, "created": NOW, "base": "clean", "seq": "1",
}  # fmt: skip


def lvm_report(facts: dict[str, str]) -> str:
    tags = ",".join(("farmhand", *encode(FACTS | facts)))
    return json.dumps({"report": [{"lv": [ROW | {"lv_tags": tags}]}]})


@pytest.mark.parametrize("facts", [{"vm": VICTIM}, {"machine": ".."}, {"size": "x"}, {"seq": "-1"},
                                   {"cloned": "x"}, {"farm": "\x1b[2J"}, {"base": "../x"}])  # fmt: skip
def test_tags_of_a_volume(tools: Tools, facts: dict[str, str], tmp_path: Path) -> None:
    warned = Warned()
    disks = LvmThinDisks("vg", "pool", KATA, Runner(), links=tmp_path / "links", warn=warned)
    tools.answer("lvm", lvm_report({}))
    (disk,) = disks.list()
    assert disk.owner == Owner(KATA, "prod")
    assert not warned
    tools.answer("lvm", lvm_report(facts))
    assert list(disks.list()) == list(disks.leftovers()) == []
    assert disks.find("kata-prod") is None
    (told,) = warned
    assert "volume vg/fh.kata-prod.00" in told
    assert told.isprintable()


@given(st.dictionaries(st.sampled_from(list(FACTS)), st.text(st.characters(exclude_categories=("Cs",)))))
def test_any_tags_are_read(facts: dict[str, str]) -> None:
    from hypervisors.disks.lvm.command import _volume

    volume = _volume(ROW | {"lv_tags": ",".join(marked(FACTS | facts)[1::2])})
    assert volume.ours == (not volume.damaged)
    assert not volume.ours or is_name(volume.facts["machine"])


NO_ANSWERS = ["", "null", "[]", "{}", "7", '"x"', "{" * 100, "[" * 100_000,
              '{"report": {}, "return": 7}',
              '{"report": [{"lv": [{"lv_name": "x"}]}]}', '{"report": [{"lv": [7]}]}',
              '{"return": {"volumes": {"x": 7}}}', '{"return": {"volumes": {"x.1": {"marks": 7}}}}',
              '{"virtual-size": "x", "format-specific": 7}', "9" * 9999, "\x1b[2J"]  # fmt: skip


@pytest.mark.parametrize("text", NO_ANSWERS)
def test_no_answer_of_a_tool(tools: Tools, tmp_path: Path, text: str) -> None:
    for name in ("zfs", "lvm", "qemu-img"):
        tools.answer(name, text)
    image = tmp_path / "x.vmdk"
    image.write_bytes(b"KDMV" + bytes(508))
    zfs = ZfsDisks("tank", "kata", KATA, Runner())
    asked: list[tuple[str, Callable[[], object]]] = [
        ("zfs program", zfs.list), ("zfs program", zfs.capacity),
        ("lvs", Lvm("vg", Runner()).report), ("lvmconfig", Lvm("vg", Runner()).autoextend),
        ("qemu-img", lambda: image_info(Runner(), image)),
    ]  # fmt: skip
    for name, ask in asked:
        if name == "lvmconfig" and not text:
            continue  # nothing is configured
        with pytest.raises(DriverFailed) as failed:
            ask()
        assert failed.value.message.startswith(f"{name} on {socket.gethostname()} gave an answer that")
        assert failed.value.message.isprintable()
        assert len(failed.value.message) < 400


# -- XenAPI ---------------------------------------------------------------------------------------------

RECORD = {"uuid": "u-1", "name_label": "kata-prod", "power_state": "Halted", "is_a_template": False,
          "is_a_snapshot": False, "is_control_domain": False, "VBDs": [], "snapshots": []}  # fmt: skip


def xenapi_vm(**marks: Any) -> XenApiVm:
    sound = {"uuid": "u-1", "farm": KATA.mark, "vm": "prod", "kind": "machine", "disk": "u r",
             "template": "base@1", "created": NOW, "size": "7"}  # fmt: skip
    return XenApiVm("r", RECORD | {"other_config": {PREFIX + k: v for k, v in (sound | marks).items()}})


@given(
    st.dictionaries(
        st.sampled_from(["farm", "vm", "kind", "template", "created", "size", "disk"]), foreign
    )
)
def test_other_config(marks: dict[str, Any]) -> None:
    vm = xenapi_vm(**marks)
    assert vm.damaged.isprintable()
    if vm.damaged:
        assert (vm.kind, vm.owner, vm.disk) == ("", None, None)
    if vm.owner:
        assert is_name(vm.owner.farm.name)


@pytest.mark.parametrize(
    "change", [{"uuid": 7}, {"other_config": []}, {"power_state": None}, {"VBDs": ""}]
)
def test_a_record_of_another_shape(change: dict[str, Any]) -> None:
    with pytest.raises(DriverFailed, match="XenAPI server gave a record of a VM"):
        XenApiVm("r", RECORD | {"other_config": {}} | change)


@pytest.mark.parametrize("read", [
    lambda: started({"start_time": "yesterday"}), lambda: started({}),
    lambda: capacity_of({"physical_size": "much"}), lambda: Vdi("r", {}),
])  # fmt: skip
def test_other_records_of_another_shape(read: Callable[[], object]) -> None:
    with pytest.raises(DriverFailed, match="XenAPI server"):
        read()


# -- the far wire ---------------------------------------------------------------------------------------

MACHINE = Machine(
    name="kata-prod", owner=Owner(KATA, "prod"), power=Power.RUNNING, memory=1, current=1, vcpus=1,
    mac="", disk=Path("/x"), spec_hash="", template="", started=datetime.now(UTC), accelerated=None,
)  # fmt: skip
DISK = Disk(
    machine="kata-prod", owner=Owner(KATA, "prod"), path=Path("/x"), format="raw", size=1, used=1,
    template="base@1", base="clean", checkpoints=(Checkpoint(name="clean", created=datetime.now(UTC)),),
)  # fmt: skip


@pytest.mark.parametrize("value", [
    replace(MACHINE, name=VICTIM), replace(MACHINE, owner=Owner(KATA, VICTIM)),
    replace(MACHINE, memory="1"), replace(MACHINE, vcpus=True), replace(MACHINE, owner=7),
    replace(MACHINE, disk="/x"), replace(DISK, machine="\x1b[2J"), replace(DISK, checkpoints=7),
    replace(DISK, checkpoints=(7,)), replace(DISK, used=None), Owner(KATA, 7),
    Owner(FarmIdentity("..", KATA.id), "prod"),
    Forward("22", 22), CommandFailed(""), DriverFailed("x", remedy=7),
])  # fmt: skip
def test_values_of_the_wrong_kind_over_the_wire(value: Any) -> None:
    sent = json.loads(json.dumps(wire.encode(value)))
    with pytest.raises((ValueError, KeyError, TypeError)):
        wire.decode(sent)


@pytest.mark.parametrize("sent", [
    {"!DriverFailed": {"": {"message": "x", "exit_status": 0}}}, {"!Call": {"": {"message": "x"}}},
    {"!DriverFailed": {"": {"message": "x", "as_dict": "y"}}}, {"!annotations": {"": {"message": "x"}}},
    {"Owner": {"farm": KATA.mark, "vm": "prod", "more": 1}}, {"Call": {"task": "x", "flags": {"y": 7}}},
    {"Power": "on"}, {"Path": 7}, {}, {"a": 1, "b": 2}, {"Owner": 7}, {"Nothing": {}},
])  # fmt: skip
def test_what_nobody_sends(sent: Any) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        wire.decode(sent)


def test_what_is_sent_arrives() -> None:
    error = CommandFailed("x", argv=("a", "b"), status=1, remedy=(Call("gc", vm=["a"]), " then"))
    for value in (MACHINE, DISK):
        assert wire.decode(json.loads(json.dumps(wire.encode(value)))) == value
    arrived = wire.decode(json.loads(json.dumps(wire.encode(error))))
    assert vars(arrived) == vars(error)


@pytest.mark.parametrize("data", [{"task": 7, "flags": {}}, {"task": "x", "flags": {"a": [7]}},
                                  {"task": "x", "flags": {"a": {}}},
                                  {"task": ["x"], "flags": {}}])  # fmt: skip
def test_a_remedy_that_is_none(data: Any) -> None:
    with pytest.raises(ValueError, match="no text of farmhand's"):
        remedy_of(data)


def test_stores_are_what_the_api_says(files: Files) -> None:
    disks: Disks = files.disks
    assert [d.machine for d in disks.list()] == ["kata-prod"]
