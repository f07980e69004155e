"""What is on a disk, in whatever it is kept: real partition tables, file systems and discs."""

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from host.run import Runner
from hypervisors.disks.contents import Contents, contents
from hypervisors.disks.images import image_info, write_iso
from inventory.errors import UsageError, spelled

MIB = 2**20
CODE = b"\xeb\x63\x90"  # how GRUB's begins


def run(*argv: str | Path, input: str | None = None) -> None:
    subprocess.run(list(map(str, argv)), check=True, capture_output=True, text=True, input=input)


def seen(image: Path) -> Contents:
    return contents(Runner(), image, image_info(Runner(), image))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


def with_code(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.write(CODE)


def partitioned(table: str) -> Callable[[Path], None]:
    return lambda disk: run("sfdisk", "-q", disk, input=table)


def coded(make: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda disk: (make(disk), with_code(disk))[1]


def file_system(disk: Path) -> None:
    run("mkfs.ext4", "-q", disk)


def loader_in_file_system(disk: Path) -> None:
    """As extlinux does it: ext4 leaves the first KiB alone."""
    file_system(disk)
    with disk.open("r+b") as file:
        file.write(CODE.ljust(510, b"\0") + b"\x55\xaa")


GPT = partitioned("label: gpt\nsize=4M, type=U\ntype=L\n")
MBR = partitioned("label: dos\nsize=4M, type=ef\ntype=83\n")
PLAIN = partitioned("label: dos\ntype=83\n")
LOGICAL = partitioned("label: dos\nsize=2M, type=83\ntype=5\nsize=4M, type=83\n")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("make", "found"),
    [
        (GPT, Contents("", bios=False, efi=True)),
        (MBR, Contents("", bios=False, efi=True)),
        (coded(GPT), Contents("", bios=True, efi=True)),
        (coded(PLAIN), Contents("", bios=True, efi=False)),
        (LOGICAL, Contents("", bios=False, efi=False)),
        (file_system, Contents("ext4", bios=False, efi=False)),
        (loader_in_file_system, Contents("ext4", bios=True, efi=False)),
    ],
)
def test_what_could_start_it(
    tmp_path: Path, disk: Path, make: Callable[[Path], None], found: Contents, kind: str
) -> None:
    make(disk)
    image = tmp_path / "image"
    run("qemu-img", "convert", "-f", "raw", "-O", kind, disk, image)
    assert seen(image) == found


def disc(disk: Path) -> None:
    write_iso(Runner(), {"vmlinuz": b"x"}, disk)


def disc_for_sticks(disk: Path) -> None:
    write_iso(Runner(), {"vmlinuz": b"x"}, disk, system_area=CODE.ljust(510, b"\0") + b"\x55\xaa")


def nothing(_disk: Path) -> None:
    pass


def swap(disk: Path) -> None:
    disk.chmod(0o600)
    run("mkswap", disk)


def noise(disk: Path) -> None:
    with disk.open("r+b") as file:
        file.write(b"x" * MIB)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (disc, "is an ISO image"),
        (disc_for_sticks, "is an ISO image"),
        (nothing, "is blank"),
        (swap, "is swap space"),
        (noise, "is not a disk image"),
    ],
)
def test_what_has_no_system_is_named_as_what_it_is(
    tmp_path: Path, disk: Path, make: Callable[[Path], None], message: str, kind: str
) -> None:
    make(disk)
    image = tmp_path / "image"
    run("qemu-img", "convert", "-f", "raw", "-O", kind, disk, image)
    with pytest.raises(UsageError, match=f"{image} {message}"):
        seen(image)


def test_what_is_encrypted_is_refused_with_the_way_to_decrypt_it(disk: Path) -> None:
    """A header as the LUKS1 on-disk format has it: making a real one takes ten seconds, when it works at
    all where processor time is coarse."""
    header = struct.pack(
        ">6sH32s32s32sII20s32sI40s", b"LUKS\xba\xbe", 1, b"aes", b"xts-plain64", b"sha256", 4096, 64,
        b"digest", b"salt", 1000, b"0b8a7b0e-3a5c-4d1e-9f60-5f6a7c8d9e0f",
    )  # fmt: skip
    with disk.open("r+b") as file:
        file.write(header)
    with pytest.raises(UsageError, match=r"disk is encrypted \(LUKS\)") as refused:
        seen(disk)
    assert f"driver=luks,key-secret=s,file.filename={disk} " in spelled(refused.value.remedy)


def test_a_damaged_table_is_no_crash(disk: Path) -> None:
    GPT(disk)
    with disk.open("r+b") as file:
        file.seek(512 + 72)
        file.write(b"\xff" * 16)  # where its entries are, how many, and how large
    assert not seen(disk).bios
