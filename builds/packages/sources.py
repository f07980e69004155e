"""From a farm to the state of each of its source packages: which commit, what it holds, what it is
called, whether it is deb or rpm.

Repositories of this machine are read at the commit, never from where somebody works. Their ids are known
without starting git, and what is read of a commit is kept: so a thousand packages of which none changed
cost about a second. Nothing is ever written to a source."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from builds.packages.contents import (
    CONTROL,
    PackageContents,
    contents_of_dsc,
    contents_of_srpm,
    contents_of_tree,
    marks_of,
    stat_of,
)
from builds.packages.control import SourceControl, control_of_source
from builds.packages.git_mirror import fetched_mirror, mirror_at
from builds.packages.git_place import GitPlace, git_place, object_named
from builds.packages.git_reader import GitReader
from builds.packages.read_cache import Once, ReadCache
from builds.packages.record import PackageRecords
from builds.packages.source import PackageFormatName, SourceState
from builds.packages.versions import (
    changes,
    given,
    source_name,
    ungiven,
)
from builds.source import (
    Git,
    check_revision,
    commit_of,
    directory_of,
    mask,
    name_of,
    reason_of,
    take_state,
)
from host.file_lock import FileLock
from host.files import file_error, make_directory, matching
from host.printable import one_line
from host.run import Runner
from inventory.errors import (
    FarmhandError,
    NotFound,
    Remedy,
    Unfit,
    UnknownName,
    WrongState,
    did_you_mean,
    some,
)
from inventory.loader import places
from inventory.model import Farm
from inventory.packages import PackageSource
from inventory.reading import resolve
from inventory.values import is_directory, is_plain_name
from provision.package_repositories import opened
from provision.site import Site

_MOST_FILES = 50_000
"""Files of a work tree that are looked at one by one; in a larger one git status is asked each time."""
_FULL = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """Why a source package can't be built. ``package``: "": more than one can't. ``where``: in the farm
    file, ``farm.yaml:42:15``."""

    package: str
    what: str
    where: str
    remedy: Remedy = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.package, self.what)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSources:
    """``states``: by the farm's names, in its order. ``problems``: those of all that could not be read.
    ``revision``: the name given: GIT_REVISION. ``notes``: of what was passed over."""

    states: Mapping[str, SourceState]
    problems: tuple[SourceProblem, ...]
    revision: str
    notes: tuple[str, ...] = ()


def read_sources(site: Site, revision: str | None = None, only: Collection[str] = ()) -> PackageSources:
    """The farm's source packages as they are now, under the versions that they are built as.
    ``revision``: in place of the farm's for all that have none of their own. ``only``: these packages;
    empty: all. With a plan the mirrors of URLs are made anew, and are gone when this returns.

    UnknownName: there is no such package. UsageError: what git can't take for a revision."""
    farm = site.farm
    asked = check_revision(revision or (farm.build.revision if farm.build else "HEAD"))
    notes: list[str] = []
    problems = []
    wanted = {name: _Wanted(name, one, found=False) for name, one in farm.packages.items()}
    try:
        wanted.update((one.name, one) for one in _found(site, notes))
    except FarmhandError as error:
        where = places(farm, [directory_key(farm)])[0]
        problems.append(SourceProblem("", error.message, where, error.remedy))
    for name in only:
        if name not in wanted:
            raise UnknownName(
                f"{farm.path}: no package is called {name!r}",
                remedy=did_you_mean(name, wanted, f"there is {some(wanted) or 'none'}"),
            )
    chosen = [one for one in wanted.values() if not only or one.name in only]
    with tempfile.TemporaryDirectory(prefix="farmhand-") as scratch:
        read, failed = _SourceReading(site, asked, Path(scratch)).all_of(chosen, whole=not only)
    states = dict(_with_versions(site, read, failed))
    for name in [name for name, error in failed.items() if isinstance(error, _PassedOver)]:
        notes.append(f"{name}: {failed.pop(name).message}: passed over")
    spots = (
        places(farm, [wanted[name].spot(farm, error) for name, error in failed.items()])
        if failed
        else ()
    )
    problems += [
        SourceProblem(name, error.message, where, error.remedy)
        for (name, error), where in zip(failed.items(), spots, strict=True)
    ]
    return PackageSources(states=states, problems=tuple(problems), revision=asked, notes=tuple(notes))


