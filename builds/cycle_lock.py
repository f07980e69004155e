"""The lock that a cycle shares with others (``lock:`` below ``cycle:``): taken before anything is
touched, given back at the end, also by the next command after a kill.

Its token, which whoever has it can end the lock by, is kept in a file of the farm's directory that only
we can read. There is one at a time: two cycles of a farm don't run at once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from builds.record import CYCLE_LOCK
from host.documents import json_object, made, read_file
from host.files import remove, write_atomic
from inventory.errors import FarmhandError
from inventory.sizes import format_duration
from provision.engine.facts import Facts
from provision.engine.journal import Entry
from provision.engine.operation import Activity, Recovery
from provision.engine.record import Record
from provision.site import Site

if TYPE_CHECKING:  # a cycle that shares no lock needs none of it
    from builds.dav import Dav
    from builds.webdav_lock import LockHolder, RemoteLock
    from inventory.model import CycleLock


@dataclass(frozen=True, slots=True)
class _KeptLock:
    """What the file has."""

    url: str
    token: str


@dataclass(frozen=True, slots=True)
class CycleLockFacts(Facts):
    """``mark``: of the holding, as the lock's owner has it."""

    mark: str


class _CycleLockActivity(Activity[CycleLockFacts]):
    """Recovery gives the lock back. Until its server can be asked, each command tries; where it is gone
    for good, the farm file should say so."""

    name = "cycle-lock"
    facts = CycleLockFacts

    def locks(self, _site: Site, _record: Record, _facts: CycleLockFacts) -> tuple[str, ...]:
        return (CYCLE_LOCK,)

    def recover(self, site: Site, _record: Record, facts: CycleLockFacts) -> Recovery[CycleLockFacts]:
        section, known = section_of(site), _read(_file(site))
        if section is None or (known is not None and known.url != section.webdav):
            text = "the lock is at a place that the farm file no longer names: it ends by itself"
            return Recovery(text, lambda _: remove(_file(site)))

        def give_back(_: Entry[CycleLockFacts]) -> None:
            _give_back(opened(site, section), facts.mark, known)
            remove(_file(site))

        return Recovery(f"give back {section.webdav}, as far as it is ours still", give_back)


CYCLE_LOCKED = _CycleLockActivity()


def section_of(site: Site) -> CycleLock | None:
    return site.farm.cycle.lock if site.farm.cycle is not None else None


def opened(site: Site, section: CycleLock) -> Dav:
    """Its file on the server; nobody is called yet. Errors: UsageError, WrongState (of the files that
    the section names)."""
    from builds.dav import Dav
    from builds.dav_login import Credentials
    from host.web import trusted

    beside = site.farm.path.parent
    file = section.credentials
    credentials = Credentials.read(beside / file.expanduser()) if file is not None else None
    ca = section.ca and beside / section.ca.expanduser()
    return Dav(section.webdav, credentials, trusted(section.webdav, ca))


@contextlib.contextmanager
def cycle_locked(site: Site) -> Iterator[RemoteLock | None]:
    """Hold the lock of the farm's cycle; None, where it shares none. That it can't be given back at the
    end is a warning: the next command tries again. Errors: Busy (somebody has it), Unsupported, others
    of the server's; then it isn't held."""
    section = section_of(site)
    if section is None:
        yield None
        return
    from builds.webdav_lock import RemoteLock

    dav, holder = opened(site, section), _holder(site)
    ended: BaseException | None = None  # its own entry in the journal tells of the lock alone
    taken = False
    try:
        with site.journal.begin(CYCLE_LOCKED, [], CycleLockFacts(holder.mark)) as entry:
            entry.step(f"lock {section.webdav}")
            lock = RemoteLock(dav, holder, section.timeout, took=partial(_keep, site, section))
            before = site.patience.until_free(lock.take)
            taken = True
            site.reporter.say(f"holding {section.webdav}, the lock that others share")
            if before.file is not None:
                site.reporter.say(f"{before.file} had left it behind")
            try:
                yield lock
            except BaseException as error:  # noqa: BLE001 - raised below
                ended = error
            entry.must_finish = True
            lock.give_back()
            entry.must_finish = False
            remove(_file(site))
    except FarmhandError as error:
        if not taken:
            raise
        site.reporter.warn(
            f"the lock could not be given back: {error.message}; the next command tries again, and it "
            f"ends by itself after {format_duration(lock.granted)}"
        )
    if ended is not None:
        raise ended


def _holder(site: Site) -> LockHolder:
    from builds.webdav_lock import LockHolder

    return LockHolder(
        mark=secrets.token_hex(8), who=str(site.requester), host=socket.gethostname(), pid=os.getpid(),
        farm=site.farm.farm, since=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def _file(site: Site) -> Path:
    return site.paths.root / "cycle-lock.json"


def _keep(site: Site, section: CycleLock, token: str) -> None:
    text = json.dumps(asdict(_KeptLock(section.webdav, token)))
    write_atomic(_file(site), text.encode(), mode=0o600)


def _read(path: Path) -> _KeptLock | None:
    """None as well for a damaged one: then the lock's owner tells whether it's ours."""
    try:
        return made(_KeptLock, json_object(read_file(path)))
    except (OSError, ValueError):
        return None


def _give_back(dav: Dav, mark: str, known: _KeptLock | None) -> None:
    """Give it back, if it is still ours. FarmhandError."""
    from builds.webdav_lock import give_back, look

    if known is not None:
        give_back(dav, known.token)
        return
    seen = look(dav)
    if seen.held and seen.token and mark in seen.owner:
        give_back(dav, seen.token)
