"""Whether a farm's services can take their files, and have what these say.

What each service knows of itself (``Service.inclusion``, ``missing``, ``unserved``) is asked here, for
doctor, network-apply and its plan, and network-verify alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from host.run import Runner
from inventory.errors import FarmhandError, WrongState, spelled
from inventory.model import Farm
from provision.network.checkers import is_read
from provision.network.file_change import FileChange
from provision.network.service import ApplyStep, Service, Unserved


class NotReady(WrongState):
    """More than one thing is in the way of network-apply; nothing was touched."""

    def __init__(self, errors: Sequence[FarmhandError]) -> None:
        self.errors = tuple(errors)
        lines = []
        for error in errors:
            lines.append(f"- {error.message}")
            lines += [
                f"    {line}" for line in (spelled(error.remedy), *error.detail.splitlines()) if line
            ]
        super().__init__(
            f"{len(errors)} things are in the way; nothing was changed",
            remedy="put right what is named above; all that is known is named",
            detail="\n".join(lines),
        )

    def as_dict(self) -> dict[str, object]:
        return {**super().as_dict(), "errors": [dict(error.as_dict()) for error in self.errors]}


def together(errors: Sequence[FarmhandError]) -> FarmhandError:
    """One error for all of them, which are one at least."""
    return errors[0] if len(errors) == 1 else NotReady(errors)


def missing(
    runner: Runner, farm: Farm, services: Sequence[Service], files: Sequence[FileChange]
) -> Iterator[tuple[str, FarmhandError]]:
    """All that keeps these services from taking their files, by their names."""
    for service in services:
        found = service.missing(farm, _of(service, files), runner)
        try:
            for error in found:
                yield service.NAME, error
        except FarmhandError as error:
            yield service.NAME, error


def not_included(
    runner: Runner, services: Sequence[Service], files: Sequence[FileChange]
) -> Iterator[tuple[str, FarmhandError, bool]]:
    """Files of ours that their daemons don't read: the services' names, what is wrong, and whether that
    is so now (True), or after a boot. Those that go aren't asked about."""
    coming = {change.path for change in files if change.after is not None}
    for service in services:
        inclusion = service.inclusion()
        if inclusion is None or inclusion.path not in coming:
            continue
        name, main, path, boot = service.NAME, inclusion.main, inclusion.path, inclusion.at_boot
        try:
            if boot and not Path(main).exists():
                text = f"{name}: {path} isn't loaded at boot: there is no {main}"
            elif not is_read(runner, inclusion):
                text = f"{name}: {main} doesn't include {path}"
                text += ": it isn't loaded at boot" if boot else ""
            elif boot and runner.read(*boot, ok=range(256)).status != 0:
                text = f"{name}: {main}, with {path}, isn't loaded at boot ({runner.show(boot)} says so)"
                words = boot[-1] if boot[:1] == ("systemctl",) else ""
                remedy = f"as root: systemctl enable {words}" if words else "have it loaded at boot"
                yield name, WrongState(text, remedy=remedy), False
                continue
            else:
                continue
            yield name, WrongState(text, remedy=inclusion.remedy), not boot
        except FarmhandError as error:
            yield name, error, not boot


def stopped(
    runner: Runner, farm: Farm, services: Sequence[Service]
) -> Iterator[tuple[str, Unserved | FarmhandError]]:
    """Daemons that are stopped, and that a step of ours starts; an error of one that can't be asked."""
    for service in services:
        try:
            for one in service.stopped(farm, runner):
                yield service.NAME, one
        except FarmhandError as error:
            yield service.NAME, error


def unserved(
    runner: Runner, farm: Farm, services: Sequence[Service], files: Sequence[FileChange]
) -> Iterator[tuple[str, Unserved | FarmhandError]]:
    """What daemons that run haven't of ``files``, which are as they should be."""
    for service in services:
        try:
            for one in service.unserved(farm, _of(service, files), runner):
                yield service.NAME, one
        except FarmhandError as error:
            yield service.NAME, error


def mending(found: Sequence[Unserved]) -> tuple[ApplyStep, ...]:
    """The steps for what isn't served, each once, and why."""
    steps: dict[str, ApplyStep] = {}
    reasons: dict[str, list[str]] = {}
    for one in found:
        steps.setdefault(one.step.text, one.step)
        reasons.setdefault(one.step.text, []).append(one.text)
    return tuple(
        replace(step, text=f"{text} ({'; '.join(reasons[text])})") for text, step in steps.items()
    )


def _of(service: Service, files: Sequence[FileChange]) -> list[FileChange]:
    return [change for change in files if change.service == service.NAME]
