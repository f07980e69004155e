"""What the tasks of repositories and of their flows ask for in the same words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cli.options import FlagValues
from cli.run import TaskRun
from inventory.errors import NotFound, UsageError

if TYPE_CHECKING:
    from builds.record import BuildRecord
    from provision.site import Site
    from repositories.repository import Repository

REPO = "The repository; absent where there is only one."
NOTE = "Why, for the log."
COMPONENT = "deb: the component; absent: the first."


@contextmanager
def opened(run: TaskRun, repo: str) -> Iterator[tuple[Site, Repository]]:
    from provision.package_repositories import opened

    with run.site() as site:
        yield site, opened(site.farm, repo)


def record_of(site: Site, build: str) -> BuildRecord:
    from builds.record import find_record

    return find_record(site.paths, build)


def wanted(
    site: Site, repository: Repository, path: FlagValues, build: str
) -> tuple[tuple[Path, ...], str]:
    """The packages that are meant: their files, or directories of them, and the id of the build that
    they are of; "": of none. UsageError: neither files nor a build are named, or both."""
    if bool(path) == bool(build):
        raise UsageError("which packages?", remedy="--path FILE (repeatable), or --build ID")
    if not build:
        return tuple(Path(word).expanduser().absolute() for word in path or ()), ""
    record = record_of(site, build)
    return made_by(record, repository.format.SUFFIX), record.id


def made_by(record: BuildRecord, suffix: str) -> tuple[Path, ...]:
    """What the build made, of the repository's kind of packages."""
    found = [record.directory / f.path for f in record.outputs if f.name.endswith(suffix)]
    if not found:
        raise NotFound(f"build {record.id} has no {suffix} file among what it made")
    return tuple(found)
