"""Binary and source rpm packages, and rpm-md repositories of them, which dnf, zypper and others read.

What a package says of itself is read, and worded as metadata, by createrepo_c's library; whether it is
whole is looked at before (``repositories.rpm_file``). Of the library, PyPI's wheel is taken: it is one
version on all machines, reads zstd, which Fedora's metadata are compressed by, and costs 20 ms where it
is used, and nothing elsewhere. Debian 12's (0.17.3) reads no zstd, and is bound to Debian's Python."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from host.files import file_error
from host.printable import one_line
from inventory.errors import NotFound, Unfit
from repositories.armour import SIGNATURE, armoured, plain
from repositories.format import ClientSource, Found, IndexFile, PackageFormat, Release, Signer, Sum
from repositories.package import Change, Package, Reading, place
from repositories.rpm_file import RpmFile, packets, read_rpm

REPOMD = "repodata/repomd.xml"
_SIGNATURE = f"{REPOMD}.asc"
_COMMON = "http://linux.duke.edu/metadata/"
_ROOTS = {
    "primary": f'metadata xmlns="{_COMMON}common" xmlns:rpm="{_COMMON}rpm"',
    "filelists": f'filelists xmlns="{_COMMON}filelists"',
    "other": f'otherdata xmlns="{_COMMON}other"',
}
_CHANGES = 10
"""Of a package's changelog that clients are told; as many as createrepo_c does."""
_LONGEST = 200

# rpmbuild refuses more (build/parsePreamble.c), and files' names are made of these
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._+-]{{0,{_LONGEST}}}", re.A)
_VERSION = re.compile(rf"[A-Za-z0-9._+~^]{{1,{_LONGEST}}}", re.A)
_EPOCH = re.compile(r"[0-9]{1,10}", re.A)
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]{1,30}", re.A)
_SOURCE = re.compile(r"(.+)-[^-]+-[^-]+\.(?:no)?src\.rpm")

_RUN = re.compile(r"[0-9]+|[A-Za-z]+|~|\^", re.A)
_END = (1, 0, "")
_AUTHOR = re.compile(r"(?P<author>.*?>?)[ \t]*(?:-[ \t]*)?(?P<version>[A-Za-z0-9][\w.:~^+-]*)?", re.S)


