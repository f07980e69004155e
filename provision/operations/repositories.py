"""repo-add, repo-remove, repo-promote, repo-rollback: what makes a new generation of a package
repository's channel, and publishes it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from inventory.errors import Call, FarmhandError, NotFound, Unfit, UsageError, WrongState, some
from inventory.sizes import rounded
from provision.engine.operation import Activity, Operation
from provision.engine.plan import Plan, alone, foretold, job
from provision.engine.report import Action
from provision.engine.run import Run
from provision.package_repositories import (
    RepositoryActivity,
    RepositoryFacts,
    opened,
    signing,
    staging,
)
from repositories.change import GenerationContent, changing, check_fit, outdated, whole
from repositories.chunks import ChunkRef
from repositories.generation import Generation, Reason, Verb
from repositories.package import Package
from repositories.repository import Repository
from repositories.staging import Staged, Staging


class _RepoAddActivity(RepositoryActivity):
    name = "repo-add"


class _RepoRemoveActivity(RepositoryActivity):
    name = "repo-remove"


class _RepoPromoteActivity(RepositoryActivity):
    name = "repo-promote"


class _RepoRollbackActivity(RepositoryActivity):
    name = "repo-rollback"


ADD, REMOVE, PROMOTE, ROLLBACK = (
    _RepoAddActivity(),
    _RepoRemoveActivity(),
    _RepoPromoteActivity(),
    _RepoRollbackActivity(),
)


@dataclass(frozen=True, slots=True)
class Published:
    """What a channel has now. ``generation``: its number; ``before``: the one it had; 0: none."""

    repository: str
    channel: str
    generation: int
    before: int
    packages: int
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RepositoryContent(GenerationContent):
    """What a new generation is made of. ``mend``: files that are damaged in the pool. ``lines``: what is
    said of all that."""

    mend: tuple[Staged, ...] = ()
    lines: tuple[Action, ...] = ()

    @property
    def changes(self) -> bool:
        return bool(self.origin or self.add or self.take or self.remove)


class RepoPublishing(Operation[Published]):
    """An operation that ends in a new generation of one channel."""

    verb: Verb
    activity: ClassVar[Activity[RepositoryFacts]]
    repo: str
    channel: str
    note: str

    @abstractmethod
    def content(self, run: Run, repository: Repository, staging: Staging) -> RepositoryContent:
        """Found by real reads; what comes in lies in ``staging``."""

    def take(
        self,
        run: Run,
        repository: Repository,
        staging: Staging,
        files: Sequence[tuple[Path, str, str]],
        build: str = "",
    ) -> RepositoryContent:
        """As ``take_in``, for the operation's channel."""
        base = repository.head(self.channel)
        return take_in(run, repository, staging, base, self.channel, files, build)

    def plan(self, run: Run) -> Plan[Published]:
        site, repository = run.site, opened(run.site.farm, self.repo)
        repository.check_channel(self.channel)
        stack = ExitStack()
        try:
            content = self.content(run, repository, stack.enter_context(staging(site, repository)))
        except BaseException:
            stack.close()
            raise
        base = content.base
        done = [
            Published(repository.name, self.channel, *(_number(base),) * 2, base.count if base else 0)
        ]
        jobs = [foretold(*content.lines)] if content.lines else []
        if content.changes:
            text = f"{repository.name}: {self.channel} gets a new generation"
            publish = partial(self._publish, run, repository, content, done, stack)
            jobs.append(job("publish", "", text, publish))
        elif content.mend:
            text = f"{repository.name}: its pool gets the files again"
            jobs.append(job("mend", "", text, partial(self._mend, run, repository, content, stack)))
        elif not content.lines:
            jobs.append(job("keep", "", f"{repository.name}: {self.channel} stays as it is"))
        if site.plan or not (content.changes or content.mend):
            stack.close()
        return Plan([alone(*jobs)], lambda: done[-1])

    def _publish(
        self,
        run: Run,
        repository: Repository,
        content: RepositoryContent,
        done: list[Published],
        stack: ExitStack,
    ) -> None:
        site = run.site
        reason = Reason(self.verb, str(site.requester), self.note)
        # Keys are looked at before anything is changed.
        with (
            stack,
            signing(site, repository.name) as signer,
            site.journal.begin(self.activity, [], RepositoryFacts(repository.name)) as entry,
            changing(repository, signer) as change,
        ):
            entry.step(f"{self.name} in {repository.name}'s {self.channel}")
            change.mend(content.mend)
            # What comes beside, or goes, does so whoever published meanwhile.
            base = content.base if content.origin else repository.head(self.channel)
            before = _number(base)
            made = change.commit(self.channel, replace(content, base=base), reason)
            change.publish(made, reason, expected=before)
        added = (*(item.package for item in content.add), *content.take)
        done.append(
            Published(
                repository.name, self.channel, made.sequence, before, made.count,
                tuple(map(str, added)), tuple(map(str, content.remove)),
            )
        )  # fmt: skip
        site.reporter.say(
            f"{repository.name}: {self.channel} is generation {made.sequence} now, {made.count} packages"
        )

    def _mend(
        self, run: Run, repository: Repository, content: RepositoryContent, stack: ExitStack
    ) -> None:
        with (
            stack,
            run.site.journal.begin(self.activity, [], RepositoryFacts(repository.name)) as entry,
            changing(repository) as change,
        ):
            entry.step(f"{self.name} in {repository.name}'s {self.channel}")
            change.mend(content.mend)


