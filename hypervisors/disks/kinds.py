"""What kind of image a file is, told by its own bytes, before any program opens it.

An image is somebody else's data and can name files of this host: a backing or data file, a parent, a
vmdk's extents. QEMU, left to guess a format, would open them; so it is always told the kind that was
read here."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from inventory.errors import UsageError

QEMU_NAMES = {"vhd": "vpc"}
"""What qemu-img calls a kind, where it differs."""

_FOOTER = 512
_VHD = b"conectix"
_VDI = b"\x7f\x10\xda\xbe"
_OTHERS = {  # by their first bytes; qemu-img's name
    b"QED\0": ("a QED image", "qed"),
    b"WithoutFreeSpace": ("a Parallels image", "parallels"),
    b"WithouFreSpacExt": ("a Parallels image", "parallels"),
}
_PACKED = {  # by their first bytes
    b"\x1f\x8b": ("compressed by gzip", "gunzip"),
    b"\xfd7zXZ\0": ("compressed by xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unzstd"),
    b"BZh": ("compressed by bzip2", "bunzip2"),
    b"PK\3\4": ("a zip archive", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "7z x"),
}


def kind_of(file: BinaryIO, name: Path) -> str:
    """raw, qcow2, vmdk, vdi, vhd or vhdx. ``name``: what errors call it. UsageError for every other
    known kind, for what is packed, encrypted or empty, and for what needs other files; anything unknown
    is raw, if it is a disk in size."""
    bytes_ = file.seek(0, os.SEEK_END)
    file.seek(max(0, bytes_ - _FOOTER))
    tail = file.read(_FOOTER)
    file.seek(0)
    head = file.read(512)
    if not bytes_:
        raise UsageError(f"{name} is empty", remedy="fetch it again and compare its checksum")
    if head[:4] == b"QFI\xfb" and len(head) >= 104:
        _check_qcow2(head, name)
        return "qcow2"
    if head[:4] == b"KDMV":
        return "vmdk"
    if head[:4] == b"COWD" or head.lstrip()[:21].lower().startswith(b"# disk descriptorfile"):
        raise UsageError(
            f"{name} is a vmdk that names other files as its data: it can't stand alone",
            remedy="make one file of it where it comes from: qemu-img convert -O qcow2",
        )
    if head[:8] == b"vhdxfile":
        return "vhdx"
    if head[64:68] == _VDI and len(head) == 512:
        # VirtualBox VDICore.h, VDIHEADER1: 4 is a differencing image
        if struct.unpack_from("<I", head, 76)[0] == 4:
            raise leans(name, "a parent image")
        return "vdi"
    if _VHD in (head[:8], tail[:8]):
        _check_vhd(head if head.startswith(_VHD) else tail, bytes_, name)
        return "vhd"
    _refuse_others(head, tail, bytes_, name)
    return "raw"


def leans(name: Path, other: str) -> UsageError:
    """The error for an image that is a part of one only."""
    return UsageError(
        f"{name} can't stand alone, it refers to {other}: refused, for it could show any file of this "
        "host to the guest",
        remedy="flatten it where it comes from: qemu-img convert -O qcow2",
    )


def encrypted(name: Path, how: str, opened: str) -> UsageError:
    """The error for an image whose content nobody can read. ``opened``: QEMU's options for reading it
    with secret s, besides its name."""
    return UsageError(
        f"{name} is encrypted ({how})",
        remedy="decrypt it first: qemu-img convert --object secret,id=s,file=PASSPHRASE_FILE "
        f"--image-opts {opened},file.filename={name} -O qcow2 NEW_IMAGE",
    )


def _check_qcow2(head: bytes, name: Path) -> None:
    # QEMU docs/interop/qcow2
    version, backing = struct.unpack_from(">IQ", head, 4)
    if version not in (2, 3):
        raise UsageError(f"{name} is qcow version {version}", remedy=_by_qemu_img("qcow", name))
    incompatible = struct.unpack_from(">Q", head, 72)[0] if version == 3 else 0
    if backing:
        raise leans(name, "a backing file")
    if incompatible & 4:  # bit 2, external data file
        raise leans(name, "a data file")
    if method := struct.unpack_from(">I", head, 32)[0]:
        how = {1: "qcow2's AES", 2: "LUKS"}.get(method, f"qcow2's method {method}")
        raise encrypted(name, how, "driver=qcow2,encrypt.key-secret=s")


def _check_vhd(footer: bytes, bytes_: int, name: Path) -> None:
    # Virtual Hard Disk Image Format Specification 1.0, "Hard Disk Footer Format"
    size, type_ = struct.unpack_from(">Q4xI", footer, 48)
    if type_ == 4:
        raise leans(name, "a parent image")  # QEMU would read zeros for what the parent has
    if type_ == 2 and size > bytes_ - _FOOTER:
        raise UsageError(
            f"{name} is damaged: it is a fixed VHD of {size} bytes, and has {bytes_ - _FOOTER}",
            remedy="fetch it again and compare its checksum",
        )


def _refuse_others(head: bytes, tail: bytes, bytes_: int, name: Path) -> None:
    others = [other for magic, other in _OTHERS.items() if head.startswith(magic)]
    if tail[:4] == b"koly":
        others = [("an Apple disk image", "dmg")]
    for what, driver in others:
        raise UsageError(f"{name} is {what}", remedy=_by_qemu_img(driver, name))
    boots = head[510:512] == b"\x55\xaa"  # then it is no archive, whatever its code begins with
    for magic, (what, command) in _PACKED.items():
        if head.startswith(magic) and not boots:
            raise UsageError(f"{name} is {what}", remedy=f"unpack it first: {command} {name}")
    if head[257:262] == b"ustar" and not boots:
        raise UsageError(
            f"{name} is a tar archive, as .ova files are",
            remedy=f"import the disk that is in it: tar -xf {name}",
        )
    if bytes_ % 512:
        raise UsageError(
            f"{name} is not a disk image: of no known kind, and no raw disk, which has whole sectors",
            remedy="fetch it again and compare its checksum",
        )


def _by_qemu_img(driver: str, name: Path) -> str:
    return f"convert it first: qemu-img convert -f {driver} -O qcow2 {name} NEW_IMAGE"
