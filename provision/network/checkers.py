"""Each daemon's own checker, on files that aren't live yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from host.run import Runner
from inventory.errors import CommandFailed, FarmhandError
from inventory.model import Farm
from provision.network.document import Document
from provision.network.service import Inclusion, services
from provision.network.staged import stage

_NONSENSE = "} farmhand asks whether this is read {\n"  # no daemon's syntax


def refusals(
    runner: Runner, farm: Farm, documents: Sequence[Document], texts: Mapping[str, str | None]
) -> Iterator[FarmhandError]:
    """Check the services of ``documents``; ``texts``: whole new files by path, None for those that
    go. A CommandFailed of each service whose checker refuses."""
    used = {service.NAME: service for service in services(farm)}
    for service in dict.fromkeys(document.service for document in documents):
        of_one = [document for document in documents if document.service == service]
        files = {d.path: texts[d.path] for d in of_one if d.path in texts}
        checkers = tuple(used[service].checkers(farm, of_one))
        if not checkers:
            continue
        with stage(runner, files) as staged:
            try:
                for checker in checkers:
                    staged.check(checker.argv, shadow=checker.shadow)
            except CommandFailed as error:
                error.message = f"{service}: {error.message}"
                error.args = (error.message,)
                error.remedy = error.remedy or "nothing was changed; correct what it names"
                yield error


def is_read(runner: Runner, inclusion: Inclusion) -> bool:
    """Whether a daemon's own configuration includes our file: its checker complains of nonsense in it.
    True where that can't be told, for its checker doesn't run."""
    if not Path(inclusion.main).exists():
        return True
    with stage(runner, {inclusion.path: _NONSENSE}) as staged:
        try:
            staged.check(inclusion.checker.argv, shadow=inclusion.checker.shadow)
        except CommandFailed:
            return True
    return False


def accepts(runner: Runner, inclusion: Inclusion, texts: Mapping[str, str | None]) -> bool:
    """Whether a daemon's own configuration is right with these files. True where there is none."""
    if not Path(inclusion.main).exists():
        return True
    with stage(runner, texts) as staged:
        try:
            staged.check(inclusion.checker.argv, shadow=inclusion.checker.shadow)
        except CommandFailed:
            return False
    return True
