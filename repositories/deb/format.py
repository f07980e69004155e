"""Debian binary packages and their archives: deb(5), and https://wiki.debian.org/DebianRepository/Format.

Source packages (.dsc) are not taken: what is published is what machines install.

Packages are read by ourselves: python-debian takes hostile ones as they come and bounds nothing, and
starting dpkg-deb costs more than most packages do."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC
from email.utils import format_datetime
from pathlib import Path
from typing import ClassVar

from host.files import file_error
from host.printable import one_line
from inventory.errors import Unfit
from repositories.contents import (
    MemberDifference,
    PackedFile,
    file_differences,
    order_difference,
    value_differences,
)
from repositories.deb import changelog as deb_changelog
from repositories.deb import control as deb_control
from repositories.deb import published as deb_published
from repositories.deb.file import DebFile, TarMember, opened
from repositories.format import (
    ClientSource,
    FoundPackage,
    IndexFile,
    PackageFormat,
    Release,
    Signer,
    Sum,
)
from repositories.package import Change, Package, Reading, place
from repositories.packed import Damaged

_KINDS = {
    tarfile.LNKTYPE: "hard link", tarfile.SYMTYPE: "symbolic link", tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device", tarfile.DIRTYPE: "directory", tarfile.FIFOTYPE: "fifo",
}  # fmt: skip


class DebFormat(PackageFormat):
    NAME: ClassVar[str] = "deb"
    SUFFIX: ClassVar[str] = ".deb"
    KINDS: ClassVar[tuple[str, ...]] = ("Packages",)

    def read(self, path: Path, file: str, sum_: Sum, component: str) -> Reading:  # noqa: ARG002
        if "#" in file or "?" in file:
            raise Unfit(
                f"{one_line(file, 120)}: apt fetches no file with # or ? in its name",
                remedy="give it another name",
            )
        with _fit(path, file) as package:
            control = deb_control.control_of(package.prove())
        stanza = (
            f"{control.text}Filename: {place(sum_.sha256, file)}\n"
            f"Size: {sum_.size}\nSHA256: {sum_.sha256}\n\n"
        )
        return Reading(
            control.name, control.version, control.architecture, control.source, {"Packages": stanza}
        )

    def compare(self, one: str, other: str) -> int:
        return deb_control.compare(one, other)

    def sections(self, package: Package, architectures: Sequence[str]) -> tuple[str, ...]:
        known = _some(architectures)
        fit = known if package.architecture == "all" else (package.architecture,)
        return tuple(
            f"{package.component}/binary-{architecture}" for architecture in fit if architecture in known
        )

    def all_sections(self, components: Sequence[str], architectures: Sequence[str]) -> tuple[str, ...]:
        return tuple(
            sorted(
                f"{component}/binary-{each}" for component in components for each in _some(architectures)
            )
        )

    def frame(self, kind: str, count: int) -> tuple[bytes, bytes]:  # noqa: ARG002
        return b"", b""

    def lasting(self, release: Release, index: IndexFile) -> str:
        return f"{_directory(release)}/{index.section}/by-hash/SHA256/{index.packed.sha256}"

    def passing(self, release: Release, index: IndexFile) -> tuple[str, ...]:
        return (f"{_directory(release)}/{index.section}/{index.kind}.gz",)

    def summary(self, release: Release, indexes: Sequence[IndexFile]) -> bytes:
        """There is no Valid-Until: a generation is as good after a year. Plain indexes are named, as apt
        wants them, but not there: it unpacks what it fetched."""
        fields = [
            ("Origin", release.repository),
            ("Label", release.repository),
            ("Suite", release.channel),
            ("Codename", release.channel),
            ("Date", format_datetime(release.date.astimezone(UTC))[:-5] + "UTC"),
            ("Generation", str(release.sequence)),  # not Version: apt asks about its changes
            ("Acquire-By-Hash", "yes"),
            ("Architectures", " ".join(_some(release.architectures))),
            ("Components", " ".join(release.components)),
            ("Description", one_line(release.description)),
        ]
        if "all" in release.architectures and len(release.architectures) > 1:
            # what fits all is in each architecture's index, and needn't be read twice
            fields.append(("No-Support-for-Architecture-all", "Packages"))
        lines = [f"{name}: {value}" for name, value in fields if value]
        files = []
        for index in indexes:
            files.append((f"{index.section}/{index.kind}", index.plain))
            files.append((f"{index.section}/{index.kind}.gz", index.packed))
        lines.append("SHA256:")
        lines += (f" {each.sha256} {each.size:>12} {path}" for path, each in sorted(files))
        return "\n".join([*lines, ""]).encode()

    def entries(self, release: Release, summary: bytes, signer: Signer | None) -> Mapping[str, bytes]:
        """A client that reads while a summary is replaced has InRelease, which is one file."""
        top = _directory(release)
        found = {f"{top}/Release": summary}
        if signer:
            found[f"{top}/Release.gpg"] = signer.detached(summary)
            found[f"{top}/InRelease"] = signer.clear(summary)
        return found

    def links(self, channel: str) -> Mapping[str, str]:
        """``deb URL tested main`` is what people have in their lists."""
        return {f"dists/{channel}": f"../channels/{channel}/dists/{channel}"}

    def signatures(self, release: Release) -> tuple[str, ...]:
        top = _directory(release)
        return f"{top}/InRelease", f"{top}/Release.gpg"

    def stanza(self, source: ClientSource) -> str:
        """sources.list(5), deb822. Architectures aren't named: apt takes those that it is set up for,
        and would fetch any that is named besides."""
        lines = [
            f"# /etc/apt/sources.list.d/{source.repository}-{source.channel}.sources",
            "Types: deb",
            f"URIs: {'mirror+' + source.mirrors if source.mirrors else source.url}",
            f"Suites: {source.channel}",
            f"Components: {' '.join(source.components)}",
        ]
        if source.armour is None:
            lines.append("Trusted: yes")
        else:
            if source.key:
                lines.insert(
                    1, f"# The key is {source.key}; apt before 2.4 wants it in a file of its own."
                )
            lines.append("Signed-By:")
            lines += (
                f" {line}" if line else " ." for line in source.armour.decode("ascii").splitlines()
            )
        return "\n".join([*lines, ""])

    def compared(self, one: Path, other: Path) -> tuple[MemberDifference, ...]:
        """Fields as ``control: Depends``, files of control.tar as ``control/postinst``, installed ones
        as ``./usr/bin/x``."""
        before, after = _contents(one), _contents(other)
        installed = tuple(file_differences(before.data, after.data))
        named = tuple(value_differences(before.fields, after.fields))
        control = [
            each
            for each in file_differences(before.control, after.control)
            # where these two say of them, there is no more to tell
            if not (named and each.name == "control/control" and each.aspect == "content")
            and not (installed and each.name == "control/md5sums" and each.aspect == "content")
        ]
        return (
            *named,
            *control,
            *installed,
            *order_difference("control.tar", [*before.control], [*after.control]),
            *order_difference("data.tar", [*before.data], [*after.data]),
        )

    def changelog(self, path: Path) -> tuple[Change, ...]:
        with _fit(path, path.name) as package:
            name = deb_control.control_of(package.fields()).name
            return deb_changelog.changes(package.data(), name)

    def published(self, top: Path) -> Iterator[FoundPackage]:
        return deb_published.published(top)


def _some(architectures: Sequence[str]) -> Sequence[str]:
    """A repository of none has what fits all: apt fails on one without any index."""
    return architectures or ("all",)


def _directory(release: Release) -> str:
    return f"dists/{release.channel}"


@contextmanager
def _fit(path: Path, file: str) -> Iterator[DebFile]:
    """Unfit, or what can't be read; instead of Damaged and OSError."""
    try:
        with opened(path) as package:
            yield package
    except Damaged as error:
        raise Unfit(
            f"{one_line(file, 120)}: {error}", remedy="build it again, or fetch it anew"
        ) from None
    except OSError as error:
        raise file_error(error, path, "read") from error


@dataclass(frozen=True, slots=True)
class _DebContents:
    fields: Mapping[str, str]
    control: Mapping[str, PackedFile]
    data: Mapping[str, PackedFile]


def _contents(path: Path) -> _DebContents:
    """What a package has, by name, in the order in which it has it."""
    with _fit(path, path.name) as package:
        fields = deb_control.control_of(package.fields()).fields
        return _DebContents(
            {f"control: {name.title()}": value for name, value in fields.items()},
            {f"control/{each.name}": _packed(each) for each in package.control()},
            {f"./{each.name}": _packed(each) for each in package.data()},
        )


def _packed(member: TarMember) -> PackedFile:
    header = member.header
    digest = hashlib.sha256()
    for piece in member.pieces:
        digest.update(piece)
    kind = _KINDS.get(header.type, "file")
    return PackedFile(
        kind=kind,
        mode=f"{header.mode:04o}",
        owner=f"{header.uname}/{header.uid}:{header.gname}/{header.gid}",
        device=f"{header.devmajor}:{header.devminor}" if kind.endswith("device") else "",
        link=header.linkname if kind.endswith("link") else "",
        content=digest.hexdigest(),
        time=int(header.mtime),
    )
