"""What version a package is built as. The law: two different sources never get one version. Pure
functions, but for ``changed``, which reads the file that differs.

Of the records of a package's good builds, the newest first, no more is read than is needed: mostly the
first one tells all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import count
from typing import Literal, TypeAlias

from builds.packages.record import PackageRecord
from builds.packages.source import SourceState
from builds.packages.sources import CHANGELOG, source_files
from builds.packages.spec import with_release
from host.run import Runner
from inventory.errors import Remedy, WrongState
from repositories.deb.changelog import newest
from repositories.package import Package

VersionPolicy: TypeAlias = Literal["keep", "commits", "increment"]
_REBUILT = re.compile(r"(?P<stem>.*)\+b(?P<number>[1-9][0-9]{0,8})")
_NUMBERED = re.compile(r"(?P<stem>.*[+.])(?P<number>[1-9][0-9]{0,8})")
_DIST = r"(?:\.[A-Za-z_][A-Za-z0-9_.~^+]*)?"
"""What %{dist} may add to an rpm's release: .fc40, .el9_3."""
_SHORT = 8


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Why a version can't be given."""

    what: str
    remedy: Remedy


def policy_of(policy: VersionPolicy, state: SourceState) -> VersionPolicy:
    """The one that holds for a source: nothing is changed in a .dsc or .src.rpm, so theirs is kept."""
    return policy if state.repository is not None else "keep"


def ungiven(policy: VersionPolicy, state: SourceState) -> Contradiction | None:
    """Why a policy can't give the source a version; None: it can."""
    policy = policy_of(policy, state)
    if policy != "keep" and not state.stated:
        return Contradiction(
            f"'versions: {policy}' can't append to its Version and Release, which macros or conditions "
            f"in {state.spec} make",
            "write both out there, but for %{?dist}; or give 'versions: keep'",
        )
    if policy == "commits" and not state.commits:
        return Contradiction(
            f"its commits can't be counted: the history of {state.place} is cut off",
            f"git -C {state.repository} fetch --unshallow; or give 'versions: keep'",
        )
    return None


def given(
    policy: VersionPolicy,
    state: SourceState,
    passed: Iterable[PackageRecord],
    used: Collection[str] = (),
) -> str:
    """The version that a source is built as, for the first try. ``passed``: its good builds, the newest
    first. ``used``: versions of it that are elsewhere. What is as it was when it was last built has the
    version that it had then."""
    policy = policy_of(policy, state)
    if policy == "keep":
        return state.stated
    before = []
    for record in passed:
        if not before and record.source.tree == state.tree and record.source.stated == state.stated:
            if _by(policy, state).fullmatch(record.version):
                return record.version
        before.append(record.version)
        if policy == "commits":
            break
    if policy == "commits":
        return f"{state.stated}{_joint(state)}{state.commits}.g{state.commit[:_SHORT]}"
    numbers = (_by(policy, state).fullmatch(version) for version in (*before, *used))
    last = max((int(match["number"]) for match in numbers if match), default=0)
    return f"{state.stated}{_joint(state)}{last + 1}"


def again(policy: VersionPolicy, version: str, used: Collection[str] = ()) -> str | None:
    """The next version for other bytes of the same source, none of those ``used``; None: there is none,
    for the policy keeps it."""
    if policy == "keep":
        return None
    match = (_REBUILT if policy == "commits" else _NUMBERED).fullmatch(version)
    stem, number = (match["stem"], int(match["number"])) if match else (version, 1)
    joint = "+b" if policy == "commits" else "" if match else "+"
    return next(found for n in count(number + 1) if (found := f"{stem}{joint}{n}") not in used)


def contradicted(state: SourceState, passed: Iterable[PackageRecord]) -> Contradiction | None:
    """A good build that had the source's ``given`` version for something else; None: there is none.
    Each was looked at so when it was built: the newest with that version answers for all."""
    for record in passed:
        if not state.given or record.version != state.given:
            continue
        if record.source.tree == state.tree:
            return None
        origin = record.source
        of = f"commit {origin.commit[:10]} ({origin.subject})" if origin.commit else origin.place
        return Contradiction(
            f"version {state.given} is that of build {record.id}, from {of}, whose contents were others",
            _raise(state),
        )
    return None


def elsewhere(
    state: SourceState, published: Iterable[Package], passed: Iterable[PackageRecord], where: str
) -> Contradiction | None:
    """A package that the repository has from another source than this one, under its ``given`` version;
    None: there is none. ``where``: the repository's channel, in words."""
    same = [package for package in published if is_version_of(state, package)]
    if not same:
        return None
    for record in passed:
        if record.version == state.given and record.source.tree == state.tree:
            sums = {file.sha256 for file in record.outputs}
            same = [package for package in same if package.sha256 not in sums]
    if not same:
        return None
    return Contradiction(
        f"version {state.given} is in {where} already, and no build of this source made it: {same[0]}",
        _raise(state),
    )


def is_version_of(state: SourceState, package: Package) -> bool:
    """Whether it may be a binary package of the source, in the version that that is built as."""
    if package.source != source_name(state) or not state.given:
        return False
    if state.format == "deb":
        return package.version == state.given
    return re.fullmatch(re.escape(state.given) + _DIST, package.version) is not None


def source_name(state: SourceState) -> str:
    """What its binary packages say that they are of."""
    return state.control.name if state.control else state.spec.removesuffix(".spec")


def changed(runner: Runner, state: SourceState, version: str) -> SourceState:
    """The source as it is built under that version: ``given``, with the file that differs. WrongState:
    the source can't be read, or has no place for it."""
    if version == state.stated:
        return replace(state, given=version, changes={})
    name = CHANGELOG if state.format == "deb" else state.spec
    data = source_files(runner, state, (name,))[name]
    return replace(state, given=version, changes=changes(state, version, data))


def changes(state: SourceState, version: str, data: bytes) -> Mapping[str, bytes]:
    """The file that differs in what is built, by its path: debian/changelog with an entry in front, or
    the spec with another Release. ``data``: the file as it is."""
    if state.format == "deb":
        return {CHANGELOG: _entry(state, version, data) + data}
    try:
        return {state.spec: with_release(data, version.rpartition("-")[2])}
    except ValueError as error:
        raise WrongState(f"{state.name}: {state.spec}: {error}") from None


def _entry(state: SourceState, version: str, data: bytes) -> bytes:
    """In the words of the newest one, so that it is the same whoever builds it, and when."""
    before = newest(data)
    if before is None:
        raise WrongState(f"{state.name}: its {CHANGELOG} has no entry")
    when = format_datetime(datetime.fromtimestamp(max(state.when, 0), UTC))
    author = before.author or "farmhand <farmhand@localhost>"
    return (
        f"{before.source} ({version}) {before.distributions}; urgency={before.urgency}\n\n"
        f"  * Built by farmhand from {state.commit}.\n\n"
        f" -- {author}  {when}\n\n"
    ).encode()


def _joint(state: SourceState) -> str:
    """What stands between a stated version and what is appended. In both formats the whole sorts after
    the stated one, and by the number; in rpm before a next release, whatever %{dist} comes after it."""
    return "+" if state.format == "deb" else "."


def _by(policy: VersionPolicy, state: SourceState) -> re.Pattern[str]:
    """A version that the policy gave a source with this stated one."""
    begin = re.escape(f"{state.stated}{_joint(state)}")
    if policy == "commits":
        return re.compile(rf"{begin}[1-9][0-9]*\.g[0-9a-f]{{{_SHORT}}}(?:\+b[1-9][0-9]*)?")
    return re.compile(rf"{begin}(?P<number>[1-9][0-9]{{0,8}})")


def _raise(state: SourceState) -> Remedy:
    if state.repository is None:
        return "give it a version of its own, and make the source package again"
    where = "debian/changelog (dch --increment)" if state.format == "deb" else state.spec
    return f"raise the version in {where}; or have one appended: 'build: versions: commits'"
