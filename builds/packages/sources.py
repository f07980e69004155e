"""From a farm to the state of each of its source packages: which commit, what it holds, what it is
called, whether it is deb or rpm.

Repositories of this machine are read at the commit, never from where somebody works. Their ids are known
without starting git, and what is read of a commit is kept: so a thousand packages of which none changed
cost about a second. Nothing is ever written to a source."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from builds.packages.control import SourceControl, control_of_source
from builds.packages.git_place import GitPlace, git_place, object_named
from builds.packages.git_reader import GitReader, ObjectReader, TreeEntry
from builds.packages.read_cache import Once, ReadCache
from builds.packages.record import PackageRecords
from builds.packages.source import PackageFormatName, SourceState
from builds.packages.spec import spec_of
from builds.packages.versions import (
    CHANGELOG,
    changed_file,
    changes,
    given,
    source_name,
    ungiven,
    with_version,
)
from builds.source import (
    GIT,
    LONG,
    Git,
    check_revision,
    commit_of,
    directory_of,
    mask,
    name_of,
    pointers,
    reason_of,
    secret_of,
    take_state,
)
from host.file_lock import FileLock
from host.files import file_error, make_directory, matching, remove
from host.printable import one_line
from host.run import Runner
from inventory.errors import (
    CommandFailed,
    FarmhandError,
    NotFound,
    Remedy,
    TimedOut,
    Unfit,
    WrongState,
    did_you_mean,
    some,
)
from inventory.loader import places
from inventory.packages import PackageSource
from inventory.reading import resolve
from inventory.values import is_directory, is_plain_name
from provision.git import reading
from provision.package_repositories import opened
from provision.site import Site
from repositories.deb.changelog import newest
from repositories.deb.changes import MOST as MOST_OF_DSC
from repositories.deb.control import is_version
from repositories.deb.dsc import (
    check_files,
    open_source_file,
    packaging,
    source_of,
)
from repositories.rpm.file import read_rpm
from repositories.signing.armour import unsigned

_FEW = 5
_MOST = 4 * 2**20
"""Bytes of a control file or spec."""
_MOST_OF_CHANGELOG = 32 * 2**20
_MOST_FILES = 50_000
"""Files of a work tree that are looked at one by one; in a larger one git status is asked each time."""
_CONTROL = "debian/control"
_FULL = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_QUIET = {"GIT_TERMINAL_PROMPT": "0", "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=10"}
# What stands still is given up; nothing goes on behind our back.
_FETCHING = {"http.lowSpeedLimit": "1000", "http.lowSpeedTime": "30", "gc.autoDetach": "false"}
_SPEC_FILE = 1 << 5  # rpmfiles.h, RPMFILE_SPECFILE
_VERSION, _RELEASE, _EPOCH, _BUILT, _SOURCE_RPM = 1001, 1002, 1003, 1006, 1044
_FLAGS, _WHEN, _IS_SOURCE, _BASES = 1037, 1080, 1106, 1117
_MIRRORED_HEAD = "refs/farmhand/head"

T = TypeVar("T")
TOP = "source"
"""The one directory of what is packed."""


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

    NotFound: there is no such package. UsageError: what git can't take for a revision."""
    farm = site.farm
    asked = check_revision(revision or (farm.build.revision if farm.build else "HEAD"))
    notes: list[str] = []
    problems = []
    wanted = {name: _Wanted(name, one, found=False) for name, one in farm.packages.items()}
    try:
        wanted.update((one.name, one) for one in _found(site, notes))
    except FarmhandError as error:
        where = places(farm, [("build", "directory")])[0]
        problems.append(SourceProblem("", error.message, where, error.remedy))
    for name in only:
        if name not in wanted:
            raise NotFound(
                f"{farm.path}: no package is called {name!r}",
                remedy=did_you_mean(name, wanted, f"there is {some(wanted) or 'none'}"),
            )
    chosen = [one for one in wanted.values() if not only or one.name in only]
    with tempfile.TemporaryDirectory(prefix="farmhand-") as scratch:
        read, failed = _SourceReading(site, asked, Path(scratch)).all_of(chosen, whole=not only)
    states = dict(_with_versions(site, read, failed))
    for name in [name for name, error in failed.items() if isinstance(error, _PassedOver)]:
        notes.append(f"{name}: {failed.pop(name).message}: passed over")
    spots = places(farm, [wanted[name].spot(error) for name, error in failed.items()]) if failed else ()
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
    """What the repository's channel has, by the names of source packages."""
    build = site.farm.build
    assert build is not None
    found: dict[str, set[str]] = {}
    repository = opened(site.farm, build.repository)
    head = repository.head(build.channel) if repository.exists else None
    for package in repository.packages(head) if head else ():
        found.setdefault(package.source, set()).add(package.version)
    return found


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

    def spot(self, error: FarmhandError) -> tuple[str, ...]:
        """Where in the farm file it stands."""
        at = error.key if isinstance(error, _AtKey) else ""
        if isinstance(at, tuple):
            return at
        if self.found:
            return ("build", "directory")
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
class _PackageSeen:
    """What a package holds. ``format``: deb, rpm, "" where it is neither. ``problem``, ``remedy``: why
    it can't be built. ``files``, ``mark``, ``tree``, ``when``: of a .dsc or .src.rpm alone."""

    format: str = ""
    stated: str = ""
    control: str = ""
    spec: str = ""
    problem: str = ""
    remedy: str = ""
    files: tuple[str, ...] = ()
    mark: str = ""
    tree: str = ""
    when: int = 0


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
            return self._of_files(one, resolve(self._farm_file, declared.dsc), _read_dsc, git=git)
        if declared.srpm is not None:
            return self._of_files(one, resolve(self._farm_file, declared.srpm), _read_srpm, git=git)
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
            _PackageSeen,
            partial(self._package, place, tree, within=bool(path)),
            git=git,
        )
        if found.problem:
            kind = _PassedOver if one.found and not found.format else WrongState
            where = f"{shown}, {path}" if path else shown
            raise kind(f"{where}, at {commit[:10]}: {found.problem}", remedy=found.remedy)
        return _made_state(
            one, found, place=shown, tree=tree, when=facts.when, asked=revision, commit=commit,
            subject=facts.subject, commits=facts.commits, path=path, repository=place.common,
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

    def _package(self, place: GitPlace, tree: str, *, within: bool) -> _PackageSeen:
        return _package_of(self._reader.of(place.objects, tree), tree, within=within)

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
        place = _mirror_at(where)
        if place is not None and _FULL.fullmatch(revision):
            if self._cache.get(f"commit of:{revision}", _IdSeen):
                return place
            _begin(git)
            if self._reader.of(place.objects, revision).peeled(revision):
                return place
        _begin(git)
        return self._once(("fetched", url), partial(self._fetch, url, where))

    def _fetch(self, url: str, where: Path) -> GitPlace:
        """The mirror of a URL, as that is now. WrongState: it can't be asked."""
        make_directory(where.parent, mode=0o700)
        try:
            with FileLock(where.with_name(f"{where.name}.lock")).hold():
                return self._fetch_to(url, where)
        except (CommandFailed, TimedOut) as error:
            raise WrongState(
                f"{mask(url)} is out of reach: {one_line(error.message, 300)}",
                remedy=f"see git ls-remote {shlex.quote(mask(url))}; a 'revision' that is a commit is "
                "not asked for again",
            ) from error

    def _fetch_to(self, url: str, where: Path) -> GitPlace:
        """CommandFailed, TimedOut."""
        runner = Runner(secrets=[secret_of(url)])
        env = {**reading(_FETCHING, protocols=None), **_QUIET}
        head = runner.read(*GIT, "ls-remote", "--", url, "HEAD", env=env, timeout=60).stdout
        if _mirror_at(where) is None:
            remove(where)
            part = where.with_name(f"{where.name}.part")
            remove(part)
            kind = "sha256" if len(head.split("\t", maxsplit=1)[0]) == 64 else "sha1"
            runner.read(*GIT, "init", "-q", "--bare", "--template=", f"--object-format={kind}", part)
            (part / "HEAD").write_text(f"ref: {_MIRRORED_HEAD}\n")
            part.rename(where)
        refs = ["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"]
        if head:
            refs.append(f"+HEAD:{_MIRRORED_HEAD}")
        else:
            runner.read(*GIT, "-C", where, "update-ref", "-d", _MIRRORED_HEAD, env=env)
        runner.read(
            *GIT, "-C", where, "fetch", "-q", "--prune", "--no-tags", "--no-write-fetch-head",
            "--no-recurse-submodules", "--", url, *refs, env=env, timeout=LONG,
        )  # fmt: skip
        place = _mirror_at(where)
        assert place is not None
        return place

    # -- Files.

    def _of_files(
        self, one: _Wanted, file: Path, read: Callable[[Path], _PackageSeen], *, git: bool
    ) -> SourceState:
        key = f"files:{file}"
        found = self._cache.get(key, _PackageSeen)
        if found is None or found.mark != _marks(file.parent, found.files):
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


def _made_state(one: _Wanted, found: _PackageSeen, **facts: Any) -> SourceState:
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
        raise NotFound(f"there is no directory {directory}")
    return place


def _looks_like_one(directory: Path) -> bool:
    """Whether a directory is a package."""
    return (directory / _CONTROL).is_file() or bool(matching(directory, "*.spec"))


def _mirror_at(where: Path) -> GitPlace | None:
    """None: there is none, or it is damaged."""
    try:
        return git_place(where)
    except (WrongState, OSError):
        return None


def _mark(place: GitPlace, files: str) -> str:
    """What tells whether HEAD, the index and the files of a work tree are as they were."""
    top = str(place.directory)
    found: list[object] = [object_named(place, "HEAD"), _of_stat(f"{place.own}/index")]
    found += [_of_stat(f"{top}/{name}") for name in files.split("\0") if name]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _marks(directory: Path, names: Iterable[str]) -> str:
    return repr([_of_stat(f"{directory}/{name}") for name in names])


def _of_stat(path: str) -> tuple[int, ...]:
    try:
        found = os.lstat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


# ---- What a package holds.


def _package_of(reader: ObjectReader, tree: str, *, within: bool) -> _PackageSeen:
    """``within``: it is a directory of a repository, whose .gitattributes may lie above it."""
    entries = {entry.path: entry for entry in reader.entries(tree)}
    specs = [name for name in entries if name.endswith(".spec") and "/" not in name]
    deb = _CONTROL in entries
    if not deb and not specs:
        return _PackageSeen(
            problem="it has neither debian/control nor a spec file",
            remedy="commit one of them; or say with 'path' which directory is the package",
        )
    format_ = "deb" if deb else "rpm"
    try:
        if deb and specs:
            raise Unfit(
                f"it has debian/control and {some(specs)}: is it deb or rpm?",
                remedy="keep one of them in a branch, or in a directory, of its own",
            )
        if len(specs) > 1:
            raise Unfit(
                f"it has {len(specs)} spec files: {some(specs)}",
                remedy="keep each in a directory of its own, and declare it with 'path'",
            )
        _refuse_elsewhere(reader, tree, entries.values(), within=within)
        return _deb(reader, tree, entries) if deb else _rpm(reader, tree, entries[specs[0]])
    except Unfit as error:
        assert isinstance(error.remedy, str)
        return _PackageSeen(format=format_, problem=error.message, remedy=error.remedy)


def _refuse_elsewhere(
    reader: ObjectReader, tree: str, entries: Iterable[TreeEntry], *, within: bool
) -> None:
    """Unfit if what it holds isn't all in it."""
    entries = list(entries)
    if modules := [entry.path for entry in entries if entry.mode == "160000"]:
        raise Unfit(
            f"it has submodules, which the build would not get: {some(modules, _FEW)}",
            remedy="commit what is in them to the repository itself",
        )
    if within or any(entry.path.endswith(".gitattributes") for entry in entries):
        kept = pointers(reader, tree, anyway=within)
        if kept:
            raise Unfit(
                f"it has files kept by Git LFS, which the build would not get: {some(kept, _FEW)}",
                remedy="commit them to the repository itself",
            )


def _deb(reader: ObjectReader, tree: str, entries: Mapping[str, TreeEntry]) -> _PackageSeen:
    if CHANGELOG not in entries:
        raise Unfit("it has no debian/changelog", remedy="make one: dch(1), option --create")
    _check_file(entries[_CONTROL], _MOST)
    _check_file(entries[CHANGELOG], _MOST_OF_CHANGELOG)
    held = reader.files(tree, (_CONTROL, CHANGELOG))
    control = control_of_source(held[_CONTROL], _CONTROL)
    return _PackageSeen(
        format="deb", stated=_stated(held[CHANGELOG], control), control=held[_CONTROL].decode()
    )


def _stated(changelog: bytes, control: SourceControl) -> str:
    entry = newest(changelog)
    if entry is None:
        raise Unfit("its debian/changelog has no entry", remedy="see dpkg-parsechangelog(1)")
    if entry.source != control.name:
        raise Unfit(
            f"its debian/changelog is of {one_line(entry.source, 80)}, and its debian/control of "
            f"{control.name}",
            remedy="give it one name in both",
        )
    if not is_version(entry.version):
        raise Unfit(
            f"its debian/changelog has version {one_line(entry.version, 80)!r}, which Debian's policy "
            "doesn't allow",
            remedy="see deb-version(7)",
        )
    return entry.version


def _rpm(reader: ObjectReader, tree: str, spec: TreeEntry) -> _PackageSeen:
    _check_file(spec, _MOST)
    text = reader.files(tree, (spec.path,))[spec.path].decode(errors="replace")
    return _PackageSeen(format="rpm", stated=spec_of(text).stated, spec=spec.path)


def _check_file(entry: TreeEntry, most: int) -> None:
    if not entry.is_file:
        raise Unfit(f"its {entry.path} is a link, not a file", remedy="commit the file itself")
    if entry.size > most:
        raise Unfit(f"its {entry.path} is larger than {most >> 20} MiB")


def _read_dsc(file: Path) -> _PackageSeen:
    with open_source_file(file, MOST_OF_DSC) as handle:
        data = handle.read()
    source = source_of(unsigned(data))
    names = (file.name, *(listed.name for listed in source.files))
    if len(set(names)) < len(names):
        raise Unfit(f"it lists {file.name} itself")
    mark = _marks(file.parent, names)
    check_files(file.parent, source)
    held = packaging(file.parent, source)
    control = control_of_source(held[_CONTROL], _CONTROL)
    entry = newest(held.get(CHANGELOG, b""))
    if entry is None or entry.when is None:
        raise Unfit("its debian/changelog has no whole entry", remedy="see dpkg-parsechangelog(1)")
    if (control.name, entry.source, entry.version) != (source.source, source.source, source.version):
        raise Unfit(
            f"it is of {source.source} {source.version}, and in it is "
            f"{control.name} {one_line(entry.version, 80)}",
            remedy="build it again: dpkg-source -b",
        )
    return _PackageSeen(
        format="deb", stated=source.version, control=held[_CONTROL].decode(), files=names, mark=mark,
        tree=hashlib.sha256(data).hexdigest(), when=int(entry.when.timestamp()),
    )  # fmt: skip


def _read_srpm(file: Path) -> _PackageSeen:
    mark = _marks(file.parent, (file.name,))
    with open_source_file(file, 2**40) as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    header = read_rpm(file, "it").header
    if _IS_SOURCE not in header.entries and _SOURCE_RPM in header.entries:
        raise Unfit("it is a binary rpm package", remedy="give the .src.rpm that it was built from")
    flags = header.numbers(_FLAGS)
    specs = [name for name, flag in zip(header.texts(_BASES), flags, strict=False) if flag & _SPEC_FILE]
    if len(specs) != 1 or "/" in specs[0]:
        raise Unfit(f"it has {len(specs) or 'no'} spec files, where there should be one")
    version, release = header.text(_VERSION), header.text(_RELEASE)
    epoch = next(iter(header.numbers(_EPOCH)), 0)
    when = next(iter((*header.numbers(_WHEN), *header.numbers(_BUILT))), 0)
    return _PackageSeen(
        format="rpm", stated=f"{f'{epoch}:' if epoch else ''}{version}-{release}", spec=specs[0],
        files=(file.name,), mark=mark, tree=sha256, when=when,
    )  # fmt: skip


# ---- For the builder.


def pack(runner: Runner, state: SourceState, target: Path) -> None:
    """A tar archive with one directory ``source``: the package's tree with its ``given`` version and
    its ``changes``, or the files of the .dsc or .src.rpm. The same state gives the same bytes: names
    sorted, root's, of the state's time; modes 0755 and 0644. Only we may read it. WrongState: the source
    isn't what it was. Unfit: names in it that lead out."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
        part = Path(scratch) / "tar"
        try:
            with tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
                if state.repository is None:
                    _add_files(tar, state)
                else:
                    tree = Path(scratch) / "tree"
                    borrowed = GitReader(runner, Path(scratch) / "reader")
                    reader = borrowed.of(state.repository / "objects", state.tree)
                    reader.archive(state.tree, tree)
                    _add_tree(tar, state, tree, _differing(state, reader))
            part.chmod(0o600)  # the source may be for some eyes only
            part.rename(target)
        except OSError as error:
            raise file_error(error, target, "write") from error


def _differing(state: SourceState, reader: ObjectReader) -> Mapping[str, bytes]:
    """The files that differ, by their paths: those of the state, and the one that has the version."""
    name = changed_file(state)
    if not name or name in state.changes:
        return state.changes
    return {**state.changes, name: with_version(state, reader.files(state.tree, (name,))[name])}


def _add_tree(
    tar: tarfile.TarFile, state: SourceState, tree: Path, differing: Mapping[str, bytes]
) -> None:
    left = dict(differing)
    _add_directory(tar, state, TOP)
    links: set[str] = set()
    with tarfile.open(tree) as held:
        for entry in held:
            parts = entry.name.split("/")
            above = {"/".join(parts[:at]) for at in range(1, len(parts))}
            if ".." in parts or entry.name.startswith("/") or above & links:
                raise Unfit(f"{state.name}: {one_line(entry.name, 120)!r} in its tree leads out of it")
            name = f"{TOP}/{entry.name}"
            if entry.isdir():
                _add_directory(tar, state, name)
            elif entry.name in left:
                _add(tar, state, name, left.pop(entry.name))
            elif entry.issym():
                links.add(entry.name)
                new = _entry(state, name)
                new.type, new.linkname, new.mode = tarfile.SYMTYPE, entry.linkname, 0o777
                tar.addfile(new)
            else:
                file = held.extractfile(entry)
                assert file is not None
                new = _entry(state, name)
                new.size, new.mode = entry.size, 0o755 if entry.mode & 0o100 else 0o644
                tar.addfile(new, file)
    if left:
        raise WrongState(f"{state.name}: its tree has no {some(sorted(left))}, which is to differ")


def _add_files(tar: tarfile.TarFile, state: SourceState) -> None:
    """Their sums are looked at as they are packed."""
    first, *_ = state.files
    _add_directory(tar, state, TOP)
    changed = WrongState(
        f"{state.name}: the files of {first} aren't what they were when they were looked at",
        remedy="leave them alone while they are built, and begin again",
    )
    wanted = {first.name: state.tree}
    try:
        for file in state.files:
            with open_source_file(file, 2**40) as handle:
                new = _entry(state, f"{TOP}/{file.name}")
                new.size = os.fstat(handle.fileno()).st_size
                summed = _Summed(handle)
                tar.addfile(new, summed)
                if summed.sha256.hexdigest() != wanted.get(file.name):
                    raise changed
            if file is first and file.name.endswith(".dsc"):
                source = source_of(unsigned(file.read_bytes()))
                wanted.update((listed.name, listed.sha256) for listed in source.files)
    except (Unfit, OSError) as error:
        raise changed from error


class _Summed(io.RawIOBase):
    def __init__(self, of: BinaryIO) -> None:
        self._of = of
        self.sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._of.read(size)
        self.sha256.update(data)
        return data


def _add_directory(tar: tarfile.TarFile, state: SourceState, name: str) -> None:
    new = _entry(state, name)
    new.type, new.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(new)


def _add(tar: tarfile.TarFile, state: SourceState, name: str, data: bytes) -> None:
    new = _entry(state, name)
    new.size = len(data)
    tar.addfile(new, io.BytesIO(data))


def _entry(state: SourceState, name: str) -> tarfile.TarInfo:
    """A regular file of root's."""
    entry = tarfile.TarInfo(name)
    entry.mtime = max(state.when, 0)
    return entry
