"""Images of every kind, made by the real qemu-img."""

import bz2
import gzip
import lzma
import os
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.disks.contents import contents
from hypervisors.disks.images import (
    ImageInfo,
    check_unused,
    convert,
    image_info,
    open_image,
    unpacked,
    write_iso,
)
from hypervisors.disks.kinds import QEMU_NAMES
from inventory.errors import Busy, NotFound, UsageError, spelled

MIB = 2**20


def qemu_img(*argv: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, argv)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw disk with a boot sector."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(510) + b"\x55\xaa" + b"x" * (MIB - 512))
    return path


WRITTEN = {  # by qemu-img, with which options
    "raw": ("raw", ()),
    "qcow2": ("qcow2", ()),
    "compressed": ("qcow2", ("-c",)),
    "vmdk": ("vmdk", ()),
    "stream": ("vmdk", ("-o", "subformat=streamOptimized")),
    "vdi": ("vdi", ()),
    "vhdx": ("vhdx", ()),
    "dynamic": ("vhd", ("-o", "force_size")),
    "fixed": ("vhd", ("-o", "subformat=fixed,force_size")),
}


@pytest.mark.parametrize("sort", WRITTEN)
def test_each_kind_is_told_and_converted(tmp_path: Path, disk: Path, sort: str) -> None:
    """The disk is in it from the first byte to the last, and nothing else: no header, no footer."""
    kind, options = WRITTEN[sort]
    image = tmp_path / "an, image"  # a comma would end a filename among QEMU's options
    qemu_img("convert", "-f", "raw", "-O", QEMU_NAMES.get(kind, kind), *options, disk, image)
    info = image_info(Runner(), image)
    assert info == ImageInfo(kind, MIB)
    assert MIB <= unpacked(Runner(), image, info) < 4 * MIB
    out = tmp_path / "out.qcow2"
    convert(Runner(), image, out, format=kind, size=3 * MIB)
    assert image_info(Runner(), out) == ImageInfo("qcow2", 3 * MIB)
    qemu_img("convert", "-O", "raw", out, tmp_path / "again.raw")
    assert (tmp_path / "again.raw").read_bytes() == disk.read_bytes() + bytes(2 * MIB)


def footer(image: Path, changes: dict[int, bytes], at: int = -512) -> None:
    """Change a VHD's footer, and its checksum: the ones' complement of the sum of all other bytes."""
    data = bytearray(image.read_bytes())
    found = data[at:] if at < 0 else data[at : at + 512]
    for offset, value in {**changes, 64: bytes(4)}.items():
        found[offset : offset + len(value)] = value
    struct.pack_into(">I", found, 64, ~sum(found) & 0xFFFFFFFF)
    start = at % len(data) if at < 0 else at
    data[start : start + 512] = found
    image.write_bytes(data)


def test_a_vhd_is_as_large_as_it_says_not_as_its_geometry(tmp_path: Path, disk: Path) -> None:
    """Other writers than QEMU and Hyper-V leave the geometry smaller than the disk."""
    image = tmp_path / "image.vhd"
    qemu_img("convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size", disk, image)
    footer(image, {28: b"vbox", 56: struct.pack(">HBB", 10, 4, 17)})
    assert image_info(Runner(), image) == ImageInfo("vhd", MIB)


def test_a_header_that_asks_for_gigabytes_of_tables_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image.vdi"
    qemu_img("create", "-f", "vdi", image, "8M")
    blocks = 0x1FFFFE00  # 512 TiB, of which each MiB has four bytes
    with image.open("r+b") as file:
        file.seek(0x170)
        file.write(struct.pack("<Q", blocks * MIB))
        file.seek(0x180)
        file.write(struct.pack("<I", blocks))
        file.truncate(4 * 2**30)
    with pytest.raises(UsageError, match="Cannot allocate memory"):
        image_info(Runner(), image)


def test_what_became_an_overlay_since_shows_no_other_file(tmp_path: Path, disk: Path) -> None:
    image, out = tmp_path / "image.qcow2", tmp_path / "out"
    qemu_img("create", "-f", "qcow2", "-b", disk, "-F", "raw", image, "1M")
    convert(Runner(), image, out, format="qcow2")
    with pytest.raises(UsageError, match="is blank"):
        contents(Runner(), image, ImageInfo("qcow2", MIB))
    qemu_img("convert", "-O", "raw", out, tmp_path / "again.raw")
    assert not any((tmp_path / "again.raw").read_bytes())


