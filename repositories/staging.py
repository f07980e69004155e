"""Packages' files on their way into a repository: copied from whoever has them, summed and proven on the
way, in a directory of ours. Nobody else waits meanwhile, and nothing is changed yet."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from host.documents import Malformed, json_object, made, read_file
from host.files import check_room, file_error, make_directory, open_new, remove
from host.printable import one_line
from host.processes import Process
from inventory.errors import Unfit
from repositories.format import PackageFormat, Sum
from repositories.layout import Layout
from repositories.package import Package, Reading

_BLOCK = 2**20
_number = count(1)


@dataclass(frozen=True, slots=True)
class Staged:
    """A package that may come in. ``path``: its copy."""

    package: Package
    reading: Reading
    path: Path


class Staging:
    """A directory for one change. A context manager; what is left in it goes at its end. ``look``: there
    is none: packages are read where they are, and nothing is made."""

    def __init__(self, layout: Layout, package_format: PackageFormat, *, look: bool = False) -> None:
        self._layout = layout
        self._format = package_format
        self._look = look
        self.directory = layout.staging / f"{Process.this().mark}-{next(_number)}"

    def __enter__(self) -> Staging:
        if not self._look:
            make_directory(self.directory, mode=0o700)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # else ``tidy`` does it
            remove(self.directory)

    def take(
        self, path: Path, *, component: str = "", build: str = "", sha256: str = "", name: str = ""
    ) -> Staged:
        """Copy a package's file in, and read it. ``sha256``: what it must be; "" where nobody knows.
        ``name``: what it will be called, where that isn't its name now. Unfit: it is damaged, no package
        of this format, no regular file. Errors: NoSpace, WrongState."""
        name = name or path.name
        if not name.endswith(self._format.SUFFIX) or "/" in name or name != one_line(name, 200):
            raise Unfit(f"{one_line(str(path))} is not called as a {self._format.NAME} package is")
        copy = path if self._look else self.directory / f"{next(_number)}{self._format.SUFFIX}"
        try:
            # Whoever knows what it must be may have it anywhere
            found = self._copy(path.resolve() if sha256 else path, None if self._look else copy)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Unfit(f"{path} is a symbolic link: name the file that it leads to") from None
            raise file_error(error, path, "copy") from error
        if sha256 and found.sha256 != sha256:
            raise Unfit(f"{path} is damaged: its sha256 is {found.sha256}, and should be {sha256}")
        reading = self._read(copy, name, found, component)
        package = Package(
            name=reading.name,
            version=reading.version,
            architecture=reading.architecture,
            sha256=found.sha256,
            size=found.size,
            file=name,
            component=component,
            source=reading.source,
            build=build,
        )
        return Staged(package, reading, copy)

    def _copy(self, path: Path, copy: Path | None) -> Sum:
        """One pass over the bytes; the source is opened once, and followed through no link. None: they
        are summed only."""
        digest, size = hashlib.sha256(), 0
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb", buffering=0) as source:
            if not stat.S_ISREG((found := os.fstat(source.fileno())).st_mode):
                raise Unfit(f"{path} is no regular file")
            with contextlib.ExitStack() as stack:
                target: BinaryIO | None = None
                if copy:
                    check_room(self.directory, found.st_size)
                    target = stack.enter_context(open_new(copy, mode=0o444))
                while block := source.read(_BLOCK):
                    digest.update(block)
                    size += len(block)
                    if target:
                        target.write(block)
        return Sum(digest.hexdigest(), size)

    def _read(self, copy: Path, name: str, found: Sum, component: str) -> Reading:
        """What was read once of these bytes, under this name, isn't read again."""
        kept = kept_reading(self._layout, found.sha256, name, component)
        return kept or self._format.read(copy, name, found, component)


def kept_reading(layout: Layout, sha256: str, file: str, component: str) -> Reading | None:
    """None: there is none, or it is damaged, or of another name: then the package is read again."""
    try:
        sum_, _, text = read_file(layout.reading(sha256)).partition(b"\n")
        if sum_ != _sum_of(text):
            return None
        found = json_object(text)
        if (found.get("file"), found.get("component")) != (file, component):
            return None
        return made(Reading, found.get("reading"))
    except (OSError, Malformed):
        return None


def _sum_of(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def keep_reading(layout: Layout, package: Package, reading: Reading) -> None:
    """Not durably: what a power cut tears isn't what its first line says, and is read again."""
    path = layout.reading(package.sha256)
    make_directory(path.parent, mode=0o700)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    found = {"file": package.file, "component": package.component, "reading": asdict(reading)}
    text = json.dumps(found).encode()
    try:
        with open_new(fresh) as file:
            file.write(_sum_of(text) + b"\n" + text)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise file_error(error, path, "write") from error


def dead(staging: Path) -> Iterator[Path]:
    """Directories of processes that are gone."""
    with contextlib.suppress(FileNotFoundError):
        for path in staging.iterdir():
            if not Process.parse(path.name.rpartition("-")[0]).alive():
                yield path
