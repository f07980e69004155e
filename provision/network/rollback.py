"""How an apply is taken back: by itself, when a daemon refuses; by the next command, after a kill.

The old files are kept in the state directory, by numbers, and the journal says which is which.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from host.files import file_error, make_directory, remove, sweep, sync, write_atomic
from inventory.errors import FarmhandError, Interrupted, WrongState
from provision.engine.facts import Facts
from provision.engine.journal import Entry
from provision.engine.operation import Activity, Recovery
from provision.engine.record import Record
from provision.network.daemons import steps
from provision.network.file_change import FileChange
from provision.network.records import RecordChange
from provision.network.service import services as used_services
from provision.site import Site


def undo(
    site: Site,
    files: Sequence[FileChange],
    services: Collection[str],
    say: Callable[[str], None],
    *,
    updates: Sequence[RecordChange] = (),
    down: Collection[str] = (),
) -> list[str]:
    """Put the old files back, the last one first, tell these services, and take the updates of records
    back. Returns, in words, what went wrong. A file that somebody else has written since is left alone.
    ``down``: services that didn't run before."""
    trouble: list[str] = []
    inverse = []
    told = {
        service.NAME: service
        for service in used_services(site.farm)
        if service.NAME in services or service.READS_BY_ITSELF
    }
    for change in reversed(files):
        back = change.inverse()
        try:
            live = live_text(change.path)
            if live not in (change.after, change.before):
                trouble.append(f"{change.path} was changed by somebody else meanwhile: left as it is")
                continue
            if change.service in told:
                back = told[change.service].put_back(site.runner, back)
            if back.after != live:
                say(f"put back {change.path}")
                put(back)
            inverse.append(back)
        except FarmhandError as error:
            trouble.append(f"{change.path} could not be put back: {error.message}")
    for step in steps(site.farm, inverse):
        if step.service in told:
            try:
                say(f"again {step.text}")
                step.run(site.runner)
            except Interrupted:
                raise
            except FarmhandError as error:
                if step.service not in down:
                    trouble.append(
                        f"{step.service} could not be told about its old files: {error.message}"
                    )
            else:
                if step.service in down:
                    trouble.append(f"{step.service} didn't run before, and runs now with its old files")
    for service in used_services(site.farm) if updates else ():
        try:
            if keeper := service.live_records:
                say(f"take back the updates of {service.NAME}'s records")
                keeper.record_server(site.farm).revert(updates)
        except Interrupted:
            raise
        except FarmhandError as error:
            trouble.append(f"{service.NAME}'s records could not be put back: {error.message}")
    return trouble


# ---- Files


def put(change: FileChange) -> None:
    """Put the new file in the old one's place in one step, with its owner and mode. A symbolic link is
    followed."""
    path = Path(os.path.realpath(change.path))
    if change.after is None:
        remove(path)
        return
    make_directory(path.parent, mode=0o755)
    if change.zone and change.before is None:
        remove(path.with_name(f"{path.name}.jnl"))  # of a zone that is no more: both would be refused
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(change.after.encode(errors="surrogateescape"))
            file.flush()
            if (change.uid, change.gid) != (-1, -1):
                os.fchown(file.fileno(), change.uid, change.gid)
            os.fchmod(file.fileno(), change.mode)
            _same_attributes(path, temporary)
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno == errno.EBUSY:
            raise WrongState(
                f"cannot write {path}: it is a mount point by itself, as in a container",
                remedy="give the service another path",
            ) from error
        raise file_error(error, path, "write") from error


def _same_attributes(old: Path, new: Path) -> None:
    """Copy access control lists and the like, if the file system has them."""
    with contextlib.suppress(OSError):
        for name in os.listxattr(old):
            os.setxattr(new, name, os.getxattr(old, name))


