"""The files of warm checkpoints: sealed, missed where they are lost, and given room for a working
copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import libvirt
import pytest

from host import processes
from host.run import Runner
from hypervisors.api import Callbacks, Checkpoint, Disk, Leftover, Owner, Template
from hypervisors.disks.qcow2.disks import Qcow2Disks
from hypervisors.fake.driver import FakeDisks
from hypervisors.libvirt.domain_types import Qemu
from hypervisors.libvirt.domain_xml import QEMU_URI, memory_object
from hypervisors.libvirt.driver import LibvirtHypervisor
from hypervisors.libvirt.kvm import KvmVerdict
from hypervisors.libvirt.warm import images as images_module
from hypervisors.libvirt.warm.images import (
    DEFINITION,
    FACE,
    MEMORY,
    ONLY,
    SAVED,
    STATE,
    FileFacts,
    LostImage,
    MemoryImage,
    MemoryImages,
    Seal,
    is_of_this_boot,
    note_only,
)
from hypervisors.libvirt.warm.keeping import check_free
from hypervisors.libvirt.warm.machines import WarmDomains
from hypervisors.libvirt.warm.place import MemoryPlace
from inventory.errors import Conflict, FarmhandError, NoSpace, WrongState
from tests.identities import KATA

MIB = 2**20
NAME = "kata-prod"
READY = Checkpoint(name="ready", created=datetime(2026, 1, 2, tzinfo=UTC), id="id-of-ready")
CLEAN = Checkpoint(name="clean", created=datetime(2026, 1, 1, tzinfo=UTC), id="id-of-clean")
DISK = Disk(
    machine=NAME, owner=Owner(KATA, "prod"), path=Path("disk"), format="qcow2", size=MIB, used=0,
    template="base@1", base="ready", checkpoints=(CLEAN, READY),
)  # fmt: skip
SEAL = Seal(
    farm=KATA.mark, vm="prod", machine=NAME, checkpoint="ready", disk=READY.id, created=READY.created,
    how="mapped", size=4 * MIB, pause=0.02, frozen=0.0, quiesced=False,
    runs_on={"qemu": "7.2.0"}, files={},
)  # fmt: skip
QEMU = Qemu(KvmVerdict(usable=False, why="a test"))
DISKS = {NAME: {"clean": CLEAN.id, "ready": READY.id}}


@pytest.fixture
def images(tmp_path: Path) -> MemoryImages:
    return MemoryImages(MemoryPlace(tmp_path / "warm", KATA, None))


def fill(place: Path) -> None:
    with (place / MEMORY).open("xb") as file:
        os.truncate(file.fileno(), 4 * MIB)
        os.pwrite(file.fileno(), b"then" * MIB, 0)
    (place / STATE).write_bytes(b"devices")
    (place / DEFINITION).write_text("<domain/>")


@pytest.fixture
def kept(images: MemoryImages) -> MemoryImage:
    with images.new(NAME, "ready") as place:
        fill(place)
        return images.finish(place, SEAL)


def found(images: MemoryImages, disk: Disk = DISK) -> MemoryImage | LostImage | None:
    return images.kept_with(disk, disk.checkpoints[-1])


def unsealed(images: MemoryImages) -> Path:
    """All of one is there, when who makes it is killed."""
    with images.new(NAME, "ready") as place:
        fill(place)
        images.note_unsealed(place, SEAL)
    return place


def booted_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(processes, "BOOT_ID", tmp_path / "boot_id")


# -- what a kill, or a power cut, leaves


def test_what_was_noted_to_be_whole_is_sealed_in_that_boot(images: MemoryImages) -> None:
    assert images.finish_unsealed(unsealed(images), DISKS[NAME]) == "ready"
    image = found(images)
    assert isinstance(image, MemoryImage) and image.trouble() == ""


def test_after_a_power_cut_what_was_not_synced_is_never_sealed(
    images: MemoryImages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its pages may have become holes by then, and its sums would be right."""
    place = unsealed(images)
    booted_anew(monkeypatch, tmp_path)
    assert images.finish_unsealed(place, DISKS[NAME]) == ""
    images.sweep(NAME)
    assert not place.exists() and found(images) is None


def test_saved_memory_tells_in_which_boot_it_was_the_only_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not is_of_this_boot(tmp_path), "nobody has noted it"
    note_only(tmp_path)
    assert is_of_this_boot(tmp_path)
    booted_anew(monkeypatch, tmp_path)
    assert not is_of_this_boot(tmp_path)
    (tmp_path / ONLY).write_bytes(b"")
    assert not is_of_this_boot(tmp_path), "as a power cut may leave it"


