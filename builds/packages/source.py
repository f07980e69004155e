"""One source package as it is now: what it is called, what it is of, and where its files are.

A value only. ``builds.packages.sources`` reads it; here is what everybody else knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from builds.packages.control import SourceControl
from inventory.packages import PackageSource

PackageFormatName = Literal["deb", "rpm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceState:
    """``name``: the farm's. ``place``: where it is, as messages show it, without passwords. ``tree``:
    what it holds: the git tree id of its directory, or the sha256 of the .dsc or .src.rpm. ``stated``:
    the version that it names itself, with epoch and revision; ``given``: the one that it is built as, by
    the farm's policy. ``when``: seconds since 1970 of its newest changelog entry, so that it is one for
    all commits that have the tree; where that doesn't tell, of the commit. It is SOURCE_DATE_EPOCH.
    ``commits``: how many lead to it; 0: it is not from git, or nobody knows. ``control``: deb only.
    ``spec``: rpm only: the name of its spec file. ``repository``: the git directory on this machine that
    has the commit; None: ``files`` are the source, the .dsc or .src.rpm first."""

    name: str
    format: PackageFormatName
    declared: PackageSource
    place: str
    tree: str
    stated: str
    given: str
    when: int
    asked: str = ""
    commit: str = ""
    subject: str = ""
    commits: int = 0
    path: str = ""
    control: SourceControl | None = None
    spec: str = ""
    repository: Path | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    changes: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the source that differ in what is built, by their paths within it: the policy's changelog
    entry or Release. Never written to where the source is."""
