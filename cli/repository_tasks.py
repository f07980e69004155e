"""The tasks of package repositories."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cli import options, repository_views, views
from cli.command import command
from cli.options import FlagValues
from cli.repository_asked import COMPONENT, NOTE, REPO, opened, record_of, wanted
from cli.run import TaskResult, TaskRun
from inventory.errors import NotFound, UsageError

if TYPE_CHECKING:
    from builds.record import BuildRecord
    from provision.site import Site
    from repositories.repository import Repository

_CHANNEL = "The channel; absent: the repository's first."
_WHICH = "A channel, or a generation's number; absent: the first channel."


@command(
    {
        "path": "A package's file, or a directory with packages; repeatable.",
        "repo": REPO,
        "channel": _CHANNEL,
        "component": COMPONENT,
        "build": "In place of files: what this build made, by its id, or 'last'.",
        "note": NOTE,
    },
    iterable=["path"],
    does=("repo-add",),
    bare="path",
)
def repo_add(
    run: TaskRun, path: FlagValues = None, repo: str = "", channel: str = "", component: str = "",
    build: str = "", note: str = "",
) -> TaskResult:  # fmt: skip
    """Add packages to a repository's channel."""
    with opened(run, repo) as (site, repository):
        paths, build = wanted(site, repository, path, build)
        done = run.perform(
            site, "repo-add", repo=repository.name, channel=_or_first(repository, channel),
            paths=paths, component=component, build=build, note=note,
        )  # fmt: skip
        return views.outcome(done)


@command(
    {
        "package": "Its name, or NAME=VERSION; repeatable.",
        "repo": REPO,
        "channel": _CHANNEL,
        "note": NOTE,
    },
    iterable=["package"],
    does=("repo-remove",),
    bare="package",
)
def repo_remove(
    run: TaskRun, package: FlagValues = None, repo: str = "", channel: str = "", note: str = ""
) -> TaskResult:
    """Leave packages out of a channel from now on."""
    with opened(run, repo) as (site, repository):
        done = run.perform(
            site, "repo-remove", repo=repository.name, channel=_or_first(repository, channel),
            packages=options.names(package, "--package", "a package"), note=note,
        )  # fmt: skip
        return views.outcome(done)


@command(
    {
        "from_": "The channel, or the generation's number, whose packages it gets.",
        "to": "The channel that gets them.",
        "package": "Only this package, beside what is there: its name, or NAME=VERSION; repeatable.",
        "repo": REPO,
        "note": NOTE,
    },
    iterable=["package"],
    does=("repo-promote",),
)
def repo_promote(
    run: TaskRun,
    from_: str = "",
    to: str = "",
    package: FlagValues = None,
    repo: str = "",
    note: str = "",
) -> TaskResult:
    """Give a channel the packages of another."""
    source = options.needed("--from", from_, "a channel, or a generation's number")
    target = options.needed("--to", to, "a channel")
    with opened(run, repo) as (site, repository):
        done = run.perform(
            site, "repo-promote", repo=repository.name, from_=source, channel=target,
            packages=options.names(package, "--package", "a package"), note=note,
        )  # fmt: skip
        return views.outcome(done)


@command(
    {
        "channel": "The channel.",
        "to": "The generation's number whose packages it gets; absent: the one before.",
        "repo": REPO,
        "note": NOTE,
    },
    does=("repo-rollback",),
)
def repo_rollback(
    run: TaskRun, channel: str = "", to: str = "", repo: str = "", note: str = ""
) -> TaskResult:
    """Give a channel what it had before, as a new generation."""
    target = options.needed("--channel", channel, "a channel")
    with opened(run, repo) as (site, repository):
        done = run.perform(
            site, "repo-rollback", repo=repository.name, channel=target,
            to=options.count("--to", to) if to else 0, note=note,
        )  # fmt: skip
        return views.outcome(done)


@command(
    {
        "source": "The directory of an apt or yum repository: a copy of it, or one that aptly made.",
        "repo": REPO,
        "channel": _CHANNEL,
        "component": "deb: the component for all; absent: each its own, where the repository has it.",
        "note": NOTE,
    },
    does=("repo-import",),
)
def repo_import(
    run: TaskRun,
    source: str = "",
    repo: str = "",
    channel: str = "",
    component: str = "",
    note: str = "",
) -> TaskResult:
    """Add all packages of a repository that others made."""
    place = Path(options.needed("--source", source, "a directory")).expanduser().absolute()
    with opened(run, repo) as (site, repository):
        done = run.perform(
            site, "repo-import", repo=repository.name, channel=_or_first(repository, channel),
            source=place, component=component, note=note,
        )  # fmt: skip
        return views.outcome(done)


