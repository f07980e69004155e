"""What is on a disk image, judged by its beginning: whether it is a disk with something on it, and what
could start that."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from host.files import file_error
from host.run import Runner, which
from hypervisors.answers import answer_of
from hypervisors.disks.images import ImageInfo, read_image
from hypervisors.disks.kinds import encrypted
from inventory.errors import Unsupported, UsageError

_LOOKED_AT = 2**20
"""Bytes: partition tables, boot code and the marks of all file systems are in them."""
_ESP = ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "ef")
"""An EFI system partition's type (UEFI 2.10, 5.3.3 and 5.2.2)."""


@dataclass(frozen=True, slots=True)
class Contents:
    """``whole``: what fills the disk where it has no partitions, as blkid(8) calls it (ext4,
    LVM2_member); else "". ``bios``: the first sector has boot code for a BIOS. ``efi``: there is an EFI
    system partition."""

    whole: str
    bios: bool
    efi: bool


def contents(runner: Runner, path: Path, info: ImageInfo, *, name: Path | None = None) -> Contents:
    """What is on the image ``path``, which ``info`` tells of. ``name``: what errors call it, where it is
    a copy. UsageError for what is damaged, or no disk with a system on it: blank, encrypted, an
    installation disc. CommandFailed."""
    name = name or path
    handle = os.memfd_create("image")  # nothing is left of it, whatever happens
    try:
        start = Path(f"/proc/{os.getpid()}/fd/{handle}")
        count = f"count={-(-min(info.size, _LOOKED_AT) // 512)}"
        options = ("-O", "raw", f"of={start}", "bs=512", count)
        read_image(runner, "dd", path, info.format, *options, name=name)
        head = os.pread(handle, _LOOKED_AT, 0)
        os.truncate(handle, info.size)  # so that a file system isn't larger than its disk
        known = _blkid(runner, start)
        types = _partitions(runner, start) if "PTTYPE" in known else []
    except OSError as error:
        raise file_error(error, name, "look at the beginning of") from error
    finally:
        os.close(handle)
    kind, signed = known.get("TYPE", ""), head[510:512] == b"\x55\xaa"
    whole = "" if types else kind
    if kind == "iso9660":  # many have partitions too, for USB sticks
        raise UsageError(
            f"{name} is an ISO image: a disc to install or run a system from, not a disk that has one",
            remedy="import a disk that was installed from it, or the distribution's cloud image",
        )
    if whole and known.get("USAGE") == "crypto":
        raise encrypted(name, whole.removeprefix("crypto_"), "driver=luks,key-secret=s")
    if not any(head):
        raise UsageError(f"{name} is blank: it has no system on it", remedy="install one on it first")
    if whole == "swap":
        raise UsageError(f"{name} is swap space: it has no system on it", remedy="import another image")
    if not (known or signed):
        raise UsageError(
            f"{name} is not a disk image: of no known kind, and no raw disk, which would have a boot "
            "sector, a partition table or a file system",
            remedy="fetch it again and compare its checksum",
        )
    return Contents(whole, bios=signed and any(head[:440]), efi=any(t in _ESP for t in types))


def _blkid(runner: Runner, path: Path) -> dict[str, str]:
    # 2: it knows nothing of it; 8: several things that exclude each other
    found = runner.read(_tool("blkid", "util-linux"), "-p", "-o", "export", path, ok=(0, 2, 8)).stdout
    return dict(line.split("=", 1) for line in found.splitlines() if "=" in line)


def _partitions(runner: Runner, path: Path) -> list[str]:
    """Their types, as sfdisk(8) gives them, in lower case; none where the table is damaged."""
    found = runner.read(_tool("sfdisk", "fdisk"), "--json", path, ok=(0, 1))
    if found.status:
        return []
    with answer_of("sfdisk"):
        table = json.loads(found.stdout)["partitiontable"]
        return [partition["type"].lower() for partition in table.get("partitions", ())]


def _tool(name: str, package: str) -> str:
    found = which(name)
    if not found:
        raise Unsupported(f"{name} is missing", remedy=f"apt-get install {package}")
    return found
