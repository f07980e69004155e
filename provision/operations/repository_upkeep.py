"""repo-gc and repo-import: what goes out of a package repository, and what comes in from another's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from inventory.errors import Call, NotFound, UsageError, some
from inventory.sizes import rounded
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, foretold, job
from provision.engine.report import Action
from provision.engine.run import Run
from provision.operations.repositories import RepoPublishing, RepositoryContent
from provision.package_repositories import RepositoryActivity, RepositoryFacts, opened, retention
from repositories.change import changing
from repositories.collect import GenerationSurvey, collect, survey
from repositories.repository import Repository
from repositories.staging import Staging


class _RepoGcActivity(RepositoryActivity):
    name = "repo-gc"


class _RepoImportActivity(RepositoryActivity):
    name = "repo-import"


GC, IMPORT = _RepoGcActivity(), _RepoImportActivity()


@dataclass(frozen=True, slots=True)
class RepositoryGcResult:
    """``kept``: why each generation stays, by its number. ``removed``: numbers. ``files``: what else was
    left over. ``freed`` in bytes. ``dropped``: channels."""

    repository: str
    kept: Mapping[str, tuple[str, ...]]
    removed: tuple[int, ...]
    files: tuple[str, ...]
    freed: int
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RepoGc(Operation[RepositoryGcResult]):
    """Remove generations that nobody needs any more, and what only they had. ``pinned``: why somebody
    needs a generation, by its number. ``drop``: channels that are to go, which the farm file no longer
    names. Errors: NotFound, UsageError."""

    name = "repo-gc"
    repo: str
    pinned: Mapping[int, str]
    drop: tuple[str, ...] = ()

    def plan(self, run: Run) -> Plan[RepositoryGcResult]:
        repository = opened(run.site.farm, self.repo)
        unnamed = _unnamed(repository)
        self._check(repository)
        dropped = tuple(channel for channel in unnamed if channel in self.drop)
        found = self._survey(run, repository)
        kept = foretold(
            *(
                Action("keep", "", f"{repository.name}: generation {number}: {some(why)}")
                for number, why in sorted(found.kept.items())
            ),
            *(_let_go(repository, channel) for channel in unnamed if channel not in dropped),
        )
        gone = [f"channel {channel}" for channel in dropped] + [
            f"generation {one.sequence} of {one.channel}, made {one.made:%Y-%m-%d}" for one in found.gone
        ]
        lines = [job("discard", "", f"{repository.name}: {text}", _later) for text in gone]
        if found.orphans:
            text = f"{len(found.orphans)} packages, lists and caches that nothing needs"
            lines.append(job("discard", "", f"{repository.name}: {text}", _later))
        if lines:
            lines.append(Job((), partial(self._collect, run, repository)))
        result = RepositoryGcResult(
            repository.name,
            {str(number): why for number, why in sorted(found.kept.items())},
            tuple(one.sequence for one in found.gone),
            tuple(str(path.relative_to(repository.layout.top)) for path in found.orphans),
            found.bytes,
            dropped,
        )
        return Plan([alone(kept, *lines)], lambda: result)

    def _check(self, repository: Repository) -> None:
        """One that is gone already is nothing to complain of."""
        for channel in self.drop:
            if channel in repository.settings.channels:
                raise UsageError(
                    f"{channel} is a channel of {repository.name} by the farm file",
                    remedy="take it out there first",
                )
            if channel not in repository.documents.channels():
                have = some(_unnamed(repository)) or "none"
                raise NotFound(
                    f"{repository.name} never had a channel {channel}; of those that the farm file "
                    f"doesn't name it has {have}"
                )

    def _survey(self, run: Run, repository: Repository) -> GenerationSurvey:
        section = run.site.farm.repositories[repository.name]
        return survey(repository, retention(section), datetime.now(UTC), self.pinned, self.drop)

    def _collect(self, run: Run, repository: Repository) -> None:
        facts = RepositoryFacts(repository.name)
        with run.site.journal.begin(GC, [], facts) as entry, changing(repository) as change:
            entry.step(f"repo-gc in {repository.name}")
            for channel in set(self.drop).intersection(_unnamed(repository)):
                change.drop(channel, str(run.site.requester))
            found = self._survey(run, repository)  # with the lock held: nobody begins to use one now
            collect(change, found)
        run.site.reporter.say(f"{repository.name}: {rounded(found.bytes)} freed")


def _unnamed(repository: Repository) -> tuple[str, ...]:
    """Channels that the farm file doesn't name any more."""
    known = repository.settings.channels
    return tuple(channel for channel in repository.all_channels() if channel not in known)


def _let_go(repository: Repository, channel: str) -> Action:
    text = f"{repository.name}: channel {channel}, which the farm file doesn't name; to let it go: "
    return Action("keep", "", (text, Call("repo-gc", repo=repository.name, drop=channel)))


def _later() -> None:
    """It is done with all others."""


@dataclass(frozen=True, slots=True)
class RepoImport(RepoPublishing):
    """Add all packages of an apt or yum repository that others made, by its own metadata and sums.
    ``source``: its directory here. Errors: NotFound, Unfit, Conflict, NoSpace."""

    name = "repo-import"
    verb = "import"
    activity = IMPORT
    repo: str
    channel: str
    source: Path
    component: str = ""
    note: str = ""

    def content(self, run: Run, repository: Repository, staging: Staging) -> RepositoryContent:
        if not self.source.is_dir():
            raise NotFound(f"there is no directory {self.source}")
        found = list(repository.format.published(self.source))
        components = repository.settings.components

        def wanted() -> Iterator[tuple[Path, str, str]]:
            for one in found:
                component = one.component if one.component in components else ""
                chosen = self.component or component or (components[0] if components else "")
                yield self.source / one.file, chosen, one.sha256

        return self.take(run, repository, staging, list(wanted()))
