"""A Debian binary package as a file: an ar archive of tar archives (deb(5)), read forward and bounded.

What dpkg doesn't unpack is refused here, too: sparse files, pax headers, names that lead out."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from host.printable import one_line
from repositories.packed import ENDS, Damaged, ExactReader, pieces, unpacked

_AR = b"!<arch>\n"
_MEMBERS = 32
_CONTROL = 64 * 1024 * 1024
_MOST = {"control": 1024 * 1024, "md5sums": 16 * 1024 * 1024}
"""Bytes of control.tar, and of files in it: 16 MiB are the check sums of 200,000 files."""
_LEAST_DATA, _RATIO = 1024**3, 200
"""data.tar may grow to 1 GiB, or to so many times its packed size, where people's hardly reach 20."""
_LONG_NAME = 4096  # PATH_MAX
_BLOCK = bytes(512)
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_PAX = (tarfile.XHDTYPE, tarfile.XGLTYPE)
_OTHERS = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE
)  # fmt: skip
_SUM = re.compile(rb"([0-9a-f]{32}) [ *]?(?:\./)*/*(.+)")


@dataclass(frozen=True, slots=True)
class ArMember:
    """A member of an ar archive; where its bytes begin, and how many they are."""

    name: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of a tar archive: its name without the "./" in front, its header, and its bytes, which
    may be taken once, before the next member. Names are UTF-8, bad bytes as lone surrogates."""

    name: str
    header: tarfile.TarInfo
    pieces: Iterator[memoryview]

    def read(self, most: int) -> bytes:
        """Damaged: it is larger."""
        if self.header.size > most:
            raise Damaged(f"{one_line(self.name, 80)} in it is larger than {most >> 10} KiB")
        return b"".join(self.pieces)


class DebFile:
    """A package that was opened. All it does raises Damaged if the package is."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.members = tuple(_ar_members(file, size))
        names = [member.name for member in self.members]
        if names[:1] != ["debian-binary"]:
            raise Damaged("it is no Debian package: its first member isn't debian-binary")
        version = self._whole(self.members[0], 64)
        if not re.fullmatch(rb"2\.[0-9]+\n(?s:.*)", version):
            raise Damaged("it is a package of another format than 2.0")
        # deb(5): more members may be put between, if their names begin with _, and at the end
        known = [member for member in self.members[1:] if not member.name.startswith("_")]
        self._control = _the(known, 0, "control.tar", ("", ".gz", ".xz", ".zst"))
        self._data = _the(known, 1, "data.tar", ENDS)

    def control(self) -> Iterator[TarMember]:
        """What dpkg reads: control, md5sums, postinst and so on."""
        return self._tar(self._control, _CONTROL)

    def data(self) -> Iterator[TarMember]:
        """The files that are installed."""
        return self._tar(self._data, max(_LEAST_DATA, _RATIO * self._data.size))

    def fields(self) -> bytes:
        """The control file. The rest of its archive isn't looked at."""
        return self._parts(whole=False)[0]

    def prove(self) -> bytes:
        """Unpack all of it, so that all its check sums are looked at, those in md5sums too. Returns the
        control file."""
        fields, listed = self._parts(whole=True)
        wanted = dict(_listed(listed))
        seen: dict[str, str] = {}
        for member in self.data():
            if member.name not in wanted:
                continue
            if member.header.type in _REGULAR:
                md5 = hashlib.md5(usedforsecurity=False)
                for piece in member.pieces:
                    md5.update(piece)
                seen[member.name] = md5.hexdigest()
            elif member.header.type == tarfile.LNKTYPE and (
                linked := plain_name(member.header.linkname)
            ):
                seen[member.name] = seen.get(linked, wanted[member.name])  # not each is listed
        for name, md5sum in wanted.items():
            if (found := seen.get(name)) != md5sum:
                why = "is not in data.tar" if found is None else "has another checksum than md5sums says"
                raise Damaged(f"{one_line(name, 120)} {why}")
        return fields

    def _parts(self, *, whole: bool) -> tuple[bytes, bytes]:
        """Its control file, and md5sums."""
        found = {"control": b"", "md5sums": b""}
        for member in self.control():
            if member.name in found and member.header.type in _REGULAR:
                if found[member.name]:
                    raise Damaged(f"control.tar has two files {member.name}")
                found[member.name] = member.read(_MOST[member.name])
                if not whole and member.name == "control":
                    break
        if not found["control"]:
            raise Damaged("control.tar has no control file")
        return found["control"], found["md5sums"]

    def _whole(self, member: ArMember, most: int) -> bytes:
        if member.size > most:
            raise Damaged(f"{member.name} is larger than {most} bytes")
        self._file.seek(member.start)
        return b"".join(pieces(self._file, member.size))

    def _tar(self, member: ArMember, most: int) -> Iterator[TarMember]:
        self._file.seek(member.start)
        end = member.name[member.name.index(".tar") + 4 :]
        try:
            yield from tar_members(ExactReader(unpacked(pieces(self._file, member.size), end, most)))
        except Damaged as error:
            raise Damaged(f"{member.name}: {error}") from None