@command(
    {
        "drop": "A channel that is to go, which the farm file doesn't name any more; repeatable.",
        "repo": REPO,
    },
    iterable=["drop"],
    does=("repo-gc",),
)
def repo_gc(run: TaskRun, drop: FlagValues = None, repo: str = "") -> TaskResult:
    """Remove generations that nobody needs."""
    channels = options.names(drop, "--drop", "a channel")
    with opened(run, repo) as (site, repository):
        done = run.perform(
            site, "repo-gc", repo=repository.name, pinned=_pinned(site, repository), drop=channels
        )
        return views.outcome(done, nothing="nothing is there yet")


@command({"repo": REPO, "which": _WHICH, "channels": "Only the channels, of all repositories."})
def repo_list(run: TaskRun, repo: str = "", which: str = "", channels: bool = False) -> TaskResult:
    """List a channel's packages; or all channels."""
    from provision import package_repositories

    if channels or not (repo or which):
        with run.site() as site:
            if channels or len(site.farm.repositories) != 1:
                open_one = package_repositories.opened
                opened_all = [open_one(site.farm, name) for name in site.farm.repositories]
                return repository_views.channels(opened_all or [open_one(site.farm)])
    with opened(run, repo) as (_, repository):
        one = repository.generation(which or repository.settings.channels[0])
        return repository_views.packages(repository, one, tuple(repository.packages(one)))


@command({"which": _WHICH, "repo": REPO})
def repo_show(run: TaskRun, which: str = "", repo: str = "") -> TaskResult:
    """Show a generation: what it is, from what, who needs it."""
    from provision.package_repositories import retention
    from repositories.collect import survey

    with opened(run, repo) as (site, repository):
        one = repository.generation(which or repository.settings.channels[0])
        section = site.farm.repositories[repository.name]
        found = survey(repository, retention(section), _now(), _pinned(site, repository))
        return repository_views.generation(repository, one, found.kept.get(one.sequence, ()))


@command(
    {
        "from_": "A channel, or a generation's number.",
        "to": "Another one.",
        "repo": REPO,
        "no_changelog": "Leave the changelogs out.",
    }
)
def repo_diff(
    run: TaskRun, from_: str = "", to: str = "", repo: str = "", no_changelog: bool = False
) -> TaskResult:
    """Show what differs between two generations."""
    from repositories.difference import differences

    words = [
        options.needed(f, text, "a channel, or a number")
        for f, text in (("--from", from_), ("--to", to))
    ]
    with opened(run, repo) as (_, repository):
        one, other = map(repository.generation, words)
        found = differences(repository, one, other, changelogs=not no_changelog)
        return repository_views.differences(repository, one, other, found)


@command({"channel": _CHANNEL, "repo": REPO})
def repo_log(run: TaskRun, channel: str = "", repo: str = "") -> TaskResult:
    """Show what a channel pointed to, newest first."""
    with opened(run, repo) as (_, repository):
        name = _or_first(repository, channel)
        repository.check_channel(name)
        return repository_views.log(repository, name)


@command({"repo": REPO})
def repo_fsck(run: TaskRun, repo: str = "") -> TaskResult:
    """Check every hash, signature and reference."""
    from repositories.check import check

    with opened(run, repo) as (site, repository):
        found = check(repository, site.runner, run.screen.working)
        return repository_views.checked(repository, found)


@command(
    {
        "channel": _CHANNEL,
        "generation": "Exactly this generation, for ever, in place of the channel.",
        "at": "The generation that the channel had then, such as 2026-11-20 or 2026-11-20T18:00.",
        "plain": "Without the mirror list that pins each update to one generation.",
        "repo": REPO,
    }
)
def repo_client(
    run: TaskRun,
    channel: str = "",
    generation: str = "",
    at: str = "",
    plain: bool = False,
    repo: str = "",
) -> TaskResult:
    """Print what is pasted on a client, its key included."""
    from provision.package_repositories import client_source

    if generation and at:
        raise UsageError("--generation and --at together: which is meant?", remedy="give one of them")
    with opened(run, repo) as (_, repository):
        name = _or_first(repository, channel)
        pinned = None
        if generation:
            pinned = repository.generation(str(options.count("--generation", generation)))
        elif at:
            pinned = repository.at(name, options.moment("--at", at))
            if pinned is None:
                raise NotFound(f"{repository.name}'s {name} had nothing at that time")
        source = client_source(repository, name, pinned, plain=plain)
        text = repository.format.stanza(source)
        data = {"repository": repository.name, "channel": name, "url": source.url, "stanza": text}
        return TaskResult(data, text.rstrip())


@command({"package": "Its name, or NAME=VERSION.", "which": _WHICH, "repo": REPO}, bare="package")
def repo_why(run: TaskRun, package: str = "", which: str = "", repo: str = "") -> TaskResult:
    """Show what build and commit a package came from."""
    from provision.operations.repositories import select

    words = options.needed("--package", package, "a package's name")
    with opened(run, repo) as (site, repository):
        one = repository.generation(which or repository.settings.channels[0])
        found = select(repository, one, [words])
        records = {p.build: _record_or_none(site, p.build) for p in found}
        first = {p: repository.first_with(p) for p in found}
        return repository_views.origins(repository, found, records, first)


