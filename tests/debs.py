"""Debian packages, made by hand: right ones, and such as nobody would make by mistake."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from repositories.deb.format import DebFormat
from repositories.format import Sum
from repositories.package import Reading


def ar(*members: tuple[str, bytes]) -> bytes:
    out = [b"!<arch>\n"]
    for name, data in members:
        out.append(f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data)
        out.append(b"\n" * (len(data) % 2))
    return b"".join(out)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mtime: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mtime = kind, link, mtime
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info


def tar(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for each, data in members:
            info = member(each) if isinstance(each, str) else each
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def fields(
    name: str = "probe", version: str = "1.0-1", architecture: str = "amd64", more: str = ""
) -> str:
    return (
        f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\n"
        f"Maintainer: A <a@example.org>\n{more}Description: a probe\n it has\n .\n several lines\n"
    )


def deb(
    control: str | bytes | None = None,
    files: Mapping[str, bytes] | None = None,
    *,
    scripts: Sequence[tuple[str, bytes]] = (),
    mtime: int = 0,
    xz: bool = False,
) -> bytes:
    """``xz``: not gzip. md5sums is as dh_md5sums writes it."""
    control = fields() if control is None else control
    files = {"usr/share/probe": b"probe\n"} if files is None else files
    text = control.encode() if isinstance(control, str) else control
    sums = "".join(f"{hashlib.md5(data).hexdigest()}  {name}\n" for name, data in files.items())
    made = tar(("./control", text), ("./md5sums", sums.encode()), *scripts)
    parents = sorted({parent for name in files for parent in PurePosixPath(name).parents})
    data = tar(
        *((member(f"./{parent}/", tarfile.DIRTYPE), b"") for parent in parents),
        *((member(f"./{name}", mtime=mtime), data) for name, data in files.items()),
    )
    end, pack = ("xz", lzma.compress) if xz else ("gz", partial(gzip.compress, mtime=0))
    return ar(
        ("debian-binary", b"2.0\n"),
        (f"control.tar.{end}", pack(made)),
        (f"data.tar.{end}", pack(data)),
    )


def sum_of(data: bytes) -> Sum:
    return Sum(hashlib.sha256(data).hexdigest(), len(data))


def read(directory: Path, data: bytes, file: str = "probe_1.0-1_amd64.deb") -> Reading:
    """As the pool has a package read."""
    path = directory / "private"
    path.write_bytes(data)
    return DebFormat().read(path, file, sum_of(data), "main")


def stanzas(text: str) -> list[dict[str, str]]:
    """Of an index: each package's fields with their lines."""
    found = []
    for part in filter(str.strip, text.split("\n\n")):
        one: dict[str, str] = {}
        name = ""
        for line in part.strip("\n").split("\n"):
            if line[0] in " \t":
                one[name] += f"\n{line}"
            else:
                name, _, value = line.partition(":")
                assert name not in one
                one[name] = value.strip()
        found.append(one)
    return found
