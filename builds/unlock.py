"""unlock: who holds the lock that the cycle shares with others; broken only when that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from builds.cycle_lock import opened, section_of
from inventory.errors import Call, NotFound, Text
from provision.engine.facts import Facts
from provision.engine.operation import Activity, Operation, Recovery
from provision.engine.plan import Job, Plan, alone, job
from provision.engine.record import Record
from provision.engine.run import Run
from provision.site import Site

if TYPE_CHECKING:
    from builds.dav import Dav
    from builds.webdav_lock import SharedLock


@dataclass(frozen=True, slots=True)
class UnlockResult:
    """``held``: whether it was, and by ``owner``, as its server shows it, or its file does. ``age``:
    seconds since then; None: nobody knows. ``broken``: in a plan, whether it would be."""

    url: str
    held: bool = False
    owner: str = ""
    age: float | None = None
    broken: bool = False


@dataclass(frozen=True, slots=True)
class Unlock(Operation[UnlockResult]):
    """Show who holds the lock that the cycle shares with others. ``force``: end it, whoever holds it.
    Errors: NotFound (the farm shares none), Unsupported (the server doesn't say what to end), others of
    the server's."""

    name = "unlock"

    force: bool = False

    def plan(self, run: Run) -> Plan[UnlockResult]:
        from builds.webdav_lock import look

        section = section_of(run.site)
        if section is None:
            raise NotFound(
                f"{run.site.name}: its cycle shares no lock with others",
                remedy="'lock' below 'cycle' in the farm file makes it share one: see docs/cycle.md",
            )
        dav = opened(run.site, section)
        seen = look(dav)
        breaks = self.force and seen.held
        result = UnlockResult(
            seen.url, seen.held, str(seen.holder or seen.owner) if seen.held else "", seen.age, breaks
        )
        return Plan([alone(_job(run.site, dav, seen, breaks=breaks))], lambda: result)


def _job(site: Site, dav: Dav, seen: SharedLock, *, breaks: bool) -> Job:
    if breaks:
        return job("unlock", "", f"end the lock of others: {seen}", partial(_end, site, dav, seen))
    how: Text = ""
    if seen.held:
        how = ("; if that is dead for sure: ", Call("unlock", remote=True, force=True))
    return job("keep", "", (str(seen), how))


def _end(site: Site, dav: Dav, seen: SharedLock) -> None:
    from builds.webdav_lock import break_lock

    with site.journal.begin(UNLOCK, [], UnlockFacts(seen.url)) as entry:
        entry.step(f"end the lock of others: {seen}")
        break_lock(dav, seen)


@dataclass(frozen=True, slots=True)
class UnlockFacts(Facts):
    """``url``: of the lock that is ended."""

    url: str


class _UnlockActivity(Activity[UnlockFacts]):
    """There is nothing to finish or undo: whether the lock is there its server tells."""

    name = "unlock"
    facts = UnlockFacts

    def recover(self, _site: Site, _record: Record, facts: UnlockFacts) -> Recovery[UnlockFacts]:
        return Recovery(f"whether {facts.url} is held still, its server tells; noted")


UNLOCK = _UnlockActivity()
