"""What a source package holds: deb or rpm, its version, and whether all of it is there. Of a tree of
git's, a .dsc, a .src.rpm. All of it is a stranger's: bounded, and never run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from builds.packages.control import SourceControl, control_of_source
from builds.packages.git_reader import ObjectReader, TreeEntry
from builds.packages.spec import spec_of
from builds.packages.versions import CHANGELOG
from builds.source import pointers
from host.printable import one_line
from inventory.errors import Unfit, some
from repositories.deb.changelog import NewestEntry, newest
from repositories.deb.changes import MOST as MOST_OF_DSC
from repositories.deb.control import is_version
from repositories.deb.dsc import check_files, open_source_file, packaging, source_of
from repositories.rpm.file import read_rpm
from repositories.signing.armour import unsigned

_FEW = 5
_MOST = 4 * 2**20
"""Bytes of a control file or spec."""
_MOST_OF_CHANGELOG = 32 * 2**20
CONTROL = "debian/control"
_SPEC_FILE = 1 << 5  # rpmfiles.h, RPMFILE_SPECFILE
_VERSION, _RELEASE, _EPOCH, _BUILT, _SOURCE_RPM = 1001, 1002, 1003, 1006, 1044
_FLAGS, _WHEN, _IS_SOURCE, _BASES = 1037, 1080, 1106, 1117


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageContents:
    """What a package holds. ``format``: deb, rpm, "" where it is neither. ``problem``, ``remedy``: why
    it can't be built. ``when``: of its newest changelog entry; 0: that doesn't tell. ``files``,
    ``mark``, ``tree``: of a .dsc or .src.rpm alone."""

    format: str = ""
    stated: str = ""
    control: str = ""
    spec: str = ""
    problem: str = ""
    remedy: str = ""
    files: tuple[str, ...] = ()
    mark: str = ""
    tree: str = ""
    when: int = 0


def contents_of_tree(reader: ObjectReader, tree: str, *, within: bool) -> PackageContents:
    """``within``: it is a directory of a repository, whose .gitattributes may lie above it."""
    entries = {entry.path: entry for entry in reader.entries(tree)}
    specs = [name for name in entries if name.endswith(".spec") and "/" not in name]
    deb = CONTROL in entries
    if not deb and not specs:
        return PackageContents(
            problem="it has neither debian/control nor a spec file",
            remedy="commit one of them; or say with 'path' which directory is the package",
        )
    format_ = "deb" if deb else "rpm"
    try:
        if deb and specs:
            raise Unfit(
                f"it has debian/control and {some(specs)}: is it deb or rpm?",
                remedy="keep one of them in a branch, or in a directory, of its own",
            )
        if len(specs) > 1:
            raise Unfit(
                f"it has {len(specs)} spec files: {some(specs)}",
                remedy="keep each in a directory of its own, and declare it with 'path'",
            )
        _refuse_elsewhere(reader, tree, entries.values(), within=within)
        return _deb(reader, tree, entries) if deb else _rpm(reader, tree, entries[specs[0]])
    except Unfit as error:
        assert isinstance(error.remedy, str)
        return PackageContents(format=format_, problem=error.message, remedy=error.remedy)


def _refuse_elsewhere(
    reader: ObjectReader, tree: str, entries: Iterable[TreeEntry], *, within: bool
) -> None:
    """Unfit if what it holds isn't all in it."""
    entries = list(entries)
    if modules := [entry.path for entry in entries if entry.mode == "160000"]:
        raise Unfit(
            f"it has submodules, which the build would not get: {some(modules, _FEW)}",
            remedy="commit what is in them to the repository itself",
        )
    if within or any(entry.path.endswith(".gitattributes") for entry in entries):
        kept = pointers(reader, tree, anyway=within)
        if kept:
            raise Unfit(
                f"it has files kept by Git LFS, which the build would not get: {some(kept, _FEW)}",
                remedy="commit them to the repository itself",
            )


def _deb(reader: ObjectReader, tree: str, entries: Mapping[str, TreeEntry]) -> PackageContents:
    if CHANGELOG not in entries:
        raise Unfit("it has no debian/changelog", remedy="make one: dch(1), option --create")
    _check_file(entries[CONTROL], _MOST)
    _check_file(entries[CHANGELOG], _MOST_OF_CHANGELOG)
    held = reader.files(tree, (CONTROL, CHANGELOG))
    control = control_of_source(held[CONTROL], CONTROL)
    entry = _newest(held[CHANGELOG], control)
    return PackageContents(
        format="deb", stated=entry.version, control=held[CONTROL].decode(),
        when=int(entry.when.timestamp()) if entry.when else 0,
    )  # fmt: skip