@command(
    {
        "to": "[USER@]HOST:[PORT:]/DIRECTORY, reached by ssh; with --objects a directory here.",
        "objects": "Plain files without links, as an object store has them.",
        "remove": "What is gone here goes there, too.",
        "repo": REPO,
    },
    does=("repo-sync",),
)
def repo_sync(
    run: TaskRun, to: str = "", objects: bool = False, remove: bool = False, repo: str = ""
) -> TaskResult:
    """Bring a mirror of a repository to its present state."""
    target = options.needed("--to", to, "HOST:/DIRECTORY, or with --objects a directory")
    run.resume = "the mirror is whole; type the same again: it goes on from what is there"
    with opened(run, repo) as (site, repository):
        done = run.perform(
            site, "repo-sync", repo=repository.name, to=target, objects=objects, remove=remove
        )
        return views.outcome(done)


@command(
    {
        "address": "The address to listen on; :: and 0.0.0.0 are all.",
        "port": "The port.",
        "certificate": "TLS: the certificate's file, with its chain.",
        "key": "TLS: the private key's file; absent: it is in the certificate's.",
        "access_log": "Tell each request on stderr.",
        "repo": REPO,
    }
)
def repo_serve(
    run: TaskRun, address: str = "127.0.0.1", port: str = "8080", certificate: str = "", key: str = "",
    access_log: bool = False, repo: str = "",
) -> TaskResult:  # fmt: skip
    """Serve a repository over HTTP, until Ctrl-C."""
    from repositories.serving.server import serve

    number = options.count("--port", port)
    run.resume = "it is served no more"
    with opened(run, repo) as (_, repository):
        top, say = repository.layout.top, run.screen.say
        if not repository.exists:
            raise NotFound(f"there is nothing in repository {repository.name} yet")
    serve(
        top, address=address, port=number, certificate=_file(certificate), key=_file(key), say=say,
        access=say if access_log else None,
    )  # fmt: skip
    return TaskResult({"served": str(top)}, "")


@command(
    {
        "watch": "Go on until Ctrl-C: at once when something arrives, and every --every.",
        "every": "With --watch: how often to look for what is due, such as 5m.",
        "repo": REPO,
    },
    does=("repo-add", "repo-promote"),
)
def repo_queue(run: TaskRun, watch: bool = False, every: str = "5m", repo: str = "") -> TaskResult:
    """Take what was uploaded, and promote what is due."""
    from inventory.sizes import parse_duration
    from provision.repository_queue import Queue, QueueEvent

    try:
        seconds = parse_duration(every)
    except ValueError as error:
        raise UsageError(f"--every: {error}", remedy="--every 5m") from None
    run.resume = "what was not taken is there the next time"
    told: list[QueueEvent] = []
    with opened(run, repo) as (site, repository):

        def act(name: str, **request: object) -> object:
            return run.perform(site, name, **request)

        with Queue(site, repository, act) as queue:
            while True:
                for event in queue.turn(lambda: _tested(site, repository)):
                    told.append(event)
                    run.screen.say(repository_views.queue_event(event, plan=run.plan))
                if run.plan or not watch:
                    return repository_views.queued(told, plan=run.plan)
                del told[:-100]
                queue.wait(seconds)


@command({"repo": REPO}, plans=False)
def repo_pages(run: TaskRun, repo: str = "") -> TaskResult:
    """Write a page for the repository and each generation."""
    from repositories.pages import write_pages

    with opened(run, repo) as (_, repository):
        repository.make()
        made, index = write_pages(repository), repository.layout.index_page
        return TaskResult({"repository": repository.name, "page": str(index), "made": made}, str(index))


def _file(word: str) -> Path | None:
    return Path(word).expanduser().absolute() if word else None


def _tested(site: Site, repository: Repository) -> Mapping[int, str]:
    """Builds that passed, by the generation that they used."""
    from builds.record import all_records

    return {
        used.generation: record.id
        for record in all_records(site.paths)[0]
        if record.result == "passed" and not record.partial
        for used in record.repositories
        if used.repository == repository.name
    }


def _now() -> datetime:
    return datetime.now(UTC)


def _or_first(repository: Repository, channel: str) -> str:
    return channel or repository.settings.channels[0]


def _record_or_none(site: Site, build: str) -> BuildRecord | None:
    try:
        return record_of(site, build) if build else None
    except NotFound:
        return None


def _pinned(site: Site, repository: Repository) -> Mapping[int, str]:
    """Generations that kept builds used."""
    from builds.record import all_records

    pinned: dict[int, str] = {}
    for record in all_records(site.paths)[0]:
        for used in record.repositories:
            if used.repository == repository.name:
                pinned.setdefault(used.generation, f"build {record.id} used it")
    return pinned
