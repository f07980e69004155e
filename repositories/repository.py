"""A repository, to be read. What changes it is in ``repositories.change``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from host.documents import Malformed, damaged, json_object, made, read_file
from host.files import (
    make_directory,
    own_directory,
    write_atomic,
)
from inventory.errors import NotFound, WrongState, some
from repositories.chunks import Chunks
from repositories.format import PackageFormat
from repositories.formats import package_format
from repositories.generation import (
    Documents,
    Generation,
)
from repositories.layout import Layout
from repositories.package import Package
from repositories.render import Renderer
from repositories.staging import Staging


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of a repository, as the farm file has them. ``grace``: seconds that superseded metadata stay.
    ``versions``: how many versions of a package a new generation lists; None: all. ``signed_packages``:
    whether a package must be signed itself. ``url``: what clients reach ``top`` by, without a slash at
    its end; "" if nobody said."""

    name: str
    format: str
    top: Path
    channels: tuple[str, ...]
    components: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    description: str = ""
    url: str = ""
    grace: float = 3 * 86400
    versions: int | None = None
    signed_packages: bool = False


@dataclass(frozen=True, slots=True)
class _Description:
    format: str
    name: str


class Repository:
    """One, whether it is there yet or not. Reading takes no lock: what is read never changes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.name
        self.layout = Layout(settings.top)
        self.format: PackageFormat = package_format(settings.format)
        self.chunks = Chunks(self.layout)
        self.documents = Documents(self.layout)

    # -- reading -------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        return self.layout.description.exists()

    def all_channels(self) -> tuple[str, ...]:
        """Those declared, and those that were once."""
        found = (p.name for p in (self.layout.top / "channels").iterdir() if p.is_symlink())
        return tuple(dict.fromkeys((*self.settings.channels, *sorted(found))))

    def check_channel(self, channel: str) -> None:
        """NotFound if the farm file doesn't name it."""
        if channel not in self.settings.channels:
            raise NotFound(
                f"repository {self.name} has no channel {channel}: it has {some(self.settings.channels)}"
            )

    def head(self, channel: str) -> Generation | None:
        """The generation that the channel points to; None: nothing was ever published."""
        self.check_channel(channel)
        sequence = self.documents.head(channel)
        return self.documents.read(sequence) if sequence else None

    def generation(self, which: str) -> Generation:
        """A generation by its number, or a channel's present one by its name. NotFound."""
        if which.isascii() and which.isdigit():
            return self.documents.read(int(which))
        found = self.head(which)
        if found is None:
            raise NotFound(f"nothing was published in {self.name}'s channel {which} yet")
        return found

    def packages(self, generation: Generation) -> Iterator[Package]:
        return self.chunks.all(generation.chunks)

    def at(self, channel: str, moment: datetime) -> Generation | None:
        """The generation that the channel pointed to then; None: nothing was published yet. NotFound: it
        is collected."""
        self.check_channel(channel)
        earlier = [entry for entry in self.documents.log(channel) if entry.at <= moment]
        return self.documents.read(earlier[-1].sequence) if earlier else None

    def first_with(self, package: Package) -> Generation | None:
        """The first generation there still is that lists it."""
        for generation in self.documents.all():
            if package in self.chunks.named(generation.chunks, package.name):
                return generation
        return None

    def public_keys(self) -> bytes:
        """All that generations were ever signed by, as gpgv takes them; b"": nothing was signed."""
        return b"".join(path.read_bytes() for path in sorted(self.layout.known_keys.glob("*.gpg")))

    def renderer(self, architectures: Sequence[str]) -> Renderer:
        return Renderer(self.layout, self.format, self.chunks, architectures)

    # -- changing ------------------------------------------------------------------------------------

    def staging(self) -> Staging:
        """For packages on their way in. The repository is made if it is not there."""
        self.make()
        return Staging(self.layout, self.format)

    def make(self) -> None:
        """Make what is missing; WrongState if something else is there."""
        layout = self.layout
        make_directory(layout.top, mode=0o755)
        for path in (layout.pool, layout.trees, layout.top / "channels", layout.top / "published"):
            own_directory(path, mode=0o755)
        own_directory(layout.private, mode=0o700)
        for name in (
            "generations",
            "logs",
            "chunks",
            "readings",
            "rendered",
            "leases",
            "flows",
            "keys",
            "trash",
        ):
            own_directory(layout.private / name, mode=0o700)
        own_directory(layout.staging, mode=0o700)
        ours = _Description(self.settings.format, self.name)
        try:
            found = made(_Description, json_object(read_file(layout.description)))
        except FileNotFoundError:
            text = json.dumps({"format": ours.format, "name": ours.name}).encode()
            write_atomic(layout.description, text, mode=0o600)
            return
        except (OSError, Malformed) as error:
            raise damaged(layout.description, "what the repository is", error, "put it back") from error
        if found != ours:
            raise WrongState(
                f"{layout.top} is {found.name}, a repository of {found.format} packages, "
                f"not {ours.name} ({ours.format})",
                remedy="give each repository of the farm file a 'path' of its own",
            )
