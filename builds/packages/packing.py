"""A source package as it is sent to its builder."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from builds.packages.git_reader import GitReader, ObjectReader
from builds.packages.source import SourceState
from builds.packages.versions import changed_file, with_version
from host.files import file_error
from host.printable import one_line
from host.run import Runner
from inventory.errors import Unfit, WrongState, some
from repositories.deb.dsc import open_source_file, source_of
from repositories.signing.armour import unsigned

TOP = "source"
"""The one directory of what is packed."""


def pack(runner: Runner, state: SourceState, target: Path) -> None:
    """A tar archive with one directory ``source``: the package's tree with its ``given`` version and
    its ``changes``, or the files of the .dsc or .src.rpm. The same state gives the same bytes: in git's
    order, root's, of the state's time; modes 0755 and 0644. Only we may read it. WrongState: the source
    isn't what it was, or there is no room. Unfit: names in it that lead out."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
            part = Path(scratch) / "tar"
            with tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
                if state.repository is None:
                    _add_files(tar, state)
                else:
                    tree = Path(scratch) / "tree"
                    borrowed = GitReader(runner, Path(scratch) / "reader")
                    reader = borrowed.of(state.repository / "objects", state.tree)
                    reader.archive(state.tree, tree)
                    _add_tree(tar, state, tree, _differing(state, reader))
            part.chmod(0o600)  # the source may be for some eyes only
            part.rename(target)
    except OSError as error:
        raise file_error(error, target, "write") from error


def _differing(state: SourceState, reader: ObjectReader) -> Mapping[str, bytes]:
    """The files that differ, by their paths: those of the state, and the one that has the version."""
    name = changed_file(state)
    if not name or name in state.changes:
        return state.changes
    return {**state.changes, name: with_version(state, reader.files(state.tree, (name,))[name])}


def _add_tree(
    tar: tarfile.TarFile, state: SourceState, tree: Path, differing: Mapping[str, bytes]
) -> None:
    left = dict(differing)
    _add_directory(tar, state, TOP)
    links: set[str] = set()
    with tarfile.open(tree) as held:
        for entry in held:
            parts = entry.name.split("/")
            above = {"/".join(parts[:at]) for at in range(1, len(parts))}
            if ".." in parts or entry.name.startswith("/") or above & links:
                raise Unfit(f"{state.name}: {one_line(entry.name, 120)!r} in its tree leads out of it")
            name = f"{TOP}/{entry.name}"
            if entry.isdir():
                _add_directory(tar, state, name)
            elif entry.name in left:
                _add(tar, state, name, left.pop(entry.name))
            elif entry.issym():
                links.add(entry.name)
                new = _entry(state, name)
                new.type, new.linkname, new.mode = tarfile.SYMTYPE, entry.linkname, 0o777
                tar.addfile(new)
            else:
                file = held.extractfile(entry)
                assert file is not None
                new = _entry(state, name)
                new.size, new.mode = entry.size, 0o755 if entry.mode & 0o100 else 0o644
                tar.addfile(new, file)
    if left:
        raise WrongState(f"{state.name}: its tree has no {some(sorted(left))}, which is to differ")


def _add_files(tar: tarfile.TarFile, state: SourceState) -> None:
    """Their sums are looked at as they are packed."""
    first, *_ = state.files
    _add_directory(tar, state, TOP)
    changed = WrongState(
        f"{state.name}: the files of {first} aren't what they were when they were looked at",
        remedy="leave them alone while they are built, and begin again",
    )
    wanted = {first.name: state.tree}
    try:
        for file in state.files:
            with open_source_file(file, 2**40) as handle:
                new = _entry(state, f"{TOP}/{file.name}")
                new.size = os.fstat(handle.fileno()).st_size
                summed = _Summed(handle)
                tar.addfile(new, summed)
                if summed.sha256.hexdigest() != wanted.get(file.name):
                    raise changed
            if file is first and file.name.endswith(".dsc"):
                source = source_of(unsigned(file.read_bytes()))
                wanted.update((listed.name, listed.sha256) for listed in source.files)
    except (Unfit, OSError) as error:
        raise changed from error


class _Summed(io.RawIOBase):
    def __init__(self, of: BinaryIO) -> None:
        self._of = of
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._of.read(size)
        self.sha256.update(data)
        return data


def _add_directory(tar: tarfile.TarFile, state: SourceState, name: str) -> None:
    new = _entry(state, name)
    new.type, new.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(new)


def _add(tar: tarfile.TarFile, state: SourceState, name: str, data: bytes) -> None:
    new = _entry(state, name)
    new.size = len(data)
    tar.addfile(new, io.BytesIO(data))


def _entry(state: SourceState, name: str) -> tarfile.TarInfo:
    """A regular file of root's."""
    entry = tarfile.TarInfo(name)
    entry.mtime = max(state.when, 0)
    return entry
