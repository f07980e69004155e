"""The sections of package builds: the packages of a farm, and how they are built."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote, urlsplit

from inventory.base import EXAMPLES, Model, at_key, quote

if TYPE_CHECKING:  # for the annotations, which inventory.annotations has evaluated
    from inventory.fields import (
        Bool,
        Count,
        FilePath,
        GitSource,
        Label,
        Labels,
        Line,
        Lines,
        Name,
        Revision,
        Seconds,
        Size,
    )

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_+~][A-Za-z0-9_+~.-]{0,254}")
_ADDRESS = re.compile(r"https?://[!-~]+")


@dataclass(frozen=True, kw_only=True)
class Download(Model):
    """A file that a package's build needs and its source hasn't got. It is fetched here, checked, kept
    in a cache, and lies in `$DOWNLOADS` in the builder VM, which has no network while it builds."""

    url: Line
    """Where it is: http or https, without a login in it."""
    sha256: Line
    """What it must be: 64 digits of 0-9 and a-f."""

    def __post_init__(self) -> None:
        if not _ADDRESS.fullmatch(self.url) or "@" in self.url.split("/")[2]:
            raise at_key("url", f"{quote(self.url)} is not an http or https address without a login")
        if not self.name:
            raise at_key("url", f"{quote(self.url)} names no file")
        if not _SHA256.fullmatch(self.sha256):
            raise at_key("sha256", f"{quote(self.sha256)} is not 64 digits of 0-9 and a-f")

    @property
    def name(self) -> str:
        """The file's name in `$DOWNLOADS`; "" if the address names none."""
        name = unquote(urlsplit(self.url).path).rpartition("/")[2]
        return name if _NAME.fullmatch(name) else ""


@dataclass(frozen=True, kw_only=True)
class PackageSource(Model):
    """A source package."""

    git: GitSource | None = None
    """A git URL that this machine reaches, or a directory (relative to the farm file, or beginning with
    `~`), which is built as it is now if it is not a git repository by itself: farmhand keeps one of its
    states, outside the directory. Whether it is deb or rpm is found by looking: `debian/control`, or
    one `.spec` file."""
    path: Name | None = None
    """The directory in it that is the package; absent: its top."""
    revision: Revision | None = None
    """gitrevisions(7); absent: that of `build`, or of `--revision`."""
    dsc: FilePath | None = None
    """In place of `git`: a Debian source package's `.dsc` file, with what it names beside it."""
    srpm: FilePath | None = None
    """In place of `git`: a `.src.rpm` file."""
    profiles: Labels = ()
    """deb only: build profiles, such as `nocheck`."""
    bootstrap: Labels = ()
    """deb in git only: build profiles with which it is built first, where it is in a loop. That build's
    version ends in them: `1.0-1~stage1`."""
    options: Lines = ()
    """deb: words of DEB_BUILD_OPTIONS, such as `nocheck`; rpm: options of rpmbuild, such as
    `--without=tests`."""
    downloads: tuple[Download, ...] = ()
    """Files that its build needs beside its source."""
    timeout: Seconds | None = None
    """How long its build may take; absent: as `build` has it."""
    memory: Size | None = None
    """How much memory its build may use; absent: what the builder VM has."""
    disk: Size | None = None
    """How large a file of its build may become; absent: any size."""

    def __post_init__(self) -> None:
        places = [key for key in ("git", "dsc", "srpm") if getattr(self, key) is not None]
        if len(places) != 1:
            raise at_key("", "a package has one of 'git', 'dsc' and 'srpm'", "git", "dsc", "srpm")
        if self.git is None and (self.path is not None or self.revision is not None):
            key = "path" if self.path is not None else "revision"
            raise at_key(key, f"'{key}' is for 'git'", "git")
        if self.bootstrap and self.git is None:
            text = "'bootstrap' is for 'git': what is built first has a version of its own"
            raise at_key("bootstrap", text, "dsc", "srpm")
        if self.srpm is not None and (self.profiles or self.bootstrap):
            key = "profiles" if self.profiles else "bootstrap"
            raise at_key(key, f"'{key}' are for deb: a .src.rpm has 'options'", "srpm")


@dataclass(frozen=True, kw_only=True)
class ClonedBuilders(Model):
    """VMs `builder1`, `builder2` and so on, as if `vms` had them. One that it has is as it says
    there."""

    count: Count
    """How many."""
    like: Label
    """The VM of `vms` that they are like, but for what is each VM's own: aliases, addresses,
    MAC address, ports and proxy names. Their host names are FARM-builder1 and so on."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"builder{number}" for number in range(1, self.count + 1))


@dataclass(frozen=True, kw_only=True)
class PackageBuilds(Model):
    """How the farm's packages are built."""

    builders: Labels = ()
    """VMs that build, side by side. Each package gets one that was just reset."""
    cloned: ClonedBuilders | None = None
    """In place of `builders`, or beside them: VMs that are made for it."""
    to: Label = "clean"
    """The checkpoint that they are reset to."""
    repository: Label
    """The package repository that what was built goes to, and that dependencies come from."""
    channel: Label = "experimental"
    """Its channel: builds begin with what that has, and it gets what they made."""
    directory: FilePath | None = None
    """A directory of git repositories, each a package of its directory's name, beside those of
    `packages`. What is a package and no repository in it is built as it is now."""
    example: Literal["deb", "rpm"] | None = None
    """In place of `directory`: packages that come with farmhand, from the `examples/packages/` beside
    its program, wherever the farm file lies."""
    revision: Revision = "HEAD"
    """What is built of git repositories; `--revision` overrides it. In a build it is GIT_REVISION."""
    versions: Literal["keep", "commits", "increment"] = "keep"
    """What becomes of the version that a source names. keep: it stays, and other contents under it are
    refused. commits: the number of commits and the commit are appended. increment: a number is, one more
    than the last one's."""
    tool: Literal["dpkg-buildpackage", "sbuild"] = "dpkg-buildpackage"
    """What builds deb packages."""
    user: Name = "farmhand-build"
    """The login in the VM that builds, made where it is missing; not root."""
    timeout: Seconds = 3600
    """How long a package's build may take."""
    retries: Count = 2
    """How often a build that failed for the infrastructure is tried again, on another builder where
    there is one."""
    outside: Bool = True
    """Whether dependencies may be installed from elsewhere than the repository: from the VM's own
    package sources. What is installed in the VM counts in any case."""
    publish: Bool = True
    """Whether the channel gets what was built, when all of it passed."""

    def __post_init__(self) -> None:
        if not self.builders and self.cloned is None:
            raise at_key("", "one VM builds at least: 'builders', or 'cloned'", "builders", "cloned")
        if self.user == "root":
            raise at_key("user", f"packages are not built by {quote('root')}")
        if self.directory is not None and self.example is not None:
            raise at_key("example", "'directory' or 'example', not both", "directory")

    @property
    def sources(self) -> Path | None:
        """The directory of source packages, whichever of the two says so; as it stands there."""
        return EXAMPLES / "packages" / self.example if self.example else self.directory

    @property
    def all_builders(self) -> tuple[str, ...]:
        """Each once."""
        return tuple(dict.fromkeys((*self.builders, *(self.cloned.names if self.cloned else ()))))
