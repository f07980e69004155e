"""The section of a package repository."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from inventory.base import Model, at_key, quote

if TYPE_CHECKING:  # for the annotations, which inventory.annotations has evaluated
    from inventory.fields import Bool, ConfigPath, Count, FilePath, Label, Labels, LeaseTime, Line, Names

    ServedBy = str  # "none", or a service that serves them: inventory.annotations

_ADDRESS = re.compile(r"https?://[!-~]+")
_SERVED = re.compile(
    r"(https?)://([A-Za-z0-9.-]+)(?::(\d{1,5}))?((?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*)/?"
)
_FINGERPRINT = re.compile(r"[0-9A-F]{40}")


@dataclass(frozen=True, kw_only=True)
class RepositoryKey(Model):
    """A key that a repository is signed by. No secret is in the farm file: it says where one is."""

    fingerprint: Line
    """The primary key's: 40 digits of 0-9 and A-F, as `gpg --list-keys` shows it."""
    home: FilePath | None = None
    """The GNUPGHOME that has its secret part; relative to the farm file, or beginning with `~`."""
    file: FilePath | None = None
    """In place of `home`: a file of it, from `gpg --export-secret-keys`, that nobody else may read."""
    passphrase_file: FilePath | None = None
    """A file whose first line is its passphrase, that nobody else may read; absent: it has none."""

    def __post_init__(self) -> None:
        if not _FINGERPRINT.fullmatch(self.fingerprint):
            raise at_key("fingerprint", f"{quote(self.fingerprint)} is not 40 digits of 0-9 and A-F")
        if (self.home is None) == (self.file is None):
            raise at_key("", "a key's secret part is in its 'home' or its 'file', one of them", "home")


@dataclass(frozen=True, kw_only=True)
class PromotionRule(Model):
    """When a channel gets what another has, by itself: the newest generation that the rule fits.
    `repo-queue` follows the rules."""

    KEYS: ClassVar = {"source": "from"}

    source: Label
    """The channel that it comes from."""
    to: Label
    """The channel that gets it."""
    after: LeaseTime | None = None
    """How long ago it must have come to the other channel."""
    tested: Bool = False
    """Whether a build must have passed that used exactly this generation (a step `use`)."""

    def __post_init__(self) -> None:
        if self.after is None and not self.tested:
            raise at_key("", "a rule says 'after', 'tested', or both", "after", "tested")
        if self.source == self.to:
            raise at_key("to", "a channel has its own packages already", "from")


@dataclass(frozen=True, kw_only=True)
class PackageRepository(Model):
    """A repository of packages, with channels that each point to one of its generations."""

    format: Literal["deb", "rpm"]
    """What packages are in it."""
    path: ConfigPath | None = None
    """Its directory; absent: `repositories/FARM/NAME` in farmhand's state directory."""
    url: Line | None = None
    """What clients reach the directory by, such as `http://packages.example/kata`."""
    serve: ServedBy = "none"
    """Which service, of `services`, serves it at its `url`."""
    certificate: ConfigPath | None = None
    """Served, at an https `url`: the certificate's file with its chain."""
    key: ConfigPath | None = None
    """Served, at an https `url`: the private key's file; absent: it is in the certificate's."""
    channels: Labels = ("experimental", "tested", "released")
    """Its channels."""
    components: Labels = ("main",)
    """deb only: the components of its metadata."""
    architectures: Names = ()
    """deb only: what its metadata are made for; absent: what its packages are of."""
    description: Line | None = None
    """What it is, in its metadata."""
    signing: tuple[RepositoryKey, ...] = ()
    """What its metadata are signed by; absent: by nothing. Two keys sign side by side, while clients
    change from one to the other."""
    signed_packages: Bool = False
    """rpm only: packages that are not signed themselves are refused."""
    incoming: ConfigPath | None = None
    """A directory with a directory for each channel that takes uploads, such as `experimental/`: what is
    complete there goes in, what is refused to `rejected/` (`repo-queue`)."""
    uploaders: FilePath | None = None
    """Public keys of those who may upload (`gpg --export`): then each upload has a `.changes` file that
    one of them signed. deb only. Absent: whoever may write there."""
    promotions: tuple[PromotionRule, ...] = ()
    """What moves between channels by itself."""
    versions: Count | None = None
    """How many versions of a package a new generation lists; absent: all that were added."""
    retest: Bool = True
    """Whether a flow that passed is tested again where its channel moved meanwhile."""
    keep: Count = 10
    """How many generations of a channel stay."""
    keep_for: LeaseTime = 2592000
    """How long each generation stays, whatever their number."""
    grace: LeaseTime = 259200
    """How long clients that have just read metadata may still get what those name."""

    def __post_init__(self) -> None:
        if self.url is not None and not _ADDRESS.fullmatch(self.url):
            raise at_key("url", f"{quote(self.url)} is not an http or https address")
        if self.serve != "none":
            if self.url is None or not _SERVED.fullmatch(self.url):
                text = f"{self.serve} needs a 'url' such as http://packages.example.org/kata"
                raise at_key("serve", text, "url")
            if self.url.startswith("https:") != (self.certificate is not None):
                raise at_key("url", "https and 'certificate' go together", "certificate")
        elif self.certificate is not None:
            raise at_key("certificate", "'certificate' is for what 'serve' names", "serve")
        if self.key is not None and self.certificate is None:
            raise at_key("key", "a key without 'certificate'", "certificate")
        if self.format == "rpm" and self.components != ("main",):
            raise at_key("components", "'components' are for deb", "format")
        if self.format == "rpm" and self.architectures:
            raise at_key("architectures", "'architectures' are for deb", "format")
        if self.format == "deb" and self.signed_packages:
            raise at_key("signed_packages", "deb packages are not signed: their metadata are", "format")
        if self.format == "rpm" and self.uploaders:
            raise at_key("uploaders", "'uploaders' sign .changes files, which rpm has none of", "format")
        if self.incoming and "rejected" in self.channels:
            text = "'rejected' is what uploads are moved to that are refused, and can't be a channel"
            raise at_key("channels", text, "incoming")
        if self.uploaders and not self.incoming:
            raise at_key("uploaders", "'uploaders' are for 'incoming'", "incoming")
        for rule in self.promotions:
            for channel in (rule.source, rule.to):
                if channel not in self.channels:
                    raise at_key("promotions", f"no channel is called {quote(channel)}", "channels")
        if not self.channels:
            raise at_key("channels", "a repository has a channel at least")
        if number := next(filter(str.isdecimal, self.channels), None):
            text = f"{quote(number)} is a generation's number: a channel's name has a letter"
            raise at_key("channels", text)
        if len(self.signing) > 2:
            raise at_key("signing", "one key signs, or two while clients change to the other")
        if not self.components:
            raise at_key("components", "a deb repository has a component at least")

    @property
    def served(self) -> Served:
        """Where it is served. Only where something serves it."""
        match = _SERVED.fullmatch(self.url or "")
        assert match
        scheme, host, port, path = match.groups()
        return Served(scheme == "https", host.lower(), int(port) if port else None, path)


class Served(NamedTuple):
    """A URL's parts. ``port``: None, the scheme's own. ``path``: without a slash at its end."""

    tls: bool
    host: str
    port: int | None
    path: str
