"""A repository, to be read. What changes it is in ``repositories.change``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from host.documents import Malformed, damaged, json_object, made, read_file
from host.files import matching, own_directory, sweep, sync, write_atomic
from inventory.errors import Call, NotFound, UnknownName, WrongState, some
from repositories.chunks import ChunkRef, Chunks
from repositories.flows.flow import Flows
from repositories.format import PackageFormat
from repositories.formats import package_format
from repositories.generation import (
    Documents,
    Generation,
)
from repositories.layout import Layout
from repositories.package import Package
from repositories.render import IndexRenderer
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


_PRIVATE = (
    "generations", "logs", "chunks", "readings", "rendered", "leases", "flows", "keys", "trash",
    "staging",
)  # fmt: skip


class Repository:
    """One, whether it is there yet or not. Reading takes no lock: what is read never changes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = settings.name
        self.layout = Layout(settings.top)
        self.format: PackageFormat = package_format(settings.format)
        self.chunks = Chunks(self.layout)
        self.documents = Documents(self.layout)
        self.flows = Flows(self.layout, settings.name)
        self._made = False

    # -- reading -------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Also where only parts of it are left."""
        return self.layout.private.is_dir()

    def all_channels(self) -> tuple[str, ...]:
        """Those declared, and those that were once and were not dropped."""
        directories = (self.layout.top / "channels", self.layout.top / "published")
        names = (path.name for directory in directories for path in matching(directory, "[!.]*"))
        found = (name for name in names if not name.endswith(".mirrors"))
        return tuple(dict.fromkeys((*self.settings.channels, *found)))

    def check_channel(self, channel: str) -> None:
        """UnknownName if the farm file doesn't name it."""
        if channel not in self.settings.channels:
            raise UnknownName(
                f"repository {self.name} has no channel {channel}: it has {some(self.settings.channels)}"
            )

    def head(self, channel: str) -> Generation | None:
        """The generation that the channel points to; None: nothing was ever published."""
        self.check_channel(channel)
        sequence = self.documents.head(channel)
        return self.documents.read(sequence) if sequence else None

    def generation(self, which: str) -> Generation:
        """A generation by its number, or a channel's present one by its name. NotFound."""
        if re.fullmatch("[0-9]{1,18}", which):
            return self.documents.read(int(which))
        found = self.head(which)
        if found is None:
            raise NotFound(
                f"nothing was published in {self.name}'s channel {which} yet",
                remedy=Call("repo-add", repo=self.name, channel=which, path="FILE"),
            )
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

    def signing_keys(self, generation: Generation) -> bytes | None:
        """The public keys that it is signed by, armoured; None: it isn't signed. WrongState: they are
        damaged, or gone."""
        if not generation.keys:
            return None
        path, binary = self.layout.known_key(generation.keys)
        try:
            if hashlib.sha256(binary.read_bytes()).hexdigest() != generation.keys:
                raise Malformed("its bytes are not those that it is named by")
            return path.read_bytes()
        except (OSError, Malformed) as error:
            remedy = "put it back from a backup or a mirror, or publish again"
            raise damaged(binary, "the keys of a generation", error, remedy) from error

    def renderer(self, architectures: Sequence[str], before: Sequence[ChunkRef]) -> IndexRenderer:
        return IndexRenderer(self.layout, self.format, self.chunks, architectures, before)

    # -- changing ------------------------------------------------------------------------------------

    def staging(self) -> Staging:
        """For packages on their way in. The repository is made if it is not there."""
        self.make()
        return Staging(self.layout, self.format)

    def make(self) -> None:
        """Make what is missing, durably; WrongState if something else is there. It is looked at once."""
        layout = self.layout
        if self._made and layout.description.exists():
            return
        public = layout.pool, layout.trees, layout.top / "channels", layout.top / "published"
        private = (layout.private / name for name in _PRIVATE)
        fresh = not layout.description.exists()
        own_directory(layout.top, mode=0o755)
        for path in public:
            own_directory(path, mode=0o755)
        for path in (layout.private, *private):
            own_directory(path, mode=0o700)
        self._check_one_file_system(layout.private, *public)
        if fresh:
            for path in (layout.private, layout.top):
                sync(path)
            with contextlib.suppress(OSError):  # that one need not be ours to read
                sync(layout.top.parent)
        ours = _Description(self.settings.format, self.name)
        try:
            found = made(_Description, json_object(read_file(layout.description)))
        except FileNotFoundError:
            sweep(layout.private, layout.description.name)  # of one that was killed right here
            text = json.dumps({"format": ours.format, "name": ours.name}).encode()
            write_atomic(layout.description, text, mode=0o600)
            found = ours
        except (OSError, Malformed) as error:
            remedy = "remove it: it is made anew; nothing is lost"
            raise damaged(layout.description, "what the repository is", error, remedy) from error
        if found != ours:
            raise WrongState(
                f"{layout.top} is {found.name}, a repository of {found.format} packages, "
                f"not {ours.name} ({ours.format})",
                remedy="give each repository of the farm file a 'path' of its own",
            )
        self._made = True

    def _check_one_file_system(self, private: Path, *others: Path) -> None:
        """WrongState: what is made in one directory could not be renamed, or linked, into another."""
        for other in others:
            if other.stat().st_dev != private.stat().st_dev:
                raise WrongState(
                    f"{other} is on another file system than {private}: a repository is on one",
                    remedy=f"mount one over {self.layout.top}, or give it another 'path'",
                )