@contextmanager
def opened(path: Path) -> Iterator[DebFile]:
    """Damaged; OSError."""
    with path.open("rb", buffering=0) as file:
        yield DebFile(file, path.stat().st_size)


def plain_name(name: str) -> str:
    """Without "./" or "/" in front, or "/" at the end. Damaged: it leads out."""
    while name.startswith(("./", "/")):
        name = name.lstrip("/").removeprefix("./")
    if ".." in name and ".." in name.split("/"):
        raise Damaged(f"{one_line(name, 120)} in it leads out")
    return "" if name == "." else name.rstrip("/")


def _ar_members(file: BinaryIO, size: int) -> Iterator[ArMember]:
    if file.read(len(_AR)) != _AR:
        raise Damaged("it is no Debian package: no ar archive")
    at = len(_AR)
    for _ in range(_MEMBERS):
        if at >= size:
            return
        file.seek(at)
        header = file.read(60)
        name, length = header[:16].rstrip(b" ").removesuffix(b"/"), header[48:58].rstrip(b" ")
        if header[58:] != b"`\n" or not re.fullmatch(rb"[!-~]+", name) or not length.isdigit():
            raise Damaged(f"what is at byte {at} is no member of an ar archive")
        member = ArMember(name.decode("ascii"), at + 60, int(length))
        at = member.start + member.size
        if at > size:
            raise Damaged(f"it ends in the middle of {member.name}")
        at += at % 2
        yield member
    raise Damaged(f"it has more than {_MEMBERS} members")


def _the(members: list[ArMember], at: int, stem: str, ends: Sequence[str]) -> ArMember:
    """``ends``: of what dpkg unpacks."""
    found = members[at] if at < len(members) else None
    if found is None or found.name not in {stem + end for end in ends}:
        has = found.name if found else "nothing"
        raise Damaged(f"there is {has} where {', '.join(stem + end for end in ends)} should be")
    if [member.name.startswith(stem) for member in members].count(True) > 1:
        raise Damaged(f"it has {stem} twice")
    return found


def tar_members(source: ExactReader, *, pax: bool = False) -> Iterator[TarMember]:
    """``pax``: its headers are passed over, not refused: upstreams' archives have them, and source
    packages are unpacked by tar. Damaged."""
    long_name = long_link = ""
    while not source.ended():
        block = source.read(512)
        if block == _BLOCK:
            break
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise Damaged(f"it is no whole tar archive: {error}") from None
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if not 0 < header.size <= _LONG_NAME:
                raise Damaged("a name in it is too long")
            text = _padded(source, header.size).partition(b"\0")[0].decode("utf-8", "surrogateescape")
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = text
            else:
                long_link = text
            continue
        if pax and header.type in _PAX:
            for _ in source.pieces(max(header.size, 0) + -header.size % 512):
                pass
            continue
        name = plain_name(long_name or header.name)
        header.linkname = long_link or header.linkname
        long_name = long_link = ""
        if header.type not in _REGULAR and header.type not in _OTHERS:
            kind = one_line(header.type.decode("latin-1"))
            raise Damaged(f"{one_line(name, 120)} in it is of a kind that dpkg doesn't unpack: {kind!r}")
        # links and the like have no bytes, whatever their header says
        size = header.size if header.type in _REGULAR else 0
        if size < 0:
            raise Damaged(f"{one_line(name, 120)} in it has a size below 0")
        content = source.pieces(size)
        yield TarMember(name, header, content)
        for _ in content:
            pass
        if size % 512:
            source.read(512 - size % 512)
    source.drain()


def _padded(source: ExactReader, size: int) -> bytes:
    data = source.read(size)
    source.read(-size % 512)
    return data


def _listed(md5sums: bytes) -> Iterator[tuple[str, str]]:
    """Of each file in it, its name and its MD5 sum."""
    for number, line in enumerate(io.BytesIO(md5sums), 1):
        if line != b"\n":
            match = _SUM.fullmatch(line.removesuffix(b"\n"))
            if not match:
                raise Damaged(f"md5sums, line {number}: it is no checksum with a name")
            yield match[2].decode("utf-8", "surrogateescape"), match[1].decode("ascii")