def read_source(site: Site, name: str, declared: PackageSource) -> SourceState:
    """One source, whether the farm file has it or not, under the version that it states. Errors: as
    ``PackageSources.problems`` would have them."""
    with tempfile.TemporaryDirectory(prefix="farmhand-") as scratch:
        reading = _SourceReading(site, declared.revision or "HEAD", Path(scratch))
        states, failed = reading.all_of([_Wanted(name, declared, found=False)])
    if failed:
        raise failed[name]
    return states[name]


def _with_versions(
    site: Site, states: Mapping[str, SourceState], failed: dict[str, FarmhandError]
) -> Iterator[tuple[str, SourceState]]:
    """As they are built by the farm's policy. Those that can't be are added to ``failed``."""
    policy = site.farm.build.versions if site.farm.build else "keep"
    if policy == "keep":
        yield from states.items()
        return
    records = PackageRecords(site.paths)
    used = _published_versions(site) if policy == "increment" else {}
    for name, state in states.items():
        if why := ungiven(policy, state):
            failed[name] = _AtKey(("build", "versions"), why.what, remedy=why.remedy)
            continue
        elsewhere = used.get(source_name(state), ())
        yield name, changes(state, given(policy, state, records.passed_keys(name), elsewhere))


def _published_versions(site: Site) -> Mapping[str, set[str]]:
    """What the repository's channel has, by the names of source packages; nothing where it can't be
    read, which ``builds.packages.prepare`` tells."""
    build = site.farm.build
    assert build is not None
    found: dict[str, set[str]] = {}
    with suppress(FarmhandError):
        repository = opened(site.farm, build.repository)
        head = repository.head(build.channel) if repository.exists else None
        for package in repository.packages(head) if head else ():
            found.setdefault(package.source, set()).add(package.version)
    return found


def directory_key(farm: Farm) -> tuple[str, ...]:
    """Where the farm file has the directory of packages."""
    return ("build", "example" if farm.build and farm.build.example else "directory")


class _PassedOver(FarmhandError):
    """What lies in the directory of repositories and is no package."""


class _AtKey(FarmhandError):
    """A problem that another key than the source's must answer for."""

    def __init__(self, key: str | tuple[str, ...], what: str, *, remedy: Remedy = "") -> None:
        """``key``: of the package's section, or a path of the farm's."""
        super().__init__(what, remedy=remedy)
        self.key = key


class _NeedsGit(Exception):
    """It can't be told without starting git, or without reading much."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    name: str
    declared: PackageSource
    found: bool
    """In the directory of repositories."""

    def spot(self, farm: Farm, error: FarmhandError) -> tuple[str, ...]:
        """Where in the farm file it stands."""
        at = error.key if isinstance(error, _AtKey) else ""
        if isinstance(at, tuple):
            return at
        if self.found:
            return directory_key(farm)
        key = next(key for key in ("git", "dsc", "srpm") if getattr(self.declared, key) is not None)
        return ("packages", self.name, at or key)


def _found(site: Site, notes: list[str]) -> Iterator[_Wanted]:
    """The packages in the directory of repositories. FarmhandError: it can't be read."""
    farm = site.farm
    if farm.build is None or farm.build.sources is None:
        return
    top = directory_of(str(farm.build.sources), farm.path.parent)
    try:
        names = sorted(entry.name for entry in os.scandir(top) if entry.is_dir())
    except OSError as error:
        raise file_error(error, top, "read the directory of repositories") from error
    seen = set(farm.packages)
    for name in names:
        shown = name.removesuffix(".git")
        if name.startswith(".") or name in farm.packages:
            continue
        if not is_plain_name(shown) or shown in seen:
            why = "there is another one" if shown in seen else "that is no name of a package"
            notes.append(f"{one_line(name, 80)!r} in {top}: {why}: passed over")
            continue
        seen.add(shown)
        yield _Wanted(shown, PackageSource(git=str(top / name)), found=True)


# ---- What is kept of what was read.