@dataclass(frozen=True, slots=True)
class RepoAdd(RepoPublishing):
    """Add packages' files to a channel. ``paths``: files, or directories, whose packages are taken.
    ``build``: the record of the build that they came from. ``sums``: the sha256 that each of these files
    must have; without any, nobody knows.

    Errors: NotFound, Unfit (damaged packages, all of them named), Conflict (another file under an
    identity that is there), UsageError, NoSpace."""

    name = "repo-add"
    verb = "add"
    activity = ADD
    repo: str
    channel: str
    paths: tuple[Path, ...]
    component: str = ""
    build: str = ""
    note: str = ""
    sums: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert not self.sums or len(self.sums) == len(self.paths)
        if not self.paths:
            raise UsageError(
                "nothing to add", remedy="name files or directories, such as hello_1_amd64.deb"
            )

    def content(self, run: Run, repository: Repository, staging: Staging) -> RepositoryContent:
        files = package_files(repository, self.paths, self.sums, self.component)
        return self.take(run, repository, staging, files, self.build)


@dataclass(frozen=True, slots=True)
class RepoRemove(RepoPublishing):
    """Leave packages out of a channel's next generation. ``packages``: names, or NAME=VERSION. Earlier
    generations keep them. Errors: NotFound, with all that aren't there."""

    name = "repo-remove"
    verb = "remove"
    activity = REMOVE
    repo: str
    channel: str
    packages: tuple[str, ...]
    note: str = ""

    def __post_init__(self) -> None:
        if not self.packages:
            raise UsageError("nothing to remove", remedy="name packages, such as hello, or hello=1.0")

    def content(self, _run: Run, repository: Repository, _staging: Staging) -> RepositoryContent:
        base = repository.generation(self.channel)
        found = select(repository, base, self.packages)
        lines = [Action("remove", "", f"remove {package} from {self.channel}") for package in found]
        return RepositoryContent(base, remove=found, lines=tuple(lines))


@dataclass(frozen=True, slots=True)
class RepoPromote(RepoPublishing):
    """Give a channel the packages of another, all of them, or some beside what it has. ``from_``: the
    other channel, or a generation's number. Errors: NotFound, Conflict."""

    name = "repo-promote"
    verb = "promote"
    activity = PROMOTE
    repo: str
    from_: str
    channel: str
    packages: tuple[str, ...] = ()
    note: str = ""

    def content(self, _run: Run, repository: Repository, _staging: Staging) -> RepositoryContent:
        base, origin = repository.head(self.channel), repository.generation(self.from_)
        if not self.packages:
            if base and base.chunks == origin.chunks:
                return RepositoryContent(base)
            line = f"promote generation {origin.sequence} of {origin.channel}, {origin.count} packages"
            return RepositoryContent(
                base, origin, lines=(Action("promote", "", f"{line}, to {self.channel}"),)
            )
        chunks = base.chunks if base else ()
        found = select(repository, origin, self.packages)
        fresh = tuple(p for p in found if p not in repository.chunks.named(chunks, p.name))
        check_fit(repository, chunks, (), fresh)
        lines = [Action("promote", "", f"promote {package} to {self.channel}") for package in fresh]
        lines += going(repository, chunks, fresh)
        return RepositoryContent(base, take=fresh, lines=tuple(lines))


@dataclass(frozen=True, slots=True)
class RepoRollback(RepoPublishing):
    """Give a channel the packages of one of its earlier generations: by a new one, with a fresh date and
    signature, for clients refuse an older one. ``to``: its number, which may be the present one's, to
    have it signed anew; 0: the one before the present one. Errors: NotFound, WrongState (there is none
    before)."""

    name = "repo-rollback"
    verb = "roll back"
    activity = ROLLBACK
    repo: str
    channel: str
    to: int = 0
    note: str = ""

    def content(self, _run: Run, repository: Repository, _staging: Staging) -> RepositoryContent:
        base = repository.generation(self.channel)
        had = [entry.sequence for entry in repository.documents.log(self.channel)]
        if self.to and self.to not in had:
            raise NotFound(
                f"{repository.name}'s {self.channel} never had generation {self.to}",
                remedy=Call("repo-log", repo=repository.name, channel=self.channel),
            )
        if not self.to and len(had) < 2:
            raise WrongState(f"{repository.name}'s {self.channel} has had no other generation yet")
        origin = repository.documents.read(self.to or had[-2])
        line = f"roll back {self.channel} to generation {origin.sequence}, {origin.count} packages"
        return RepositoryContent(base, origin, lines=(Action("roll back", "", line),))


