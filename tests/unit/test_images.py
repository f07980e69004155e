"""Images of every kind, made by the real qemu-img."""

import os
import subprocess
from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.disks.images import ImageInfo, convert, image_info, write_iso
from inventory.errors import NotFound, UsageError

MIB = 2**20


def qemu_img(*argv: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, argv)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw disk with a boot sector."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(510) + b"\x55\xaa" + b"x" * (MIB - 512))
    return path


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk"])
def test_each_format_is_told_and_converted(tmp_path: Path, disk: Path, format: str) -> None:
    image = tmp_path / f"image.{format}"
    qemu_img("convert", "-O", format, disk, image)
    assert image_info(Runner(), image) == ImageInfo(format, MIB)
    out = tmp_path / "out.qcow2"
    convert(Runner(), image, out, format=format, size=3 * MIB)
    assert image_info(Runner(), out) == ImageInfo("qcow2", 3 * MIB)
    qemu_img("convert", "-O", "raw", out, tmp_path / "again.raw")
    assert (tmp_path / "again.raw").read_bytes()[:MIB] == disk.read_bytes()


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


def test_what_is_no_disk_is_refused(tmp_path: Path, disk: Path) -> None:
    page = tmp_path / "page.img"
    page.write_text("<html>404</html>")
    empty = tmp_path / "empty.img"
    empty.touch()
    cut = tmp_path / "cut.qcow2"
    qemu_img("convert", "-O", "qcow2", disk, cut)
    cut.write_bytes(cut.read_bytes()[:-70000])
    for image in (page, empty, cut):
        with pytest.raises(UsageError, match=image.name):
            image_info(Runner(), image)
    with pytest.raises(NotFound):
        image_info(Runner(), tmp_path / "none")
    with pytest.raises(UsageError, match="cannot read"):
        image_info(Runner(), tmp_path)


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
