"""Archives of .debs that others made (aptly, reprepro, apt-ftparchive, dpkg-scanpackages), by their own
indexes. Whatever these name is hostile: nothing is looked at outside of the archive."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from host.files import file_error
from host.printable import one_line
from inventory.errors import FarmhandError, NotFound, Unfit
from repositories.format import FoundPackage
from repositories.packed import DECOMPRESSORS, Damaged, pieces, unpacked

_ENDS = ("", ".gz", ".xz", ".zst", ".bz2")
_INDEX = 1024**3
_RELEASE = 64 * 1024 * 1024
_DEEP = 6
"""Directories below dists/: debian-security's bookworm/updates/main/binary-amd64 has four."""
_SUM = re.compile(r" +([0-9a-f]{64}) +([0-9]{1,15}) +(\S+)")
_FIELD = re.compile(rb"^(Filename|Size|SHA256):[ \t]*(.*?)[ \t]*$", re.M | re.I)
_Sums = Mapping[str, tuple[str, int]]


def published(top: Path) -> Iterator[FoundPackage]:
    """See ``PackageFormat.published``. Signatures aren't looked at; sums that Release has of the indexes
    are, where they are of SHA-256."""
    try:
        yield from _published(top, top.resolve())
    except OSError as error:
        raise file_error(error, Path(error.filename or top), "read") from error


def _published(top: Path, real: Path) -> Iterator[FoundPackage]:
    indexes = list(_indexes(real))
    if not indexes:
        raise NotFound(
            f"{top}: no Debian archive: there is neither dists/ with a Packages nor a Packages"
        )
    seen: set[tuple[str, str]] = set()
    for index, component, release in indexes:
        for found in _listed(real, index, component, release):
            if (found.file, component) not in seen:
                seen.add((found.file, component))
                yield found


def _indexes(top: Path) -> Iterator[tuple[Path, str, Path]]:
    """Paths of indexes, without the end of a compressed one, their components, and the directories whose
    Release tells of them."""
    if _is_there(top / "Packages"):
        yield top / "Packages", "main", top
    yield from _below(top, top / "dists", None, _DEEP, set())


def _below(
    top: Path, directory: Path, release: Path | None, deep: int, seen: set[Path]
) -> Iterator[tuple[Path, str, Path]]:
    real = _real(directory)
    if not deep or not real or real in seen or not real.is_relative_to(top) or not real.is_dir():
        return
    seen.add(real)
    if _release_file(directory):  # each architecture may have a small one of its own, without sums
        release = release or directory
    if directory.name.startswith("binary-") and _is_there(directory / "Packages"):
        # installer's packages (udeb) are in main/debian-installer
        if directory.parent.name != "debian-installer":
            yield directory / "Packages", directory.parent.name, release or directory
        return
    if directory.name in ("by-hash", "source", "i18n"):
        return
    for path in sorted(directory.iterdir()):
        yield from _below(top, path, release, deep - 1, seen)


def _is_there(index: Path) -> bool:
    return any(index.with_name(index.name + end).exists() for end in _ENDS)


def _release_file(directory: Path) -> Path | None:
    return next(
        (path for name in ("Release", "InRelease") if (path := directory / name).is_file()), None
    )


def _listed(top: Path, index: Path, component: str, release: Path) -> Iterator[FoundPackage]:
    sums = _sums(top, release)
    path = next(path for end in _ENDS if (path := index.with_name(index.name + end)).exists())
    data = _read(top, path, _INDEX, path.suffix if path.suffix in DECOMPRESSORS else "")
    name = index.relative_to(release).as_posix()
    told = sums.get(name)
    if told and told != (hashlib.sha256(data).hexdigest(), len(data)):
        raise Unfit(
            f"{path}: it isn't what {release.name}/Release tells of",
            remedy="wait until it has been published whole, or have it published again",
        )
    for stanza in _stanzas(data):
        yield _found(top, path, component, stanza)


def _stanzas(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        end = data.find(b"\n\n", at)
        end = len(data) if end < 0 else end
        if stanza := data[at:end].strip(b"\n"):
            yield stanza
        at = end + 2


def _found(top: Path, index: Path, component: str, stanza: bytes) -> FoundPackage:
    fields = {match[1].lower(): match[2] for match in _FIELD.finditer(stanza)}
    where = one_line(stanza.split(b"\n", 1)[0].decode(errors="replace"), 80)
    try:
        file, size = fields[b"filename"].decode(), int(fields[b"size"])
        sha256 = fields.get(b"sha256", b"").decode("ascii").lower()
    except (KeyError, ValueError):
        raise _unfit(index, f"{where} has no Filename, no Size, or unreadable ones") from None
    if not re.fullmatch(r"(?:[0-9a-f]{64})?", sha256) or not 0 <= size < 2**63:
        raise _unfit(index, f"{where} has a SHA256 or a Size that is none")
    file = re.sub(r"/{2,}", "/", file)
    while file.startswith("./"):
        file = file[2:]
    if not file.isprintable() or not file or file[0] == "/" or ".." in file.split("/"):
        raise _unfit(index, f"{where} has a Filename that is not taken: {one_line(file, 80)}")
    _within(top, top / file)
    return FoundPackage(file, component, sha256, size)


def _within(top: Path, path: Path) -> None:
    """Unfit: links lead out of it."""
    real = _real(path)
    if not real or not real.is_relative_to(top):
        raise Unfit(
            f"{path}: a link leads out of the repository",
            remedy="copy it whole, links followed: rsync -L, cp -rL",
        )


def _real(path: Path) -> Path | None:
    """Where links lead; None: to themselves."""
    try:
        return path.resolve()
    except RuntimeError:
        return None


def _read(top: Path, path: Path, most: int, end: str = "") -> bytes:
    _within(top, path)
    try:
        with path.open("rb", buffering=0) as file:
            packed = pieces(file, path.stat().st_size)
            return b"".join(unpacked(packed, end, most))
    except Damaged as error:
        raise _unfit(path, str(error)) from None


def _sums(top: Path, directory: Path) -> _Sums:
    """What a directory's Release tells of others: by name, its SHA-256 and size."""
    path = _release_file(directory)
    if not path:
        return {}
    text = _read(top, path, _RELEASE).decode(errors="replace")
    found: dict[str, tuple[str, int]] = {}
    inside = False
    for line in text.split("\n"):
        if match := _SUM.fullmatch(line.rstrip()):
            if inside:
                found[match[3]] = match[1], int(match[2])
        else:
            inside = line.strip().lower() == "sha256:"
    return found


def _unfit(path: Path, why: str) -> FarmhandError:
    return Unfit(f"{path}: {why}", remedy="have the repository published again by what made it")
