"""Disk images: what one is, made into another format, and checked before it is trusted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from host.files import file_error, open_new
from host.run import CommandResult, Runner
from hypervisors.answers import answer_of
from hypervisors.disks.kinds import QEMU_NAMES, kind_of, leans
from inventory.errors import Busy, CommandFailed, NotFound, UsageError

_SECTOR = 2048  # ECMA-119 6.1.2: an ISO image's logical sector
_SYSTEM_AREA = 16 * _SECTOR  # ECMA-119 6.2.1: the first sixteen are left to whoever wants them
_ISO_DATES = {  # ECMA-119 8.4.26-29: made, changed, expires, takes effect
    813: b"1980010100000000\0",
    830: b"1980010100000000\0",
    847: b"0000000000000000\0",
    864: b"0000000000000000\0",
}
_CHUNK = 2**20
_OPENED = {
    "qcow2": "backing=",  # nothing beside it, also if it is another one since its header was read
    "vhd": "force_size_calc=current_size",  # not its geometry, which some writers round down
}
"""QEMU's options for opening an image of a kind."""
_MEMORY = 2**30
"""Bytes that a program may have which looks at an image; QEMU's up to 64 threads take half of them."""
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


def check_unused(image: BinaryIO, path: Path) -> None:
    """Busy if somebody may write to the image: a QEMU, or what has mounted or attached it. Whoever
    copies it meanwhile has parts of different moments."""
    seen = os.fstat(image.fileno())
    user = ""
    if written_by_qemu(image):
        user = "a QEMU process, such as a running VM, has it open for writing"
    elif stat.S_ISBLK(seen.st_mode) and _claimed(image):
        user = "it is mounted, or part of something that is in use"
    elif loop := _loop_of(seen):
        user = f"{loop} is attached to it for writing"
    if user:
        raise Busy(f"the image {path} is in use: {user}", remedy="stop that first, or import a copy")


def written_by_qemu(image: BinaryIO) -> bool:
    """Whether a QEMU process has it open for writing."""
    # QEMU block/file-posix.c: who may write holds a shared lock on byte 100 + 1, BLK_PERM_WRITE
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 101, 1, 0)
    try:
        told = fcntl.fcntl(image, fcntl.F_OFD_GETLK, asked)
    except OSError:  # a file system without such locks; QEMU does without them there, too
        return False
    return bool(struct.unpack_from("h", told)[0] != fcntl.F_UNLCK)


