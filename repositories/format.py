"""What there is to know of a package format: the one protocol, and the values that it deals in.

A format reads packages, frames their texts as index files, and words what is signed. It opens nothing
but the files it is handed, decides nothing, and knows no pool, generation, channel or lock."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cmp_to_key
from pathlib import Path
from typing import ClassVar, Protocol

from repositories.contents import MemberDifference, names_of
from repositories.package import Change, Package, Reading


@dataclass(frozen=True, slots=True)
class Sum:
    """Of a file: its SHA-256 in hex, and its bytes."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class IndexFile:
    """One index, compressed by gzip in one or several members. ``section``: by the format's name for it.
    ``packed``, ``plain``: of the compressed file, and of what is in it."""

    section: str
    kind: str
    packed: Sum
    plain: Sum


@dataclass(frozen=True, slots=True)
class Release:
    """What a generation's signed file tells. ``sequence``: the generation's number. ``description``: one
    line. ``architectures``, ``components``: deb only, sorted."""

    repository: str
    channel: str
    sequence: int
    date: datetime
    description: str = ""
    components: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundPackage:
    """A package of a repository that others made. ``file``: its path, below the repository's directory.
    ``sha256``: "" where its metadata have none."""

    file: str
    component: str
    sha256: str
    size: int


class Signer(Protocol):
    """Who signs: with all keys in use at once, so that old clients and new ones are content."""

    def detached(self, data: bytes) -> bytes:
        """An armoured detached signature."""

    def clear(self, data: bytes) -> bytes:
        """The text with its signature in one (RFC 9580, 7)."""

    def public(self) -> bytes:
        """The public keys, armoured."""

    def public_binary(self) -> bytes:
        """The same, as keyrings have them."""


@dataclass(frozen=True, slots=True)
class ClientSource:
    """What a client is told. ``url``: of the tree it reads: a channel's, or a generation's. ``mirrors``:
    of the mirror list that pins it; None: it reads ``url`` itself. ``key``: the URL of the public keys;
    None: nothing is signed. ``armour``: the keys themselves."""

    repository: str
    channel: str
    url: str
    mirrors: str | None
    key: str | None
    armour: bytes | None
    components: tuple[str, ...]
    architectures: tuple[str, ...]


class PackageFormat(ABC):
    """A format of packages and of the repository's metadata for them."""

    NAME: ClassVar[str]
    SUFFIX: ClassVar[str]
    """Of packages' files."""
    KINDS: ClassVar[tuple[str, ...]]
    """Of indexes; each section has one of each."""
    TOOLS: ClassVar[Mapping[str, str]] = {}
    """Commands it runs, each with its Debian package."""

    @abstractmethod
    def read(self, path: Path, file: str, sum_: Sum, component: str) -> Reading:
        """Read a package, and prove it whole. ``file``, ``sum_``: what it will be called, and its sum,
        which is known already. Unfit: it is damaged, or no such package, or says something of itself
        that no package manager would take (names, versions, architectures are hostile text)."""

    @abstractmethod
    def compare(self, one: str, other: str) -> int:
        """Two versions as the package manager orders them: negative, 0, positive."""

    @abstractmethod
    def sections(self, package: Package, architectures: Sequence[str]) -> tuple[str, ...]:
        """The sections of the metadata that list it. ``architectures``: the repository's, for packages
        that fit all of them. Empty: the repository has none for it."""

    @abstractmethod
    def all_sections(self, components: Sequence[str], architectures: Sequence[str]) -> tuple[str, ...]:
        """All that a repository has, also where no package is in them; sorted."""

    @abstractmethod
    def frame(self, kind: str, count: int) -> tuple[bytes, bytes]:
        """What stands before and after the texts of a generation of so many packages."""

    @abstractmethod
    def lasting(self, release: Release, index: IndexFile) -> str:
        """Where the index stands under a name made of its content, below the tree; it stays there for a
        grace time when it is superseded."""

    @abstractmethod
    def passing(self, release: Release, index: IndexFile) -> tuple[str, ...]:
        """Where it stands besides, under names that the next generation's has too."""

    @abstractmethod
    def summary(self, release: Release, indexes: Sequence[IndexFile]) -> bytes:
        """The file that names all the others, which is what is signed."""

    @abstractmethod
    def entries(self, release: Release, summary: bytes, signer: Signer | None) -> Mapping[str, bytes]:
        """The summary's files, by their paths below the tree, with their signatures."""

    @abstractmethod
    def signatures(self, release: Release) -> tuple[str, ...]:
        """Of the paths of ``entries``, those that must verify: a clear-signed file by itself, a
        detached one (its name ends in .asc or .gpg) with the file of its name without that."""

    @abstractmethod
    def stanza(self, source: ClientSource) -> str:
        """What is pasted on a client: a deb822 sources file, a .repo file; a comment says where."""

    def links(self, channel: str) -> Mapping[str, str]:
        """Links below the repository's directory that lead to a channel by the format's usual names,
        with what they lead to. They are made once."""
        del channel
        return {}

    @abstractmethod
    def compared(self, one: Path, other: Path) -> tuple[MemberDifference, ...]:
        """The members, files and fields in which two packages differ; empty: only in how they are
        packed, or signed. Unfit: one of them is damaged."""

    def differing(self, one: Path, other: Path) -> tuple[str, ...]:
        """Their names alone."""
        return names_of(self.compared(one, other))

    @abstractmethod
    def changelog(self, path: Path) -> tuple[Change, ...]:
        """A package's changelog, newest first; empty if it has none."""

    @abstractmethod
    def published(self, top: Path) -> Iterator[FoundPackage]:
        """The packages of a repository that others made, by its own metadata. NotFound: there is none of
        this format in ``top``. Unfit: its metadata are damaged, or lead out of ``top``."""


def newest_first(fmt: PackageFormat, packages: Iterable[Package]) -> list[Package]:
    def order(one: Package, other: Package) -> int:
        return fmt.compare(one.version, other.version)

    return sorted(packages, key=cmp_to_key(order), reverse=True)