# -- whose seal or directory is gone


def cut(path: Path) -> None:
    os.truncate(path / "seal.json", 40)


def of_another_format(path: Path) -> None:
    text = (path / "seal.json").read_text()
    (path / "seal.json").write_text(text.replace('"farmhand": 1', '"farmhand": 99'))


def no_seal(path: Path) -> None:
    (path / "seal.json").unlink()


@pytest.mark.parametrize("lose", [cut, of_another_format, no_seal, shutil.rmtree])
def test_it_is_a_memory_that_cant_be_used_not_a_cold_checkpoint(
    images: MemoryImages, kept: MemoryImage, lose: Callable[[Path], None]
) -> None:
    lose(kept.place)
    image = found(images)
    assert isinstance(image, LostImage)
    words = "it is gone" if lose is shutil.rmtree else "its seal can't be read"
    assert image.kept().trouble.startswith(words)
    assert images.has_any(NAME)
    assert list(images.leftovers(DISKS)) == [], "its disk has that checkpoint"
    images.remove(NAME, "ready")
    assert found(images) is None and not images.has_any(NAME), "forgotten, it is a cold one"


@pytest.mark.parametrize("lose", [cut, shutil.rmtree])
def test_another_checkpoint_of_its_name_never_had_it(
    images: MemoryImages, kept: MemoryImage, lose: Callable[[Path], None]
) -> None:
    lose(kept.place)
    other = replace(DISK, checkpoints=(CLEAN, replace(READY, id="another")))
    assert found(images, other) is None


@pytest.mark.parametrize(
    ("disks", "why"),
    [
        ({}, "its VM has no disk"),
        ({NAME: {"clean": CLEAN.id}}, "its disk has no such checkpoint ready"),
        ({NAME: {"ready": "another"}}, "its disk has no such checkpoint ready"),
    ],
)
def test_gc_finds_one_with_a_bad_seal(
    images: MemoryImages, kept: MemoryImage, disks: dict[str, dict[str, str]], why: str
) -> None:
    cut(kept.place)
    (left,) = images.leftovers(disks)
    assert (left.ref, left.why) == (str(kept.place), why) and left.bytes >= 4 * MIB
    images.discard(left, disks)
    assert list(images.leftovers(disks)) == [] and not images.has_any(NAME)


def test_its_name_is_taken_as_long_as_its_directory_is_there(
    images: MemoryImages, kept: MemoryImage
) -> None:
    cut(kept.place)
    with pytest.raises(Conflict, match="has a memory of the name ready already"):
        check_free(NAME, "ready", images)
    check_free(NAME, "other", images)


def test_renamed_it_is_still_missed(images: MemoryImages, kept: MemoryImage) -> None:
    images.rename(NAME, "kata-build", Owner(KATA, "build"), lambda _: None)
    shutil.rmtree(images.place_of("kata-build", "ready"))
    assert isinstance(found(images, replace(DISK, machine="kata-build")), LostImage)


def test_the_removal_of_another_one_leaves_what_is_under_construction(
    kept: MemoryImage, images: MemoryImages, tmp_path: Path
) -> None:
    with images.new(NAME, "later") as place:
        fill(place)
        images.note_unsealed(place, replace(SEAL, checkpoint="later"))
    images.remove(NAME, "ready")
    assert place.exists() and not kept.place.exists()
    with pytest.raises(WrongState, match="under construction, and not recovered yet"):
        images.rename(NAME, "kata-build", Owner(KATA, "build"), lambda _: None)
    assert place.exists()
    images.remove(NAME)
    assert not place.exists()


def test_a_machine_whose_memory_is_lost_is_suspended_all_the_same(
    images: MemoryImages, tmp_path: Path
) -> None:
    """So it isn't booted without a word; and its own start says what it is."""
    disks = FakeDisks(KATA, None)
    source = tmp_path / "image"
    source.write_bytes(b"image")
    template = disks.seal(source, _template())
    disks.clone(template, NAME, Owner(KATA, "prod"), MIB)
    kept = disks.checkpoint(NAME, "ready")
    with images.new(NAME, "ready") as place:
        fill(place)
        cut(images.finish(place, replace(SEAL, disk=kept.id)).place)
    told = Callbacks()
    warm = WarmDomains(images, disks, Runner(), str, told, maps=True, saves_paused=True)
    disk = disks.find(NAME)
    assert disk is not None
    image = warm.suspended(disk)
    assert isinstance(image, LostImage)
    assert set(warm.memories(NAME, _nobody)) == {"ready"}
    with pytest.raises(WrongState, match=r"kata-prod's checkpoint ready can't be used: its seal can't"):
        warm.run_on(image, "", disk, None)  # type: ignore[arg-type]