def _claimed(device: BinaryIO) -> bool:
    try:
        os.close(os.open(f"/proc/self/fd/{device.fileno()}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _loop_of(seen: os.stat_result) -> str | None:
    for attached in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it was detached just now
            file, device = attached.read_text(errors="replace").strip(), attached.parents[1]
            there = Path(file).stat()
            same = (there.st_dev, there.st_ino) == (seen.st_dev, seen.st_ino)
            if same and (device / "ro").read_text().strip() == "0":
                return f"/dev/{device.name}"
    return None


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
    """What ``path`` is, standing alone: see ``hypervisors.disks.kinds``. ``name``: what errors call it,
    where it is a copy. UsageError for what can't be one; NotFound without the file."""
    name = name or path
    with open_image(path) as file:
        kind = kind_of(file, name)
        bytes_ = file.seek(0, os.SEEK_END)
    if kind == "raw":
        return ImageInfo("raw", bytes_)
    output = read_image(runner, "info", path, kind, "--output=json", name=name).stdout
    # 3: leaked clusters only, as a crashed writer leaves them; 63: this kind has no check
    checked = read_image(runner, "check", path, kind, "-q", name=name, ok=range(256))
    if checked.status not in (0, 3, 63):
        raise _damaged(name, kind, _last_line(checked.stderr or checked.stdout))
    with answer_of("qemu-img"):
        info = json.loads(output)
        specific = info.get("format-specific", {}).get("data", {})
        needs = [info.get("backing-filename"), specific.get("data-file")]
        # a sparse vmdk's only extent is the file itself
        extents = [str(extent["filename"]) for extent in specific.get("extents", ())]
        needs += [extent for extent in extents if Path(extent).resolve() != path.resolve()]
        size = int(info["virtual-size"])
    if other := next(filter(None, needs), None):
        raise leans(name, str(other))
    return ImageInfo(kind, size)


def _damaged(name: Path, kind: str, why: str) -> UsageError:
    return UsageError(
        f"{name} is damaged, or a {kind} of a sort that qemu-img can't read: {why}",
        remedy="fetch it again and compare its checksum",
    )


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def read_image(
    runner: Runner,
    command: str,
    path: Path,
    kind: str,
    *options: str,
    name: Path | None = None,
    ok: Sequence[int] = (0,),
) -> CommandResult:
    """What ``qemu-img COMMAND`` says of an image of that kind, in use or not. A header may ask for
    gigabytes of tables: it gets no such memory. ``name``: what errors call the image, where it is a
    copy. UsageError unless the status is in ``ok``: then the image is at fault."""
    opened = _as(kind, path)
    if command == "dd":
        opened = (*opened[:-1], f"if={opened[-1]}")
    words = ("prlimit", f"--data={_MEMORY}", "qemu-img", command, "-U", *options, *opened)
    try:
        return runner.read(*words, ok=ok, timeout=600)
    except CommandFailed as error:
        raise _damaged(name or path, kind, _last_line(error.stderr) or error.message) from error


def _as(kind: str, path: Path) -> tuple[str | Path, ...]:
    """qemu-img's arguments for an image of that kind."""
    driver = QEMU_NAMES.get(kind, kind)
    if kind not in _OPENED:
        return ("-f", driver, path)
    place = str(path.absolute()).replace(",", ",,")
    return ("--image-opts", f"driver={driver},{_OPENED[kind]},file.filename={place}")


def unpacked(runner: Runner, path: Path, info: ImageInfo, *, name: Path | None = None) -> int:
    """Bytes that its content takes at most when it is converted, whatever it takes where it is. ``name``
    and UsageError as ``read_image``."""
    options = ("-O", "qcow2", "--output=json")
    told = read_image(runner, "measure", path, info.format, *options, name=name).stdout
    with answer_of("qemu-img"):
        needs = int(json.loads(told)["required"])
    if info.format == "vhdx":  # QEMU takes all of it for used; but it is never compressed
        return min(needs, path.stat().st_size)
    return needs


def convert(
    runner: Runner,
    source: Path,
    out: Path,
    *,
    format: str,
    size: int = 0,
    most: int | None = None,
    name: Path | None = None,
) -> None:
    """A qcow2 file ``out`` with ``source``'s content, ``source`` being of ``format``; grown to ``size``
    bytes if that is more. ``out`` is there complete or not at all. ``name``: what errors call the
    source, where it is a copy. UsageError if it can't be read to its end, or ``out`` would have more
    than ``most`` bytes; CommandFailed."""
    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    limit = () if most is None else ("prlimit", f"--fsize={most}")
    try:
        runner.change(
            *limit, "qemu-img", "convert", "-O", "qcow2", "-W", *_as(format, source), fresh, timeout=3600
        )
        if size > image_info(runner, fresh).size:
            runner.change("qemu-img", "resize", "-q", "-f", "qcow2", fresh, str(size))
        fresh.chmod(0o600)
        fresh.replace(out)
    except CommandFailed as error:
        # setrlimit(2): its threads block the signal, and are told EFBIG
        if error.status == -signal.SIGXFSZ or os.strerror(errno.EFBIG) in error.stderr:
            why = "it unpacks to more than it tells"
        elif "error while reading" in error.stderr:
            why = _last_line(error.stderr)
        else:
            raise
        raise _damaged(name or source, format, why) from error
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