def test_damage_that_only_reading_it_all_finds_is_named(tmp_path: Path, disk: Path) -> None:
    image, out = tmp_path / "image.qcow2", tmp_path / "out"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", disk, image)
    with image.open("r+b") as file:
        file.seek(5 * 65536 + 16)  # the first cluster's compressed data, after five of tables
        file.write(b"\xff" * 32)
    info = image_info(Runner(), image)
    with pytest.raises(UsageError, match=r"an image is damaged, .*rror while reading"):
        contents(Runner(), image, info, name=Path("an image"))
    with pytest.raises(UsageError, match=r"an image is damaged, .*rror while reading"):
        convert(Runner(), image, out, format="qcow2", name=Path("an image"))


def test_what_unpacks_to_more_than_it_tells_ends_there(tmp_path: Path) -> None:
    """All blocks of this VHDX are one and the same."""
    raw, image, out = tmp_path / "raw", tmp_path / "image.vhdx", tmp_path / "out"
    raw.write_bytes(b"x" * MIB)
    os.truncate(raw, 64 * MIB)
    qemu_img("convert", "-f", "raw", "-O", "vhdx", "-o", "block_size=1M", raw, image)
    table = 2 * MIB  # where QEMU puts the block allocation table
    with image.open("r+b") as file:
        file.seek(table)
        entry = file.read(8)
        assert entry[0] & 7 == 6, "a block that is fully there"
        file.seek(table)
        file.write(entry * 64)
    info = image_info(Runner(), image)
    most = unpacked(Runner(), image, info)
    assert most < 16 * MIB
    with pytest.raises(UsageError, match="unpacks to more than it tells"):
        convert(Runner(), image, out, format="vhdx", most=most)
    assert not list(tmp_path.glob("*out*"))


