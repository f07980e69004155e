"""Disk images: what one is, made into another format, and checked before it is trusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from host.files import file_error, open_new
from host.run import Runner
from hypervisors.answers import answer_of
from inventory.errors import CommandFailed, NotFound, UsageError

_SECTOR = 2048  # ECMA-119 6.1.2: an ISO image's logical sector
_SYSTEM_AREA = 16 * _SECTOR  # ECMA-119 6.2.1: the first sixteen are left to whoever wants them
_ISO_DATES = {  # ECMA-119 8.4.26-29: made, changed, expires, takes effect
    813: b"1980010100000000\0",
    830: b"1980010100000000\0",
    847: b"0000000000000000\0",
    864: b"0000000000000000\0",
}
_CHUNK = 2**20
_ISO_TIME = 315532800  # 1980-01-01, UTC


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """``size``: the virtual disk's, in bytes."""

    format: str
    size: int


def open_image(path: Path) -> BinaryIO:
    """Open an image for reading; links are followed. UsageError for what is neither a file nor a block
    device, or can't be read; NotFound without it."""
    try:
        # O_NONBLOCK: a FIFO without a writer would be waited for
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"no image {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read the image {path}: {error.strerror}") from error
    mode = os.fstat(handle).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(handle)
        raise UsageError(f"cannot read the image {path}: it is neither a file nor a block device")
    return os.fdopen(handle, "rb", buffering=0)


def copy_image(image: BinaryIO, out: Path) -> str:
    """Copy the image's bytes to ``out``, 0600, with holes where there are zeros. Their SHA-256, in
    hexadecimal. NoSpace, WrongState."""
    digest, zeros = hashlib.sha256(), bytes(_CHUNK)
    try:
        with open_new(out) as copy:
            while chunk := image.read(_CHUNK):
                digest.update(chunk)
                if chunk == zeros[: len(chunk)]:
                    copy.seek(len(chunk), os.SEEK_CUR)
                else:
                    copy.write(chunk)
            copy.truncate(copy.tell())
    except OSError as error:
        raise file_error(error, out, "copy the image to") from error
    return digest.hexdigest()


def image_info(runner: Runner, path: Path, *, name: Path | None = None) -> ImageInfo:
    """What ``path`` is: raw, qcow2 or vmdk, standing alone. ``name``: what errors call it, where it is a
    copy.

    An image is somebody else's data and can name files of this host: a qcow2's backing or data file,
    a vmdk's extents. Opening it would hand them to the guest, so the header is read here, first, and
    QEMU is told the format instead of guessing it. UsageError for such images and for anything that
    isn't a disk; NotFound without the file."""
    name = name or path
    with open_image(path) as file:
        head = file.read(512)
        bytes_ = file.seek(0, os.SEEK_END)
    kind = _format(name, head, bytes_)
    if kind == "raw":
        return ImageInfo("raw", bytes_)
    try:
        output = runner.read("qemu-img", "info", "--output=json", "-U", "-f", kind, path).stdout
    except CommandFailed as error:
        raise UsageError(
            f"{name} is damaged: {error.message}", remedy="fetch it again and compare its checksum"
        ) from error
    if kind == "qcow2":
        # 3: leaked clusters only, as a crashed writer leaves them
        checked = runner.read(
            "qemu-img", "check", "-q", "-U", "-f", kind, path, ok=range(256), timeout=600
        )
        if checked.status not in (0, 3):
            why = (checked.stderr or checked.stdout).strip().splitlines() or ["qemu-img check fails"]
            raise UsageError(
                f"{name} is damaged: {why[-1]}", remedy="fetch it again and compare its checksum"
            )
    with answer_of("qemu-img"):
        info = json.loads(output)
        specific = info.get("format-specific", {}).get("data", {})
        needs = [info.get("backing-filename"), specific.get("data-file")]
        # a sparse vmdk's only extent is the file itself
        extents = [str(extent["filename"]) for extent in specific.get("extents", ())]
        needs += [extent for extent in extents if Path(extent).resolve() != path.resolve()]
        size = int(info["virtual-size"])
    if other := next(filter(None, needs), None):
        raise _leans(name, str(other))
    if specific.get("encrypted") or info.get("encrypted"):
        raise UsageError(f"{name} is encrypted", remedy="decrypt it with qemu-img convert first")
    return ImageInfo(kind, size)