def _nobody() -> None:
    raise AssertionError("libvirt isn't asked")


def _template() -> Template:
    return Template(
        name="base", generation=1, ref="", size=MIB, sha256="0", created=READY.created, origin="file",
        firstboot="none",
    )  # fmt: skip


# -- room, and damage


def free(monkeypatch: pytest.MonkeyPatch, size: int, *, beside: Path | None = None) -> None:
    """A file system with so many bytes free, besides those that are to stay so; with 3 MiB more once a
    file is gone."""
    usage = shutil.disk_usage(os.curdir)

    def disk_usage(_: Path) -> object:
        more = 0 if beside is None or beside.exists() else 3 * MIB
        return usage._replace(free=images_module._SPARE + size + more)

    monkeypatch.setattr(images_module.shutil, "disk_usage", disk_usage)


def test_other_bytes_of_the_right_size_are_seen_by_a_whole_look_alone(kept: MemoryImage) -> None:
    (kept.place / STATE).chmod(0o600)
    (kept.place / STATE).write_bytes(b"DEVICES")
    assert kept.kept().trouble == ""
    assert "is not what was sealed (by its sha256)" in kept.trouble()


def test_right_files_are_no_trouble_where_that_can_t_be_noted(
    kept: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: object, **__: object) -> None:
        raise NoSpace(f"{path}: no space left")

    (kept.place / STATE).touch()
    monkeypatch.setattr(images_module, "write_atomic", full)
    assert kept.trouble() == ""


@pytest.mark.parametrize("plan", [True, False])
def test_a_plan_notes_nothing(host: Host, monkeypatch: pytest.MonkeyPatch, plan: bool) -> None:
    place = host.keep("ready", host.kept.id)
    (place / STATE).touch()
    before = (place / "seal.json").read_bytes()
    monkeypatch.setattr(WarmDomains, "_host_trouble", lambda *_: "")
    runner, told = Runner(changes=not plan), Callbacks()
    warm = WarmDomains(host.images, host.disks, runner, str, told, maps=True, saves_paused=True)
    assert warm.why_unusable(NAME, "ready", None) == ""  # type: ignore[arg-type]
    assert ((place / "seal.json").read_bytes() == before) is plan


def test_a_memory_in_use_is_known_by_any_path(tmp_path: Path) -> None:
    """QEMU doubles a comma, XML escapes an ampersand."""
    images = MemoryImages(MemoryPlace(tmp_path / "a,b & c", KATA, None))
    told = Callbacks()
    disks = FakeDisks(KATA, None)
    warm = WarmDomains(images, disks, Runner(), str, told, maps=True, saves_paused=True)
    face = images.place_of(NAME, "ready") / FACE
    domain = ET.Element("domain")
    line = ET.SubElement(domain, f"{{{QEMU_URI}}}commandline")
    for argument in ("-object", memory_object(4 * MIB, face)):
        ET.SubElement(line, f"{{{QEMU_URI}}}arg", value=argument)

    class Running:
        def XMLDesc(self, _: int) -> str:
            return ET.tostring(domain, encoding="unicode")

    running: Any = Running()
    assert warm.in_use(NAME, "ready", running)
    assert not warm.in_use(NAME, "read", running)


def test_a_damaged_definition_is_a_trouble_not_a_traceback(kept: MemoryImage) -> None:
    assert kept.definition() == "<domain/>"
    (kept.place / DEFINITION).chmod(0o600)
    (kept.place / DEFINITION).write_text("<domain/<")
    with pytest.raises(WrongState, match=r"machine\.xml, the definition of its machine, is damaged"):
        kept.definition()


def test_what_can_t_be_read_is_a_trouble_not_a_traceback(
    kept: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Path) -> str:
        raise OSError(5, "Input/output error")

    (kept.place / STATE).touch()
    monkeypatch.setattr(images_module, "_sum", fails)
    assert "Input/output error" in kept.trouble()