def live_text(path: str) -> str | None:
    """A live file's text; None: there is none."""
    try:
        return Path(path).read_bytes().decode(errors="surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise file_error(error, Path(path), "read") from error


# ---- What is kept for a kill


@dataclass(frozen=True, slots=True)
class KeptFile(Facts):
    """A file that is written anew. ``before``: whether there was one. ``after``: SHA-256 of the new one;
    None if it goes."""

    service: str
    path: str
    before: bool
    after: str | None
    mode: int
    uid: int
    gid: int
    zone: str


@dataclass(frozen=True, slots=True)
class ApplyFacts(Facts):
    """``files``: in the order they are written. ``updates``: of live zones. ``told``: services that have
    perhaps been told of their files. ``complete``: nothing is to be put back any more. Each is noted
    before it is so; whether a file was written the file itself tells."""

    files: tuple[KeptFile, ...] = ()
    updates: tuple[RecordChange, ...] = ()
    told: tuple[str, ...] = ()
    complete: bool = False


def keep(site: Site, entry: Entry[ApplyFacts], files: Sequence[FileChange]) -> None:
    """Keep the old files, and note the digests of the new ones, before the first is written."""
    directory = kept(site, entry.id)
    make_directory(directory, mode=0o700)
    noted = []
    for number, change in enumerate(files):
        if change.before is not None:
            data = change.before.encode(errors="surrogateescape")
            write_atomic(directory / str(number), data, mode=0o600)
        after = None if change.after is None else _sum(change.after)
        noted.append(
            KeptFile(
                change.service, change.path, change.before is not None, after, change.mode,
                change.uid, change.gid, change.zone,
            )
        )  # fmt: skip
    entry.note(replace(entry.facts, files=tuple(noted)))


class _ApplyActivity(Activity[ApplyFacts]):
    """Recovery puts the old files back and tells the daemons."""

    name = "network-apply"
    facts = ApplyFacts

    def locks(self, _site: Site, _record: Record, _facts: ApplyFacts) -> tuple[str, ...]:
        return ("network",)

    def recover(self, site: Site, record: Record, facts: ApplyFacts) -> Recovery[ApplyFacts]:
        files = [_remembered(site, record.id, n, kept) for n, kept in enumerate(facts.files)]
        if facts.complete:

            def forget(_: Entry[ApplyFacts]) -> None:
                _sweep(files)
                remove(kept(site, record.id))

            return Recovery("it was complete; noted", forget)
        lost = [
            change.path
            for change, known in zip(files, facts.files, strict=True)
            if known.before and change.before is None
        ]
        # a daemon that was told is told again, also where a recovery before put its files back
        written = [
            change
            for change in files
            if change.path not in lost
            and (change.service in facts.told or live_text(change.path) != change.before)
        ]

        def run(entry: Entry[ApplyFacts]) -> None:
            trouble = undo(site, written, facts.told, entry.step, updates=facts.updates)
            if trouble:
                trouble.append(
                    f"the old files stay in {kept(site, record.id)}, by the journal's numbers"
                )
            trouble += [f"{path} is left as it is: what it was before is gone" for path in lost]
            for text in trouble:
                site.reporter.warn(text)
            _sweep(files)
            if not trouble:
                entry.note(ApplyFacts())  # first: without the old files nothing can be put back
                remove(kept(site, record.id))

        if not written and not facts.updates and not lost:
            return Recovery("nothing of it was written", run)
        return Recovery("put the old files back, and tell the daemons", run)


APPLY = _ApplyActivity()


def _remembered(site: Site, operation: int, number: int, file: KeptFile) -> FileChange:
    """As it was, but for ``after``: what is live, if that is what was to be written. ``before`` is None,
    too, where what was kept is gone."""
    before = live_text(str(kept(site, operation) / str(number))) if file.before else None
    live = live_text(file.path)
    ours = file.after is not None and live is not None and _sum(live) == file.after
    after = live if ours or file.after is None else before
    return FileChange(file.service, file.path, before, after, file.mode, file.uid, file.gid, file.zone)


def _sweep(files: Sequence[FileChange]) -> None:
    """Remove the temporary files of their writers."""
    for change in files:
        path = Path(os.path.realpath(change.path))
        if path.parent.is_dir():
            sweep(path.parent, path.name)


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def kept(site: Site, operation: int) -> Path:
    """The directory of an apply's old files, until it is through."""
    return site.paths.root / "network" / str(operation)