class RpmFormat(PackageFormat):
    """A version in ``Package`` is EPOCH:VERSION-RELEASE, an epoch of 0 left out; a source package's
    architecture is src.

    Clients that pin by the mirror list never fail while generations come and go, on any web server, with
    signatures or without; nor do those of a plain URL without signatures. With signatures a plain URL
    can't be had without exceptions: repomd.xml and repomd.xml.asc are two requests, and no file in the
    second one's place is right for who got the first before a publish and for who got it after. Several
    signatures in it aren't: gpg, by which dnf verifies, ends at the first that is wrong (mainproc.c,
    ``opt.batch && rc``), and newer ones take no file with several. What holds: where the two don't fit,
    dnf fetches both again, at once, and once. So it fails, and uses nothing, where a publish came between
    them both times. Where it hasn't the repository's keys yet one of the two tries goes to fetch them."""

    NAME: ClassVar[str] = "rpm"
    SUFFIX: ClassVar[str] = ".rpm"
    KINDS: ClassVar[tuple[str, ...]] = tuple(_ROOTS)

    def read(self, path: Path, file: str, sum_: Sum, component: str) -> Reading:  # noqa: ARG002 - deb's
        found = read_rpm(path, file)
        library = _createrepo_c()
        try:
            package = _described(library, found, place(sum_.sha256, file), sum_)
            texts = dict(zip(self.KINDS, library.xml_dump(package), strict=True))
            _check_parsed(library, package, texts)
        except library.CreaterepoCError as error:
            raise Unfit(
                f"{file} is no package that dnf would take: {one_line(str(error), _LONGEST)}",
                remedy="rpm -qp --xml shows what it says of itself",
            ) from None
        version = _version_of(package, file)
        source = _SOURCE.fullmatch(package.rpm_sourcerpm or "")
        return Reading(
            name=package.name,
            version=version,
            architecture=package.arch,
            source=source[1] if source else package.name,
            texts=texts,
            signers=found.signers,
        )

    def compare(self, one: str, other: str) -> int:
        """As rpm's own rpmvercmp, of the epochs, then the versions, then the releases."""
        ours, theirs = _order(one), _order(other)
        return (ours > theirs) - (ours < theirs)

    def sections(self, package: Package, architectures: Sequence[str]) -> tuple[str, ...]:
        """One for all, as a repository has all architectures that go together."""
        fits = not architectures or package.architecture in (*architectures, "noarch", "src")
        return ("",) if fits else ()

    def all_sections(self, *_: Sequence[str]) -> tuple[str, ...]:
        return ("",)

    def frame(self, kind: str, count: int) -> tuple[bytes, bytes]:
        root = _ROOTS[kind]
        before = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} packages="{count}">\n'
        return before.encode(), f"</{root.partition(' ')[0]}>\n".encode()

    def lasting(self, release: Release, index: IndexFile) -> str:  # noqa: ARG002 - deb's
        return f"repodata/{index.packed.sha256}-{index.kind}.xml.gz"

    def passing(self, release: Release, index: IndexFile) -> tuple[str, ...]:  # noqa: ARG002 - deb's
        return ()

    def summary(self, release: Release, indexes: Sequence[IndexFile]) -> bytes:
        """repomd.xml. Its revision is the generation's number."""
        when = int(release.date.timestamp())
        data = "".join(
            f'  <data type="{index.kind}">\n'
            f'    <checksum type="sha256">{index.packed.sha256}</checksum>\n'
            f'    <open-checksum type="sha256">{index.plain.sha256}</open-checksum>\n'
            f'    <location href="{self.lasting(release, index)}"/>\n'
            f"    <timestamp>{when}</timestamp>\n"
            f"    <size>{index.packed.size}</size>\n"
            f"    <open-size>{index.plain.size}</open-size>\n"
            "  </data>\n"
            for index in sorted(indexes, key=lambda index: self.KINDS.index(index.kind))
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            f'<repomd xmlns="{_COMMON}repo" xmlns:rpm="{_COMMON}rpm">\n'
            f"  <revision>{release.sequence}</revision>\n{data}</repomd>\n"
        ).encode()

    def entries(self, release: Release, summary: bytes, signer: Signer | None) -> Mapping[str, bytes]:
        """Signed by the first key alone: rpm's library, by which dnf verifies in Fedora 39, EL 10 and
        later, takes no file with several signatures. While keys are changed that is the old one; when it
        is gone, dnf looks into the file of the keys again."""
        del release
        if signer is None:
            return {REPOMD: summary}
        signatures = plain(SIGNATURE, signer.detached(summary))
        _, _, end = next(packets(signatures))
        return {REPOMD: summary, _SIGNATURE: armoured(SIGNATURE, signatures[:end])}

    def signatures(self, release: Release) -> tuple[str, ...]:  # noqa: ARG002 - deb's
        return (_SIGNATURE,)

    def stanza(self, source: ClientSource) -> str:
        """A .repo file (dnf.conf(5)). The metadata are signed, and have each package's SHA-256: so
        packages need no signatures of their own. Metadata are fresh for five minutes: dnf's two days
        are too long for a channel that moves."""
        name = f"{source.repository}-{source.channel}"
        where = f"mirrorlist={source.mirrors}" if source.mirrors else f"baseurl={source.url}"
        signed = f"repo_gpgcheck=1\ngpgkey={source.key}\n" if source.key else "repo_gpgcheck=0\n"
        return (
            f"# /etc/yum.repos.d/{name}.repo\n"
            f"[{name}]\nname={source.repository} {source.channel}\n{where}\nenabled=1\n"
            f"gpgcheck=0\n{signed}metadata_expire=300\n"
        )

    def differing(self, one: Path, other: Path) -> tuple[str, ...]:
        """What rpm calls tags, by their names, and the files' paths. How the payload is compressed, and
        who signed, is no difference."""
        ours, theirs = (read_rpm(path, path.name, whole=False) for path in (one, other))
        fields, files = _fields(ours), _files(ours)
        their_fields, their_files = _fields(theirs), _files(theirs)
        return (
            *sorted(n for n in fields.keys() | their_fields if fields.get(n) != their_fields.get(n)),
            *sorted(n for n in files.keys() | their_files if files.get(n) != their_files.get(n)),
        )

    def changelog(self, path: Path) -> tuple[Change, ...]:
        header = read_rpm(path, path.name, whole=False).header
        rows = zip(header.numbers(1080), header.texts(1081), header.texts(1082), strict=False)
        return tuple(_change(when, author, text) for when, author, text in rows)

    def published(self, top: Path) -> Iterator[Found]:
        """By repomd.xml and the primary metadata that it names, which may be compressed by gzip, xz,
        bzip2 or zstd. What their paths lead to is looked at as text alone: symbolic links in ``top`` are
        the admin's."""
        library = _createrepo_c()
        summary = top / REPOMD
        if not summary.is_file():
            raise NotFound(f"{top} is no rpm repository: it has no {REPOMD}")
        found: list[Found] = []
        try:
            records = {record.type: record for record in library.Repomd(str(summary)).records}
            if (record := records.get("primary")) is None:
                raise Unfit(f"{summary} names no primary metadata")
            primary = top / _inside(record.location_href, record.location_base, summary)
            _check_sum(primary, record.checksum_type, record.checksum)

            def keep(package: Any) -> None:
                file = _inside(package.location_href, package.location_base, primary)
                known = package.pkgId if package.checksum_type == "sha256" else ""
                found.append(Found(file, "", known, package.size_package))

            library.xml_parse_primary(
                str(primary), pkgcb=keep, warningcb=lambda _kind, _words: True, do_files=False
            )
        except library.CreaterepoCError as error:
            raise Unfit(
                f"the metadata of {top} are damaged: {one_line(str(error), _LONGEST)}",
                remedy="fetch them again, or make them again with createrepo_c",
            ) from None
        yield from found