@dataclass(frozen=True, slots=True, kw_only=True)
class _CommitSeen:
    tree: str
    when: int
    subject: str
    commits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _IdSeen:
    """A commit, by the id of what leads to it."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _TreesSeen:
    """The trees right in a tree, by their names."""

    trees: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _StatusSeen:
    """``mark``: of HEAD, the index and all files in it. ``files``: these, with zeros between them."""

    mark: str
    files: str
    changed: tuple[str, ...]
    unknown: str = ""


class _SourceReading:
    """One look at all sources."""

    def __init__(self, site: Site, asked: str, scratch: Path) -> None:
        self._plan = site.plan
        self._runner = site.runner
        self._farm_file = site.farm.path
        self._base = site.farm.path.parent
        self._asked = asked
        self._kept = site.paths.root / "sources"
        self._mirrors = scratch if site.plan else self._kept
        self._cache = ReadCache(self._kept / "read.json")
        self._reader = GitReader(site.runner, scratch / "reader")
        self._once = Once()  # however many packages lie in one repository

    def all_of(
        self, wanted: Sequence[_Wanted], *, whole: bool = False
    ) -> tuple[Mapping[str, SourceState], dict[str, FarmhandError]]:
        """The states, and why there is none of the others; both in the order of ``wanted``. ``whole``:
        they are all that the farm has."""
        found: dict[str, SourceState | FarmhandError] = {}
        slow = []
        for one in wanted:
            try:
                found[one.name] = self._tried(one, git=False)
            except _NeedsGit:
                slow.append(one)
        if slow:
            pool = ThreadPoolExecutor(min((os.cpu_count() or 1) + 2, len(slow)))
            try:
                done = pool.map(partial(self._tried, git=True), slow)
                found.update((one.name, result) for one, result in zip(slow, done, strict=True))
            finally:
                pool.shutdown(cancel_futures=True)
        if not self._plan:
            self._cache.save(whole=whole)
        states, failed = {}, {}
        for one in wanted:
            result = found[one.name]
            if isinstance(result, SourceState):
                states[one.name] = result
            else:
                failed[one.name] = result
        return states, failed

    def _tried(self, one: _Wanted, *, git: bool) -> SourceState | FarmhandError:
        try:
            return self._state(one, git=git)
        except FarmhandError as error:
            return error

    def _state(self, one: _Wanted, *, git: bool) -> SourceState:
        declared = one.declared
        if declared.dsc is not None:
            return self._of_files(one, resolve(self._farm_file, declared.dsc), contents_of_dsc, git=git)
        if declared.srpm is not None:
            return self._of_files(
                one, resolve(self._farm_file, declared.srpm), contents_of_srpm, git=git
            )
        assert declared.git is not None
        if is_directory(declared.git):
            directory = directory_of(declared.git, self._base)
            place = self._once(("place", directory), partial(_place, directory))
            if place is None:
                if one.found and not _looks_like_one(directory):
                    raise _PassedOver(f"{directory} is neither a git repository nor a package")
                _begin(git)
                place = self._once(("states", directory), partial(self._states_of, directory))
            return self._of_git(one, place, str(directory), git=git)
        return self._of_git(one, self._mirror(one, git=git), mask(declared.git), git=git)

    def _known(self, key: str, kind: type[T], make: Callable[[], T], *, git: bool) -> T:
        """What is kept under a key, or made now, and kept. _NeedsGit."""
        found = self._cache.get(key, kind)
        if found is None:
            _begin(git)
            found = self._once(key, make)
            self._cache.put(key, found)
        return found

    # -- Commits.

    def _of_git(self, one: _Wanted, place: GitPlace, shown: str, *, git: bool) -> SourceState:
        revision, path = one.declared.revision or self._asked, one.declared.path or ""
        commit = self._commit(place, revision, shown, git=git)
        shallow = place.shallow
        facts = self._known(
            f"commit:{commit}{' cut off' * shallow}",
            _CommitSeen,
            partial(self._facts, place, commit, shallow),
            git=git,
        )
        tree = facts.tree
        if path:
            trees = self._known(
                f"trees:{tree}", _TreesSeen, partial(self._trees, place, tree), git=git
            ).trees
            if path not in trees:
                raise _AtKey(
                    "path",
                    f"{shown} has no directory {path!r} at {commit[:10]} ({revision})",
                    remedy="'path' is the directory in it that is the package",
                )
            tree = trees[path]
        found = self._known(
            f"package:{tree}{' within' * bool(path)}",
            PackageContents,
            partial(self._package, place, tree, within=bool(path)),
            git=git,
        )
        if found.problem:
            kind = _PassedOver if one.found and not found.format else WrongState
            where = f"{shown}, {path}" if path else shown
            raise kind(f"{where}, at {commit[:10]}: {found.problem}", remedy=found.remedy)
        return _made_state(
            one, found, place=shown, tree=tree, when=found.when or facts.when, asked=revision,
            commit=commit, subject=facts.subject, commits=facts.commits, path=path,
            repository=place.common,
            notes=(*(("its history is cut off here",) if shallow else ()),
                   *self._uncommitted(place, path, git=git)),
        )  # fmt: skip

    def _commit(self, place: GitPlace, revision: str, shown: str, *, git: bool) -> str:
        named = object_named(place, revision)
        if named is not None:
            id_, sure = named
            if sure:
                return id_
            if seen := self._cache.get(f"commit of:{id_}", _IdSeen):
                return seen.id
        _begin(git)
        if named is not None:
            reader = self._reader.of(place.objects, id_)
            if commit := self._once(("peeled", place.objects, id_), lambda: reader.peeled(id_)):
                self._cache.put(f"commit of:{id_}", _IdSeen(id=commit))
                return commit
        return self._once(
            ("revision", place.own, revision),
            lambda: commit_of(Git(self._runner, place.directory), revision, shown)[0],
        )

    def _facts(self, place: GitPlace, commit: str, shallow: bool) -> _CommitSeen:
        reader = self._reader.of(place.objects, commit)
        facts = reader.facts(commit)
        commits = 0 if shallow else reader.count(commit)
        return _CommitSeen(tree=facts.tree, when=facts.when, subject=facts.subject, commits=commits)

    def _trees(self, place: GitPlace, tree: str) -> _TreesSeen:
        return _TreesSeen(trees=self._reader.of(place.objects, tree).directories(tree))

    def _package(self, place: GitPlace, tree: str, *, within: bool) -> PackageContents:
        return contents_of_tree(self._reader.of(place.objects, tree), tree, within=within)

    # -- What isn't committed.

    def _uncommitted(self, place: GitPlace, path: str, *, git: bool) -> Iterator[str]:
        if not place.worktree:
            return
        directory = place.directory
        seen = self._once(("still", directory), partial(self._changes_kept, place))
        if seen is None:
            _begin(git)
            seen = self._once(("status", directory), partial(self._changes, place))
        if seen.unknown:
            yield f"whether {directory} has uncommitted changes is not known: {seen.unknown}"
        count = sum(not path or name.startswith(f"{path}/") for name in seen.changed)
        if count:
            within = f" of {path}" if path else ""
            yield f"{count} uncommitted change{'s' * (count > 1)}{within} in {directory}: not built"

    def _changes_kept(self, place: GitPlace) -> _StatusSeen | None:
        seen = self._cache.get(f"status:{place.directory}", _StatusSeen)
        return seen if seen and seen.mark == _mark(place, seen.files) else None

    def _changes(self, place: GitPlace) -> _StatusSeen:
        git = Git(self._runner, place.directory)
        files = git.ask("ls-files", "-z", ok=(0, 128)).stdout
        mark = _mark(place, files)
        # within submodules git would run what their own configurations name
        status = git.ask(
            "status", "--porcelain", "-z", "--no-renames", "--untracked-files=no",
            "--ignore-submodules=dirty", ok=(0, 128),
        )  # fmt: skip
        if status.status:
            return _StatusSeen(mark="", files="", changed=(), unknown=reason_of(status))
        changed = tuple(line[3:] for line in status.stdout.split("\0") if line)
        seen = _StatusSeen(mark=mark, files=files, changed=changed)
        if files.count("\0") <= _MOST_FILES and "\ufffd" not in files:  # a name that isn't UTF-8
            self._cache.put(f"status:{place.directory}", seen)
        return seen

    # -- Directories that are no repositories.

    def _states_of(self, directory: Path) -> GitPlace:
        """A repository that we keep of a directory's states, the present one committed."""
        sum_ = hashlib.sha256(bytes(directory)).hexdigest()[:12]
        name = f"{name_of(str(directory), self._base)}-{sum_}.git"
        where, kept = self._mirrors / name, self._kept / name
        if self._plan and kept.is_dir():
            shutil.copytree(kept, where)
        make_directory(where.parent, mode=0o700)
        with FileLock(where.with_name(f"{name}.lock")).hold():
            take_state(Runner(), directory, where, directory.name)
        place = git_place(where)
        assert place is not None
        return place

    # -- URLs.

    def _mirror(self, one: _Wanted, *, git: bool) -> GitPlace:
        url, revision = one.declared.git or "", one.declared.revision or self._asked
        sum_ = hashlib.sha256(url.encode()).hexdigest()[:12]
        where = self._mirrors / f"{name_of(url, self._base)}-{sum_}.git"
        place = mirror_at(where)
        if place is not None and _FULL.fullmatch(revision):
            key = f"commit in {where.name}:{revision}"
            if self._cache.get(key, _IdSeen):
                return place
            _begin(git)
            if commit := self._reader.of(place.objects, revision).peeled(revision):
                self._cache.put(key, _IdSeen(id=commit))
                return place
        _begin(git)
        return self._once(("fetched", url), partial(fetched_mirror, url, where))

    # -- Files.

    def _of_files(
        self, one: _Wanted, file: Path, read: Callable[[Path], PackageContents], *, git: bool
    ) -> SourceState:
        key = f"files:{file}"
        found = self._cache.get(key, PackageContents)
        if found is None or found.mark != marks_of(file.parent, found.files):
            _begin(git)
            try:
                found = read(file)
            except OSError as error:
                failed = file_error(error, file, "read the source package")
                raise WrongState(failed.message, remedy=failed.remedy) from error
            except Unfit as error:
                raise WrongState(f"{file}: {error.message}", remedy=error.remedy) from error
            self._cache.put(key, found)
        files = tuple(file.parent / name for name in found.files)
        return _made_state(one, found, place=str(file), tree=found.tree, when=found.when, files=files)


