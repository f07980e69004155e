"""Files and directories copied between this machine and a VM, as tar(1) has them, through one ssh
connection.

What a guest sends is hostile: of its tar archive nothing is taken but names, bytes, and whether a file
can be executed. Everything is made in a directory of ours, beside where it is to be, that nobody else
may enter: so no link that is there can lead a name out of it, and those that the guest sends are made
last, when nothing is written any more. Then it gets its name, in one step, or goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import shlex
import stat
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from host.files import check_room, file_error, open_new, part_of
from host.printable import one_line
from inventory.errors import Conflict, DriverFailed, FarmhandError, NotFound, Unfit, Unsupported, some
from provision.guest.connection import Connection
from provision.guest.ssh_connection import in_thread

_BLOCK = 2**18
_HEADER_MOST = 2**16  # bytes of a name that has a block of its own; PATH_MAX is 4096
_ENTRIES = 1_000_000
_LINKS = 100_000
_DEEPEST = 200  # directories in one another
_NAME_MAX = 255  # bytes (limits.h)
_TARGET_MAX = 4095  # bytes of a link (limits.h, PATH_MAX)
_PASSES = 50  # over links that lead through one another
_NAMED = 20  # of what was left out

BytesFn = Callable[[int], None]
"""Told how many bytes there are by now."""

# What it is there, and whether something has the name that a copy would have.
_ASK = """
p=PATH
if [ -d "$p" ]; then echo directory; elif [ -f "$p" ]; then echo file
elif [ -e "$p" ] || [ -L "$p" ]; then echo other; else echo none; fi
if [ -e "$p"/NAME ] || [ -L "$p"/NAME ]; then echo taken; fi
command -v tar >/dev/null || echo no tar
"""
# tar's own last line says nothing; the one before does. Its status comes by the way that the output
# doesn't go.
_PACK = """
exec 3>&1
r=$( { { WHERE tar CREATE 2>&1 >&3 3>&-; echo $? >&4; } | grep -v "failure status due to" >&2; } 4>&1 )
exit "${r:-1}"
"""
# Cut off at the end of a file it is an archive without an end, which tar takes for a whole one: so the
# name is given when all was sent.
_UNPACK = "mkdir -p -- HOME && mkdir -- PART && tar -xof - -C PART"
_PLACE = """
if [ -e FINAL ] || [ -L FINAL ]; then echo it is there already; exit 1; fi
mv -- PART FINAL
"""


@dataclass(frozen=True, slots=True)
class CopiedTree:
    """``path``: where it is now. ``entries``: files, directories and links. ``left_out``: what was not
    taken, and why; some of ``left_out_count``."""

    path: str
    entries: int
    bytes: int
    left_out: tuple[str, ...] = ()
    left_out_count: int = 0


async def copy_out(connection: Connection, there: str, target: Path, told: BytesFn) -> CopiedTree:
    """Copy what a path in the guest (relative to the login's home) leads to into the directory
    ``target``, or to that name. A file takes the place of a file; nothing takes a directory's. Links
    that would lead out of the copy, devices and the like are left out.

    NotFound, Conflict, NoSpace, Unfit (what is sent can't be kept), Unsupported (no tar there),
    DriverFailed: nothing was made."""
    vm = connection.endpoint.vm
    path = _guest_path(there)
    name = PurePosixPath(path).name
    final = target / (name if name not in ("", "..") else vm) if target.is_dir() else target
    if not final.parent.is_dir():
        raise NotFound(f"there is no directory {final.parent}", remedy="make it, or name another")
    kind, _ = await _ask(connection, path, name)
    if kind == "none":
        raise NotFound(f"there is no {there or '.'}", vm=vm)
    if kind == "other":
        raise Unfit(f"{there} is neither file nor directory", vm=vm)
    tree = kind == "directory"
    if final.is_dir() or (tree and os.path.lexists(final)):
        raise Conflict(f"{final} is there already", remedy="move it away, or give another name")
    with contextlib.ExitStack() as stack:
        try:
            part = stack.enter_context(part_of(final.name, final.parent))
        except OSError as error:
            raise file_error(error, final, "make a directory beside") from error
        unpacker = _Unpacker(vm, part, tree=tree, told=told)
        await _received(connection, path, unpacker, f"reading {there}")
        try:
            if tree:
                unpacker.root.rename(final)
            else:
                unpacker.root.replace(final)
        except OSError as error:
            raise file_error(error, final, "write") from error
        left = unpacker.left_out
        return CopiedTree(str(final), unpacker.entries, unpacker.bytes, tuple(left[:_NAMED]), len(left))


async def _received(connection: Connection, path: str, unpacker: _Unpacker, doing: str) -> None:
    """Everything the guest packs is unpacked."""
    quoted = shlex.quote(path)
    where, create = (f"cd -- {quoted} &&", "-cf - .") if unpacker.tree else ("", f"-chf - -- {quoted}")
    out, into = os.pipe()
    unpacking = asyncio.get_running_loop().run_in_executor(
        None, unpacker.unpack, os.fdopen(out, "rb")
    )  # fmt: skip
    try:
        with os.fdopen(into, "wb", buffering=0) as pipe:
            program = _script(_PACK, WHERE=where, CREATE=create)
            async with connection.printing(program, doing) as read:
                with contextlib.suppress(BrokenPipeError):  # its error tells
                    while data := await read(_BLOCK):
                        await in_thread(partial(_write, pipe, data))
    finally:  # it ends: nothing comes any more
        await asyncio.wait([unpacking])
        failed = unpacking.exception()
    if failed is not None:
        raise failed


def _write(pipe: BinaryIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[pipe.write(left) :]


class _BoundedInfo(tarfile.TarInfo):
    """A header, refused where reading on would take what the guest wants of memory: it may be of any
    size. GNU tar, busybox and bsdtar (to a name's 100th character) write no others by themselves."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedInfo:
        try:
            found = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError:
            if len(buf) == tarfile.BLOCKSIZE and any(buf):  # else it is the end
                raise Unfit("what its tar writes can't be read") from None
            raise
        named = found.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if found.size < 0 or (named and found.size > _HEADER_MOST):
            raise Unfit("its tar writes a name without end")
        if found.type in (
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_SPARSE,
        ):
            raise Unfit("its tar writes headers that are not taken: not those of GNU tar or busybox")
        return found


@dataclass(slots=True)
class _Unpacker:
    """Makes ``root`` in ``part``, a fresh directory of ours: a tree, or one file."""

    vm: str
    part: Path
    tree: bool
    told: BytesFn
    entries: int = 0
    bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    _links: dict[Path, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.part / "it"

    def unpack(self, stream: BinaryIO) -> None:
        """Unfit, NoSpace, WrongState."""
        try:
            with (
                stream,
                tarfile.open(
                    fileobj=stream, mode="r|", bufsize=_BLOCK, tarinfo=_BoundedInfo,
                    encoding="utf-8", errors="surrogateescape",
                ) as tar,
            ):  # fmt: skip
                while (entry := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                    self._take(tar, entry)
                while stream.read(_BLOCK):  # its padding
                    pass
            if not self.entries:
                raise Unfit("its tar writes nothing")
            self._link()
        except (tarfile.TarError, UnicodeError, ValueError) as error:
            raise Unfit(f"what its tar writes can't be read: {error}", vm=self.vm) from None
        except Unfit as error:
            raise Unfit(error.message, vm=self.vm, remedy=error.remedy) from None
        except OSError as error:
            raise file_error(error, self.part.parent, "write in") from error

    def _take(self, tar: tarfile.TarFile, entry: tarfile.TarInfo) -> None:
        self.entries += 1
        if self.entries > (_ENTRIES if self.tree else 1):
            raise Unfit(f"more than {_ENTRIES} files" if self.tree else "more than the one file")
        parts = self._parts(entry.name) if self.tree else ()
        path = self.root.joinpath(*parts)
        if entry.isdir() and self.tree:
            self._directory(parts)
            return
        self._directory(parts[:-1])
        if os.path.lexists(path) or path in self._links:
            raise Unfit(f"it has {_shown(entry.name)} twice")
        if entry.isreg():
            self._file(tar, entry, path)
        elif entry.islnk() and self.tree:
            self._name_again(entry, path)
        elif entry.issym() and self.tree:
            if len(self._links) >= _LINKS:
                raise Unfit(f"more than {_LINKS} links")
            self._links[path] = entry.linkname
        elif self.tree:
            self.left_out.append(f"{_shown(entry.name)}: neither file, directory nor link")
        else:
            raise Unfit("it is no file any more")

    def _parts(self, name: str) -> tuple[str, ...]:
        """Of a path that stays where it is to be."""
        found = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or ".." in found:
            raise Unfit(f"{_shown(name)} leads out of what is copied")
        if not name.isprintable():  # nor is what isn't UTF-8
            raise Unfit(f"a file's name has bytes that can't be shown: {_shown(name)}")
        if len(found) > _DEEPEST or any(len(part.encode()) > _NAME_MAX for part in found):
            raise Unfit(f"{_shown(name)} is too long for a name, or lies too deep")
        return found

    def _directory(self, parts: Sequence[str]) -> None:
        """Made with those above it. They are real ones: links are made last."""
        where = self.root
        for step in (None, *parts) if self.tree else ():
            where = where if step is None else where / step
            if where in self._links:
                raise Unfit(f"{_shown('/'.join(parts))} is a link and a directory")
            with contextlib.suppress(FileExistsError):
                where.mkdir(0o755)

    def _file(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, path: Path) -> None:
        source = tar.extractfile(entry)
        assert source is not None
        check_room(self.part, entry.size)
        with open_new(path, mode=0o755 if entry.mode & 0o100 else 0o644) as out:
            while data := source.read(_BLOCK):
                check_room(self.part, len(data))
                if data.strip(b"\0"):
                    out.write(data)
                else:
                    out.seek(len(data), os.SEEK_CUR)
                self.bytes += len(data)
                self.told(self.bytes)
            out.truncate()

    def _name_again(self, entry: tarfile.TarInfo, path: Path) -> None:
        """Another name of a file that it has sent."""
        first = self.root.joinpath(*self._parts(entry.linkname))
        if first in self._links or not first.is_file():
            raise Unfit(f"{_shown(entry.name)} is another name of what it doesn't have")
        os.link(first, path)

    def _link(self) -> None:
        """Make the links that lead to what is copied, also through one another."""
        home = os.path.realpath(self.root)
        made = []
        for path, to in self._links.items():
            if not to.isprintable() or not 0 < len(to.encode()) <= _TARGET_MAX:
                self._lead_out(path, to)
                continue
            path.symlink_to(to)
            made.append(path)
        for _ in range(_PASSES):
            inside = [path for path in made if _within(os.path.realpath(path), home)]
            if len(inside) == len(made):
                return
            for path in {*made} - {*inside}:
                path.unlink()
                self._lead_out(path, self._links[path])
            made = inside
        raise Unfit("its links lead through one another")

    def _lead_out(self, path: Path, to: str) -> None:
        name = path.relative_to(self.root)
        self.left_out.append(f"{name} -> {_shown(to)}: it leads out of what is copied")


def _within(path: str, home: str) -> bool:
    return path == home or path.startswith(f"{home}/")


def _shown(name: str) -> str:
    return repr(name[-300:])


# -- the other way --------------------------------------------------------------------------------


def check_source(here: Path) -> os.stat_result:
    """What is to be copied into a guest, as stat(2) has it. NotFound, WrongState (it can't be read),
    Unfit (neither file nor directory)."""
    try:
        seen = here.stat()
    except OSError as error:
        raise file_error(error, here, "read") from error
    if not (stat.S_ISREG(seen.st_mode) or stat.S_ISDIR(seen.st_mode)):
        raise Unfit(f"{here} is neither file nor directory")
    return seen


async def copy_in(connection: Connection, here: Path, there: str, told: BytesFn) -> CopiedTree:
    """Copy a file or a directory into the guest's directory ``there``, or to that name, complete or not
    at all. A file takes the place of a file; nothing takes a directory's.

    Errors: as ``check_source``; Conflict, Unsupported (no tar there), DriverFailed."""
    vm = connection.endpoint.vm
    seen = check_source(here)
    tree = stat.S_ISDIR(seen.st_mode)
    path, name = _guest_path(there), here.name
    if name in ("", ".."):
        name = here.resolve().name or vm
    kind, taken = await _ask(connection, path, name)
    inside = kind == "directory" or there.endswith("/")
    final = str(PurePosixPath(path) / name) if inside else path
    if tree and (taken if inside else kind != "none"):
        raise Conflict(f"{final} is there already", vm=vm, remedy="remove it, or give another name")
    if not tree:
        try:
            with here.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            mode = "755" if seen.st_mode & 0o100 else "644"
            moved = await connection.put_file(here, final, sha256=sha256, ready=[f"chmod {mode} --"])
        except OSError as error:
            raise file_error(error, here, "read") from error
        return CopiedTree(final, 1, moved.size)
    return await _sent(connection, here.resolve(), final, told)


async def _sent(connection: Connection, here: Path, final: str, told: BytesFn) -> CopiedTree:
    place = PurePosixPath(final)
    part = str(place.parent / f".{place.name}.{secrets.token_hex(8)}.part")
    words = {
        word: shlex.quote(_plain(path))
        for word, path in {"HOME": str(place.parent), "PART": part, "FINAL": final}.items()
    }
    out, into = os.pipe()
    packer = _Packer(here, told)
    packing = asyncio.get_running_loop().run_in_executor(None, packer.pack, os.fdopen(into, "wb"))
    try:
        with os.fdopen(out, "rb", buffering=0) as pipe:

            async def read(size: int) -> bytes:
                data = await in_thread(lambda: pipe.read(size))
                if not data and packer.failed is not None:
                    raise packer.failed
                return data or b""

            await connection.feed(_script(_UNPACK, **words), read, f"writing {final}")
        await asyncio.wait([packing])
        packing.result()
        await connection.output(_script(_PLACE, **words))
    except BaseException:
        if not connection.closed:
            with contextlib.suppress(DriverFailed):
                await connection.output(_script("rm -rf -- PART", **words))
        raise
    finally:
        await asyncio.wait([packing])
    left = packer.left_out
    return CopiedTree(final, packer.entries, packer.bytes, tuple(left[:_NAMED]), len(left))


@dataclass(slots=True)
class _Packer:
    here: Path
    told: BytesFn
    entries: int = 0
    bytes: int = 0
    left_out: list[str] = field(default_factory=list)
    failed: FarmhandError | None = None

    def pack(self, stream: BinaryIO) -> None:
        with stream:
            try:
                with tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as tar:
                    for path in self._paths():
                        self._add(tar, path)
            except BrokenPipeError:  # nobody reads any more, and says why
                pass
            except OSError as error:
                named = error.filename if isinstance(error.filename, str) else str(self.here)
                self.failed = file_error(error, Path(named), "read")

    def _paths(self) -> Iterator[Path]:
        yield self.here
        for top, directories, files in os.walk(self.here, onerror=_raise):
            for name in sorted((*directories, *files)):
                yield Path(top, name)

    def _add(self, tar: tarfile.TarFile, path: Path) -> None:
        name = path.relative_to(self.here)
        entry = tar.gettarinfo(path, arcname=f"./{name}" if path != self.here else ".")
        if entry is None or not (entry.isreg() or entry.isdir() or entry.issym() or entry.islnk()):
            self.left_out.append(f"{one_line(str(name))}: neither file, directory nor link")
            return
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        self.entries += 1
        if not entry.isreg():
            tar.addfile(entry)
            return
        with path.open("rb") as file:
            tar.addfile(entry, _Counted(file, self))


@dataclass(frozen=True, slots=True)
class _Counted:
    """A file whose bytes are counted as they are read."""

    file: BinaryIO
    packer: _Packer

    def read(self, size: int = -1, /) -> bytes:
        data = self.file.read(size)
        self.packer.bytes += len(data)
        self.packer.told(self.packer.bytes)
        return data


def _raise(error: OSError) -> None:
    raise error


async def _ask(connection: Connection, path: str, name: str) -> tuple[str, bool]:
    """What is there, and whether that name is taken in it. Unsupported without a tar."""
    script = _script(_ASK, PATH=shlex.quote(path), NAME=shlex.quote(name or "."))
    kind, *more = (await connection.output(script)).split("\n")
    if "no tar" in more:
        raise Unsupported("there is no tar", vm=connection.endpoint.vm, remedy="install it there")
    if kind not in ("directory", "file", "other", "none"):
        raise DriverFailed(f"it answers what nobody asked: {kind[:60]!r}", vm=connection.endpoint.vm)
    return kind, "taken" in more


def _script(text: str, **words: str) -> str:
    return re.sub("[A-Z]{4,}", lambda found: words[found[0]], text)


def _guest_path(there: str) -> str:
    """As the guest's tools take it: relative to the home, never an option."""
    if "\0" in there or "\n" in there:
        raise NotFound(f"{there!r} is no path")
    path = "." if there in ("", "~") else there.removeprefix("~/") or "."
    return _plain(path.rstrip("/") or "/")


def _plain(path: str) -> str:
    return f"./{path}" if path.startswith("-") else path


def left_out_in_words(copied: CopiedTree) -> str:
    """A line."""
    more = copied.left_out_count - len(copied.left_out)
    return some(copied.left_out, by="; ") + (f", {more} more" if more else "")
