"""Each daemon's own checker, on files that aren't live yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from host.run import Runner
from inventory.errors import CommandFailed
from inventory.model import Farm
from provision.network.document import Document
from provision.network.service import services
from provision.network.staged import stage


def check(
    runner: Runner, farm: Farm, documents: Sequence[Document], texts: Mapping[str, str | None]
) -> None:
    """Check the services of ``documents``; ``texts``: whole new files by path, None for those that
    go. CommandFailed of the first service whose checker refuses."""
    used = {service.NAME: service for service in services(farm)}
    for service in dict.fromkeys(document.service for document in documents):
        of_one = [document for document in documents if document.service == service]
        files = {d.path: texts[d.path] for d in of_one if d.path in texts}
        checkers = tuple(used[service].checkers(farm, of_one))
        if not checkers:
            continue
        with stage(runner, files) as staged:
            for checker in checkers:
                try:
                    staged.check(checker.argv, shadow=checker.shadow)
                except CommandFailed as error:
                    error.message = f"{service}: {error.message}"
                    error.args = (error.message,)
                    error.remedy = error.remedy or "nothing was changed; correct what it names"
                    raise