def _begin(git: bool) -> None:
    """_NeedsGit unless what takes its time may be begun."""
    if not git:
        raise _NeedsGit


def _made_state(one: _Wanted, found: PackageContents, **facts: Any) -> SourceState:
    format_: PackageFormatName = "deb" if found.format == "deb" else "rpm"
    if format_ == "rpm" and (one.declared.profiles or one.declared.bootstrap):
        key = "profiles" if one.declared.profiles else "bootstrap"
        raise _AtKey(key, f"'{key}' are for deb, and {facts['place']} is an rpm source")
    control: SourceControl | None = None
    if format_ == "deb":
        control = control_of_source(found.control.encode(), str(facts["place"]))
    return SourceState(
        name=one.name, format=format_, declared=one.declared, stated=found.stated, given=found.stated,
        control=control, spec=found.spec, **facts,
    )  # fmt: skip


def _place(directory: Path) -> GitPlace | None:
    """None: it is no git repository itself."""
    try:
        place = git_place(directory)
        there = place is not None or directory.is_dir()
    except OSError as error:
        failed = file_error(error, directory, "read the repository")
        raise WrongState(failed.message, remedy=failed.remedy) from error
    if not there:
        raise NotFound(
            f"there is no directory {directory}",
            remedy="a path in the farm file is relative to that file, or begins with '/' or '~'",
        )
    return place


def _looks_like_one(directory: Path) -> bool:
    """Whether a directory is a package."""
    return (directory / CONTROL).is_file() or bool(matching(directory, "*.spec"))


def _mark(place: GitPlace, files: str) -> str:
    """What tells whether HEAD, the index and the files of a work tree are as they were."""
    top = str(place.directory)
    found: list[object] = [object_named(place, "HEAD"), stat_of(f"{place.own}/index")]
    found += [stat_of(f"{top}/{name}") for name in files.split("\0") if name]
    return hashlib.sha256(repr(found).encode()).hexdigest()
