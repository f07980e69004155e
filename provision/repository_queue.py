"""repo-queue: what others put into a repository's incoming directories goes in, and what has stood the
test of a channel goes on to the next one. Maemo's queues looked from cron, each a script by itself."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from host.files import check_own_directory, file_error
from host.leases import FileLeases
from inventory.errors import Conflict, FarmhandError, NotFound, Unfit, UsageError, WrongState
from inventory.repositories import PackageRepository, PromotionRule
from provision.site import Site
from repositories.generation import Generation
from repositories.incoming import Incoming, Rejection, Upload
from repositories.repository import Repository

_REFUSALS = (Unfit, Conflict, UsageError)
"""What an upload is to blame for. Anything else is ours to put right: the upload stays."""

Act = Callable[..., object]
"""Carry out an operation of that name, with its request."""


@dataclass(frozen=True, slots=True)
class QueueEvent:
    """``what``: added, rejected or promoted."""

    what: str
    channel: str
    name: str
    text: str


class Queue:
    """A repository's incoming directories and promotions. A context manager; one process at a time."""

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
        layout = self._repository.layout
        self._repository.make()
        doing = f"repo-queue of {self._repository.name}"
        self._stack.enter_context(FileLeases(layout.private / "queue").hold(("queue",), doing))
        keys = self._uploaders()
        for channel in self._repository.settings.channels:
            if not (top / channel).is_dir():
                continue
            incoming = Incoming(
                top / channel, top / "rejected", self._repository.format.SUFFIX, self._site.runner,
                with_changes=bool(keys), keys=keys, on_reject=self._note(channel),
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
        number."""
        for channel, incoming in self._directories.items():
            for upload in incoming.complete():
                if event := self._take(channel, incoming, upload):
                    yield event
                yield from self._told()
            yield from self._told()
        for rule in self._section.promotions:
            yield from self._promote(rule, tested)

    def wait(self, seconds: float) -> None:
        """Until something arrives, or so many seconds are over."""
        select.select(list(self._directories.values()), (), (), seconds)

    def _take(self, channel: str, incoming: Incoming, upload: Upload) -> QueueEvent | None:
        """None: it was rejected, which is told by itself."""
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
        except _REFUSALS as error:
            incoming.reject(upload, error.message)
            return None
        incoming.taken(upload)
        return QueueEvent("added", channel, upload.name, f"{len(packages)} of its files are packages")

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

    def _told(self) -> list[QueueEvent]:
        told, self._rejections = self._rejections, []
        return told


def due(
    repository: Repository, rule: PromotionRule, tested: Mapping[int, str], now: datetime
) -> Generation | None:
    """The newest generation that the rule lets go on; None: none does."""
    for entry in reversed(repository.documents.log(rule.source)):
        old = rule.after is None or (now - entry.at).total_seconds() >= rule.after
        if old and (not rule.tested or entry.sequence in tested):
            try:
                return repository.documents.read(entry.sequence)
            except FarmhandError:  # collected
                continue
    return None
