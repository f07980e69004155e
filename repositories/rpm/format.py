"""Binary and source rpm packages, and rpm-md repositories of them, which dnf, zypper and others read.

What a package says of itself is read, and worded as metadata, by createrepo_c's library; whether it is
whole is looked at before (``repositories.rpm.file``). Of the library, PyPI's wheel is taken: it is one
version on all machines, reads zstd, which Fedora's metadata are compressed by, and costs 20 ms where it
is used, and nothing elsewhere. Debian 12's (0.17.3) reads no zstd, and is bound to Debian's Python."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from xml.parsers.expat import ExpatError, ParserCreate

from host.files import file_error
from host.printable import one_line
from inventory.errors import Unfit
from repositories.contents import MemberDifference
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
from repositories.rpm.file import RpmFile, RpmHeader, packets, read_rpm
from repositories.rpm.published import REPOMD, published
from repositories.rpm.tags import TOLD, changelog, compared
from repositories.signing.armour import SIGNATURE, armoured, plain

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
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]{1,30}", re.A)
_SOURCE = re.compile(r"(.+)-[^-]+-[^-]+\.(?:no)?src\.rpm")

_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_TEXT = 2**20
"""Characters. libxml2 ends at ten million."""

_RUN = re.compile(r"[0-9]+|[A-Za-z]+|~|\^", re.A)
_END = (1, 0, "")


class RpmFormat(PackageFormat):
    """A version in ``Package`` is EPOCH:VERSION-RELEASE, an epoch of 0 left out; a source package's
    architecture is src.

    Clients that pin by the mirror list never fail while generations come and go, on any web server, with
    signatures or without; nor do those of a plain URL without signatures. With signatures a plain URL is
    two requests, repomd.xml and repomd.xml.asc, and no file in the second one's place is right for who
    got the first before a publish and for who got it after. Several signatures in it aren't, whether in
    one block or in several: gpg, by which dnf verifies, ends at the first that is wrong (mainproc.c,
    ``opt.batch && rc``), and newer ones take no file with several. Our own server pairs them
    (``repositories.serving.pairs``). What holds on others: where the two don't fit, dnf fetches both
    again, at once, and once. So it fails, and uses nothing, only where a publish came between them both
    times; where it hasn't the repository's keys yet, fetching these takes one of its two tries."""

    NAME: ClassVar[str] = "rpm"
    SUFFIX: ClassVar[str] = ".rpm"
    KINDS: ClassVar[tuple[str, ...]] = tuple(_ROOTS)

    def read(self, path: Path, file: str, sum_: Sum, component: str) -> Reading:  # noqa: ARG002 - deb's
        found = read_rpm(path, file)
        name, version, architecture = _identity(found.header, file)
        _check_texts(found.header, file)
        library = _createrepo_c()
        try:
            package = _described(library, found, place(sum_.sha256, file), sum_)
            texts = dict(zip(self.KINDS, library.xml_dump(package), strict=True))
            for text in texts.values():
                ParserCreate().Parse(f"<a>{text}</a>", True)
        except (library.CreaterepoCError, OSError, ExpatError) as error:
            if isinstance(error, OSError) and error.errno:  # the library's own have none
                raise file_error(error, path, "read") from error
            raise Unfit(
                f"{file} is no package that dnf would take: {one_line(str(error), _LONGEST)}"
            ) from None
        if (package.name, package.arch) != (name, architecture):
            raise Unfit(f"{file} is damaged: its header has two names or architectures")
        source = _SOURCE.fullmatch(found.header.text(1044))
        return Reading(
            name=name,
            version=version,
            architecture=architecture,
            source=source[1] if source else name,
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

    def compared(self, one: Path, other: Path) -> tuple[MemberDifference, ...]:
        """How the payload is compressed, and who signed, is no difference."""
        return compared(*(read_rpm(path, path.name, whole=False).header for path in (one, other)))

    def changelog(self, path: Path) -> tuple[Change, ...]:
        return changelog(read_rpm(path, path.name, whole=False).header)

    def published(self, top: Path) -> Iterator[FoundPackage]:
        return published(top)


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


def _identity(header: RpmHeader, file: str) -> tuple[str, str, str]:
    """Name, version, architecture. Unfit: one is none."""
    name, version, release = (header.text(tag) for tag in (1000, 1001, 1002))
    # What has no source package is one (headerIsSource)
    architecture = header.text(1022) if header.text(1044) else "src"
    for what, value, pattern in (
        ("name", name, _NAME),
        ("version", version, _VERSION),
        ("release", release, _VERSION),
        ("architecture", architecture, _ARCHITECTURE),
    ):
        if not pattern.fullmatch(value):
            raise Unfit(
                f"{file}: {one_line(repr(value), 60)} is no {what} of a package",
                remedy="build it with rpmbuild, which refuses such ones",
            )
    epoch = next(iter(header.numbers(1003)), 0)
    return name, f"{f'{epoch}:' if epoch else ''}{version}-{release}", architecture


def _check_texts(header: RpmHeader, file: str) -> None:
    """Unfit: what XML doesn't take, or libxml2. Such a package would break the whole repository for its
    clients."""
    for field, tags in TOLD.items():
        for text in (text for tag in tags for text in header.texts(tag)):
            if len(text) > _TEXT or (not text.isprintable() and _UNFIT.search(text)):
                raise Unfit(
                    f"{file}: dnf wouldn't take what it says of its {field}: "
                    + (f"{len(text)} characters" if len(text) > _TEXT else one_line(text, 60))
                )


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