def _newest(changelog: bytes, control: SourceControl) -> NewestEntry:
    entry = newest(changelog)
    if entry is None:
        raise Unfit("its debian/changelog has no entry", remedy="see dpkg-parsechangelog(1)")
    if entry.source != control.name:
        raise Unfit(
            f"its debian/changelog is of {one_line(entry.source, 80)}, and its debian/control of "
            f"{control.name}",
            remedy="give it one name in both",
        )
    if not is_version(entry.version):
        raise Unfit(
            f"its debian/changelog has version {one_line(entry.version, 80)!r}, which Debian's policy "
            "doesn't allow",
            remedy="see deb-version(7)",
        )
    return entry


def _rpm(reader: ObjectReader, tree: str, spec: TreeEntry) -> PackageContents:
    _check_file(spec, _MOST)
    text = reader.files(tree, (spec.path,))[spec.path].decode(errors="replace")
    found = spec_of(text)
    return PackageContents(format="rpm", stated=found.stated, spec=spec.path, when=found.when)


def _check_file(entry: TreeEntry, most: int) -> None:
    if not entry.is_file:
        raise Unfit(f"its {entry.path} is a link, not a file", remedy="commit the file itself")
    if entry.size > most:
        raise Unfit(f"its {entry.path} is larger than {most >> 20} MiB")


def contents_of_dsc(file: Path) -> PackageContents:
    with open_source_file(file, MOST_OF_DSC) as handle:
        data = handle.read()
    source = source_of(unsigned(data))
    names = (file.name, *(listed.name for listed in source.files))
    if len(set(names)) < len(names):
        raise Unfit(f"it lists {file.name} itself")
    mark = marks_of(file.parent, names)
    check_files(file.parent, source)
    held = packaging(file.parent, source)
    control = control_of_source(held[CONTROL], CONTROL)
    entry = newest(held.get(CHANGELOG, b""))
    if entry is None or entry.when is None:
        raise Unfit("its debian/changelog has no whole entry", remedy="see dpkg-parsechangelog(1)")
    if (control.name, entry.source, entry.version) != (source.source, source.source, source.version):
        raise Unfit(
            f"it is of {source.source} {source.version}, and in it is "
            f"{control.name} {one_line(entry.version, 80)}",
            remedy="build it again: dpkg-source -b",
        )
    return PackageContents(
        format="deb", stated=source.version, control=held[CONTROL].decode(), files=names, mark=mark,
        tree=hashlib.sha256(data).hexdigest(), when=int(entry.when.timestamp()),
    )  # fmt: skip


def contents_of_srpm(file: Path) -> PackageContents:
    mark = marks_of(file.parent, (file.name,))
    with open_source_file(file, 2**40) as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    header = read_rpm(file, "it").header
    if _IS_SOURCE not in header.entries and _SOURCE_RPM in header.entries:
        raise Unfit("it is a binary rpm package", remedy="give the .src.rpm that it was built from")
    flags = header.numbers(_FLAGS)
    specs = [name for name, flag in zip(header.texts(_BASES), flags, strict=False) if flag & _SPEC_FILE]
    if len(specs) != 1 or "/" in specs[0]:
        raise Unfit(f"it has {len(specs) or 'no'} spec files, where there should be one")
    version, release = header.text(_VERSION), header.text(_RELEASE)
    epoch = next(iter(header.numbers(_EPOCH)), 0)
    when = next(iter((*header.numbers(_WHEN), *header.numbers(_BUILT))), 0)
    return PackageContents(
        format="rpm", stated=f"{f'{epoch}:' if epoch else ''}{version}-{release}", spec=specs[0],
        files=(file.name,), mark=mark, tree=sha256, when=when,
    )  # fmt: skip


def marks_of(directory: Path, names: Iterable[str]) -> str:
    return repr([stat_of(f"{directory}/{name}") for name in names])


def stat_of(path: str) -> tuple[int, ...]:
    try:
        found = os.lstat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns
