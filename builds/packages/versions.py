"""What version a package is built as. The law: two different sources never get one version.

Pure functions. Of the keys of a package's good builds, the newest first, no more is taken than is
needed: mostly the first one tells all."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import count
from typing import Literal, TypeAlias

from builds.packages.record import RecordKey
from builds.packages.source import PackageFormatName, SourceState
from builds.packages.spec import with_release
from inventory.errors import Remedy, WrongState
from repositories.deb.changelog import newest
from repositories.package import Package

VersionPolicy: TypeAlias = Literal["keep", "commits", "increment"]
_REBUILT: Mapping[PackageFormatName, str] = {"deb": "+b", "rpm": "."}
"""What stands before the number of the times. rpm takes letters for older than digits, and %{dist}
begins with one."""
_NUMBER = "[1-9][0-9]{0,8}"
_DIST = r"(?:\.[A-Za-z_][A-Za-z0-9_.~^+]*)?"
"""What %{dist} may add to an rpm's release: .fc40, .el9_3."""
_SHORT = 8
_HASH = rf"\.g[0-9a-f]{{{_SHORT}}}"
CHANGELOG = "debian/changelog"


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
    passed: Iterable[RecordKey],
    used: Collection[str] = (),
) -> str:
    """The version that a source is built as, for the first try. ``passed``: its good builds, the newest
    first. ``used``: versions of it that are elsewhere. What is as it was when it was last built has the
    version that it had then."""
    policy = policy_of(policy, state)
    if policy == "keep":
        return state.stated
    before: list[str] = []
    for build in passed:
        same = not before and build.tree == state.tree
        if same and _by(policy, state).fullmatch(build.version):
            return build.version
        before.append(build.version)
        if policy == "commits":
            break
    if policy == "commits":
        return f"{state.stated}{_joint(state)}{state.commits}.g{state.commit[:_SHORT]}"
    numbers = (_by(policy, state).fullmatch(version) for version in (*before, *used))
    last = max((int(match["number"]) for match in numbers if match), default=0)
    return f"{state.stated}{_joint(state)}{last + 1}"


def again(
    policy: VersionPolicy, state: SourceState, version: str, used: Collection[str] = ()
) -> str | None:
    """The next version for other bytes of the same source, none of those ``used``; None: there is none,
    for the policy keeps it."""
    policy = policy_of(policy, state)
    if policy == "keep":
        return None
    match = _by(policy, state).fullmatch(version)
    stem = match["stem"] if match else version
    last = int(match["number"] or 1) if match else 1 if policy == "commits" else 0
    joint = _REBUILT[state.format] if policy == "commits" else _joint(state)
    return next(found for n in count(last + 1) if (found := f"{stem}{joint}{n}") not in used)


def contradicted(state: SourceState, passed: Iterable[RecordKey]) -> RecordKey | None:
    """The good build that had the source's ``given`` version for something else; None: there is none.
    Each was looked at so when it was built: the newest with that version answers for all."""
    same = (build for build in passed if state.given and build.version == state.given)
    found = next(same, None)
    return found if found and found.tree != state.tree else None


def foreign_versions(
    state: SourceState, published: Iterable[Package], passed: Iterable[RecordKey]
) -> tuple[Package, ...]:
    """What a repository has under the source's ``given`` version, made by none of its builds."""
    left = {one.sha256: one for one in published if is_version_of(state, one)}
    if left:
        for build in passed:
            if (build.version, build.tree) == (state.given, state.tree):
                for file in build.packages:
                    left.pop(file.sha256, None)
            if not left:
                break
    return tuple(left.values())


def is_version_of(state: SourceState, package: Package) -> bool:
    """Whether it may be a binary package of the source, in the version that that is built as."""
    if package.source != source_name(state) or not state.given:
        return False
    if state.format == "deb":
        return package.version == state.given
    return re.fullmatch(re.escape(state.given) + _DIST, package.version) is not None


def source_name(state: SourceState) -> str:
    """What its binary packages say that they are of. An rpm's spec is called so, as is the custom."""
    if state.format == "deb":
        return state.control.name if state.control else state.name
    return state.spec.removesuffix(".spec")


def changes(state: SourceState, version: str) -> SourceState:
    """The source as it is built under that version. What differs then is made when it is packed."""
    return replace(state, given=version, changes={})


def changed_file(state: SourceState) -> str:
    """The file that differs in what is built, by its path; "": none does."""
    if state.given == state.stated:
        return ""
    return CHANGELOG if state.format == "deb" else state.spec


def with_version(state: SourceState, data: bytes) -> bytes:
    """That file, with the ``given`` version: debian/changelog with an entry in front, or the spec with
    another Release. ``data``: as it is. WrongState: there is no place for it."""
    if state.format == "deb":
        return _entry(state, data) + data
    try:
        return with_release(data, state.given.rpartition("-")[2])
    except ValueError as error:
        raise WrongState(f"{state.name}: {state.spec}: {error}") from None


def _entry(state: SourceState, data: bytes) -> bytes:
    """In the words of the newest one, so that it is the same whoever builds it, and when."""
    before = newest(data)
    if before is None:
        raise WrongState(f"{state.name}: its {CHANGELOG} has no entry")
    when = format_datetime(datetime.fromtimestamp(max(state.when, 0), UTC))
    author = before.author or "farmhand <farmhand@localhost>"
    return (
        f"{before.source} ({state.given}) {before.distributions}; urgency={before.urgency}\n\n"
        f"  * Built by farmhand from {state.commit}.\n\n"
        f" -- {author}  {when}\n\n"
    ).encode()


def _joint(state: SourceState) -> str:
    """What stands between a stated version and what is appended. In both formats the whole sorts after
    the stated one, and by the number; in rpm before a next release, whatever %{dist} comes after it."""
    return "+" if state.format == "deb" else "."


def _by(policy: VersionPolicy, state: SourceState) -> re.Pattern[str]:
    """A version that the policy gave a source with this stated one. ``number``: of times that other
    bytes were made of it."""
    begin = re.escape(f"{state.stated}{_joint(state)}")
    if policy == "commits":
        joint = re.escape(_REBUILT[state.format])
        return re.compile(rf"(?P<stem>{begin}[1-9][0-9]*{_HASH})(?:{joint}(?P<number>{_NUMBER}))?")
    joint = re.escape(_joint(state))
    return re.compile(rf"(?P<stem>{re.escape(state.stated)}){joint}(?P<number>{_NUMBER})")


def other_version(state: SourceState) -> Remedy:
    """What to do where its version is another's."""
    if state.repository is None:
        return "give it a version of its own, and make the source package again"
    where = "debian/changelog (dch --increment)" if state.format == "deb" else state.spec
    return f"raise the version in {where}; or have one appended: 'build: versions: commits'"
