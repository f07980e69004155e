"""unlock: who holds the lock that the cycle shares with others; broken only when that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from builds.cycle_lock import opened, section_of
from inventory.errors import Call, NotFound, Text
from provision.engine.operation import Operation
from provision.engine.plan import Job, Plan, alone, job
from provision.engine.run import Run

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
        return Plan([alone(_job(dav, seen, breaks=breaks))], lambda: result)


def _job(dav: Dav, seen: SharedLock, *, breaks: bool) -> Job:
    from builds.webdav_lock import break_lock

    if breaks:
        return job("unlock", "", f"end the lock of others: {seen}", partial(break_lock, dav, seen))
    how: Text = ""
    if seen.held:
        how = ("; if that is dead for sure: ", Call("unlock", remote=True, force=True))
    return job("keep", "", (str(seen), how))
