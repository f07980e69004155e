"""rpm-md repositories that others made (createrepo_c, Pulp, ...), by their own metadata. Whatever these
name is hostile: nothing is looked at outside of the repository."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError, XMLPullParser

from host.files import file_error
from host.printable import one_line
from inventory.errors import NotFound, Unfit
from repositories.format import FoundPackage
from repositories.packed import DECOMPRESSORS, Damaged, pieces, unpacked

REPOMD = "repodata/repomd.xml"
_MOST = 2 * 1024**3
"""Of the primary metadata; Fedora's are 130 MB."""
_SUMMARY = 16 * 1024**2
_AGAIN = "fetch the metadata again, or make them again with createrepo_c"
_COMMON = "{http://linux.duke.edu/metadata/common}"
_REPO = "{http://linux.duke.edu/metadata/repo}"
_BASE = "{http://www.w3.org/XML/1998/namespace}base"
_ALGORITHMS = {"sha": "sha1"} | {a: a for a in ("md5", "sha1", "sha224", "sha256", "sha384", "sha512")}


@dataclass(frozen=True, slots=True)
class _Primary:
    """Of repomd.xml. ``algorithm``: hashlib's name of it."""

    path: Path
    algorithm: str
    digest: str


def published(top: Path) -> Iterator[FoundPackage]:
    """See ``PackageFormat.published``. Signatures aren't looked at; the sum that repomd.xml has of the
    primary metadata is."""
    real, summary = top.resolve(), top / REPOMD
    if not summary.is_file():
        raise NotFound(f"{top} is no rpm repository: it has no {REPOMD}")
    _within(real, real / REPOMD)
    primary = _primary(real, real / REPOMD)
    _check_sum(primary)
    for element in _elements(primary.path, f"{_COMMON}package", _MOST):
        yield _found(real, primary.path, element)


def _primary(top: Path, summary: Path) -> _Primary:
    for data in _elements(summary, f"{_REPO}data", _SUMMARY):
        if data.get("type") == "primary":
            path = top / _inside(top, data.find(f"{_REPO}location"), summary)
            sum_ = data.find(f"{_REPO}checksum")
            kind = (sum_.get("type") or "") if sum_ is not None else ""
            if sum_ is None or kind not in _ALGORITHMS:
                raise Unfit(f"{path}: its sum is of a kind that isn't known: {one_line(kind, 40)!r}")
            return _Primary(path, _ALGORITHMS[kind], (sum_.text or "").strip())
    raise Unfit(f"{summary} names no primary metadata", remedy=_AGAIN)


def _check_sum(primary: _Primary) -> None:
    if not primary.path.is_file():
        raise Unfit(f"{primary.path} isn't there, though {REPOMD} names it", remedy=_AGAIN)
    found = hashlib.new(primary.algorithm, usedforsecurity=False)
    try:
        with primary.path.open("rb") as file:
            hashlib.file_digest(file, lambda: found)
    except OSError as error:
        raise file_error(error, primary.path, "read") from error
    if found.hexdigest() != primary.digest:
        raise _damaged(primary.path, f"its sum isn't that in {REPOMD}")


def _elements(path: Path, tag: str, most: int) -> Iterator[Element]:
    """The elements of that tag, one after the other. Unfit."""
    end = path.suffix if path.suffix in DECOMPRESSORS else ""
    parser: Any = XMLPullParser(("start", "end"))
    root: Element | None = None
    try:
        with path.open("rb") as file:
            for piece in unpacked(pieces(file, os.fstat(file.fileno()).st_size), end, most):
                parser.feed(piece)
                for event, element in parser.read_events():
                    if root is None:
                        root = element
                    elif event == "end" and element.tag == tag:
                        yield element
                        root.clear()  # what was looked at takes no memory any more
            parser.close()
    except OSError as error:
        raise file_error(error, path, "read") from error
    except (Damaged, ParseError, ValueError, LookupError) as error:  # the last two: its encoding
        raise _damaged(path, str(error)) from None


def _found(top: Path, primary: Path, package: Element) -> FoundPackage:
    file = _inside(top, package.find(f"{_COMMON}location"), primary)
    sum_, size = package.find(f"{_COMMON}checksum"), package.find(f"{_COMMON}size")
    sha256 = (sum_.text or "").strip() if sum_ is not None and sum_.get("type") == "sha256" else ""
    bytes_ = (size.get("package") or "") if size is not None else ""
    if not re.fullmatch(r"(?:[0-9a-f]{64})?", sha256) or not re.fullmatch(r"[0-9]{1,18}", bytes_, re.A):
        raise _damaged(primary, f"{one_line(file, 80)} has a sum or a size that is none")
    return FoundPackage(file, "", sha256, int(bytes_))


def _inside(top: Path, location: Element | None, where: Path) -> str:
    """A path below ``top``. Unfit: it leads elsewhere, by its text or by links."""
    file = (location.get("href") or "") if location is not None else ""
    while file.startswith("./"):
        file = file[2:].lstrip("/")
    base = location.get(_BASE) if location is not None else None
    if base or file in ("", ".") or file[0] == "/" or ".." in file.split("/") or not file.isprintable():
        shown = one_line(f"{base or ''} {file}".strip(), 120)
        raise Unfit(f"{where} leads out of its repository: {shown!r}")
    _within(top, top / file)
    return file


def _within(top: Path, path: Path) -> None:
    """Unfit: links lead out of it."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        real = Path("/")
    if not real.is_relative_to(top):
        raise Unfit(
            f"{path}: a link leads out of the repository",
            remedy="copy it whole, links followed: rsync -L, cp -rL",
        )


def _damaged(path: Path, why: str) -> Unfit:
    return Unfit(f"{path} is damaged: {one_line(why, 120)}", remedy=_AGAIN)
