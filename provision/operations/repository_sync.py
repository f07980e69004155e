"""repo-sync: a package repository on another host, or as plain files for an object store."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from inventory.sizes import rounded
from provision.engine.facts import Facts
from provision.engine.operation import Activity, Operation, Recovery
from provision.engine.plan import Plan, alone, job
from provision.engine.record import Record
from provision.engine.run import Run
from provision.package_repositories import opened
from provision.site import Site
from repositories.mirrors.objects import lay_out_objects
from repositories.mirrors.sync import SyncTarget, sync
from repositories.repository import Repository


@dataclass(frozen=True, slots=True)
class RepositorySynced:
    """``files``: how many were sent, or written; ``bytes``: of those sent. ``removed``: how many went
    there."""

    repository: str
    to: str
    files: int = 0
    bytes: int = 0
    removed: int = 0


@dataclass(frozen=True, slots=True)
class RepoSync(Operation[RepositorySynced]):
    """Bring a mirror to the repository's present state. ``to``: [USER@]HOST:[PORT:]/DIRECTORY by ssh, or
    with ``objects`` a directory here, laid out without links as object stores have it. ``remove``: what
    is gone here goes there, too. What was cut off leaves the mirror whole, and the next one goes on."""

    name = "repo-sync"
    repo: str
    to: str
    objects: bool = False
    remove: bool = False

    def plan(self, run: Run) -> Plan[RepositorySynced]:
        repository = opened(run.site.farm, self.repo)
        done = [RepositorySynced(repository.name, self.to)]
        target = None if self.objects else SyncTarget.parse(self.to)
        text = f"{repository.name} to {target or Path(self.to).absolute()}"
        work = partial(self._sync, run, repository, target, text, done)
        return Plan([alone(job("sync", "", text, work))], lambda: done[-1])

    def _sync(
        self,
        run: Run,
        repository: Repository,
        target: SyncTarget | None,
        text: str,
        done: list[RepositorySynced],
    ) -> None:
        with run.site.journal.begin(SYNC, [], SyncFacts(repository.name, self.to)) as entry:
            entry.step(text)
            self._bring(run, repository, target, done)

    def _bring(
        self, run: Run, repository: Repository, target: SyncTarget | None, done: list[RepositorySynced]
    ) -> None:
        say, until_free = run.site.reporter.say, run.site.patience.until_free
        if target is None:
            place = Path(self.to).expanduser().absolute()
            laid_out = until_free(lambda: lay_out_objects(repository, place))
            done.append(
                RepositorySynced(repository.name, self.to, laid_out.written, 0, laid_out.removed)
            )
            say(f"{laid_out.files} files, {laid_out.written} of them new, {laid_out.removed} removed")
            return
        sent = until_free(lambda: sync(repository, target, run.site.runner, say, remove=self.remove))
        done.append(RepositorySynced(repository.name, self.to, sent.files, sent.bytes, sent.removed))
        channels = ", ".join(f"{name} is generation {number}" for name, number in sent.channels.items())
        say(f"{sent.files} files, {rounded(sent.bytes)} sent; there {channels}")


@dataclass(frozen=True, slots=True)
class SyncFacts(Facts):
    """``repository``: its name in the farm file. ``to``: as it was asked for."""

    repository: str
    to: str


class _SyncActivity(Activity[SyncFacts]):
    """There is nothing to finish or undo."""

    name = "repo-sync"
    facts = SyncFacts

    def recover(self, _site: Site, _record: Record, facts: SyncFacts) -> Recovery[SyncFacts]:
        return Recovery(f"{facts.to} is whole, and the next repo-sync goes on; noted")


SYNC = _SyncActivity()