@cache
def _createrepo_c() -> Any:
    """The library. The rpm library in it reads the settings of this machine's rpm, which is another
    version, and complains on standard error where there is none: it is given empty ones."""
    before = os.environ.get("RPM_CONFIGDIR")
    with tempfile.TemporaryDirectory(prefix="farmhand-") as directory:
        Path(directory, "rpmrc").touch()
        os.environ["RPM_CONFIGDIR"] = directory
        try:
            import createrepo_c
        finally:
            del os.environ["RPM_CONFIGDIR"]
            if before is not None:
                os.environ["RPM_CONFIGDIR"] = before
    return createrepo_c


def _described(library: Any, found: RpmFile, location: str, sum_: Sum) -> Any:
    """What the library makes of a package's header. It gets the very bytes that were proven, without the
    payload, which it would only read to compute the sum that is known. The file's time is the build's:
    what is kept of a package depends on its bytes alone."""
    handle = os.memfd_create("farmhand-rpm")
    with os.fdopen(handle, "wb") as file:
        file.write(found.head)
        file.flush()
        package = library.package_from_rpm(
            f"/proc/self/fd/{handle}", location_href=location, changelog_limit=_CHANGES
        )
    package.pkgId = sum_.sha256
    package.size_package = sum_.size
    package.time_file = package.time_build
    return package


def _check_parsed(library: Any, package: Any, texts: Mapping[str, str]) -> None:
    """CreaterepoCError, Unfit: the metadata that would be written of the package can't be read again, as
    where it has characters that XML has not, or texts longer than libxml2 takes. One such package would
    break the whole repository for its clients."""
    seen: list[Any] = []
    for kind, text in texts.items():
        parse = getattr(library, f"xml_parse_{kind}_snippet")
        parse(text, pkgcb=seen.append, warningcb=lambda _kind, _words: True)
    ids = {(p.pkgId, p.name, p.arch, p.epoch, p.version, p.release) for p in seen}
    own = (
        package.pkgId, package.name, package.arch, package.epoch, package.version, package.release
    )  # fmt: skip
    if len(seen) != len(texts) or ids != {own}:
        raise Unfit(
            f"{one_line(str(package.name), _LONGEST)}: what it says of itself can't be told in XML"
        )


def _version_of(package: Any, file: str) -> str:
    """Unfit: it, or the name or architecture, is none."""
    for what, value, pattern in (
        ("name", package.name, _NAME),
        ("epoch", package.epoch or "0", _EPOCH),
        ("version", package.version, _VERSION),
        ("release", package.release, _VERSION),
        ("architecture", package.arch, _ARCHITECTURE),
    ):
        if not pattern.fullmatch(value or ""):
            raise Unfit(
                f"{file}: {one_line(repr(value or ''), 60)} is no {what} of a package",
                remedy="build it with rpmbuild, which refuses such ones",
            )
    epoch = int(package.epoch or 0)
    return f"{f'{epoch}:' if epoch else ''}{package.version}-{package.release}"


def _order(version: str) -> tuple[object, ...]:
    """What orders versions as rpmvercmp (rpmio/rpmvercmp.c) does."""
    epoch, colon, rest = version.rpartition(":")
    upstream, _, release = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return (int(epoch) if colon and epoch.isdecimal() else 0), _runs(upstream), _runs(release)


def _runs(text: str) -> tuple[tuple[int, int, str], ...]:
    """Of a version's runs of digits and letters: ~ is before the end, which is before ^, letters and
    numbers."""
    return (*map(_rank, _RUN.findall(text)), _END)


def _rank(run: str) -> tuple[int, int, str]:
    if run in "~^":
        return (0 if run == "~" else 2), 0, ""
    if run.isdigit():
        number = run.lstrip("0")
        return 4, len(number), number
    return 3, 0, run


def _inside(location: str | None, base: str | None, where: Path) -> str:
    """A path below the repository's directory. Unfit: it leads elsewhere."""
    path = posixpath.normpath(location or "")
    if base or not location or path.startswith(("/", "..")) or not path.isprintable() or path == ".":
        shown = one_line(f"{base or ''}{'/' if base else ''}{location or ''}", _LONGEST)
        raise Unfit(f"{where} leads out of its repository: {shown!r}")
    return path