def test_a_stale_working_copy_makes_room_for_the_new_one(
    kept: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    face = kept.place / FACE
    os.truncate(face, 0)  # as a guest that gives memory back changes it
    os.truncate(face, 4 * MIB)
    with face.open("r+b") as file:
        file.write(b"x" * (3 * MIB))
    free(monkeypatch, 2 * MIB, beside=face)
    assert kept.trouble() == ""
    made = kept.face(None)
    assert made.read_bytes() == (kept.place / MEMORY).read_bytes()
    assert FileFacts.of(made).inode != FileFacts.of(kept.place / MEMORY).inode


def test_no_room_for_the_working_copy_is_seen_before_anything_is_stopped(
    kept: MemoryImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, MIB)
    assert kept.trouble() == "", "it is there"
    (kept.place / FACE).unlink()
    assert "the working copy of" in kept.trouble()
    with pytest.raises(NoSpace):
        kept.face(None)


@pytest.mark.parametrize("broken", ["sync", "_sum", "face", "rename"])
def test_what_the_host_refuses_while_sealing_is_told_in_a_line(
    images: MemoryImages, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(FarmhandError, match="Input/output error"), images.new(NAME, "ready") as place:
        fill(place)
        (place / SAVED).write_bytes(b"")
        if broken == "face":
            monkeypatch.setattr(images_module, "_copy_sparse", fails)
        elif broken == "rename":
            monkeypatch.setattr(Path, "rename", fails)
        else:
            monkeypatch.setattr(images_module, broken, fails)
        images.finish(place, SEAL)


# -- whose disk is away


class Host:
    """A driver on libvirt's own test hypervisor, and a store of files; ``machine`` has a memory kept."""

    def __init__(self, place: Path) -> None:
        self.store = place / "store"
        self.store.mkdir()
        self.disks = Qcow2Disks(self.store, KATA, Runner(), headroom=0)
        source = self.store / "image.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", source, str(MIB)], check=True)
        template = self.disks.seal(source, _template())
        self.disks.clone(template, NAME, Owner(KATA, "prod"), MIB)
        self.kept = self.disks.checkpoint(NAME, "ready")
        memory = MemoryPlace(place / "warm", KATA, None)
        self.images = MemoryImages(memory)
        self.driver = LibvirtHypervisor(
            "test:///default", KATA, self.disks, Runner(), kind=QEMU, memory=memory
        )

    @property
    def home(self) -> Path:
        return self.store / "vms" / NAME

    def keep(self, name: str, disk: str) -> Path:
        with self.images.new(NAME, name) as place:
            fill(place)
            return self.images.finish(place, replace(SEAL, checkpoint=name, disk=disk)).place

    def left(self) -> list[str]:
        return [one.ref for one in self.driver.leftovers() if one.kind == "memory"]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def defined() -> Iterator[None]:
    connection = libvirt.open("test:///default")
    text = "<memory>65536</memory><os><type>hvm</type></os>"
    domain = connection.defineXML(f"<domain type='test'><name>{NAME}</name>{text}</domain>")
    yield
    domain.undefine()
    connection.close()


def unmounted(host: Host) -> None:
    shutil.rmtree(host.store)


def without_owner(host: Host) -> None:
    os.truncate(host.home / "owner.json", 10)


def without_disk(host: Host) -> None:
    (host.home / "disk.qcow2").unlink()


@pytest.mark.parametrize("lose", [unmounted, without_owner, without_disk])
def test_the_memory_of_a_machine_whose_disk_may_come_back_is_no_leftover(
    host: Host, defined: None, lose: Callable[[Host], None]
) -> None:
    kept = host.keep("ready", host.kept.id)
    assert host.left() == []
    lose(host)
    assert host.left() == []
    as_before = Leftover(
        kind="memory", ref=str(kept), owner=None, created=READY.created, bytes=0, why=""
    )
    host.driver.discard(as_before)
    assert kept.exists() and (kept.parent / ".kept-ready").exists()


def test_nor_is_that_of_a_checkpoint_that_outlived_both(host: Host) -> None:
    kept, other = host.keep("ready", host.kept.id), host.keep("other", "id-of-other")
    (host.images.place_of("lost+found", "mine")).mkdir(parents=True)  # nor what fsck found
    without_disk(host)
    assert kept.exists() and host.left() == [str(other)]


def test_that_of_a_machine_without_disk_and_definition_is_one(host: Host) -> None:
    kept = host.keep("ready", host.kept.id)
    unmounted(host)
    assert host.left() == [str(kept)]
    for one in host.driver.leftovers():
        host.driver.discard(one)
    assert not kept.exists()
