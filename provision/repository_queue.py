"""repo-queue: what others put into a repository's incoming directories goes in, and what has stood the
test of a channel goes on to the next one. Maemo's queues looked from cron, each a script by itself."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from host.arrivals import DirectoryGone
from host.files import check_own_directory, file_error
from host.leases import FileLeases
from inventory.errors import (
    Conflict,
    FarmhandError,
    NotFound,
    NotOurs,
    Text,
    Unfit,
    UsageError,
    WrongState,
    joined,
)
from inventory.repositories import PackageRepository, PromotionRule
from provision.site import Site
from repositories.change import recover
from repositories.generation import Generation
from repositories.incoming import Incoming, Rejection, Upload
from repositories.repository import Repository

_REFUSALS = (Unfit, Conflict, UsageError)
"""What an upload is to blame for. Anything else is ours to put right: the upload stays, and whatever
comes after it goes on."""

Act = Callable[..., object]
"""Carry out an operation of that name, with its request."""


@dataclass(frozen=True, slots=True)
class QueueEvent:
    """``what``: added, rejected or promoted; left: it stays as it is, for the reason that ``text`` says,
    until the next turn."""

    what: str
    channel: str
    name: str
    text: Text


class Queue:
    """A repository's incoming directories and promotions. A context manager; one process at a time.
    Where it is only planned, nothing is moved or removed."""

    def __init__(self, site: Site, repository: Repository, act: Act) -> None:
        self._site, self._repository, self._act = site, repository, act
        self._section: PackageRepository = site.farm.repositories[repository.name]
        self._stack = ExitStack()
        self._rejections: list[QueueEvent] = []
        self._directories: dict[str, Incoming] = {}

    def __enter__(self) -> Queue:
        if self._section.incoming is None and not self._section.promotions:
            raise NotFound(
                f"{self._repository.name} has no queue",
                remedy="give it 'incoming' or 'promotions' in the farm file",
            )
        try:
            if not self._site.plan:
                recover(self._repository)  # what is due is told by what was published
            if self._section.incoming:
                self._open(Path(self._section.incoming))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, top: Path) -> None:
        if not top.is_dir():
            raise NotFound(
                f"there is no directory {top} for {self._repository.name}'s uploads",
                remedy=f"mkdir {top}, and in it one for each channel that takes uploads",
            )
        check_own_directory(top)
        keys = self._uploaders()
        channels = [name for name in self._repository.settings.channels if (top / name).is_dir()]
        if not channels:
            first = top / self._repository.settings.channels[0]
            raise NotFound(
                f"{top} has no directory for uploads to a channel of {self._repository.name}",
                remedy=f"mkdir {first}, and let those write there who may upload",
            )
        if not self._site.plan:
            self._repository.make()
            leases = FileLeases(self._repository.layout.private / "queue")
            note = f"repo-queue of {self._repository.name}"
            self._site.patience.until_free(
                lambda: self._stack.enter_context(leases.hold(("queue",), note))
            )
        for channel in channels:
            incoming = Incoming(
                top / channel, top / "rejected", self._repository.format.SUFFIX, self._site.runner,
                with_changes=bool(keys), keys=keys, on_reject=self._note(channel),
                look=self._site.plan,
            )  # fmt: skip
            self._directories[channel] = self._stack.enter_context(incoming)

    def _uploaders(self) -> bytes:
        """Public keys of those who may upload; b"": whoever may write there may. WrongState where the
        farm file names keys, and there are none: nobody's uploads are then taken."""
        if self._section.uploaders is None:
            return b""
        path = self._site.farm.path.parent / self._section.uploaders.expanduser()
        try:
            keys = path.read_bytes()
        except OSError as error:
            raise file_error(error, path, "read the uploaders' keys") from error
        if not keys.strip():
            raise WrongState(f"{path} has no key of an uploader", remedy="gpg --export writes them")
        return keys

    def turn(self, tested: Callable[[], Mapping[int, str]]) -> Iterator[QueueEvent]:
        """All that can be done now. ``tested``: the builds that passed with a generation, by its
        number. What goes wrong with one of them stops no other. DirectoryGone."""
        for channel, incoming in self._directories.items():
            yield from self._safely(channel, "what was uploaded", self._uploads(channel, incoming))
        for rule in self._section.promotions:
            yield from self._safely(rule.to, f"what {rule.source} has", self._promote(rule, tested))

    def wait(self, seconds: float) -> None:
        """Until something arrives, or may be complete by now, or so many seconds are over."""
        directories = list(self._directories.values())
        select.select(directories, (), (), min([seconds, *(each.soon for each in directories)]))

    def _safely(self, channel: str, name: str, steps: Iterator[QueueEvent]) -> Iterator[QueueEvent]:
        try:
            yield from steps
        except DirectoryGone:
            raise
        except FarmhandError as error:
            why = joined([error.message, *([error.remedy] if error.remedy else [])])
            yield QueueEvent("left", channel, name, why)
        told, self._rejections = self._rejections, []
        yield from told

    def _uploads(self, channel: str, incoming: Incoming) -> Iterator[QueueEvent]:
        for upload in incoming.complete():
            yield from self._safely(channel, upload.name, self._take(channel, incoming, upload))

    def _take(self, channel: str, incoming: Incoming, upload: Upload) -> Iterator[QueueEvent]:
        suffix = self._repository.format.SUFFIX
        packages = [file for file in upload.files if file.name.endswith(suffix)]
        who = f", signed by {upload.signers[0]}" if upload.signers else ""
        try:
            if not packages:
                raise Unfit(f"no {suffix} file is in it")
            self._act(
                "repo-add", repo=self._repository.name, channel=channel,
                paths=tuple(file.path for file in packages), sums=tuple(f.sha256 for f in packages),
                note=f"upload {upload.name}{who}",
            )  # fmt: skip
        except NotOurs:
            raise
        except _REFUSALS as error:
            incoming.reject(upload, error.message)
            return
        incoming.taken(upload)
        text = f"{len(packages)} of its files are packages"
        yield QueueEvent("added", channel, upload.name, text)

    def _promote(
        self, rule: PromotionRule, tested: Callable[[], Mapping[int, str]]
    ) -> Iterator[QueueEvent]:
        found = due(self._repository, rule, tested() if rule.tested else {}, datetime.now(UTC))
        target = self._repository.head(rule.to)
        if found is None or (target and target.chunks == found.chunks):
            return
        why = f"rule {rule.source} to {rule.to}"
        self._act(
            "repo-promote", repo=self._repository.name, from_=str(found.sequence), channel=rule.to,
            note=why,
        )  # fmt: skip
        yield QueueEvent("promoted", rule.to, str(found.sequence), why)

    def _note(self, channel: str) -> Callable[[Rejection], None]:
        def note(rejection: Rejection) -> None:
            self._rejections.append(QueueEvent("rejected", channel, rejection.name, rejection.reason))

        return note


def due(
    repository: Repository, rule: PromotionRule, tested: Mapping[int, str], now: datetime
) -> Generation | None:
    """The newest generation that the rule lets go on; None: none does. What the channel was rolled back
    from doesn't, nor what went on before, or is older than that: whoever then gave the other channel
    something else meant it."""
    log = repository.documents.log
    gone_on = max((entry.origin for entry in log(rule.to) if entry.verb == "promote"), default=0)
    back_to = 0
    for entry in reversed(log(rule.source)):
        if entry.sequence <= gone_on:
            break
        if back_to and entry.sequence != back_to:
            continue
        old = rule.after is None or (now - entry.at).total_seconds() >= rule.after
        if old and (not rule.tested or entry.sequence in tested):
            with contextlib.suppress(FarmhandError):  # it may be collected
                return repository.documents.read(entry.sequence)
        back_to = entry.origin if entry.verb == "roll back" else 0
    return None