def _format(path: Path, head: bytes, bytes_: int) -> str:
    if head[:4] == b"QFI\xfb" and len(head) >= 104:
        version, backing = struct.unpack_from(">IQ", head, 4)
        if version not in (2, 3):
            raise UsageError(f"{path} is qcow version {version}", remedy="convert it with qemu-img")
        incompatible = struct.unpack_from(">Q", head, 72)[0] if version == 3 else 0
        if backing:
            raise _leans(path, "a backing file")
        if incompatible & 4:  # QEMU docs/interop/qcow2: bit 2, external data file
            raise _leans(path, "a data file")
        return "qcow2"
    if head[:4] == b"KDMV":
        return "vmdk"
    if head[:4] == b"COWD" or head.lstrip()[:21].lower().startswith(b"# disk descriptorfile"):
        raise UsageError(
            f"{path} is a vmdk that names other files as its data: it can't stand alone",
            remedy="make one file of it where it comes from: qemu-img convert -O qcow2",
        )
    if bytes_ == 0 or bytes_ % 512 or head[510:512] != b"\x55\xaa":
        raise UsageError(
            f"{path} is not a disk image: neither qcow2 nor vmdk, nor a raw disk with a boot sector",
            remedy="unpack it if it is compressed",
        )
    return "raw"


def _leans(path: Path, other: str) -> UsageError:
    return UsageError(
        f"{path} can't stand alone, it refers to {other}: refused, for it could show any file of this "
        "host to the guest",
        remedy="flatten it where it comes from: qemu-img convert -O qcow2",
    )


def convert(runner: Runner, source: Path, out: Path, *, format: str, size: int = 0) -> None:
    """A qcow2 file ``out`` with ``source``'s content, ``source`` being of ``format``; grown to ``size``
    bytes if that is more. ``out`` is there complete or not at all. CommandFailed."""
    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        runner.change(
            "qemu-img", "convert", "-f", format, "-O", "qcow2", "-W", source, fresh, timeout=3600
        )
        if size > image_info(runner, fresh).size:
            runner.change("qemu-img", "resize", "-q", "-f", "qcow2", fresh, str(size))
        fresh.chmod(0o600)
        fresh.replace(out)
    finally:
        fresh.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """The file's SHA-256, in hexadecimal. It takes about a second per GiB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_iso(
    runner: Runner,
    files: Mapping[str, bytes],
    out: Path,
    label: str = "CIDATA",
    *,
    system_area: bytes = b"",
) -> None:
    """An ISO 9660 image of plain files, the same bytes for the same input; ``system_area`` (32 KiB at
    most) goes to its very beginning. Mode 0600; complete or not there at all.

    ISO 9660:1999 (level 4) keeps names as they are without Rock Ridge, whose time stamps of the
    temporary files would differ each time."""
    assert len(system_area) <= _SYSTEM_AREA, "the system area has 32 KiB"
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        tree = work / "tree"
        tree.mkdir()
        for name, content in files.items():
            (tree / name).write_bytes(content)
            os.utime(tree / name, (_ISO_TIME, _ISO_TIME))
        os.utime(tree, (_ISO_TIME, _ISO_TIME))
        image = work / "image"
        runner.change(
            "genisoimage", "-quiet", "-iso-level", "4", "-input-charset", "iso8859-1", "-V", label,
            "-o", image, tree, timeout=60, env={"TZ": "UTC"},
        )  # fmt: skip
        with image.open("r+b") as iso:
            iso.write(system_area)
            for sector in (16, 17):  # primary descriptor, and level 4's enhanced one
                iso.seek(sector * _SECTOR)
                if iso.read(6)[1:] != b"CD001":
                    continue
                for offset, date in _ISO_DATES.items():
                    iso.seek(sector * _SECTOR + offset)
                    iso.write(date)
            iso.flush()
            os.fsync(iso.fileno())  # who notes that it is there may do so durably
        image.chmod(0o600)
        image.replace(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