def _check_sum(path: Path, algorithm: str, expected: str) -> None:
    name = "sha1" if algorithm == "sha" else algorithm
    if name not in hashlib.algorithms_guaranteed or name.startswith("shake"):
        raise Unfit(f"{path}: its sum is of a kind that isn't known: {one_line(str(algorithm), 40)}")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(name, usedforsecurity=False))
    except FileNotFoundError:
        raise Unfit(f"{path} isn't there, though repomd.xml names it", remedy=_AGAIN) from None
    except OSError as error:
        raise file_error(error, path, "read") from error
    if found.hexdigest() != expected:
        raise Unfit(f"{path} is damaged: its sum isn't that in repomd.xml", remedy=_AGAIN)


_AGAIN = "fetch the metadata again, or make them again with createrepo_c"

# -- what two packages differ in, by rpm's tags (rpmtag.h) --------------------------------------

_FIELDS: Mapping[str, tuple[int, ...]] = {
    "name": (1000,),
    "version": (1001,),
    "release": (1002,),
    "epoch": (1003,),
    "summary": (1004,),
    "description": (1005,),
    "build time": (1006,),
    "build host": (1007, 1094),
    "distribution": (1010, 1155),
    "vendor": (1011,),
    "license": (1014,),
    "packager": (1015,),
    "group": (1016,),
    "url": (1020, 5012),
    "os": (1021,),
    "architecture": (1022,),
    "source package": (1044, 1146),
    "provides": (1047, 1112, 1113),
    "requires": (1048, 1049, 1050),
    "conflicts": (1053, 1054, 1055),
    "obsoletes": (1090, 1114, 1115),
    "recommends": (5046, 5047, 5048),
    "suggests": (5049, 5050, 5051),
    "supplements": (5052, 5053, 5054),
    "enhances": (5055, 5056, 5057),
    "changelog": (1080, 1081, 1082),
    "script before installation": (1023, 1085, 5020),
    "script after installation": (1024, 1086, 5021),
    "script before removal": (1025, 1087, 5022),
    "script after removal": (1026, 1088, 5023),
    "script before the transaction": (1151, 1153, 5024),
    "script after the transaction": (1152, 1154, 5025),
    "script that verifies": (1079, 1091, 5026),
    "triggers": (1065, 1066, 1067, 1068, 1069, 1092, 5027),
    "files' times": (1034,),
    "flags of the compiler": (1122,),
    "translations": (100,),
}
_NAMES = {tag: name for name, tags in _FIELDS.items() for tag in tags}
_OF_FILES = (1030, 1033, 1035, 1036, 1037, 1039, 1040, 1045, 5008, 1028, 5010)
"""Modes, device numbers, digests, targets of links, flags, owners, groups, what is verified, sizes,
capabilities: a value for each file."""
_PACKING = frozenset((
    *(61, 62, 63, 1009, 1046, 1064, 1124, 1125, 1126, 1132, 5009, 5092, 5093, 5097),  # how it is packed
    *(1027, 1029, 1095, 1096, 1097, 1098, 1116, 1117, 1118, 5011),  # what files are called, and inodes
    *range(1140, 1146),  # what files are, by their contents
    *_OF_FILES,
))  # fmt: skip


def _fields(package: RpmFile) -> Mapping[str, object]:
    header = package.header
    found: dict[str, list[object]] = {}
    for tag in sorted(header.entries.keys() - _PACKING):
        found.setdefault(_NAMES.get(tag, f"tag {tag}"), []).append((tag, header.value(tag)))
    return found


def _files(package: RpmFile) -> Mapping[str, object]:
    header = package.header
    names = header.texts(1027)  # whole paths: source packages', and those of before rpm 4
    if not names:
        directories = header.texts(1118)
        rows = zip(header.numbers(1116), header.texts(1117), strict=False)
        names = tuple(f"{directories[at]}{base}" for at, base in rows if at < len(directories))
    facts = [header.value(tag) for tag in _OF_FILES if tag in header.entries]
    return {
        one_line(name, _LONGEST): [fact[at] if at < len(fact) else None for fact in facts]
        for at, name in enumerate(names)
    }


def _change(when: int, author: str, text: str) -> Change:
    match = _AUTHOR.fullmatch(author.strip())
    assert match  # it takes anything
    with_version = match["version"] and match["author"]
    return Change(
        version=match["version"] if with_version else "",
        author=(match["author"] if with_version else author).strip().rstrip("-").rstrip(),
        when=datetime.fromtimestamp(when, UTC),
        lines=tuple(text.splitlines()),
    )
