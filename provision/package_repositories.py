"""The package repositories of a farm: its sections, opened."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from inventory.errors import NotFound, UnknownName, UsageError, WrongState, some
from inventory.model import Farm
from inventory.repositories import PackageRepository
from provision.engine.facts import Facts
from provision.engine.operation import Activity, Recovery
from provision.engine.record import Record
from provision.site import Site
from repositories.change import recover
from repositories.collect import Retention
from repositories.format import ClientSource, Signer
from repositories.generation import Generation
from repositories.places import directory
from repositories.repository import Repository, Settings
from repositories.staging import Staging


def named(farm: Farm, name: str) -> str:
    """The repository meant; "" means the only one. NotFound, UsageError."""
    if not farm.repositories:
        kind = UnknownName if name else NotFound
        raise kind(
            f"{farm.path}: no package repository is declared",
            remedy="give the farm file a section 'repositories': see docs/repositories.md",
        )
    if not name and len(farm.repositories) > 1:
        raise UsageError(
            "there are several repositories", remedy=f"say which repo: {' or '.join(farm.repositories)}"
        )
    name = name or next(iter(farm.repositories))
    if name not in farm.repositories:
        raise UnknownName(
            f"{farm.path}: no repository is called {name}: there is {some(farm.repositories)}"
        )
    return name


def opened(farm: Farm, name: str = "") -> Repository:
    """A repository of the farm, by its name; "" means the only one. It need not be there yet."""
    name = named(farm, name)
    section = farm.repositories[name]
    return Repository(
        Settings(
            name=name,
            format=section.format,
            top=directory(farm, name),
            channels=section.channels,
            components=section.components if section.format == "deb" else (),
            architectures=section.architectures,
            description=section.description or "",
            url=(section.url or "").rstrip("/"),
            grace=section.grace,
            versions=section.versions,
            signed_packages=section.signed_packages,
        )
    )


def retention(section: PackageRepository) -> Retention:
    return Retention(last=section.keep, age=section.keep_for)


@contextlib.contextmanager
def signing(site: Site, name: str) -> Iterator[Signer | None]:
    """What the repository is signed by, checked before anything is changed; None: nothing."""
    keys = site.farm.repositories[name].signing
    if not keys:
        yield None
        return
    from repositories.signing.gpg import SigningKey, open_signer

    def placed(path: Path | None) -> Path | None:
        return site.farm.path.parent / path.expanduser() if path else None

    wanted = [
        SigningKey(key.fingerprint, placed(key.home), placed(key.file), placed(key.passphrase_file))
        for key in keys
    ]
    with open_signer(wanted, site.runner) as signer:
        for warning in signer.warnings():
            site.reporter.warn(f"{name}: {warning}")
        yield signer


@contextlib.contextmanager
def staging(site: Site, repository: Repository) -> Iterator[Staging]:
    """For packages on their way in; where it is only planned, they stay where they are."""
    if site.plan:
        yield Staging(repository.layout, repository.format, look=True)
        return
    recover(repository)  # what was cut off may have left something also where nothing is to change
    with repository.staging() as staging:
        yield staging


def client_source(
    repository: Repository, channel: str, pinned: Generation | None, *, plain: bool
) -> ClientSource:
    """What a client of a channel, or of one generation, is told. WrongState: nobody said its URL."""
    settings, layout = repository.settings, repository.layout
    if not settings.url:
        raise WrongState(
            f"nobody said what {repository.name} is reached by",
            remedy=f"give repositories.{repository.name} a 'url' in the farm file",
        )
    head = pinned or repository.head(channel)
    tree = f"generations/{pinned.sequence}" if pinned else f"channels/{channel}"
    armour = repository.signing_keys(head) if head else None
    key = (layout.key(pinned.sequence) if pinned else layout.keys[0]) if armour else None
    return ClientSource(
        repository=repository.name,
        channel=pinned.channel if pinned else channel,
        url=f"{settings.url}/{tree}/",
        mirrors=None if plain or pinned else f"{settings.url}/channels/{channel}.mirrors",
        key=f"{settings.url}/{key.relative_to(layout.top)}" if key else None,
        armour=armour,
        components=settings.components,
        architectures=head.architectures if head else settings.architectures,
    )


# ---- In the journal.


@dataclass(frozen=True, slots=True)
class RepositoryFacts(Facts):
    """``repository``: its name in the farm file."""

    repository: str


class RepositoryActivity(Activity[RepositoryFacts]):
    """A change of a package repository. It takes effect by one rename(2): cut off before, nobody has
    seen it, and it is taken away; cut off after, what follows from it is made."""

    facts = RepositoryFacts

    def recover(self, site: Site, _record: Record, facts: RepositoryFacts) -> Recovery[RepositoryFacts]:
        if facts.repository not in site.farm.repositories:
            return Recovery(f"repository {facts.repository} is no longer declared; noted")
        text = f"repository {facts.repository} is as it was before, or as it was to become"
        return Recovery(text, lambda _entry: recover(opened(site.farm, facts.repository)))