def test_an_image_that_names_host_files_is_refused(tmp_path: Path, disk: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", "-u", overlay, "1M")
    external = tmp_path / "external.qcow2"
    qemu_img(
        "create", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'},data_file_raw=on", external, "1M"
    )
    flat = tmp_path / "flat.vmdk"
    qemu_img("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", disk, flat)
    for image in (overlay, external, flat):
        with pytest.raises(UsageError, match="stand alone"):
            image_info(Runner(), image)


def secret_image(_disk: Path, image: Path) -> None:
    qemu_img("create", "-f", "qcow2", "--object", "secret,id=s,data=x", "-o",
             "encrypt.format=aes,encrypt.key-secret=s", image, "1M")  # fmt: skip


def luks_image(disk: Path, image: Path) -> None:
    secret_image(disk, image)
    with image.open("r+b") as file:
        file.seek(32)  # QEMU docs/interop/qcow2: crypt_method
        file.write(struct.pack(">I", 2))


def converted(kind: str, *options: str) -> Callable[[Path, Path], object]:
    return lambda disk, image: qemu_img("convert", "-f", "raw", "-O", kind, *options, disk, image)


def differing_vdi(disk: Path, image: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vdi", disk, image)
    with image.open("r+b") as file:
        file.seek(76)
        file.write(struct.pack("<I", 4))


def differing_vhd(disk: Path, image: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vpc", disk, image)
    for at in (0, -512):
        footer(image, {60: struct.pack(">I", 4)}, at)


def cut_vhd(disk: Path, image: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "vpc", "-o", "subformat=fixed,force_size", disk, image)
    data = image.read_bytes()
    image.write_bytes(data[: MIB // 2] + data[-512:])


def cut(disk: Path, image: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "qcow2", disk, image)
    image.write_bytes(image.read_bytes()[:-70000])


def archive(disk: Path, image: Path) -> None:
    with tarfile.open(image, "w") as tar:
        tar.add(disk, "disk.raw")


def zipped(disk: Path, image: Path) -> None:
    with zipfile.ZipFile(image, "w") as packed:
        packed.write(disk, "disk.raw")


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str, str]] = {
    "qcow": (converted("qcow"), "is qcow version 1", "qemu-img convert -f qcow "),
    "qed": (converted("qed"), "is a QED image", "qemu-img convert -f qed "),
    "parallels": (converted("parallels"), "is a Parallels image", "convert -f parallels "),
    "dmg": (
        lambda disk, image: image.write_bytes(disk.read_bytes() + b"koly".ljust(512, b"\0")),
        "is an Apple disk image", "convert -f dmg ",
    ),
    "aes": (secret_image, "is encrypted", "driver=qcow2,encrypt.key-secret=s,file.filename="),
    "luks": (luks_image, r"is encrypted \(LUKS\)", "driver=qcow2,encrypt.key-secret=s,file.filename="),
    "vdi": (differing_vdi, "stand alone, it refers to a parent", "flatten"),
    "vhd": (differing_vhd, "stand alone, it refers to a parent", "flatten"),
    "cut vhd": (cut_vhd, "is damaged: it is a fixed VHD of 1048576 bytes, and has 524288", "fetch"),
    "cut qcow2": (cut, "is damaged", "fetch"),
    "gz": (
        lambda disk, image: image.write_bytes(gzip.compress(disk.read_bytes())),
        "is compressed by gzip", "gunzip ",
    ),
    "xz": (
        lambda disk, image: image.write_bytes(lzma.compress(disk.read_bytes())),
        "is compressed by xz", "unxz ",
    ),
    "bz2": (
        lambda disk, image: image.write_bytes(bz2.compress(disk.read_bytes())),
        "is compressed by bzip2", "bunzip2 ",
    ),
    "zip": (zipped, "is a zip archive", "unzip "),
    "ova": (archive, "is a tar archive", "tar -xf "),
    "page": (lambda _, image: image.write_text("<html>404</html>"), "is not a disk image", "fetch"),
    "empty": (lambda _, image: image.touch(), "is empty", "fetch"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_disk_is_named_as_what_it_is(tmp_path: Path, disk: Path, what: str) -> None:
    make, message, remedy = REFUSED[what]
    image = tmp_path / "an image"
    make(disk, image)
    with pytest.raises(UsageError, match=f"{image} .*{message}") as refused:
        image_info(Runner(), image)
    assert remedy in spelled(refused.value.remedy)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        image_info(Runner(), tmp_path / "none")
    with pytest.raises(UsageError, match="cannot read"):
        image_info(Runner(), tmp_path)


def test_an_image_that_a_qemu_may_write_to_is_in_use(tmp_path: Path, disk: Path) -> None:
    argv: Sequence[str | Path] = ("qemu-io", "-f", "raw", disk)
    for options, used in (((), True), (("-r",), False)):
        with subprocess.Popen(
            [*argv, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as writer, open_image(disk) as opened:  # fmt: skip
            assert writer.stdout
            assert writer.stdin
            assert writer.stdout.read(8) == b"qemu-io>"  # the image is open
            if used:
                with pytest.raises(Busy, match=f"{disk} is in use: a QEMU"):
                    check_unused(opened, disk)
            else:
                check_unused(opened, disk)
            writer.stdin.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can attach a file to a device")
def test_an_image_that_is_attached_or_mounted_is_in_use(tmp_path: Path, disk: Path) -> None:
    def attached(*options: str) -> Path:
        found = subprocess.run(
            ["losetup", "--find", "--show", *options, disk], check=True, capture_output=True, text=True
        )
        return Path(found.stdout.strip())

    device = attached()
    try:
        with open_image(disk) as opened, pytest.raises(Busy, match=f"{device} is attached to it"):
            check_unused(opened, disk)
        with open_image(device) as opened:
            check_unused(opened, device)
            mounted = os.open(device, os.O_RDONLY | os.O_EXCL)  # as mount(2) holds it
            try:
                with pytest.raises(Busy, match=f"{device} is in use: it is mounted"):
                    check_unused(opened, device)
            finally:
                os.close(mounted)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    device = attached("--read-only")
    try:
        with open_image(disk) as opened:
            check_unused(opened, disk)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def test_an_iso_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut leaves an empty one beside a note that it is right."""
    synced = set()
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.fstat(fd).st_ino), real(fd)))
    out = tmp_path / "seed.iso"
    write_iso(Runner(), {"user-data": b"x"}, out, "CIDATA")
    assert out.stat().st_ino in synced