def take_in(
    run: Run,
    repository: Repository,
    staging: Staging,
    base: Generation | None,
    where: str,
    files: Sequence[tuple[Path, str, str]],
    build: str | Sequence[str] = "",
) -> RepositoryContent:
    """Files that come in, beside what ``base`` has: each with its component, and its sha256 where that
    is known. ``where``: to what they come, in words. ``build``: of all of them, or of each. Unfit, with
    all that are damaged; Conflict, UsageError as ``check_fit``."""
    taken: dict[tuple[str, str], Staged] = {}
    mended: list[Staged] = []
    refused: list[FarmhandError] = []
    lines: list[Action] = []
    builds = [build] * len(files) if isinstance(build, str) else build
    for number, ((path, component, sha256), of) in enumerate(zip(files, builds, strict=True), 1):
        run.site.reporter.working(f"reading packages; {number} of {len(files)}")
        try:
            item = staging.take(path, component=component, build=of, sha256=sha256)
        except Unfit as error:
            refused.append(error)
            continue
        package = item.package
        known = repository.chunks.named(base.chunks, package.name) if base else ()
        content = package.sha256, package.component
        if content in ((p.sha256, p.component) for p in known):
            if whole(repository.layout, package):
                lines.append(Action("keep", "", f"{package} is in {base.channel if base else where}"))
            else:
                mended.append(item)
                lines.append(Action("mend", "", f"put back {package}: its file was damaged, or gone"))
        elif content not in taken:
            taken[content] = item
            lines.append(Action("add", "", f"add {package} to {where}, {rounded(package.size)}"))
    if len(files) == len(refused) == 1:
        raise refused[0]
    if refused:
        raise Unfit(
            f"{len(refused)} of {len(files)} files are not taken: "
            + some([error.message for error in refused], by="; "),
            remedy="nothing was added: build them again, or leave them out",
        )
    chunks, add = base.chunks if base else (), tuple(taken.values())
    check_fit(repository, chunks, add)
    lines += going(repository, chunks, [item.package for item in add])
    return RepositoryContent(base, add=add, mend=tuple(mended), lines=tuple(lines))


def going(
    repository: Repository, chunks: Sequence[ChunkRef], fresh: Sequence[Package]
) -> Iterator[Action]:
    """Those that go since newer ones come."""
    for package in outdated(repository, chunks, fresh):
        most = f"the newest {repository.settings.versions} of a package stay"
        verb = "leave out" if package in fresh else "remove"
        yield Action(verb, "", f"{verb} {package}: {most}")


def select(repository: Repository, generation: Generation, names: Sequence[str]) -> tuple[Package, ...]:
    """The packages of these names, or NAME=VERSION. NotFound, with all that aren't there."""
    found: dict[str, tuple[Package, ...]] = {}
    for words in names:
        name, given, version = words.partition("=")
        of_name = repository.chunks.named(generation.chunks, name)
        found[words] = tuple(p for p in of_name if not given or p.version == version)
    if missing := [words for words, packages in found.items() if not packages]:
        raise NotFound(
            f"generation {generation.sequence} of {repository.name} has no package {some(missing)}",
            remedy=Call("repo-list", repo=repository.name, which=str(generation.sequence)),
        )
    return tuple(dict.fromkeys(package for packages in found.values() for package in packages))


def package_files(
    repository: Repository, paths: Sequence[Path], sums: Sequence[str], component: str
) -> list[tuple[Path, str, str]]:
    """The packages' files that are meant, as ``take_in`` has them. ``sums``: of each path, if any.
    NotFound."""
    components = repository.settings.components
    chosen = component or (components[0] if components else "")
    if sums:
        return [(path, chosen, sum_) for path, sum_ in zip(paths, sums, strict=True)]
    return [(path, chosen, "") for path in _files(paths, repository.format.SUFFIX)]


def _files(paths: Sequence[Path], suffix: str) -> Iterator[Path]:
    """NotFound."""
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise NotFound(f"there is no file {path}")
            yield path
            continue
        found = sorted(file for file in path.iterdir() if file.name.endswith(suffix))
        if not found:
            raise NotFound(f"no {suffix} file is in {path}")
        yield from found


def _number(generation: Generation | None) -> int:
    return generation.sequence if generation else 0
